"""One layer of DeepSeek-V4: attention and experts between the residual streams. Backbone and heads are made of it.

Shapes: B batch, L tokens of this pass, M streams (hc_mult), D hidden size. Source: architecture description, section 2.
"""

# mlx.nn carries no types that mypy can see, so these checks would only repeat that.
# mypy: disable-error-code="attr-defined,name-defined,misc,no-any-return"

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from .attention import Attention
from .cache import LayerCache
from .config import ModelArgs
from .layers import HyperConnection, MoE, Rope, Step, spread


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
