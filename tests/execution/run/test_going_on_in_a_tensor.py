"""A table of n-grams is one tensor of up to 98 GB: a run that is killed in it goes on in it, to the same bytes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ds4convert.demo import synth
from ds4convert.execution import file_writer
from ds4convert.files import Disk
from tests import support_run as s

LONG = 1 << 20
ROWS = 90_000
KILLED = """
import os, signal, sys
from pathlib import Path
from ds4convert.__main__ import main
from ds4convert.execution import file_writer
from ds4convert.files import Disk
file_writer.LONG_BYTES = int(sys.argv[1])
journal, write_at = Path(sys.argv[4]) / ".ds4convert" / "journal.jsonl", Disk.write_at
def write(self, fd, data, at):
    if journal.exists() and '"begun"' in journal.read_text():
        os.kill(os.getpid(), signal.SIGKILL)
    return write_at(self, fd, data, at)
Disk.write_at = write
sys.argv = ["ds4convert", *sys.argv[2:]]
main()
"""


class Counted(Disk):
    """Counts the bytes that are written into files, by their place."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[tuple[int, int]] = []

    def write_at(self, fd: int, data: Any, at: int) -> None:
        self.places.append((at, len(data)))
        super().write_at(fd, data, at)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = json.loads((s.GOLDEN / "tiny-v41-a" / "checkpoint" / "config.json").read_text())
    config["text_config"]["engram_num_embeddings"] = [606, ROWS]
    out = tmp_path_factory.mktemp("table") / "source"
    synth.write(config, out)
    return out


@pytest.mark.sampled(2)
@pytest.mark.slow
@pytest.mark.parametrize("words", [[], ["--engram", "affine-4-g32", "--rounding", "nearest"], ["--no-hash"]])
def test_a_run_that_is_killed_in_a_table_goes_on_in_it(
    source: Path, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    s.cli("quantize", source, whole, *words)
    command = [sys.executable, "-c", KILLED, str(LONG), "quantize", str(source), str(out), "--jobs", "1", *words]
    killed = subprocess.run(command, env=s.environment(), capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    lines = [json.loads(x) for x in (out / ".ds4convert" / "journal.jsonl").read_text().splitlines()]
    pieces, sizes, *_ = next(x["begun"] for x in lines if "begun" in x)
    assert pieces and sizes[0] >= LONG // 2
    disk = Counted()
    monkeypatch.setattr(file_writer, "LONG_BYTES", LONG)
    options = {"keep_mtp": True, "hashing": "--no-hash" not in words}
    if "--engram" in words:
        from ds4convert.planning import build, layouts, recipes

        recipe = recipes.recipe_of("native").overridden(None, None, None, "affine-4-g32")
        made = build.Options(recipe, layouts.layout_of("inline"), rounding="nearest")
        opened = s.open_source(source)
        s.convert.run(opened, s.make_plan(opened, made), out, s.convert.Way(1, disk=disk))
    else:
        s.run(source, out, disk=disk, jobs=1, **options)
    name = "language_model.layers.3.engram.embed.weight"
    table = s.stored(out)[name]
    inside = sum(size for at, size in disk.places if table.start <= at < table.start + table.size)
    assert inside <= table.size - sizes[0]  # what was there is not written again
    assert s.contents(out) == s.contents(whole)


def test_what_was_altered_in_a_begun_table_is_made_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    s.run(source, whole)
    command = [sys.executable, "-c", KILLED, str(LONG), "quantize", str(source), str(out), "--jobs", "1"]
    assert subprocess.run(command, env=s.environment(), check=False).returncode == -signal.SIGKILL
    table = s.stored(whole)["language_model.layers.3.engram.embed.weight"]
    partial = next(out.glob("model-0*.partial*"), None) or next(
        p for p in out.iterdir() if p.name.startswith("model-0")
    )
    s.flip(partial, table.start + 100, 3)
    monkeypatch.setattr(file_writer, "LONG_BYTES", LONG)
    s.run(source, out, jobs=1)
    assert s.contents(out) == s.contents(whole)
