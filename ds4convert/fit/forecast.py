"""How long a conversion will take: a short trial of each kind of rounding here, and the disk for the rest."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from ds4convert.execution import workers
from ds4convert.execution.feeders import division
from ds4convert.execution.feeders.division import Division
from ds4convert.execution.file_writer import BUFFERS
from ds4convert.execution.transforms import CHUNK_BYTES, numbers
from ds4convert.execution.workers import Pool, rounding_pool
from ds4convert.formats import compiled
from ds4convert.formats.second_moments import COMPENSATED
from ds4convert.planning.types import Plan, Step

if TYPE_CHECKING:
    from ds4convert.execution.rounding_steps import Chunk


DISK_RATE = 350e6
"""Bytes per second that a copy is assumed to make: an ordinary disk (measured: 230 to 600 MB/s)."""

TRIAL_ROWS, FIRST_ROWS = 512, 8
"""Rows of 1,024 weights in a trial, the size of a chunk of a real run; and in what comes before it."""


def seconds(plan: Plan, cores: int | None = None, share: float = 1.0) -> float:
    """Return the estimated seconds of a run: rounding by trial, all these cores at work; all else by the disk's rate.

    Rounding and writing go on side by side, so the longer of the two counts. `share` of all rows of a text go to each
    expert of a layer, where rounding goes by a text.
    """
    size = sum(f.size for f in plan.files)
    return max(rounding(plan, cores, share), size / DISK_RATE)


LONG_WEIGHTS = 1 << 28
"""Weights to round from which on a trial is worth its second or two before a run."""


def left(plan: Plan, cores: int | None = None) -> Callable[[int, float], float | None] | None:
    """Return what tells the seconds left of a run from bytes done and seconds since its start.

    Bytes alone tell it where nothing is rounded, or little: then None. Rounding a byte takes many times as long as
    copying one, and as long again in another format, so progress is counted in what each step is estimated to take.
    """
    rounded = [s for s in plan.steps if s.transform in _stores()]
    if sum(s.weights for s in rounded) < LONG_WEIGHTS or any(map(_is_compensated, rounded)):
        return None  # where rounding goes by a text, most of the time is that of the layers, which bytes tell well
    rates = _rates(plan, cores)
    done_bytes, done_seconds = [0], [0.0]
    for step in sorted(plan.steps, key=lambda s: (s.outputs[0].file, s.outputs[0].offset)):
        size = sum(o.size for o in step.outputs)
        spent = step.weights / rates[_kind(step)] if step.transform in _stores() else 0.0
        done_bytes.append(done_bytes[-1] + size)
        done_seconds.append(done_seconds[-1] + max(spent, size / DISK_RATE))

    def told(done: int, seconds: float) -> float:
        spent = _between(done_bytes, done_seconds, done)
        rest = done_seconds[-1] - spent
        return rest * seconds / spent if spent > SURE_SHARE * done_seconds[-1] else rest

    return told


SURE_SHARE = 0.05
"""Share of the estimate from which on the run's own speed scales what is left of it."""


def _between(at: Sequence[int], values: Sequence[float], place: int) -> float:
    """Return the value at a place, in proportion between its neighbours."""
    n = min(max(bisect_right(at, place), 1), len(at) - 1)
    width = at[n] - at[n - 1]
    share = min((place - at[n - 1]) / width, 1.0) if width else 1.0
    return values[n - 1] + share * (values[n] - values[n - 1])


def _stores() -> Mapping[str, str]:
    from ds4convert.execution.rounding_steps import STORES

    return STORES


def _kind(step: Step) -> tuple[str, str, str]:
    return step.transform, str(step.params["codec"]), str(step.params["rounding"])


