"""What compensated rounding costs beside `optimal`, and the plain `optimal` beside the compiled one: processor time.

    python benchmarks/compensated_time.py [--rows 2048] [--cols 4096] [--inputs 1536] [--rounds 3] [--base FOLDER]

One matrix of an expert. Each round takes, in turn, `optimal` in the plain way and compiled, and compensated rounding
without refinement and with it; the moments of its inputs and their root are counted once per matrix. `--base` is a
checkout of an earlier version, whose `optimal` and compensated rounding (without refinement) are taken in each round as
well, by a process of its own. Seconds of this process's processor, medians over rounds; one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ds4convert.formats import compensated, rounding, second_moments
from ds4convert.formats.codecs import CODECS
from ds4convert.formats.second_moments import Factor
from ds4convert.formats.small_floats import F32, bf16_bits, bf16_values

BLOCK_ROWS = 512
"""Rows of weights that are rounded at once, as a chunk of a run has them."""


def data(args: argparse.Namespace) -> tuple[F32, F32]:
    """Return weights `[rows, cols]` and inputs whose columns go together."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((args.inputs, args.cols)).astype(np.float32)
    x[:, 1:] += x[:, :-1]
    weights = rng.standard_normal((args.rows, args.cols)).astype(np.float32)
    return bf16_values(bf16_bits(weights)), x


def factor_of(x: F32) -> Factor:
    """Return the factor of inputs."""
    found = second_moments.factor(second_moments.summed(x) / len(x), len(x))
    assert found is not None
    return found


def spent(work: Callable[[], object]) -> float:
    """Return the seconds of processor time of some work."""
    start = time.process_time()
    work()
    return time.process_time() - start


def made(args: argparse.Namespace, weights: F32, x: F32, sweeps: int) -> None:
    """Round the matrix against its inputs, moments and all."""
    factor, codec = factor_of(x), CODECS[args.format]
    for first in range(0, len(weights), BLOCK_ROWS):
        some = weights[first : first + BLOCK_ROWS]
        compensated.compensated(some, codec, factor, rounding.encode(some, codec, "optimal"), sweeps)


def times(args: argparse.Namespace, fast: bool) -> dict[str, float]:
    """Return the seconds of each way of one round."""
    weights, x = data(args)
    codec, found = CODECS[args.format], {}
    kinds: list[tuple[str, int | None]] = [("plain", None)]
    if fast:
        from ds4convert.formats import compiled

        kinds.append(("compiled", 0))
    for kind, after in kinds:
        if fast:
            compiled.use(after)
            rounding.encode(weights[:8], codec, "optimal")
            if kind == "compiled":
                made(args, weights[:8], x[:, :], 1)
        found[f"optimal, {kind}"] = spent(lambda: rounding.encode(weights, codec, "optimal"))
        found[f"compensated, {kind}"] = spent(lambda: made(args, weights, x, 0))
    if fast:
        found["moments and root"] = spent(lambda: factor_of(x))
        found["compensated, 3 sweeps, compiled"] = spent(lambda: made(args, weights, x, 3))
    return found


def of_base(args: argparse.Namespace) -> dict[str, float]:
    """Return the seconds of an earlier version."""
    words = [f"--{k}={getattr(args, k)}" for k in ("rows", "cols", "inputs", "format")]
    done = subprocess.run(
        [sys.executable, __file__, *words, "--json"],
        env=os.environ | {"PYTHONPATH": str(args.base)},
        stdout=subprocess.PIPE,
        check=True,
    )
    return {f"base: {k.split(',')[0]}": v for k, v in json.loads(done.stdout).items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, size in (("rows", 2048), ("cols", 4096), ("inputs", 1536), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--format", default="affine-2-g64", choices=sorted(CODECS))
    parser.add_argument("--base", type=Path)
    parser.add_argument("--json", action="store_true", help="One round of the plain way, as JSON.")
    args = parser.parse_args()
    if args.json:
        print(json.dumps(times(args, False)))
        return
    rounds = [times(args, True) | (of_base(args) if args.base else {}) for _ in range(args.rounds)]
    measured = "base: optimal" if args.base else "optimal, plain"
    print(f"| way | processor seconds | to {measured} |\n| --- | --- | --- |")
    for way in rounds[0]:
        ratio = statistics.median(r[way] / r[measured] for r in rounds)
        print(f"| {way} | {statistics.median(r[way] for r in rounds):.2f} | {ratio:.2f} |")


if __name__ == "__main__":
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if os.environ["OPENBLAS_NUM_THREADS"] == "1" and "numpy" in sys.modules and "DS4_ONE_THREAD" not in os.environ:
        os.environ["DS4_ONE_THREAD"] = "1"  # numpy reads it when it is imported
        os.execv(sys.executable, [sys.executable, *sys.argv])
    main()
