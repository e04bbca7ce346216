"""From figures to sentences: the thresholds of `verify`, and what is said of a head.

Pure: takes what `inference` measured and returns problems (none: good) and texts; the help of `verify` states the
same thresholds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ds4convert.evaluate.decode_runs import Compute, Runs
    from ds4convert.evaluate.forced import Forced, Invariance
    from ds4convert.evaluate.wiring import Wiring


USELESS = 0.10
"""Acceptance of first drafts below which a head is useless, unless CHANCE asks for more.

Published: 59 % before and 4 % after over-quantization."""

WEAK = 0.40
"""Acceptance of first drafts below which a working head is called weak (published heads at one draft: 59 to 82 %)."""

CHANCE = 1.5
"""A head has to be this many times better than one that always proposes the commonest token."""

FORCED_USELESS = 0.05
"""Agreement with the backbone on the prompts' own tokens below which a head is useless (chance as above)."""

TIE = {"float32": 1e-3, "bfloat16": 0.5}
"""Top-2 margin up to which a divergence of greedy tokens counts as a near tie, in nats."""

CHUNK_LIMIT = 2e-3
"""Largest difference of logits between decoding and prefill in float32 (golden checkpoints: below 5e-5)."""

CHUNK_KL = 5e-3
"""The same in bfloat16, as median KL in nats (golden checkpoints: below 1e-3)."""

CHUNK_TOKENS = 140
"""Tokens of the chunk test: across the windows of ratio 4 and 128."""

BROKEN = 0.25
"""A backbone whose perplexity on its best text is above this part of the vocabulary is broken."""

ALTERED = ("finished", "digests", "values", "values of the head in mtp/", "headers", "inventory", "manifest")
"""Checks of the files that say that the weights are not what the conversion wrote."""


@dataclass
class Measured:
    """What the checks and the verdict look at."""

    forced: Forced
    invariance: Invariance
    wiring: Wiring | None = None
    runs: Runs | None = None


def numerics_problems(found: Measured, dtype: str, vocab: int) -> list[str]:
    """Return what is off in the numerics of the model."""
    problems = []
    if not found.forced.finite:
        problems.append("logits or hidden states that are NaN or infinite")
        return problems
    v = found.invariance
    if dtype == "float32" and max(v.max_abs_logits, v.max_abs_head or 0.0) > CHUNK_LIMIT:
        worst = max(v.max_abs_logits, v.max_abs_head or 0.0)
        problems.append(f"decoding in pieces differs from prefill by {worst:.3g} (limit {CHUNK_LIMIT:g})")
    if dtype != "float32" and v.median_kl_nats > CHUNK_KL:
        problems.append(
            f"decoding in pieces differs from prefill: median KL {v.median_kl_nats:.3g} (limit {CHUNK_KL:g})"
        )
    texts = found.forced.perplexity
    if texts and min(texts.values()) > BROKEN * vocab:
        problems.append(
            f"the backbone is broken: perplexity {min(texts.values()):.4g} on its best text, of {vocab} tokens"
        )
    return problems


def numerics_good(found: Measured, compute: Compute) -> str:
    """Return what the test of numerics found where all is good."""
    v, texts = found.invariance, found.forced.perplexity
    apart = f"{v.max_abs_logits:.2g}" if compute.dtype == "float32" else f"median KL {v.median_kl_nats:.2g}"
    text = f"; perplexity of the best text {min(texts.values()):.1f}" if texts else ""
    how = f"{compute.dtype}, {'matrices dequantized' if compute.dense else 'matrices as stored'}"
    return f"all finite; decoding equals prefill over {v.tokens} tokens ({apart}){text}; {how}"


def useless_reason(runs: Runs, forced: Forced) -> str:
    """Return why the head is useless, in words, or nothing.

    Acceptance counts against the backbone's own greedy text, which may repeat itself; so the prompts' own tokens are
    asked as well.
    """
    limit = max(USELESS, CHANCE * min(runs.common_token_share, 0.5))
    if runs.drafted and runs.first_acceptance < limit:
        return (
            f"acceptance {runs.first_acceptance:.1%} is at chance (limit {limit:.0%}): a head of the wrong kind, "
            "over-quantized, or wired wrongly"
        )
    limit = max(FORCED_USELESS, CHANCE * min(forced.chance, 0.5))
    if forced.positions and forced.agreement < limit:
        return (
            f"the head agrees with the backbone on {forced.agreement:.1%} of the prompts' tokens, which is chance "
            f"(limit {limit:.0%}): a head of the wrong kind, over-quantized, or wired wrongly"
        )
    return ""


def works(runs: Runs, forced: Forced) -> str:
    """Return how well a head works."""
    return (
        f"acceptance {runs.acceptance:.1%} ({runs.accepted} of {runs.drafted} drafts), "
        f"{runs.tokens_per_pass:.2f} tokens per backbone pass; {forced.agreement:.1%} teacher-forced"
    )


def wiring_good(wiring: Wiring | None) -> str:
    """Return what the search for exchanged parts came to where it found none."""
    if wiring is None or not wiring.experts_comparable:
        return "not judged: the head's experts show no trace of training; only --source or --reference can tell"
    return f"no two parts of the head agree better exchanged ({wiring.tried} exchanges tried)"


def inequality(runs: Runs, dtype: str) -> list[str]:
    """Return where greedy text with the head differs from plain, near ties apart."""
    real = [r.divergence for r in runs.runs if r.divergence and r.divergence.top2_margin > TIE[dtype]]
    if not real:
        return []
    d = real[0]
    return [
        f"greedy tokens with the head differ from plain ones on {len(real)} prompts; first {d.prompt}, new token "
        f"{d.position}: {d.plain_token} plain, {d.mtp_token} with the head, top-2 margin {d.top2_margin:.3g}"
    ]


def equality_good(runs: Runs) -> str:
    """Return how equal greedy text is with and without the head, where it is good."""
    d = runs.first_divergence
    if d is None:
        return f"{sum(len(r.plain.tokens) for r in runs.runs)} tokens equal with and without the head"
    return f"differs at a near tie only: {d.prompt}, new token {d.position}, top-2 margin {d.top2_margin:.2g}"


def verdict(
    runs: Runs, off: list[str], altered: list[str], scrambled: list[str], useless: str, unequal: list[str]
) -> str:
    """Return the verdict in a sentence: the gravest of what was found, or how well the head works."""
    if off:
        return f"Numerics are off, so nothing can be said of the head: {'; '.join(off)}."
    if scrambled:
        return f"The head is present but scrambled: {'; '.join(scrambled)}."
    if altered:
        how = f"useless too: {useless}" if useless else f"accepted {runs.acceptance:.1%}"
        return f"The weights are not what was converted ({', '.join(altered)}); the head as it is now is {how}."
    if useless:
        return f"The head is present but useless: {useless}."
    if unequal:
        return f"Numerics are off: {unequal[0]}."
    return _healthy(runs)


def _healthy(runs: Runs) -> str:
    quality = (
        "works" if runs.first_acceptance >= WEAK else "works, but weakly (published heads: 59 to 82 %; see --source)"
    )
    ratio = runs.mtp_rate_tok_s / runs.plain_rate_tok_s if runs.plain_rate_tok_s else 0.0
    pace = f"{ratio:.2f} times the speed of plain decoding here"
    if ratio < 1:
        pace += ", so it does not pay on this machine"
    same = "greedy text unchanged" if runs.first_divergence is None else "greedy text changed at near ties only"
    figures = f"acceptance {runs.acceptance:.1%}, {runs.tokens_per_pass:.2f} tokens per pass"
    return f"The head {quality}: {figures}, {pace}; {same}."
