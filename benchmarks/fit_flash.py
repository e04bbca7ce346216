"""What `--fit` chooses for all of Flash, for twenty sizes, against every single format and recipe.

    python benchmarks/fit_flash.py [--context 32768] [--sizes 20]

From Flash's inventory alone: errors are those of normally distributed weights (a checkpoint at hand is measured
instead). Prints one line per size: target, planned bytes of weights, state and working set, total error, the most that
any other choice could have less, and the best single format or recipe of at most as many bytes with its error.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from ds4convert.checkpoint.config import named_config, parse_config
from ds4convert.checkpoint.inventory import expected
from ds4convert.fit import format_errors
from ds4convert.fit.optimiser import Option, Unit
from ds4convert.formats.codecs import CODECS
from ds4convert.planning.recipes import recipe_of, recipes

PROGRAM = str(Path(sys.executable).with_name("ds4convert"))
GB = 10**9


def plan(target: float, context: int) -> dict[str, Any]:
    """Return what the program plans for a target in GB; empty where it is too small."""
    words = ["plan", "--config", "flash", "--fit", f"{target:.2f}GB", "--context", str(context), "--json"]
    done = subprocess.run([PROGRAM, *words], capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout) if done.returncode == 0 else {}
    return found


def uniform() -> list[tuple[str, int, float]]:
    """Return (name, bytes of what a choice is made for, error) of each single format and each recipe."""
    raw = named_config("flash")
    assert raw is not None
    inventory = expected(parse_config(raw, "flash"))
    options = format_errors.options(inventory, format_errors.imagined("optimal"))
    by_name = {unit: {o.format: o for o in found} for unit, found in options.items()}
    rows: list[tuple[str, int, float]] = []

    def add(name: str, chosen: list[Option]) -> None:
        rows.append((name, sum(o.size for o in chosen), sum(o.error for o in chosen)))

    for name in CODECS:
        add(name, [found.get(name, found["native"]) for found in by_name.values()])
    units: dict[Unit, Any] = {unit: modules[0] for unit, modules in format_errors.units(inventory).items()}
    for name in sorted(set(recipes()) - {"fit", "native", "bf16"}):
        recipe = recipe_of(name)
        add(f"recipe {name}", [found.get(recipe.format_of(units[u]), found["native"]) for u, found in by_name.items()])
    return rows


def main() -> None:
    """Print the table; exit with 1 where a promise is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--sizes", type=int, default=20)
    args = parser.parse_args()
    rows, broken, before = uniform(), 0, float("inf")
    least = plan(1000, args.context)["fit"]["smallest_bytes"] / GB
    most = plan(1000, args.context)["fit"]
    top = (most["weights_bytes"] + most["cache_bytes"] + most["working_bytes"]) / GB
    print("| target | planned | error | at most less | best uniform | its error |")
    print("| --- | --- | --- | --- | --- | --- |")
    for n in range(args.sizes):
        target = round(least + 0.01 + (top - least) * n / (args.sizes - 1), 2)
        found = plan(target, args.context)
        fit = found["fit"]
        size = fit["weights_bytes"] + fit["cache_bytes"] + fit["working_bytes"]
        chosen = sum(row["bytes"] for row in fit["table"])
        room = chosen + target * GB - size
        rivals = [(error, name) for name, bytes_, error in rows if bytes_ <= room]
        rival = min(rivals, default=(float("inf"), "none fits"))
        good = size <= target * GB and found["output_bytes"] <= fit["weights_bytes"]
        good = good and fit["total_error"] <= rival[0] and fit["total_error"] <= before
        broken, before = broken + (not good), fit["total_error"]
        cells = (f"{target:.2f} GB", f"{size / GB:.2f} GB", f"{fit['total_error']:.3e}", f"{fit['gap']:.1e}", rival[1],
                 f"{rival[0]:.3e}", "" if good else "BROKEN")  # fmt: skip
        print("| " + " | ".join(cells[:6]) + " |" + cells[6], flush=True)
    broken += bool(plan(least - 0.1, args.context))  # below the smallest size there is no plan
    print(f"\n{broken} promises broken; smallest size {least:.2f} GB")
    raise SystemExit(bool(broken))


if __name__ == "__main__":
    main()
