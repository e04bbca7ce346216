"""What the pages say to type is typed, line by line, on the demo checkpoint and a Hub on this machine.

Left out are lines that are no short run: `serve` (tests/serving runs the page's addresses), recordings that nobody has
of the demo, other machines' parts. How a line ends is 0, but where the page tells of another end.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.local_hub import LocalHub
from tests.local_hub.fixtures import hub  # noqa: F401
from tests.package.site import pages
from tests.support import ROOT, Result, run

DEMO = ROOT / "manifests" / "demo"
FLASH = "DeepSeek-V4-Flash"
ENDS = {
    ("how-to/add-a-head.md", "verify Flash-4bit --mtp"): 1,  # no head: what the page is about
}
SHORT = {
    "DS4CONVERT_VERIFY_MAX_TOKENS": "8",
    "DS4CONVERT_GENERATE_MAX_TOKENS": "8",
    "DS4CONVERT_CALIBRATION_TOKENS": "256",
    "DS4CONVERT_CALIBRATE_MAX_TOKENS": "256",
    "DS4CONVERT_SENSITIVITY_TOKENS": "64",
}
"""Options that make the lines quicker, by the environment, so that each is typed as it stands."""

LEFT_OUT = {
    "how-to/several-machines.md": "parts of other machines, run by tests/package/test_how_to.py",
    "how-to/object-stores.md": "a store, which tests/hub/objects has",
    "how-to/serve-an-editor.md": "a server",
    "recordings.md": "needs a recording",
    "dspark.md": "its options are run by tests/generation/test_generate.py and tests/verification/mtp/test_dspark.py",
}


def quantized(*words: object) -> Callable[[Path], None]:
    def make(here: Path) -> None:
        assert run("quantize", DEMO, here, *words).code == 0

    return make


def text(path: Path) -> None:
    path.write_text("\n".join(p.read_text() for p in sorted((ROOT / "docs").glob("[a-z]*.md"))))


BEFORE: dict[str, dict[str, Callable[[Path], None]]] = {
    "how-to/add-a-head.md": {"Flash-4bit": quantized("--drop-mtp", "--experts", "affine-4-g64")},
    "how-to/convert-from-the-hub.md": {},
    "how-to/prove-a-folder.md": {"Flash-mlx": quantized()},
    "how-to/choose-for-a-mac.md": {"book.txt": text},
    "how-to/publish.md": {},
    "proven.md": {},
    "index.md": {},
    "json.md": {f"{FLASH}-mlx": quantized()},
}
"""What a page takes for granted, beside the official checkpoint."""


def lines(page: str) -> list[list[str]]:
    return [w for w in pages.commands(page) if w[0] != "serve" and "--reference" not in w]


def test_every_page_with_commands_is_run_or_left_out_with_a_reason() -> None:
    shown = {p for p in pages.written() if lines(p)} - set(pages.hooks().OUTSIDE.values())
    assert shown - set(LEFT_OUT) == set(BEFORE)


def typed(page: str, here: Path, program: Callable[..., Result]) -> None:
    """Type the lines of a page in a folder that has what the page takes for granted."""
    (here / FLASH).symlink_to(DEMO)
    for name, make in BEFORE[page].items():
        make(here / name)
    for words in lines(page):
        if "--overwrite" not in words and words[0] == "quantize" and (here / words[2]).exists():
            words = [*words, "--overwrite"]  # the page shows several ways to the same folder
        done = program(*words)
        assert done.code == ENDS.get((page, " ".join(words)), 0), (words, done.out[-2000:], done.err)


@pytest.mark.slow
def test_the_first_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in SHORT.items():
        monkeypatch.setenv(name, value)
    typed("index.md", tmp_path, run)
    assert (tmp_path / "flash.html").is_file()


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("page", sorted(set(BEFORE) - {"index.md"}))
def test_the_lines_of_a_page_run(page: str, hub: LocalHub, tmp_path: Path) -> None:  # noqa: F811
    hub.add_repo(f"deepseek-ai/{FLASH}", DEMO)
    here = tmp_path / "here"
    here.mkdir()

    def program(*words: object) -> Result:
        environment = os.environ | {"PYTHONPATH": str(ROOT)} | SHORT | hub.environment()
        command = [sys.executable, "-m", "ds4convert", *map(str, words)]
        done = subprocess.run(command, env=environment, cwd=here, capture_output=True, text=True, timeout=600)
        return Result(done.returncode, done.stdout, done.stderr)

    typed(page, here, program)
