"""A loaded model on given tokens: head against backbone, pieces against the whole, converted against source.

Everything here is teacher-forced: the prompts' own tokens are fed, nothing is drawn. Divergences are in nats.
Judges nothing: thresholds are `mtp_check`'s.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import mlx.core as mx

from ds4convert.evaluate.decode_runs import Prompt
from ds4convert.evaluate.forced_dspark import forced_blocks

if TYPE_CHECKING:
    from ds4convert.inference.deepseek_v4.model import Model


def number(value: mx.array) -> float:
    """The one value of an array."""
    return float(value.item())  # type: ignore[arg-type]


@dataclass(frozen=True)
class Forced:
    """The head against the backbone over prompts, fed with the prompts' own tokens.

    `agreement`: share of positions at which both have the same first choice; `chance`: the same for a head
    that always proposes the backbone's commonest choice; `perplexity`: the backbone's per token, of each text.
    """

    positions: int
    agreement: float
    chance: float
    divergence_nats: float  # mean KL(backbone || head)
    perplexity: dict[str, float]
    finite: bool


@dataclass
class Passed:
    """One prompt through the backbone: ids, logits [L, V], raw streams [1, L, M, D], and taps for a DSpark head."""

    prompt: Prompt
    logits: mx.array
    hidden: mx.array
    taps: mx.array | None = None


def pass_of(model: Model, prompt: Prompt) -> Passed:
    """One prompt through the backbone at once."""
    ids = mx.array([prompt.ids])
    if model.is_dspark:
        logits, taps, hidden = model.tapped_forward(ids, model.make_cache())
        mx.eval(logits, taps, hidden)
        return Passed(prompt, logits[0], hidden, taps)
    logits, hidden = model(ids, return_hidden=True)
    mx.eval(logits, hidden)
    return Passed(prompt, logits[0], hidden)


def backbone_passes(model: Model, prompts: Sequence[Prompt], limit: int = 512) -> list[Passed]:
    """Each prompt's first `limit` tokens through the backbone; prompts of one token are left out."""
    out = []
    for prompt in prompts:
        if len(prompt.ids) > 1:
            cut = Prompt(prompt.name, prompt.ids[:limit], prompt.is_text)
            out.append(pass_of(model, cut))
    return out


def head_logits(model: Model, passed: Passed) -> mx.array:
    """Draft logits [L-1, V] after token t+1, to be compared with the backbone's row t+1: of a classic head from (hidden
    at t, token t+1), of a DSpark head the first draft of the block at t+1.
    """
    if passed.taps is not None:
        return forced_blocks(model, passed.prompt.ids, passed.taps, 1).logits[:, 0]
    ids = mx.array([passed.prompt.ids[1:]])
    rows: mx.array = model.mtp_forward(passed.hidden[:, :-1], ids, model.make_mtp_cache())[0]
    mx.eval(rows)
    return rows


def kl_nats(p: mx.array, q: mx.array) -> mx.array:
    """KL(p || q) in nats for each row of logits [n, V]."""
    p = p - mx.logsumexp(p, axis=-1, keepdims=True)
    q = q - mx.logsumexp(q, axis=-1, keepdims=True)
    return (mx.exp(p) * (p - q)).sum(axis=-1)


def teacher_forced(model: Model, passes: Sequence[Passed]) -> Forced:
    """Agreement of the head with the backbone over all positions of the prompts."""
    choices: list[int] = []
    same, divergence, finite = 0, 0.0, True
    for passed in passes:
        wanted = passed.logits[1:].argmax(axis=-1)
        choices += wanted.tolist()  # type: ignore[arg-type]
        finite &= all_finite(passed.logits) and all_finite(passed.hidden)
        if model.head.present:
            drafts = head_logits(model, passed)
            finite &= all_finite(drafts)
            same += int(number((drafts.argmax(axis=-1) == wanted).sum()))
            divergence += number(kl_nats(passed.logits[1:], drafts).sum())
    count = max(1, len(choices))
    common = max((choices.count(c) for c in set(choices)), default=0)
    texts = {p.prompt.name: _perplexity(p) for p in passes if p.prompt.is_text}
    return Forced(len(choices), same / count, common / count, divergence / count, texts, bool(finite))


def _perplexity(passed: Passed) -> float:
    rows = passed.logits[:-1]
    picked = mx.take_along_axis(rows, mx.array(passed.prompt.ids[1:])[:, None], axis=-1)[:, 0]
    return number(mx.exp((mx.logsumexp(rows, axis=-1) - picked).mean()))


