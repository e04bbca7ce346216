"""Affine groups: plain rounding as MLX does it, and the search for the scale and bias of least squared error.

A group of n values is stored as codes q of some bits with value `q * scale + bias`, in float32 from scale and bias in
BF16, which is how MLX's matmul kernels read it. Arrays lie as `[n, groups]`: sums over a group run along the first
axis, where both numpy and a GPU are fast. The search works on values of about 1, so that squares stay in range.

The search: many starting ranges, the least squares scale and bias for the codes of each (closed form), a few times
again for the best one, then the BF16 values around it with new codes for each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ds4convert.formats.array_backends import Arrays
from ds4convert.formats.small_floats import F32

TINY = 2.0**-100
"""Least scale: far below any value of a normalised group, far above what BF16 cannot hold."""

MLX_LEAST_SCALE = np.float32(1e-7)
"""What mx.quantize makes of a range of zero."""

REFITS = 2
"""Rounds of codes and closed form after the first, at most: each costs as much as a start."""


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
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        zero = np.rint(edge / scale)
        scale = np.where(zero == 0, scale, edge / zero)
    bias = np.where(zero == 0, np.float32(0), edge)
    q = x - bias
    # A group of one value above 3e31 has the scale 0: nothing is left of it beside its bias, which 0 / 0 would not say.
    by = np.where(scale == 0, np.float32(1), scale)
    with np.errstate(over="ignore"):  # of ranges near the largest float32; clipped below
        np.divide(q, by, out=q)
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
        self.room = ops.space(self.x.shape)
        self.first = self._sum(self.x)
        self.second = self._dot(self.x, self.x)

    def _sum(self, x: Any) -> Any:
        return (x if self.weight is None else x * self.weight).sum(axis=0)

    def _dot(self, a: Any, b: Any) -> Any:
        return self.ops.dot(a if self.weight is None else a * self.weight, b)

    def _codes(self, scale: Any, bias: Any) -> Any:
        return self.ops.codes(self.x, scale, bias, self.top, self.room)

    def nothing(self) -> Found:
        """Return what everything is better than."""
        zero = self.first * 0
        return Found(zero + math.inf, zero, zero)

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
        rest = self.ops.rest(self.x, scale, bias, self.top, self.room)
        return self._dot(rest, rest)

    def from_starts(self, starts: Iterable[tuple[float, float]]) -> Found:
        """Return the best fit from ranges cut by a part of the whole at the low and at the high end, each refitted."""
        low, high = self.x.min(axis=0), self.x.max(axis=0)
        width = self.xp.maximum(high - low, TINY)
        found = self.nothing()
        for below, above in starts:
            found.better(*self.fit(width * ((1 - below - above) / self.top), low + below * width), self.xp)
        return found

    def refit(self, found: Found) -> None:
        """Fit again for the codes of the best fit, while any group gains."""
        for _ in range(REFITS):
            before = found.error
            error, scale, bias = self.fit(found.scale, found.bias)
            found.better(error, scale, bias, self.xp)
            if not bool((found.error < before * (1 - 1e-6)).any()):
                break

    def stored(self, scale: Any, bias: Any, best: Found | None, scales: Iterable[int], biases: Iterable[int]) -> Found:
        """Return the best of the BF16 scales and biases around a centred fit, with their errors as stored.

        `scales` and `biases` are steps of BF16 from the values cut off towards zero.
        """
        ops, best = self.ops, best or self.nothing()
        middle = self._sum(self._codes(scale, bias)) / self.total
        mean = self.first / self.total + self.mean
        for up in scales:
            near = ops.bf16_at(scale, up)
            wanted = mean - near * middle
            for shift in biases:
                offset = ops.bf16_at(wanted, shift)
                best.better(self.error(near, offset - self.mean), near, offset, self.xp)
        return best

    def covering(self, steps: Iterable[tuple[int, int]]) -> Found:
        """Return the best of some BF16 scales near the one that spans the range, the slack on both sides.

        `steps` are (steps of the scale from that one, steps of the bias), both first cut off towards zero.
        """
        ops, best = self.ops, self.nothing()
        low, high = self.x.min(axis=0), self.x.max(axis=0)
        least = self.xp.maximum((high - low) / self.top, TINY)
        for up, shift in steps:
            scale = ops.bf16_at(least, up)
            offset = ops.bf16_at(low + self.mean - (self.top * scale - (high - low)) * 0.5, shift)
            best.better(self.error(scale, offset - self.mean), scale, offset, self.xp)
        return best


STARTS: dict[int, tuple[tuple[float, float], ...]] = {
    2: (
        (0.18, 0.18), (0.24, 0.12), (0.12, 0.24), (0.12, 0.18), (0.18, 0.12),
        (0.27, 0.09), (0.09, 0.27), (0.24, 0.18), (0.18, 0.24),
    ),
    3: (
        (0.08, 0.08), (0.1, 0.02), (0.04, 0.1), (0.08, 0.04), (0.04, 0.06),
        (0.02, 0.12), (0.12, 0.06), (0.06, 0.04), (0.06, 0.1),
    ),
    4: (
        (0.024, 0.024), (0.0, 0.036), (0.036, 0.0), (0.012, 0.0), (0.012, 0.024),
        (0.0, 0.048), (0.048, 0.024), (0.036, -0.012), (0.024, 0.048),
    ),
    5: (
        (0.008, 0.008), (0.016, -0.008), (0.0, 0.016), (0.008, 0.0), (0.008, -0.032),
        (-0.008, 0.0), (0.0, -0.024), (0.016, 0.0), (-0.008, 0.016),
    ),
    6: (
        (0.0, 0.0), (-0.015, 0.0), (0.005, -0.005), (0.0, 0.005), (-0.015, -0.015),
        (0.005, 0.0), (-0.005, 0.005), (-0.005, -0.015), (-0.015, -0.005),
    ),
    8: (
        (0.0, 0.0), (0.004, 0.004),
    ),
}  # fmt: skip
"""The cuts that ranges start from, by bits: chosen by tools/choose_starts.py, the most useful first."""

COVERING = (
    (1, 0), (2, -1), (1, 1), (3, -2), (2, 0), (0, 1), (3, 1), (4, -2),
    (3, -1), (4, 1), (5, 0), (2, 1),
)  # fmt: skip
"""Steps around the covering range that are tried with 8 bits: chosen by tools/choose_starts.py."""


def search(ops: Arrays, x: Any, weight: Any, bits: int) -> tuple[Any, Any]:
    """Return (scale, bias) `[groups]`, BF16 values in float32, of nearly the least squared error for `x`."""
    look = Search(ops, x, weight, bits)
    # With 8 bits, how the ends fall on BF16 matters more than what a line fits.
    best = look.covering(COVERING) if bits == 8 else None
    found = look.from_starts(STARTS[bits])
    look.refit(found)
    best = look.stored(found.scale, found.bias, best, (0, 1), (0, 1))
    best = look.stored(best.scale, best.bias - look.mean, best, (-1, 1), (0, 1))
    return best.scale, best.bias
