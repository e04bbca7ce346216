"""What was measured of a folder that ran, as parts of the page: drafts, speed, texts, divergence from the source."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ds4convert.report.drawings import (
    Bar,
    Bars,
    Mark,
    Pair,
    Pairs,
    Paragraph,
    Part,
    Plot,
    Point,
    Replies,
    Reply,
    Section,
    Table,
)
from ds4convert.verification import facts as found

if TYPE_CHECKING:
    from ds4convert.evaluate.layerwise import LayerwiseResult

MARKS = 5
"""Colours of drafts by their place in the pass; the last one stands for all further ones."""

SHOWN = 700
"""Characters of a prompt that are shown: the last ones, which the reply follows."""


def sections(facts: found.Facts) -> Iterator[Section]:
    """Yield what there are figures for."""
    measured = facts.mtp.measured if facts.mtp else None
    if measured is not None:
        yield _drafts(measured)
        if pairs := list(_pairs(measured.per_prompt)):
            yield _speed(pairs, measured)
    if facts.decode is not None and facts.decode.texts:
        yield _texts(facts.decode.texts, measured)
    if facts.kl is not None or (facts.numerics is not None and facts.numerics.perplexity):
        yield _source(facts)
    if measured is not None and measured.calibration:
        yield _calibration(measured.calibration)
    if facts.layerwise and facts.layerwise.stages and facts.layerwise.divergence:
        yield _layers(facts.layerwise)


# --- the head --------------------------------------------------------------------------------------------------------


def _drafts(m: found.Measurement) -> Section:
    parts: list[Part] = []
    if drafted := [p for p in m.per_position if p.acceptance is not None]:
        bars = [
            Bar(f"draft {p.position}", p.acceptance or 0.0, f"{p.acceptance:.1%}", f"{p.accepted:,} of {p.drafted:,}")
            for p in drafted
        ]
        parts.append(Bars("Acceptance by position", ("Draft", "Accepted", "Of"), bars))
    if m.per_prompt:
        bars = [
            Bar(p.prompt, p.acceptance, f"{p.acceptance:.1%}", f"{p.tokens_per_pass:.2f} per pass")
            for p in m.per_prompt
        ]
        parts.append(Bars("Acceptance by prompt", ("Prompt", "Accepted", "Tokens"), bars))
    told, many = m.teacher_forced, m.draft_depth > 1
    what = f"the {m.draft_depth} tokens" if many else "the token"
    behind = " A draft behind a refused one counts as refused." if many else ""
    note = (
        f"Of {what} drafted in each pass, what the backbone accepts.{behind} On the prompts' own tokens head and "
        f"backbone agree at {told.agreement:.1%} of {told.positions:,} places (always proposing the commonest token: "
        f"{told.chance:.1%})."
    )
    return Section("drafts", "What the head drafts", note, parts, "Drafts")


def _calibration(bins: Sequence[found.Bin]) -> Section:
    """Return what a DSpark head's confidence foretold, against what was accepted."""
    points = [
        Point(b.estimated, b.observed, f"estimated {b.estimated:.1%}, observed {b.observed:.1%} of {b.drafts} drafts")
        for b in bins
    ]
    note = (
        "What the head held of its drafts, across, and what of them was accepted, upwards, in tenths by estimate. On "
        "the line they are equal. Counted are drafts whose predecessors were all accepted."
    )
    rows = [(f"{b.estimated:.1%}", f"{b.observed:.1%}", f"{b.drafts:,}") for b in bins]
    table = Table("", ("Estimated", "Observed", "Drafts"), rows, folded="The same in numbers", numbers=2)
    parts: list[Part] = [Plot("Confidence against observed acceptance", points), table]
    return Section("confidence", "Confidence of the head", note, parts, "Confidence")


# --- speed -----------------------------------------------------------------------------------------------------------


def _pairs(prompts: Sequence[found.PromptFacts]) -> Iterator[tuple[str, float, float]]:
    for p in prompts:
        if p.plain_tokens_per_second and p.mtp_tokens_per_second:
            yield p.prompt, p.plain_tokens_per_second, p.mtp_tokens_per_second


def ratios(prompts: Sequence[found.PromptFacts]) -> list[float]:
    """Return how many times as fast each prompt was decoded with the head, the least first."""
    return sorted(b / a for _, a, b in _pairs(prompts))


def _speed(pairs: Sequence[tuple[str, float, float]], m: found.Measurement) -> Section:
    plain, mtp = [a for _, a, _ in pairs], [b for _, _, b in pairs]
    rows = [Pair(name, a, b, f"{b / a:.2f} ×") for name, a, b in pairs]
    if len(rows) > 1 and m.speedup:
        rows.append(Pair("all tokens", m.plain_tokens_per_second, m.mtp_tokens_per_second, f"{m.speedup:.2f} ×"))
    faster = _range([b / a for a, b in zip(plain, mtp, strict=True)], 2)
    spread = (
        f"Over {len(pairs)} prompts, median and in brackets least to most: plain {_range(plain)} tokens/s, with the "
        f"head {_range(mtp)}; {faster} times as fast."
    )
    t = m.milliseconds
    times = Table("Where the time goes", ("Part of a pass", "Mean ms"), [
        ("a plain pass, one token", f"{t.plain_pass:.1f}"),
        (f"with the head: backbone, {m.tokens_per_pass:.2f} tokens", f"{t.verifying_pass:.1f}"),
        ("with the head: drafting", f"{t.drafting:.1f}"),
        ("with the head: the rest", f"{t.rest:.1f}"),
    ], numbers=1)  # fmt: skip
    note = (
        "Each prompt decoded both ways, one after the other in alternating order, after a warm-up; the time to read "
        f"the prompt is not in it. Draft depth {m.draft_depth}."
    )
    parts: list[Part] = [Pairs("Tokens per second, both ways", "tokens/s", rows)]
    parts += [Paragraph(spread)] if len(pairs) > 1 else []
    return Section("speed", "Speed, both ways", note, [*parts, times], "Speed")


