"""Draft, verify, accept: decoding with a head, of either kind.

One round: the head drafts up to K tokens after the newest one; one backbone pass over the newest token and the drafts
verifies them; the accepted ones and one more token come out. What the refused ones changed is taken back exactly. What
a head needs for that is `drafter`'s: this loop does not know kinds.

The loop needs only what `DraftingModel` and `Drafter` say, so a fake model of a few lines can drive it.
Sources: architecture description, section 9; the tuples are those of mlx-lm's generators.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, Protocol

import mlx.core as mx

from .drafter import BlockDrafter, ChainDrafter, Drafter, covered, is_block_head, make_drafter, take_back
from .sampling import Draft, ExactMatch, LogitsProcessor, Rule, Sampler, Sampling, Speculative, token_id

MAX_DRAFT_DEPTH = ChainDrafter.most
"""Deepest draft of a classic head."""

MAX_BLOCK_DEPTH = BlockDrafter.most
"""Deepest draft of a DSpark head, whatever its block."""

Token = tuple[int, mx.array, bool]
"""(token id, log-probabilities [V] it was drawn from, whether the head drafted it)."""


class DraftingModel(Protocol):
    """What the loop asks of a model with a classic head; see `deepseek_v4.Model`, and `drafter` for the other kind."""

    def __call__(self, inputs: mx.array, cache: Any = None, return_hidden: bool = False) -> Any:
        """(logits [1, L, V], hidden [1, L, ...]) with `return_hidden`."""

    def mtp_forward(self, hidden: mx.array, next_tokens: mx.array, mtp_cache: Any, return_hidden: bool = False) -> Any:
        """(logits [1, L, V], hidden [1, L, ...]) with `return_hidden`."""

    def make_cache(self) -> list[Any]:
        """State of the backbone."""

    def make_mtp_cache(self) -> list[Any]:
        """State of the head; empty without a head."""


@dataclass
class DecodeStats:
    """What a run of the loop did; times in seconds."""

    prompt_tokens: int = 0
    generated: int = 0
    passes: int = 0  # backbone passes after the prompt
    drafted: int = 0
    accepted: int = 0
    drafted_at: list[int] = field(default_factory=list)  # per draft position, first draft first
    accepted_at: list[int] = field(default_factory=list)
    accepted_per_pass: list[int] = field(default_factory=list)
    estimates: list[tuple[float, bool]] = field(default_factory=list)  # of drafts that were judged: (estimate, kept)
    prompt_seconds: float = 0.0
    backbone_seconds: float = 0.0
    head_seconds: float = 0.0
    other_seconds: float = 0.0

    @property
    def acceptance(self) -> float:
        """Accepted drafts by proposed drafts; 0 where none was proposed."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_pass(self) -> float:
        """1 + mean accepted drafts per backbone pass."""
        return 1.0 + self.accepted / self.passes if self.passes else 1.0

    @property
    def decode_seconds(self) -> float:
        """Time after the prompt."""
        return self.backbone_seconds + self.head_seconds + self.other_seconds

    def count(self, drafted: int, accepted: int) -> None:
        """Add one pass."""
        self.passes += 1
        self.drafted += drafted
        self.accepted += accepted
        self.accepted_per_pass.append(accepted)
        while len(self.drafted_at) < drafted:
            self.drafted_at.append(0)
            self.accepted_at.append(0)
        for position in range(drafted):
            self.drafted_at[position] += 1
            self.accepted_at[position] += position < accepted

    def note_estimates(self, drafts: list[Draft], accepted: int) -> None:
        """Add what the head held of each draft that was judged: the accepted ones, and the first refused one."""
        judged = drafts[: accepted + 1]
        self.estimates += [(d.estimate, n < accepted) for n, d in enumerate(judged) if d.estimate is not None]


class _Clock:
    """Adds the time since its last call to one field of the statistics."""

    def __init__(self, stats: DecodeStats) -> None:
        self.stats, self.last = stats, time.perf_counter()

    def skip(self) -> None:
        """Forget the time since the last call: it was the consumer's."""
        self.last = time.perf_counter()

    def charge(self, name: str) -> None:
        """Add the time since the last call to the field `name`."""
        now = time.perf_counter()
        setattr(self.stats, name, getattr(self.stats, name) + now - self.last)
        self.last = now


