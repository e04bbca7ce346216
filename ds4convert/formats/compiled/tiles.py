"""Tiles of affine groups rounded by the kernels; what they cannot do as the plain path does is left to that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ds4convert.formats import affine
from ds4convert.formats.small_floats import F32

LEAST_GROUPS = 2
"""Groups of a tile from which on numpy adds in the kernels' order: a lone group it adds in parts."""


@cache
def tables(bits: int) -> tuple[np.float32, F32, NDArray[np.int64]]:
    """Return the largest code, the starting ranges as parts of the whole, and the steps of the covering range."""
    top = 2**bits - 1
    starts = np.array([((1 - below - above) / top, below) for below, above in affine.STARTS[bits]], np.float32)
    covering = np.array(affine.COVERING if bits == 8 else (), np.int64).reshape(-1, 2)
    return np.float32(top), starts, covering


def search(kernels: Any, rows: F32, weight: F32 | None, bits: int) -> F32:
    """Return scales and biases `[2, groups]` as `affine.search` finds them, of groups `rows` `[groups, n]`."""
    found: F32 = kernels.search(rows, weight, *tables(bits))
    return found


@dataclass(frozen=True, slots=True)
class Tile:
    """Groups rounded: scales and biases `[groups]` as stored, sums of squared errors and values, the largest error."""

    scales: NDArray[np.uint16]
    biases: NDArray[np.uint16]
    squared: float
    norm: float
    most: float


@dataclass(frozen=True)
class Tiles:
    """Rounds tiles of groups to `bits`; `weight` `[count, n]` is that of each row's groups.

    `find` gives scale and bias for a tile by its place among all groups; None: the search does.
    """

    kernels: Any
    bits: int
    weight: F32 | None
    find: Callable[[slice], tuple[F32, F32]] | None = None

    def rounded(self, at: slice, rows: F32, codes: NDArray[np.uint8], safe: tuple[float, float]) -> Tile | None:
        """Fill the codes of groups `rows` `[groups, n]`; None where the plain path has to do it.

        `safe` are numbers between which squares are ordinary float32 numbers.
        """
        if len(rows) < LEAST_GROUPS or not self.kernels.is_ordinary(rows, *safe):
            return None
        weight = None if self.weight is None else np.roll(self.weight, -(at.start % len(self.weight)), axis=0)
        lines = search(self.kernels, rows, weight, self.bits) if self.find is None else np.stack(self.find(at))
        top, *_ = tables(self.bits)
        stored, sums = np.empty((2, len(rows)), np.uint16), np.empty((2, len(rows)), np.float32)
        most = float(self.kernels.finish(rows, weight, lines, top, codes, stored, sums))
        squared, norm = (float(s.sum(dtype=np.float64)) for s in sums)
        if not safe[0] < norm < safe[1] or not (most == 0 or safe[0] < squared < safe[1]):
            return None
        return Tile(stored[0], stored[1], squared, norm, most)
