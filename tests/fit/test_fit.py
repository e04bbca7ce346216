"""Fitting a model into a number of bytes: never more than that, always less error with more, never beaten by one format."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds4convert.checkpoint.config import named_config, parse_config
from ds4convert.checkpoint.inventory import Inventory, expected
from ds4convert.errors import UsageError
from ds4convert.fit import format_errors
from ds4convert.fit.optimiser import Optimiser, Option, hull
from ds4convert.formats.codecs import CODECS
from tests import support_run as s

GB = 10**9


@pytest.fixture(scope="module")
def flash() -> Inventory:
    raw = named_config("flash")
    assert raw is not None
    return expected(parse_config(raw, "flash"))


@pytest.fixture(scope="module")
def options(flash: Inventory) -> dict[Any, list[Option]]:
    return format_errors.options(flash, format_errors.imagined("nearest"))


def planned(*words: str | Path, exit_code: int = 0) -> dict[str, Any]:
    return json.loads(s.cli("plan", *words, "--json", exit_code=exit_code).stdout)


@pytest.mark.slow
def test_for_twenty_sizes_of_flash_the_bytes_hold_and_the_error_falls(options: dict[Any, list[Option]]) -> None:
    optimiser = Optimiser(options)
    low, high = optimiser.size, optimiser.sizes()[-1][0]
    errors = []
    for n in range(20):
        limit = low + (high - low) * n // 19
        choice = optimiser.choose(limit)
        assert choice.size <= limit and choice.size == sum(o.size for o in choice.options.values())
        assert choice.error == pytest.approx(sum(o.error for o in choice.options.values()))
        assert set(choice.options) == set(options)
        assert 0 <= choice.gap <= 0.02 * optimiser.error
        errors.append(choice.error)
    assert all(b < a for a, b in itertools.pairwise(errors)) and errors[-1] == 0


@pytest.mark.slow
def test_no_single_format_of_at_most_the_same_size_has_less_error(options: dict[Any, list[Option]]) -> None:
    optimiser, seen = Optimiser(options), 0
    for name in CODECS:
        by_name = {unit: {o.format: o for o in found} for unit, found in options.items()}
        chosen = [found.get(name, found["native"]) for found in by_name.values()]
        size, error = sum(o.size for o in chosen), sum(o.error for o in chosen)
        seen += 1
        best = optimiser.choose(size)
        assert best.size <= size and best.error <= error * (1 + 1e-9), name
    assert seen == len(CODECS)


@st.composite
def units(draw: st.DrawFn) -> dict[Any, list[Option]]:
    out = {}
    for n in range(draw(st.integers(1, 5))):
        sizes = draw(st.lists(st.integers(1, 60), min_size=1, max_size=4, unique=True))
        out["r", n] = [Option(str(z), z, float(draw(st.integers(0, 100)))) for z in sizes]
    return out


@given(units(), st.integers(0, 240))
@settings(max_examples=300)
def test_the_gap_bounds_what_any_choice_could_have_less(made: dict[Any, list[Option]], limit: int) -> None:
    least = sum(min(o.size for o in found) for found in made.values())
    if limit < least:
        with pytest.raises(UsageError):
            Optimiser(made).choose(limit)
        return
    choice = Optimiser(made).choose(limit)
    best = min(
        sum(o.error for o in picked)
        for picked in itertools.product(*made.values())
        if sum(o.size for o in picked) <= limit
    )
    assert choice.size <= limit
    assert best <= choice.error + 1e-9 and choice.error - choice.gap <= best + 1e-9


def test_a_hull_drops_what_costs_more_than_it_gains() -> None:
    made = [Option("a", 10, 100), Option("b", 20, 90), Option("c", 30, 10), Option("d", 40, 10), Option("e", 35, 20)]
    assert [o.format for o in hull(made)] == ["a", "c"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return s.tiny(tmp_path_factory.mktemp("fit") / "source")


@pytest.mark.slow
def test_a_checkpoint_is_measured_fitted_converted_and_verified(source: Path, tmp_path: Path) -> None:
    whole = planned(source, "--fit", "1GB")["fit"]
    target = whole["cache_bytes"] + whole["working_bytes"] + int(whole["weights_bytes"] * 0.93)
    words = ["--fit", str(target), "--context", "8192"]
    plan = planned(source, *words)
    assert plan["fit"]["total_error"] > 0 and whole["total_error"] == 0
    assert plan["output_bytes"] + plan["fit"]["cache_bytes"] + plan["fit"]["working_bytes"] <= target
    out = tmp_path / "mlx"
    done = json.loads(s.cli("quantize", source, out, *words, "--json").stdout)
    assert done["plan"] == plan["plan"]
    assert s.failed_checks(out, "--source", source) == []
    manifest = json.loads((out / "ds4convert_manifest.json").read_text())
    assert manifest["recipe"] == "fit" and any(k.startswith("experts ") for k in manifest["formats"])
    told = s.cli("plan", source, *words).stdout
    assert "other size" in told and "working set" in told and "no choice of this size has less" in told


@pytest.mark.nightly
def test_more_context_leaves_less_for_weights() -> None:
    short, long = (planned("--config", "flash", "--fit", "100GB", "--context", n)["fit"] for n in ("1000", "1000000"))
    assert long["cache_bytes"] > short["cache_bytes"] and long["weights_bytes"] < short["weights_bytes"]


@pytest.mark.slow
def test_a_size_below_the_smallest_possible_says_which_that_is() -> None:
    told = s.cli("plan", "--config", "flash", "--fit", "30GB", exit_code=2).stderr
    smallest = told.split("--fit ")[-1].split(" ")[0]
    assert "too small" in told and smallest.endswith("GB")
    assert planned("--config", "flash", "--fit", smallest)["fit"]["weights_bytes"] > 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--recipe", "fit"], "needs to know what to fit into"),
        (["--fit", "100GB", "--recipe", "q4"], "goes with no recipe"),
        (["--fit", "100GB", "--experts", "mxfp4"], "goes with no recipe"),
        (["--fit", "100XB"], "is not a size"),
    ],
)
def test_contradictions_are_wrong_usage(words: list[str], says: str) -> None:
    assert says in s.cli("plan", "--config", "flash", *words, exit_code=2).stderr


@pytest.mark.nightly
def test_the_head_keeps_its_precision_when_a_model_is_fitted() -> None:
    groups = {g["name"]: g["formats"] for g in planned("--config", "flash", "--fit", "100GB")["groups"]}
    assert groups["mtp.experts"] == ["mxfp4"]
    groups = {
        g["name"]: g["formats"] for g in planned("--config", "flash", "--fit", "100GB", "--mtp", "bf16")["groups"]
    }
    assert groups["mtp.experts"] == ["bf16"]
