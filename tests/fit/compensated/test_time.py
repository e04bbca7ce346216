"""The time that `plan` tells of compensated rounding: what it is made of, with trials of known speed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ds4convert.checkpoint.source import open_source
from ds4convert.execution.workers import Pool
from ds4convert.fit import compensated_time, forecast
from ds4convert.fit.compensated_time import Rates, Trial
from ds4convert.planning import build
from ds4convert.planning.build import Text, make_plan
from ds4convert.planning.layouts import layout_of
from ds4convert.planning.recipes import Rule, recipe_of
from ds4convert.planning.types import Plan
from tests import support_run as s

TINY = s.CHECKPOINTS[0]


def planned(tokens: int, rounding: str = "compensated") -> Plan:
    opened = open_source(TINY)
    rules = (Rule(frozenset({"attention", "experts"}), None, "affine-2-g32"),)
    text = Text("0" * 64, tokens) if rounding == "compensated" else None
    return make_plan(
        opened,
        build.Options(replace(recipe_of("native"), rules=rules), layout_of("inline"), rounding=rounding, text=text),
    )


def test_parts_grow_as_their_work_does() -> None:
    rates = Rates(Trial(512, 0, 0, 1e-6), Trial(1024, 1e-3, 2.0, 1.5e-6))
    assert rates.moments(100, 2048) == pytest.approx(0.4) and rates.root(2048) == pytest.approx(16)
    assert rates.weight(1024) == pytest.approx(1.5e-6) and rates.weight(4096) == pytest.approx(4.5e-6)
    assert 0 < rates.weight(32) < 1e-6


def test_no_noise_of_a_trial_makes_a_time_negative() -> None:
    rates = Rates(Trial(512, 0, 0, 3e-6), Trial(1024, 0, 0, 1e-6))
    assert all(rates.weight(cols) > 0 for cols in (32, 512, 1024, 8192))


def test_more_text_and_more_rows_for_each_expert_take_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compensated_time, "trial", known)
    with Pool(processes=False) as pool:

        def told(tokens: int, share: float) -> float:
            steps = [t for t in planned(tokens).steps if t.transform.startswith("quantize_")]
            return compensated_time.seconds(steps, pool, share)

        assert told(1000, 0.5) < told(100_000, 0.5) < told(100_000, 1.0)


def known(cols: int, codec: str, weights: int) -> tuple[float, float, float]:
    return 1e-5, 1e-3, 1e-7


def test_a_plan_tells_more_time_than_for_optimal(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the very trials, not with the sizes of a disk."""
    monkeypatch.setattr(forecast, "DISK_RATE", 1e15)
    assert forecast.seconds(planned(100_000), share=0.5) > 2 * forecast.seconds(planned(0, "optimal"))


def test_the_memory_of_workers_counts_the_moments_of_the_widest_matrix() -> None:
    plan = planned(1000)
    widest = max(forecast.numbers(t)["cols"] for t in plan.steps if t.transform.startswith("quantize_"))
    more = forecast.peak_memory(plan, 1) - forecast.peak_memory(planned(0, "optimal"), 1)
    assert more >= 8 * widest**2
