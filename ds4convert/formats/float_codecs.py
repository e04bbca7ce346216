"""Groups of small floats: mxfp4, mxfp8 (a power of two per 32 values) and nvfp4 (an E4M3 scale per 16).

A group of n values is stored as codes and one scale. Arrays lie as `[n, groups]`. Plain rounding does what mx.quantize
does on a processor: the scale is the largest magnitude over the largest code's value, up to the next power of two
(nvfp4: to the nearest E4M3); ties of E2M1 go towards zero and there is no -0, ties of E4M3 go to even. One difference:
mx.quantize wraps round where a block scale would be below 2^-127 and makes values of 1e38 of it; here such a scale is
2^-127. And values beyond nvfp4's largest scale, which MLX makes 0, become its largest value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from ds4convert.formats.codecs import Codec
from ds4convert.formats.packing import unpack
from ds4convert.formats.small_floats import F32, U8, bf16_bits, bf16_values, e4m3_values, e8m0_values, fp4_values

FP4_STEPS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
"""Half way between neighbours of E2M1."""

E8M0_BIAS, E8M0_MOST = 127, 254
E4M3_MOST = 0x7E


def _e2m1(x: F32) -> U8:
    """Return the E2M1 codes nearest to `x`, ties towards zero, +0 for every zero."""
    size = np.abs(x)
    codes = np.zeros(x.shape, np.uint8)
    for step in FP4_STEPS:
        codes += size > np.float32(step)
    return codes | ((codes > 0) & (x < 0)).astype(np.uint8) << np.uint8(3)


@cache
def _e4m3_table() -> U8:
    """Return the E4M3 code nearest to each BF16 value, by its bits, uint8 `[65536]`: ties to even, saturating."""
    with np.errstate(invalid="ignore"):  # NaN among them
        values = bf16_values(np.arange(1 << 15, dtype=np.uint16)).astype(np.float64)
    known = e4m3_values()[: E4M3_MOST + 1].astype(np.float64)
    above = np.clip(np.searchsorted(known, values), 1, E4M3_MOST)
    low, high = values - known[above - 1], known[above] - values
    even = np.where(above % 2 == 0, above, above - 1)
    codes = np.where(low < high, above - 1, np.where(low > high, above, even)).astype(np.uint8)
    return np.concatenate([codes, codes | np.uint8(0x80)])


def _e4m3(x: F32) -> U8:
    return np.take(_e4m3_table(), bf16_bits(x))


def _power(most: F32, largest: float) -> NDArray[np.int32]:
    """Return E8M0 codes of the least power of two that brings `most` to at most `largest`; 1 where all is zero."""
    fraction, exponent = np.frexp((most / np.float32(largest)).astype(np.float32))
    code = exponent - (fraction == 0.5) + E8M0_BIAS
    return np.where(most == 0, E8M0_BIAS, np.clip(code, 0, E8M0_MOST)).astype(np.int32)


@cache
def _positive_e4m3() -> F32:
    return e4m3_values()[: E4M3_MOST + 1].copy()


def _nearest_scale(most: F32, largest: float) -> NDArray[np.int32]:
    """Return E4M3 codes of the scales nearest to `most / largest`, ties to even."""
    wanted = (most / np.float32(largest)).astype(np.float32)
    known = _positive_e4m3()
    above = np.clip(np.searchsorted(known, wanted), 1, E4M3_MOST)
    low, high = wanted - known[above - 1], known[above] - wanted
    even = np.where(above % 2 == 0, above, above - 1)
    return np.where(low < high, above - 1, np.where(low > high, above, even)).astype(np.int32)


@dataclass(frozen=True)
class Kind:
    """A float format: how values become codes, values and scales by code, the first scale and others to try."""

    encode: Callable[[F32], U8]
    values: Callable[[], F32]
    scales: Callable[[], F32]
    first: Callable[[F32, float], NDArray[np.int32]]
    largest: float
    tries: tuple[int, ...]
    most: int


KINDS: Mapping[str, Kind] = {
    "mxfp4": Kind(_e2m1, fp4_values, e8m0_values, _power, 6.0, (-1, -2), E8M0_MOST),
    "mxfp8": Kind(_e4m3, e4m3_values, e8m0_values, _power, 448.0, (-1, 1), E8M0_MOST),
    "nvfp4": Kind(_e2m1, fp4_values, e4m3_values, _nearest_scale, 6.0, (-3, -2, -1, 1, 2, 3, 4, 5, 6), E4M3_MOST),
}
"""By mode. Among the tries of nvfp4 are scales that bring the largest value to 4, whose neighbours lie closer."""

Rounded = tuple[U8, U8, F32]
"""Codes `[n, groups]`, scale codes `[groups]`, errors `[n, groups]`."""


def _round(kind: Kind, x: F32, scale: NDArray[np.int32]) -> Rounded:
    by = kind.scales()[scale]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        scaled = np.where(by > 0, x / by, np.float32(0))
    codes = kind.encode(scaled)
    return codes, scale.astype(np.uint8), x - np.take(kind.values(), codes) * by


def plain(x: F32, codec: Codec) -> Rounded:
    """Return groups `x` `[n, groups]` rounded as mx.quantize does."""
    kind = KINDS[codec.mode]
    return _round(kind, x, kind.first(np.abs(x).max(axis=0), kind.largest))


def others(x: F32, codec: Codec, first: U8) -> list[Rounded]:
    """Return the groups rounded with each of the other scales that are worth a try."""
    kind = KINDS[codec.mode]
    return [_round(kind, x, np.clip(first.astype(np.int32) + k, 0, kind.most)) for k in kind.tries]


def decode(codec: Codec, weight: NDArray[np.uint32], scales: U8) -> F32:
    """Return the values float32 `[rows, cols]` of words uint32 `[rows, words]`, scales uint8 `[rows, groups]`."""
    kind = KINDS[codec.mode]
    codes = unpack(weight, codec.bits).reshape(*scales.shape, codec.group_size)
    with np.errstate(over="ignore"):
        values = np.take(kind.values(), codes) * kind.scales()[scales][..., None]
    return np.asarray(values, np.float32).reshape(scales.shape[0], -1)
