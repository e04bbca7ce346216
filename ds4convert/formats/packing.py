"""Codes of 2 to 8 bits in MLX's words: one stream of bits per row, the first code in the lowest bits.

Source: layouts.md section 2. Eight codes always fill whole bytes, so rows are packed eight codes at a time.
"""

from __future__ import annotations

import numpy as np

from ds4convert.formats.small_floats import U8

RUN = 8
"""Codes that are packed together, into as many bytes as a code has bits."""


def pack(codes: U8, bits: int) -> np.ndarray:
    """Return uint32 `[rows, cols * bits / 32]` of codes uint8 `[rows, cols]`, each below `2^bits`.

    Neighbours are joined in pairs, three times: bytes to 2 codes in 16 bits, 4 in 32, 8 in 64.
    """
    rows, width = codes.shape[0], bits
    joined: np.ndarray = np.ascontiguousarray(codes)
    if bits < 8:
        for lane in ("<u2", "<u4", "<u8"):
            wide = joined.reshape(rows, -1).view(lane)
            half = wide.dtype.itemsize * 4
            low = wide & wide.dtype.type((1 << width) - 1)
            joined = low | ((wide >> wide.dtype.type(half)) << wide.dtype.type(width))
            width *= 2
        joined = joined.view(np.uint8).reshape(rows, -1, RUN)[:, :, :bits]
    return np.ascontiguousarray(joined).reshape(rows, -1).view("<u4")


def unpack(words: np.ndarray, bits: int) -> U8:
    """Return codes uint8 `[rows, cols]` of words uint32 `[rows, cols * bits / 32]`."""
    rows = words.shape[0]
    packed = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return packed.reshape(rows, -1)
    wide = np.zeros((rows, packed.size // rows // bits, RUN), np.uint8)
    wide[:, :, :bits] = packed.reshape(rows, -1, bits)
    split: np.ndarray = wide.reshape(rows, -1)
    width = bits * RUN // 2
    for lane in ("<u8", "<u4", "<u2"):
        whole = split.view(lane)
        half = whole.dtype.itemsize * 4
        low = whole & whole.dtype.type((1 << width) - 1)
        split = low | ((whole >> whole.dtype.type(width)) << whole.dtype.type(half))
        width //= 2
    return split.view(np.uint8).reshape(rows, -1)
