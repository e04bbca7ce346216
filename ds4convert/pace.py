"""How long a conversion will take: a short trial of each kind of rounding here, and the disk for the rest."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ds4convert.pool import Pool, rounding_pool
from ds4convert.types import Plan

if TYPE_CHECKING:
    from ds4convert.formats.quantize import Chunk

DISK_RATE = 350e6
"""Bytes per second that a copy is assumed to make: an ordinary disk (measured: 230 to 600 MB/s)."""

TRIAL_ROWS, FIRST_ROWS = 512, 8
"""Rows of 1,024 weights in a trial, the size of a chunk of a real run; and in what comes before it."""


def seconds(plan: Plan) -> float:
    """Return the estimated seconds of a run: rounding by trial, with all cores at work; all else by the disk's rate.

    Rounding and writing go on side by side, so the longer of the two counts.
    """
    size = sum(f.size for f in plan.files)
    return max(rounding(plan), size / DISK_RATE)


def rounding(plan: Plan) -> float:
    """Return the estimated seconds that rounding takes, all cores at work."""
    from ds4convert.formats.quantize import STORES

    weights: dict[tuple[str, str, str], int] = {}
    for step in plan.steps:
        if step.transform in STORES:
            key = (step.transform, str(step.params["codec"]), str(step.params["rounding"]))
            weights[key] = weights.get(key, 0) + step.weights
    if not weights:
        return 0.0
    with rounding_pool(sum(weights.values())) as pool:
        return sum(n / _rate(pool, *key) for key, n in weights.items())


def _rate(pool: Pool, transform: str, codec: str, rounding: str) -> float:
    """Return weights per second of one kind of rounding, all cores together: as a run does it."""
    from ds4convert.formats.quantize import STORES

    store = STORES[transform]
    for rows in (FIRST_ROWS, TRIAL_ROWS):  # the first time starts the processes and makes their tables
        chunk = _chunk("bf16" if store == "codec" else store, codec, rounding, rows)  # decoding is the least part of it
        start = time.perf_counter()
        for future in [pool.submit(chunk.encoded) for _ in range(2 * pool.cores)]:
            future.result()
    return 2 * pool.cores * chunk.rows * chunk.cols / (time.perf_counter() - start)


def _chunk(store: str, codec: str, rounding: str, rows: int) -> Chunk:
    import numpy as np

    from ds4convert.formats import samples
    from ds4convert.formats.quantize import Chunk
    from ds4convert.formats.scalars import bf16_bits

    cols, tile = samples.COLS, (128, 128)
    scales, grid = b"", (0, 0)
    if store == "fp4":
        codes, by = samples.fp4_sample(rows)
        data, scales, grid = codes.tobytes(), by.tobytes(), by.shape
    elif store == "fp8":
        grid = (-(-rows // tile[0]), -(-cols // tile[1]))
        data, scales = samples.fp8_codes(rows).tobytes(), np.full(grid, 120, np.uint8).tobytes()
    else:
        data = bf16_bits(samples.normal_sample(rows)).tobytes()
    return Chunk(store, data, scales, grid, tile, rows, cols, 0, codec, rounding, None)