def _range(values: Sequence[float], digits: int = 1) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


# --- texts -----------------------------------------------------------------------------------------------------------


def _texts(texts: Sequence[found.Reply], m: found.Measurement | None) -> Section:
    facts = {p.prompt: p for p in m.per_prompt} if m else {}
    deepest = max((w.draft for t in texts for w in t.tokens or ()), default=0)
    places = [(n, f"{n} or later" if n == MARKS < deepest else str(n)) for n in range(1, min(deepest, MARKS) + 1)]
    replies = [_reply(t, facts.get(t.prompt)) for t in texts]
    if deepest:
        same = all(t.differs_at is None for t in texts if t.tokens is not None)
        told = "Every text is the same without the head." if same else "Where a text differs, both stand here."
        note = "Marked tokens were drafted by the head and accepted: they cost no pass of their own. "
        return Section("texts", "Prompts and texts", note + told, [Replies(replies, places)], "Texts", wide=True)
    note = "Greedy decoding, without a head."
    return Section("texts", "Prompts and texts", note, [Replies(replies, places)], "Texts", wide=True)


def _reply(t: found.Reply, facts: found.PromptFacts | None) -> Reply:
    tokens = t.tokens if t.tokens is not None else tuple(found.Word(text, 0) for text in t.plain)
    marks = [Mark.of(w.text, w.draft, min(w.draft, MARKS), n == t.differs_at) for n, w in enumerate(tokens)]
    plain: list[Mark] = []
    if t.differs_at is not None:
        plain = [Mark.of(text, 0, 0, n == t.differs_at) for n, text in enumerate(t.plain)]
    note = f"{len(tokens)} tokens"
    if facts is not None:
        note += f", {sum(w.draft > 0 for w in tokens)} of them drafted; {facts.tokens_per_pass:.2f} per pass"
    cut = max(0, len(t.text) - SHOWN)
    return Reply(t.prompt, t.text[cut:], cut, marks, note, plain)


# --- against the source ----------------------------------------------------------------------------------------------


def _source(facts: found.Facts) -> Section:
    parts: list[Part] = []
    told = facts.kl.parts if facts.kl is not None else None
    if told:
        rows = [
            (name, f"{d.median:.2g}", f"{d.mean:.2g}", f"{d.maximum:.2g}", f"{d.argmax_equal:.2%}")
            for name, d in told.items()
        ]
        head = ("Part", "Median", "Mean", "Largest", "Same choice")
        parts.append(Table("KL divergence from the source, nats per token", head, rows, numbers=4))
    parts += list(_perplexity(facts))
    if told:
        most = max(d.positions for d in told.values())
        note = (
            f"The converted model and its source on the same {most:,} tokens: 0 nats and the same perplexity are equal."
            " Same choice: how often both find the same token the likeliest."
        )
    elif facts.kl is not None:
        note = "Left out: the source does not fit in the free memory."
    else:
        note = "Not measured: `verify --source SRC --mtp` compares with the source."
    return Section("source", "Against the source", note, parts, "Source")


def _perplexity(facts: found.Facts) -> Iterator[Part]:
    if facts.numerics is None or not facts.numerics.perplexity:
        return
    kl = facts.kl.parts if facts.kl is not None and facts.kl.parts else {}
    backbone = kl.get("backbone")
    source = backbone.perplexity if backbone is not None else {}
    medians = backbone.per_prompt if backbone is not None else {}
    rows = [
        (name, _perplex(value),
         *([_perplex(source[name]) if name in source else "-", f"{medians.get(name, 0.0):.2g}"] if source else []))
        for name, value in facts.numerics.perplexity.items()
    ]  # fmt: skip
    head = ("Text", "Perplexity", *(("Of the source", "Median KL") if source else ()))
    yield Table("Perplexity of each text", head, rows, numbers=len(head) - 1)


def _perplex(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _layers(run: LayerwiseResult) -> Section:
    """Return the hidden-state error after each layer of a layer-wise run against the source."""
    d = run.divergence
    assert d is not None
    most = max((s.relative_rms for s in run.stages), default=0.0) or 1.0
    bars = [Bar(s.stage, s.relative_rms / most, f"{s.relative_rms:.2g}") for s in run.stages]
    note = f"KL from the source: mean {d.kl_mean:.2g}, median {d.kl_median:.2g}, largest {d.kl_max:.2g} nats"
    parts = [Bars("Relative RMS after each stage", ("Stage", "Relative RMS", ""), bars)]
    return Section("layers", "Error of hidden states, layer by layer", note, parts, "Layers")
