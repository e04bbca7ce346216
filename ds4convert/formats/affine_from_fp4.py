"""Affine groups whose values come from FP4: scale and bias by trying a whole table of them at once.

A block of 32 FP4 values has at most 15 distinct ones, up to a power of two. A group of blocks is then a histogram over
64 known values: 16 codes at the largest block scale of the group, at a half, a quarter and an eighth of it. The error
of a (scale, bias) pair is linear in the histogram, so that one matrix product gives the errors of all groups for all
pairs of a table. The pairs are BF16 values, and stay so times a power of two; among them are those that hold every
FP4 value exactly, where a format has the bits for it.
"""

from __future__ import annotations

import itertools
import math
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ds4convert.formats.affine import Found, Search
from ds4convert.formats.array_backends import Arrays
from ds4convert.formats.blocks import MX_GROUP
from ds4convert.formats.small_floats import F32, U8, bf16_bits, bf16_values, fp4_values

HALVINGS = 4
"""How many block scales a group may have, each half of the one before; other groups are searched value by value."""

CODES = 16
E8M0_BIAS = 127
EDGE = 6.0
"""The largest FP4 value."""

PAYS = {4: 1, 5: HALVINGS, 6: HALVINGS, 8: HALVINGS}
"""Most blocks in a group for which the table finds more than the search value by value, by bits."""

REFINED = 4
"""Up to these bits the best pair of the table is fitted further; above, the table holds what can be had."""

WIDTHS = {4: (6.0, 14.0), 5: (7.0, 16.0), 6: (7.0, 16.0), 8: (7.0, 32.0)}
"""Least and largest range of a pair, from code 0 to the last, by bits."""

GRID = {4: (32, 4), 5: (16, 4), 6: (16, 2), 8: (4, 1)}
"""Scales per power of two, and biases per scale, that the table tries, by bits."""


@cache
def values() -> F32:
    """Return the values of a histogram's places, `[64]`: by halving, then by code."""
    return np.concatenate([fp4_values() * np.float32(2.0**-h) for h in range(HALVINGS)])


@cache
def pairs(bits: int) -> tuple[F32, F32]:
    """Return (scales, biases) of the table, float32 `[pairs]`, all of them BF16 values."""
    top, (least, most), (fine, shifts) = 2**bits - 1, WIDTHS[bits], GRID[bits]
    found = []
    for power, part in itertools.product(range(-8, 3), range(fine)):
        scale = 2.0**power * (1 + part / fine)
        if least <= scale * top <= most:
            steps = range(math.ceil(-(EDGE / scale + 1) * shifts), 1)
            found += [(scale, step * scale / shifts) for step in steps]
    table = np.array(found, np.float32)
    table = table[bf16_values(bf16_bits(table[:, 1])) == table[:, 1]]
    return table[:, 0].copy(), table[:, 1].copy()


@cache
def errors(bits: int) -> F32:
    """Return the squared error of each place of a histogram under each pair of the table, `[64, pairs]`."""
    scales, biases = pairs(bits)
    at = values()[:, None].astype(np.float64)
    q = np.clip(np.rint((at - biases) / scales), 0, 2**bits - 1)
    rest = at - (q * scales + biases)
    return (rest * rest).astype(np.float32)


def histograms(codes: U8, scales: U8, weight: F32 | None) -> tuple[F32, NDArray[np.int32], NDArray[np.bool_]]:
    """Return (histograms `[groups, 64]`, block scale exponent that they are relative to `[groups]`, which hold).

    `codes` `[groups, n]` one FP4 code each, `scales` E8M0 `[groups, n/32]`, `weight` `[groups, n]`. A group whose block
    scales lie further apart than a histogram reaches does not hold.
    """
    groups = codes.shape[0]
    exponents = scales.astype(np.int32) - E8M0_BIAS
    largest = exponents.max(axis=1)
    behind = largest[:, None] - exponents
    holds = behind.max(axis=1) < HALVINGS
    place = np.minimum(behind, HALVINGS - 1) * CODES + np.arange(groups)[:, None] * (HALVINGS * CODES)
    flat = (place[:, :, None] + codes.reshape(groups, -1, MX_GROUP)).reshape(-1)
    counted = np.bincount(flat, None if weight is None else weight.reshape(-1), groups * HALVINGS * CODES)
    return counted.reshape(groups, -1).astype(np.float32), largest, holds


def search(ops: Arrays, counted: F32, bits: int) -> tuple[Any, Any]:
    """Return (scale, bias) `[groups]` of nearly the least squared error for histograms `[groups, 64]`."""
    xp, (scales, biases) = ops.xp, pairs(bits)
    counts = ops.put(counted)
    tried = xp.matmul(counts, ops.put(errors(bits)))
    best = xp.argmin(tried, axis=1)
    error = xp.min(tried, axis=1)
    scale, bias = xp.take(ops.put(scales), best), xp.take(ops.put(biases), best)
    if bits > REFINED:
        return scale, bias
    look = Search(ops, ops.put(values())[:, None], counts.T, bits)
    found = Found(*look.fit(scale, bias - look.mean))
    look.refit(found)
    stored = look.stored(found.scale, found.bias, Found(error, scale, bias), (0, 1), (0, 1))
    return stored.scale, stored.bias
