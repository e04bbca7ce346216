"""From any known spelling of a checkpoint's tensors to this model's parameters.

Accepts official names (experts single or stacked, FP8 and FP4 with block scales), the same behind `model.`,
our own layouts, MTPLX's head spelling, `mtp.0.block.*`, `mtp.0.decoder.*`. Owns the renaming, the stacking of
experts, the byte-for-byte repacking into MLX formats, and the decision whether there is a head.
Sources: architecture description, section 11 (inventory) and section 10 (formats); layouts, sections 1 to 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from .config import ModelArgs, head_size_bytes

TILE = 128
"""Rows and columns that share one scale in an FP8 matrix."""

ROOT_NAMES = {
    "embed": "model.embed_tokens",
    "embed_tokens": "model.embed_tokens",
    "head": "lm_head",
    "lm_head": "lm_head",
    "norm": "model.norm",
    "hc_head": "model.hc_head",
    "hc_head_fn": "model.hc_head.fn",
    "hc_head_base": "model.hc_head.base",
    "hc_head_scale": "model.hc_head.scale",
    "layers": "model.layers",
    "mtp": "mtp",
}

BLOCK_NAMES = {
    "self_attn": "attn",
    "mlp": "ffn",
    "hc_attn": "attn_hc",
    "hc_ffn": "ffn_hc",
    "weight_scale_inv": "scale",
    "sinks": "attn_sink",
    **{f"hc_{part}_{leaf}": f"{part}_hc.{leaf}" for part in ("attn", "ffn") for leaf in ("fn", "base", "scale")},
    **{f"hc_head_{leaf}": f"hc_head.{leaf}" for leaf in ("fn", "base", "scale")},
}

EXPERT_NAMES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}

DSPARK_PARTS = (".main_proj.", ".main_norm.", ".markov_head.", ".confidence_head.")
"""Parts of names that only a DSpark head has."""

BACKBONE_COPIES = ("emb.", "embed_tokens.", "embed.", "head.", "lm_head.", "shared_head.head.")
"""Below `mtp.N.`: copies of the backbone's embedding and output matrix, which the head shares."""

FLOAT32_PARTS = (
    "attn_sink",
    "e_score_correction_bias",
    ".attn_hc.",
    ".ffn_hc.",
    "hc_head.",
    ".ape",
    "confidence_head.",
)
"""Parameters that stay float32 in every compute dtype (architecture description, trap 12)."""


def stays_float32(name: str) -> bool:
    """Whether a parameter keeps float32 whatever the compute dtype."""
    return any(part in name for part in FLOAT32_PARTS)


@dataclass(frozen=True)
class HeadStatus:
    """Which head a model has, and where it has none that can draft, why."""

    kind: str  # "classic", "dspark" or "none"
    reason: str = ""
    stages: int = 1  # blocks of it, by the tensors' names

    @property
    def present(self) -> bool:
        """Whether the head can draft."""
        return self.kind != "none"


@dataclass(frozen=True)
class Loaded:
    """Parameters under this model's names, the modules among them that are repacked, and the head's
    status.
    """

    weights: dict[str, mx.array]
    repacked: dict[str, dict[str, int | str]]
    head: HeadStatus


def canonical_name(name: str) -> str:
    """This model's spelling of a tensor name; names of unknown tensors pass through unchanged in their
    tail.
    """
    parts = name.split(".")
    while len(parts) > 1 and parts[0] in ("language_model", "model"):
        parts = parts[1:]
    if parts[0] not in ROOT_NAMES:
        return name
    tail = parts[1:]
    if parts[0] == "mtp" and len(tail) > 1 and tail[1] in ("block", "decoder"):
        tail = [tail[0], *tail[2:]]
    tail = [BLOCK_NAMES.get(part, part) for part in tail]
    if len(tail) > 2 and tail[-2:] == ["gate", "bias"]:
        tail[-1] = "e_score_correction_bias"
    if any(part in tail for part in ("shared_experts", "experts", "switch_mlp")):
        tail = [EXPERT_NAMES.get(part, part) for part in tail]
    return ".".join([ROOT_NAMES[parts[0]], *tail])


def head_status(names: set[str], args: ModelArgs) -> HeadStatus:
    """Kind of the head by the tensors' names, then by what the config promises."""
    own = {name for name in names if name.startswith("mtp.")}
    if any(part in name for name in own for part in DSPARK_PARTS):
        args.check_dspark()
        return HeadStatus("dspark", stages=_stages(own))
    promised = args.num_nextn_predict_layers
    if own and promised:
        return HeadStatus("classic")
    if own:
        reason = "config.json says num_nextn_predict_layers 0, so the head's tensors are not used"
    elif promised:
        size = head_size_bytes(args) / 1e9
        figure = f"{size:.1f} GB" if size >= 0.1 else f"{size * 1e3:.1f} MB"
        reason = (
            f"config.json promises one, but its tensors (about {figure} at source precision) are absent: "
            "a quantized conversion stripped them"
        )
    else:
        reason = "this model never had one (num_nextn_predict_layers is 0)"
    return HeadStatus("none", reason)


