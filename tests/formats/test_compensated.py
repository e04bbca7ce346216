"""Rounding against second moments: less error in the output, never more than `optimal`, the same bytes for any chunks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds4convert.formats import second_moments as moments
from ds4convert.formats.codecs import CODECS, Codec
from ds4convert.formats.compensated import BLOCK, SWEEPS, Affine, compensated, cost, refined, spread
from ds4convert.formats.rounding import Encoded, decode, encode
from ds4convert.formats.second_moments import Factor
from ds4convert.formats.small_floats import bf16_bits, bf16_values

COLS = 128


def weights(seed: int, rows: int = 48, cols: int = COLS) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal((rows, cols)) * 0.02
    return bf16_values(bf16_bits(values.astype(np.float32)))


def inputs(seed: int, rows: int, cols: int = COLS) -> np.ndarray:
    """Return rows of inputs whose columns go together."""
    mixing = np.random.default_rng(99).standard_normal((cols, cols)) * (1.5 / np.sqrt(cols)) + np.eye(cols)
    return (np.random.default_rng(seed).standard_normal((rows, cols)) @ mixing).astype(np.float32)


def factor_of(x: np.ndarray) -> Factor:
    found = moments.factor(moments.summed(x) / len(x), len(x))
    assert found is not None
    return found


def output_error(values: np.ndarray, codec: Codec, e: Encoded, x: np.ndarray) -> float:
    wrong = decode(codec, e.weight, e.scales, e.biases).astype(np.float64) - values
    return float(((x.astype(np.float64) @ wrong.T) ** 2).sum())


NAMES = ("affine-2-g64", "affine-3-g32", "affine-4-g128", "affine-6-g64", "affine-8-g64", "mxfp4", "nvfp4", "mxfp8")


@pytest.mark.parametrize("name", NAMES)
def test_the_error_of_the_output_falls_by_a_third_or_more(name: str) -> None:
    codec, values, x = CODECS[name], weights(1), inputs(2, 2000)
    plain = encode(values, codec, "optimal")
    found = compensated(values, codec, factor_of(x), plain)
    assert output_error(values, codec, found, x) < 0.67 * output_error(values, codec, plain, x)
    assert output_error(values, codec, found, inputs(3, 500)) < 0.7 * output_error(values, codec, plain, inputs(3, 500))


@pytest.mark.parametrize("name", ["affine-2-g64", "affine-3-g64"])
def test_inputs_that_are_independent_and_alike_give_the_bytes_of_optimal(name: str) -> None:
    """Column by column, nothing is spread; and the factor itself says that there is nothing to gain."""
    codec, values = CODECS[name], weights(4, 130, 256)
    assert moments.factor(np.eye(256) * 3.0, 10**6) is None
    plain, eye = encode(values, codec, "optimal"), np.eye(256, dtype=np.float32)
    found = compensated(values, codec, Factor(eye, eye), plain, sweeps=0)
    assert all(np.array_equal(getattr(found, k), getattr(plain, k)) for k in ("weight", "scales", "biases"))


@given(st.integers(0, 2**32 - 1), st.sampled_from(NAMES), st.integers(2, 600))
@settings(max_examples=15, deadline=None)
def test_no_sweep_raises_the_error_of_any_row(seed: int, name: str, rows: int) -> None:
    codec, factor = CODECS[name], factor_of(inputs(seed, rows))
    wanted = np.ascontiguousarray(weights(seed, 16).T)
    state = spread(wanted, codec, factor)
    exact = factor.moments.astype(np.float64)
    before = np.einsum("ij,ik,kj->j", state.error, exact, state.error, optimize=True)
    for _ in range(SWEEPS):
        state = refined(wanted, codec, factor, state, 1)
        after = np.einsum("ij,ik,kj->j", state.error, exact, state.error, optimize=True)
        assert (after <= before * (1 + 1e-4) + 1e-12).all()
        before = after


def test_what_a_sweep_keeps_is_what_its_codes_say() -> None:
    """Errors are carried along through all updates; at the end they are those of codes, scales and biases."""
    codec, values, x = CODECS["affine-3-g64"], weights(5), inputs(6, 700)
    wanted = np.ascontiguousarray(values.T)
    found = refined(wanted, codec, factor_of(x), spread(wanted, codec, factor_of(x)))
    for number, grid in enumerate(found.grids):
        assert isinstance(grid, Affine)
        at = slice(64 * number, 64 * number + 64)
        made = found.codes[at] * grid.scale + grid.bias
        assert np.allclose(wanted[at] - made, found.error[at], atol=1e-6)


@pytest.mark.parametrize("name", ["affine-2-g32", "mxfp4"])
@pytest.mark.parametrize("rows", [5, 300])
def test_no_row_is_worse_than_optimal_under_its_moments(name: str, rows: int) -> None:
    codec, values, factor = CODECS[name], weights(7), factor_of(inputs(8, rows))
    plain = encode(values, codec, "optimal")
    found = compensated(values, codec, factor, plain)
    errors = [cost((values - decode(codec, e.weight, e.scales, e.biases)).T.copy(), factor) for e in (plain, found)]
    assert (errors[1] <= errors[0] * (1 + 1e-5)).all()


def test_few_rows_with_damping_by_rows_do_no_harm() -> None:
    """As an expert that hardly any token went to: 40 rows for 128 columns."""
    codec, values, x, other = CODECS["affine-2-g64"], weights(9), inputs(10, 40), inputs(11, 4000)
    plain = encode(values, codec, "optimal")
    ours = compensated(values, codec, factor_of(x), plain)
    mean = moments.summed(x) / len(x)
    usual = mean / mean.trace() * len(mean) + 0.01 * np.eye(len(mean))
    root = moments.root_of(usual).astype(np.float32)
    theirs = compensated(values, codec, Factor(usual.astype(np.float32), root), plain, 0)
    errors = [output_error(values, codec, e, other) for e in (plain, ours, theirs)]
    assert errors[1] < 0.95 * errors[0] < errors[2]


def test_moments_are_drawn_towards_the_mean_of_the_layer() -> None:
    own, mean = np.diag([64.0, 0.0]), np.eye(2)
    assert np.allclose(moments.blended(own, 64, mean), np.diag([1.0, 0.5]))
    assert np.allclose(moments.blended(own, 64, None), np.diag([1.0, 0.0]))
    assert np.allclose(moments.blended(np.zeros((2, 2)), 0, mean), mean)


@pytest.mark.parametrize("cols", [64, 65, 257])
def test_the_root_is_that_of_the_moments_and_inverse_that_of_their_inverse(cols: int) -> None:
    found = factor_of(inputs(12, 3 * cols, cols))
    root = found.root.astype(np.float64)
    assert np.array_equal(root, np.triu(root))
    assert np.allclose(root @ root.T, found.moments, atol=1e-5)
    inverse = found.inverse(cols)[0].astype(np.float64)
    assert np.allclose(inverse.T @ inverse @ found.moments, np.eye(cols), atol=1e-4)


def test_moments_that_float32_has_no_root_for_get_one_in_float64() -> None:
    """The same input in every column, but for what float32 cannot tell; and no damping."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moments, "LEAST_DAMPING", 0.0)
        patch.setattr(moments, "DAMPING", 0.0)
        found = moments.factor(np.ones((300, 300)) + 1e-9 * np.eye(300), 300)
    assert found is not None and np.isfinite(found.root).all() and (found.root.diagonal() > 0).all()


