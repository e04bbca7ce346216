"""The searches for scale and bias: their steps against plain sums, their tables against loops, numpy against mlx."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds4convert.formats import affine, affine_from_fp4, compiled, rounding, samples, small_floats
from ds4convert.formats.affine import Found, Search
from ds4convert.formats.array_backends import BOTH, HOST, on_host
from ds4convert.formats.codecs import CODECS

F32 = np.float32
RNG = np.random.default_rng(11)
X = RNG.standard_normal((32, 5)).astype(F32)


@pytest.mark.parametrize("library", BOTH)
def test_both_libraries_do_the_same(library: str) -> None:
    ops = BOTH[library]()
    scale, bias = np.full(5, 0.25, F32), np.full(5, -1.0, F32)
    put = [ops.put(v) for v in (X, scale, bias)]
    codes = np.clip(np.rint((X.astype(np.float64) + 1) / 0.25), 0, 15)
    assert np.array_equal(ops.get(ops.codes(*put, 15, ops.space(X.shape))), codes)
    assert np.allclose(ops.get(ops.rest(*put, 15, ops.space(X.shape))), X - (codes * 0.25 - 1), atol=1e-6)
    assert np.allclose(ops.get(ops.dot(put[0], put[0])), (X.astype(np.float64) ** 2).sum(axis=0), rtol=1e-5)
    assert np.array_equal(ops.get(ops.bf16(put[0])), small_floats.bf16_values(small_floats.bf16_bits(X)))


@pytest.mark.parametrize("library", BOTH)
@given(st.floats(2.0**-60, 2.0**60, width=32), st.integers(-3, 3), st.booleans())
@settings(max_examples=40)
def test_steps_of_bf16_go_away_from_zero_from_what_is_cut_off(
    library: str, value: float, steps: int, minus: bool
) -> None:
    ops = BOTH[library]()
    x = np.array([-value if minus else value], F32)
    found = ops.get(ops.bf16_at(ops.put(x), steps))
    bits = int(found.view(np.uint32)[0])
    assert bits & 0xFFFF == 0 and (bits >> 16) - (int(x.view(np.uint32)[0]) >> 16) == steps
    cut = abs(float(ops.get(ops.bf16_at(ops.put(x), 0))[0]))
    assert cut <= value < cut * (1 + 2.0**-7)


def test_the_plain_path_is_numpy_where_mlx_has_no_gpu() -> None:
    import mlx.core as mx

    assert on_host() == (not mx.metal.is_available())


def test_a_fit_is_the_least_squares_line_through_its_codes() -> None:
    """Against numpy's own least squares, weighted and not; errors relative to the line's own values."""
    for weight in (None, RNG.random(X.shape).astype(F32) + F32(0.1)):
        look = Search(HOST, X, weight, 4)
        low, high = look.x.min(axis=0), look.x.max(axis=0)
        error, slope, offset = look.fit((high - low) / 15, low)
        q = np.clip(np.rint((look.x - low) / ((high - low) / 15)), 0, 15)
        for g in range(X.shape[1]):
            w = np.ones(len(X)) if weight is None else weight[:, g]
            a = np.stack([q[:, g], np.ones(len(X))], 1) * np.sqrt(w)[:, None]
            (k, b), *_ = np.linalg.lstsq(a, look.x[:, g] * np.sqrt(w), rcond=None)
            rest = (w * (look.x[:, g] - (q[:, g] * k + b)) ** 2).sum()
            assert slope[g] == pytest.approx(k, rel=1e-4) and offset[g] == pytest.approx(b, rel=1e-3, abs=1e-4)
            assert error[g] == pytest.approx(rest, rel=1e-3)


def test_an_error_is_that_of_the_nearest_codes() -> None:
    look = Search(HOST, X, None, 3)
    scale, bias = np.full(5, 0.5, F32), np.full(5, -1.5, F32)
    q = np.clip(np.rint((look.x - bias) / scale), 0, 7)
    assert np.allclose(look.error(scale, bias), ((look.x - (q * scale + bias)) ** 2).sum(axis=0), rtol=1e-4)


def test_the_better_of_two_is_taken_group_by_group() -> None:
    found = Found(np.array([3.0, 1.0, 2.0]), np.zeros(3), np.zeros(3))
    found.better(np.array([2.0, 2.0, 2.0]), np.ones(3), np.ones(3), np)
    assert (found.error.tolist(), found.scale.tolist(), found.bias.tolist()) == ([2, 1, 2], [1, 0, 0], [1, 0, 0])


def test_every_start_lowers_the_error_or_leaves_it_and_what_is_stored_is_bf16() -> None:
    look = Search(HOST, X, None, 4)
    errors = [look.from_starts(affine.STARTS[4][:n]).error for n in (1, 3, 9)]
    assert (errors[1] <= errors[0]).all() and (errors[2] <= errors[1]).all()
    found = look.from_starts(affine.STARTS[4])
    before = found.error.copy()
    look.refit(found)
    assert (found.error <= before).all()
    stored = look.stored(found.scale, found.bias, None, (0, 1), (0, 1))
    assert small_floats.all_bf16(stored.scale) and small_floats.all_bf16(stored.bias)
    assert np.allclose(look.error(stored.scale, stored.bias - look.mean), stored.error)
    wide = look.covering(affine.COVERING)
    assert small_floats.all_bf16(wide.scale) and small_floats.all_bf16(wide.bias)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_a_search_comes_near_the_best_of_a_fine_table_of_lines(bits: int) -> None:
    """A slow search: every scale and bias of a fine table, not rounded to BF16, which is all that 8 bits have left to lose."""
    x = RNG.standard_normal((32, 3)).astype(F32)
    scale, bias = affine.search(HOST, x, None, bits)
    top = 2**bits - 1
    found = ((x - (np.clip(np.rint((x - bias) / scale), 0, top) * scale + bias)) ** 2).sum(axis=0)
    for g in range(3):
        v = x[:, g].astype(np.float64)
        k = np.linspace(0.55, 1.05, 60)[:, None] * (v.max() - v.min()) / top
        b = v.min() + np.linspace(-0.1, 0.35, 60)[None, :] * (v.max() - v.min())
        q = np.clip(np.rint((v[:, None, None] - b) / k), 0, top)
        assert found[g] <= (1.3 if bits == 8 else 1.1) * ((v[:, None, None] - (q * k + b)) ** 2).sum(axis=0).min()


@pytest.mark.parametrize("name", ["affine-2-g32", "affine-8-g64"])
@pytest.mark.parametrize("value", [0.0, 1.0, -2.5, 2.0**104, 2.0**105, -(2.0**127)])
def test_a_group_of_one_value_keeps_it_whatever_its_size(value: float, name: str) -> None:
    """From 2^105 on, MLX's least scale of 1e-7 is too small for a code of zero: the scale is 0, the bias says all."""
    x = np.full((1, 64), value, F32)
    both = [rounding.encode(x, CODECS[name], how) for how in ("optimal", "nearest")]
    plain = rounding._grouped(x, CODECS[name], rounding._rounder(CODECS[name], "nearest", None), None)
    for found in (*both, plain):
        assert rounding.decode(CODECS[name], found.weight, found.scales, found.biases).tolist() == x.tolist()
        assert (found.squared, found.max_abs) == (0.0, 0.0)
    assert np.array_equal(both[1].weight, plain.weight) and np.array_equal(both[1].scales, plain.scales), (
        "as mx.quantize"
    )