class _Run:
    """State of one generation; `history` is kept for the processors only."""

    def __init__(
        self,
        drafter: Drafter,
        rule: Rule,
        processors: list[LogitsProcessor],
        backbone: list[Any],
        stats: DecodeStats,
    ) -> None:
        self.drafter, self.rule, self.processors = drafter, rule, processors
        self.backbone, self.stats = backbone, stats
        self.clock = _Clock(stats)
        self.history = mx.array([], dtype=mx.uint32)
        self.is_settled = False  # whether the caches hold whole rounds only

    # -- prompt ---------------------------------------------------------------------------------------------

    def prefill(self, prompt: list[int], step_size: int, progress: Callable[[int, int], None]) -> list[Token]:
        """Feed the prompt to backbone and head; returns the first token."""
        self.stats.prompt_tokens = len(prompt)
        progress(0, len(prompt))
        self.fill(prompt[:-1], step_size, lambda done, _: progress(done, len(prompt)))
        logits, features = self.drafter.backbone_pass(prompt[-1:], self.backbone)
        self.drafter.note_prompt(features, prompt[-1:])
        if self.processors:
            self.history = mx.array(prompt, dtype=mx.uint32)
        logprobs = self._logprobs(logits[0, -1:], [])
        token = token_id(self.rule.first(logprobs))
        progress(len(prompt), len(prompt))
        self.is_settled = True
        self.clock.charge("prompt_seconds")
        return [(token, logprobs[0], False)]

    def fill(self, tokens: list[int], step_size: int, progress: Callable[[int, int], None]) -> None:
        """Feed tokens to backbone and head, and draw none."""
        for start in range(0, len(tokens), step_size):
            part = tokens[start : start + step_size]
            _, features = self.drafter.backbone_pass(part, self.backbone)
            self.drafter.note_prompt(features, part)
            self.drafter.take_in()
            self._evaluate()
            progress(start + len(part), len(tokens))

    def _evaluate(self) -> None:
        mx.eval([cache.state for cache in self.backbone + self.drafter.caches], self.drafter.waiting())

    # -- one round ------------------------------------------------------------------------------------------

    def round(self, newest: int, depth: int) -> list[Token]:
        """Draft up to `depth` tokens after `newest`, verify them in one pass; returns the tokens that follow
        it.
        """
        self.is_settled = False
        self.drafter.note_newest(newest)
        if self.processors:
            self.history = mx.concatenate([self.history, mx.array([newest], dtype=mx.uint32)])
        drafts = self.drafter.draft(depth, self.rule, self._logprobs)
        proposed = [token_id(draft.token) for draft in drafts]
        self.clock.charge("head_seconds")
        logits, features = self.drafter.backbone_pass([newest, *proposed], self.backbone)
        mx.eval(logits, features)
        self.clock.charge("backbone_seconds")
        logprobs = self._logprobs(logits[0], drafts)
        accepted, after = self.rule.judge(logprobs, drafts)
        take_back(self.backbone, len(drafts) - accepted)
        self.drafter.note_round(features[:, : accepted + 1], proposed[:accepted])
        self.stats.count(len(drafts), accepted)
        self.stats.note_estimates(drafts, accepted)
        self.clock.charge("other_seconds")
        tokens = [*proposed[:accepted], after]
        self.is_settled = True
        return [(token, logprobs[n], n < accepted) for n, token in enumerate(tokens)]

    def _logprobs(self, logits: mx.array, drafts: list[Draft]) -> mx.array:
        """Log-probabilities of rows [n, V]; the last row is preceded by all drafts, each row before by one
        less.
        """
        if self.processors:
            rows, count = [], logits.shape[0]
            for n in range(count):
                before = [draft.token.astype(mx.uint32) for draft in drafts[: len(drafts) - count + 1 + n]]
                tokens, row = mx.concatenate([self.history, *before]), logits[n : n + 1]
                for processor in self.processors:
                    row = processor(tokens, row)
                rows.append(row)
            logits = mx.concatenate(rows)
        return logits - mx.logsumexp(logits, axis=-1, keepdims=True)

    def note(self, tokens: list[int]) -> None:
        """Add accepted drafts to the processors' history."""
        if self.processors and tokens:
            self.history = mx.concatenate([self.history, mx.array(tokens, dtype=mx.uint32)])

    # -- end ------------------------------------------------------------------------------------------------

    def close(self, tokens: list[Token], used: int) -> None:
        """Bring the caches to exactly the tokens that left: `used` of the last round's `tokens`.

        Afterwards the backbone covers the prompt and every token that left, as after mlx-lm's plain generator, and the
        head the same: a DSpark head all of them, a classic one all but the last, whose hidden state waits with it.
        """
        unused = len(tokens) - 1 - used
        if unused >= 0:
            take_back(self.backbone, unused)
            self.drafter.drop(unused)
        else:
            newest = tokens[-1][0]
            self.drafter.note_newest(newest)
            self.drafter.note_round(self.drafter.backbone_pass([newest], self.backbone)[1], [])
        self.drafter.take_in()
        self.drafter.settle()
        mx.eval([cache.state for cache in self.backbone + self.drafter.caches])


