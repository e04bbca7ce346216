"""The DSpark head: a few V4 blocks that draft a whole block of tokens in one pass.

A block is the newest token (the anchor, at position p) and copies of a noise token. Its slots see the past through
context keys, made from hidden states that are tapped in the backbone, and each other without any mask; slot i predicts
the token at p + i + 1. A table of rank r then adds to each slot what follows the token before it (Markov bias), from
left to right, and one row estimates whether the draft will be accepted. Only committed positions enter the context, so
nothing is ever taken back here but by a prompt cache.

Shapes: W window, S stages, T tapped layers, n positions, S' slots of a block, M streams, D hidden size, d head width,
r Markov rank, V vocabulary; one sequence at a time. Source: DSpark description, sections 2 (taps) to 4 (block).
"""

# mlx.nn carries no types that mypy can see, so these checks would only repeat that.
# mypy: disable-error-code="attr-defined,name-defined,misc,no-any-return"

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .attention import Attention, Keys, attend
from .block import DeepseekV4Block
from .cache import ContextCache
from .config import ModelArgs
from .layers import HyperHead, Rope, Step, Table, Trace, rotate


def tap(streams: mx.array) -> mx.array:
    """What the head reads of one layer: the mean of its streams, [1, n, M, D] to [1, n, D]."""
    return streams.astype(mx.float32).mean(axis=2).astype(streams.dtype)


def tapped_states(targets: Sequence[int]) -> list[int]:
    """How many layers each tapped state has passed: the OUTPUT of layer l is the state after l + 1 of them."""
    return [layer + 1 for layer in targets]


def visible_context(position: int, window: int) -> tuple[int, int]:
    """First position and number of the context keys that a block at `position` sees: exactly W, ending before it."""
    start = max(0, position - window)
    return start, position - start


def block_mask(slots: int) -> mx.array | None:
    """Which slots see which, bool [slots, slots]; None: all of them see all, later ones too."""
    return None


def _held(cache: ContextCache, window: int) -> list[Keys]:
    """The context keys that a block at the cache's position sees."""
    start, count = visible_context(cache.offset, window)
    start, count = max(start, cache.first), count - max(0, cache.first - start)
    return [Keys(cache.window.read(start, count), None)] if count > 0 else []


@dataclass(frozen=True)
class SharedContext:
    """Context keys [1, L, d] of one stage for a whole text, seen by blocks at N of its positions, anchors [N]."""

    values: mx.array
    anchors: mx.array

    def keys(self, window: int) -> Keys:
        """For each block the keys of the W positions before it, [N, W, d]; those before the text are masked."""
        places = self.anchors[:, None] - window + mx.arange(window)
        return Keys(self.values[0][mx.maximum(places, 0)], (places >= 0)[:, None])


Context = ContextCache | SharedContext


class SharedStep(Step):
    """Positions of blocks at N places: each its own table."""

    def __init__(self, anchors: mx.array, slots: int) -> None:
        super().__init__(0, slots)
        self.anchors = anchors

    def table(self, rope: Rope) -> Table:
        """Cosines and sines [N, slots, dims/2]."""
        table: Table = self.memo((rope, "tokens"), lambda: rope.table(self.anchors[:, None], self.length))
        return table


class BlockAttention(Attention):
    """Attention of a stage: queries of a block over the context, and over all slots of the block itself."""

    def __init__(self, args: ModelArgs, layer: int) -> None:
        super().__init__(args, layer, Rope(args.qk_rope_head_dim, args.rope_theta))

    def __call__(self, x: mx.array, cache: Context, step: Step) -> mx.array:  # type: ignore[override]
        """x [N, slots, D] (after attn_norm) to [N, slots, D]; the context is only read."""
        queries = self._queries(self.q_norm(self.wq_a(x)), step)
        parts = [Keys(self.keys(x, step), block_mask(step.length))]
        if isinstance(cache, SharedContext):
            parts.append(cache.keys(self.window))
        else:
            parts += _held(cache, self.window)
        output = attend(queries, parts, self.attn_sink)
        return self._project(rotate(output, step.table(self.rope), inverse=True))

    def keys(self, x: mx.array, step: Step) -> mx.array:
        """Keys (which are the values too) [1, n, d] of x [1, n, D] at the positions of `step`."""
        return rotate(self.kv_norm(self.wkv(x)), step.table(self.rope))


class MarkovHead(nn.Module):
    """A bigram table of low rank: w2 w1[token] is added to the logits of the token after it, in float32."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.markov_w1 = nn.Embedding(args.vocab_size, args.dspark_markov_rank)
        self.markov_w2 = nn.Linear(args.dspark_markov_rank, args.vocab_size, bias=False)

    def rows(self, tokens: mx.array) -> mx.array:
        """Rows of the first table, float32 [n, r], of tokens [n]."""
        return self.markov_w1(tokens).astype(mx.float32)

    def bias(self, rows: mx.array) -> mx.array:
        """Logits to be added, float32 [n, V], from rows [n, r]."""
        return rows @ self.markov_w2.weight.astype(mx.float32).T


class ConfidenceHead(nn.Module):
    """Estimates whether a draft will be accepted, given that those before it are."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.proj = nn.Linear(args.hidden_size + args.dspark_markov_rank, 1, bias=False)

    def __call__(self, hidden: mx.array, rows: mx.array) -> mx.array:
        """Logits float32 [n], from what the HyperHead gives [n, D] (before the norm) and Markov rows [n, r]."""
        joined = mx.concatenate([hidden.astype(mx.float32), rows], axis=-1)
        return (joined @ self.proj.weight.astype(mx.float32).T)[:, 0]


