"""One self-contained page about a converted folder: verdict, acceptance, speed, bytes, divergence, checks.

No script, no font, no request to anywhere; pictures are inline SVG with a text of their own, so the page reads on a
phone, on paper and with a screen reader. Shows only what `verify --json` says. What is shown is decided here, how in
`manifests/pages/report.html.jinja`, which escapes every value.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ds4convert.converted.grouping import Group
from ds4convert.converted.manifest import tool_version
from ds4convert.converted.rounding_losses import LayerLoss
from ds4convert.errors import EnvironmentFault, OutputError
from ds4convert.files import Disk
from ds4convert.report.drawings import Bar, Cell, Chart, Map, Paragraph, Part, Plot, Point, Section, Texts
from ds4convert.verification.facts import Bin, Facts, Position, PromptFacts, SourceKL
from ds4convert.verification.request import Outcome
from ds4convert.words.figures import size
from ds4convert.words.templates import rendered

if TYPE_CHECKING:
    from ds4convert.evaluate.layerwise import LayerwiseResult
    from ds4convert.evaluate.reference import Compared

TEMPLATE = "report.html.jinja"
Tile = tuple[str, str]


def page(name: str, outcome: Outcome) -> str:
    """Return the page about the folder called `name`, from what `verify` found."""
    facts = outcome.facts
    failed = [c.name for c in outcome.checks if not c.ok]
    values = {
        "name": name,
        "version": tool_version(),
        "how": _how(facts),
        "failed": failed,
        "verdict": facts.mtp.verdict if facts.mtp else "" if failed else "Every check passed.",
        "tiles": list(_tiles(facts)),
        "cards": list(_cards(facts)),
        "pictures": list(_losses(facts.losses or ())),
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


def write(path: Path, folder: Path, outcome: Outcome) -> None:
    """Write the page. The folder's own name is shown, never the path to it.

    Whole or not at all; raises `EnvironmentFault` where the disk refuses.
    """
    disk = Disk()
    try:
        disk.write_file(path, page(folder.resolve().name, outcome).encode())
    except OSError as e:
        raise EnvironmentFault(
            f"{path}: the report could not be written: {e.strerror}", hint="name another file"
        ) from e


def _how(facts: Facts) -> str:
    if facts.compute is None:
        return ""
    matrices = "dequantized" if facts.compute.dense else "as stored"
    return f"; computed in {facts.compute.dtype}, matrices {matrices}"


def _tiles(facts: Facts) -> Iterator[Tile]:
    """Yield the figures at the top of the page."""
    head, total = facts.mtp, sum(g.size for g in facts.groups or ())
    if head is not None and (m := head.measured):
        yield f"{m.acceptance:.1%}", f"acceptance, {m.drafted:,} drafts"
        yield f"{m.tokens_per_pass:.2f}", "tokens per backbone pass"
        yield f"{m.speedup:.2f} x" if m.speedup else "-", "speed of plain decoding"
        yield "equal" if m.greedy_equal else "differs", "greedy text, head and plain"
    if facts.layerwise is not None:
        yield from _layerwise_tiles(facts.layerwise)
    if head is not None and head.format:
        yield head.kind, f"head, stored as {head.format.replace('+', ', ')}"
    if total:
        yield size(total), "of weights"


def _layerwise_tiles(run: LayerwiseResult) -> Iterator[Tile]:
    agreement = run.converted.acceptance
    if agreement is not None:
        yield f"{agreement:.1%}", "of drafts agree, teacher-forced"
    yield f"{run.converted.perplexity:.4g}", f"perplexity, {run.converted.tokens:,} tokens"
    yield size(run.memory.peak_rss), "peak memory of the layer-wise run"
    yield size(run.memory.largest_layer), "in the largest layer, as stored"


def _cards(facts: Facts) -> Iterator[Section]:
    """Yield the cards that there are figures for."""
    if facts.mtp and (m := facts.mtp.measured):
        if drafted := [p for p in m.per_position if p.acceptance is not None]:
            yield _acceptance(drafted)
        if m.calibration:
            yield _calibration(m.calibration)
        if m.per_prompt:
            yield _prompts(m.per_prompt)
    if facts.decode is not None:
        yield _speed(facts, facts.decode.plain_tokens_per_second)
    if facts.kl is not None:
        yield _divergence(facts.kl)
    if facts.layerwise and facts.layerwise.stages and facts.layerwise.divergence:
        yield _layers(facts.layerwise)
    if facts.groups:
        yield _groups(facts.groups)


def _acceptance(drafted: Sequence[Position]) -> Section:
    title = "Acceptance per draft position"
    shares = [p.acceptance or 0.0 for p in drafted]
    bars = [
        Bar(f"draft {p.position}", share, f"{share:.1%}", f"{p.accepted} of {p.drafted}")
        for p, share in zip(drafted, shares, strict=True)
    ]
    parts: list[Part] = [Chart(title, bars, 1.0)]
    if len(drafted) > 1:
        points = [Point(float(p.position), b.value, f"{b.label}: {b.text}") for p, b in zip(drafted, bars, strict=True)]
        parts.append(Plot("Acceptance as a curve", points, (1.0, float(max(2, len(drafted)))), is_joined=True))
    return Section(title, "A draft behind a refused one counts as refused.", parts)


def _calibration(bins: Sequence[Bin]) -> Section:
    """Return what a DSpark head's confidence foretold, against what was accepted."""
    title = "Confidence against observed acceptance"
    points = [
        Point(b.estimated, b.observed,
              f"estimated {b.estimated:.1%}, observed {b.observed:.1%} of {b.drafts} drafts")
        for b in bins
    ]  # fmt: skip
    note = (
        "Estimated acceptance across, observed acceptance upwards, drafts in tenths by estimate; on the line they are "
        "equal. Counted are drafts whose predecessors were all accepted."
    )
    return Section(title, note, [Plot(title, points, (0.0, 1.0), diagonal=True), Texts([p.text for p in points])])


