"""Checkpoints of DeepSeek-V4 Vision-Exp, made of a text checkpoint by what the release adds to its own.

Keys and names: mlx-vlm 0.7.10, models/deepseek_v4/config.py and vision.py. What it adds to the index of Flash-0731: 316
tensors, the biases for text of the layers that route by a table among them (`manifests/models/deepseek_v4.toml`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests import support
from tests.support import Tensor

KEYS: dict[str, Any] = {
    "vision_n_layers": 2, "vision_dim": 64, "vision_n_heads": 4, "vision_inter_dim": 96, "vision_patch_size": 2,
    "vision_rope_theta": 10000.0, "vision_downsample_ratio": 2, "vision_max_n_token": 16, "vision_min_pixels": 1,
    "vision_max_wh_ratio": 8,
}  # fmt: skip
"""The ten keys of the release, with small numbers."""

FLASH_KEYS = KEYS | {
    "vision_n_layers": 32, "vision_dim": 1024, "vision_n_heads": 16, "vision_inter_dim": 2816, "vision_patch_size": 14,
    "vision_downsample_ratio": 3, "vision_max_n_token": 384, "vision_min_pixels": 147456,
}  # fmt: skip
"""The release's own numbers: the defaults of mlx-vlm's config."""


def tower_shapes(config: dict[str, Any]) -> dict[str, list[int]]:
    """The BF16 tensors of tower, aligner and image marks by name, written out rather than taken from the family file."""
    width, inner, d = config["vision_dim"], config["vision_inter_dim"], config["hidden_size"]
    shapes = {f"image_{mark}": [d] for mark in ("start", "end", "newline", "pad")}
    shapes |= {
        "aligner.w1.weight": [d, width * config["vision_downsample_ratio"] ** 2], "aligner.w1.bias": [d],
        "aligner.w2.weight": [d, d], "aligner.w2.bias": [d],
        "vision.patch_embed.proj.weight": [width, 3 * config["vision_patch_size"] ** 2],
        "vision.patch_embed.proj.bias": [width], "vision.norm.weight": [width],
    }  # fmt: skip
    for n in range(config["vision_n_layers"]):
        block = f"vision.blocks.{n}"
        shapes |= {
            f"{block}.norm1.weight": [width], f"{block}.norm2.weight": [width],
            f"{block}.attn.wqkv.weight": [3 * width, width], f"{block}.attn.wqkv.bias": [3 * width],
            f"{block}.attn.wo.weight": [width, width], f"{block}.attn.wo.bias": [width],
            f"{block}.mlp.w1.weight": [2 * inner, width], f"{block}.mlp.w2.weight": [width, inner],
        }  # fmt: skip
    return shapes


def biases(tensors: dict[str, Any]) -> list[str]:
    """The router's biases that a release with a tower has and one of text alone has not."""
    routers = [name.removesuffix("weight") for name in tensors if name.endswith("ffn.gate.weight")]
    by_table = [name.removesuffix("tid2eid") for name in tensors if name.endswith("ffn.gate.tid2eid")]
    return [*(f"{router}bias_vl" for router in routers), *(f"{router}bias" for router in by_table)]


def with_tower(text: Path, out: Path) -> Path:
    """Write the checkpoint `text` with a tower of random values."""
    config = json.loads((text / "config.json").read_text()) | KEYS
    tensors, random = support.read_folder(text), np.random.default_rng(5)
    for name, shape in tower_shapes(config).items():
        bits = random.standard_normal(shape).astype("<f4").view("<u4") >> 16
        tensors[name] = Tensor("BF16", shape, bits.astype("<u2").tobytes())
    for name in biases(tensors):
        values = random.standard_normal(config["n_routed_experts"]).astype("<f4")
        tensors[name] = Tensor("F32", list(values.shape), values.tobytes())
    return support.write_folder(out, tensors, config)
