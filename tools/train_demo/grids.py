"""The block-scaled weight grids of the checkpoint, as rounding and as bytes (architecture.md, section 10).

Scales are powers of two, 2^ceil(log2(amax / qmax)), so no value is clipped. Rounding is to nearest, ties to
even.
"""

from __future__ import annotations

import torch
from torch import Tensor

FP8_MAX, FP8_BLOCK = 448.0, 128
FP4_MAX, FP4_BLOCK = 6.0, 32
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
SMALLEST = 2.0**-60


def power_of_two_above(x: Tensor) -> Tensor:
    """Smallest power of two that is not below `x` (positive)."""
    mantissa, exponent = torch.frexp(x.clamp_min(SMALLEST))
    return torch.ldexp(torch.ones_like(x), exponent - (mantissa == 0.5).int())


def fp8_scale(w: Tensor) -> Tensor:
    """Scales [out/128, in/128] of a matrix [out, in] whose sides are multiples of 128."""
    tiles = w.unflatten(-1, (-1, FP8_BLOCK)).unflatten(-3, (-1, FP8_BLOCK))
    return power_of_two_above(tiles.abs().amax(dim=(-3, -1)) / FP8_MAX)


def spread_fp8(scale: Tensor) -> Tensor:
    """Repeat tile scales to one scale per weight."""
    return scale.repeat_interleave(FP8_BLOCK, -1).repeat_interleave(FP8_BLOCK, -2)


def encode_fp8(w: Tensor) -> tuple[Tensor, Tensor]:
    """Matrix to (E4M3 values, E8M0 tile scales)."""
    scale = fp8_scale(w)
    return (w / spread_fp8(scale)).to(torch.float8_e4m3fn), scale.to(torch.float8_e8m0fnu)


def decode_fp8(values: Tensor, scale: Tensor) -> Tensor:
    """Inverse of `encode_fp8`, exact in float32."""
    return values.float() * spread_fp8(scale.float())


def fp4_scale(w: Tensor) -> Tensor:
    """Scales [..., in/32] of [..., in]."""
    return power_of_two_above(w.unflatten(-1, (-1, FP4_BLOCK)).abs().amax(-1) / FP4_MAX)


def round_fp4(x: Tensor) -> Tensor:
    """Nearest of 0, .5, 1, 1.5, 2, 3, 4, 6 with the sign of x; |x| <= 6; a tie goes to the even code."""
    size = x.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return torch.round(x / step) * step


def encode_fp4(w: Tensor) -> tuple[Tensor, Tensor]:
    """[..., in] to (I8 pairs [..., in/2], low nibble = even column; E8M0 scales [..., in/32])."""
    scale = fp4_scale(w)
    rounded = round_fp4(w / scale.repeat_interleave(FP4_BLOCK, -1))
    size_code = torch.searchsorted(torch.tensor(FP4_VALUES), rounded.abs().contiguous())
    codes = size_code + 8 * (rounded < 0)
    pairs = codes[..., 0::2] + 16 * codes[..., 1::2]
    return pairs.to(torch.uint8).view(torch.int8), scale.to(torch.float8_e8m0fnu)


def decode_fp4(pairs: Tensor, scale: Tensor) -> Tensor:
    """Inverse of `encode_fp4`, exact in float32."""
    table = torch.tensor([*FP4_VALUES, *(-v for v in FP4_VALUES)])
    raw = pairs.view(torch.uint8).long()
    values = torch.stack((table[raw & 15], table[raw >> 4]), dim=-1).flatten(-2)
    return values * scale.float().repeat_interleave(FP4_BLOCK, -1)


def on_fp8_grid(w: Tensor) -> Tensor:
    """`decode_fp8(*encode_fp8(w))`."""
    return decode_fp8(*encode_fp8(w))


def on_fp4_grid(w: Tensor) -> Tensor:
    """`decode_fp4(*encode_fp4(w))` without the detour through bytes."""
    scale = fp4_scale(w).repeat_interleave(FP4_BLOCK, -1)
    return round_fp4(w / scale) * scale


def on_bf16_grid(w: Tensor) -> Tensor:
    """Rounded to bfloat16 and back."""
    return w.bfloat16().float()