def _stages(names: set[str]) -> int:
    """Stages of a head, by the numbers in its tensors' names; ValueError where one is left out."""
    numbers = {int(part) for name in names if (part := name.split(".")[1]).isdigit()}
    if missing := sorted(set(range(max(numbers, default=0) + 1)) - numbers):
        raise ValueError(
            f"mtp.{missing[0]}: this stage of the DSpark head has no tensors, but mtp.{max(numbers)} has; "
            "the head is incomplete: convert the source again, or graft its head"
        )
    return max(numbers) + 1


def sanitize(weights: dict[str, mx.array], args: ModelArgs) -> Loaded:
    """Rename, stack and repack a whole checkpoint; raises ValueError on a second stage of a classic head."""
    renamed = {canonical_name(name): tensor for name, tensor in weights.items()}
    status = head_status(set(renamed), args)
    if not status.present:
        renamed = {name: tensor for name, tensor in renamed.items() if not name.startswith("mtp.")}
    renamed = {name: tensor for name, tensor in renamed.items() if not _is_backbone_copy(name)}
    if status.kind == "classic" and any(name.startswith("mtp.1.") for name in renamed):
        raise ValueError("mtp.1: expected one stage of a classic head, found more")
    renamed = stack_experts(renamed, args.n_routed_experts)
    repacked: dict[str, dict[str, int | str]] = {}
    for name in [name for name in renamed if name.endswith(".weight")]:
        path = name.removesuffix(".weight")
        scale = renamed.pop(f"{path}.scale", None)
        if scale is not None:
            _repack(path, scale, renamed, repacked)
    return Loaded({name: _as_stored(name, tensor) for name, tensor in renamed.items()}, repacked, status)


def _is_backbone_copy(name: str) -> bool:
    parts = name.split(".", 2)
    return parts[0] == "mtp" and len(parts) == 3 and parts[2].startswith(BACKBONE_COPIES)


def _as_stored(name: str, tensor: mx.array) -> mx.array:
    """Fix the three representation differences that layouts allow: id width, 3-D wo_a, narrowed float32."""
    if name.endswith(".tid2eid"):
        return tensor.astype(mx.int32)
    if ".wo_a." in name and tensor.ndim == 3:
        return tensor.reshape(-1, tensor.shape[-1])
    if stays_float32(name) and tensor.dtype != mx.float32:
        return tensor.astype(mx.float32)
    return tensor


def stack_experts(weights: dict[str, mx.array], experts: int) -> dict[str, mx.array]:
    """Move `P.experts.e.X` of all experts into one `P.switch_mlp.X` [experts, ...]; stacked ones are renamed.

    A missing expert is left unstacked, so that a strict load names what is missing and what is left over.
    """
    result: dict[str, mx.array] = {}
    groups: dict[tuple[str, str], dict[int, mx.array]] = {}
    for name, tensor in weights.items():
        prefix, found, tail = name.partition(".ffn.experts.")
        if not found:
            result[name] = tensor
        elif tail.split(".")[0].isdigit():
            number, leaf = tail.split(".", 1)
            groups.setdefault((prefix, leaf), {})[int(number)] = tensor
        else:
            result[f"{prefix}.ffn.switch_mlp.{tail}"] = tensor
    for (prefix, leaf), members in groups.items():
        if sorted(members) == list(range(experts)):
            result[f"{prefix}.ffn.switch_mlp.{leaf}"] = mx.stack([members[e] for e in range(experts)])
        else:
            result |= {f"{prefix}.ffn.experts.{e}.{leaf}": tensor for e, tensor in members.items()}
    return result


def _repack(
    path: str,
    scale: mx.array,
    weights: dict[str, mx.array],
    repacked: dict[str, dict[str, int | str]],
) -> None:
    """Replace a block-scaled matrix in `weights` by MLX's mxfp4 or mxfp8 view of it, value for value.

    An FP8 matrix with a partial tile has no mxfp8 view and becomes BF16, which holds its values exactly.
    """
    weight = weights.pop(f"{path}.weight")
    rows, columns = weight.shape[-2:]
    if columns * 2 == scale.shape[-1] * 32 and rows == scale.shape[-2]:
        weights[f"{path}.weight"] = weight.view(mx.uint32)
        weights[f"{path}.scales"] = scale
        repacked[path] = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
        return
    if scale.shape[-2:] != (-(-rows // TILE), -(-columns // TILE)):
        raise ValueError(
            f"{path}.scale: expected {[-(-rows // TILE), -(-columns // TILE)]} for FP8 or "
            f"{[rows, columns // 16]} for FP4, found {list(scale.shape)}"
        )
    if rows % TILE == 0 and columns % TILE == 0:
        weights[f"{path}.weight"] = weight.view(mx.uint32)
        weights[f"{path}.scales"] = mx.repeat(mx.repeat(scale, TILE // 32, axis=-1), TILE, axis=-2)
        repacked[path] = {"group_size": 32, "bits": 8, "mode": "mxfp8"}
        return
    factors = mx.power(2.0, scale.astype(mx.float32) - 127)
    factors = mx.repeat(mx.repeat(factors, TILE, axis=-1), TILE, axis=-2)[..., :rows, :columns]
    weights[f"{path}.weight"] = (mx.from_fp8(weight, mx.float32) * factors).astype(mx.bfloat16)
