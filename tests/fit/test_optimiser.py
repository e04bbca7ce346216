"""The choice of formats: hulls and steps by hand, the least error of all choices where all can be tried, ties in one order."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds4convert.errors import UsageError
from ds4convert.fit.optimiser import Optimiser, Option, Unit, hull, key


def o(size: int, error: float, name: str = "") -> Option:
    return Option(name or f"{size}", size, error)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ([o(1, 5)], [1]), ([o(1, 5), o(2, 5)], [1]), ([o(2, 1), o(1, 5)], [1, 2]),
        ([o(1, 10), o(2, 9), o(3, 0)], [1, 3]),  # the way over 2 gains 1, then 9: it lies above the line
        ([o(1, 10), o(2, 5), o(3, 0)], [1, 3]),  # on the line: one step is as good
        ([o(1, 10), o(2, 4), o(3, 0)], [1, 2, 3]), ([o(1, 10), o(1, 3)], [1]),
        ([o(1, 10), o(2, 6), o(3, 5), o(4, 0)], [1, 2, 4]),
    ],
)  # fmt: skip
def test_a_hull_keeps_what_gains_less_and_less_per_byte(options: list[Option], kept: list[int]) -> None:
    assert [x.size for x in hull(options)] == kept


def test_of_options_of_one_size_the_better_and_of_equal_ones_the_first_name_is_kept() -> None:
    assert hull([o(1, 3, "b"), o(1, 3, "a"), o(1, 4, "0")]) == [o(1, 3, "a")]


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 30)), min_size=1, max_size=8))
def test_no_option_lies_below_its_hull(made: list[tuple[int, int]]) -> None:
    options = [o(s, float(e)) for s, e in made]
    found = hull(options)
    assert [x.size for x in found] == sorted({x.size for x in found})
    gains = [(a.error - b.error) / (b.size - a.size) for a, b in itertools.pairwise(found)]
    assert all(b < a for a, b in itertools.pairwise(gains)) and all(g > 0 for g in gains)
    for x in options:
        if x.size < found[0].size:
            raise AssertionError("something is smaller than the smallest")
        left = max((h for h in found if h.size <= x.size), key=lambda h: h.size)
        right = min((h for h in found if h.size >= x.size), key=lambda h: h.size, default=left)
        span = right.size - left.size
        line = left.error if not span else left.error + (right.error - left.error) * (x.size - left.size) / span
        assert x.error >= line - 1e-9


UNITS: dict[Unit, list[Option]] = {
    ("a", 0): [o(10, 100, "s"), o(20, 50, "m"), o(30, 20, "l")],  # gains 5, then 3 per byte
    ("b", None): [o(10, 80, "s"), o(20, 40, "m")],  # gains 4
}


@pytest.mark.parametrize(
    ("limit", "chosen", "size", "error", "gap"),
    [
        (20, "ss", 20, 180, 0), (29, "ss", 20, 180, 45), (30, "ms", 30, 130, 0), (39, "ms", 30, 130, 36),
        (40, "mm", 40, 90, 0), (49, "mm", 40, 90, 27), (50, "lm", 50, 60, 0), (1000, "lm", 50, 60, 0),
    ],
)  # fmt: skip
def test_steps_are_taken_by_what_they_gain_per_byte(
    limit: int, chosen: str, size: int, error: float, gap: float
) -> None:
    """`gap` by hand: the bytes that are left over, at the gain of the step that did not fit (5, 4, 3)."""
    choice = Optimiser(UNITS).choose(limit)
    assert "".join(x.format for x in choice.options.values()) == chosen
    assert (choice.size, choice.error, choice.gap) == (size, error, gap)


def test_sizes_tell_every_step_from_the_smallest_to_the_largest() -> None:
    assert Optimiser(UNITS).sizes() == [(20, 180), (30, 130), (40, 90), (50, 60)]


def test_a_limit_below_the_smallest_is_refused_with_both_figures() -> None:
    with pytest.raises(UsageError, match=r"^even the smallest formats need 2,000 bytes, 1,999 are there$"):
        Optimiser({("a", 0): [o(2000, 1)]}).choose(1999)


def test_what_is_left_over_is_filled_with_options_that_lie_on_no_hull() -> None:
    units: dict[Unit, list[Option]] = {("a", 0): [o(10, 100), o(15, 90), o(30, 0)]}
    choice = Optimiser(units).choose(20)
    assert choice.options["a", 0].size == 15 and choice.error == 90
    assert choice.gap == pytest.approx(90 - (100 - 10 * 5)), "half of the step to 30 bytes would gain 50"


def test_a_step_may_be_given_up_for_a_better_filling() -> None:
    """The best gain per byte is a's; but with 10 more bytes b's step alone gains more than a's and nothing else."""
    units: dict[Unit, list[Option]] = {("a", 0): [o(1, 10), o(2, 4)], ("b", 0): [o(1, 50), o(11, 0)]}
    choice = Optimiser(units).choose(12)
    assert (choice.options["a", 0].size, choice.options["b", 0].size, choice.error) == (1, 11, 10)


@given(st.data())
def test_where_all_choices_can_be_tried_none_is_better_by_more_than_the_gap(data: st.DataObject) -> None:
    options = st.lists(st.builds(o, st.integers(1, 12), st.integers(0, 20).map(float)), min_size=1, max_size=3)
    units: dict[Any, list[Option]] = {("u", n): data.draw(options) for n in range(data.draw(st.integers(1, 4)))}
    least = sum(min(x.size for x in found) for found in units.values())
    limit = least + data.draw(st.integers(0, 20))
    choice = Optimiser(units).choose(limit)
    tried = [p for p in itertools.product(*units.values()) if sum(x.size for x in p) <= limit]
    best = min(sum(x.error for x in p) for p in tried)
    assert tuple(choice.options.values()) in tried and choice.error >= best >= choice.error - choice.gap - 1e-9
    assert choice.size == sum(x.size for x in choice.options.values())


def test_equal_gains_are_taken_in_the_order_of_roles_and_layers() -> None:
    units: dict[Unit, list[Option]] = {u: [o(1, 2), o(2, 1)] for u in (("b", 0), ("a", 2), ("a", None), ("a", 1))}
    steps = [s.unit for s in Optimiser(units).steps]
    assert steps == [("a", None), ("a", 1), ("a", 2), ("b", 0)]
    assert [key(u) for u in steps] == [("a", -1), ("a", 1), ("a", 2), ("b", 0)]
    chosen = Optimiser(units).choose(5).options
    assert [u for u, x in chosen.items() if x.size == 2] == [("a", None)]
