"""Attention of DeepSeek-V4.1: V4's, with compressed entries that some layers make and others read.

A pass hands on, from layer to layer, whose entries are read and which of them each position has chosen. Shapes: B
batch, L tokens of this pass, R rows of a block of queries, d head width, N entries. Source: the reference on V4.1,
section 4, and the official code that it names.
"""

# mlx.nn carries no types that mypy can see, so these checks would only repeat that.
# mypy: disable-error-code="attr-defined,name-defined,misc,no-any-return,override,str-unpack,union-attr"

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..deepseek_v4 import attention as v4
from ..deepseek_v4.attention import BLOCK_FLOATS, Keys
from ..deepseek_v4.cache import SPARE, Entries
from ..deepseek_v4.layers import Rope, Step, Trace, rotate
from .cache import SourceCache
from .config import ModelArgs


@dataclass
class Handed:
    """What layers of one pass hand on: entries and index keys of the nearest source, and the choice among them.

    `picks` [B, L, k] are numbers of entries, -1 where fewer can be seen; None: all entries are seen. `blocks`
    [B, L, k] are the blocks of entries to choose among, likewise.
    """

    entries: Entries | None = None
    keys: Entries | None = None
    picks: mx.array | None = None
    blocks: mx.array | None = None


class Pass(Step):
    """What all layers of one pass share."""

    def __init__(self, offset: int, length: int, trace: Trace | None = None) -> None:
        super().__init__(offset, length, trace)
        self.handed = Handed()

    def visible(self, ratio: int) -> mx.array:
        """How many entries each position sees, int32 [L]: those whose tokens all lie up to it."""
        found: mx.array = self.memo(("visible", ratio), lambda: (self.positions() + 1) // ratio)
        return found


class Compressor(v4.Compressor):
    """Turns every `ratio` tokens into one entry; a ratio of 1 only projects."""

    def __init__(self, args: ModelArgs, ratio: int) -> None:
        nn.Module.__init__(self)
        self.wkv = nn.Linear(args.hidden_size, args.head_dim, bias=False)
        if ratio > 1:
            self.wgate = nn.Linear(args.hidden_size, args.head_dim, bias=False)
        self.norm = nn.RMSNorm(args.head_dim, eps=args.rms_norm_eps)
        self.ratio = ratio

    def latents(self, x: mx.array, cache: SourceCache, step: Step) -> mx.array | None:
        """The entries [B, n, d] that x [B, L, D] completes, not rotated yet; None where it completes none."""
        if cache.main is None:
            return self.norm(self.wkv(x))
        wide, state = x.astype(mx.float32), cache.main
        values, gates = self.wkv(wide), self.wgate(wide)
        last, found = (step.offset + step.length) // self.ratio, None
        if last > step.offset // self.ratio:
            pooled = self._pool(*self._windows(values, gates, state, step, last), state.overlap)
            found = self.norm(pooled.astype(x.dtype))
        state.values.write(step.offset, values)
        state.gates.write(step.offset, gates)
        return found


class Indexer(v4.Indexer):
    """Chooses which entries a position sees; in a source of entries it also makes their keys."""

    def __init__(self, args: ModelArgs, layer: int) -> None:
        nn.Module.__init__(self)
        self.heads, self.width, self.topk = args.index_n_heads, args.index_head_dim, args.index_topk
        self.wq_b = nn.Linear(args.q_lora_rank, self.heads * self.width, bias=False)
        self.weights_proj = nn.Linear(args.hidden_size, self.heads, bias=False)
        if args.made_ratio(layer):
            self.wk = nn.Linear(args.head_dim, self.width, bias=False)
            self.k_norm = nn.RMSNorm(self.width, eps=args.rms_norm_eps)
        self.is_candidate_source = layer == args.candidate_source_layer_id
        self.uses_candidates = args.uses_candidates(layer)
        self.most_blocks, self.block = args.candidate_topk_blocks, args.candidate_block_size

    def scores(self, queries: mx.array, weights: mx.array, keys: mx.array, visible: mx.array) -> mx.array:
        """Score float32 [B, R, N] of every entry for queries [B, R, heads, width]; -inf where it is not seen."""
        batch, rows = queries.shape[:2]
        found = queries.reshape(batch, -1, self.width) @ keys.swapaxes(-1, -2)
        found = mx.maximum(found.astype(mx.float32), 0).reshape(batch, rows, self.heads, -1)
        return mx.where(mx.arange(keys.shape[1]) < visible[:, None], (weights @ found).squeeze(-2), -mx.inf)

    def best_blocks(self, scores: mx.array, visible: mx.array) -> mx.array | None:
        """The best blocks [B, R, k] of entries by their best score, the newest always among them; None: all are."""
        count = -(-scores.shape[-1] // self.block)
        if count <= self.most_blocks:
            return None
        padded = mx.pad(scores, [(0, 0), (0, 0), (0, count * self.block - scores.shape[-1])], constant_values=-mx.inf)
        best = padded.reshape(*scores.shape[:2], count, self.block).max(axis=-1)
        newest = mx.arange(count) == ((visible - 1) // self.block)[:, None]
        best = mx.where(newest, mx.inf, best)
        return _largest(best, self.most_blocks)

    def within(self, scores: mx.array, blocks: mx.array | None) -> mx.array:
        """Scores with all entries outside of `blocks` [B, R, k] left out."""
        if blocks is None:
            return scores
        count = -(-scores.shape[-1] // self.block)
        # Block numbers of -1 go to a column behind the last one, which is cut off.
        places = mx.where(blocks < 0, count, blocks)
        kept = mx.zeros((*scores.shape[:2], count + 1), dtype=mx.bool_)
        kept = mx.put_along_axis(kept, places, mx.array(True), axis=-1)[..., :count]
        return mx.where(mx.repeat(kept, self.block, axis=-1)[..., : scores.shape[-1]], scores, -mx.inf)

    def best(self, scores: mx.array) -> mx.array | None:
        """Numbers [B, R, topk] of the best entries; -1 for those that were left out. None: all are among the best."""
        if scores.shape[-1] <= self.topk:
            return None
        return _largest(scores, self.topk)


def _largest(values: mx.array, count: int) -> mx.array:
    """Places int32 [..., count] of the largest values [..., n]; -1 for those that are -inf."""
    picks = mx.argpartition(-values, count - 1, axis=-1)[..., :count].astype(mx.int32)
    return mx.where(mx.take_along_axis(values, picks, axis=-1) > -mx.inf, picks, -1)


class PlainQueries:
    """Queries as V4.1 has them: rotated, and not normed by head."""

    def _queries(self: Any, low: mx.array, step: Step) -> mx.array:
        queries = self.wq_b(low).reshape(*low.shape[:-1], self.heads, self.width)
        return rotate(queries, step.table(self.rope))


class Attention(PlainQueries, v4.Attention):
    """Attention over the layer's own window and over the entries of the nearest source."""

    def __init__(self, args: ModelArgs, layer: int) -> None:
        ratio = args.ratio(layer)
        base = args.compress_rope_theta if ratio else args.rope_theta
        rope = Rope(args.qk_rope_head_dim, base, args.rope_scaling if ratio else None)
        super().__init__(args, layer, rope)
        if ratio:
            del self.compressor  # V4 has one in every such layer
        if made := args.made_ratio(layer):
            self.compressor = Compressor(args, made)
        if ratio and layer in args.index_source_layer_ids:
            self.indexer = Indexer(args, layer)

    def _take_in(self, x: mx.array, low: mx.array, cache: SourceCache, step: Pass) -> None:
        """Make entries and choose among them, where this layer does; both go into what the pass hands on."""
        if "compressor" in self:
            self._make(x, cache, step)
        if "indexer" in self:
            self._choose(x, low, step)

    def _make(self, x: mx.array, cache: SourceCache, step: Pass) -> None:
        """Write the entries that x completes, and their index keys, into the cache."""
        assert cache.entries is not None and cache.keys is not None
        latents = self.compressor.latents(x, cache, step)
        if latents is not None:
            first = step.offset // self.ratio
            table = step.entry_table(self.rope, self.ratio, first, latents.shape[1])
            keys = self.indexer.k_norm(self.indexer.wk(latents))
            cache.keys.write(first, rotate(keys, table))
            cache.entries.write(first, rotate(latents, table))
        step.handed.entries, step.handed.keys = cache.entries, cache.keys

    def _choose(self, x: mx.array, low: mx.array, step: Pass) -> None:
        """Choose for every position; a pass in which all entries can be seen needs no choice."""
        handed, indexer = step.handed, self.indexer
        count, visible = (step.offset + step.length) // self.ratio, step.visible(self.ratio)
        handed.picks = None
        handed.blocks = None if indexer.is_candidate_source else handed.blocks
        if count > indexer.topk or (indexer.is_candidate_source and count > indexer.most_blocks * indexer.block):
            assert handed.keys is not None
            asked, keys = indexer.prepare(x, low, step, self.rope), handed.keys.first(count)
            picks, blocks = [], []
            rows = step.length if step.length <= SPARE + 1 else max(1, BLOCK_FLOATS // (count * indexer.heads))
            for start in range(0, step.length, rows):
                part = slice(start, start + rows)
                scores = indexer.scores(asked[0][:, part], asked[1][:, part], keys, visible[part])
                if indexer.is_candidate_source:
                    blocks.append(indexer.best_blocks(scores, visible[part]))
                elif indexer.uses_candidates and handed.blocks is not None:
                    scores = indexer.within(scores, handed.blocks[:, part])
                picks.append(indexer.best(scores))
            handed.picks = None if picks[0] is None else mx.concatenate(picks, axis=1)
            handed.blocks = handed.blocks if not blocks or blocks[0] is None else mx.concatenate(blocks, axis=1)
        if step.trace is not None and count:
            seen = mx.where(mx.arange(count) < visible[-1], mx.arange(count), -1)[None]
            step.trace("entries", self.layer, seen if handed.picks is None else handed.picks[:, -1])

    def _entries(self, index: None, cache: SourceCache, step: Pass, start: int, end: int) -> list[Keys]:
        """Compressed keys for the queries start..end-1 of this pass."""
        count = (step.offset + end) // self.ratio if self.ratio else 0
        if count == 0:
            return []
        entries = step.handed.entries
        assert entries is not None
        if step.handed.picks is not None:
            picks = step.handed.picks[:, start:end]
            return [Keys(entries.gather(mx.maximum(picks, 0)), picks >= 0)]
        mask = mx.arange(count) < step.visible(self.ratio)[start:end, None]
        return [Keys(entries.first(count), None if end - start == 1 else mask)]

    def _block_rows(self, step: Pass, cache: SourceCache) -> int:
        """Queries per block, so that scores and chosen keys stay within BLOCK_FLOATS; short passes are one block."""
        if step.length <= SPARE + 1:
            return step.length
        picks = step.handed.picks
        chosen = picks.shape[-1] if picks is not None else 0
        keys = 2 * self.window + (chosen or (step.offset + step.length) // max(self.ratio, 1) * bool(self.ratio))
        return max(16, min(256, BLOCK_FLOATS // (keys * self.heads + chosen * self.width)))
