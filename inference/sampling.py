"""How a token is drawn, and when a draft is accepted.

Two rules. `ExactMatch` draws the backbone's token first, with any sampler, and accepts the draft that equals
it: greedy decoding, or any distribution, at the price of fewer acceptances. `Speculative` knows the settings,
so it can compare the two distributions: accept with min(1, p/q), else draw from the positive part of p - q,
normalised (Leviathan et al. 2023; Chen et al. 2023). Under both rules the tokens are distributed as without
drafts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

Sampler = Callable[[mx.array], mx.array]
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]


@dataclass(frozen=True)
class Sampling:
    """Settings of mlx-lm's sampler, in its meaning and order: top-p, min-p, top-k on log-probabilities, then
    temp.

    `temp` 0 is greedy; `top_p` 0 or 1, `min_p` 0 and `top_k` 0 switch a filter off.
    """

    temp: float = 0.0
    top_p: float = 0.0
    min_p: float = 0.0
    min_tokens_to_keep: int = 1
    top_k: int = 0

    def __post_init__(self) -> None:
        """Raise ValueError on a value outside its range."""
        bounds = {"temp": self.temp >= 0, "top_p": 0 <= self.top_p <= 1, "min_p": 0 <= self.min_p <= 1}
        bounds |= {"top_k": self.top_k >= 0, "min_tokens_to_keep": self.min_tokens_to_keep >= 1}
        for name, is_valid in bounds.items():
            if not is_valid:
                raise ValueError(f"{name}: {getattr(self, name)} is out of range")

    def sampler(self) -> Sampler:
        """mlx-lm's sampler with these settings."""
        from mlx_lm.sample_utils import make_sampler

        made: Sampler = make_sampler(self.temp, self.top_p, self.min_p, self.min_tokens_to_keep, top_k=self.top_k)
        return made

    def logits(self, logprobs: mx.array) -> mx.array:
        """Log-probabilities [..., V] filtered and divided by `temp`: what mlx-lm's sampler draws from."""
        from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p

        if 0 < self.top_p < 1:
            logprobs = apply_top_p(logprobs, self.top_p)
        if self.min_p > 0:
            logprobs = apply_min_p(logprobs, self.min_p, self.min_tokens_to_keep)
        if 0 < self.top_k < logprobs.shape[-1]:
            logprobs = apply_top_k(logprobs, self.top_k)
        return logprobs * (1.0 / self.temp)


@dataclass(frozen=True)
class Draft:
    """One drafted token, int [1], and the logits [1, V] that it was drawn from (None where the rule needs
    none). `estimate`: how likely the head holds it to be accepted if those before it are (None: it does not say).
    """

    token: mx.array
    logits: mx.array | None = None
    estimate: float | None = None


class Rule(Protocol):
    """How drafts are drawn and judged."""

    def first(self, logprobs: mx.array) -> mx.array:
        """A token int [1] from log-probabilities [1, V], without any draft."""

    def draft(self, logprobs: mx.array) -> Draft:
        """A draft from the head's log-probabilities [1, V]."""

    def judge(self, logprobs: mx.array, drafts: list[Draft]) -> tuple[int, int]:
        """Accepted drafts n and the token after them, from the backbone's rows [len(drafts) + 1, V]."""


class ExactMatch:
    """Accepts a draft that equals the token drawn from the backbone."""

    def __init__(self, sampler: Sampler | None = None) -> None:
        self.sampler = sampler or greedy

    def first(self, logprobs: mx.array) -> mx.array:
        """A token int [1] from log-probabilities [1, V], without any draft."""
        return self.sampler(logprobs)

    def draft(self, logprobs: mx.array) -> Draft:
        """The head's likeliest token: what the backbone draws most often where the two agree."""
        return Draft(greedy(logprobs))

    def judge(self, logprobs: mx.array, drafts: list[Draft]) -> tuple[int, int]:
        """Accepted drafts n and the token after them, from the backbone's rows [len(drafts) + 1, V]."""
        drawn: list[int] = self.sampler(logprobs).tolist()  # type: ignore[assignment]
        proposed = [token_id(draft.token) for draft in drafts]
        n = 0
        while n < len(proposed) and proposed[n] == drawn[n]:
            n += 1
        return n, drawn[n]


class Speculative:
    """Accepts a draft d with probability min(1, p(d) / q(d)); keeps the backbone's distribution p exactly."""

    def __init__(self, sampling: Sampling) -> None:
        if sampling.temp <= 0:
            raise ValueError("probabilistic acceptance needs temp > 0; greedy decoding uses exact match")
        self.sampling = sampling

    def first(self, logprobs: mx.array) -> mx.array:
        """A token int [1] from log-probabilities [1, V], without any draft."""
        return mx.random.categorical(self.sampling.logits(logprobs))

    def draft(self, logprobs: mx.array) -> Draft:
        """A token drawn from the head's distribution under the same settings."""
        logits = self.sampling.logits(logprobs)
        return Draft(mx.random.categorical(logits), logits)

    def judge(self, logprobs: mx.array, drafts: list[Draft]) -> tuple[int, int]:
        """Accepted drafts n and the token after them, from the backbone's rows [len(drafts) + 1, V]."""
        p = mx.softmax(self.sampling.logits(logprobs), axis=-1)
        if not drafts:
            return 0, token_id(mx.random.categorical(mx.log(p)))
        q = mx.softmax(mx.concatenate([d.logits for d in drafts if d.logits is not None]), axis=-1)
        tokens = mx.concatenate([draft.token for draft in drafts])
        accepted = accept(p[:-1], q, tokens, mx.random.uniform(shape=(len(drafts),)))
        after = mx.random.categorical(mx.log(mx.concatenate([residual(p[:-1], q), p[-1:]])))
        mx.eval(accepted, after)
        verdicts: list[bool] = accepted.tolist()  # type: ignore[assignment]
        n = verdicts.index(False) if False in verdicts else len(drafts)
        return n, token_id(after[n])


def token_id(token: mx.array) -> int:
    """The one token of an array."""
    return int(token.item())  # type: ignore[arg-type]


def greedy(logprobs: mx.array) -> mx.array:
    """Index of the largest value, first of equals: [..., V] to [...]."""
    return mx.argmax(logprobs, axis=-1)


def accept(p: mx.array, q: mx.array, tokens: mx.array, uniform: mx.array) -> mx.array:
    """Whether each draft is kept: uniform < p(d) / q(d); p, q [K, V], tokens and uniform [K], bool [K]."""
    kept = mx.take_along_axis(p, tokens[:, None], axis=-1)[:, 0]
    proposed = mx.take_along_axis(q, tokens[:, None], axis=-1)[:, 0]
    return uniform * proposed < kept


def residual(p: mx.array, q: mx.array) -> mx.array:
    """Positive part of p - q, not normalised, [K, V]; p itself where nothing is left (then no draft is
    refused).
    """
    rest = mx.maximum(p - q, 0)
    return mx.where(rest.sum(axis=-1, keepdims=True) > 0, rest, p)
