"""DeepSeek-V4 in MLX: backbone, and the multi-token-prediction head that drafts.

Shapes: B batch, L tokens of this pass, M streams (hc_mult), D hidden size, V vocabulary. The module tree is
the set of tensor names in a converted folder (layouts, section 1); the head is `mtp.0`, with the same names
below it. Compute dtype is the dtype of the final norm's weight; see `Model.set_compute_dtype`. Sources:
architecture description, section 2 (backbone) and section 9 (head).
"""

# mlx.nn carries no types that mypy can see, so these checks would only repeat that.
# mypy: disable-error-code="attr-defined,name-defined,misc,no-any-return,str-unpack,union-attr"

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from .block import DeepseekV4Block
from .cache import ContextCache, HeadCache, LayerCache
from .config import ModelArgs
from .dspark import DraftBlock, DSpark, DSparkStage, tap, tapped_states
from .layers import HyperHead, QuantizedSwitchLinear, Step, SwitchLinear, Trace
from .weights import HeadStatus, sanitize, stays_float32


class MTPBlock(DeepseekV4Block):
    """The head: a block that reads the backbone's streams at t and token t+1, to predict token t+2.

    Embedding and output matrix are the backbone's; the final norm and HyperHead are its own.
    """

    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args, args.num_hidden_layers)
        width = args.hidden_size
        self.e_proj = nn.Linear(width, width, bias=False)
        self.h_proj = nn.Linear(width, width, bias=False)
        self.enorm = nn.RMSNorm(width, eps=args.rms_norm_eps)
        self.hnorm = nn.RMSNorm(width, eps=args.rms_norm_eps)
        self.norm = nn.RMSNorm(width, eps=args.rms_norm_eps)
        self.hc_head = HyperHead(args)

    def __call__(  # type: ignore[override]
        self, hidden: mx.array, embedded: mx.array, tokens: mx.array, cache: LayerCache
    ) -> mx.array:
        """Hidden [B, L, M, D], embeddings [B, L, D] of the next tokens [B, L]: the block's streams [B, L, M,
        D].
        """
        step = Step(cache.offset, hidden.shape[1])
        entered = self.e_proj(self.enorm(embedded))[:, :, None] + self.h_proj(self.hnorm(hidden))
        return self.forward(entered, tokens, cache, step)


