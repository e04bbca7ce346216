"""TEMPORARY: for development until the kernels land."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ds4convert.formats import blocks


@dataclass(frozen=True, slots=True)
class Encoded:
    """Codes, scales, biases and what rounding cost."""

    weight: Any
    scales: Any
    biases: Any
    squared: float
    norm: float
    max_abs: float


def encode(values: Any, codec: Any, rounding: str, importance: Any = None) -> Encoded:
    """Return values in a codec."""
    import mlx.core as mx

    w = mx.array(values).astype(mx.bfloat16)
    q = mx.quantize(w, group_size=codec.group_size, bits=codec.bits, mode=codec.mode)
    weight = np.array(q[0])
    sc = q[1]
    b = q[2] if len(q) > 2 else None
    scales = np.array(sc.view(mx.uint16)) if sc.dtype == mx.bfloat16 else np.array(sc)
    biases = None if b is None else np.array(b.view(mx.uint16))
    d = decode(codec, weight, scales, biases)
    e = d.astype(np.float64) - values
    return Encoded(
        weight, scales, biases, float((e * e).sum()), float((values.astype(np.float64) ** 2).sum()), float(abs(e).max())
    )


def encode_fp4(codes: Any, scales: Any, codec: Any, rounding: str, importance: Any = None) -> Encoded:
    """Return FP4 in a codec."""
    return encode(blocks.decode_fp4(codes, scales), codec, rounding, importance)


def decode(codec: Any, weight: Any, scales: Any, biases: Any) -> Any:
    """Return the values."""
    import mlx.core as mx

    s = mx.array(scales).view(mx.bfloat16).astype(mx.float32) if codec.mode == "affine" else mx.array(scales)
    b = None if biases is None else mx.array(biases).view(mx.bfloat16).astype(mx.float32)
    return np.array(
        mx.dequantize(
            mx.array(np.ascontiguousarray(weight)),
            s,
            b,
            group_size=codec.group_size,
            bits=codec.bits,
            mode=codec.mode,
            dtype=mx.float32,
        )
    )
