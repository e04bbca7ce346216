"""Attention with a sliding window, compressed entries and sinks; compressor and indexer.

Shapes: B batch, L tokens of this pass, R rows of a block of queries, H heads, d head width, N keys. Sources:
architecture description, sections 5 (attention), 6 (compressor), 7 (indexer). The Hadamard rotation of the
indexer is left out: it is orthonormal and on both sides, so it changes nothing without FP4 simulation.
"""

# mlx.nn carries no types that mypy can see, so these checks would only repeat that.
# mypy: disable-error-code="attr-defined,name-defined,misc,no-any-return,str-unpack,union-attr"

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from .cache import SPARE, CompressorState, LayerCache
from .config import OVERLAP_RATIO, ModelArgs
from .layers import Rope, Step, rotate

BLOCK_FLOATS = 1 << 25
"""Scores held at once while a long prompt is processed; decides how many queries form a block."""


@dataclass(frozen=True)
class Keys:
    """Keys that are also the values: shared [B, N, d] or one set per query [B, R, N, d]; mask [.., R, N] or
    None.
    """

    values: mx.array
    mask: mx.array | None

    def scores(self, queries: mx.array, scale: float) -> mx.array:
        """Products with queries [B, R, H, d] times `scale`, masked, float32 [B, R, H, N]."""
        batch, rows, heads, width = queries.shape
        if self.values.ndim == 3:
            flat = queries.reshape(batch, rows * heads, width) @ self.values.swapaxes(-1, -2)
            scores = flat.reshape(batch, rows, heads, -1)
        else:
            scores = queries @ self.values.swapaxes(-1, -2)
        scores = scores.astype(mx.float32) * scale
        return scores if self.mask is None else mx.where(self.mask[..., None, :], scores, -mx.inf)

    def weighted(self, weights: mx.array) -> mx.array:
        """Sum of the values by weights [B, R, H, N]: [B, R, H, d]."""
        if self.values.ndim == 4:
            return weights @ self.values
        batch, rows, heads, count = weights.shape
        return (weights.reshape(batch, rows * heads, count) @ self.values).reshape(batch, rows, heads, -1)


def attend(queries: mx.array, parts: list[Keys], sink: mx.array) -> mx.array:
    """One softmax over all keys and the sink, which has no value and no scale: [B, R, H, d] to [B, R, H,
    d].
    """
    scores = [part.scores(queries, queries.shape[-1] ** -0.5) for part in parts]
    edge = mx.broadcast_to(sink.astype(mx.float32)[:, None], (*queries.shape[:-1], 1))
    weights = mx.softmax(mx.concatenate([*scores, edge], axis=-1), axis=-1).astype(queries.dtype)
    output, start = parts[0].weighted(weights[..., : scores[0].shape[-1]]), scores[0].shape[-1]
    for part, score in zip(parts[1:], scores[1:], strict=True):
        output = output + part.weighted(weights[..., start : start + score.shape[-1]])
        start += score.shape[-1]
    return output


