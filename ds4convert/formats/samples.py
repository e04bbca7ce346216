"""Normally distributed weights as each kind of storage holds them: for errors and speeds without a checkpoint."""

from __future__ import annotations

import numpy as np

from ds4convert.formats import float_codecs
from ds4convert.formats.codecs import CODECS
from ds4convert.formats.rounding import encode
from ds4convert.formats.small_floats import F32, U8, bf16_bits, bf16_values

ROWS, COLS = 128, 1024
SPREAD = 0.02
"""Standard deviation; rows differ from it by up to a factor of two, so that block scales lie anywhere."""


def normal_sample(rows: int = ROWS) -> F32:
    """Return BF16 values, float32 `[rows, 1024]`."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, COLS)) * (SPREAD * np.exp2(rng.random((rows, 1))))
    return bf16_values(bf16_bits(x.astype(np.float32)))


def fp8_sample(rows: int = ROWS) -> F32:
    """Return values that went through FP8 with a power of two per block."""
    codec = CODECS["mxfp8"]
    e = encode(normal_sample(rows), codec, "nearest")
    return float_codecs.decode(codec, e.weight, e.scales)


def fp8_codes(rows: int = ROWS) -> U8:
    """Return the E4M3 codes uint8 `[rows, 1024]` of such values."""
    return encode(normal_sample(rows), CODECS["mxfp8"], "nearest").weight.view(np.uint8)


def fp4_sample(rows: int = ROWS) -> tuple[U8, U8]:
    """Return (packed codes uint8 `[rows, 512]`, E8M0 scales `[rows, 32]`) of values that went through FP4."""
    e = encode(normal_sample(rows), CODECS["mxfp4"], "nearest")
    return e.weight.view(np.uint8), e.scales