# --- FP4 ---


def test_places_of_a_histogram_are_codes_at_a_halving_each() -> None:
    fp4 = small_floats.fp4_values()
    assert affine_from_fp4.values().tolist() == [float(fp4[c]) / 2**h for h in range(4) for c in range(16)]


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
def test_pairs_of_the_table_are_bf16_span_what_they_may_and_have_their_errors(bits: int) -> None:
    scales, biases = affine_from_fp4.pairs(bits)
    least, most = affine_from_fp4.WIDTHS[bits]
    assert small_floats.all_bf16(scales) and small_floats.all_bf16(biases)
    span = scales * (2**bits - 1)
    assert (
        (span >= least - 1e-6).all()
        and (span <= most + 1e-6).all()
        and (biases <= 0).all()
        and (biases >= -6 - 2 * scales).all()
    )
    table, places = affine_from_fp4.errors(bits), affine_from_fp4.values()
    assert table.shape == (64, len(scales))
    for n in range(0, len(scales), 97):
        for p in range(0, 64, 5):
            s, b, v = float(scales[n]), float(biases[n]), float(places[p])
            q = min(max(round((v - b) / s), 0), 2**bits - 1)
            assert table[p, n] == pytest.approx((v - (q * s + b)) ** 2, abs=1e-6)