class Compressor(nn.Module):
    """Turns every `ratio` tokens into one entry (section 6), in float32."""

    def __init__(self, args: ModelArgs, ratio: int, width: int) -> None:
        super().__init__()
        columns = 2 * width if ratio == OVERLAP_RATIO else width
        self.wkv = nn.Linear(args.hidden_size, columns, bias=False)
        self.wgate = nn.Linear(args.hidden_size, columns, bias=False)
        self.ape = mx.zeros((ratio, columns), dtype=mx.float32)
        self.norm = nn.RMSNorm(width, eps=args.rms_norm_eps)
        self.ratio = ratio

    def __call__(self, x: mx.array, state: CompressorState, step: Step, rope: Rope) -> None:
        """Take in x [B, L, D] and write the entries that it completes into `state`."""
        wide = x.astype(mx.float32)
        slots = step.memo(("slots", self.ratio), lambda: step.positions() % self.ratio)
        values, gates = self.wkv(wide), self.wgate(wide) + self.ape[slots]
        first, last = step.offset // self.ratio, (step.offset + step.length) // self.ratio
        if last > first:
            entries = self._pool(*self._windows(values, gates, state, step, last), state.overlap)
            entries = mx.fast.rms_norm(entries, self.norm.weight.astype(mx.float32), self.norm.eps)
            entries = rotate(entries, step.entry_table(rope, self.ratio, first, last - first))
            state.entries.write(first, entries.astype(x.dtype))
        state.values.write(step.offset, values)
        state.gates.write(step.offset, gates)

    def _windows(
        self, values: mx.array, gates: mx.array, state: CompressorState, step: Step, last: int
    ) -> tuple[mx.array, mx.array]:
        """Inputs of the windows to pool, [B, windows, ratio, columns]; with overlap the one before them comes
        first.
        """
        start, end = state.first_needed(step.offset), last * self.ratio
        known = step.offset - start
        values, gates = values[:, : end - step.offset], gates[:, : end - step.offset]
        if known:
            values = mx.concatenate([state.values.read(start, known), values], axis=1)
            gates = mx.concatenate([state.gates.read(start, known), gates], axis=1)
        if state.overlap and step.offset < self.ratio:
            absent = mx.zeros((values.shape[0], self.ratio, values.shape[2]))
            values = mx.concatenate([absent, values], axis=1)
            gates = mx.concatenate([absent - mx.inf, gates], axis=1)
        shape = (values.shape[0], -1, self.ratio, values.shape[2])
        return values.reshape(shape), gates.reshape(shape)

    @staticmethod
    def _pool(values: mx.array, gates: mx.array, overlap: bool) -> mx.array:
        """Softmax over a window's tokens per channel, then the weighted sum: [B, entries, width]."""
        if overlap:
            half = values.shape[-1] // 2
            values, gates = (
                mx.concatenate([part[:, :-1, :, :half], part[:, 1:, :, half:]], axis=2) for part in (values, gates)
            )
        return (mx.softmax(gates, axis=2) * values).sum(axis=2)


