"""Sizes, times and tables as people read them: values at every border, and what a table keeps whatever its cells are."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds4convert.words import figures


@pytest.fixture
def narrow() -> Iterator[None]:
    """A terminal of 30 columns."""
    token = figures.WIDTH.set(30)
    yield
    figures.WIDTH.reset(token)


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 B"), (1, "1 B"), (999, "999 B"), (1000, "1.0 KB"), (1049, "1.0 KB"), (1051, "1.1 KB"),
        (999_900, "999.9 KB"), (1_000_000, "1.0 MB"), (10**9 - 10**6, "999.0 MB"), (10**9, "1.0 GB"),
        (159_600_000_000, "159.6 GB"), (10**12, "1.0 TB"), (5_100_000_000_000_000, "5100.0 TB"),
        (-1, "-1 B"), (-1000, "-1.0 KB"), (-999_900, "-999.9 KB"), (0.4, "0 B"), (12.6, "13 B"),
    ],
)  # fmt: skip
def test_a_size_has_the_unit_in_which_it_is_below_a_thousand(n: float, text: str) -> None:
    assert figures.size(n) == text


@given(st.integers(0, 10**15))
def test_a_size_is_within_half_of_its_last_digit(n: int) -> None:
    number, unit = figures.size(n).split(" ")
    by = 1000 ** ("B", "KB", "MB", "GB", "TB").index(unit)
    assert abs(float(number) * by - n) <= (0.05 * by) * 1.0001
    assert unit == "TB" or float(number) <= 1000


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"), (0.4, "0 s"), (45, "45 s"), (89.4, "89 s"), (90, "2 min"), (360, "6 min"), (389, "6 min"),
        (391, "7 min"), (89 * 60, "89 min"), (89.4 * 60, "89 min"), (90 * 60, "1 h 30 min"), (4200 + 3600, "2 h 10 min"),
        (2 * 3600, "2 h 0 min"), (26 * 3600 + 59 * 60, "26 h 59 min"),
    ],
)  # fmt: skip
def test_a_time_is_told_in_seconds_then_minutes_then_hours(seconds: float, text: str) -> None:
    assert figures.duration(seconds) == text


def test_columns_are_aligned_and_those_of_numbers_stand_to_the_right() -> None:
    told = figures.table(("name", "bytes", "what"), [("a", "1.0 GB", "x"), ("longer", "12 B", "yy")])
    assert told.split("\n") == [
        "name     bytes  what",
        "------  ------  ----",
        "a       1.0 GB  x",
        "longer    12 B  yy",
    ]


@pytest.mark.parametrize(("cell", "right"), [("7 B", True), ("-7 B", False), ("", False), ("x7", False)])
def test_one_cell_that_is_no_number_sets_its_column_to_the_left(cell: str, right: bool) -> None:
    """A head of five columns, cells of fewer: where they stand tells the side."""
    line = figures.table(("wide5", "z"), [("9 B", "q"), (cell, "q")]).split("\n")[2]
    assert line == ("  9 B  q" if right else "9 B    q")


def test_a_table_without_rows_is_its_head_to_the_left() -> None:
    assert figures.table(("a", "bytes"), []) == "a  bytes\n-  -----"


def test_cells_are_told_as_texts() -> None:
    assert figures.table(("a", "b"), [(None, 12), (True, 3)]).split("\n")[2:] == ["None  12", "True   3"]


def test_the_widest_words_give_way_and_numbers_never(narrow: None) -> None:
    told = figures.table(("name", "n", "what"), [("model", "123456789", "words that go on and on to the end")])
    lines = told.split("\n")
    assert max(map(len, lines)) <= 30 and lines[2].startswith("model  123456789  ")
    assert "".join(lines[2:]).replace(" ", "").endswith("wordsthatgoonandontotheend")
    assert all(line.startswith(" " * 18) for line in lines[3:]), "lines after the first stand under their column"


def test_a_column_is_not_made_narrower_than_a_dozen_characters(narrow: None) -> None:
    rows = [("x" * 20, "y" * 20, "z" * 20)]
    dashes = figures.table(("a", "b", "c"), rows).split("\n")[1]
    assert [len(d) for d in dashes.split("  ")] == [12, 12, 12], "wider than the terminal, as nothing is left to give"


@pytest.mark.parametrize(("columns", "widths"), [(33, [15, 16]), (34, [15, 16]), (32, [15, 15]), (31, [14, 15])])
def test_a_table_that_just_fits_is_left_as_it_is_and_else_gives_a_column_at_a_time(
    columns: int, widths: list[int]
) -> None:
    """Columns of 15 and 16 characters with two between them take 33; the wider one gives way first, of two alike the first."""
    token = figures.WIDTH.set(columns)
    try:
        told = figures.table(("a", "b"), [("word word word1", "another word too")])
    finally:
        figures.WIDTH.reset(token)
    assert [len(d) for d in told.split("\n")[1].split("  ")] == widths


def test_a_cell_that_fits_keeps_its_blanks_and_a_word_is_not_cut_at_its_hyphen(narrow: None) -> None:
    told = figures.table(("a", "b"), [("x  y", "some words to-be-wrapped-here and more of them")])
    assert told.split("\n")[2].startswith("x  y  ") and "to-be-wrapped-here" in told


cells = st.text("ab c-", max_size=30)


@settings(max_examples=60)
@given(st.lists(st.tuples(cells, cells, st.integers(0, 10**6).map(str)), max_size=4), st.integers(1, 60))
def test_no_word_is_lost_at_any_width(rows: list[tuple[str, str, str]], width: int) -> None:
    token = figures.WIDTH.set(width)
    try:
        told = figures.table(("one", "two", "n"), rows)
    finally:
        figures.WIDTH.reset(token)
    assert sorted(re.sub(r"\s", "", told.split("\n", 2)[2] if rows else "")) == sorted(
        re.sub(r"\s", "", "".join(c for row in rows for c in row))
    )
    assert all(line == line.rstrip() for line in told.split("\n"))
