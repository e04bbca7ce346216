"""An engram: rows of a table of n-grams, written into the streams as far as they match them.

Shapes: B batch, L tokens of this pass, M streams (hc_mult), D hidden size. Source: the reference on V4.1, section 4.
"""

# mlx.nn carries no types that mypy can see, so these checks would only repeat that.
# mypy: disable-error-code="attr-defined,name-defined,misc,no-any-return"

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..deepseek_v4.layers import Step
from .config import ModelArgs
from .ngrams import Hasher, Ids
from .table import Table

LEAST_MATCH = 1e-6
"""The match between stream and key is taken to be at least this much, on either side of 0."""


class Engram(nn.Module):
    """Reads rows by the last tokens; makes of them a key for each stream, and a value for all of them."""

    def __init__(self, args: ModelArgs, layer: int) -> None:
        super().__init__()
        columns = (args.engram_max_ngram_size - 1) * args.engram_n_heads * args.engram_head_dim
        self.wkv = nn.Linear(columns, args.hidden_size * (args.hc_mult + 1), bias=False)
        self.q_weight = mx.ones((args.hc_mult, args.hidden_size))
        self.k_weight = mx.ones((args.hc_mult, args.hidden_size))
        self.layer, self.eps = layer, args.rms_norm_eps
        self.streams, self.width = args.hc_mult, args.hidden_size
        self.hasher: Hasher | None = None
        self.table: Table | None = None

    def __call__(self, streams: mx.array, tokens: mx.array, cache: Any, step: Step) -> mx.array:
        """Streams [B, L, M, D] with the engram's part, of token ids [B, L]."""
        rows = self.look_up(tokens, cache, step)
        assert self.table is not None
        values = self.table.rows(rows, streams.dtype)
        key, value = mx.split(self.wkv(values.reshape(*tokens.shape, -1)), [self.streams * self.width], axis=-1)
        gate = self._gate(streams, key.reshape(*tokens.shape, self.streams, self.width))
        added = gate[..., None] * value.astype(mx.float32)[:, :, None]
        return (streams.astype(mx.float32) + added).astype(streams.dtype)

    def look_up(self, tokens: mx.array, cache: Any, step: Step) -> Ids:
        """Rows [B, L, columns] of the table for token ids [B, L], which the cache takes in."""
        if self.hasher is None:
            raise ValueError("the engram has no tokenizer to hash with")
        fresh = self.hasher.compress(np.asarray(tokens))
        known = min(step.offset, self.hasher.reach)
        text = fresh
        if known:
            before = np.asarray(cache.history.read(step.offset - known, known))[..., 0]
            text = np.concatenate([before.astype(np.int64), fresh], axis=1)
        cache.history.write(step.offset, mx.array(fresh.astype(np.int32))[..., None])
        rows = self.hasher.rows(self.layer, text, known)
        if step.trace is not None:
            step.trace("engram", self.layer, mx.array(rows))
        return rows

    def _gate(self, streams: mx.array, key: mx.array) -> mx.array:
        """How much of the value each stream takes, float32 [B, L, M]: by its product with the key, both normed."""
        h, k = streams.astype(mx.float32), key.astype(mx.float32)
        weight = self.q_weight.astype(mx.float32) * self.k_weight.astype(mx.float32)
        norms = [mx.rsqrt(mx.square(x).mean(axis=-1) + self.eps) for x in (h, k)]
        match = (h * weight * k).sum(axis=-1) * norms[0] * norms[1] * self.width**-0.5
        root = mx.sqrt(mx.maximum(mx.abs(match), LEAST_MATCH))
        return mx.sigmoid(mx.where(match < 0, -root, root))
