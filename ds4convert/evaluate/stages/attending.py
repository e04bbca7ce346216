"""Attention of many queries at once on a processor: numpy multiplies, as in `matrices.product`, and for its reason.

Shapes: B batch, R rows of queries, H heads, d head width, N keys.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ds4convert.inference.deepseek_v4.attention import Attention, Keys
from ds4convert.inference.deepseek_v4.layers import on_cpu

F32 = NDArray[np.float32]


def settle(attention: Attention, dtype: mx.Dtype) -> None:
    """Let an attention multiply with numpy where that is faster: in float32 on a processor."""
    if on_cpu() and dtype == mx.float32:
        attention.attend = attend


def attend(queries: mx.array, parts: list[Keys], sink: mx.array) -> mx.array:
    """One softmax over all keys and the sink, float32 [B, R, H, d]: as `deepseek_v4.attention.attend` has it."""
    asked, edge = np.asarray(queries), np.asarray(sink.astype(mx.float32))
    values = [np.asarray(part.values) for part in parts]
    scores = [_scores(asked, v, part.mask) for v, part in zip(values, parts, strict=True)]
    weights = np.concatenate([*scores, np.broadcast_to(edge[:, None], (*asked.shape[:-1], 1))], axis=-1)
    with np.errstate(all="ignore"):  # what is not finite is found and named after the stage
        weights -= weights.max(axis=-1, keepdims=True)
        np.exp(weights, out=weights)
        weights /= weights.sum(axis=-1, keepdims=True)
        output, start = np.zeros(asked.shape, np.float32), 0
        for v in values:
            output += _weighted(np.ascontiguousarray(weights[..., start : start + v.shape[-2]]), v)
            start += v.shape[-2]
    return mx.array(output)


def _scores(queries: F32, values: F32, mask: mx.array | None) -> F32:
    """Return scaled and masked products [B, R, H, N] with keys [B, N, d], or with those of each row [B, R, N, d]."""
    batch, rows, heads, width = queries.shape
    with np.errstate(all="ignore"):
        flat = queries if values.ndim == 4 else queries.reshape(batch, rows * heads, width)
        found: F32 = (flat @ values.swapaxes(-1, -2)).reshape(batch, rows, heads, -1)
        found *= np.float32(width**-0.5)
    return found if mask is None else np.where(np.asarray(mask)[..., None, :], found, np.float32(-np.inf))


def _weighted(weights: F32, values: F32) -> F32:
    """Return the sum of values by weights, [B, R, H, d]."""
    if values.ndim == 4:
        return np.asarray(weights @ values)
    batch, rows, heads, count = weights.shape
    return np.asarray((weights.reshape(batch, rows * heads, count) @ values).reshape(batch, rows, heads, -1))