def _split_cache(model: DraftingModel, prompt_cache: list[Any] | None) -> tuple[list[Any], list[Any]]:
    """Backbone and head caches; a head that has missed positions starts empty, which costs acceptance
    only.
    """
    if prompt_cache is None:
        return model.make_cache(), model.make_mtp_cache()
    count = len(model.make_cache())
    backbone, head = prompt_cache[:count], prompt_cache[count:]
    if covered(head) != backbone[0].offset:
        head = model.make_mtp_cache()
        prompt_cache[count:] = head
    return backbone, head


def fill_cache(
    tokens: list[int],
    model: DraftingModel,
    prompt_cache: list[Any],
    *,
    prefill_step_size: int = 512,
    prompt_progress_callback: Callable[[int, int], None] | None = None,
) -> None:
    """Feed `tokens` to the backbone and, where the cache holds its state, to the head; draws nothing.

    `prompt_cache` = `make_cache() + make_mtp_cache()`, or the backbone's part alone, is continued in place. It can be
    copied afterwards, and both decoding loops go on from it as if they had been given the tokens themselves.
    """
    count = len(model.make_cache())
    progress = prompt_progress_callback or (lambda *_: None)
    if len(prompt_cache) > count:
        backbone, head = _split_cache(model, prompt_cache)
        drafter = make_drafter(model, head, backbone[0].offset)
        _Run(drafter, ExactMatch(), [], backbone, DecodeStats()).fill(tokens, prefill_step_size, progress)
        drafter.settle()
        return
    for start in range(0, len(tokens), prefill_step_size):
        part = tokens[start : start + prefill_step_size]
        model(mx.array([part]), cache=prompt_cache)
        mx.eval([cache.state for cache in prompt_cache])
        progress(start + len(part), len(tokens))


def level_cache(model: DraftingModel, prompt_cache: list[Any], most: int) -> int:
    """Take tokens back, in place, until backbone and head cover the same ones, `most` of them or fewer.

    Returns how many are covered: the text has to be fed again from there. A cache that was trimmed layer by layer (as
    mlx-lm's prompt cache does it) has lost the hidden state that the head waits for, so that the backbone has to make
    it once more. 0 where the state before them is no longer held; the cache is then of no use, and a new one is needed.
    """
    count = len(model.make_cache())
    backbone, head = prompt_cache[:count], prompt_cache[count:]
    try:
        take_back(backbone, max(0, backbone[0].offset - most))
        if head and covered(head) != backbone[0].offset:
            head[0].pending = None
            take_back(head, max(0, head[0].offset - backbone[0].offset))
            take_back(backbone, backbone[0].offset - head[0].offset)
    except ValueError:
        return 0
    return int(backbone[0].offset)


def _make_rule(sampler: Sampler | None, sampling: Sampling | None) -> Rule:
    if sampler is not None and sampling is not None:
        raise ValueError("give either a sampler (exact match) or sampling settings (probabilistic), not both")
    if sampling is not None and sampling.temp > 0:
        return Speculative(sampling)
    return ExactMatch(sampler)


def deepest(model: Any) -> int:
    """Most drafts that can be verified per pass: those of a DSpark head's block, as far as they can be taken back."""
    return min(MAX_BLOCK_DEPTH, model.args.dspark_block_size) if is_block_head(model) else MAX_DRAFT_DEPTH


def default_depth(model: Any) -> int:
    """Drafts verified per pass where nothing is said: the whole block of a DSpark head, one of a classic head."""
    return deepest(model) if is_block_head(model) else 1


