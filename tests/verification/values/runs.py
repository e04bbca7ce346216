"""Decoding runs made by hand, of which the figures are known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ds4convert.evaluate.decode_runs import Decoded, Divergence, Prompt, PromptRun, Runs
from ds4convert.evaluate.forced import Forced, Invariance
from ds4convert.inference.decode import DecodeStats


def decoded(tokens: list[int], seconds: float, at: Sequence[tuple[int, int]] = (), passes: int = 0) -> Decoded:
    """Return a run; `at` are (drafted, accepted) by position of the draft."""
    stats = DecodeStats()
    stats.drafted_at, stats.accepted_at = [d for d, _ in at], [a for _, a in at]
    stats.drafted, stats.accepted, stats.passes = sum(stats.drafted_at), sum(stats.accepted_at), passes
    return Decoded(list(tokens), seconds=seconds, stats=stats)


def runs(first: int = 8, drafted: int = 10, tokens: list[int] | None = None, fast: float = 2.0, **more: Any) -> Runs:
    """Return one prompt: `first` of `drafted` drafts accepted in ten passes, `fast` times as fast as plainly."""
    text = list(range(20)) if tokens is None else tokens
    plain, mtp = decoded(text, 2.0), decoded(text, 2.0 / fast if fast else 0.0, [(drafted, first)], 10)
    return Runs([PromptRun(Prompt("one", (1, 2, 3)), plain, mtp, **more)], 1)


def forced(agreement: float = 0.5, chance: float = 0.0, **more: Any) -> Forced:
    """Return what teacher forcing found at a hundred positions."""
    found = {"positions": 100, "divergence_nats": 0.1, "perplexity": {"a": 3.0, "b": 7.0}, "finite": True} | more
    return Forced(agreement=agreement, chance=chance, **found)


def invariance(logits: float = 0.0, head: float | None = None, kl: float = 0.0) -> Invariance:
    """Return how far pieces were from the whole."""
    return Invariance(140, logits, head, kl, 1.0)


DIVERGENCE = Divergence("one", 5, 7, 9, 0.01)
