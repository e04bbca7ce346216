"""How the inputs of a matrix go together: their second moments, damped, and the factor that spreads errors by them.

With errors `e` of one row of weights, the mean squared error of that row's output is `e H e^T`, where H holds the
moments `x x^T` of the inputs, averaged over their rows. Few rows say little about H, so it is drawn towards the mean
of its layer's experts, and its diagonal is raised by an amount that shrinks as rows per column grow: without that,
starved experts come out worse than with no calibration at all.

The method is that of GPTQ (https://arxiv.org/abs/2210.17323); the damping by rows is ours.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ds4convert.formats.small_floats import F32, bf16_values

F64 = NDArray[np.float64]

PRIOR_ROWS = 64
"""Rows that the mean of a layer's experts counts for in the moments of each."""

LEAST_DAMPING = 0.01
"""Part of the mean moment that is always added to the diagonal."""

DAMPING = 1.0
"""The same part, for one row of inputs per column."""

BLOCK_ROWS = 1024
"""Rows of inputs that are multiplied at once: a fixed number, so that sums always have the same order."""

SMALL = 64
"""Size of a triangle that is inverted by the library."""

ROOT_BLOCK, STRIP = 256, 512
"""Columns of a root that are found at once, and columns that one product fills."""


@dataclass(frozen=True, eq=False)
class Factor:
    """Damped moments float32 `[in, in]`, and their root: the upper triangle R with `R R^T` the moments.

    `e R` of errors e is what the rows of inputs make of them, column by column: its square is `e H e^T`, and its part
    for a column depends on the errors of this and earlier columns alone. So errors are spread by R itself; GPTQ's
    triangle, that of the inverse moments, is the inverse of R and is needed for one group of columns at a time.
    """

    moments: F32
    root: F32

    @cached_property
    def _inverses(self) -> dict[int, F32]:
        return {}

    def inverse(self, size: int) -> F32:
        """Return the inverses of the root's triangles on the diagonal, `[groups, size, size]`."""
        if size not in self._inverses:
            places = range(0, len(self.root), size)
            parts = [inverted(self.root[n : n + size, n : n + size].astype(np.float64)) for n in places]
            self._inverses[size] = np.stack(parts).astype(np.float32)
        return self._inverses[size]


class Rows(Protocol):
    """Rows of inputs `[n, in]`, in an array or on the disk."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Return (n, in)."""

    def __getitem__(self, at: slice, /) -> NDArray[Any]: ...


def summed(rows: Rows) -> F64:
    """Return the sum of `x x^T` over rows of inputs `[n, in]`. Raises `ValueError` where it is not finite."""
    total = np.zeros((rows.shape[1], rows.shape[1]))
    for start in range(0, rows.shape[0], BLOCK_ROWS):
        block = np.asarray(rows[start : start + BLOCK_ROWS], np.float32)
        with np.errstate(all="ignore"):  # told of below
            total += block.T @ block
    if not np.isfinite(total.diagonal()).all():  # no other sum is larger than the two of its columns
        raise ValueError("inputs that are not finite, or too large to be squared")
    return total


def blended(own: F64, rows: int, mean: F64 | None) -> F64:
    """Return mean moments of an expert with `rows` rows of inputs, drawn towards the `mean` of its layer's experts."""
    if mean is None:
        return own / max(rows, 1)
    drawn = PRIOR_ROWS * mean
    drawn += own
    drawn /= rows + PRIOR_ROWS
    return drawn


def factor(moments: F64, rows: int) -> Factor | None:
    """Return the factor of mean moments that so many rows gave; None where they say nothing.

    That is so where there are no rows, where all inputs are 0, and where they are independent of each other and alike:
    then the least squared error, which `optimal` looks for, is the least error of the output too.
    """
    level = float(np.trace(moments)) / len(moments)
    if rows < 1 or level <= 0:
        return None
    damped = np.empty(moments.shape, np.float32)
    np.divide(moments, level, out=damped, casting="same_kind")
    diagonal = damped.reshape(-1)[:: len(damped) + 1]
    if (diagonal == 1).all() and np.count_nonzero(damped) == len(damped):
        return None
    damping = max(LEAST_DAMPING, DAMPING * len(damped) / rows)
    diagonal += np.float32(damping)
    try:
        return Factor(damped, root_of(damped))
    except np.linalg.LinAlgError:  # float32 is too coarse for these; rare, as they are damped
        exact = moments / level
        exact[np.diag_indices(len(exact))] += damping
        return Factor(damped, root_of(exact).astype(np.float32))


