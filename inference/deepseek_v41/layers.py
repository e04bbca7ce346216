"""Building blocks of DeepSeek-V4.1 that differ from V4's: hyper-connections that hand on, the router, the block.

Shapes: B batch, L tokens of this pass, M streams (hc_mult), D hidden size, E experts, K experts per token.
Source: the reference on V4.1, section 4.
"""

# mlx.nn carries no types that mypy can see, so these checks would only repeat that.
# mypy: disable-error-code="attr-defined,name-defined,misc,no-any-return,str-unpack,union-attr"

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ..deepseek_v4 import layers as v4
from ..deepseek_v4.layers import Step, collapse, mixing, on_cpu, spread
from .attention import Attention
from .config import ModelArgs
from .engram import Engram

LEAST_SUM = 1e-20
"""Added to the sum that experts' weights are divided by."""


class Mixed(NamedTuple):
    """Streams [B, L, M, D], and the weights float32 [B, L, M] by which the next sublayer reads them."""

    streams: mx.array
    mix: mx.array


def begun(streams: mx.array) -> Mixed:
    """Streams that no layer has passed: the first sublayer reads the first of them alone."""
    mix = mx.broadcast_to(mx.arange(streams.shape[2]) == 0, streams.shape[:-1])
    return Mixed(streams, mix.astype(mx.float32))


class HyperConnection(v4.HyperConnection):
    """Says how a sublayer's output returns to the streams, and how the NEXT sublayer reads them."""

    def __call__(self, streams: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Streams [B, L, M, D] to (weights of the next reading [B, L, M], post [B, L, M], comb [B, L, M, M])."""
        m, n = mixing(streams, self.fn, self.norm_eps), self.count
        pre = mx.sigmoid(m[..., :n] * self.scale[0] + self.base[:n]) + self.eps
        post = 2 * mx.sigmoid(m[..., n : 2 * n] * self.scale[1] + self.base[n : 2 * n])
        comb = m[..., 2 * n :] * self.scale[2] + self.base[2 * n :]
        balance = v4.sinkhorn if on_cpu() else v4.fused_sinkhorn
        return pre, post, balance(comb.reshape(*comb.shape[:-1], n, n), self.iterations, self.eps)


class Collapse(nn.Module):
    """Stands where V4 has a HyperHead: the last sublayer has said how the streams are read. It has no parameters."""

    def __call__(self, state: Mixed) -> mx.array:
        """One vector [B, L, D]."""
        return collapse(*state)


class Gate(v4.Gate):
    """Chooses experts by score and bias; one that is chosen alone has its score as its weight."""

    def __init__(self, args: ModelArgs, layer: int) -> None:
        super().__init__(args, layer)
        self.shares = args.norm_topk_prob and args.num_experts_per_tok > 1

    def __call__(self, x: mx.array, tokens: mx.array) -> tuple[mx.array, mx.array]:
        """x [N, D] and token ids [N] to (experts int [N, K], weights float32 [N, K])."""
        logits = x.astype(mx.float32) @ self.weight.astype(mx.float32).T
        scores = mx.sqrt(mx.logaddexp(logits, 0.0))
        ranked = mx.argpartition(-(scores + self.e_score_correction_bias), self.chosen - 1, axis=-1)
        picks = ranked[:, : self.chosen]
        weights = mx.take_along_axis(scores, picks, axis=-1)
        if self.shares:
            weights = weights / (weights.sum(axis=-1, keepdims=True) + LEAST_SUM)
        return picks, weights * self.factor


class MoE(v4.MoE):
    """Routed experts and the shared one."""

    def __init__(self, args: ModelArgs, layer: int) -> None:
        super().__init__(args, layer)
        self.gate = Gate(args, layer)


class Entered(NamedTuple):
    """A layer between attention and experts: streams, what the experts read [B, L, D], how their output returns to the
    streams, and how the next layer reads them.
    """

    streams: mx.array
    x: mx.array
    post: mx.array
    comb: mx.array
    mix: mx.array


class Block(nn.Module):
    """One layer. Each sublayer reads the streams as the one before it has said."""

    def __init__(self, args: ModelArgs, layer: int) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.attn = Attention(args, layer)
        self.attn_hc = HyperConnection(args)
        self.ffn_norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.ffn = MoE(args, layer)
        self.ffn_hc = HyperConnection(args)
        if layer in args.engram_layer_ids:
            self.engram = Engram(args, layer)

    def enrich(self, state: Mixed, tokens: mx.array, cache: Any, step: Step) -> Mixed:
        """Streams with what the engram adds, which comes before everything else in a layer."""
        if "engram" not in self:
            return state
        return Mixed(self.engram(state.streams, tokens, cache, step), state.mix)

    def enter(self, state: Mixed, cache: Any, step: Step) -> Entered:
        """The layer up to its experts."""
        pre, post, comb = self.attn_hc(state.streams)
        attended = self.attn(self.attn_norm(collapse(*state)), cache, step)
        streams = spread(attended, state.streams, post, comb)
        mix, post, comb = self.ffn_hc(streams)
        return Entered(streams, self.ffn_norm(collapse(streams, pre)), post, comb, mix)

    def __call__(self, state: Any, tokens: mx.array, cache: Any, step: Step) -> Mixed:
        """Streams after this layer, an engram's part being in them already; bare streams are those of a beginning."""
        half = self.enter(state if isinstance(state, Mixed) else begun(state), cache, step)
        output = self.ffn(half.x, tokens, step)
        return Mixed(spread(output, half.streams, half.post, half.comb), half.mix)
