"""Block-scaled weights: decoding to float32, and the scale grid of MLX's mxfp8 from 128x128 tiles.

All functions are pure. Source of the layouts: architecture.md section 10 (official), layouts.md section 2 (MLX).
"""

from __future__ import annotations

import numpy as np

from ds4convert.formats.small_floats import F32, U8, e4m3_values, e8m0_values, fp4_pairs

MX_GROUP = 32
"""Columns per scale of MLX's mxfp4 and mxfp8."""


def decode_fp4(codes: U8, scales: U8) -> F32:
    """Return float32 `[rows, cols]` of packed FP4 `codes` uint8 `[rows, cols/2]`, `scales` E8M0 `[rows, cols/32]`.

    mxfp4 has the same layout, so this decodes it too. Overflow to infinity is kept (a scale of 2^127).
    """
    # A byte's two values are taken as one 8-byte word: a fifteenth of the time of a gather of pairs.
    values = np.take(fp4_pairs().view(np.float64).reshape(-1), codes).view(np.float32)
    with np.errstate(over="ignore"):
        values *= np.repeat(e8m0_values()[scales], MX_GROUP, axis=1)
    return values


def decode_mxfp8(codes: U8, scales: U8) -> F32:
    """Return float32 `[rows, cols]` of E4M3 `codes` uint8 `[rows, cols]` with `scales` E8M0 `[rows, cols/32]`."""
    values = e4m3_values()[codes].reshape(*scales.shape, MX_GROUP)
    with np.errstate(over="ignore"):
        values = values * e8m0_values()[scales][..., None]
    return values.reshape(codes.shape)


def decode_fp8(codes: U8, grid: U8, first_row: int, tile: tuple[int, int]) -> F32:
    """Return float32 `[rows, cols]` of E4M3 `codes` uint8 `[rows, cols]`, a row slice beginning at `first_row`.

    `grid` holds the E8M0 scales of the whole tensor, `[ceil(out/tile rows), ceil(in/tile columns)]`; element (r, c)
    is scaled by `grid[r // tile[0], c // tile[1]]`.
    """
    rows = (first_row + np.arange(codes.shape[0])) // tile[0]
    cols = np.arange(codes.shape[1]) // tile[1]
    with np.errstate(over="ignore"):
        return e4m3_values()[codes] * e8m0_values()[grid][rows][:, cols]


def mx_scales(grid: U8, rows: int, cols: int, tile: tuple[int, int]) -> U8:
    """Return the per-row, per-32-column scales `[rows, cols/32]` that mean the same as a tile `grid`.

    `grid` uint8 `[ceil(rows/tile[0]), ceil(cols/tile[1])]`; tile edges that stick out are cut off. The caller has
    to see to it that 32 divides `cols` and `tile[1]`, so that no group of 32 spans two tiles.
    """
    columns = np.arange(cols // MX_GROUP) * MX_GROUP // tile[1]
    return grid[:, columns].repeat(tile[0], axis=0)[:rows]
