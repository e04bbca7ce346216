"""Rounding: plain is MLX's byte for byte, the search never loses to it, and MLX reads what is written."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mlx_lm.models.switch_layers import QuantizedSwitchLinear

from ds4convert.formats import affine, affine_from_fp4, array_backends, blocks, small_floats
from ds4convert.formats import rounding as encoding
from ds4convert.formats.codecs import CODECS, Codec
from ds4convert.formats.packing import pack, unpack
from ds4convert.formats.rounding import Encoded, decode, encode, encode_fp4

mx.set_default_device(mx.cpu)
AFFINE = [c for c in CODECS.values() if c.mode == "affine"]
FLOATS = [c for c in CODECS.values() if c.mode != "affine"]


def bf16(x: np.ndarray) -> np.ndarray:
    return small_floats.bf16_values(small_floats.bf16_bits(np.asarray(x, np.float32)))


def normal(seed: int, rows: int = 16, cols: int = 256) -> np.ndarray:
    return bf16(np.random.default_rng(seed).standard_normal((rows, cols)))


def from_fp4(seed: int, rows: int = 64, cols: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """Return (packed codes, scales) of normal weights that went through FP4, as an official checkpoint stores them."""
    rng = np.random.default_rng(seed)  # rows of all sizes: how well a group fits depends on where its largest lies
    x = rng.standard_normal((rows, cols // 32, 32)).astype(np.float32) * np.exp2(rng.random((rows, 1, 1)) - 6)
    power = np.ceil(np.log2(np.abs(x).max(axis=2, keepdims=True) / 6))
    size = np.abs(np.abs(x / 2.0**power)[..., None] - small_floats.fp4_values()[:8]).argmin(axis=-1)
    codes = (size + 8 * (x < 0)).reshape(rows, cols).astype(np.uint8)
    return codes[:, ::2] | codes[:, 1::2] << 4, (power[..., 0] + 127).astype(np.uint8)


def mlx_parts(codec: Codec, e: Encoded) -> list[mx.array]:
    out = [mx.array(e.weight)]
    for part in (e.scales, e.biases):
        if part is not None:
            out.append(mx.array(part).view(mx.bfloat16) if codec.scale_dtype == "BF16" else mx.array(part))
    return out


def mlx_values(codec: Codec, e: Encoded) -> np.ndarray:
    parts = [p.astype(mx.float32) if p.dtype == mx.bfloat16 else p for p in mlx_parts(codec, e)]
    return np.array(mx.dequantize(*parts, **codec.table(), dtype=mx.float32))


def mlx_quantized(codec: Codec, values: np.ndarray) -> list[np.ndarray]:
    made = mx.quantize(mx.array(values).astype(mx.bfloat16), **codec.table())
    return [np.array(p.view(mx.uint16) if p.dtype == mx.bfloat16 else p) for p in made]


def group_errors(codec: Codec, e: Encoded, values: np.ndarray) -> np.ndarray:
    rest = decode(codec, e.weight, e.scales, e.biases).astype(np.float64) - values
    return (rest**2).reshape(-1, codec.group_size).sum(axis=1)


@st.composite
def matrices(draw: st.DrawFn) -> np.ndarray:
    """BF16 matrices of whole groups of 128: normal, and with zeros, constants, outliers, tiny and huge values."""
    rows, seed = draw(st.integers(1, 5)), draw(st.integers(0, 2**32 - 1))
    x = normal(seed, rows, 128 * draw(st.integers(1, 3)))
    flat = x.reshape(-1, 32)
    for kind in draw(st.lists(st.sampled_from(["zero", "constant", "outlier", "tiny", "huge", "sparse"]), max_size=3)):
        at = draw(st.integers(0, len(flat) - 1))
        if kind == "sparse":
            flat[at, 1:] = 0
        else:
            flat[at] *= {"zero": 0, "tiny": 2.0**-30, "huge": 2.0**40}.get(kind, 1)
            if kind == "constant":
                flat[at] = flat[at, 0]
            if kind == "outlier":
                flat[at, 3] *= 1000
    return bf16(x)


@given(matrices(), st.sampled_from(list(CODECS.values())))
@settings(max_examples=150)
def test_plain_rounding_is_that_of_mlx_byte_for_byte(values: np.ndarray, codec: Codec) -> None:
    # Where nvfp4's largest scale (448) does not reach, MLX's differences all round to the same, and it takes code 0.
    assume(codec.name != "nvfp4" or np.abs(values).max() < 6 * 448)
    e = encode(values, codec, "nearest")
    parts = mlx_quantized(codec, values)
    assert np.array_equal(e.weight, parts[0]) and np.array_equal(e.scales, parts[1])
    assert len(parts) == 2 or np.array_equal(e.biases, parts[2])


@given(matrices(), st.sampled_from(list(CODECS.values())), st.sampled_from(["nearest", "optimal"]))
@settings(max_examples=100)
def test_mlx_reads_the_values_that_we_read_and_the_loss_is_theirs(
    values: np.ndarray, codec: Codec, rounding: str
) -> None:
    e = encode(values, codec, rounding)
    ours = decode(codec, e.weight, e.scales, e.biases)
    assert np.array_equal(ours, mlx_values(codec, e))
    rest = ours.astype(np.float64) - values
    assert e.squared == pytest.approx((rest**2).sum(), rel=1e-4, abs=1e-30)
    assert e.norm == pytest.approx((values.astype(np.float64) ** 2).sum(), rel=1e-4, abs=1e-30)
    assert e.max_abs == pytest.approx(np.abs(rest).max(), rel=1e-5)


@given(matrices(), st.sampled_from(list(CODECS.values())))
@settings(max_examples=100)
def test_the_search_is_no_worse_than_plain_rounding_in_any_group(values: np.ndarray, codec: Codec) -> None:
    found = group_errors(codec, encode(values, codec, "optimal"), values)
    plain = group_errors(codec, encode(values, codec, "nearest"), values)
    assert (found <= plain * (1 + 1e-5)).all()


NORMAL = {2: 34, 3: 25, 4: 20, 5: 19, 6: 21, 8: 53}
THROUGH_FP4 = {2: 39, 3: 34, 4: 46, 5: 96, 6: 99.9, 8: 99.9}
"""Per cent of the squared error of plain rounding that the search saves at least, groups of 64, by bits."""


@pytest.mark.parametrize("bits", NORMAL)
def test_the_search_saves_as_much_of_the_error_as_is_claimed(bits: int) -> None:
    codec = CODECS[f"affine-{bits}-g64"]
    values = normal(1, 64, 1024)
    saved = 1 - encode(values, codec, "optimal").squared / encode(values, codec, "nearest").squared
    assert 100 * saved > NORMAL[bits]
    codes, scales = from_fp4(2, 256, 512)
    saved = (
        1 - encode_fp4(codes, scales, codec, "optimal").squared / encode_fp4(codes, scales, codec, "nearest").squared
    )
    assert 100 * saved > THROUGH_FP4[bits]


@pytest.mark.parametrize("name", ["affine-5-g32", "affine-6-g32", "affine-8-g64", "affine-8-g128"])
def test_fp4_values_stay_exact_where_the_format_has_room_for_them(name: str) -> None:
    codes, scales = from_fp4(3)
    e = encode_fp4(codes, scales, CODECS[name], "optimal")
    assert e.squared == 0 and e.max_abs == 0
    assert np.array_equal(decode(CODECS[name], e.weight, e.scales, e.biases), blocks.decode_fp4(codes, scales))


@pytest.mark.parametrize("codec", AFFINE, ids=lambda c: c.name)
@pytest.mark.parametrize("weighted", [False, True])
def test_fp4_with_scales_far_apart_is_still_no_worse_than_plain_rounding(codec: Codec, weighted: bool) -> None:
    codes, scales = from_fp4(4, rows=16)
    rng = np.random.default_rng(5)
    scales = (scales - rng.integers(0, 9, scales.shape)).astype(np.uint8)
    values = blocks.decode_fp4(codes, scales)
    importance = rng.random(values.shape[1]).astype(np.float32) if weighted else None
    found = encode_fp4(codes, scales, codec, "optimal", importance)
    if not weighted:
        plain = group_errors(codec, encode(values, codec, "nearest"), values)
        assert (group_errors(codec, found, values) <= plain * (1 + 1e-5)).all()
    assert np.isfinite(decode(codec, found.weight, found.scales, found.biases)).all()


@pytest.mark.parametrize("codec", list(CODECS.values()), ids=lambda c: c.name)
def test_importance_moves_error_away_from_columns_that_count(codec: Codec) -> None:
    values = normal(6, 64, 256)
    importance = np.where(np.arange(256) % 4 == 0, 100, 1).astype(np.float32)
    plain, weighted = (encode(values, codec, "optimal", i) for i in (None, importance))

    def cost(e: Encoded) -> float:
        return float(((decode(codec, e.weight, e.scales, e.biases) - values) ** 2 * importance).sum())

    assert cost(weighted) < cost(plain) or codec.name == "mxfp8"
    assert cost(weighted) <= cost(plain) * (1 + 1e-6)


@pytest.mark.parametrize("codec", list(CODECS.values()), ids=lambda c: c.name)
def test_columns_without_any_importance_do_no_harm(codec: Codec) -> None:
    values = normal(7, 4, 256)
    for importance in (np.zeros(256, np.float32), np.eye(256, dtype=np.float32)[5], np.full(256, 1e30, np.float32)):
        e = encode(values, codec, "optimal", importance)
        assert e.squared < 0.5 * e.norm and np.isfinite(e.squared)


@pytest.mark.parametrize("codec", list(CODECS.values()), ids=lambda c: c.name)
@pytest.mark.parametrize("rounding", ["nearest", "optimal"])
def test_zeros_and_subnormals_stay_what_they_are_or_nearly(codec: Codec, rounding: str) -> None:
    zeros = encode(np.zeros((2, 128), np.float32), codec, rounding)
    assert not decode(codec, zeros.weight, zeros.scales, zeros.biases).any()
    small = encode(np.full((1, 128), 1e-39, np.float32), codec, rounding)
    assert np.abs(decode(codec, small.weight, small.scales, small.biases)).max() < 1e-6


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_infinity_and_nan_are_refused(bad: float) -> None:
    values = normal(8, 2, 128)
    values[1, 77] = bad
    with pytest.raises(ValueError, match="finite"):
        encode(values, CODECS["affine-4-g64"], "optimal")


def test_columns_that_are_no_whole_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="whole groups of 64"):
        encode(normal(9, 2, 96), CODECS["affine-4-g64"], "nearest")


@pytest.mark.parametrize("codec", list(CODECS.values()), ids=lambda c: c.name)
@pytest.mark.parametrize("cut", [1, 7, 32])
def test_rows_are_rounded_alike_however_they_are_cut(codec: Codec, cut: int) -> None:
    """Chunks differ with the size of buffers; bytes must not."""
    values = normal(10, 64, 256)
    whole = encode(values, codec, "optimal")
    parts = [encode(values[r : r + cut], codec, "optimal") for r in range(0, 64, cut)]
    assert np.array_equal(whole.weight, np.concatenate([p.weight for p in parts]))
    assert np.array_equal(whole.scales, np.concatenate([p.scales for p in parts]))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_the_search_finds_as_much_in_mlx_operations_as_in_numpy(bits: int) -> None:
    """A Mac's GPU carries the search through mlx; sums in another order may pick another scale as good as ours."""
    x = np.ascontiguousarray(normal(11, 128, 64).T)
    codes, scales = from_fp4(12, 128, 64)
    single = np.stack([codes & 15, codes >> 4], axis=-1).reshape(128, 64)
    counted, power, _ = affine_from_fp4.histograms(single, scales, None)
    y = np.ascontiguousarray(np.ldexp(blocks.decode_fp4(codes, scales).T, -power))
    sums = {}
    for name, library in array_backends.BOTH.items():
        ops = library()
        errors = []
        for values, found in (
            (x, affine.search(ops, ops.put(x), None, bits)),
            (x, affine.search(ops, ops.put(x), ops.put(np.ones_like(x)), bits)),
            *([(y, affine_from_fp4.search(ops, counted, bits))] if bits in affine_from_fp4.PAYS else []),
        ):
            scale, bias = (ops.get(v) for v in found)
            rest = array_backends.HOST.rest(values, scale, bias, 2**bits - 1)
            errors.append(float((rest**2).sum()))
        sums[name] = errors
    assert sums["mlx"] == pytest.approx(sums["numpy"], rel=2e-3, abs=1e-6)


