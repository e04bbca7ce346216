"""Compiled rounding gives the bytes and the errors of the plain path, for every format, weight and size of value."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds4convert.formats import compensated, compiled, second_moments
from ds4convert.formats.codecs import CODECS
from ds4convert.formats.rounding import Encoded, encode, encode_fp4

AFFINE = sorted(name for name in CODECS if name.startswith("affine"))
needed = pytest.mark.skipif(not compiled.installed(), reason="numba is not installed")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = compiled.use(None)
    yield
    compiled.use(before)


def both(work: Callable[[], Encoded]) -> tuple[Encoded, Encoded]:
    """Return what the plain path makes, and the compiled one."""
    compiled.use(None)
    plain = work()
    compiled.use(0)
    assert compiled.affine(1) is not None
    return plain, work()


def check(plain: Encoded, fast: Encoded) -> None:
    for part in ("weight", "scales", "biases"):
        assert np.array_equal(getattr(plain, part), getattr(fast, part)), part
    assert (plain.squared, plain.norm, plain.max_abs) == (fast.squared, fast.norm, fast.max_abs)


def values(seed: int, rows: int, cols: int, kind: str) -> np.ndarray:
    """Return weights: ordinary, with rows that are all alike or zero, or of sizes whose squares float32 does not hold."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, cols)).astype(np.float32)
    if kind == "flat":
        x[::3], x[1::5] = rng.standard_normal(), 0
        x[0, : cols // 2] = -0.0
    elif kind == "extreme":
        x *= np.exp2(rng.integers(-140, 126, (rows, 1))).astype(np.float32)
    elif kind == "coarse":
        x = np.rint(x).astype(np.float32)  # ties, and groups that a format holds exactly
    return x


KINDS = ("ordinary", "flat", "extreme", "coarse")


@needed
@given(st.integers(0, 2**32 - 1), st.sampled_from(AFFINE), st.sampled_from(KINDS), st.booleans(), st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_the_bytes_are_those_of_the_plain_path(seed: int, name: str, kind: str, weighed: bool, rows: int) -> None:
    x = values(seed, rows, 256, kind)
    weight = np.random.default_rng(seed).random(256).astype(np.float32) if weighed else None
    check(*both(lambda: encode(x, CODECS[name], "optimal", weight)))


@needed
@given(st.integers(0, 2**32 - 1), st.sampled_from(AFFINE), st.booleans())
@settings(max_examples=15, deadline=None)
def test_fp4_sources_give_the_bytes_of_the_plain_path(seed: int, name: str, weighed: bool) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (24, 128), dtype=np.uint8)
    scales = rng.integers(115, 123, (24, 8), dtype=np.uint8)
    weight = rng.random(256).astype(np.float32) if weighed else None
    check(*both(lambda: encode_fp4(codes, scales, CODECS[name], "optimal", weight)))


@needed
def test_more_than_a_tile_and_a_last_tile_of_one_group_are_equal_too() -> None:
    """numpy adds the values of a lone group in another order than those of several."""
    x = values(3, 1, 64 * (1024 + 1), "ordinary")
    check(*both(lambda: encode(x, CODECS["affine-4-g64"], "optimal")))


@needed
def test_a_process_begins_in_the_plain_way_and_goes_over_after_some_work() -> None:
    compiled.use(100)
    assert compiled.affine(60) is None and compiled.affine(60) is None and compiled.affine(60) is not None


@needed
def test_where_sums_come_out_otherwise_the_plain_path_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    from ds4convert.formats.array_backends import Host
    from ds4convert.formats.compiled import sample

    assert sample.equal()
    monkeypatch.setattr(Host, "dot", lambda self, a, b: (a.astype(np.float64) * b).sum(axis=0).astype(np.float32))
    assert not sample.equal()


def test_nothing_of_it_is_loaded_for_little_work() -> None:
    code = (
        "import sys, numpy as np; from ds4convert.formats.codecs import CODECS; from ds4convert.formats import rounding;"
        "rounding.encode(np.ones((8, 64), np.float32) / 3, CODECS['affine-4-g64'], 'optimal');"
        "assert 'numba' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@needed
@pytest.mark.parametrize("name", ["affine-2-g64", "affine-4-g32", "affine-3-g128"])
def test_compensated_rounding_gives_the_bytes_of_the_plain_path(name: str) -> None:
    codec, x, rows = CODECS[name], values(5, 140, 640, "ordinary"), values(6, 900, 640, "ordinary")
    rows[:, 1:] += rows[:, :-1]
    factor = second_moments.factor(second_moments.summed(rows) / len(rows), len(rows))
    assert factor is not None
    plain = encode(x, codec, "optimal")
    check(*both(lambda: compensated.compensated(x, codec, factor, plain, 1)))


@needed
def test_a_trial_compiles_nothing_where_compiled_code_cannot_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan would take half a minute for it; it tells by how much a long run is faster instead."""
    many, few = 1 << 40, 1 << 20
    monkeypatch.setattr(compiled, "is_kept", lambda: False)
    compiled.use(compiled.AFTER_UNKEPT)
    compiled.settle(many)
    assert compiled.use(None) == compiled.AFTER_UNKEPT, "nothing was chosen"
    assert (compiled.gain(many), compiled.gain(few)) == (compiled.GAIN, 1.0)
    monkeypatch.setattr(compiled, "is_kept", lambda: True)
    compiled.use(compiled.AFTER)
    compiled.settle(many)
    assert compiled.use(None) == 0 and compiled.gain(many) == 1.0, "a trial uses the kernels themselves"
