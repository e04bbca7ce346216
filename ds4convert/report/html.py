"""One self-contained page about a converted folder, by which someone decides whether to download it.

No script, no font, no request to anywhere; what is drawn is beside its number or has a text of its own, so the page
reads on a phone, on paper and with a screen reader. Shows what `verify --json` says, what the manifest tells, and where
it was measured. What is shown is decided here and in the modules beside, how in `manifests/pages/report.html.jinja`,
which escapes every value.
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
from ds4convert.report import maps, measured, setting
from ds4convert.report.drawings import Bar, Bars, Section
from ds4convert.report.setting import Setting
from ds4convert.verification.facts import Facts, Measurement, SourceKL, record_of
from ds4convert.verification.request import Outcome
from ds4convert.words.figures import size
from ds4convert.words.project import version
from ds4convert.words.templates import rendered

if TYPE_CHECKING:
    from ds4convert.evaluate.layerwise import LayerwiseResult
    from ds4convert.evaluate.reference import Compared

TEMPLATE = "report.html.jinja"


@dataclass(frozen=True, slots=True)
class Tile:
    """A figure at the top of the page: what it is, the figure, and what it is of."""

    label: str
    figure: str
    note: str = ""


def page(name: str, outcome: Outcome, where: Setting | None = None, record: Manifest | None = None) -> str:
    """Return the page about the folder called `name`, from what `verify` found and its manifest tells."""
    facts = outcome.facts
    failed = [c for c in outcome.checks if not c.ok]
    values = {
        "name": name,
        "version": version(),
        "about": _about(record),
        "failed": failed,
        "passed": len(outcome.checks) - len(failed),
        "verdict": facts.mtp.verdict if facts.mtp else "",
        "tiles": list(_tiles(facts, record)),
        "details": [c for c in failed if not facts.mtp or c.detail not in facts.mtp.verdict],
        "groups": list(_side_by_side([*_sections(facts, record), *_made(facts, where or Setting(), record)])),
        "files": None if record is None else setting.files(record),
        "reference": [_key(c) for c in facts.reference or ()],
        "checks": outcome.checks,
    }
    return rendered(TEMPLATE, {}, values) + "\n"


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


def write(path: Path, folder: Path, outcome: Outcome, where: Setting) -> None:
    """Write the page. The folder's own name is shown, never the path to it.

    Whole or not at all; raises `EnvironmentFault` where the disk refuses.
    """
    disk = Disk()
    try:
        disk.write_file(path, page(folder.resolve().name, outcome, where, record_of(folder)).encode())
    except OSError as e:
        raise EnvironmentFault(
            f"{path}: the report could not be written: {e.strerror}", hint="name another file"
        ) from e


def _about(record: Manifest | None) -> str:
    """Return the line below the name: what the folder is."""
    if record is None:
        return ""
    source = record.source
    place = f"from {source.repo}{f' at {source.revision[:12]}' if source.revision else ''}" if source.repo else ""
    words = (record.family, f"recipe {record.recipe}", f"layout {record.layout}", place)
    return " · ".join(w for w in words if w)


def _sections(facts: Facts, record: Manifest | None) -> Iterator[Section]:
    """Yield what was found of the folder, what decides first."""
    yield from measured.sections(facts)
    groups = facts.groups or ()
    if record is not None:
        found = (maps.formats(record.layers(), groups), maps.losses(record.losses(), groups))
        yield from (s for s in found if s is not None)
    if groups:
        most = max(g.size for g in groups) or 1
        bars = [
            Bar(maps.name_of(g.name), g.size / most, size(g.size), ", ".join(g.formats), "a" if g.is_of_head else "b")
            for g in groups
        ]
        parts = [Bars("", ("Role", "Bytes", "Formats"), bars)]
        yield Section("bytes", "Bytes by role", "The roles of the head are in colour.", parts, "Bytes")


def _side_by_side(sections: Sequence[Section]) -> Iterator[list[Section]]:
    """Yield sections in groups: a wide one alone, those between two of them together, to stand in columns."""
    for _, group in itertools.groupby(enumerate(sections), lambda x: x[0] if x[1].wide else -1):
        yield [s for _, s in group]


def _made(facts: Facts, where: Setting, record: Manifest | None) -> Iterator[Section]:
    """Yield where the figures and the folder come from."""
    if record is not None and (left := setting.left_out(record)) is not None:
        yield left
    computed = ""
    if facts.compute is not None:
        computed = f"{facts.compute.dtype}, matrices {'dequantized' if facts.compute.dense else 'as stored'}"
    if (how := setting.measured(where, computed)) is not None:
        yield how
    if record is not None:
        yield setting.origin(record)


# --- the figures at the top ------------------------------------------------------------------------------------------


def _tiles(facts: Facts, record: Manifest | None) -> Iterator[Tile]:
    """Yield the figures at the top of the page."""
    head, total = facts.mtp, sum(g.size for g in facts.groups or ())
    if total:
        files = sum(f.holds_tensors for f in record.files) if record else 0
        yield Tile("Size", size(total), f"of weights, in {files} files" if files else "of weights")
    if record is not None and (bits := record.bits_per_weight):
        yield Tile("Bits per weight", f"{bits:.2f}", "mean, scales counted")
    if head is not None and head.format:
        yield Tile("Draft head", head.kind, f"stored as {head.format.replace('+', ', ')}")
    if head is not None and (m := head.measured):
        yield from _head_tiles(m)
    if facts.kl is not None and facts.kl.parts:
        yield from _source_tiles(facts.kl)
    if facts.layerwise is not None:
        yield from _layerwise_tiles(facts.layerwise)


def _head_tiles(m: Measurement) -> Iterator[Tile]:
    yield Tile("Drafts accepted", f"{m.acceptance:.1%}", f"of {m.drafted:,} drafts")
    yield Tile("Tokens per pass", f"{m.tokens_per_pass:.2f}", f"plain decoding: 1; depth {m.draft_depth}")
    spread = measured.ratios(m.per_prompt)
    told = f"{spread[0]:.2f} to {spread[-1]:.2f} over {len(spread)} prompts" if len(spread) > 1 else "on this machine"
    yield Tile("Speed with the head", f"{m.speedup:.2f} ×" if m.speedup else "-", told)
    yield Tile("Greedy text", "equal" if m.greedy_equal else "differs", "with and without the head")


def _source_tiles(kl: SourceKL) -> Iterator[Tile]:
    for part, d in (kl.parts or {}).items():
        if part != "head":
            told = f"nats, median; first choice the same at {d.argmax_equal:.1%}"
            yield Tile("KL from the source", f"{d.median:.2g}", told)


def _layerwise_tiles(run: LayerwiseResult) -> Iterator[Tile]:
    agreement = run.converted.acceptance
    if agreement is not None:
        yield Tile("Drafts that agree", f"{agreement:.1%}", "teacher-forced")
    yield Tile("Perplexity", f"{run.converted.perplexity:.4g}", f"{run.converted.tokens:,} tokens")
    yield Tile("Peak memory", size(run.memory.peak_rss), "of the layer-wise run")
    yield Tile("Largest layer", size(run.memory.largest_layer), "as stored")


@dataclass(frozen=True, slots=True)
class Key:
    """One key of a recording: whether it agrees, by how much it differs, and why it does not agree."""

    key: str
    ok: bool
    difference: str
    detail: str


def _key(c: Compared) -> Key:
    return Key(c.key, c.ok, "" if c.max_abs_diff is None else f"{c.max_abs_diff:.3g}", c.detail)
