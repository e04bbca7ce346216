"""Groups of small floats and their scales: nearest codes by trial of all, ties, edges of exponents, decoding by its definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds4convert.errors import ValueFault
from ds4convert.formats import blocks, float_codecs, small_floats
from ds4convert.formats.codecs import CODECS
from ds4convert.formats.packing import pack

F32 = np.float32
FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def floats(*values: float) -> np.ndarray:
    return np.array(values, F32)


def test_values_become_the_nearest_fp4_with_ties_towards_zero_and_no_minus_zero() -> None:
    """Every hundredth from -7 to 7, against trial of all magnitudes; half way the smaller one (as MLX on a processor)."""
    x = np.arange(-700, 701).astype(F32) / F32(100)
    codes = float_codecs._e2m1(x)
    for value, code in zip(x.tolist(), codes.tolist(), strict=True):
        best = min(range(8), key=lambda n: (abs(abs(value) - FP4[n]), FP4[n]))
        assert code == (best | 8 if value < 0 and best else best), value


@pytest.mark.parametrize("step", [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
def test_half_way_goes_down_and_just_above_goes_up(step: float) -> None:
    low, high = float_codecs._e2m1(floats(step, np.nextafter(F32(step), F32(9)))).tolist()
    assert high == low + 1 and FP4[low] < step < FP4[high]


@pytest.mark.parametrize(
    ("most", "largest", "code"),
    [
        (6.0, 6.0, 127), (6.01, 6.0, 128), (5.99, 6.0, 127), (3.0, 6.0, 126), (3.01, 6.0, 127), (12.0, 6.0, 128), (448.0, 448.0, 127),
        (0.0, 6.0, 127), (449.0, 448.0, 128), (3e38, 6.0, 253), (1e-38, 6.0, 0),
    ],
)  # fmt: skip
def test_a_block_scale_is_the_least_power_of_two_that_brings_the_largest_in_range(
    most: float, largest: float, code: int
) -> None:
    assert float_codecs._power(floats(most), largest).tolist() == [code]


@given(st.floats(2.0**-100, 2.0**100, width=32), st.sampled_from([6.0, 448.0]))
def test_no_smaller_power_of_two_would_do(most: float, largest: float) -> None:
    (code,) = float_codecs._power(floats(most), largest).tolist()
    by = 2.0 ** (code - 127)
    assert most / by <= largest * (1 + 1e-6) and most / (by / 2) > largest * (1 - 1e-6)


def test_scales_of_nvfp4_are_the_nearest_of_all_e4m3_ties_to_even() -> None:
    known = small_floats.e4m3_values()[:0x7F].astype(np.float64)
    wanted = np.concatenate([known, (known[1:] + known[:-1]) / 2, [1e-9, 1e9, 449.0]])
    for value, code in zip(wanted, float_codecs._nearest_scale((wanted * 6).astype(F32), 6.0).tolist(), strict=True):
        best = min(range(0x7F), key=lambda n: (abs(known[n] - value), n % 2))
        assert code == best, value


def test_every_bf16_becomes_its_nearest_e4m3_and_what_is_larger_the_largest() -> None:
    """A sample of all 2^16: every exponent with mantissas at and beside ties."""
    bits = np.array([e << 7 | m for e in range(100, 140) for m in (0, 1, 7, 8, 9, 24, 64, 120, 127)], np.uint16)
    known = small_floats.e4m3_values()[:0x7F].astype(np.float64)
    for value, code in zip(
        small_floats.bf16_values(bits), float_codecs._e4m3(small_floats.bf16_values(bits)), strict=True
    ):
        best = min(range(0x7F), key=lambda n: (abs(known[n] - float(value)), n % 2))
        assert code == best and float_codecs._e4m3(floats(-value))[0] == best | 0x80


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8", "nvfp4"])
def test_decoding_is_value_of_code_times_value_of_scale(name: str) -> None:
    codec, rng = CODECS[name], np.random.default_rng(3)
    codes = rng.integers(0, 2**codec.bits, (3, 64), dtype=np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 1
    scales = rng.integers(100, 126, (3, 64 // codec.group_size), dtype=np.uint8)
    table = small_floats.fp4_values() if codec.bits == 4 else small_floats.e4m3_values()
    by = small_floats.e4m3_values() if name == "nvfp4" else small_floats.e8m0_values()
    found = float_codecs.decode(codec, pack(codes, codec.bits), scales)
    for (r, c), value in np.ndenumerate(found):
        assert value == table[codes[r, c]] * by[scales[r, c // codec.group_size]]


@pytest.mark.parametrize(("name", "tries"), [("mxfp4", 2), ("mxfp8", 2), ("nvfp4", 9)])
def test_other_scales_are_near_the_first_and_stay_in_range(name: str, tries: int) -> None:
    codec = CODECS[name]
    x = np.random.default_rng(5).standard_normal((codec.group_size, 4)).astype(F32)
    codes, scales, error = float_codecs.plain(x, codec)
    found = float_codecs.others(x, codec, scales)
    assert len(found) == tries and len({s.tobytes() for _, s, _ in found} | {scales.tobytes()}) == tries + 1
    kind = float_codecs.KINDS[name]
    for made, by, left in [(codes, scales, error), *found]:
        assert np.allclose(x - kind.values()[made] * kind.scales()[by], left)
    ends = [float_codecs.others(x, codec, np.full(4, end, np.uint8)) for end in (0, kind.most)]
    assert all(s.min() >= 0 and s.max() <= kind.most for tried in ends for _, s, _ in tried)


def test_a_group_of_zeros_has_the_scale_one_and_the_smallest_scale_makes_no_nan() -> None:
    for name in ("mxfp4", "mxfp8"):
        codes, scales, error = float_codecs.plain(np.zeros((32, 1), F32), CODECS[name])
        assert not codes.any() and scales.tolist() == [127] and not error.any()
    codes, scales, error = float_codecs.plain(np.zeros((16, 1), F32), CODECS["nvfp4"])
    assert not codes.any() and scales.tolist() == [0] and not error.any()


# --- scales ---


@given(st.integers(-127, 127))
def test_powers_of_two_have_their_code_and_their_neighbours_none(power: int) -> None:
    value = F32(2.0**power)
    codes, wrong = small_floats.e8m0_codes(np.array([value], F32))
    assert codes.tolist() == [power + 127] and wrong is None
    for other in (np.nextafter(value, F32(0)), np.nextafter(value, F32(3e38)), -value):
        assert small_floats.e8m0_codes(np.array([value, other, value], F32))[1] == 1


@pytest.mark.parametrize("value", [0.0, -0.0, math.inf, math.nan, 2.0**-128, 3.0])
def test_what_e8m0_has_no_code_for_is_named_by_its_place(value: float) -> None:
    with pytest.raises(ValueFault) as caught:
        small_floats.e8m0_bytes(floats(1.0, 2.0, value, value), "layers.0.w.scale")
    assert str(caught.value) == f"layers.0.w.scale: its block scale number 2 is {value:.9g}, expected a power of two"
    assert caught.value.tensor == "layers.0.w.scale"
    assert small_floats.e8m0_bytes(floats(1.0, 0.5), "w").tolist() == [127, 126]


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_floats_of_every_width_are_read_exactly(dtype: str) -> None:
    wanted = floats(0.0, -1.5, 2.0**-10, 240.0)
    raw = {"F32": wanted.astype("<f4").tobytes(), "F16": wanted.astype("<f2").tobytes(), "BF16": (wanted.view(np.uint32) >> 16).astype("<u2").tobytes()}[dtype]  # fmt: skip
    found = small_floats.as_f32(raw, dtype)
    assert found.dtype == F32 and found.tolist() == wanted.tolist()


@pytest.mark.parametrize(
    ("values", "held"), [([1.0, -2.5, math.inf], True), ([1.0, 1.0 + 2.0**-8], False), ([2.0**-133], True), ([2.0**-134], False), ([], True)]
)  # fmt: skip
def test_bf16_holds_a_value_where_the_lower_half_of_its_bits_is_zero(values: list[float], held: bool) -> None:
    assert small_floats.all_bf16(np.array(values, F32)) == held
    assert small_floats.all_bf16(np.array([values] * 2, F32)) == held


def test_a_nan_stays_one_whatever_its_bits() -> None:
    bits = np.array([0x7F800001, 0xFFFFFFFF, 0x7FC00000, 0x7F800000, 0xFF800000], np.uint32)
    assert small_floats.bf16_bits(bits.view(F32)).tolist() == [0x7FC0, 0x7FC0, 0x7FC0, 0x7F80, 0xFF80]


def test_a_grid_of_tiles_is_read_from_the_row_at_which_a_slice_begins() -> None:
    codes = np.full((3, 6), 0x38, np.uint8)  # 1.0
    grid = np.array([[127, 128], [129, 130], [131, 132]], np.uint8)
    assert blocks.decode_fp8(codes, grid, 3, (2, 4)).tolist() == [[4.0] * 4 + [8.0] * 2] + [[16.0] * 4 + [32.0] * 2] * 2
    assert blocks.decode_fp8(codes, grid, 0, (2, 4)).tolist() == [[1.0] * 4 + [2.0] * 2] * 2 + [[4.0] * 4 + [8.0] * 2]
