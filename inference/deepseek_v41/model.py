"""DeepSeek-V4.1 in MLX: backbone, and the DSpark head that drafts. The text model alone; images are not run.

The module tree has V4's names. Shapes: B batch, L tokens of this pass, M streams (hc_mult), D hidden size, T tapped
layers. Source: the reference on V4.1.
"""

# mlx.nn carries no types that mypy can see, so these checks would only repeat that.
# mypy: disable-error-code="attr-defined,name-defined,misc,no-any-return,str-unpack,union-attr"

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..deepseek_v4 import model as v4
from ..deepseek_v4.dspark import tap
from ..deepseek_v4.layers import Trace
from ..deepseek_v4.weights import HeadStatus
from .attention import Pass
from .cache import SourceCache
from .config import ModelArgs
from .dspark import DSparkStage
from .layers import Block, Collapse, Mixed, begun
from .ngrams import Hasher
from .table import MXFP8, HeldLeaf, Table
from .weights import TABLE, sanitize


class Backbone(nn.Module):
    """Embedding, layers, and the norm of what the last layer's mix makes of the streams."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [Block(args, layer) for layer in range(args.num_hidden_layers)]
        self.hc_head = Collapse()
        self.norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.streams = args.hc_mult

    def __call__(
        self,
        tokens: mx.array,
        cache: list[SourceCache],
        trace: Trace | None,
        tapped: dict[int, mx.array] | None = None,
    ) -> Mixed:
        """Token ids [B, L] to streams [B, L, M, D] after the last layer, and the mix that collapses them.

        `tapped` is filled in as V4 has it, by the number of the target layer and 1: with the mean of the streams that
        ENTER the layer, its engram's part included.
        """
        step = Pass(cache[0].offset, tokens.shape[1], trace)
        embedded = self.embed_tokens(tokens).astype(self.norm.weight.dtype)
        state = begun(mx.repeat(embedded[:, :, None], self.streams, axis=2))
        tapped = {} if tapped is None else tapped
        if 0 in tapped:
            tapped[0] = tap(state.streams)
        if trace is not None:
            trace("hidden", 0, state.streams)
        for number, (layer, own) in enumerate(zip(self.layers, cache, strict=True), 1):
            state = layer.enrich(state, tokens, own, step)
            if number in tapped:
                tapped[number] = tap(state.streams)
            state = layer(state, tokens, own, step)
            if trace is not None:
                trace("hidden", number, state.streams)
        if trace is not None:
            trace("mix", len(self.layers), state.mix)
        return state


class Model(v4.Model):
    """Backbone with output matrix, and the head where the checkpoint has one."""

    args: ModelArgs

    def __init__(self, args: ModelArgs) -> None:
        nn.Module.__init__(self)
        self.args = args
        self.model_type = args.model_type
        self.model = Backbone(args)
        self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)
        self.head = HeadStatus("none", "this model never had one (num_nextn_predict_layers is 0)")

    def __call__(
        self,
        inputs: mx.array,
        cache: list[Any] | None = None,
        return_hidden: bool = False,
        trace: Trace | None = None,
    ) -> Any:
        """As of V4: logits float32 [B, L, V], with `return_hidden` also the raw streams [B, L, M, D]."""
        logits, hidden = super().__call__(inputs, cache, True, trace)
        streams = hidden.streams if isinstance(hidden, Mixed) else hidden
        return (logits, streams) if return_hidden else logits

    def tapped_forward(
        self, inputs: mx.array, cache: list[Any], trace: Trace | None = None
    ) -> tuple[mx.array, mx.array, mx.array]:
        """As of V4: logits, taps [B, L, T * D] and raw streams of one pass."""
        logits, taps, state = super().tapped_forward(inputs, cache, trace)
        return logits, taps, state.streams

    def make_cache(self) -> list[Any]:
        """Empty state for each layer of the backbone."""
        args = self.args
        reach = args.engram_max_ngram_size - 1
        return [
            SourceCache(args.sliding_window, args.made_ratio(n), reach if n in args.engram_layer_ids else 0)
            for n in range(args.num_hidden_layers)
        ]

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """As of V4. Tables among the weights are attached; those of files are attached by who reads them."""
        loaded = sanitize(weights, self.args)
        self.head = loaded.head
        if self.head.present:
            self.mtp = [DSparkStage(self.args, stage, self.head.stages) for stage in range(self.head.stages)]
        if loaded.repacked:
            nn.quantize(self, class_predicate=lambda path, module: loaded.repacked.get(path, False))
        if loaded.tables:
            self.attach_tables({name: HeldLeaf(tensor) for name, tensor in loaded.tables.items()}, {})
        return loaded.weights

    def attach_tables(self, leaves: Mapping[str, Any], forms: Mapping[str, Any]) -> None:
        """Give every engram its table: tensors by name, and formats of packed tables by path, FP8 where none is said.

        Raises ValueError, naming the tensor, where one is missing or does not fit.
        """
        args = self.args
        for layer, rows in zip(args.engram_layer_ids, args.engram_num_embeddings, strict=True):
            path = f"model.layers.{layer}{TABLE}".removesuffix(".")
            own = {name.removeprefix(f"{path}."): leaf for name, leaf in leaves.items() if name.startswith(f"{path}.")}
            own = {"scales" if name == "scale" else name: leaf for name, leaf in own.items()}
            form = forms.get(path, MXFP8) if "scales" in own else None
            try:
                self.model.layers[layer].engram.table = Table(own, form, (rows, args.engram_head_dim))
            except ValueError as error:
                raise ValueError(f"{path}.{error}") from None

    def attach_tokenizer(self, compressed: list[int]) -> None:
        """Let engrams hash by the compressed ids of the tokenizer's tokens (`ngrams.token_map`)."""
        hasher = Hasher(self.args.engrams, compressed)
        for layer in self.args.engram_layer_ids:
            self.model.layers[layer].engram.hasher = hasher
