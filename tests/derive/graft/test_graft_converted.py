"""A head that is converted already is grafted as it is: from a drafter folder, or from a converted folder that has one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import support
from tests import support_run as s

MANIFEST = "ds4convert_manifest.json"
FORMAT = ["--backbone", "affine-4-g32", "--experts", "mxfp4"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source; its conversions without the head, and with it in three layouts."""
    home = tmp_path_factory.mktemp("home")
    s.tiny(home / "source", layers=3, experts=4)
    s.cli("quantize", home / "source", home / "none", "--drop-mtp", *FORMAT, "-q")
    for layout in ("inline", "vlm", "mtplx"):
        s.cli("quantize", home / "source", home / layout, "--layout", layout, *FORMAT, "-q")
    return home


@pytest.mark.sampled(2)
@pytest.mark.parametrize("donor", ["inline", "vlm", "mtplx", "vlm/mtp"])
def test_the_result_is_what_a_conversion_with_the_head_is(home: Path, donor: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = s.cli("graft", home / "none", "--from", home / donor, "--out", out, "--json")
    assert s.wrong(out, home / "source") == []
    found, wanted = s.contents(out), s.contents(home / "inline")
    told = found.pop(MANIFEST) == wanted.pop(MANIFEST)
    assert found == wanted
    assert told == (donor != "vlm/mtp")  # no manifest tells what the tensors of a lone drafter came from
    checked = json.loads(done.stdout)["checked"]
    assert ("norms and router" in checked) == (donor != "vlm/mtp")


def test_onto_another_programs_folder(home: Path, tmp_path: Path) -> None:
    theirs = s.copied(home / "none", tmp_path / "theirs")
    (theirs / MANIFEST).unlink()
    for layout in ("inline", "vlm"):
        s.cli("graft", theirs, "--from", home / "vlm" / "mtp", "--out", tmp_path / layout, "--layout", layout, "-q")
        assert support.read_folder(tmp_path / layout) == support.read_folder(home / layout)
        assert s.wrong(tmp_path / layout) == []


def test_in_place_and_out_again(home: Path, tmp_path: Path) -> None:
    for layout in ("inline", "vlm"):
        out = s.copied(home / "none", tmp_path / layout)
        before = s.contents(out)
        s.cli("graft", out, "--from", home / "vlm" / "mtp", "--in-place", "--layout", layout, "-q")
        assert s.wrong(out, home / "source") == []
        s.cli("graft", "--remove", out, "-q")
        assert s.contents(out) == before


def test_what_cannot_be_is_refused(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["graft", home / "none", "--from"]
    support.assert_refused(support.run(*words, home / "inline", "--out", out, "--mtp", "bf16"), "keeps its", code=2)
    none = s.copied(home / "none", tmp_path / "n")
    support.assert_refused(support.run(*words, none, "--out", out), "no head to graft")
    other = s.tiny(tmp_path / "other", layers=2, experts=4)
    s.cli("quantize", other, tmp_path / "o", "-q")
    support.assert_refused(support.run(*words, tmp_path / "o", "--out", out), "num_hidden_layers 3 here, 2 there")
    alone = s.copied(home / "vlm" / "mtp", tmp_path / "alone")
    tensors = support.read_folder(alone)
    del tensors["decoder.attn.wq_a.scales"]
    config = json.loads((alone / "config.json").read_text())
    support.write_folder(tmp_path / "cut", tensors, config)
    support.assert_refused(support.run(*words, tmp_path / "cut", "--out", out), "not whole", "decoder.attn.wq_a.scales")
    assert not out.exists()