def test_five_bits_and_more_hold_all_fp4_values_of_one_scale_and_four_do_not() -> None:
    one = np.ones((1, 64), F32)
    one[0, 16:] = 0
    least = {b: (one @ affine_from_fp4.errors(b)).min() for b in (4, 5, 6, 8)}
    assert least[6] == least[8] == 0 and least[4] > least[5]


@given(st.integers(0, 2**32 - 1), st.booleans())
@settings(max_examples=30)
def test_histograms_count_codes_by_how_far_their_block_is_behind(seed: int, weighed: bool) -> None:
    rng = np.random.default_rng(seed)
    codes, scales = rng.integers(0, 16, (3, 64), np.uint8), rng.integers(120, 126, (3, 2), np.uint8)
    weight = rng.random((3, 64)).astype(F32) if weighed else None
    counted, power, holds = affine_from_fp4.histograms(codes, scales, weight)
    for g in range(3):
        largest = int(scales[g].max())
        wanted = np.zeros(64)
        for c in range(64):
            behind = min(largest - int(scales[g, c // 32]), 3)
            wanted[behind * 16 + codes[g, c]] += 1.0 if weight is None else weight[g, c]
        assert np.allclose(counted[g], wanted) and power[g] == largest - 127
        assert holds[g] == (largest - int(scales[g].min()) < 4)


# --- parts of rounding ---


def test_importance_is_relative_to_its_group_and_never_nothing() -> None:
    importance = np.array([1, 3, 0, 0, 0, 0, 2, 2], F32)
    assert rounding._relative(importance, 2).tolist() == [[0.5, 1.5], [1, 1], [1, 1], [1, 1]]
    assert np.allclose(rounding._relative(importance, 4), [[1, 3, 1e-4, 1e-4], [1e-4, 1e-4, 2, 2]])
    found = rounding._weights(importance, 4, slice(1, 4))
    assert (
        found.shape == (4, 3)
        and found[:, 0].tolist() == found[:, 2].tolist() == rounding._relative(importance, 4)[1].tolist()
    )


def test_values_far_from_one_are_searched_at_about_one() -> None:
    assert rounding._unit(X) is None and rounding._unit(np.zeros((4, 2), F32)) is None
    unit = rounding._unit(np.array([[1e-20, 1.0, 1e30], [0, 0.5, -1e30]], F32))
    assert unit is not None and np.allclose(np.array([1e-20, 1.0, 1e30]) * unit, 1, atol=0.5)
    assert all(float(np.log2(u)).is_integer() for u in unit)


@given(st.integers(-110, 100))
@settings(max_examples=30)
def test_a_power_of_two_times_all_values_is_that_power_in_scale_and_bias(power: int) -> None:
    scale, bias = rounding.search(HOST, X, None, 4)
    far = rounding.search(HOST, np.ldexp(X, power), None, 4)
    if power >= -90:
        assert np.allclose(far[0], np.ldexp(scale, power), rtol=0.02) and np.allclose(
            far[1], np.ldexp(bias, power), rtol=0.05
        )
    assert np.isfinite(far[0]).all() and np.isfinite(far[1]).all()


def test_tiles_cover_all_groups_once() -> None:
    assert (
        list(rounding._tiles(10, 4)) == [slice(0, 4), slice(4, 8), slice(8, 10)] and list(rounding._tiles(0, 4)) == []
    )
    assert list(rounding._tiles(4, 4)) == [slice(0, 4)]


def test_sums_of_squares_are_right_where_float32_overflows() -> None:
    assert rounding._square(np.full((2, 2), 1e30, F32)) == pytest.approx(4e60)
    assert rounding._square(np.full((2, 2), 1e-30, F32)) == pytest.approx(4e-60)
    assert rounding._square(np.full((2, 2), 3.0, F32)) == 36.0


def test_errors_of_rounding_are_told_and_bad_input_refused_by_codec() -> None:
    codec = CODECS["affine-4-g32"]
    x = np.zeros((2, 32), F32)
    x[0, 0], x[1] = 1.0, np.linspace(-1, 1, 32)
    found = rounding.encode(x, codec, "optimal")
    back = rounding.decode(codec, found.weight, found.scales, found.biases)
    assert found.squared == pytest.approx(float(((x - back) ** 2).sum()), rel=1e-4) and found.norm == pytest.approx(
        float((x**2).sum()), rel=1e-4
    )
    assert found.max_abs == pytest.approx(float(np.abs(x - back).max()), rel=1e-5)
    with pytest.raises(ValueError, match=r"^affine-4-g32: expected whole groups of 32, found 31 columns$"):
        rounding.encode(x[:, :31], codec, "nearest")
    with pytest.raises(ValueError, match=r"^affine-4-g32: expected finite values, found infinity or NaN$"):
        rounding.encode(np.where(x == 1, np.inf, x), codec, "optimal")
    rounding.encode(np.full((1, 32), 3e38, F32), codec, "optimal")  # the sum of good values may be infinite


# --- compiled loops, samples ---


def test_a_trial_loads_compiled_loops_only_where_a_run_would_and_they_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    before = compiled.use(1000)
    try:
        for kept, weights, after in ((True, 1001, 0), (True, 1000, 1000), (False, 1001, 1000)):
            compiled.use(1000)
            monkeypatch.setattr(compiled, "is_kept", lambda kept=kept: kept)
            compiled.settle(weights)
            assert compiled.use(1000) == after
        compiled.use(None)
        compiled.settle(10**12)
        assert compiled.use(1000) is None and compiled.affine(10) is None
        assert compiled._choice.seen == 10, "counted as done in the plain way"
    finally:
        compiled.use(before)


@pytest.mark.parametrize(("weights", "kept", "there", "gain"), [(2**28 + 1, False, True, 4.0), (2**28, False, True, 1.0), (2**30, True, True, 1.0), (2**30, False, False, 1.0)])  # fmt: skip
def test_what_is_gained_later_counts_for_long_runs_whose_trial_was_plain(
    weights: int, kept: bool, there: bool, gain: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "is_kept", lambda: kept)
    monkeypatch.setattr(compiled, "installed", lambda: there)
    assert compiled.gain(weights) == (gain if on_host() else 1.0)


def test_samples_are_of_their_storage_and_always_the_same() -> None:
    values = samples.normal_sample(4)
    assert (
        values.shape == (4, 1024) and small_floats.all_bf16(values) and np.array_equal(values, samples.normal_sample(4))
    )
    assert 0.015 < values.std() < 0.045
    codes, scales = samples.fp4_sample(4)
    assert codes.shape == (4, 512) and scales.shape == (4, 32) and samples.fp8_codes(4).shape == (4, 1024)
    coarse = samples.fp8_sample(4)
    assert 0 < np.abs(coarse - values).max() <= np.abs(values).max() * 2.0**-4
