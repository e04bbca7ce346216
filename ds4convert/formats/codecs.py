"""The quantized formats by name: mode, bits and group size as MLX's `quantization` table has them. Sizes only.

Source: layouts.md section 2 (groups and widths that MLX reads; scale dtypes; only affine has biases).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

WORD_BITS = 32


@dataclass(frozen=True, slots=True)
class Codec:
    """A way to store `[rows, cols]` in groups of `group_size` columns with one scale (and, affine, one bias) each."""

    name: str
    mode: str
    bits: int
    group_size: int
    scale_dtype: str

    @property
    def has_biases(self) -> bool:
        """Return whether each group has a bias beside its scale."""
        return self.mode == "affine"

    @property
    def bits_per_weight(self) -> float:
        """Return the stored bits per weight, scales and biases counted."""
        scale_bits = 16 if self.scale_dtype == "BF16" else 8
        return self.bits + scale_bits * (2 if self.has_biases else 1) / self.group_size

    def table(self) -> dict[str, int | str]:
        """Return the codec's entry in a quantization table."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}


AFFINE_BITS, AFFINE_GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)

CODECS: Mapping[str, Codec] = {
    c.name: c
    for c in (
        *(Codec(f"affine-{b}-g{g}", "affine", b, g, "BF16") for b in AFFINE_BITS for g in AFFINE_GROUPS),
        Codec("mxfp4", "mxfp4", 4, 32, "U8"),
        Codec("mxfp8", "mxfp8", 8, 32, "U8"),
        Codec("nvfp4", "nvfp4", 4, 16, "U8"),
    )
}
"""All codecs by the name that users write."""
