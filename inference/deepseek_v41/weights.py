"""From the tensors of a DeepSeek-V4.1 checkpoint, official or converted, to this model's parameters.

Names become V4's (`deepseek_v4.weights`); what serves images is left out, as text alone is run, and engram tables
are handed back by themselves, as they are never parameters: they stay where they lie.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ..deepseek_v4.images import is_of_images
from ..deepseek_v4.weights import HeadStatus, _as_stored, canonical_name, head_status, stack_experts
from .config import ModelArgs

TABLE = ".engram.embed."
"""Part of the names of a table's tensors."""

RENAMED = {
    ".markov_head.embed.": ".markov_head.markov_w1.",
    ".markov_head.head.": ".markov_head.markov_w2.",
}
"""Parts of names that V4 has not, or otherwise."""


@dataclass(frozen=True)
class Loaded:
    """Parameters by this model's names, the modules that are repacked, the head's status, and what tables have."""

    weights: dict[str, mx.array]
    repacked: dict[str, dict[str, int | str]]
    head: HeadStatus
    tables: dict[str, mx.array]


def parameter_name(name: str) -> str:
    """This model's name of a tensor."""
    found = canonical_name(name)
    for theirs, ours in RENAMED.items():
        found = found.replace(theirs, ours)
    return found


def sanitize(weights: dict[str, mx.array], args: ModelArgs) -> Loaded:
    """Rename, stack and repack a whole checkpoint. Raises ValueError on scales that fit no format."""
    renamed = {parameter_name(name): tensor for name, tensor in weights.items() if not is_of_images(name)}
    tables = {name: renamed.pop(name) for name in list(renamed) if TABLE in name}
    status = head_status(set(renamed), args)
    if not status.present:
        renamed = {name: tensor for name, tensor in renamed.items() if not name.startswith("mtp.")}
    head = {name: renamed.pop(name) for name in list(renamed) if name.startswith("mtp.")}
    renamed = stack_experts(renamed, args.n_routed_experts) | stack_experts(head, args.of_head().n_routed_experts)
    repacked: dict[str, dict[str, int | str]] = {}
    for name in [name for name in renamed if name.endswith(".weight")]:
        path = name.removesuffix(".weight")
        scale = renamed.pop(f"{path}.scale", None)
        if scale is not None:
            form = repack(path, scale, renamed, args.tile)
            repacked |= {path: form} if form else {}
    return Loaded({name: _as_stored(name, tensor) for name, tensor in renamed.items()}, repacked, status, tables)


def repack(
    path: str, scale: mx.array, weights: dict[str, mx.array], tile: tuple[int, int]
) -> dict[str, int | str] | None:
    """Replace a block-scaled matrix in `weights` by MLX's view of it, value for value; returns the view's format.

    An FP8 matrix whose tiles are no multiples of MLX's groups has no such view: it becomes BF16, exactly.
    """
    weight = weights.pop(f"{path}.weight")
    rows, columns = weight.shape[-2:]
    if columns * 2 == scale.shape[-1] * 32 and rows == scale.shape[-2]:
        weights |= {f"{path}.weight": weight.view(mx.uint32), f"{path}.scales": scale}
        return {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    high, wide = tile
    tiles = (-(-rows // high), -(-columns // wide))
    if scale.shape[-2:] != tiles:
        raise ValueError(
            f"{path}.scale: expected {list(tiles)} for FP8 or {[rows, columns // 16]} for FP4, "
            f"found {list(scale.shape)}"
        )
    if wide % 32 == 0 and columns % 32 == 0:
        scales = mx.repeat(mx.repeat(scale, wide // 32, axis=-1), high, axis=-2)
        weights |= {f"{path}.weight": weight.view(mx.uint32), f"{path}.scales": scales[..., :rows, : columns // 32]}
        return {"group_size": 32, "bits": 8, "mode": "mxfp8"}
    factors = mx.power(2.0, scale.astype(mx.float32) - 127)
    factors = mx.repeat(mx.repeat(factors, wide, axis=-1), high, axis=-2)[..., :rows, :columns]
    weights[f"{path}.weight"] = (mx.from_fp8(weight, mx.float32) * factors).astype(mx.bfloat16)
    return None
