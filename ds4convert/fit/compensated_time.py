"""How long compensated rounding will take: parts of its work tried on small matrices, and counted for a plan's.

A matrix costs the moments of its inputs (by rows of inputs and columns squared), their root (by columns cubed), and its
weights (a fixed part each, and one by the columns). Both sizes of a trial give the parts of a weight. The model's own
run on the text is counted as products of matrices, which is what takes its time with models of any size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from ds4convert.execution.rounding_steps import COMPENSATED_VALUES
from ds4convert.execution.transforms import numbers
from ds4convert.execution.workers import Pool
from ds4convert.planning.types import Step

LARGEST, LEAST = 2048, 256
"""Columns of the larger trial at most, and at least: below, calls take longer than work."""

TRIAL_INPUTS, RUN_ROWS = 1024, 256
"""Rows of inputs in a trial of moments; rows of a product that stands for the model's run."""


@dataclass(frozen=True)
class Trial:
    """Seconds of the parts of the work on a matrix of so many columns: moments per row of inputs, root, per weight."""

    cols: int
    moments: float
    root: float
    weight: float


@dataclass(frozen=True)
class Rates:
    """What the two trials of a codec tell."""

    small: Trial
    large: Trial

    def moments(self, rows: float, cols: int) -> float:
        """Return the seconds of the moments of so many rows of inputs."""
        return self.large.moments * rows * (cols / self.large.cols) ** 2

    def root(self, cols: int) -> float:
        """Return the seconds of a root."""
        return self.large.root * (cols / self.large.cols) ** 3

    def weight(self, cols: int) -> float:
        """Return the seconds of a weight in a matrix of so many columns; on the line through both trials."""
        slope = max(self.large.weight - self.small.weight, 0.0) / (self.large.cols - self.small.cols)
        return max(self.large.weight + slope * (cols - self.large.cols), self.small.weight * cols / self.large.cols)


def seconds(steps: Sequence[Step], pool: Pool, share: float) -> float:
    """Return the seconds of steps rounded so, all cores at work; `share` of the rows go to each expert of a layer."""
    codecs = dict.fromkeys(str(s.params["codec"]) for s in steps)
    most = max(numbers(s)["cols"] for s in steps)
    large = max(LEAST, min(most, LARGEST))
    each = sum(s.weights for s in steps) // pool.cores
    rates = {c: Rates(*(_tried(pool, cols, c, each) for cols in (large // 2, large))) for c in codecs}
    return sum(_step(s, rates[str(s.params["codec"])], pool.cores, share) for s in steps) + _model(steps, share)


def _step(step: Step, rates: Rates, cores: int, share: float) -> float:
    p, shape = numbers(step), step.outputs[0].shape
    count, cols = (shape[0] if len(shape) == 3 else 1), p["cols"]
    rows = int(step.params["tokens"]) * (share if count > 1 else 1.0)
    chunks = -(-step.weights // count // COMPENSATED_VALUES)
    # Every worker that gets a chunk of a matrix makes its factor; the mean of a layer is made by all of them at once.
    factor = (rates.moments(rows, cols) + rates.root(cols)) * min(chunks, cores)
    mean = rates.moments(rows * count, cols) if count > 1 else 0.0
    return (count * factor + step.weights * rates.weight(cols)) / cores + mean


def _model(steps: Sequence[Step], share: float) -> float:
    """Return the seconds of the model's run on the text: two operations for each weight and row through it."""
    import numpy as np

    operations = sum(
        2.0 * s.weights * int(s.params["tokens"]) * (share if len(s.outputs[0].shape) == 3 else 1.0) for s in steps
    )
    a, b = np.ones((RUN_ROWS, LARGEST), np.float32), np.ones((LARGEST, LARGEST), np.float32)
    a @ b
    start = time.perf_counter()
    a @ b
    return operations * (time.perf_counter() - start) / (2.0 * RUN_ROWS * LARGEST**2)


def _tried(pool: Pool, cols: int, codec: str, weights: int) -> Trial:
    found = [f.result() for f in [pool.submit(partial(trial, cols, codec, weights)) for _ in range(pool.cores)]]
    return Trial(cols, *(sum(part) / len(found) for part in zip(*found, strict=True)))


def trial(cols: int, codec: str, weights: int) -> tuple[float, float, float]:
    """Return the seconds of moments per row of inputs, of a root, and per weight, for a matrix of so many columns.

    To be run in every worker at once, as a run does it; each of these gets so many `weights`.
    """
    import numpy as np

    from ds4convert.formats import compensated, compiled, second_moments
    from ds4convert.formats.codecs import CODECS
    from ds4convert.formats.rounding import encode

    compiled.settle(weights * compensated.COUNTS_AS)
    rng = np.random.default_rng(1)
    x = rng.standard_normal((TRIAL_INPUTS, cols)).astype(np.float32)
    w = rng.standard_normal((compensated.BLOCK, cols)).astype(np.float32)
    summed, of_moments = _timed(lambda: second_moments.summed(x))
    factor, of_root = _timed(lambda: second_moments.factor(summed / len(x), len(x)))
    assert factor is not None

    def rounded() -> None:
        compensated.compensated(w, CODECS[codec], factor, encode(w, CODECS[codec], "optimal"))

    rounded()  # loads what is compiled, and makes tables
    _, of_weights = _timed(rounded)
    return of_moments / len(x), of_root, of_weights / w.size


T = TypeVar("T")


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    start = time.perf_counter()
    found = work()
    return found, time.perf_counter() - start
