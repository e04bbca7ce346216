"""The time that `plan` projects for quantizing Flash, against what real runs of some of its layers take.

    python benchmarks/quantize_time.py [--recipes q4 ...] [--experts 256] [--rounds 1] [--folder DIR]

Synthetic checkpoints of one and of two layers of Flash's size, each with the head, embedding and output matrix, are
converted; the second's time and 41 times what its second layer took is the extrapolation. The memory of the run and
its worker processes together is sampled every tenth of a second; pages that processes share count in each. Prints one
line per recipe; medians over rounds, of runs and projections in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ds4convert.checkpoint.config import named_config, parse_config
from ds4convert.checkpoint.inventory import expected
from ds4convert.checkpoint.source import imagined
from ds4convert.planning import build
from ds4convert.planning.layouts import layout_of
from ds4convert.planning.recipes import recipe_of
from ds4convert.planning.side_files import SideFiles

LAYERS = 43
PROGRAM = str(Path(sys.executable).with_name("ds4convert"))


def run(*words: object) -> dict[str, Any]:
    """Return what the program reports."""
    done = subprocess.run([PROGRAM, *map(str, words), "--json", "-q"], stdout=subprocess.PIPE, text=True, check=True)
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


def tree_kilobytes(root: int) -> int:
    """Return the resident memory of a process and all below it; pages that they share count in each."""
    lines = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,rss="], stdout=subprocess.PIPE, text=True).stdout.splitlines()
    table = {int(pid): (int(parent), int(size)) for pid, parent, size in (line.split() for line in lines)}
    family, grown = {root}, True
    while grown:
        more = {pid for pid, (parent, _) in table.items() if parent in family} - family
        family, grown = family | more, bool(more)
    return sum(table[pid][1] for pid in family if pid in table)


def watched(*words: object) -> tuple[dict[str, Any], int]:
    """Return what the program reports, and the largest memory of its process tree in MB."""
    child = subprocess.Popen([PROGRAM, *map(str, words), "--json", "-q"], stdout=subprocess.PIPE, text=True)
    most, done = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.1):
            most = max(most, tree_kilobytes(child.pid))

    thread = threading.Thread(target=watch)
    thread.start()
    text, _ = child.communicate()
    done.set()
    thread.join()
    if child.returncode:
        raise SystemExit("the run failed")
    return json.loads(text), most * 1024 // 1_000_000


def rounded(recipe: str) -> int:
    """Return the weights of Flash that a recipe rounds."""
    raw = named_config("flash")
    assert raw is not None
    inventory, options = expected(parse_config(raw, "flash")), build.Options(recipe_of(recipe), layout_of("inline"))
    plan = build.build(inventory, *imagined(inventory), options, SideFiles({}, ()))
    return sum(s.weights for s in plan.steps if s.transform.startswith("quantize_"))


def measure(sources: Sequence[Path], out: Path, recipe: str, rounds: int) -> str:
    """Return the line of one recipe, from a source of one layer and one of two."""
    taken: list[list[float]] = [[], []]
    projected, most = [], 0
    for _ in range(rounds):
        projected.append(run("plan", "--config", "flash", "--recipe", recipe)["seconds_estimate"])
        for source, seconds in zip(sources, taken, strict=True):
            facts, peak = watched("quantize", source, out, "--recipe", recipe, "--overwrite")
            seconds.append(facts["seconds"])
            most = max(most, peak)
    one, two = map(statistics.median, taken)
    whole, estimate = two + (LAYERS - 2) * (two - one), statistics.median(projected)
    weights = rounded(recipe)
    cells = (recipe, f"{weights / 1e9:.1f} G", f"{one:.0f} s, {two:.0f} s", f"{whole / 60:.0f} min",
             f"{estimate / 60:.0f} min", f"{estimate / whole:.2f}", f"{most} MB")  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=["q4"])
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="Where to work. [default: a temporary folder]")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        sources = [Path(name) / str(layers) for layers in (1, 2)]
        for layers, source in enumerate(sources, 1):
            run("synth", source, "--config", "flash", "--layers", layers, "--experts", args.experts)
        print(
            "| recipe | rounded of Flash | 1 layer, 2 layers | extrapolated | projected by plan | ratio | peak memory |"
        )
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for recipe in args.recipes:
            print(measure(sources, Path(name) / "out", recipe, args.rounds), flush=True)


if __name__ == "__main__":
    main()