def _rates(plan: Plan, cores: int | None) -> dict[tuple[str, str, str], float]:
    """Return weights per second of each kind of rounding of a plan, by trial on the cores that one process feeds.

    Further processes with their own are taken to be as fast.
    """
    rounded = [s for s in plan.steps if s.transform in _stores() and not _is_compensated(s)]
    weights, cores = sum(s.weights for s in rounded), cores or workers.all_cores()
    count = division.divided(plan, cores).all_workers
    with rounding_pool(weights, cores=min(cores, workers.FED)) as pool:
        if workers.uses_processes(weights, cores):  # a run of this length goes over to compiled loops, if it can
            pool.on_all(partial(compiled.settle, weights // pool.cores))
        more, later = max(count / pool.cores, 1), compiled.gain(weights // pool.cores)
        return {
            k: _rate(pool, *k) * more * (later if _is_compiled(k) else 1) for k in dict.fromkeys(map(_kind, rounded))
        }


def _is_compiled(kind: tuple[str, str, str]) -> bool:
    """Return whether there are compiled loops for a kind of rounding."""
    return kind[1].startswith("affine") and kind[2] == "optimal"


def _is_compensated(step: Step) -> bool:
    return step.params["rounding"] == COMPENSATED


def rounding(plan: Plan, cores: int | None = None, share: float = 1.0) -> float:
    """Return the estimated seconds that rounding takes, all these cores at work; `share` as in `seconds`."""
    rounded = [s for s in plan.steps if s.transform in _stores()]
    against = [s for s in rounded if _is_compensated(s)]
    rates = _rates(plan, cores) if len(rounded) > len(against) else {}
    found = sum(s.weights / rates[_kind(s)] for s in rounded if not _is_compensated(s))
    if not against:
        return found
    from ds4convert.fit import compensated_time

    feeds = min(cores or workers.all_cores(), workers.MOST_FED)
    with rounding_pool(0, compensated=True, cores=feeds) as pool:
        return found + compensated_time.seconds(against, pool, share)


def _rate(pool: Pool, transform: str, codec: str, rounding: str) -> float:
    """Return weights per second of one kind of rounding, all cores together: as a run does it."""
    from ds4convert.execution.rounding_steps import STORES

    store = STORES[transform]
    for rows in (FIRST_ROWS, TRIAL_ROWS):  # the first time starts the processes and makes their tables
        chunk = _chunk("bf16" if store == "codec" else store, codec, rounding, rows)  # decoding is the least part of it
        start = time.perf_counter()
        for future in [pool.submit(chunk.encoded) for _ in range(2 * pool.cores)]:
            future.result()
    return 2 * pool.cores * chunk.rows * chunk.cols / (time.perf_counter() - start)


def _chunk(store: str, codec: str, rounding: str, rows: int) -> Chunk:
    import numpy as np

    from ds4convert.execution.rounding_steps import Chunk
    from ds4convert.formats import samples
    from ds4convert.formats.small_floats import bf16_bits

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


BASE_BYTES = 60 << 20
"""An interpreter with numpy, measured."""

STEP_BYTES, SOURCE_BYTES = 2_500, 1_000
"""What a step and a source tensor (header entry, names, ranges) take in memory, measured on Flash's inventory."""

TILE_BYTES = 40 << 20
"""What rounding one chunk takes in the run's own process: its values, codes and errors, and tiles of them."""


COMPENSATED_COPIES = 6
"""Matrices `[in, in]` of 8 bytes that a worker holds at most while it makes a factor: sums, mean, damped, root."""


def worker_bytes(plan: Plan, found: Division) -> int:
    """Return the bytes of memory that each worker takes that rounds: a process, or room in the run's own."""
    against = [numbers(s)["cols"] for s in plan.steps if s.transform in _stores() and _is_compensated(s)]
    if not against and not found.in_processes:
        return TILE_BYTES
    factor = COMPENSATED_COPIES * 8 * max(against, default=0) ** 2
    return workers.WORKER_BYTES + factor + (workers.COMPILED_BYTES if compiled.installed() else 0)


def peak_memory(plan: Plan, jobs: int, cores: int | None = None) -> int:
    """Return the bytes of memory that a run with `jobs` files at a time on so many cores takes at most.

    Each process that feeds workers holds the plan and its files' buffers; the run's own is one more where several do.
    """
    tensors = sum(len(names) for s in plan.steps for names in s.sources)
    sizes = (numbers(s) for s in plan.steps)
    made = max((p.get("rows", 0) * p.get("cols", 0) // 32 for p in sizes), default=0)
    worker = (BUFFERS + 6) * CHUNK_BYTES + min(2 * made, 64 << 20)
    found = division.divided(plan, cores or workers.all_cores())
    processes = len(found.workers)
    each = BASE_BYTES + STEP_BYTES * len(plan.steps) + SOURCE_BYTES * tensors
    files = min(jobs * processes, len(plan.files))
    return (processes + found.apart) * each + files * worker + found.all_workers * worker_bytes(plan, found)