class Backbone(nn.Module):
    """Embedding, layers, final HyperHead and norm."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [DeepseekV4Block(args, layer) for layer in range(args.num_hidden_layers)]
        self.hc_head = HyperHead(args)
        self.norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.streams = args.hc_mult

    def __call__(
        self,
        tokens: mx.array,
        cache: list[LayerCache],
        trace: Trace | None,
        tapped: dict[int, mx.array] | None = None,
    ) -> mx.array:
        """Token ids [B, L] to the raw streams [B, L, M, D] after the last layer.

        `tapped` is filled in: its keys are numbers of layers passed, its values become the streams' mean [B, L, D].
        """
        step = Step(cache[0].offset, tokens.shape[1], trace)
        embedded = self.embed_tokens(tokens).astype(self.norm.weight.dtype)
        hidden = mx.repeat(embedded[:, :, None], self.streams, axis=2)
        tapped = {} if tapped is None else tapped
        if 0 in tapped:
            tapped[0] = tap(hidden)
        if trace is not None:
            trace("hidden", 0, hidden)
        for number, (layer, state) in enumerate(zip(self.layers, cache, strict=True), 1):
            hidden = layer(hidden, tokens, state, step)
            if number in tapped:
                tapped[number] = tap(hidden)
            if trace is not None:
                trace("hidden", number, hidden)
        return hidden


class Model(nn.Module):
    """Backbone with output matrix, and the head where the checkpoint has one (`head` says whether and
    why).
    """

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.model = Backbone(args)
        self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)
        self.head = HeadStatus("none", "this model never had one (num_nextn_predict_layers is 0)")
        if args.num_nextn_predict_layers:
            self.mtp = [MTPBlock(args)]
            self.head = HeadStatus("classic")

    def __call__(
        self,
        inputs: mx.array,
        cache: list[LayerCache] | None = None,
        return_hidden: bool = False,
        trace: Trace | None = None,
    ) -> Any:
        """Logits float32 [B, L, V] for token ids [B, L]; with `return_hidden` also the raw streams [B, L, M,
        D].

        `cache` (from `make_cache`) continues a sequence; of a longer list the first `num_hidden_layers` are
        used. A list that holds a DSpark head's context too has that kept up: these tokens count as committed.
        """
        states = self.make_cache() if cache is None else cache[: len(self.layers)]
        if self.is_dspark and cache is not None and len(cache) > len(self.layers):
            logits, taps, hidden = self.tapped_forward(inputs, states, trace)
            self.append_context(taps, cache[len(self.layers) :])  # type: ignore[arg-type]
        else:
            hidden = self.model(inputs, states, trace)
            logits = self._logits(self.model.norm(self.model.hc_head(hidden)))
        return (logits, hidden) if return_hidden else logits

    @property
    def is_dspark(self) -> bool:
        """Whether there is a DSpark head that can draft."""
        return self.head.present and self.head.kind == "dspark"

    def tapped_forward(
        self, inputs: mx.array, cache: list[LayerCache], trace: Trace | None = None
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Logits float32 [B, L, V], what a DSpark head reads of the same pass (taps [B, L, T * D]), and raw streams.

        The head's context is not touched: only the taps of committed tokens go into it (`append_context`).
        """
        states = cache[: len(self.layers)]
        places = tapped_states(self.args.dspark_target_layer_ids)
        tapped = dict.fromkeys(places, mx.array(0))
        hidden = self.model(inputs, states, trace, tapped)
        logits = self._logits(self.model.norm(self.model.hc_head(hidden)))
        return logits, mx.concatenate([tapped[place] for place in places], axis=-1), hidden

    @property
    def dspark(self) -> DSpark:
        """The DSpark head. Raises ValueError where there is none."""
        if not self.is_dspark:
            raise ValueError(f"the model has no DSpark head: {self.head.reason or self.head.kind}")
        return DSpark(self.mtp, self.args, self.model.embed_tokens, self._logits)

    def append_context(self, taps: mx.array, mtp_cache: list[ContextCache]) -> None:
        """Give a DSpark head the taps [1, n, T * D] of the next n committed positions."""
        self.dspark.append(taps, mtp_cache)

    def draft_block(self, anchor: int, mtp_cache: list[ContextCache], trace: Trace | None = None) -> DraftBlock:
        """Draft a block after the newest token; the context must hold every position before it."""
        return self.dspark.block(anchor, mtp_cache, trace)

    def mtp_forward(
        self,
        hidden: mx.array,
        next_tokens: mx.array,
        mtp_cache: list[HeadCache],
        return_hidden: bool = False,
    ) -> Any:
        """Draft logits float32 [B, L, V]: from streams [B, L, M, D] at t and tokens [B, L] at t+1, for token
        t+2.

        With `return_hidden` also the block's own streams [B, L, M, D], which take the place of `hidden` for
        the next draft. The cache must have been given every position before.
        """
        if not self.head.present:
            raise ValueError(f"the model has no head to draft with: {self.head.reason}")
        if self.is_dspark:
            raise ValueError("a DSpark head drafts in blocks: use `draft_block`")
        block = self.mtp[0]
        embedded = self.model.embed_tokens(next_tokens).astype(hidden.dtype)
        streams = block(hidden, embedded, next_tokens, mtp_cache[0])
        logits = self._logits(block.norm(block.hc_head(streams)))
        return (logits, streams) if return_hidden else logits

    def _logits(self, x: mx.array) -> mx.array:
        logits: mx.array = self.lm_head(x).astype(mx.float32)
        return logits

    @property
    def layers(self) -> list[DeepseekV4Block]:
        """The backbone's layers."""
        layers: list[DeepseekV4Block] = self.model.layers
        return layers

    def make_cache(self) -> list[LayerCache]:
        """Empty state for each layer of the backbone."""
        args = self.args
        return [LayerCache(args.sliding_window, args.ratio(n)) for n in range(args.num_hidden_layers)]

    def make_mtp_cache(self) -> list[Any]:
        """Empty state for the head: one of a classic head, one per stage of a DSpark head; none where there is none."""
        args = self.args
        if not self.head.present:
            return []
        if self.is_dspark:
            return [ContextCache(args.sliding_window) for _ in self.mtp]
        return [HeadCache(args.sliding_window, args.ratio(args.num_hidden_layers))]

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """This model's parameters from any known spelling (see `weights`).

        Block-scaled source matrices are repacked without rounding, and their modules made quantized to fit.
        Where the head's tensors are absent, the head is removed and `head` says why.
        """
        loaded = sanitize(weights, self.args)
        self.head = loaded.head
        if not self.head.present and "mtp" in self:
            del self.mtp
        if self.is_dspark:
            stages = loaded.head.stages
            self.mtp = [DSparkStage(self.args, stage, stages) for stage in range(stages)]
        if loaded.repacked:
            nn.quantize(self, class_predicate=lambda path, module: loaded.repacked.get(path, False))
        return loaded.weights

    @property
    def cast_predicate(self) -> Any:
        """For mlx-lm's converter: which parameters a dtype cast may touch."""
        return lambda name: not stays_float32(name)

    @property
    def quant_predicate(self) -> Any:
        """For mlx-lm's converter: the router is a plain array and stays dense, all matrices may be
        quantized.
        """
        kept = ("compressor", "markov_head", "confidence_head")
        return lambda path, module: hasattr(module, "to_quantized") and not any(part in path for part in kept)

    @property
    def compute_dtype(self) -> mx.Dtype:
        """Dtype of activations: that of the final norm's weight."""
        return self.model.norm.weight.dtype

    def set_compute_dtype(self, dtype: mx.Dtype) -> None:
        """Cast every floating-point parameter that may be narrowed; float32 lists and packed codes stay."""
        flat = [
            (name, value.astype(dtype))
            for name, value in tree_flatten(self.parameters())
            if mx.issubdtype(value.dtype, mx.floating) and not stays_float32(name)
        ]
        self.update(tree_unflatten(flat))

    def dequantize(self) -> None:
        """Replace every quantized matrix by its dense values in the compute dtype.

        On a CPU this is several times faster and needs as many times more memory.
        """
        dense = [
            (path, _dense(module, self.compute_dtype))
            for path, module in self.named_modules()
            if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding | QuantizedSwitchLinear)
        ]
        self.update_modules(tree_unflatten(dense))


def _dense(module: Any, dtype: mx.Dtype) -> nn.Module:
    """The dense counterpart of a quantized module."""
    weight = mx.dequantize(
        module.weight,
        module.scales,
        module.get("biases"),
        group_size=module.group_size,
        bits=module.bits,
        mode=module.mode,
    ).astype(dtype)
    if isinstance(module, QuantizedSwitchLinear):
        plain: nn.Module = SwitchLinear(1, 1, 1)
    elif isinstance(module, nn.QuantizedEmbedding):
        plain = nn.Embedding(1, 1)
    else:
        plain = nn.Linear(1, 1, bias=False)
    plain.weight = weight
    return plain
