"""Under what a folder was checked, for the page: machine, versions, the command, and where the folder comes from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ds4convert.converted import grouping
from ds4convert.converted.records import Manifest
from ds4convert.report.drawings import Section, Table, Terms, Texts
from ds4convert.words.figures import size

CODE = frozenset({"Command", "Revision", "Manifest", "Plan", "config.json", "Repository"})
"""Terms whose text is typed or compared letter by letter."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What the page tells of a run beside its findings: the command line without paths, and rows about the machine."""

    command: str = ""
    machine: tuple[tuple[str, str], ...] = ()


def measured(setting: Setting, computed: str) -> Section | None:
    """Return how the figures came about; `computed` is how the model ran, "" where it did not."""
    rows = [("Command", setting.command)] if setting.command else []
    rows += setting.machine
    rows += [("Computed", computed)] if computed else []
    if not rows:
        return None
    note = "Speeds are of this machine; all other figures are of the folder."
    return Section("machine", "How it was measured", note, [Terms(rows, CODE)], "Machine")


def origin(record: Manifest, note: str) -> Section:
    """Return where the folder comes from and how it was made, as its manifest tells it; `note` stands above."""
    rows = list(_origin(record))
    return Section("origin", "Where it comes from", note, [Terms(rows, CODE)], "Origin")


def _origin(record: Manifest) -> Iterator[tuple[str, str]]:
    place = record.source
    if place.repo:
        yield "Repository", place.repo
    else:
        yield "Source", f"a local folder of {len(place.files)} files, {size(sum(f.size for f in place.files))}"
    if place.revision:
        yield "Revision", place.revision
    yield "Family", record.family
    yield "Recipe", record.recipe
    if record.formats:
        yield "Formats", ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in record.formats.items())
    yield "Layout", record.layout
    yield "Converted by", f"{record.tool.name} {record.tool.version}"
    for link in record.chain:
        yield "Made from", f"a conversion with recipe {link.recipe}" + (f", {link.layout}" if link.layout else "")
    yield "Plan", record.plan
    yield "Manifest", record.digest
    if record.config_sha256:
        yield "config.json", f"{record.config_sha256} (of the source)"


def left_out(record: Manifest) -> Section | None:
    """Return what was not carried over, with the reasons; None where everything was."""
    told = [*grouping.left_out(record.left_out), *(f"{x.tensor}: {x.why}" for x in record.files_left_out)]
    if not told:
        return None
    return Section(
        "left-out", "What was left out", "Every other tensor of the source is here.", [Texts(told)], "Left out"
    )


def files(record: Manifest) -> Section:
    """Return the files of the folder with their digests."""
    rows = [(f.name, "" if f.size is None else size(f.size), f.sha256 or "not hashed") for f in record.files]
    title = f"{len(rows)} files and their digests"
    table = Table(title, ("File", "Size", "sha256"), rows, folded=title)
    note = "To compare with a download: shasum -a 256 FILE (on Linux sha256sum FILE)."
    return Section("files", "Files", note, [table], "Files", wide=True)
