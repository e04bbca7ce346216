"""Decoding runs turned into figures: what `verify --mtp` measures of a loaded model.

Owns the prompts as token ids, how a model is loaded to be measured, and plain and MTP decoding of the same
prompts in one run. Judges nothing: thresholds and the verdict are `mtp_check`'s. Times are wall-clock seconds,
margins differences of natural logarithms.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ds4convert.inference import tokens
from ds4convert.inference.decode import DecodeStats, Token, mtp_generate_step, plain_generate_step
from ds4convert.inference.load import MemoryEstimate, free_memory_bytes, memory_estimate, read_config

if TYPE_CHECKING:
    from ds4convert.inference.deepseek_v4.model import Model
    from ds4convert.inference.several.ranks import Team


WARM_UP_TOKENS = 8
"""New tokens of the unmeasured first run of both ways of decoding."""

DENSE_SHARE = 0.5
"""Part of the free memory that the dense float32 model may take; beyond it the packed model runs in bfloat16."""

ID_PROMPT_LENGTHS = (7, 40, 90, 150)
"""Tokens of the prompts that stand in where a folder has no tokenizer; the last crosses a window of 128."""


# ------------------------------------------------------------------ prompts


@dataclass(frozen=True)
class Prompt:
    """One prompt; `is_text` tells whether its ids are a text of the model's language."""

    name: str
    ids: tuple[int, ...]
    is_text: bool = True


def id_prompts(vocab_size: int) -> list[Prompt]:
    """Prompts made from the vocabulary's size alone, for a folder without a tokenizer: equal on every machine.

    A linear congruential generator (Numerical Recipes' constants) picks ids from 2 up (0 and 1 are special
    tokens in every checkpoint of the family).
    """
    prompts, state = [], 1
    for length in ID_PROMPT_LENGTHS:
        ids = []
        for _ in range(length):
            state = (1664525 * state + 1013904223) % 2**32
            ids.append(2 + (state >> 8) % (vocab_size - 2))
        prompts.append(Prompt(f"ids-{length}", tuple(ids), is_text=False))
    return prompts


def encoder(folder: Path) -> Callable[[str], list[int]] | None:
    """What turns text into token ids, as every command does it; None without a tokenizer.json."""
    if not os.path.lexists(folder / tokens.TOKENIZER):
        return None
    tokenizer = tokens.read_tokenizer(folder)
    return lambda text: tokens.encode(tokenizer, text)


def speller(folder: Path) -> Callable[[Sequence[int]], list[str]]:
    """What turns token ids into the text that each adds to those before it; without a tokenizer.json, into numbers.

    Of a character that several tokens make up, the last one has the text, the others "".
    """
    if not os.path.lexists(folder / tokens.TOKENIZER):
        return lambda ids: [f"{n} " for n in ids]
    tokenizer = tokens.read_tokenizer(folder)

    def spell(ids: Sequence[int]) -> list[str]:
        out, told = [], ""
        for end in range(1, len(ids) + 1):
            text = str(tokenizer.decode(list(ids[:end])))
            is_whole = end == len(ids) or not text.endswith("\ufffd")
            out.append(text[len(told) :] if is_whole else "")
            told = text if is_whole else told
        return out

    return spell


def stop_tokens(folder: Path) -> frozenset[int]:
    """Ids that end a text, as every command has them (`tokens.stop_tokens`)."""
    return tokens.stop_tokens(folder, read_config(folder))


# ------------------------------------------------------------------ how to compute


@dataclass(frozen=True)
class Compute:
    """How a model is loaded, what that needs, and what is free (None where the system does not say); bytes."""

    dtype: str
    dense: bool
    needed_bytes: int
    free_bytes: int | None

    @property
    def fits(self) -> bool:
        """Whether the need is within the free memory."""
        return self.free_bytes is None or self.needed_bytes <= self.free_bytes


def choose_compute(folder: Path, context: int, dtype: str | None = None, ranks: Team | None = None) -> Compute:
    """How to load a folder: dense float32 where half of the free memory holds it, else packed bfloat16.

    Quantized products are slow on a CPU, so matrices are dequantized there; on a GPU they stay packed. `dtype`
    states the dtype instead.
    """
    free = free_memory_bytes()
    room = (free if free is not None else 1 << 62) * DENSE_SHARE
    wanted = dtype or "float32"
    estimate = memory_estimate(folder, context, wanted, ranks=ranks)
    on_cpu = mx.default_device() == mx.cpu
    dense = _dense_bytes(folder, estimate, wanted)
    if on_cpu and dense <= room:
        return Compute(wanted, True, dense, free)
    if dtype is None and estimate.total_bytes > room:
        wanted = "bfloat16"
        estimate = memory_estimate(folder, context, wanted, ranks=ranks)
    return Compute(wanted, False, estimate.total_bytes, free)