def _prompts(prompts: Sequence[PromptFacts]) -> Section:
    bars = [
        Bar(p.prompt, p.acceptance, f"{p.acceptance:.1%}", f"{p.tokens_per_pass:.2f} tokens per pass") for p in prompts
    ]
    return Section("Acceptance per prompt", "Greedy decoding.", [Chart("Acceptance per prompt", bars, 1.0)])


def _speed(facts: Facts, plain: float) -> Section:
    bars = [Bar("plain", plain, f"{plain:.1f} tok/s", "all prompts", "b")]
    if facts.mtp and (m := facts.mtp.measured):
        rate = m.mtp_tokens_per_second
        bars.append(Bar("with the head", rate, f"{rate:.1f} tok/s", f"depth {m.draft_depth}"))
        for p in m.per_prompt:
            without, mtp = p.plain_tokens_per_second or 0.0, p.mtp_tokens_per_second or 0.0
            bars.append(Bar(p.prompt, without, f"{without:.1f} tok/s", "plain", "b"))
            bars.append(Bar(p.prompt, mtp, f"{mtp:.1f} tok/s", "with the head", "a"))
    note = "After the prompt; both from the same run, warmed up, order alternating."
    return Section("Tokens per second", note, [Chart("Tokens per second", bars)])


def _divergence(kl: SourceKL) -> Section:
    title = "KL against the source"
    if kl.parts is None:
        return Section(title, "Left out: the source does not fit in the free memory.")
    parts: list[Part] = []
    for part, d in kl.parts.items():
        equal = f"first choice equal at {d.argmax_equal:.1%}"
        told = f"mean {d.mean:.2g}, largest {d.maximum:.2g} over {d.positions} positions; {equal}"
        parts.append(Paragraph(f"{part}: {told}"))
        if bars := [Bar(name, value, f"{value:.2g}") for name, value in d.per_prompt.items() if d.maximum]:
            parts.append(Chart(f"Median KL, {part}", bars))
    return Section(title, "Nats, median of each prompt; 0 is equal.", parts)


def _layers(run: LayerwiseResult) -> Section:
    """Return the hidden-state error after each layer of a layer-wise run against the source."""
    d = run.divergence
    assert d is not None
    bars = [Bar(s.stage, s.relative_rms, f"{s.relative_rms:.2g}") for s in run.stages]
    note = f"KL from the source: mean {d.kl_mean:.2g}, median {d.kl_median:.2g}, largest {d.kl_max:.2g} nats"
    return Section("Error of hidden states, layer by layer", note, [Chart("Relative RMS after each stage", bars)])


def _groups(groups: Sequence[Group]) -> Section:
    bars = [
        Bar(g.name.replace("_", " "), g.size, size(g.size), ", ".join(g.formats), "a" if g.is_of_head else "b")
        for g in groups
    ]
    return Section("Bytes and format per group", "The head's groups begin with mtp.", [Chart("Bytes per group", bars)])


LEAST_ERROR = 1e-6
"""The relative squared error that is shown as none, in a map."""


def _place(r: LayerLoss) -> str:
    where = "" if r.layer is None else f", layer {r.layer}"
    return f"{r.group}{where}, {' '.join(r.formats)}"


def _losses(rows: Sequence[LayerLoss]) -> Iterator[Section]:
    """Yield what rounding cost and the bits per weight, as maps of groups and layers; none if nothing was rounded."""
    if not rows:
        return
    worst, widest = max(r.relative_square for r in rows), max(r.bits_per_weight for r in rows)
    span = math.log(max(worst, 10 * LEAST_ERROR) / LEAST_ERROR)
    error = [
        Cell(r.group, r.layer, math.log(max(r.relative_square, LEAST_ERROR) / LEAST_ERROR) / span,
             f"{_place(r)}: {r.relative_square:.3g}")
        for r in rows
    ]  # fmt: skip
    bits = [
        Cell(r.group, r.layer, r.bits_per_weight / widest, f"{_place(r)}: {r.bits_per_weight:.2f} bits") for r in rows
    ]
    note = f"A line per group, a cell per layer. Darkest: {worst:.3g} of the squared values; white: nothing lost."
    yield Section("What rounding cost", note, [Map("Relative squared error by group and layer", error)])
    wide = f"Darkest: {widest:.2f} bits per weight, scales counted."
    yield Section("Bits per weight", wide, [Map("Bits per weight by group and layer", bits)])


@dataclass(frozen=True, slots=True)
class Key:
    """One key of a recording: whether it agrees, by how much it differs, and why it does not agree."""

    key: str
    ok: bool
    difference: str
    detail: str


def _key(c: Compared) -> Key:
    return Key(c.key, c.ok, "" if c.max_abs_diff is None else f"{c.max_abs_diff:.3g}", c.detail)
