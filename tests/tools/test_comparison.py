"""docs/comparison.md: ten interactions, shortened where it says so, and ours as the program prints it now."""

from __future__ import annotations

import json
import re

import pytest

from tools import comparison
from tools.comparison import __main__ as made

PROGRAMS = {"hf", "uv", "ruff", "mlx_lm"}


def lines(count: int) -> made.Printed:
    return made.Printed("\n".join(f"line {n}" for n in range(1, count + 1)), 0)


@pytest.mark.parametrize(
    ("keep", "shown"),
    [
        ((), "1 2 3 4 5 6"),
        (((1, 2),), "1 2 [4]"),
        (((1, 1), (-1, -1)), "1 [4] 6"),
        (((2, 3), (5, 5)), "[1] 2 3 [1] 5 [1]"),
        (((1, 4), (-4, -1)), "1 2 3 4 5 6"),
        (((-2, -1),), "[4] 5 6"),
    ],
)
def test_what_is_left_out_is_counted_and_nothing_is_shown_twice(keep: tuple[tuple[int, int], ...], shown: str) -> None:
    found = made.Shown("x", keep).shortened(lines(6))
    told = [
        re.sub(r"\[\.\.\. (\d+) lines? \.\.\.\]|line (\d+)", lambda m: f"[{m[1]}]" if m[1] else m[2], row)
        for row in found
    ]
    assert " ".join(told) == shown


def test_an_exit_code_that_is_not_good_is_always_shown() -> None:
    assert made.Shown("x", ((1, 1),)).shortened(made.Printed("a\nb", 3)) == ["a", "[... 1 line ...]", "(exit code 3)"]


def test_ten_interactions_each_with_ours_and_at_least_two_of_the_others() -> None:
    assert len(made.cases()) == 10 and comparison.__doc__
    printed = json.loads(made.OTHERS.read_text())["printed"]
    for case in made.cases():
        assert sum(s.is_ours for s in case.shown) >= 1, case.title
        others = {p for s in case.shown if not s.is_ours for p in PROGRAMS if re.search(rf"\b{p}\b", s.line)}
        assert len(others) >= 2, case.title
        assert all(s.line in printed for s in case.shown if not s.is_ours), case.title
        assert case.verdict.strip().startswith("**"), "each says how it comes out"


def test_a_page_that_is_not_so_any_more_is_found_and_times_are_not_compared() -> None:
    assert list(made.drift("3.8 MB in 1 s (7.0 MB/s)", "3.8 MB in 12 s (0.4 MB/s)")) == []
    assert any("did you mean q5" in row for row in made.drift("did you mean q4?", "did you mean q5?"))


@pytest.mark.slow
def test_the_transcripts_of_ours_are_what_the_program_prints() -> None:
    page = made.PAGE.read_text(encoding="utf-8")
    told = list(made.drift(page, made.rendered(made.recorded(ours=True))))
    assert not told, "run: python -m tools.comparison\n" + "\n".join(told)
