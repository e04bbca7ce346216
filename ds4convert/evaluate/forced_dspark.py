"""A DSpark head on given texts: blocks at every position at once, as decoding would draft them. Teacher-forced.

The token before each draft is the text's own, so slot i of the block at t is compared with the backbone's row t + i.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx

if TYPE_CHECKING:
    from ds4convert.inference.deepseek_v4.model import Model


BLOCKS = 64
"""Blocks that go through the head at once."""


@dataclass(frozen=True)
class ForcedBlocks:
    """Of the blocks at positions 1..L-1 of a text: draft logits [L-1, slots, V] with Markov bias, raw confidence
    [L-1, slots]. Slots whose token before lies beyond the text are not to be used (`known`, bool [L-1, slots]).
    """

    logits: mx.array
    confidence: mx.array
    known: mx.array


def forced_blocks(model: Model, ids: tuple[int, ...], taps: mx.array, slots: int | None = None) -> ForcedBlocks:
    """Blocks at all positions but the first of a text, from its taps [1, L, T * D]; of each the first `slots` slots."""
    head, text, length = model.dspark, mx.array(ids), len(ids)
    count = slots or model.args.dspark_block_size
    logits, confidence, known = [], [], []
    for start in range(1, length, BLOCKS):
        anchors = mx.arange(start, min(length, start + BLOCKS))
        base, hidden = head.blocks(text, taps, anchors)
        places = anchors[:, None] + mx.arange(count)
        before = text[mx.minimum(places, length - 1)]
        last = model.mtp[-1]
        rows = last.markov_head.rows(before.flatten())
        bias = last.markov_head.bias(rows).reshape(*before.shape, -1)
        sure = last.confidence_head(hidden[:, :count].reshape(-1, hidden.shape[-1]), rows)
        logits.append(base[:, :count] + bias)
        confidence.append(sure.reshape(before.shape))
        known.append(places < length)
        mx.eval(logits[-1], confidence[-1], known[-1])
    return ForcedBlocks(*(mx.concatenate(parts) for parts in (logits, confidence, known)))
