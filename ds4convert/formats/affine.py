"""Affine groups: plain rounding as MLX does it, and the search for the scale and bias of least squared error.

A group of n values is stored as codes q of some bits with value `q * scale + bias`, in float32 from scale and bias in
BF16, which is how MLX's matmul kernels read it. Arrays lie as `[n, groups]`: sums over a group run along the first
axis, where both numpy and a GPU are fast. The search works on values of about 1, so that squares stay in range.

The search: many starting ranges, the least squares scale and bias for the codes of each (closed form), again for the
best one until nothing is gained, then the BF16 values around it with new codes for each.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ds4convert.formats.arrays import Arrays
from ds4convert.formats.scalars import F32

TINY = 2.0**-100
"""Least scale: far below any value of a normalised group, far above what BF16 cannot hold."""

MLX_LEAST_SCALE = np.float32(1e-7)
"""What mx.quantize makes of a range of zero."""

REFITS = 6
"""Rounds of codes and closed form at most; most groups gain nothing after three."""


def plain(x: F32, top: int) -> tuple[F32, F32, F32]:
    """Return (codes, scale, bias) of mx.quantize, step by step in float32: `[n, groups]`, `[groups]`, `[groups]`.

    The edge of larger magnitude is met exactly, zero gets a code of its own; codes are those of the scale and bias
    before they were rounded to BF16. Scale and bias are returned unrounded.
    """
    low, high = x.min(axis=0), x.max(axis=0)
    negative = np.abs(low) > np.abs(high)
    scale = np.maximum((high - low) / np.float32(top), MLX_LEAST_SCALE)
    scale = np.where(negative, scale, -scale)
    edge = np.where(negative, low, high)
    zero = np.rint(edge / scale)
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = np.where(zero == 0, scale, edge / zero)
    bias = np.where(zero == 0, np.float32(0), edge)
    q = x - bias
    np.divide(q, scale, out=q)
    np.rint(q, out=q)
    return np.clip(q, 0, top, out=q), scale, bias


@dataclass
class Found:
    """The best of each group so far: error, scale, bias, each `[groups]`."""

    error: Any
    scale: Any
    bias: Any

    def better(self, error: Any, scale: Any, bias: Any, xp: Any) -> None:
        """Take what is better, group by group."""
        gain = error < self.error
        self.error = xp.where(gain, error, self.error)
        self.scale = xp.where(gain, scale, self.scale)
        self.bias = xp.where(gain, bias, self.bias)


class Search:
    """The search over groups `x` `[n, groups]`, or `[n, 1]` where all have the same values with other `weight`s.

    `weight` `[n, groups]` says how much each value counts; None: all alike.
    """

    def __init__(self, ops: Arrays, x: Any, weight: Any, bits: int) -> None:
        self.ops, self.xp, self.top = ops, ops.xp, 2**bits - 1
        self.weight, self.bits = weight, bits
        total = float(x.shape[0]) if weight is None else self.xp.maximum(weight.sum(axis=0), TINY)
        self.total = total
        self.mean = self._sum(x) / total
        self.x = x - self.mean  # centred: less is lost where sums cancel
        self.first = self._sum(self.x)
        self.second = self._dot(self.x, self.x)

    def _sum(self, x: Any) -> Any:
        return (x if self.weight is None else x * self.weight).sum(axis=0)

    def _dot(self, a: Any, b: Any) -> Any:
        return self.ops.dot(a if self.weight is None else a * self.weight, b)

    def _codes(self, scale: Any, bias: Any) -> Any:
        return self.ops.codes(self.x, scale, bias, self.top)

    def fit(self, scale: Any, bias: Any) -> tuple[Any, Any, Any]:
        """Return (error, scale, bias) of the least squares line through the codes that `scale` and `bias` give."""
        xp, dot = self.xp, self.ops.dot
        q = self._codes(scale, bias)
        counted = q if self.weight is None else q * self.weight
        one, two, mixed = counted.sum(axis=0), dot(counted, q), dot(counted, self.x)
        middle = one / self.total
        spread = xp.maximum(two - one * middle, TINY)
        common = mixed - self.first * middle
        slope = xp.maximum(common / spread, TINY)
        error = self.second - self.first * self.first / self.total - common * slope
        return error, slope, (self.first - slope * one) / self.total

    def error(self, scale: Any, bias: Any) -> Any:
        """Return the error `[groups]` of scale and bias as they are, with the nearest codes."""
        rest = self.x - bias - self._codes(scale, bias) * scale
        return self._dot(rest, rest)

    def from_starts(self, starts: Iterable[tuple[float, float]]) -> Found:
        """Return the best fit from ranges cut by a part of the whole at the low and at the high end, each refitted."""
        low, high = self.x.min(axis=0), self.x.max(axis=0)
        width = self.xp.maximum(high - low, TINY)
        found: Found | None = None
        for below, above in starts:
            fitted = self.fit(width * ((1 - below - above) / self.top), low + below * width)
            if found is None:
                found = Found(*fitted)
            else:
                found.better(*fitted, self.xp)
        assert found is not None
        return found

    def refit(self, found: Found, rounds: int = REFITS) -> None:
        """Fit again for the codes of the best fit until no group gains."""
        for _ in range(rounds):
            before = found.error
            error, scale, bias = self.fit(found.scale, found.bias)
            found.better(error, scale, bias, self.xp)
            if not bool((found.error < before * (1 - 1e-6)).any()):
                break

    def stored(self, scale: Any, bias: Any, best: Found | None, scales: Iterable[int], biases: Iterable[int]) -> Found:
        """Return the best of the BF16 scales and biases around a centred fit, with their errors as stored.

        `scales` and `biases` are steps of BF16 from the values cut off towards zero.
        """
        ops = self.ops
        middle = self._sum(self._codes(scale, bias)) / self.total
        mean = self.first / self.total + self.mean
        for up in scales:
            near = ops.bf16_at(scale, up)
            wanted = mean - near * middle
            for shift in biases:
                offset = ops.bf16_at(wanted, shift)
                error = self.error(near, offset - self.mean)
                if best is None:
                    best = Found(error, near, offset)
                else:
                    best.better(error, near, offset, self.xp)
        assert best is not None
        return best

    def covering(self, scales: Iterable[int], biases: Iterable[int]) -> Found:
        """Return the best of the BF16 scales around the one that spans the whole range, the slack on both sides."""
        ops, best = self.ops, None
        low, high = self.x.min(axis=0), self.x.max(axis=0)
        least = self.xp.maximum((high - low) / self.top, TINY)
        for up in scales:
            scale = ops.bf16_at(least, up)
            wanted = low + self.mean - (self.top * scale - (high - low)) * 0.5
            for shift in biases:
                offset = ops.bf16_at(wanted, shift)
                error = self.error(scale, offset - self.mean)
                if best is None:
                    best = Found(error, scale, offset)
                else:
                    best.better(error, scale, offset, self.xp)
        assert best is not None
        return best


WIDEST_CUT = {2: 0.30, 3: 0.20, 4: 0.12, 5: 0.08, 6: 0.05, 8: 0.02}
"""The part of a group's range that may be cut at one end, by bits: with more codes cutting pays less."""


def starts(bits: int, each: int = 5) -> list[tuple[float, float]]:
    """Return the starting cuts: a square grid, from ranges a little too wide (more bits) to ranges cut on both sides."""
    cut = WIDEST_CUT[bits]
    ends = np.linspace(0 if bits <= 3 else -0.3 * cut, cut, each)
    return [(float(a), float(b)) for a, b in itertools.product(ends, ends)]


def search(ops: Arrays, x: Any, weight: Any, bits: int) -> tuple[Any, Any]:
    """Return (scale, bias) `[groups]`, BF16 values in float32, of nearly the least squared error for `x`."""
    look = Search(ops, x, weight, bits)
    best: Found | None = None
    if bits == 8:
        # So many codes that how the ends fall on BF16 matters more than what a line fits.
        best = look.covering(range(-1, 5), (-1, 0, 1, 2))
    found = look.from_starts(starts(bits) if bits < 8 else starts(bits, 2))
    look.refit(found)
    best = look.stored(found.scale, found.bias, best, (0, 1), (0, 1))
    best = look.stored(best.scale, best.bias - look.mean, best, (-1, 0, 1), (0, 1))
    return best.scale, best.bias
