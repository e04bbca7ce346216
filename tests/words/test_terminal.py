"""What is shown of a stranger's text: every character that a terminal obeys or hides is spelled out, and no other."""

from __future__ import annotations

import io
import unicodedata
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds4convert.words import terminal

EVERY = [chr(n) for n in range(0x110000)]
HIDDEN = {"\u061c", "\u200e", "\u200f", *map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A)), "\ufeff"}
"""Marks of direction (Unicode's UAX 9, section 2), and the mark that is shown as nothing."""


def test_of_all_characters_those_and_only_those_are_spelled_that_a_terminal_obeys_or_hides() -> None:
    """Controls but tab and line feed (category Cc), halves of pairs (Cs), separators (Zl, Zp), marks, annotations, tags."""
    spelled = {c for c in EVERY if terminal.escape(c) != c}
    wanted = {c for c in EVERY if unicodedata.category(c) in {"Cc", "Cs", "Zl", "Zp"}} - {"\t", "\n"}
    wanted |= HIDDEN | set(map(chr, range(0xFFF9, 0xFFFC))) | set(map(chr, range(0xE0000, 0xE0080)))
    assert spelled == wanted
    assert all(terminal.escape(c).isascii() and terminal.escape(c).isprintable() for c in spelled)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("\x1b[2J", "\\x1b[2J"), ("a\rb", "a\\rb"), ("\x7f", "\\x7f"), ("\x9b31m", "\\x9b31m"), ("\u202eabc", "\\u202eabc"),
        ("\U000e0041", "\\U000e0041"), ("\ud800", "\\ud800"), ("\x00", "\\x00"), ("naïve 漢字 🙂", "naïve 漢字 🙂"),
    ],
)  # fmt: skip
def test_a_character_is_spelled_as_python_spells_it(text: str, told: str) -> None:
    assert terminal.escape(text) == told


@given(st.text())
def test_escaping_twice_is_escaping_once_and_a_line_has_no_break(text: str) -> None:
    assert terminal.escape(terminal.escape(text)) == terminal.escape(text)
    assert len(terminal.line(text).splitlines()) <= 1 and "\t" not in terminal.line(text)


def test_a_line_is_made_of_anything() -> None:
    assert terminal.line(12) == "12" and terminal.line(None) == "None" and terminal.line("a\tb\nc") == "a\\tb\\nc"


def test_results_are_cleaned_all_the_way_down_and_numbers_stay() -> None:
    dirty: Any = {"k\n": [("a\x1b", 1), {"b\t": 2.5}], "n": None, "t": True}
    assert terminal.clean(dirty) == {"k\\n": [["a\\x1b", 1], {"b\\t": 2.5}], "n": None, "t": True}
    assert terminal.clean("x\ny") == "x\\ny" and terminal.clean(7) == 7


def test_a_stream_escapes_what_is_written_and_is_else_the_one_behind_it() -> None:
    behind = io.StringIO()
    stream = terminal.Escaped(behind)
    assert stream.write("a\x1bb\n") == 4, "as many characters as were given, not as many as came of them"
    stream.writelines(["c\r", "d"])
    assert behind.getvalue() == "a\\x1bb\nc\\rd" and stream.getvalue() == behind.getvalue()
    assert not stream.closed and terminal.plain(stream) is behind and terminal.plain(behind) is behind  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("length", "limit", "told"),
    [
        (120, 120, "x" * 120),
        (121, 120, "x" * 100 + "..." + "x" * 17),
        (41, 40, "x" * 20 + "..." + "x" * 17),
        (40, 40, "x" * 40),
        (0, 40, ""),
    ],
)
def test_what_is_longer_than_the_limit_is_cut_to_it_in_the_middle(length: int, limit: int, told: str) -> None:
    assert terminal.show("x" * length, limit) == told and len(told) <= limit


def test_what_is_shown_begins_and_ends_as_the_text_does() -> None:
    text = "".join(chr(33 + n % 90) for n in range(300))
    shown = terminal.show(text)
    assert shown == text[:100] + "..." + text[-17:] and len(shown) == 120


def test_what_cannot_be_printed_is_spelled() -> None:
    assert terminal.show("a\nb\u202e\x00 é") == "a\\nb\\u202e\\x00 é"


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("text", "'text'"), (None, "null"), (True, "true"), (1.5, "1.5"), ([1, "é"], '[1, "é"]'), ({"a": None}, '{"a": null}'),
        ("it's", '"it\'s"'), ("\n", "'\\n'"), ({1, 2} - {2}, '"{1}"'),
    ],
)  # fmt: skip
def test_a_value_is_told_as_it_stands_in_the_file(value: Any, told: str) -> None:
    assert terminal.show_value(value) == told


def test_a_long_value_is_cut() -> None:
    told = terminal.show_value(list(range(1000)))
    assert len(told) == 120 and told.startswith("[0, 1, 2") and told.endswith("999]")
    assert len(terminal.show_value("x" * 500, 60)) == 60