def root_of(moments: NDArray[Any]) -> NDArray[Any]:
    """Return the upper triangle R with `R R^T` the moments, in their precision; a block of columns after the other.

    Cholesky's method from the last column on. Nearly all of it is products of matrices in float32, half of the time
    that the library takes in float64. Raises `LinAlgError` where the moments are not positive.
    """
    root = moments.copy()
    for start in reversed(range(0, len(root), ROOT_BLOCK)):
        at = slice(start, min(start + ROOT_BLOCK, len(root)))
        corner: NDArray[Any] = root[at, at].astype(np.float64)
        corner = np.linalg.cholesky(corner[::-1, ::-1])[::-1, ::-1]
        root[at, at], root[at.stop :, at] = corner, 0
        if start:
            above = root[:start, at] @ inverted(np.ascontiguousarray(corner)).T.astype(root.dtype)
            root[:start, at] = above
            for first in range(0, start, STRIP):
                last = min(first + STRIP, start)
                root[:last, first:last] -= above[:last] @ above[first:last].T
    return root


def inverted(triangle: F64) -> F64:
    """Return the inverse of an upper triangle, by halves: a third of the work of a general inverse."""
    n = len(triangle)
    if n <= SMALL:
        return np.asarray(np.triu(np.linalg.inv(triangle)))
    half, out = n // 2, np.zeros_like(triangle)
    out[:half, :half] = inverted(triangle[:half, :half])
    out[half:, half:] = inverted(triangle[half:, half:])
    out[:half, half:] = -out[:half, :half] @ (triangle[:half, half:] @ out[half:, half:])
    return out


COMPENSATED = "compensated"
"""The rounding that needs inputs."""

BYTES = 2
"""Of a value in a file of rows: BF16, in which the model itself is run by most programs."""


@dataclass(frozen=True)
class Inputs:
    """Rows of inputs of a matrix: `rows` rows of `cols` BF16 values from number `first` of a file.

    `of_layer`: these are one expert's rows, and the file holds those of all experts of the layer.
    """

    path: str
    first: int
    rows: int
    cols: int
    of_layer: bool


@lru_cache(maxsize=1)
def factor_of(inputs: Inputs) -> Factor | None:
    """Return the factor of inputs; None where they say nothing. The last one is kept, for the chunks of one matrix."""
    own = summed(_rows(inputs, inputs.first, inputs.rows))
    mean = _mean(inputs.path, inputs.cols) if inputs.of_layer else None
    return factor(blended(own, inputs.rows, mean), inputs.rows)


def _rows(inputs: Inputs, first: int, rows: int) -> _Rows:
    return _Rows(Path(inputs.path), first, rows, inputs.cols)


class _Rows:
    """Rows of a file, read a block at a time."""

    def __init__(self, path: Path, first: int, rows: int, cols: int) -> None:
        self._bits = (
            np.memmap(path, "<u2", "r", first * cols * BYTES, (rows, cols)) if rows else np.zeros((0, cols), "<u2")
        )
        self.shape = (rows, cols)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, at: slice) -> NDArray[np.float32]:
        return bf16_values(np.ascontiguousarray(self._bits[at]))


@lru_cache(maxsize=2)
def _mean(path: str, cols: int) -> NDArray[np.float64]:
    """Return the mean moments of all rows of a file. Whichever worker needs them first leaves them beside it."""
    kept = Path(f"{path}.mean")
    if kept.is_file():
        return np.fromfile(kept).reshape(cols, cols)
    rows = Path(path).stat().st_size // (cols * BYTES)
    mean = summed(_Rows(Path(path), 0, rows, cols)) / max(rows, 1)
    part = kept.with_name(f"{kept.name}.{os.getpid()}")
    mean.tofile(part)
    part.replace(kept)
    return mean
