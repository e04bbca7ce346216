"""The number formats, exhaustively: our tables against independent formulas and against MLX."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds4convert.formats import blocks, small_floats

CPU = mx.cpu
mx.set_default_device(CPU)


def e4m3_by_formula(code: int) -> float:
    """Decode one E4M3 byte with integer arithmetic: OCP 8-bit floating point specification, table 1."""
    sign, exponent, mantissa = code >> 7, (code >> 3) & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    value = math.ldexp(mantissa, -9) if exponent == 0 else math.ldexp(8 + mantissa, exponent - 10)
    return math.copysign(value, -1 if sign else 1)


def fp4_by_formula(code: int) -> float:
    """Decode one E2M1 code: one bit of sign, two of exponent with bias 1, one of mantissa."""
    exponent, mantissa = (code >> 1) & 3, code & 1
    value = mantissa * 0.5 if exponent == 0 else (1 + mantissa * 0.5) * 2.0 ** (exponent - 1)
    return math.copysign(value, -1 if code & 8 else 1)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype == np.float32 and np.array_equal(a.view(np.uint32), b.view(np.uint32))


def test_all_16_fp4_codes_have_the_official_values() -> None:
    official = [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]  # code 8 is +0 there, -0 here
    assert small_floats.fp4_values().tolist() == official
    assert small_floats.fp4_values().tolist() == [fp4_by_formula(c) for c in range(16)]
    assert np.signbit(small_floats.fp4_values()[8]) and small_floats.fp4_values()[8] == 0


def test_all_256_bytes_of_packed_fp4_hold_the_even_column_in_the_low_nibble() -> None:
    for byte in range(256):
        assert small_floats.fp4_pairs()[byte].tolist() == [fp4_by_formula(byte & 15), fp4_by_formula(byte >> 4)]


def test_all_256_e4m3_codes_agree_with_the_formula() -> None:
    expected = np.array([e4m3_by_formula(c) for c in range(256)], np.float32)
    finite = ~np.isnan(expected)
    assert same_bits(small_floats.e4m3_values()[finite], expected[finite])
    assert np.flatnonzero(np.isnan(small_floats.e4m3_values())).tolist() == [0x7F, 0xFF]


def test_all_256_e4m3_codes_agree_with_mlx() -> None:
    codes = np.arange(256, dtype=np.uint8)
    theirs = np.array(mx.from_fp8(mx.array(codes), dtype=mx.float32))
    finite = ~np.isin(codes, small_floats.E4M3_NAN_CODES)
    assert same_bits(small_floats.e4m3_values()[finite], theirs[finite])


@pytest.mark.parametrize(
    ("code", "value"),
    [(0x00, 0.0), (0x80, -0.0), (0x01, 2**-9), (0x07, 7 * 2**-9), (0x08, 2**-6), (0x7E, 448.0), (0xFE, -448.0)],
)
def test_named_e4m3_codes_zero_subnormals_least_normal_and_largest(code: int, value: float) -> None:
    found = float(small_floats.e4m3_values()[code])
    assert (found, math.copysign(1, found)) == (value, math.copysign(1, value))


def test_all_256_e8m0_bytes_are_powers_of_two_and_255_is_nan() -> None:
    for byte in range(255):
        assert float(small_floats.e8m0_values()[byte]) == math.ldexp(1.0, byte - 127)
    assert math.isnan(small_floats.e8m0_values()[255])


def test_all_65536_bf16_codes_decode_to_the_upper_half_of_a_float32_and_round_back() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = small_floats.bf16_values(bits)
    theirs = np.array(mx.array(bits).view(mx.bfloat16).astype(mx.float32))
    is_nan = np.isnan(theirs)
    assert same_bits(values[~is_nan], theirs[~is_nan])
    assert np.isnan(values[is_nan]).all() and is_nan.sum() == 2 * 127
    assert np.array_equal(small_floats.bf16_bits(values)[~is_nan], bits[~is_nan])
    assert np.isnan(small_floats.bf16_values(small_floats.bf16_bits(values)[is_nan])).all()


def mlx_bf16_bits(values: np.ndarray) -> np.ndarray:
    return np.array(mx.array(values).astype(mx.bfloat16).view(mx.uint16))


@given(st.lists(st.integers(0, (1 << 32) - 1), min_size=1, max_size=64))
def test_bf16_rounding_of_any_float32_agrees_with_mlx(bits: list[int]) -> None:
    values = np.array(bits, np.uint32).view(np.float32)
    ours, theirs = small_floats.bf16_bits(values), mlx_bf16_bits(values)
    is_nan = np.isnan(values)
    assert np.array_equal(ours[~is_nan], theirs[~is_nan])
    assert np.isnan(small_floats.bf16_values(ours)[is_nan]).all()


def test_bf16_rounding_of_every_tie_and_its_neighbours_agrees_with_mlx() -> None:
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    for low in (0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        values = (upper | np.uint32(low)).view(np.float32)
        keep = ~np.isnan(values)
        assert np.array_equal(small_floats.bf16_bits(values[keep]), mlx_bf16_bits(values[keep])), hex(low)


@given(st.integers(0, (1 << 32) - 1))
def test_bf16_rounding_is_within_half_a_step_and_ties_go_to_even(bits: int) -> None:
    value = np.array([bits], np.uint32).view(np.float32)
    if not np.isfinite(value[0]) or (bits & 0x7FFFFFFF) >= 0x7F7F8000:  # overflow rounds to infinity
        return
    code = int(small_floats.bf16_bits(value)[0])
    low, high = bits & 0xFFFF0000, (bits & 0xFFFF0000) + 0x10000
    down, up = bits - low, high - bits
    assert code << 16 == (low if down < up or (down == up and not (low >> 16) & 1) else high)


# --- against mx.dequantize: every scale byte with every code byte ---

ALL_CODES = np.tile(np.arange(256, dtype=np.uint8), (255, 1))
SCALES = np.arange(255, dtype=np.uint8)


def mlx_values(codes: np.ndarray, scales: np.ndarray, mode: str, dtype: mx.Dtype = mx.float32) -> np.ndarray:
    bits = {"mxfp4": 4, "mxfp8": 8}[mode]
    packed = mx.array(np.ascontiguousarray(codes).view(np.uint32))
    out = mx.dequantize(packed, mx.array(scales), group_size=32, bits=bits, mode=mode, dtype=dtype)
    return np.array(out.view(mx.uint16) if dtype == mx.bfloat16 else out)


def test_every_scale_byte_with_every_fp4_byte_decodes_as_in_mlx_bit_for_bit() -> None:
    scales = np.repeat(SCALES[:, None], 512 // 32, axis=1)
    ours, theirs = blocks.decode_fp4(ALL_CODES, scales), mlx_values(ALL_CODES, scales, "mxfp4")
    assert ours.shape == (255, 512)
    assert np.array_equal(ours, theirs)  # values, zeros of either sign being equal
    zero = ours == 0
    assert same_bits(ours[~zero], theirs[~zero])


def test_every_scale_byte_with_every_e4m3_byte_decodes_as_in_mlx_bit_for_bit() -> None:
    scales = np.repeat(SCALES[:, None], 256 // 32, axis=1)
    finite = ~np.isin(ALL_CODES, small_floats.E4M3_NAN_CODES)
    ours, theirs = blocks.decode_mxfp8(ALL_CODES, scales), mlx_values(ALL_CODES, scales, "mxfp8")
    assert same_bits(ours[finite], theirs[finite])


def test_every_scale_with_every_code_equals_the_product_in_exact_arithmetic() -> None:
    fp8 = blocks.decode_mxfp8(ALL_CODES, np.repeat(SCALES[:, None], 8, axis=1))
    fp4 = blocks.decode_fp4(ALL_CODES, np.repeat(SCALES[:, None], 16, axis=1))
    for byte in range(255):
        scale = math.ldexp(1.0, byte - 127)
        exact8 = np.array([e4m3_by_formula(c) * scale for c in range(256)])  # float64 holds each exactly
        exact4 = np.array(
            [fp4_by_formula(c) * scale for c in np.stack([np.arange(256) & 15, np.arange(256) >> 4], 1).ravel()]
        )
        with np.errstate(over="ignore"):
            assert np.array_equal(fp8[byte], exact8.astype(np.float32), equal_nan=True), byte
            assert np.array_equal(fp4[byte], exact4.astype(np.float32)), byte
