"""The time that `plan` projects for quantizing Flash, against what a real run of some of its layers takes.

    python benchmarks/quantize_time.py [--recipes q4 ...] [--layers 2] [--experts 64] [--rounds 1] [--folder DIR]

A synthetic checkpoint of Flash's sizes, with fewer layers and experts, is converted after it was read once, so that
rounding is what takes the time. The run's seconds per rounded weight, times the weights that `plan --config flash`
counts as rounded, is the extrapolation. The memory of the run and its worker processes together is sampled every tenth
of a second. Prints one line per recipe: weights rounded per second, the run's seconds, what that makes for all of
Flash, what `plan` projects for it, the ratio of both, and the largest memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from ds4convert import convert, summary
from ds4convert import plan as plans
from ds4convert.config import named_config, parse_config
from ds4convert.inventory import expected
from ds4convert.layouts import layout_of
from ds4convert.recipes import recipe_of

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


def rounded(source: Path | None, recipe: str) -> int:
    """Return the weights that a recipe rounds, of a checkpoint, or of all of Flash."""
    options = plans.Options(recipe_of(recipe), layout_of("inline"))
    if source is not None:
        plan = convert.make_plan(convert.open_source(source), options)
    else:
        raw = named_config("flash")
        assert raw is not None
        inventory = expected(parse_config(raw, "flash"))
        plan = plans.build(inventory, *summary.imagined(inventory), options, plans.SideFiles({}, ()))
    return sum(s.weights for s in plan.steps if s.transform.startswith("quantize_"))


def measure(source: Path, out: Path, recipe: str, rounds: int) -> str:
    """Return the line of one recipe."""
    here, there = rounded(source, recipe), rounded(None, recipe)
    taken, projected, most = [], [], 0
    for _ in range(rounds):
        projected.append(run("plan", "--config", "flash", "--recipe", recipe)["seconds_estimate"])
        facts, peak = watched("quantize", source, out, "--recipe", recipe, "--overwrite")
        taken.append(facts["seconds"])
        most = max(most, peak)
    seconds, estimate = statistics.median(taken), statistics.median(projected)
    whole = seconds / here * there
    rate, ratio = here / seconds / 1e6, estimate / whole
    cells = (recipe, f"{here / 1e9:.2f} G", f"{rate:.1f} M/s", f"{seconds:.0f} s", f"{whole / 60:.0f} min",
             f"{estimate / 60:.0f} min", f"{ratio:.2f}", f"{most} MB")  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=["q4"])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="Where to work. [default: a temporary folder]")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        source = Path(name) / "source"
        run("synth", source, "--config", "flash", "--layers", args.layers, "--experts", args.experts)
        start = time.monotonic()
        for path in source.glob("*.safetensors"):
            with path.open("rb") as f:
                while f.read(8 << 20):
                    pass
        print(f"source read once in {time.monotonic() - start:.0f} s\n")
        print("| recipe | rounded | rate | the run | extrapolated to Flash | projected by plan | ratio | peak memory |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        for recipe in args.recipes:
            print(measure(source, Path(name) / "out", recipe, args.rounds), flush=True)


if __name__ == "__main__":
    main()
