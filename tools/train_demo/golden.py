"""Proof of `model.py`: the numbers of the golden checkpoints, within the tolerances of their README."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from . import checkpoint, model

TOLERANCE = {
    "logits": 2e-4,
    "mtp_logits": 2e-4,
    "decode_logits": 2e-4,
    "mtp_decode_logits": 2e-4,
    "hidden": 3e-4,
}


def compare(folder: Path) -> dict[str, float]:
    """Largest absolute difference of each kind of value over all prompts of one golden folder."""
    cfg, weights = checkpoint.read(folder / "checkpoint")
    golden = load_file(folder / "golden.safetensors")
    worst = dict.fromkeys(TOLERANCE, 0.0)
    prompts = sorted({key.split(".")[0] for key in golden})
    for p in prompts:
        ids, greedy = golden[f"{p}.input_ids"].long(), golden[f"{p}.greedy_ids"].long()
        length = len(ids)
        with torch.inference_mode():
            logits, streams = model.backbone(cfg, weights, torch.cat((ids, greedy[:-1]))[None])
            mtp_logits = model.mtp(cfg, weights, streams, torch.cat((ids[1:], greedy))[None])
        tail = min(8, length)
        found = {
            "logits": (logits[0, :length], f"{p}.logits"),
            "decode_logits": (logits[0, length:], f"{p}.decode_logits"),
            "mtp_logits": (mtp_logits[0, :length], f"{p}.mtp_logits"),
            "mtp_decode_logits": (mtp_logits[0, length:], f"{p}.mtp_decode_logits"),
            "hidden": (streams[0, length - tail : length], f"{p}.hidden_last8"),
        }
        for name, (value, key) in found.items():
            worst[name] = max(worst[name], _difference(value, golden[key]))
    return worst


def _difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def check(root: Path) -> bool:
    """Print the comparison for tiny-a and tiny-b; whether all values are within tolerance."""
    good = True
    for name in ("tiny-a", "tiny-b"):
        for key, worst in compare(root / name).items():
            good &= worst <= TOLERANCE[key]
            print(f"{name} {key}: max abs difference {worst:.1e} (tolerance {TOLERANCE[key]:.0e})")
    return good
