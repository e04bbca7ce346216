"""The official on-disk format, read to float32 weights and written (architecture.md, 10 and 11)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import grids
from .spec import Config, Kind, inventory

INDEX = "model.safetensors.index.json"


def read(folder: Path) -> tuple[Config, dict[str, Tensor]]:
    """Config and float32 weights (tid2eid stays I64), experts stacked, of a checkpoint folder."""
    cfg = Config.from_folder(folder)
    index = json.loads((folder / INDEX).read_text())
    raw: dict[str, Tensor] = {}
    for shard in sorted(set(index["weight_map"].values())):
        raw |= load_file(folder / shard)
    if set(raw) != set(index["weight_map"]):
        raise ValueError(f"index and shards differ: {sorted(set(raw) ^ set(index['weight_map']))[:5]}")
    weights = {t.name: decode(raw, t.name, t.kind, cfg.experts) for t in inventory(cfg)}
    if raw:
        raise ValueError(f"tensors without a place: {sorted(raw)[:5]}")
    for t in inventory(cfg):
        if tuple(weights[t.name].shape) != t.shape:
            raise ValueError(f"{t.name}: shape {tuple(weights[t.name].shape)}, wanted {t.shape}")
    return cfg, weights


def decode(raw: dict[str, Tensor], name: str, kind: Kind, experts: int) -> Tensor:
    """Take one tensor (or one stack of experts) out of `raw`."""
    if kind is Kind.FP4:
        parts = [expert_name(name, e) for e in range(experts)]
        return torch.stack([grids.decode_fp4(raw.pop(f"{p}.weight"), raw.pop(f"{p}.scale")) for p in parts])
    if kind is Kind.FP8:
        return grids.decode_fp8(raw.pop(name), raw.pop(scale_name(name)))
    return raw.pop(name) if kind is Kind.I64 else raw.pop(name).float()


def expert_name(stacked: str, expert: int) -> str:
    """`P.ffn.experts.w1`, 3 to `P.ffn.experts.3.w1`."""
    stem, matrix = stacked.rsplit(".", 1)
    return f"{stem}.{expert}.{matrix}"


def scale_name(weight: str) -> str:
    """Name of the scales that go with `weight`."""
    return weight.removesuffix(".weight") + ".scale"


def on_grid(weight: Tensor, kind: Kind) -> Tensor:
    """The values that `weight` has after writing and reading."""
    rounding = {Kind.FP8: grids.on_fp8_grid, Kind.FP4: grids.on_fp4_grid, Kind.BF16: grids.on_bf16_grid}
    return rounding[kind](weight) if kind in rounding else weight


def encode(name: str, kind: Kind, weight: Tensor) -> dict[str, Tensor]:
    """On-disk tensors of one inventory row."""
    if kind is Kind.FP4:
        encoded = {expert_name(name, e): grids.encode_fp4(part) for e, part in enumerate(weight)}
        return {f"{p}.{part}": t for p, pair in encoded.items() for part, t in zip(("weight", "scale"), pair,
                                                                                 strict=True)}  # fmt: skip
    if kind is Kind.FP8:
        values, scale = grids.encode_fp8(weight)
        return {name: values, scale_name(name): scale}
    return {name: weight.bfloat16() if kind is Kind.BF16 else weight}


def write(folder: Path, cfg: Config, weights: Mapping[str, Tensor], shards: int) -> int:
    """Write `shards` safetensors files and the index; returns the bytes of all tensors.

    The last shard holds `mtp.0` alone. The backbone goes in inventory order into the first `shards - 1`,
    of about equal size.
    """
    groups: list[dict[str, Tensor]] = [{} for _ in range(shards)]
    encoded = [(t.name, encode(t.name, t.kind, weights[t.name].detach().contiguous())) for t in inventory(cfg)]
    total_backbone = sum(_nbytes(tensors) for name, tensors in encoded if not name.startswith("mtp."))
    done = 0
    for name, tensors in encoded:
        if name.startswith("mtp."):
            groups[-1] |= tensors
        else:
            groups[done * (shards - 1) // total_backbone] |= tensors
            done += _nbytes(tensors)
    files = {f"model-{n:05}-of-{shards:05}.safetensors": group for n, group in enumerate(groups, start=1)}
    for file, group in files.items():
        save_file({k: v.contiguous() for k, v in group.items()}, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)
    weight_map = {name: file for file, group in files.items() for name in group}
    total = sum(_nbytes(group) for group in groups)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return total


def _nbytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(t.nbytes for t in tensors.values())
