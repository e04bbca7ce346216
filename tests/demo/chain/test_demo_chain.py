"""`ds4convert demo`: the whole chain on the checkpoint of the package, again and again, and only in its own folder."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests import support
from tests.support import assert_refused, run

pytest.importorskip("mlx.core")
EMBEDDED = support.ROOT / "manifests" / "demo"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], float]:
    """Return the folder of a demo, what it found, and the seconds of processor time that it took.

    An earlier demo was interrupted in it while it copied the checkpoint.
    """
    folder = tmp_path_factory.mktemp("demo") / "here"
    (folder / "source").mkdir(parents=True)
    (folder / "source" / "config.json").write_bytes((EMBEDDED / "config.json").read_bytes())
    (folder / "source" / "tokenizer.json.partial").write_bytes(b"{")
    start = time.process_time()
    result = run("demo", folder, "--json")
    assert result.code == 0, result.err
    return folder, dict(result.json), time.process_time() - start


def checkpoints(folder: Path) -> dict[str, str]:
    """Return all files but those that hold times: the page, and what `verify --mtp` keeps for a model card."""
    timed = ("report.html", "ds4convert_verify.json")
    return {name: digest for name, digest in support.tree(folder).items() if Path(name).name not in timed}


def test_the_chain_ends_well_and_in_time(demo: tuple[Path, dict[str, Any], float]) -> None:
    _, facts, seconds = demo
    assert facts["ok"] is True and seconds < 300, "a guard against work without end: in quiet it is under 60 s"
    assert facts["inspect"]["problems"] == [] and facts["inspect"]["mtp"]["kind"] == "classic"
    assert facts["verify"]["ok"] is True and facts["diff"]["changed"] == 0
    decode = facts["decode"]
    assert decode["greedy_equal"] is True and decode["plain"]["text"] == decode["mtp"]["text"]
    assert decode["mtp"]["acceptance"] > 0.5 and decode["mtp"]["tokens_per_pass"] > 1.5
    words = decode["mtp"]["text"].split()
    assert len(words) > 20 and sum(w.strip(".,;:?").isalpha() for w in words) > 0.9 * len(words)


def test_both_heads_are_shown_side_by_side(demo: tuple[Path, dict[str, Any], float]) -> None:
    folder, facts, _ = demo
    classic, dspark = facts["heads"]
    assert (classic["kind"], dspark["kind"]) == ("classic", "dspark")
    assert (len(classic["acceptance_by_position"]), len(dspark["acceptance_by_position"])) == (1, 5)
    for head in (classic, dspark):
        assert head["greedy_equal"] and head["tokens_per_pass"] > 1.1 and head["mtp_tokens_per_second"] > 0
    assert facts["dspark"]["verify"]["ok"] is True and facts["dspark"]["quantize"]["head"] == "dspark"
    assert (folder / "mlx-dspark" / "ds4convert_manifest.json").is_file()


def test_the_source_is_the_checkpoint_of_the_package(demo: tuple[Path, dict[str, Any], float]) -> None:
    folder, facts, _ = demo
    found = {p.name: p.read_bytes() for p in (folder / "source").iterdir()}
    wanted = {p.name: p.read_bytes() for p in EMBEDDED.iterdir() if p.is_file() and p.suffix != ".md"}
    assert found == wanted
    assert facts["copied"]["bytes"] == sum(map(len, found.values())) < 6_000_000


@pytest.mark.nightly
def test_a_second_demo_changes_nothing_and_tells_every_step(demo: tuple[Path, dict[str, Any], float]) -> None:
    folder, facts, _ = demo
    before = checkpoints(folder)
    result = run("demo", folder)
    assert result.code == 0 and checkpoints(folder) == before and (folder / "report.html").is_file()
    for command in ("inspect", "quantize", "verify", "diff", "generate"):
        assert f"$ ds4convert {command} " in result.out
    assert result.out.count(facts["decode"]["mtp"]["text"]) >= 2
    assert "Both heads, over one backbone" in result.out and "\ndspark " in result.out
    assert "equal, token by token" in result.out and "tokens per backbone pass" in result.out


def test_a_folder_of_someone_else_is_left_alone(demo: tuple[Path, dict[str, Any], float], tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    support.copy_folder(demo[0], tmp_path / "other")
    config = tmp_path / "other" / "source" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_size": 256}))
    before = support.tree(tmp_path)
    assert_refused(run("demo", tmp_path / "full"), "is not empty and no earlier demo", "ds4convert demo DIR")
    assert_refused(run("demo", tmp_path / "file"), "is a file")
    assert_refused(run("demo", tmp_path / "other"), "config.json: is not the demo's")
    assert support.tree(tmp_path) == before
