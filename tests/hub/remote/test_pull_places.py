"""`pull` into folders that hold something: what no download wrote stays, byte for byte."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hub.remote.conftest import REPO, Call
from tests.support import assert_refused, tree

ALL = [[], ["--only", "all"], ["--only", "meta"], ["--only", "mtp"], ["--only", "backbone"]]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("words", ALL, ids=" ".join)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors.index.json"])
def test_a_file_that_no_download_wrote_is_not_replaced(
    call: Call, mini_source: Path, words: list[str], name: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("years of work")
    (out / "notes.txt").write_text("mine")
    before = tree(out)
    result = call("pull", REPO, "out", *words)
    if (mini_source / name).exists() or "mtp" in words or "backbone" in words:
        assert_refused(result, "no download wrote" if len(words) < 2 or words[1] in {"all", "meta"} else "is not empty")
        assert tree(out) == before
    else:
        assert result.code == 0 and (out / name).read_text() == "years of work"


def test_what_macos_leaves_and_what_was_pulled_before_are_no_hindrance(call: Call, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in (".DS_Store", "._config.json"):
        (out / name).write_text("x")
    for words in (["--only", "meta"], ["--only", "all"], ["--only", "all"]):
        assert call("pull", REPO, "out", *words).code == 0, words
    other = tmp_path / "other"
    other.mkdir()
    (other / ".DS_Store").write_text("x")
    assert call("pull", REPO, "other", "--only", "mtp").code == 0
    assert (other / ".DS_Store").read_text() == "x"