class Indexer(nn.Module):
    """Chooses which compressed entries a query of a ratio-4 layer sees (section 7)."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.heads, self.width, self.topk = args.index_n_heads, args.index_head_dim, args.index_topk
        self.wq_b = nn.Linear(args.q_lora_rank, self.heads * self.width, bias=False)
        self.weights_proj = nn.Linear(args.hidden_size, self.heads, bias=False)
        self.compressor = Compressor(args, OVERLAP_RATIO, self.width)

    def prepare(self, x: mx.array, low: mx.array, step: Step, rope: Rope) -> tuple[mx.array, mx.array]:
        """Index queries [B, L, heads, width] and their head weights float32 [B, L, 1, heads]."""
        queries = self.wq_b(low).reshape(*low.shape[:-1], self.heads, self.width)
        weights = self.weights_proj(x).astype(mx.float32) * (self.width * self.heads) ** -0.5
        return rotate(queries, step.table(rope)), weights[..., None, :]

    def choose(self, queries: mx.array, weights: mx.array, entries: mx.array, visible: mx.array) -> mx.array:
        """Indices [B, R, topk] of the best of `entries` [B, N, width]; those >= visible [R] are to be masked.

        Equal scores are chosen by lower index, so that the choice does not depend on how a prompt was cut.
        """
        batch, rows = queries.shape[:2]
        scores = queries.reshape(batch, -1, self.width) @ entries.swapaxes(-1, -2)
        scores = mx.maximum(scores.astype(mx.float32), 0).reshape(batch, rows, self.heads, -1)
        scores = (weights @ scores).squeeze(-2)
        hidden = mx.arange(entries.shape[1]) >= visible[:, None]
        scores = mx.where(hidden, -mx.inf, scores)
        best = mx.argpartition(-mx.stop_gradient(scores), self.topk - 1, axis=-1)[..., : self.topk]
        return best.astype(mx.int32)


class Attention(nn.Module):
    """Multi-query attention with low-rank queries, one shared key/value head and grouped output (section
    5).
    """

    attend = staticmethod(attend)

    def __init__(self, args: ModelArgs, layer: int, rope: Rope) -> None:
        super().__init__()
        self.heads, self.width, self.groups = args.num_attention_heads, args.head_dim, args.o_groups
        self.window, self.ratio, self.layer = args.sliding_window, args.ratio(layer), layer
        self.eps, self.rope = args.rms_norm_eps, rope
        queries, lora = self.heads * self.width, args.o_groups * args.o_lora_rank
        self.attn_sink = mx.zeros((self.heads,), dtype=mx.float32)
        self.wq_a = nn.Linear(args.hidden_size, args.q_lora_rank, bias=False)
        self.q_norm = nn.RMSNorm(args.q_lora_rank, eps=self.eps)
        self.wq_b = nn.Linear(args.q_lora_rank, queries, bias=False)
        self.wkv = nn.Linear(args.hidden_size, self.width, bias=False)
        self.kv_norm = nn.RMSNorm(self.width, eps=self.eps)
        self.wo_a = nn.Linear(queries // self.groups, lora, bias=False)
        self.wo_b = nn.Linear(lora, args.hidden_size, bias=False)
        if self.ratio:
            self.compressor = Compressor(args, self.ratio, self.width)
        if self.ratio == OVERLAP_RATIO:
            self.indexer = Indexer(args)

    def __call__(self, x: mx.array, cache: LayerCache, step: Step) -> mx.array:
        """x [B, L, D] (after attn_norm) to [B, L, D]; the cache takes in all L tokens."""
        low = self.q_norm(self.wq_a(x))
        queries = self._queries(low, step)
        window = _Window(cache, rotate(self.kv_norm(self.wkv(x)), step.table(self.rope)), step)
        index = self._take_in(x, low, cache, step)
        size = self._block_rows(step, cache)
        blocks = []
        for start in range(0, step.length, size):
            end = min(start + size, step.length)
            parts = [window.keys(start, end), *self._entries(index, cache, step, start, end)]
            blocks.append(self.attend(queries[:, start:end], parts, self.attn_sink))
        cache.advance(step.length)
        output = blocks[0] if len(blocks) == 1 else mx.concatenate(blocks, axis=1)
        return self._project(rotate(output, step.table(self.rope), inverse=True))

    def _queries(self, low: mx.array, step: Step) -> mx.array:
        """Normalised and rotated queries [B, L, H, d]."""
        queries = self.wq_b(low).reshape(*low.shape[:-1], self.heads, self.width)
        queries = mx.fast.rms_norm(queries, None, self.eps)
        return rotate(queries, step.table(self.rope))

    def _take_in(self, x: mx.array, low: mx.array, cache: LayerCache, step: Step) -> tuple[mx.array, mx.array] | None:
        """Feed both compressors; returns the indexer's queries where choosing will be needed."""
        if cache.main is None:
            return None
        self.compressor(x, cache.main, step, self.rope)
        if cache.index is None:
            return None
        self.indexer.compressor(x, cache.index, step, self.rope)
        if (step.offset + step.length) // self.ratio <= self.indexer.topk:
            return None
        return self.indexer.prepare(x, low, step, self.rope)

    def _entries(
        self, index: tuple[mx.array, mx.array] | None, cache: LayerCache, step: Step, start: int, end: int
    ) -> list[Keys]:
        """Compressed keys for the queries start..end-1 of this pass: entry j is visible when j < (t+1) //
        ratio.
        """
        count = (step.offset + end) // self.ratio if self.ratio else 0
        if count == 0 or cache.main is None:
            return []
        visible = (step.positions()[start:end] + 1) // self.ratio
        if index is not None and cache.index is not None and count > self.indexer.topk:
            queries, weights = (part[:, start:end] for part in index)
            picks = self.indexer.choose(queries, weights, cache.index.entries.first(count), visible)
            mask = picks < visible[:, None]
            self._trace(step, end, mx.where(mask, picks, -1)[:, -1])
            return [Keys(cache.main.entries.gather(picks), mask)]
        mask = mx.arange(count) < visible[:, None]
        self._trace(step, end, mx.where(mask, mx.arange(count), -1)[None, -1])
        return [Keys(cache.main.entries.first(count), None if end - start == 1 else mask)]

    def _trace(self, step: Step, end: int, picks: mx.array) -> None:
        if step.trace is not None and end == step.length:
            step.trace("entries", self.layer, picks)

    def _block_rows(self, step: Step, cache: LayerCache) -> int:
        """Queries per block, so that scores stay within BLOCK_FLOATS; short passes are one block."""
        if step.length <= SPARE + 1:
            return step.length
        keys = 2 * self.window + (step.offset + step.length) // max(self.ratio, 1) * bool(self.ratio)
        heads = self.heads if cache.index is None else self.heads + self.indexer.heads
        return max(16, min(256, BLOCK_FLOATS // (keys * heads)))

    def _project(self, output: mx.array) -> mx.array:
        """Grouped output projection: [B, L, H, d] to [B, L, D]; group g uses its own rows of wo_a."""
        batch, length = output.shape[:2]
        grouped = output.reshape(batch * length, self.groups, -1).swapaxes(0, 1)
        layer, shape = self.wo_a, (self.groups, -1, self.wo_a.weight.shape[-1])
        if isinstance(layer, nn.QuantizedLinear):
            scales = layer.scales.reshape(self.groups, -1, layer.scales.shape[-1])
            biases = layer.get("biases")
            lora = mx.quantized_matmul(
                grouped,
                layer.weight.reshape(shape),
                scales,
                None if biases is None else biases.reshape(scales.shape),
                transpose=True,
                group_size=layer.group_size,
                bits=layer.bits,
                mode=layer.mode,
            )
        else:
            lora = grouped @ layer.weight.reshape(shape).swapaxes(-1, -2)
        result: mx.array = self.wo_b(lora.swapaxes(0, 1).reshape(batch, length, -1))
        return result


class _Window:
    """Window keys of one pass, taken from the ring (short pass) or from past and new keys in order (long
    pass).
    """

    def __init__(self, cache: LayerCache, fresh: mx.array, step: Step) -> None:
        self.size, self.step = cache.window_size, step
        self.known = 0
        self.is_ring = step.length <= SPARE + 1
        if self.is_ring:
            cache.window.write(step.offset, fresh)
            assert cache.window.data is not None
            self.values = cache.window.data
            end = step.offset + step.length
            self.positions = step.memo(("ring", self.size), lambda: cache.window.positions(end))
            return
        self.known = min(step.offset, self.size - 1)
        if self.known:
            past = cache.window.read(step.offset - self.known, self.known)
            self.values = mx.concatenate([past, fresh], axis=1)
        else:
            self.values = fresh
        self.positions = step.offset - self.known + mx.arange(self.values.shape[1])
        cache.window.write(step.offset, fresh)

    def keys(self, start: int, end: int) -> Keys:
        """Keys for the queries start..end-1: each sees the `size` positions that end with its own."""
        low = 0 if self.is_ring else max(0, self.known + start - self.size + 1)
        high = self.values.shape[1] if self.is_ring else self.known + end
        mask = self.step.memo(("window", self.size, start, end), lambda: self._mask(start, end, low, high))
        return Keys(self.values[:, low:high], mask)

    def _mask(self, start: int, end: int, low: int, high: int) -> mx.array:
        own = self.step.positions()[start:end, None]
        positions = self.positions[low:high]
        return (positions >= 0) & (positions <= own) & (positions > own - self.size)