@pytest.mark.parametrize("codec", list(CODECS.values()), ids=lambda c: c.name)
def test_quantized_layers_multiply_by_the_values_that_we_wrote(codec: Codec) -> None:
    values, x = normal(13, 64, 256) * 0.1, normal(14, 8, 256)
    e = encode(values, codec, "optimal")
    layer = nn.QuantizedLinear(256, 64, bias=False, **codec.table())
    names = ["weight", "scales", "biases"]
    layer.load_weights(list(zip(names, mlx_parts(codec, e), strict=False)))
    wanted = x @ decode(codec, e.weight, e.scales, e.biases).T
    assert np.allclose(np.array(layer(mx.array(x))), wanted, atol=2e-4, rtol=2e-3)
    experts = QuantizedSwitchLinear(256, 64, 2, bias=False, **codec.table())
    stacked = [mx.stack([p, p]) for p in mlx_parts(codec, e)]
    experts.load_weights(list(zip(names, stacked, strict=False)))
    found = experts(mx.array(x)[:, None, None, :], mx.array([[k % 2] for k in range(8)]))
    assert np.allclose(np.array(found).reshape(8, 64), wanted, atol=2e-4, rtol=2e-3)


@given(st.integers(0, 2**32 - 1), st.sampled_from([2, 3, 4, 5, 6, 8]), st.integers(1, 4))
@settings(max_examples=50)
def test_packed_codes_come_back(seed: int, bits: int, runs: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (3, 32 * runs)).astype(np.uint8)
    words = pack(codes, bits)
    assert words.shape == (3, bits * runs) and np.array_equal(unpack(words, bits), codes)


@pytest.mark.parametrize("codec", FLOATS, ids=lambda c: c.name)
def test_every_code_of_a_float_format_keeps_its_value(codec: Codec) -> None:
    """Values that a format holds come back exactly, whatever the rounding."""
    table = small_floats.fp4_values() if codec.bits == 4 else small_floats.e4m3_values()[np.arange(256) & 127 != 127]
    rows = np.resize(table, (4, 256)).astype(np.float32)
    rows[:, :: codec.group_size] = np.abs(table).max()
    for rounding in ("nearest", "optimal"):
        e = encode(rows, codec, rounding)
        assert np.array_equal(decode(codec, e.weight, e.scales, None), rows)


def test_the_loss_of_huge_values_is_counted_without_overflow() -> None:
    values = normal(15, 2, 128) * np.float32(2.0**100)
    e = encode(values, CODECS["affine-4-g64"], "optimal")
    assert 0 < e.squared / e.norm < 0.02 and encoding.SAFE[0] < e.squared / e.norm
