"""The one place that says what to do next: names that are near a mistyped one, and ways on that the command has.

A message of a part that several commands share offers an option only if the command that runs has it (`offers`).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from contextvars import ContextVar

SHOWN = 3
NEAR_ENOUGH = 0.6
"""Likeness (difflib) from which on a name is offered."""

OPTIONS: ContextVar[frozenset[str] | None] = ContextVar("options", default=None)
"""The options of the command that runs; None where no command does, as in Python."""

COMMAND: ContextVar[str] = ContextVar("command", default="")
"""The command line that runs, without what is secret: an unfinished run remembers it."""


def offers(option: str) -> bool:
    """Return whether the command that runs has this option."""
    known = OPTIONS.get()
    return known is None or option in known


def near(name: str, known: Iterable[str]) -> list[str]:
    """Return the known names that are most like `name`, the most like first; case does not count.

    Those that go on where `name` ends come before all others: whoever says affine-4 means a format that begins so.
    """
    table, asked = {k.casefold(): k for k in known}, name.casefold()
    found = difflib.get_close_matches(asked, table, max(len(table), 1), NEAR_ENOUGH)
    found.sort(key=lambda k: not k.startswith(asked))
    return [table[f] for f in found[:SHOWN]]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean a, b?` with the known names that are near, or nothing."""
    found = near(name, known)
    return f"; did you mean {' or '.join(found)}?" if found else ""


def either(ways: Sequence[str]) -> str:
    """Return `a, b, or c`."""
    return " or ".join(ways) if len(ways) < 3 else f"{', '.join(ways[:-1])}, or {ways[-1]}"


def for_head_place(layout: str, able: Sequence[str], without: bool = True) -> str:
    """Return what to do where a layout's hosts cannot load the head; `able` are the layouts whose hosts can.

    `without`: whether they could load the rest.
    """
    others = [name for name in able if name != layout]
    ways = [f"--layout {either(others)}"] if others and offers("--layout") else []
    ways += ["--drop-mtp"] if without and offers("--drop-mtp") else []
    return f"choose {either(ways)}" if ways else "no layout that this command writes holds it"


def for_converted_source() -> str:
    """Return what to do with a converted folder where an official checkpoint is expected."""
    if offers("--from-mlx"):
        return "convert the official checkpoint, or say --from-mlx to convert this one again"
    return "name the official checkpoint"


def for_unfinished(command: str, removable: bool = True) -> str:
    """Return how to finish, or start over, what another command left unfinished; "" where it is not known which.

    `removable`: whether all that lies there is ours, so that --overwrite would clear it.
    """
    how = (
        f"run the command that began it again to finish it: {command}"
        if command
        else "repeat the earlier command to finish it"
    )
    if offers("--overwrite"):
        return f"{'add --overwrite to start over' if removable else 'choose another folder'}, or {how}"
    return how
