"""A page about a checkpoint: what every one has, whoever made it, and the file that it is written to.

No script, no font, no request to anywhere; what is drawn is beside its number or has a text of its own, so a page reads
on a phone, on paper and with a screen reader. How it looks stands in `manifests/pages/report.html.jinja`, which escapes
every value.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ds4convert.converted.records import Manifest
from ds4convert.errors import EnvironmentFault, OutputError
from ds4convert.files import Disk
from ds4convert.report import maps
from ds4convert.report.drawings import Bar, Bars, Section
from ds4convert.words.figures import size
from ds4convert.words.project import version
from ds4convert.words.templates import rendered

if TYPE_CHECKING:
    from ds4convert.converted.grouping import Group
    from ds4convert.verification.checks import Check

TEMPLATE = "report.html.jinja"


@dataclass(frozen=True, slots=True)
class Tile:
    """A figure at the top of the page: what it is, the figure, and what it is of."""

    label: str
    figure: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Key:
    """One key of a recording: whether it agrees, by how much it differs, and why it does not agree."""

    key: str
    ok: bool
    difference: str
    detail: str


@dataclass(frozen=True)
class Page:
    """A page: name and kind of what it is about, what was found (`is_good` None: nothing that is good or bad), figures.

    `verdict` is what was found in a few words, `sentence` and `details` say more of it. `sections` come in the order in
    which they are read; `reference`, `checks` and `files` behind them.
    """

    name: str
    kind: str
    about: str
    is_good: bool | None
    verdict: str
    sentence: str
    details: Sequence[str]
    tiles: Sequence[Tile]
    sections: Sequence[Section]
    files: Section | None = None
    reference: Sequence[Key] = ()
    checks: Sequence[Check] = ()

    @property
    def state(self) -> str:
        """Return the class of the box with the verdict."""
        return {True: "good", False: "bad", None: "plain"}[self.is_good]

    def groups(self) -> Iterator[list[Section]]:
        """Yield the sections in groups: a wide one alone, those between two of them together, to stand in columns."""
        for _, group in itertools.groupby(enumerate(self.sections), lambda x: x[0] if x[1].wide else -1):
            yield [s for _, s in group]

    def as_html(self) -> str:
        """Return the page as HTML."""
        return rendered(TEMPLATE, {}, {"page": self, "version": version(), "groups": list(self.groups())}) + "\n"


def about(record: Manifest) -> str:
    """Return the line below the name of a converted folder: what it is."""
    source = record.source
    place = f"from {source.repo}{f' at {source.revision[:12]}' if source.revision else ''}" if source.repo else ""
    words = (record.family, f"recipe {record.recipe}", f"layout {record.layout}", place)
    return " · ".join(w for w in words if w)


def bytes_by_role(groups: Sequence[Group], told: str) -> Section:
    """Return the bytes of each role as bars; `told` is what stands beside them: dtypes or formats."""
    most = max(g.size for g in groups) or 1
    bars = [
        Bar(maps.name_of(g.name), g.size / most, size(g.size), ", ".join(getattr(g, told)),
            "a" if g.is_of_head else "b")
        for g in groups
    ]  # fmt: skip
    parts = [Bars("", ("Role", "Bytes", told.capitalize()), bars)]
    return Section("bytes", "Bytes by role", "The roles of the head are in colour.", parts, "Bytes")


def check_target(path: Path) -> None:
    """Raise `OutputError` where a file that is no page stands in the place of the page to be written."""
    if not path.exists():
        return
    start = b""
    if path.is_file():
        with path.open("rb") as f:
            start = f.read(512)
    if not start.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise OutputError(f"{path}: is there, and no HTML page; it is not replaced: name another file")


def write(path: Path, text: str) -> None:
    """Write a page, whole or not at all. Raises `EnvironmentFault` where the disk refuses."""
    try:
        Disk().write_file(path, text.encode())
    except OSError as e:
        raise EnvironmentFault(
            f"{path}: the report could not be written: {e.strerror}", hint="name another file"
        ) from e
