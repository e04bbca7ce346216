"""The search of `formats/affine` and the rounding after it, compiled: the same steps in the same order, bit for bit.

Groups come as rows `[groups, n]`. A block of `LANES` of them is copied to a small array `[n, LANES]`, and every trial
of the search runs over it while it lies in the core's first cache; the plain path goes through memory each time.
Sums over a group add one value after another, as numpy does along the first axis. `ws` is None where all values count
alike. Imported only where numba is there.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ds4convert.formats.compiled.options import F32, kernel

LANES = 32
"""Groups that are worked on at once."""

SCALE, BIAS, ONE, TWO, MIXED, ERROR = (LANES * k for k in range(6))
"""Places in the work array of a block: the line that is tried, and the sums that it gives."""

FIRST, SECOND, TOTAL, MEAN, LOW, HIGH, TOP = (LANES * k for k in range(7))
"""Places in the array of what holds for a whole block."""

TINY = np.float32(2.0**-100)
LEAST_SCALE = np.float32(1e-7)
ZERO, HALF, INFINITE = np.float32(0), np.float32(0.5), np.float32(np.inf)
GAIN = np.float32(1 - 1e-6)
Weights = Any
"""How much each value counts, float32; None: all alike."""

AROUND = 4
"""Pairs of a scale and a bias that are tried around a line."""

BF16_STEP = 0x10000
"""From one BF16 value to the next, as bits of a float32."""


@kernel
def code(x: Any, scale: Any, bias: Any, top: Any) -> Any:
    """Return the code nearest to x; what is not a number stays so, as in numpy."""
    q = np.rint((x - bias) / scale)
    q = ZERO if q <= ZERO else q
    return top if q > top else q


@kernel
def bf16_at(x: Any, steps: Any) -> Any:
    """Return x cut off to BF16 towards zero, then so many values away from zero."""
    bits = np.float32(x).view(np.int32) & np.int32(-0x10000)
    return np.int32(bits + np.int32(steps * BF16_STEP)).view(np.float32)


@kernel
def bf16(x: Any) -> Any:
    """Return x rounded to BF16, ties to even."""
    bits = np.float32(x).view(np.uint32)
    bits = np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    return np.uint32(bits & np.uint32(0xFFFF0000)).view(np.float32)


@kernel
def _copied(x: F32, weight: Weights, first: int, count: int, xs: F32, ws: Weights) -> None:
    """Copy a block of groups, and their weights. Missing groups repeat the last one."""
    n = x.shape[1]
    for j in range(LANES):
        g = first + min(j, count - 1)
        for i in range(n):
            xs[i * LANES + j] = x[g, i]
        if weight is not None:
            for i in range(n):
                ws[i * LANES + j] = weight[g % weight.shape[0], i]


@kernel
def _faced(xs: F32, ws: Weights, facts: F32, top: Any) -> None:
    """Centre a block, and note what holds for it."""
    n = len(xs) // LANES
    for j in range(LANES):
        facts[TOP + j] = top
        facts[TOTAL + j] = ws[j] if ws is not None else np.float32(n)
        facts[MEAN + j] = xs[j] * ws[j] if ws is not None else xs[j]
    for i in range(LANES, n * LANES, LANES):
        for j in range(LANES):
            if ws is not None:
                facts[TOTAL + j] += ws[i + j]
                facts[MEAN + j] += xs[i + j] * ws[i + j]
            else:
                facts[MEAN + j] += xs[i + j]
    for j in range(LANES):
        facts[TOTAL + j] = TINY if facts[TOTAL + j] < TINY else facts[TOTAL + j]
        facts[MEAN + j] /= facts[TOTAL + j]
        facts[FIRST + j] = facts[SECOND + j] = ZERO
        facts[LOW + j], facts[HIGH + j] = INFINITE, -INFINITE
    for i in range(0, n * LANES, LANES):
        for j in range(LANES):
            v = xs[i + j] - facts[MEAN + j]
            xs[i + j] = v
            counted = v * ws[i + j] if ws is not None else v
            facts[FIRST + j] += counted
            facts[SECOND + j] += counted * v
            facts[LOW + j] = min(facts[LOW + j], v)
            facts[HIGH + j] = max(facts[HIGH + j], v)


@kernel
def _fit(xs: F32, ws: Weights, facts: F32, work: F32) -> None:
    """Fit a line to the codes of the one in `work`; it takes its place, with its error."""
    top = facts[TOP]
    for j in range(LANES):
        work[ONE + j] = work[TWO + j] = work[MIXED + j] = ZERO
    for i in range(0, len(xs), LANES):
        for j in range(LANES):
            x = xs[i + j]
            q = code(x, work[SCALE + j], work[BIAS + j], top)
            counted = q * ws[i + j] if ws is not None else q
            work[ONE + j] += counted
            work[TWO + j] += counted * q
            work[MIXED + j] += counted * x
    for j in range(LANES):
        one, total, first = work[ONE + j], facts[TOTAL + j], facts[FIRST + j]
        middle = one / total
        spread = work[TWO + j] - one * middle
        spread = TINY if spread < TINY else spread
        common = work[MIXED + j] - first * middle
        slope = common / spread
        slope = TINY if slope < TINY else slope
        work[ERROR + j] = facts[SECOND + j] - first * first / total - common * slope
        work[SCALE + j], work[BIAS + j] = slope, (first - slope * one) / total


@kernel
def _error(xs: F32, ws: Weights, facts: F32, work: F32) -> None:
    """Note the error of the line in `work` as it is."""
    top = facts[TOP]
    for j in range(LANES):
        work[ERROR + j] = ZERO
    for i in range(0, len(xs), LANES):
        for j in range(LANES):
            x, scale, bias = xs[i + j], work[SCALE + j], work[BIAS + j]
            rest = (x - bias) - code(x, scale, bias, top) * scale
            work[ERROR + j] += rest * ws[i + j] * rest if ws is not None else rest * rest


@kernel
def _middle(xs: F32, ws: Weights, facts: F32, line: F32, middle: F32) -> None:
    """Note the mean of the codes of a line."""
    top = facts[TOP]
    for j in range(LANES):
        middle[j] = ZERO
    for i in range(0, len(xs), LANES):
        for j in range(LANES):
            q = code(xs[i + j], line[SCALE + j], line[BIAS + j], top)
            middle[j] += q * ws[i + j] if ws is not None else q
    for j in range(LANES):
        middle[j] /= facts[TOTAL + j]


@kernel
def _keep(work: F32, best: F32, bias: F32) -> None:
    """Take the line in `work`, with this bias, where it is better than the best."""
    for j in range(LANES):
        if work[ERROR + j] < best[ERROR + j]:
            best[ERROR + j], best[SCALE + j] = work[ERROR + j], work[SCALE + j]
            best[BIAS + j] = bias[j]


@kernel
def _nothing(best: F32) -> None:
    """Begin with what everything is better than."""
    for j in range(LANES):
        best[ERROR + j], best[SCALE + j], best[BIAS + j] = INFINITE, ZERO, ZERO


@kernel
def _fitted(xs: F32, ws: Weights, facts: F32, found: F32, starts: F32, count: int) -> bool:
    """Fit lines from all starting ranges, then for the codes of the best one; return whether that last fit gained.

    `starts` holds the part of the range that is a step, and the part below it. Of the groups the first `count` matter.
    There is one place that fits, not one for each use: compiling takes as long as the code is.
    """
    work, before = np.empty(6 * LANES, np.float32), np.empty(LANES, np.float32)
    for k in range(len(starts) + 1):
        for j in range(LANES):
            if k < len(starts):
                width = facts[HIGH + j] - facts[LOW + j]
                width = TINY if width < TINY else width
                work[SCALE + j], work[BIAS + j] = width * starts[k, 0], facts[LOW + j] + starts[k, 1] * width
            else:
                work[SCALE + j], work[BIAS + j], before[j] = found[SCALE + j], found[BIAS + j], found[ERROR + j]
        _fit(xs, ws, facts, work)
        _keep(work, found, work[BIAS : BIAS + LANES])
    gained = False
    for j in range(count):
        gained |= found[ERROR + j] < before[j] * GAIN
    return gained


@kernel
def _stored(xs: F32, ws: Weights, facts: F32, found: F32, best: F32, steps: Any) -> None:
    """Try BF16 scales and biases: near those that span the range, then around the line found, then around the best.

    `steps` are those of the covering range. What is found stands in `best`, its bias not centred.
    """
    work, line, offset = np.empty(6 * LANES, np.float32), np.empty(2 * LANES, np.float32), np.empty(LANES, np.float32)
    middle, first = np.empty(LANES, np.float32), len(steps)
    for k in range(first + 2 * AROUND):
        at = (k - first) % AROUND
        if k >= first and at == 0:
            for j in range(LANES):
                line[SCALE + j] = found[SCALE + j] if k == first else best[SCALE + j]
                line[BIAS + j] = found[BIAS + j] if k == first else best[BIAS + j] - facts[MEAN + j]
            _middle(xs, ws, facts, line, middle)
        for j in range(LANES):
            if k < first:
                low, width, top = facts[LOW + j], facts[HIGH + j] - facts[LOW + j], facts[TOP + j]
                least = width / top
                scale = bf16_at(TINY if least < TINY else least, steps[k, 0])
                offset[j] = bf16_at(low + facts[MEAN + j] - (top * scale - width) * HALF, steps[k, 1])
            else:
                up = 1 if at >= 2 else (0 if k < first + AROUND else -1)
                scale = bf16_at(line[SCALE + j], up)
                mean = facts[FIRST + j] / facts[TOTAL + j] + facts[MEAN + j]
                offset[j] = bf16_at(mean - scale * middle[j], at % 2)
            work[SCALE + j], work[BIAS + j] = scale, offset[j] - facts[MEAN + j]
        _error(xs, ws, facts, work)
        _keep(work, best, offset)


@kernel
def _row(table: Weights, number: int) -> Weights:
    """Return a row of a table, None of none."""
    if table is None:
        return None
    return table[number]


@kernel
def _like(weight: Weights, rows: int, size: int) -> Weights:
    """Return room for weights, None where there are none."""
    if weight is None:
        return None
    return np.empty((rows, size), np.float32)


@kernel
def search(x: F32, weight: Weights, top: Any, starts: F32, steps: Any) -> F32:
    """Return scales and biases `[2, groups]` as `affine.search` gives them for groups `x` `[groups, n]`.

    `weight` `[count, n]` is that of the first groups, then of the next ones, and so on; or None. `starts` are the
    starting ranges, `steps` those of the covering range (none: not tried).
    """
    groups, n = x.shape
    blocks = (groups + LANES - 1) // LANES
    xs, wt = np.empty((blocks, n * LANES), np.float32), _like(weight, blocks, n * LANES)
    facts, found = np.empty((blocks, 7 * LANES), np.float32), np.empty((blocks, 6 * LANES), np.float32)
    best, lines = np.empty(6 * LANES, np.float32), np.empty((2, groups), np.float32)
    gained = False
    for b in range(blocks):
        ws, count = _row(wt, b), min(LANES, groups - b * LANES)
        _copied(x, weight, b * LANES, count, xs[b], ws)
        _faced(xs[b], ws, facts[b], top)
        _nothing(found[b])
        gained |= _fitted(xs[b], ws, facts[b], found[b], starts, count)
    for b in range(blocks):
        ws, count = _row(wt, b), min(LANES, groups - b * LANES)
        if gained:  # by any group of all these, as in the plain path
            _fitted(xs[b], ws, facts[b], found[b], starts[:0], count)
        _nothing(best)
        _stored(xs[b], ws, facts[b], found[b], best, steps)
        for j in range(count):
            lines[0, b * LANES + j], lines[1, b * LANES + j] = best[SCALE + j], best[BIAS + j]
    return lines


@kernel
def _plain(xs: F32, top: Any, lines: F32) -> None:
    """Note scale and bias of mx.quantize for a block: unrounded in the first two rows, in BF16 in the next two."""
    low, high = xs[:LANES].copy(), xs[:LANES].copy()
    for i in range(LANES, len(xs), LANES):
        for j in range(LANES):
            low[j], high[j] = min(low[j], xs[i + j]), max(high[j], xs[i + j])
    for j in range(LANES):
        negative = abs(low[j]) > abs(high[j])
        by = (high[j] - low[j]) / top
        by = LEAST_SCALE if by < LEAST_SCALE else by
        by = by if negative else -by
        edge = low[j] if negative else high[j]
        zero = np.rint(edge / by)
        lines[0, j] = by if zero == ZERO else edge / zero
        lines[1, j] = ZERO if zero == ZERO else edge
        lines[2, j], lines[3, j] = bf16(lines[0, j]), bf16(lines[1, j])


@kernel
def _coded(xs: F32, ws: Weights, top: Any, lines: F32, codes: F32, error: F32, cost: F32) -> None:
    """Note the codes for the first line of `lines`, and the errors and cost that they have with the second."""
    for j in range(LANES):
        cost[j] = ZERO
    for i in range(0, len(xs), LANES):
        for j in range(LANES):
            x = xs[i + j]
            q = code(x, lines[0, j], lines[1, j], top)
            rest = x - (q * lines[2, j] + lines[3, j])
            codes[i + j], error[i + j] = q, rest
            cost[j] += rest * ws[i + j] * rest if ws is not None else rest * rest


@kernel
def finish(x: F32, weight: Weights, found: F32, top: Any, codes: Any, stored: Any, sums: F32) -> Any:
    """Round groups `x` `[groups, n]` with the lines that were found, or as mx.quantize does where that is no worse.

    `found` `[2, groups]` holds scales and biases. Fills `codes` uint8 `[groups, n]`, `stored` uint16 `[2, groups]`
    (scales and biases as BF16 bits), and `sums` `[2, groups]` of squared errors and squared values. Returns the largest
    error.
    """
    groups, n = x.shape
    xs, wt = np.empty(n * LANES, np.float32), _like(weight, 1, n * LANES)
    ws = _row(wt, 0)
    q, error = np.empty((2, n * LANES), np.float32), np.empty((2, n * LANES), np.float32)
    lines, cost = np.empty((2, 4, LANES), np.float32), np.empty((2, LANES), np.float32)
    most = ZERO
    for first in range(0, groups, LANES):
        count = min(LANES, groups - first)
        _copied(x, weight, first, count, xs, ws)
        _plain(xs, top, lines[0])
        for j in range(LANES):
            g = first + min(j, count - 1)
            lines[1, 0, j] = lines[1, 2, j] = bf16(found[0, g])
            lines[1, 1, j] = lines[1, 3, j] = bf16(found[1, g])
        for k in range(2):
            _coded(xs, ws, top, lines[k], q[k], error[k], cost[k])
        for j in range(count):
            k = 1 if cost[1, j] < cost[0, j] else 0
            square, norm = ZERO, ZERO
            for i in range(n):
                rest, value = error[k, i * LANES + j], xs[i * LANES + j]
                codes[first + j, i] = np.uint8(q[k, i * LANES + j])
                square += rest * rest
                norm += value * value
                most = max(most, abs(rest))
            sums[0, first + j], sums[1, first + j] = square, norm
            stored[0, first + j] = np.uint16(np.float32(lines[k, 2, j]).view(np.uint32) >> 16)
            stored[1, first + j] = np.uint16(np.float32(lines[k, 3, j]).view(np.uint32) >> 16)
    return most


@kernel
def is_ordinary(x: F32, low: Any, high: Any) -> bool:
    """Return whether the largest value of each group `x` `[groups, n]` is 0 or lies between `low` and `high`."""
    for g in range(len(x)):
        most = ZERO
        for i in range(x.shape[1]):
            most = max(most, abs(x[g, i]))
        if most != ZERO and not (most > np.float32(low) and most < np.float32(high)):
            return False
    return True


@kernel
def added(a: F32, b: F32) -> tuple[F32, F32]:
    """Return the sums of `a` `[n, groups]`, and of its products with `b`, as the kernels take them."""
    total, dot = a[0].copy(), np.zeros(a.shape[1], np.float32)
    for i in range(1, len(a)):
        for j in range(a.shape[1]):
            total[j] += a[i, j]
    for i in range(len(a)):
        for j in range(a.shape[1]):
            dot[j] += a[i, j] * b[i, j]
    return total, dot
