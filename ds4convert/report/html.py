"""The page of `verify --report`, by which someone decides whether to download a converted folder.

Shows what `verify --json` says, what the manifest tells, and where it was measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ds4convert.converted.records import Manifest
from ds4convert.report import maps, measured, pages, setting
from ds4convert.report.drawings import Section
from ds4convert.report.pages import Key, Tile
from ds4convert.report.setting import Setting
from ds4convert.verification.facts import Facts, Measurement, SourceKL, record_of
from ds4convert.verification.request import Outcome
from ds4convert.words.figures import size

if TYPE_CHECKING:
    from ds4convert.evaluate.layerwise import LayerwiseResult
    from ds4convert.evaluate.reference import Compared


def page(name: str, outcome: Outcome, where: Setting | None = None, record: Manifest | None = None) -> str:
    """Return the page about the folder called `name`, from what `verify` found and its manifest tells."""
    facts = outcome.facts
    failed = [c for c in outcome.checks if not c.ok]
    passed = len(outcome.checks) - len(failed)
    sentence = facts.mtp.verdict if facts.mtp else ""
    made = pages.Page(
        name=name,
        kind="report of verify",
        about="" if record is None else pages.about(record),
        is_good=not failed,
        verdict=f"Not good: {', '.join(c.name for c in failed)}"
        if failed
        else f"Good: every check passed, {passed} of {passed}",
        sentence=sentence,
        details=[f"{c.name}: {c.detail}" for c in failed if not sentence or c.detail not in sentence],
        tiles=list(_tiles(facts, record)),
        sections=[*_sections(facts, record), *_made(facts, where or Setting(), record)],
        files=None if record is None else setting.files(record),
        reference=[_key(c) for c in facts.reference or ()],
        checks=outcome.checks,
    )
    return made.as_html()


def write(path: Path, folder: Path, outcome: Outcome, where: Setting) -> None:
    """Write the page. The folder's own name is shown, never the path to it. Raises as `pages.write` does."""
    pages.write(path, page(folder.resolve().name, outcome, where, record_of(folder)))


def _sections(facts: Facts, record: Manifest | None) -> Iterator[Section]:
    """Yield what was found of the folder, what decides first."""
    yield from measured.sections(facts)
    groups = facts.groups or ()
    if record is not None:
        found = (maps.formats(record.layers(), groups), maps.losses(record.losses(), groups))
        yield from (s for s in found if s is not None)
    if groups:
        yield pages.bytes_by_role(groups, "formats")


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
        told = "As the folder's manifest tells it; the checks above say whether the folder is as it tells."
        yield setting.origin(record, told)


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


def _key(c: Compared) -> Key:
    return Key(c.key, c.ok, "" if c.max_abs_diff is None else f"{c.max_abs_diff:.3g}", c.detail)
