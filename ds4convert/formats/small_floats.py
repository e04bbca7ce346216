"""The small number formats as tables: E2M1 (FP4), E4M3 (FP8), E8M0 (block scales), and BF16 rounding.

Source: architecture.md section 10; E4M3 and E2M1 as in the OCP microscaling formats (no infinities; S.1111.111 is
the only NaN of E4M3, E2M1 has none, byte 0xFF is the NaN of E8M0). FP4 code 8 is -0 here, as in MLX; the official
table has +0 there, which is the same value.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from ds4convert.errors import ValueFault

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]
U16 = NDArray[np.uint16]

E4M3_NAN_CODES = (0x7F, 0xFF)
E8M0_NAN_CODE = 0xFF


@cache
def fp4_values() -> F32:
    """Return the 16 values of E2M1 by code, float32 [16]; code 8 is -0."""
    magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    return np.array(magnitudes + [-m for m in magnitudes], np.float32)


@cache
def fp4_pairs() -> F32:
    """Return the two values of each byte of packed FP4, float32 [256, 2]: low nibble (even column) first."""
    codes = np.arange(256)
    return np.stack([fp4_values()[codes & 15], fp4_values()[codes >> 4]], axis=1)


@cache
def e4m3_values() -> F32:
    """Return the 256 values of E4M3 by code, float32 [256]; codes 0x7F and 0xFF are NaN."""
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    normal = (1 + mantissa / 8) * np.exp2(exponent - 7.0)
    magnitude = np.where(exponent == 0, mantissa / 8 * 2.0**-6, normal)
    magnitude[(codes & 0x7F) == 0x7F] = np.nan
    sign = np.where(codes & 0x80, -1.0, 1.0)
    return np.array(np.copysign(magnitude, sign), dtype=np.float32)


@cache
def e8m0_values() -> F32:
    """Return the 256 values of E8M0 by byte, float32 [256]: 2^(byte-127); byte 0 is 2^-127, byte 255 is NaN."""
    values = np.exp2(np.arange(256) - 127.0)
    values[E8M0_NAN_CODE] = np.nan
    return np.array(values, dtype=np.float32)


def e8m0_codes(values: F32) -> tuple[U8, int | None]:
    """Return (E8M0 bytes of float32 `values` [n], place of the first that is no power of two E8M0 has, or None)."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    exponent = bits >> np.uint32(23)
    exact = ((bits & np.uint32(0x7FFFFF)) == 0) & (exponent > 0) & (exponent < 255)
    least = bits == np.uint32(0x400000)  # 2^-127, a subnormal of float32
    codes = np.where(least, 0, exponent).astype(np.uint8)
    wrong = np.flatnonzero(~(exact | least))
    return codes, int(wrong[0]) if wrong.size else None


FLOATS = ("F32", "BF16", "F16")
"""Dtypes of floating-point numbers whose every value float32 holds."""


def as_f32(raw: bytes, dtype: str) -> F32:
    """Return the values of `raw`, which holds numbers of a dtype of `FLOATS`, exactly."""
    if dtype == "BF16":
        return bf16_values(np.frombuffer(raw, "<u2"))
    return np.frombuffer(raw, {"F32": "<f4", "F16": "<f2"}[dtype]).astype(np.float32, copy=False)


def e8m0_bytes(values: F32, name: str) -> U8:
    """Return `values` (as `e8m0_codes`) of the tensor `name`. Raises `ValueFault` where one is no power of two."""
    codes, wrong = e8m0_codes(values)
    if wrong is not None:
        told = f"its block scale number {wrong} is {values[wrong]:.9g}, expected a power of two"
        raise ValueFault(f"{name}: {told}", tensor=name)
    return codes


def all_bf16(values: F32) -> bool:
    """Return whether BF16 holds every one of `values` float32 as it is."""
    return not np.bitwise_or.reduce(np.ascontiguousarray(values, np.float32).view(np.uint32), axis=None) & 0xFFFF


def bf16_bits(values: F32) -> U16:
    """Return float32 `values` rounded to BF16 (nearest, ties to even) as uint16 bits; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.where(is_nan, np.uint32(0x7FC0), rounded).astype(np.uint16)


def bf16_values(bits: U16) -> F32:
    """Return the float32 values of BF16 `bits` (uint16), exactly."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
