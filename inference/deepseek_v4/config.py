"""The model's dimensions, read from config.json (names of the official Hugging Face config).

Owns the defaults and the checks that need no tensor; refuses what the forward pass cannot compute.
Source of every meaning: architecture description, section 1.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any, Self

OVERLAP_RATIO = 4
"""The one compress ratio whose windows overlap and whose entries are chosen by an indexer (section 6)."""


@dataclass
class ModelArgs:
    """Dimensions and constants of one DeepSeek-V4 model; every field is a key of config.json."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    sliding_window: int
    compress_ratios: list[int]
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    n_shared_experts: int = 1
    num_hash_layers: int = 0
    num_nextn_predict_layers: int = 0
    scoring_func: str = "sqrtsoftplus"
    routed_scaling_factor: float = 1.0
    swiglu_limit: float = 0.0
    rms_norm_eps: float = 1e-6
    hc_eps: float = 1e-6
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    rope_theta: float = 10000.0
    compress_rope_theta: float = 160000.0
    rope_scaling: dict[str, Any] | None = None
    max_position_embeddings: int = 1048576
    tie_word_embeddings: bool = False
    dspark_block_size: int = 0
    dspark_markov_rank: int = 0
    dspark_noise_token_id: int = -1
    dspark_target_layer_ids: list[int] | tuple[int, ...] = ()
    quantization: dict[str, Any] | None = field(default=None, repr=False)

    @classmethod
    def from_dict(cls, params: dict[str, Any]) -> Self:
        """Arguments from a parsed config.json; keys that the forward pass does not use are ignored."""
        known = inspect.signature(cls).parameters
        return cls(**{key: value for key, value in params.items() if key in known})

    def __post_init__(self) -> None:
        """Raise ValueError on a config that this forward pass would compute wrongly."""
        if self.model_type != "deepseek_v4":
            raise ValueError(f"model_type: expected deepseek_v4, found {self.model_type}")
        if len(self.compress_ratios) < self.num_hidden_layers:
            raise ValueError(
                f"compress_ratios: expected at least {self.num_hidden_layers} items (one per layer), "
                f"found {len(self.compress_ratios)}"
            )
        rotated = [self.head_dim, *([self.index_head_dim] if OVERLAP_RATIO in self.compress_ratios else [])]
        if self.qk_rope_head_dim > min(rotated):
            raise ValueError(
                f"qk_rope_head_dim: expected at most {min(rotated)} (head_dim, index_head_dim), "
                f"found {self.qk_rope_head_dim}"
            )
        if self.n_shared_experts != 1:
            raise ValueError(f"n_shared_experts: expected 1, found {self.n_shared_experts}")
        if self.scoring_func != "sqrtsoftplus":
            raise ValueError(f"scoring_func: expected sqrtsoftplus, found {self.scoring_func}")
        if self.tie_word_embeddings:
            raise ValueError("tie_word_embeddings: expected false, found true")

    def ratio(self, layer: int) -> int:
        """Compress ratio of a layer; the head's block is layer `num_hidden_layers` (0 where not listed)."""
        return self.compress_ratios[layer] if layer < len(self.compress_ratios) else 0

    def check_dspark(self) -> None:
        """Raise ValueError, naming the key, on values with which a DSpark head cannot be run."""
        wanted = {"dspark_block_size": self.dspark_block_size, "dspark_markov_rank": self.dspark_markov_rank}
        for key, value in wanted.items():
            if type(value) is not int or value < 1:
                raise ValueError(f"{key}: expected 1 or more, found {value!r}; take it from the source's config.json")
        noise, layers = self.dspark_noise_token_id, self.dspark_target_layer_ids
        if type(noise) is not int or not 0 <= noise < self.vocab_size:
            raise ValueError(
                f"dspark_noise_token_id: expected an id below {self.vocab_size} (vocab_size), found {noise!r}; "
                "take it from the source's config.json"
            )
        last = self.num_hidden_layers - 1
        if (
            not isinstance(layers, list | tuple)
            or not layers
            or not all(type(n) is int and 0 <= n <= last for n in layers)
        ):
            raise ValueError(
                f"dspark_target_layer_ids: expected a list of backbone layers, 0 to {last}, found {layers!r}; "
                "take it from the source's config.json"
            )

    def uses_hash(self, layer: int) -> bool:
        """Whether a layer routes by token id (section 8)."""
        return layer < self.num_hash_layers


def head_size_bytes(args: ModelArgs) -> int:
    """Bytes of the classic head at source precision: FP4 experts, FP8 matrices, scales included.

    Flash: about 3.6e9. From the inventory (architecture description, section 11), norms left out.
    """
    width, inner, experts = args.hidden_size, args.moe_intermediate_size, args.n_routed_experts
    queries = args.num_attention_heads * args.head_dim
    lora = args.o_groups * args.o_lora_rank
    expert_weights = experts * 3 * inner * width
    attention = args.q_lora_rank * (width + queries) + args.head_dim * width
    attention += lora * (queries // args.o_groups) + width * lora
    dense = attention + 3 * inner * width + 2 * width * width
    hyper = 4 * (2 * (2 + args.hc_mult) * args.hc_mult + args.hc_mult) * args.hc_mult * width
    return expert_weights // 2 + expert_weights // 32 + dense + dense // 128**2 + 2 * experts * width + hyper
