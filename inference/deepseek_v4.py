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

from .attention import Attention
from .cache import HeadCache, LayerCache
from .config import ModelArgs
from .layers import (
    HyperConnection,
    HyperHead,
    MoE,
    QuantizedSwitchLinear,
    Rope,
    Step,
    SwitchLinear,
    Trace,
    spread,
)
from .weights import HeadStatus, sanitize, stays_float32


class DeepseekV4Block(nn.Module):
    """One layer: attention and experts, each read from and returned to the M streams."""

    def __init__(self, args: ModelArgs, layer: int) -> None:
        super().__init__()
        ratio = args.ratio(layer)
        base = args.compress_rope_theta if ratio else args.rope_theta
        rope = Rope(args.qk_rope_head_dim, base, args.rope_scaling if ratio else None)
        self.attn_norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.attn = Attention(args, layer, rope)
        self.attn_hc = HyperConnection(args)
        self.ffn_norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.ffn = MoE(args, layer)
        self.ffn_hc = HyperConnection(args)

    def forward(self, streams: mx.array, tokens: mx.array, cache: LayerCache, step: Step) -> mx.array:
        """Streams [B, L, M, D] after this layer; token ids [B, L] serve hash routing."""
        x, post, comb = self.attn_hc(streams)
        streams = spread(self.attn(self.attn_norm(x), cache, step), streams, post, comb)
        x, post, comb = self.ffn_hc(streams)
        return spread(self.ffn(self.ffn_norm(x), tokens, step), streams, post, comb)

    def __call__(self, streams: mx.array, tokens: mx.array, cache: LayerCache, step: Step) -> mx.array:
        """As `forward`."""
        return self.forward(streams, tokens, cache, step)


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

    def __call__(self, tokens: mx.array, cache: list[LayerCache], trace: Trace | None) -> mx.array:
        """Token ids [B, L] to the raw streams [B, L, M, D] after the last layer."""
        step = Step(cache[0].offset, tokens.shape[1], trace)
        embedded = self.embed_tokens(tokens).astype(self.norm.weight.dtype)
        hidden = mx.repeat(embedded[:, :, None], self.streams, axis=2)
        if trace is not None:
            trace("hidden", 0, hidden)
        for number, (layer, state) in enumerate(zip(self.layers, cache, strict=True), 1):
            hidden = layer(hidden, tokens, state, step)
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
        used.
        """
        states = self.make_cache() if cache is None else cache[: len(self.layers)]
        hidden = self.model(inputs, states, trace)
        logits = self._logits(self.model.norm(self.model.hc_head(hidden)))
        return (logits, hidden) if return_hidden else logits

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

    def make_mtp_cache(self) -> list[HeadCache]:
        """Empty state for the head; an empty list where there is none."""
        args = self.args
        if not self.head.present:
            return []
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
        return lambda path, module: hasattr(module, "to_quantized") and "compressor" not in path

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
