"""The dimensions of a DeepSeek-V4.1 model, and which layer reads what of which.

Keys are those of config.json, whose text model lies in `text_config`. Compressed keys and the choice among them are
made in the layers that two lists name; every other layer uses those of the nearest such layer before it. Source: the
reference on V4.1, sections 2 and 3.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Self

from ..deepseek_v4.config import ModelArgs as ModelArgsV4
from .ngrams import Layout, table_sizes

RATIOS = (0, 1, 2)
"""Tokens per compressed entry that the family knows; 0: the layer sees its window alone."""

NO_LAYER = -1

MOST_PARTS, MOST_ROWS = 1024, 1 << 31
"""Parts of all engram tables together, and rows from which primes are sought for each: what a prime search can take."""


@dataclass
class ModelArgs(ModelArgsV4):
    """Dimensions and constants of one DeepSeek-V4.1 model."""

    kv_source_layer_ids: list[int] | tuple[int, ...] = ()
    index_source_layer_ids: list[int] | tuple[int, ...] = ()
    candidate_source_layer_id: int = NO_LAYER
    candidate_topk_blocks: int = 0
    candidate_block_size: int = 0
    engram_layer_ids: list[int] | tuple[int, ...] = ()
    engram_num_embeddings: list[int] | tuple[int, ...] = ()
    engram_max_ngram_size: int = 0
    engram_n_heads: int = 0
    engram_head_dim: int = 0
    engram_vocab_size: int = 0
    engram_pad_token_id: int = 0
    engram_compressed_vocab_size: int = 0
    norm_topk_prob: bool = True
    dspark_n_routed_experts: int = 0
    dspark_num_experts_per_tok: int = 0
    quantization_config: dict[str, Any] | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Raise ValueError on a config that this forward pass would compute wrongly."""
        if self.model_type != "deepseek_v41":
            raise ValueError(f"model_type: expected deepseek_v41, found {self.model_type}")
        self._check_fixed()
        self._check_ratios()
        self._check_sources()
        self._check_candidates()
        self._check_engrams()

    # ------------------------------------------------------------------ who reads what of whom

    def source(self, layers: list[int] | tuple[int, ...], layer: int) -> int:
        """The last of `layers` that is not after `layer`; `NO_LAYER` where there is none."""
        return max((n for n in layers if n <= layer), default=NO_LAYER)

    def kv_source(self, layer: int) -> int:
        """The layer whose compressed keys a layer reads."""
        return self.source(self.kv_source_layer_ids, layer)

    def index_source(self, layer: int) -> int:
        """The layer whose choice among compressed keys a layer uses."""
        return self.source(self.index_source_layer_ids, layer)

    def made_ratio(self, layer: int) -> int:
        """Tokens per compressed entry that a layer makes; 0 where it makes none."""
        return self.ratio(layer) if layer in self.kv_source_layer_ids else 0

    def uses_candidates(self, layer: int) -> bool:
        """Whether a layer chooses only among the blocks that the candidate layer kept."""
        return NO_LAYER < self.candidate_source_layer_id < layer

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns that share one scale in an FP8 matrix of the official format."""
        stated = (self.quantization_config or {}).get("weight_block_size", [32, 32])
        good = isinstance(stated, list) and len(stated) == 2 and all(type(n) is int and n > 0 for n in stated)
        if not good:
            raise ValueError(f"quantization_config.weight_block_size: expected two sizes, found {stated!r}")
        return stated[0], stated[1]

    @property
    def engrams(self) -> Layout:
        """How the engram tables are laid out."""
        return Layout(
            tuple(self.engram_layer_ids), self.engram_max_ngram_size, self.engram_n_heads, self.engram_vocab_size,
            self.vocab_size, self.engram_compressed_vocab_size, self.engram_pad_token_id,
        )  # fmt: skip

    def of_head(self) -> Self:
        """The dimensions of the head's stages, which have experts of their own number."""
        experts = self.dspark_n_routed_experts or self.n_routed_experts
        chosen = self.dspark_num_experts_per_tok or self.num_experts_per_tok
        return dataclasses.replace(self, n_routed_experts=experts, num_experts_per_tok=chosen)

    # ------------------------------------------------------------------ checks

    def _check_fixed(self) -> None:
        for key, wanted in (("n_shared_experts", 1), ("scoring_func", "sqrtsoftplus"), ("tie_word_embeddings", False)):
            if (found := getattr(self, key)) != wanted:
                raise ValueError(f"{key}: expected {wanted}, found {found}")
        narrow = min(self.head_dim, self.index_head_dim) if self.index_source_layer_ids else self.head_dim
        if self.qk_rope_head_dim > narrow:
            raise ValueError(
                f"qk_rope_head_dim: expected at most {narrow} (head_dim, index_head_dim), found {self.qk_rope_head_dim}"
            )
        if self.dspark_num_experts_per_tok > (self.dspark_n_routed_experts or self.n_routed_experts):
            raise ValueError(
                f"dspark_num_experts_per_tok is {self.dspark_num_experts_per_tok}, more than the head's "
                f"{self.dspark_n_routed_experts or self.n_routed_experts} experts"
            )

    def _check_ratios(self) -> None:
        layers, ratios = self.num_hidden_layers, self.compress_ratios
        if len(ratios) < layers:
            raise ValueError(f"compress_ratios: expected at least {layers} items (one per layer), found {len(ratios)}")
        if strange := sorted(set(ratios) - set(RATIOS)):
            raise ValueError(f"compress_ratios: expected 0, 1 or 2, found {strange[0]}")
        if any(ratios[layers:]):
            raise ValueError(f"compress_ratios: expected 0 for the head's stages, found {max(ratios[layers:])}")

    def _check_sources(self) -> None:
        lists = ("kv_source_layer_ids", "index_source_layer_ids", "engram_layer_ids")
        for key in lists:
            found = getattr(self, key)
            if list(found) != sorted(set(found)) or (found and max(found) >= self.num_hidden_layers):
                raise ValueError(
                    f"{key}: expected layers 0 to {self.num_hidden_layers - 1}, each once and ascending, "
                    f"found {list(found)}"
                )
        if outside := sorted(set(self.kv_source_layer_ids) - set(self.index_source_layer_ids)):
            raise ValueError(
                f"kv_source_layer_ids: layer {outside[0]} is not in index_source_layer_ids, so nothing chooses among "
                "its entries"
            )
        for layer in range(self.num_hidden_layers):
            ratio, source = self.ratio(layer), self.kv_source(layer)
            if not ratio and layer in self.index_source_layer_ids:
                raise ValueError(f"index_source_layer_ids: layer {layer} has compress ratio 0, so it has no entries")
            if ratio and source == NO_LAYER:
                raise ValueError(
                    f"kv_source_layer_ids: layer {layer} has compress ratio {ratio}, and no layer up to it is listed"
                )
            if ratio and self.ratio(source) != ratio:
                raise ValueError(
                    f"compress_ratios: layer {layer} has {ratio}, but layer {source}, whose entries it reads "
                    f"(kv_source_layer_ids), has {self.ratio(source)}"
                )

    def _check_candidates(self) -> None:
        chosen = self.candidate_source_layer_id
        if chosen == NO_LAYER:
            return
        if chosen not in self.index_source_layer_ids:
            raise ValueError(f"candidate_source_layer_id: {chosen} is not in index_source_layer_ids")
        for key in ("candidate_topk_blocks", "candidate_block_size"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}: expected 1 or more, found {getattr(self, key)}")
        for layer in self.index_source_layer_ids:
            if layer > chosen and self.kv_source(layer) != self.kv_source(chosen):
                raise ValueError(
                    f"candidate_source_layer_id: layer {layer} chooses among the entries of layer "
                    f"{self.kv_source(layer)}, and the candidates are entries of layer {self.kv_source(chosen)}"
                )

    def _check_engrams(self) -> None:
        if not self.engram_layer_ids:
            return
        for key in ("engram_n_heads", "engram_head_dim", "engram_vocab_size", "engram_compressed_vocab_size"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}: expected 1 or more, found {getattr(self, key)}")
        parts = (self.engram_max_ngram_size - 1) * self.engram_n_heads * len(self.engram_layer_ids)
        if parts > MOST_PARTS or self.engram_vocab_size > MOST_ROWS:
            raise ValueError(
                f"engram_vocab_size, engram_n_heads, engram_max_ngram_size: {parts} parts of {self.engram_vocab_size} "
                f"rows are more than this tool handles ({MOST_PARTS} of {MOST_ROWS})"
            )
        if self.engram_max_ngram_size < 2:
            raise ValueError(f"engram_max_ngram_size: expected 2 or more, found {self.engram_max_ngram_size}")
        if not 0 <= self.engram_pad_token_id < self.vocab_size:
            raise ValueError(
                f"engram_pad_token_id: expected an id below {self.vocab_size} (vocab_size), "
                f"found {self.engram_pad_token_id}"
            )
        wanted = [sum(sizes) for sizes in table_sizes(self.engrams)]
        if list(self.engram_num_embeddings) != wanted:
            raise ValueError(
                f"engram_num_embeddings: expected {wanted}, the sums of the primes that follow from engram_vocab_size "
                f"and engram_n_heads, found {list(self.engram_num_embeddings)}"
            )


def layer_state_bytes(args: ModelArgs, layer: int, context: int, width: int) -> int:
    """Bytes of decode state of one backbone layer beside its window, after `context` tokens."""
    from ..deepseek_v4.cache import SPARE

    total, ratio = 0, args.made_ratio(layer)
    if ratio:
        total += context // ratio * (args.head_dim + args.index_head_dim) * width
    if ratio > 1:
        total += (ratio + SPARE) * 2 * args.head_dim * 4
    if layer in args.engram_layer_ids:
        total += (args.engram_max_ngram_size + SPARE) * 4
    return total