class DSparkStage(DeepseekV4Block):
    """One stage: a block of ratio 0; the first also condenses taps, the last has what makes drafts of streams."""

    def __init__(self, args: ModelArgs, stage: int, stages: int) -> None:
        layer = args.num_hidden_layers + stage
        super().__init__(args, layer)
        self.attn = BlockAttention(args, layer)
        if stage == 0:
            taps = len(args.dspark_target_layer_ids) * args.hidden_size
            self.main_proj = nn.Linear(taps, args.hidden_size, bias=False)
            self.main_norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        if stage == stages - 1:
            self.norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
            self.hc_head = HyperHead(args)
            self.markov_head = MarkovHead(args)
            self.confidence_head = ConfidenceHead(args)


@dataclass(frozen=True)
class DraftBlock:
    """One pass of the head: logits without Markov bias float32 [slots, V], hidden [slots, D] before the norm.

    `anchor` is the newest token; `last` the stage that biases and estimates. Slots are drafted from left to right.
    """

    anchor: int
    base: mx.array
    hidden: mx.array
    last: Any

    def before(self, slot: int, drafts: list[mx.array]) -> mx.array:
        """The token before draft `slot`, int [1]: the anchor, then the draft before it."""
        return drafts[slot - 1] if slot else mx.array([self.anchor])

    def logits(self, slot: int, drafts: list[mx.array]) -> mx.array:
        """Logits float32 [1, V] of draft `slot`, given the drafts before it (each int [1])."""
        rows = self.last.markov_head.rows(self.before(slot, drafts))
        return self.base[slot : slot + 1] + self.last.markov_head.bias(rows)

    def confidence(self, drafts: list[mx.array]) -> mx.array:
        """Raw confidence float32 [k] of the first k drafts; its sigmoid estimates their acceptance one by one.

        It depends on the tokens before each draft only, so that a choice made by it leaves samples unbiased.
        """
        before = mx.concatenate([self.before(slot, drafts) for slot in range(len(drafts))])
        return self.last.confidence_head(self.hidden[: len(drafts)], self.last.markov_head.rows(before))


class DSpark:
    """The stages of a model's head together with what they share with its backbone: embedding and output matrix."""

    def __init__(
        self, stages: list[DSparkStage], args: ModelArgs, embed: nn.Module, logits: Callable[[mx.array], mx.array]
    ) -> None:
        self.stages, self.args, self.embed, self.output = stages, args, embed, logits

    def condense(self, taps: mx.array) -> mx.array:
        """Taps [1, n, T * D] to what all stages make their context keys of, [1, n, D]."""
        return self.stages[0].main_norm(self.stages[0].main_proj(taps))

    def append(self, taps: mx.array, caches: list[ContextCache]) -> None:
        """Add the context keys of the next n committed positions, from their taps [1, n, T * D]."""
        condensed, step = self.condense(taps), self.context_step(caches[0].offset, taps.shape[1])
        for stage, cache in zip(self.stages, caches, strict=True):
            cache.window.write(step.offset, stage.attn.keys(condensed, step))
            cache.advance(taps.shape[1])

    def context_step(self, position: int, count: int) -> Step:
        """Positions of `count` context keys, the first at `position`: those of the backbone."""
        return Step(position, count)

    def block_step(self, position: int, trace: Trace | None) -> Step:
        """Positions of a block's slots: the anchor's, and those that follow."""
        return Step(position, self.args.dspark_block_size, trace)

    def block(self, anchor: int, caches: list[ContextCache], trace: Trace | None = None) -> DraftBlock:
        """Draft a whole block after `anchor`, which is at the position that the context ends before.

        Slots see each other both ways, so a narrower block would change every draft: to verify fewer, use fewer.
        """
        slots = self.args.dspark_block_size
        tokens = mx.array([[anchor, *[self.args.dspark_noise_token_id] * (slots - 1)]])
        embedded = self.embed(tokens).astype(self.stages[-1].norm.weight.dtype)
        streams = mx.repeat(embedded[:, :, None], self.args.hc_mult, axis=2)
        step = self.block_step(caches[0].offset, trace)
        for number, (stage, cache) in enumerate(zip(self.stages, caches, strict=True)):
            streams = stage(streams, tokens, cache, step)
            if trace is not None:
                trace("stage", number, streams)
        last = self.stages[-1]
        hidden = last.hc_head(streams)
        return DraftBlock(anchor, self.output(last.norm(hidden))[0], hidden[0], last)

    def blocks(self, tokens: mx.array, taps: mx.array, anchors: mx.array) -> tuple[mx.array, mx.array]:
        """Base logits [N, slots, V] and hidden [N, slots, D] of blocks at `anchors` [N], positions of the text `tokens`
        [L] whose taps are [1, L, T * D]: each sees what it would see in decoding, none sees another.
        """
        slots, length = self.args.dspark_block_size, taps.shape[1]
        step = self.context_step(0, length)
        condensed = self.condense(taps)
        noise = mx.full((anchors.size, slots - 1), self.args.dspark_noise_token_id, dtype=mx.int32)
        filled = mx.concatenate([tokens.astype(mx.int32)[anchors][:, None], noise], axis=1)
        streams = self.embed(filled).astype(self.stages[-1].norm.weight.dtype)
        streams = mx.repeat(streams[:, :, None], self.args.hc_mult, axis=2)
        shared = SharedStep(anchors, slots)
        for stage in self.stages:
            context: Any = SharedContext(stage.attn.keys(condensed, step), anchors)
            streams = stage(streams, filled, context, shared)
        last = self.stages[-1]
        hidden = last.hc_head(streams)
        return self.output(last.norm(hidden)), hidden
