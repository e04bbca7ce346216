"""The examples run as they stand: those of the docstrings, and the script of the documentation."""

from __future__ import annotations

import doctest
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import ds4convert as ds4
from tests.support import ROOT

DEMO = ROOT / "manifests" / "demo"
SHOWN = ["open", "inspect", "plan", "convert", "verify", "graft", "relayout", "diff", "calibrate", "load"]


def examples() -> list[tuple[str, Any]]:
    """Return (name, function) of all that has an example which needs no Hub."""
    model = ds4.load.__globals__["LoadedModel"]
    return [*((n, getattr(ds4, n)) for n in SHOWN), ("generate", model.generate), ("stream", model.stream)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with what the examples name: a checkpoint, and a text."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "checkpoint").symlink_to(DEMO)
    (folder / "book.txt").write_text("In the beginning God created the heaven and the earth. " * 4)
    return folder


@pytest.mark.parametrize(("name", "function"), examples(), ids=lambda x: x if isinstance(x, str) else "")
def test_the_example_of_a_docstring_runs(
    name: str, function: Any, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = home
    if name == "convert":  # it says that nothing was there
        folder = tmp_path
        (folder / "checkpoint").symlink_to(DEMO)
    monkeypatch.chdir(folder)
    (test,) = doctest.DocTestFinder(recurse=False).find(function, name)
    told: list[str] = []
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=told.append)
    assert result.attempted > 1 and not result.failed, "".join(told)


def test_the_script_of_the_documentation_plans_converts_verifies_and_decodes(tmp_path: Path) -> None:
    script = ROOT / "docs" / "examples" / "convert.py"
    done = subprocess.run(
        [sys.executable, "-P", script, DEMO, "out"], cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    for part in ("head: classic", "converting: ", "ok   source", "the same tokens: True", "refused: "):
        assert part in done.stdout, done.stdout
    assert (tmp_path / "out" / "ds4convert_manifest.json").is_file() and "FAIL" not in done.stdout
