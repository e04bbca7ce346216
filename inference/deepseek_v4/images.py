"""Tensors that serve images alone. Text is decoded without them, so no model here has parameters for them.

They are the tower (`vision.*`), what puts its output into the stream (`aligner.*`), the embeddings of image marks, and
the router's biases for image positions. In DeepSeek-V4 Vision-Exp a layer that routes by a table of tokens has the
bias for text as well, which text does not reach there: mlx-vlm 0.7.10 (models/deepseek_v4/language.py, `MoEGate`)
holds it and never reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

Tensor = TypeVar("Tensor")

TOWER = ("vision.", "aligner.", "image_start", "image_end", "image_newline", "image_pad")
"""What the names of a tower's tensors begin with, those of image marks included."""

IMAGE_BIAS = ".gate.bias_vl"
"""End of the names of the routers' biases for image positions."""

TEXT_BIASES = ("bias", "e_score_correction_bias")
"""What the bias for text is called beside it, in the spellings that are known."""


def is_of_images(name: str) -> bool:
    """Whether a tensor serves images alone by its name, in any spelling."""
    own = name.removeprefix("model.").removeprefix("language_model.")
    return own.startswith(TOWER) or own.endswith(IMAGE_BIAS)


def without_images(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that decoding text reads, by name."""
    routers = [name.removesuffix("bias_vl") for name in weights if name.endswith(IMAGE_BIAS)]
    by_table = [router for router in routers if f"{router}tid2eid" in weights]
    unread = {f"{router}{bias}" for router in by_table for bias in TEXT_BIASES}
    return {name: tensor for name, tensor in weights.items() if name not in unread and not is_of_images(name)}