def _dense_bytes(folder: Path, estimate: MemoryEstimate, dtype: str) -> int:
    """Upper bound of the bytes held while every matrix is dequantized: as if all weights had the fewest bits."""
    table = read_config(folder).get("quantization") or {}
    entries = [table, *(value for value in table.values() if isinstance(value, dict))]
    bits = min((entry["bits"] for entry in entries if isinstance(entry.get("bits"), int)), default=4)
    width = {"float32": 32, "bfloat16": 16}[dtype]
    return estimate.weight_bytes * (width // max(1, bits) + 1) + estimate.cache_bytes


# ------------------------------------------------------------------ decoding


@dataclass(frozen=True)
class Divergence:
    """First new token at which MTP decoding leaves plain decoding; `position` counts new tokens from 0.

    `top2_margin`: log-probability of the plain token less that of the runner-up.
    """

    prompt: str
    position: int
    plain_token: int
    mtp_token: int
    top2_margin: float


@dataclass
class Decoded:
    """New tokens of one run, and the seconds from the first of them to the last.

    `places`: which draft of its pass each token was, from 1; 0 of a token that the backbone made itself.
    """

    tokens: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    rows: list[mx.array] = field(default_factory=list)  # log-probabilities [V] of each token
    seconds: float = 0.0
    stats: DecodeStats = field(default_factory=DecodeStats)

    @property
    def timed_tokens(self) -> int:
        """Tokens that `seconds` produced: all but the first, which belongs to the prompt."""
        return max(0, len(self.tokens) - 1)


@dataclass
class PromptRun:
    """Both ways of decoding one prompt; `mtp` is None where there is no head."""

    prompt: Prompt
    plain: Decoded
    mtp: Decoded | None = None
    divergence: Divergence | None = None
    finite: bool = True


@dataclass
class Runs:
    """All prompts decoded; the figures add up over them."""

    runs: list[PromptRun]
    depth: int

    def _mtp(self) -> list[Decoded]:
        return [run.mtp for run in self.runs if run.mtp is not None]

    @property
    def drafted(self) -> int:
        """Drafts proposed."""
        return sum(d.stats.drafted for d in self._mtp())

    @property
    def accepted(self) -> int:
        """Drafts accepted."""
        return sum(d.stats.accepted for d in self._mtp())

    @property
    def passes(self) -> int:
        """Backbone passes after the prompts, with the head."""
        return sum(d.stats.passes for d in self._mtp())

    @property
    def acceptance(self) -> float:
        """Accepted by proposed drafts; 0 where none was proposed."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def first_acceptance(self) -> float:
        """Acceptance of the first draft of each pass, which says of the head the same at every draft depth."""
        drafted, accepted = self.positions()[0]
        return accepted / drafted if drafted else 0.0

    @property
    def tokens_per_pass(self) -> float:
        """1 + mean accepted drafts per backbone pass."""
        return 1.0 + self.accepted / self.passes if self.passes else 1.0

    def positions(self) -> list[tuple[int, int]]:
        """(proposed, accepted) per draft position; a draft behind a refused one counts as refused."""
        out = [[0, 0] for _ in range(self.depth)]
        for decoded in self._mtp():
            for n, (drafted, accepted) in enumerate(
                zip(decoded.stats.drafted_at, decoded.stats.accepted_at, strict=True)
            ):
                out[n][0] += drafted
                out[n][1] += accepted
        return [(a, b) for a, b in out]

    def estimates(self) -> list[tuple[float, bool]]:
        """What a DSpark head held of each judged draft, and whether it was accepted; empty for a classic head."""
        return [pair for decoded in self._mtp() for pair in decoded.stats.estimates]

    @property
    def plain_rate_tok_s(self) -> float:
        """Tokens per second after the prompt, plain."""
        return _rate([run.plain for run in self.runs])

    @property
    def mtp_rate_tok_s(self) -> float:
        """Tokens per second after the prompt, with the head."""
        return _rate(self._mtp())

    @property
    def first_divergence(self) -> Divergence | None:
        """The first prompt's first divergence."""
        return next((run.divergence for run in self.runs if run.divergence), None)

    @property
    def common_token_share(self) -> float:
        """Share of the commonest new token: what a head that always proposed it would be accepted."""
        tokens = [token for run in self.runs for token in run.plain.tokens]
        return max((tokens.count(t) for t in set(tokens)), default=0) / max(1, len(tokens))

    @property
    def finite(self) -> bool:
        """Whether no log-probability of a drawn token was NaN or infinite."""
        return all(run.finite for run in self.runs)


def _rate(runs: Sequence[Decoded]) -> float:
    seconds = sum(d.seconds for d in runs)
    return sum(d.timed_tokens for d in runs) / seconds if seconds > 0 else 0.0


@dataclass(frozen=True)
class How:
    """How prompts are decoded: with `depth` drafts per pass, as far as `confidence` goes.

    A text ends after `max_tokens`, or at a token of `stop`. Prompts of ids go on to `max_tokens`, as their ids have no
    meaning. `with_head` false decodes plainly alone.
    """

    depth: int
    max_tokens: int
    confidence: float = 0.0
    stop: frozenset[int] = frozenset()
    with_head: bool = True


def decode_prompts(
    model: Model, prompts: Sequence[Prompt], how: How, progress: Callable[[str], None] = lambda name: None
) -> Runs:
    """Decode every prompt greedily, plain and (with a head) with drafts, in alternating order after a warm-up."""
    how = replace(how, with_head=how.with_head and model.head.present)
    _both(model, prompts[0], replace(how, max_tokens=min(how.max_tokens, WARM_UP_TOKENS), stop=frozenset()), True)
    runs = []
    for number, prompt in enumerate(prompts):
        runs.append(_both(model, prompt, how if prompt.is_text else replace(how, stop=frozenset()), number % 2 == 0))
        progress(prompt.name)
    return Runs(runs, how.depth)


def _both(model: Model, prompt: Prompt, how: How, plain_first: bool) -> PromptRun:
    def plain() -> Decoded:
        stats = DecodeStats()
        steps = plain_generate_step(mx.array(prompt.ids), model, max_tokens=how.max_tokens, stats=stats)
        return _timed(steps, how.stop, stats)

    def drafting() -> Decoded | None:
        if not how.with_head:
            return None
        stats = DecodeStats()
        options: dict[str, Any] = {name: getattr(how, name) for name in ("confidence", "max_tokens")}
        steps = mtp_generate_step(mx.array(prompt.ids), model, stats=stats, draft_depth=how.depth, **options)
        return _timed(steps, how.stop, stats)

    if plain_first:
        first, second = plain(), drafting()
    else:
        second, first = drafting(), plain()
    run = PromptRun(prompt, first, second)
    run.finite = all(_is_finite(d) for d in (first, second) if d is not None)
    run.divergence = _divergence(prompt.name, first, second) if second is not None else None
    for decoded in (first, second):
        if decoded is not None:
            decoded.rows = []
    return run


def _timed(steps: Iterable[Token], stop: frozenset[int], stats: DecodeStats) -> Decoded:
    out = Decoded(stats=stats)
    start = last = 0.0
    for token, row, is_draft in steps:  # a pass ends with a token of the backbone, so its drafts follow one
        last = time.perf_counter()
        if not out.tokens:
            start = last
        out.tokens.append(token)
        out.places.append((out.places[-1] if out.places else 0) + 1 if is_draft else 0)
        out.rows.append(row)
        if token in stop:
            break
    out.seconds = last - start
    return out


def _is_finite(decoded: Decoded) -> bool:
    """Whether the log-probability of each drawn token is a number (NaN anywhere in a row makes it one)."""
    return all(bool(mx.isfinite(row[token]).item()) for token, row in zip(decoded.tokens, decoded.rows, strict=True))


def _divergence(name: str, plain: Decoded, mtp: Decoded) -> Divergence | None:
    for at, (a, b) in enumerate(zip(plain.tokens, mtp.tokens, strict=False)):
        if a != b:
            best = mx.sort(plain.rows[at].astype(mx.float32))[-2:]
            return Divergence(name, at, a, b, float((best[1] - best[0]).item()))  # type: ignore[arg-type]
    return None