def test_no_rows_and_inputs_that_are_all_zero_have_no_factor() -> None:
    assert moments.factor(np.eye(4) + 1, 0) is None
    assert moments.factor(np.zeros((4, 4)), 10) is None


def test_inputs_that_are_not_finite_are_refused() -> None:
    x = inputs(13, 10)
    x[3, 5] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        moments.summed(x)


@pytest.mark.parametrize("name", ["affine-2-g64", "nvfp4"])
def test_chunks_of_any_size_give_the_same_bytes(name: str) -> None:
    codec, values, factor = CODECS[name], weights(14, 2 * BLOCK + 37), factor_of(inputs(15, 500))
    plain = encode(values, codec, "optimal")
    whole = compensated(values, codec, factor, plain, 1)
    for size in (BLOCK, 2 * BLOCK):
        for first in range(0, len(values), size):
            at = slice(first, first + size)
            some = replace(plain, weight=plain.weight[at], scales=plain.scales[at],
                           biases=None if plain.biases is None else plain.biases[at])  # fmt: skip
            part = compensated(values[at], codec, factor, some, 1)
            assert np.array_equal(part.weight, whole.weight[at]) and np.array_equal(part.scales, whole.scales[at])


def test_values_near_the_largest_stay_as_optimal_rounds_them() -> None:
    codec, values = CODECS["affine-4-g64"], weights(16, 4) * np.float32(2.0**126)
    plain = encode(values, codec, "optimal")
    found = compensated(values, codec, factor_of(inputs(17, 300)), plain)
    assert np.isfinite(decode(codec, found.weight, found.scales, found.biases)).all()