@dataclass(frozen=True)
class DecodeOptions:
    """What `mtp_generate_step` takes as keywords, with the names that mlx-lm's generators have for them.

    `draft_depth` drafts are verified per pass (default: `default_depth`); with `confidence` above 0, of a DSpark head,
    up to the first whose estimated acceptance is below it. `max_tokens` -1 for no limit. With `sampling` (temp > 0)
    drafts are accepted probabilistically; else each must equal the token that `sampler` (default: greedy) draws.
    Both leave the distribution as it is without the head. `prompt_cache` = `make_cache() + make_mtp_cache()`
    is continued in place and covers, once the generator is closed, the prompt and every token yielded.
    `stats` is filled in.
    """

    draft_depth: int | None = None
    confidence: float = 0.0
    max_tokens: int = 256
    sampler: Sampler | None = None
    sampling: Sampling | None = None
    logits_processors: list[LogitsProcessor] | None = None
    prompt_cache: list[Any] | None = None
    prefill_step_size: int = 512
    prompt_progress_callback: Callable[[int, int], None] = lambda done, total: None
    stats: DecodeStats = field(default_factory=DecodeStats)

    def depth(self, model: Any) -> int:
        """Return the drafts to verify per pass. Raises ValueError on more than the head has."""
        depth = default_depth(model) if self.draft_depth is None else self.draft_depth
        if not 1 <= depth <= deepest(model):
            raise ValueError(f"draft depth {depth}: expected 1 to {deepest(model)}")
        return depth


def mtp_generate_step(
    prompt: mx.array, model: DraftingModel, stream: Any = None, **options: Any
) -> Generator[Token, None, None]:
    """Yield (token, log-probabilities [V], from_draft) after the token ids `prompt` [L], as mlx-lm's generators do.

    `options` are those of `DecodeOptions`. Raises ValueError on an empty prompt, a depth out of range, or a model
    without a head.
    """
    asked = DecodeOptions(**options)
    tokens: list[int] = prompt.tolist()  # type: ignore[assignment]
    if not tokens:
        raise ValueError("the prompt is empty: at least one token is needed")
    depth, max_tokens = asked.depth(model), asked.max_tokens
    backbone, head = _split_cache(model, asked.prompt_cache)
    if not head:
        raise ValueError("the model has no head to draft with")
    drafter = make_drafter(model, head, backbone[0].offset, asked.confidence)
    rule = _make_rule(asked.sampler, asked.sampling)
    run = _Run(drafter, rule, asked.logits_processors or [], backbone, asked.stats)
    with contextlib.nullcontext() if stream is None else mx.stream(stream):
        batch = run.prefill(tokens, asked.prefill_step_size, asked.prompt_progress_callback)
        used = 0
        try:
            while True:
                used = 0
                for token in batch:
                    used += 1
                    run.stats.generated += 1
                    yield token
                    if run.stats.generated == max_tokens:
                        return
                run.clock.skip()
                run.note([token for token, _, _ in batch[:-1]])
                left = max_tokens - run.stats.generated - 1
                batch = run.round(batch[-1][0], depth if max_tokens < 0 else min(depth, left))
        finally:
            if asked.prompt_cache is not None and run.is_settled:
                run.close(batch, used)


def plain_generate_step(
    prompt: mx.array, model: Any, stream: Any = None, *, stats: DecodeStats | None = None, **options: Any
) -> Generator[Token, None, None]:
    """mlx-lm's `generate_step` with the same tuples and statistics: (token, log-probabilities [V], False).

    `options` are those of `generate_step`; `sampling` is taken as well, in place of `sampler`.
    """
    from mlx_lm.generate import generate_step

    sampling: Sampling | None = options.pop("sampling", None)
    if sampling is not None:
        options["sampler"] = sampling.sampler()
    counted = stats if stats is not None else DecodeStats()
    counted.prompt_tokens = int(prompt.size)
    clock = _Clock(counted)
    place = {} if stream is None else {"stream": stream}
    for token, logprobs in generate_step(prompt, model, **place, **options):
        clock.charge("backbone_seconds" if counted.generated else "prompt_seconds")
        counted.passes += counted.generated > 0
        counted.generated += 1
        yield int(token), logprobs, False
        clock.charge("other_seconds")
