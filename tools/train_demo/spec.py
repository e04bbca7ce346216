"""Config fields and tensor inventory of a small DeepSeek-V4 (architecture.md, sections 1 and 11).

Inside the trainer the routed experts of a block are one stacked tensor `P.ffn.experts.w1` of shape
[experts, out, in]; on disk each expert is a tensor of its own. All other names are the official ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any


class Kind(StrEnum):
    """How a tensor is stored, and so onto which grid training rounds it."""

    FP8 = "fp8"  # F8_E4M3 and F8_E8M0 scales per 128x128
    FP4 = "fp4"  # E2M1 pairs in I8 and F8_E8M0 scales per 32 columns
    BF16 = "bf16"
    F32 = "f32"
    I64 = "i64"


@dataclass(frozen=True)
class Tensor:
    """One row of the inventory."""

    name: str
    shape: tuple[int, ...]
    kind: Kind


@dataclass(frozen=True)
class Config:
    """The fields of config.json that the forward pass needs, under short names."""

    dim: int
    layers: int
    mtp_layers: int
    ratios: tuple[int, ...]
    hash_layers: int
    heads: int
    head_dim: int
    rope_dim: int
    q_rank: int
    groups: int
    o_rank: int
    window: int
    index_heads: int
    index_dim: int
    index_topk: int
    experts: int
    top_experts: int
    width: int
    route_scale: float
    swiglu_limit: float
    eps: float
    hc_eps: float
    streams: int
    sinkhorn: int
    rope_theta: float
    compress_theta: float
    rope_factor: float
    rope_length: int
    beta_fast: float
    beta_slow: float
    vocab: int

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Config:
        """Read the fields of an official config.json."""
        rope = fields["rope_scaling"]
        return cls(
            dim=fields["hidden_size"],
            layers=fields["num_hidden_layers"],
            mtp_layers=fields["num_nextn_predict_layers"],
            ratios=tuple(fields["compress_ratios"]),
            hash_layers=fields["num_hash_layers"],
            heads=fields["num_attention_heads"],
            head_dim=fields["head_dim"],
            rope_dim=fields["qk_rope_head_dim"],
            q_rank=fields["q_lora_rank"],
            groups=fields["o_groups"],
            o_rank=fields["o_lora_rank"],
            window=fields["sliding_window"],
            index_heads=fields["index_n_heads"],
            index_dim=fields["index_head_dim"],
            index_topk=fields["index_topk"],
            experts=fields["n_routed_experts"],
            top_experts=fields["num_experts_per_tok"],
            width=fields["moe_intermediate_size"],
            route_scale=fields["routed_scaling_factor"],
            swiglu_limit=fields["swiglu_limit"],
            eps=fields["rms_norm_eps"],
            hc_eps=fields["hc_eps"],
            streams=fields["hc_mult"],
            sinkhorn=fields["hc_sinkhorn_iters"],
            rope_theta=fields["rope_theta"],
            compress_theta=fields["compress_rope_theta"],
            rope_factor=rope["factor"],
            rope_length=rope["original_max_position_embeddings"],
            beta_fast=rope["beta_fast"],
            beta_slow=rope["beta_slow"],
            vocab=fields["vocab_size"],
        )

    @classmethod
    def from_folder(cls, folder: Path) -> Config:
        """Read `folder/config.json`."""
        return cls.from_json(json.loads((folder / "config.json").read_text()))

    def blocks(self) -> list[tuple[str, int]]:
        """All blocks as (name prefix, compress ratio): the backbone in order, then the MTP blocks."""
        names = [f"layers.{n}" for n in range(self.layers)] + [f"mtp.{m}" for m in range(self.mtp_layers)]
        return list(zip(names, self.ratios, strict=True))

    def is_hash_layer(self, prefix: str) -> bool:
        """Whether the block routes by token id instead of by score (section 8)."""
        family, number = prefix.split(".")
        return family == "layers" and int(number) < self.hash_layers


def inventory(cfg: Config) -> list[Tensor]:
    """All tensors of a checkpoint in file order, experts stacked (section 11)."""
    return [
        Tensor("embed.weight", (cfg.vocab, cfg.dim), Kind.BF16),
        *(tensor for prefix, ratio in cfg.blocks() if prefix.startswith("layers") for tensor in
          block_rows(cfg, prefix, ratio)),
        *hyper_head_rows(cfg, ""),
        Tensor("norm.weight", (cfg.dim,), Kind.BF16),
        Tensor("head.weight", (cfg.vocab, cfg.dim), Kind.BF16),
        *(tensor for prefix, ratio in cfg.blocks() if prefix.startswith("mtp") for tensor in
          [*block_rows(cfg, prefix, ratio), *_mtp_extras(cfg, prefix)]),
    ]  # fmt: skip


def block_rows(cfg: Config, prefix: str, ratio: int) -> Iterator[Tensor]:
    """Rows of one block: norms, hyper-connections, attention and experts."""
    flat, mixes = cfg.streams * cfg.dim, (2 + cfg.streams) * cfg.streams
    for part in ("attn", "ffn"):
        yield Tensor(f"{prefix}.{part}_norm.weight", (cfg.dim,), Kind.BF16)
        yield Tensor(f"{prefix}.hc_{part}_fn", (mixes, flat), Kind.F32)
        yield Tensor(f"{prefix}.hc_{part}_base", (mixes,), Kind.F32)
        yield Tensor(f"{prefix}.hc_{part}_scale", (3,), Kind.F32)
    yield from _attention(cfg, f"{prefix}.attn", ratio)
    yield from _moe(cfg, f"{prefix}.ffn", cfg.is_hash_layer(prefix))


def _attention(cfg: Config, p: str, ratio: int) -> Iterator[Tensor]:
    d = cfg.head_dim
    yield Tensor(f"{p}.attn_sink", (cfg.heads,), Kind.F32)
    yield Tensor(f"{p}.wq_a.weight", (cfg.q_rank, cfg.dim), Kind.FP8)
    yield Tensor(f"{p}.q_norm.weight", (cfg.q_rank,), Kind.BF16)
    yield Tensor(f"{p}.wq_b.weight", (cfg.heads * d, cfg.q_rank), Kind.FP8)
    yield Tensor(f"{p}.wkv.weight", (d, cfg.dim), Kind.FP8)
    yield Tensor(f"{p}.kv_norm.weight", (d,), Kind.BF16)
    yield Tensor(f"{p}.wo_a.weight", (cfg.groups * cfg.o_rank, cfg.heads * d // cfg.groups), Kind.FP8)
    yield Tensor(f"{p}.wo_b.weight", (cfg.dim, cfg.groups * cfg.o_rank), Kind.FP8)
    if ratio:
        yield from _compressor(cfg, f"{p}.compressor", ratio, d)
    if ratio == 4:
        yield Tensor(f"{p}.indexer.wq_b.weight", (cfg.index_heads * cfg.index_dim, cfg.q_rank), Kind.FP8)
        yield Tensor(f"{p}.indexer.weights_proj.weight", (cfg.index_heads, cfg.dim), Kind.BF16)
        yield from _compressor(cfg, f"{p}.indexer.compressor", ratio, cfg.index_dim)


def _compressor(cfg: Config, p: str, ratio: int, width: int) -> Iterator[Tensor]:
    columns = 2 * width if ratio == 4 else width
    yield Tensor(f"{p}.wkv.weight", (columns, cfg.dim), Kind.BF16)
    yield Tensor(f"{p}.wgate.weight", (columns, cfg.dim), Kind.BF16)
    yield Tensor(f"{p}.ape", (ratio, columns), Kind.F32)
    yield Tensor(f"{p}.norm.weight", (width,), Kind.BF16)


def _moe(cfg: Config, p: str, by_hash: bool) -> Iterator[Tensor]:
    yield Tensor(f"{p}.gate.weight", (cfg.experts, cfg.dim), Kind.BF16)
    if by_hash:
        yield Tensor(f"{p}.gate.tid2eid", (cfg.vocab, cfg.top_experts), Kind.I64)
    else:
        yield Tensor(f"{p}.gate.bias", (cfg.experts,), Kind.F32)
    for matrix, shape in (("w1", (cfg.width, cfg.dim)), ("w2", (cfg.dim, cfg.width)),
                          ("w3", (cfg.width, cfg.dim))):  # fmt: skip
        yield Tensor(f"{p}.experts.{matrix}", (cfg.experts, *shape), Kind.FP4)
        yield Tensor(f"{p}.shared_experts.{matrix}.weight", shape, Kind.FP8)


def hyper_head_rows(cfg: Config, p: str) -> Iterator[Tensor]:
    """Rows that collapse the streams into one."""
    yield Tensor(f"{p}hc_head_fn", (cfg.streams, cfg.streams * cfg.dim), Kind.F32)
    yield Tensor(f"{p}hc_head_base", (cfg.streams,), Kind.F32)
    yield Tensor(f"{p}hc_head_scale", (1,), Kind.F32)


def _mtp_extras(cfg: Config, p: str) -> Iterator[Tensor]:
    for name in ("e_proj", "h_proj"):
        yield Tensor(f"{p}.{name}.weight", (cfg.dim, cfg.dim), Kind.FP8)
    for name in ("enorm", "hnorm", "norm"):
        yield Tensor(f"{p}.{name}.weight", (cfg.dim,), Kind.BF16)
    yield from hyper_head_rows(cfg, f"{p}.")
