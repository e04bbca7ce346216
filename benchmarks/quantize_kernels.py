"""Speed of the rounding kernels against mx.quantize alone on the same tensors, in the same run.

    python benchmarks/quantize_kernels.py [--rounds 3] [--chunks 48] [--processes N] [--formats NAME ...]

Each round takes, in turn, mx.quantize of the BF16 values (one stream, as MLX has it on a processor), `nearest`,
`optimal` in the plain way, and `optimal` with compiled loops (the extra `fast`). Ours run in as many processes as there
are cores, each on its own chunks of the size that `quantize` rounds at once; encoding only: neither reading nor
writing. The rates are bytes of source per second (two bytes per BF16 weight, 17/32 per FP4 weight, scales counted); the
ratio to mx.quantize counts the same bytes for both, so that it is one of times. All are seconds of processor time, ours
divided by the number of processes, so that what else a machine does counts less. Medians over rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from multiprocessing import get_context

import mlx.core as mx
import numpy as np

from ds4convert.execution.rounding_steps import CHUNK_VALUES
from ds4convert.formats import blocks, compiled, small_floats
from ds4convert.formats.codecs import CODECS
from ds4convert.formats.rounding import encode, encode_fp4
from ds4convert.formats.small_floats import F32, U8

COLS = 4096
ROWS = CHUNK_VALUES // COLS
FORMATS = (*(f"affine-{bits}-g64" for bits in (2, 3, 4, 5, 6, 8)), "mxfp4", "mxfp8", "nvfp4")
COMPILED = "compiled"
SOURCES = {"bf16": 2.0, "fp4": 17 / 32}
"""Kinds of source, with their bytes per weight."""


@cache
def fp4_chunk() -> tuple[U8, U8]:
    """Return codes and block scales as normal weights have them, `[ROWS, COLS/2]` and `[ROWS, COLS/32]`."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((ROWS, COLS // 32, 32)).astype(np.float32)
    power = np.ceil(np.log2(np.abs(x).max(axis=2, keepdims=True) / 6))
    steps = np.convolve(small_floats.fp4_values()[:8], [0.5, 0.5], "valid")
    codes = (np.searchsorted(steps, np.abs(x / 2.0**power)) + 8 * (x < 0)).reshape(ROWS, COLS).astype(np.uint8)
    return codes[:, ::2] | codes[:, 1::2] << 4, (power[..., 0] + 120).astype(np.uint8)


@cache
def values_of(source: str) -> F32:
    """Return the values of a chunk, `[ROWS, COLS]`."""
    if source == "fp4":
        return blocks.decode_fp4(*fp4_chunk())
    x = np.random.default_rng(2).standard_normal((ROWS, COLS)).astype(np.float32)
    return small_floats.bf16_values(small_floats.bf16_bits(x))


def ours(source: str, name: str, rounding: str, chunks: int) -> float:
    """Encode a chunk so many times; return the processor seconds."""
    compiled.use(0 if rounding == COMPILED else None)
    rounding = "optimal" if rounding == COMPILED else rounding
    start = time.process_time()
    for _ in range(chunks):
        if source == "fp4":
            encode_fp4(*fp4_chunk(), CODECS[name], rounding)
        else:
            encode(values_of(source), CODECS[name], rounding)
    return time.process_time() - start


def mlx_seconds(source: str, name: str, chunks: int) -> float:
    """Return the seconds of mx.quantize for a chunk."""
    x = mx.array(values_of(source)).astype(mx.bfloat16)
    mx.eval(x)
    start = time.process_time()
    for _ in range(chunks):
        mx.eval(mx.quantize(x, **CODECS[name].table()))
    return (time.process_time() - start) / chunks


def our_seconds(pool: ProcessPoolExecutor, processes: int, task: partial[float]) -> float:
    """Return the seconds of a chunk when all processes work, each on `chunks` of them."""
    spent = sum(done.result() for done in [pool.submit(task) for _ in range(processes)])
    return spent / (processes * processes * task.args[3])


def measure(pool: ProcessPoolExecutor, args: argparse.Namespace, source: str, name: str) -> str:
    """Return the line of one format and source."""
    counts = {"nearest": args.chunks, "optimal": max(args.chunks // 6, 1), COMPILED: max(args.chunks // 2, 1)}
    tasks = [partial(ours, source, name, rounding, count) for rounding, count in counts.items()]
    for task in tasks:  # imports, data and tables
        our_seconds(pool, args.processes, task)
    mlx_seconds(source, name, 2)
    found = [
        (mlx_seconds(source, name, args.chunks), *(our_seconds(pool, args.processes, t) for t in tasks))
        for _ in range(args.rounds)
    ]
    size = SOURCES[source] * ROWS * COLS / 1e6
    rates = [size / statistics.median(column) for column in zip(*found, strict=True)]
    ratios = [statistics.median(row[0] / row[k] for row in found) for k in (1, 2, 3)]
    cells = " | ".join(f"{rate:.1f} MB/s" for rate in rates)
    return f"| {source} | {name} | {cells} | " + " | ".join(f"{r:.2f}x" for r in ratios) + " |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--chunks", type=int, default=48, help="Of 512k weights, per process and measurement; optimal takes a sixth."
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--formats", nargs="+", default=FORMATS, choices=sorted(CODECS))
    args = parser.parse_args()
    mx.set_default_device(mx.cpu)
    os.environ |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}  # as the workers of a run have it
    names = "mx.quantize | nearest | optimal | compiled | nearest, ratio | optimal, ratio | compiled, ratio"
    print(f"| source | format | {names} |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    with ProcessPoolExecutor(args.processes, mp_context=get_context("spawn")) as pool:
        for source in SOURCES:
            for name in args.formats:
                if (source, name) != ("fp4", "mxfp4"):  # the same codes: copied, never rounded
                    print(measure(pool, args, source, name), flush=True)


if __name__ == "__main__":
    main()
