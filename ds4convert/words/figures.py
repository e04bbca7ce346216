"""How sizes, times and tables are written for people."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from itertools import zip_longest

Progress = Callable[[int], None]

UNITS = ("B", "KB", "MB", "GB", "TB")


def size(n: float) -> str:
    """Return bytes for people, decimal units: 159.6 GB."""
    for unit in UNITS[:-1]:
        if abs(n) < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} {UNITS[-1]}"


def duration(seconds: float) -> str:
    """Return a time for people: 45 s, 6 min, 1 h 10 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


WIDTH: ContextVar[int | None] = ContextVar("width", default=None)
"""Columns of the terminal that tables are printed on; None where there is none, and tables are as wide as they are."""

LEAST = 12
"""Columns to which a column of a table is made narrower, at most."""


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return an aligned table; columns of numbers and sizes to the right.

    Where the terminal is narrower, the widest columns of words are, and their cells take several lines.
    """
    text = [[str(c) for c in row] for row in rows]
    widths = [max(len(r[i]) for r in [list(head), *text]) for i in range(len(head))]
    right = [all(r[i][:1].isdigit() for r in text) if text else False for i in range(len(head))]
    most = WIDTH.get()
    while most is not None and sum(widths) + 2 * (len(widths) - 1) > most:
        words = [i for i, w in enumerate(widths) if not right[i] and w > LEAST]
        if not words:
            break
        widths[max(words, key=lambda i: widths[i])] -= 1

    def lines(cells: Sequence[str]) -> Iterator[str]:
        parts = [_wrapped(c, w) for c, w in zip(cells, widths, strict=True)]
        for each in zip_longest(*parts, fillvalue=""):
            padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(each, widths, right, strict=True))
            yield "  ".join(padded).rstrip()

    return "\n".join(line for row in (head, ["-" * w for w in widths], *text) for line in lines(row))


def _wrapped(cell: str, width: int) -> list[str]:
    """Return a cell in lines of at most `width` columns, divided at spaces where it has some."""
    if len(cell) <= width:
        return [cell]
    from textwrap import wrap

    return wrap(cell, width, break_on_hyphens=False)