def all_finite(values: mx.array) -> bool:
    """Whether no value is NaN or infinite."""
    return bool(mx.isfinite(values).all().item())


# ------------------------------------------------------------------ numerics


@dataclass(frozen=True)
class Invariance:
    """The same tokens fed at once, and in pieces and one by one: how far the results are apart."""

    tokens: int
    max_abs_logits: float
    max_abs_head: float | None
    median_kl_nats: float
    argmax_equal: float


def chunk_invariance(model: Model, ids: Sequence[int], chunk: int = 7, singles: int = 8) -> Invariance:
    """Compare one-shot prefill of `ids` with chunks of `chunk`, the last `singles` tokens one by one."""
    line = mx.array([list(ids)])
    cache, head_cache = model.make_cache(), model.make_mtp_cache()
    once = pass_of(model, Prompt("", tuple(ids)))
    logits, hidden = once.logits[None], once.hidden
    starts = [*range(0, max(0, len(ids) - singles), chunk)]
    cuts = [*sorted({*starts, *range(max(0, len(ids) - singles), len(ids))}), len(ids)]
    parts, heads = [], []
    for start, end in itertools.pairwise(cuts):
        piece, state = model(line[:, start:end], cache=cache + head_cache, return_hidden=True)
        mx.eval(piece, state)
        parts.append(piece[0])
        if model.head.present and not model.is_dspark and end < len(ids):
            heads.append(model.mtp_forward(state, line[:, start + 1 : end + 1], head_cache)[0])
    pieces = mx.concatenate(parts)
    head_diff = None
    if heads:
        rows = mx.concatenate(heads)
        whole = model.mtp_forward(hidden[:, :-1], line[:, 1:], model.make_mtp_cache())[0]
        head_diff = number(mx.abs(whole[: rows.shape[0]] - rows).max())
    if once.taps is not None:
        fresh = model.make_mtp_cache()
        model.append_context(once.taps, fresh)
        blocks = [model.draft_block(ids[-1], caches).base for caches in (fresh, head_cache)]
        head_diff = number(mx.abs(blocks[0] - blocks[1]).max())
    equal = number((logits[0].argmax(axis=-1) == pieces.argmax(axis=-1)).astype(mx.float32).mean())
    apart = number(mx.abs(logits[0] - pieces).max())
    return Invariance(len(ids), apart, head_diff, number(mx.median(kl_nats(logits[0], pieces))), equal)


# ------------------------------------------------------------------ against the source


@dataclass(frozen=True)
class SourceDivergence:
    """KL(source || converted) in nats over the prompts, of backbone or head.

    `perplexity`: the source's own per token, of each text; empty of the head, whose logits are drafts.
    """

    positions: int
    mean: float
    median: float
    maximum: float
    argmax_equal: float
    per_prompt: dict[str, float]  # median of each prompt
    perplexity: dict[str, float] = field(default_factory=dict)


def source_divergence(
    source: Model, passes: Sequence[Passed], drafts: Sequence[mx.array]
) -> dict[str, SourceDivergence]:
    """Compare recorded logits of the converted model with the source's, on the same tokens.

    `drafts` are the converted head's logits for each pass, empty where either model has no head.
    """
    rows: dict[str, list[tuple[str, mx.array, mx.array]]] = {"backbone": [], "head": []}
    perplexity: dict[str, float] = {}
    for number, passed in enumerate(passes):
        theirs = pass_of(source, passed.prompt)
        name = passed.prompt.name
        if passed.prompt.is_text:
            perplexity[name] = _perplexity(theirs)
        rows["backbone"].append((name, theirs.logits, passed.logits))
        if drafts and source.head.present:
            rows["head"].append((name, head_logits(source, theirs), drafts[number]))
    found = {part: _summed(pairs) for part, pairs in rows.items() if pairs}
    return {k: replace(d, perplexity=perplexity) if k == "backbone" else d for k, d in found.items()}


def _summed(pairs: list[tuple[str, mx.array, mx.array]]) -> SourceDivergence:
    kl = [mx.maximum(kl_nats(a, b), 0) for _, a, b in pairs]
    equal = mx.concatenate([a.argmax(axis=-1) == b.argmax(axis=-1) for _, a, b in pairs])
    every = mx.concatenate(kl)
    return SourceDivergence(
        every.size,
        number(every.mean()),
        number(mx.median(every)),
        number(every.max()),
        number(equal.astype(mx.float32).mean()),
        {name: number(mx.median(k)) for (name, _, _), k in zip(pairs, kl, strict=True)},
    )
