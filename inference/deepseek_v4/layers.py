"""Building blocks without state: rotary embedding, hyper-connections, experts, and what a pass shares.

Shapes: B batch, L tokens of this pass, M streams (hc_mult), D hidden size, E experts, K experts per token.
Sources: architecture description, sections 3 (hyper-connections), 4 (rotary), 8 (experts).
"""

# mlx.nn carries no types that mypy can see, so these checks would only repeat that.
# mypy: disable-error-code="attr-defined,name-defined,misc,no-any-return,str-unpack,union-attr"

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .config import ModelArgs

Trace = Callable[[str, int, mx.array], None]
"""Receives (kind, layer, value) while a pass runs: "hidden" [B, L, M, D], "experts" [B, L, K], "entries" [B,
k].
"""

SORT_ROWS = 64
"""From this many (token, expert) rows on, rows are grouped by expert before the product."""

Table = tuple[mx.array, mx.array]


def rope_frequencies(dims: int, base: float, scaling: dict[str, Any] | None) -> list[float]:
    """Angle per position for each of the dims/2 pairs, with YaRN where `scaling` is given (section 4)."""
    plain = [base ** (-2.0 * pair / dims) for pair in range(dims // 2)]
    original = (scaling or {}).get("original_max_position_embeddings", 0)
    if not scaling or not original:
        return plain

    def turning_pair(turns: float) -> float:
        return dims * math.log(original / (2 * math.pi * turns)) / (2 * math.log(base))

    low = float(max(math.floor(turning_pair(scaling.get("beta_fast", 32))), 0))
    high = float(min(math.ceil(turning_pair(scaling.get("beta_slow", 1))), dims - 1))
    high += 0.001 if low == high else 0.0
    factor = scaling.get("factor", 1.0)
    keep = [1.0 - min(max((pair - low) / (high - low), 0.0), 1.0) for pair in range(dims // 2)]
    return [f / factor * (1.0 - k) + f * k for f, k in zip(plain, keep, strict=True)]


class Rope:
    """Rotation of the last `dims` columns of a head, as interleaved pairs, angles in float32."""

    def __init__(self, dims: int, base: float, scaling: dict[str, Any] | None = None) -> None:
        self.frequencies = mx.array(rope_frequencies(dims, base, scaling), dtype=mx.float32)

    def table(self, start: int | mx.array, count: int, stride: int = 1) -> Table:
        """Cosines and sines [count, dims/2] for positions start, start + stride, ...; of each start [N, 1] a table."""
        positions = (start + stride * mx.arange(count)).astype(mx.float32)
        angles = positions[..., None] * self.frequencies
        return mx.cos(angles), mx.sin(angles)


def rotate(x: mx.array, table: Table, inverse: bool = False) -> mx.array:
    """Rotate the last columns of x [B, L, d] or [B, L, heads, d] by the position of each row L."""
    cos, sin = table
    width = 2 * cos.shape[-1]
    if x.ndim == 4:
        cos, sin = cos[..., None, :], sin[..., None, :]
    if inverse:
        sin = -sin
    pairs = x[..., -width:].astype(mx.float32).reshape(*x.shape[:-1], width // 2, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = mx.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    turned = turned.reshape(*x.shape[:-1], width).astype(x.dtype)
    return turned if width == x.shape[-1] else mx.concatenate([x[..., :-width], turned], axis=-1)


class Step:
    """What all layers of one pass share: where it starts, how long it is, position tables, the trace."""

    def __init__(self, offset: int, length: int, trace: Trace | None = None) -> None:
        self.offset = offset
        self.length = length
        self.trace = trace
        self._memo: dict[Any, Any] = {}

    def memo(self, key: Any, make: Callable[[], Any]) -> Any:
        """The value of `make()`, computed once per pass for each key."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]

    def table(self, rope: Rope) -> Table:
        """Rotation of this pass's own positions."""
        table: Table = self.memo((rope, "tokens"), lambda: rope.table(self.offset, self.length))
        return table

    def entry_table(self, rope: Rope, ratio: int, first: int, count: int) -> Table:
        """Rotation of compressed entries first.. : each at the first position of its window."""
        table: Table = self.memo((rope, ratio), lambda: rope.table(first * ratio, count, ratio))
        return table

    def positions(self) -> mx.array:
        """Positions of this pass's tokens, int32 [L]."""
        array: mx.array = self.memo("positions", lambda: self.offset + mx.arange(self.length))
        return array


class HyperHead(nn.Module):
    """Collapses the M streams into one, by weights computed from all of them (section 3, hc_head)."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        streams, width = args.hc_mult, args.hc_mult * args.hidden_size
        self.fn = mx.zeros((streams, width), dtype=mx.float32)
        self.base = mx.zeros((streams,), dtype=mx.float32)
        self.scale = mx.ones((1,), dtype=mx.float32)
        self.norm_eps, self.eps = args.rms_norm_eps, args.hc_eps

    def __call__(self, streams: mx.array) -> mx.array:
        """Streams [B, L, M, D] to one vector [B, L, D] of the same dtype."""
        pre = mx.sigmoid(mixing(streams, self.fn, self.norm_eps) * self.scale[0] + self.base) + self.eps
        return collapse(streams, pre)


class HyperConnection(nn.Module):
    """Reads one vector from the M streams and says how a sublayer's output returns to them (section 3)."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        rows = (2 + args.hc_mult) * args.hc_mult
        self.fn = mx.zeros((rows, args.hc_mult * args.hidden_size), dtype=mx.float32)
        self.base = mx.zeros((rows,), dtype=mx.float32)
        self.scale = mx.ones((3,), dtype=mx.float32)
        self.count, self.iterations = args.hc_mult, args.hc_sinkhorn_iters
        self.norm_eps, self.eps = args.rms_norm_eps, args.hc_eps

    def __call__(self, streams: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Streams [B, L, M, D] to (input of the sublayer [B, L, D], post [B, L, M], comb [B, L, M, M])."""
        m, n = mixing(streams, self.fn, self.norm_eps), self.count
        pre = mx.sigmoid(m[..., :n] * self.scale[0] + self.base[:n]) + self.eps
        post = 2 * mx.sigmoid(m[..., n : 2 * n] * self.scale[1] + self.base[n : 2 * n])
        comb = m[..., 2 * n :] * self.scale[2] + self.base[2 * n :]
        balance = sinkhorn if on_cpu() else fused_sinkhorn
        comb = balance(comb.reshape(*comb.shape[:-1], n, n), self.iterations, self.eps)
        return collapse(streams, pre), post, comb


def mixing(streams: mx.array, fn: mx.array, eps: float) -> mx.array:
    """fn @ v over the RMS of v, v being all streams in a row; float32 [B, L, rows]. eps is rms_norm_eps."""
    v = streams.astype(mx.float32).flatten(-2)
    return (v @ fn.T) * mx.rsqrt(mx.mean(mx.square(v), axis=-1, keepdims=True) + eps)


def collapse(streams: mx.array, pre: mx.array) -> mx.array:
    """Weighted sum of the streams, computed in float32, in the streams' dtype: [B, L, D]."""
    summed = pre[..., None, :] @ streams.astype(mx.float32)
    return summed.squeeze(-2).astype(streams.dtype)


def sinkhorn(comb: mx.array, iterations: int, eps: float) -> mx.array:
    """Rows to softmax, then columns, then (iterations - 1) times rows and columns; eps in each sum."""
    comb = mx.softmax(comb, axis=-1) + eps
    comb = comb / (comb.sum(axis=-2, keepdims=True) + eps)
    for _ in range(iterations - 1):
        comb = comb / (comb.sum(axis=-1, keepdims=True) + eps)
        comb = comb / (comb.sum(axis=-2, keepdims=True) + eps)
    return comb


fused_sinkhorn = mx.compile(sinkhorn, shapeless=True)
"""The same in fewer kernels, traced once for all shapes. For GPUs: on a CPU mlx would need a compiler."""


def spread(output: mx.array, streams: mx.array, post: mx.array, comb: mx.array) -> mx.array:
    """New streams: post_k * output + sum_j comb_jk * stream_j (contraction over the first index of comb)."""
    mixed = comb.swapaxes(-1, -2) @ streams.astype(mx.float32)
    mixed = mixed + post[..., None] * output.astype(mx.float32)[..., None, :]
    return mixed.astype(streams.dtype)


def swiglu(gate: mx.array, up: mx.array, limit: float) -> mx.array:
    """silu(gate) * up in float32, gate clamped from above only, up on both sides; limit 0 means no clamp."""
    gate, up = gate.astype(mx.float32), up.astype(mx.float32)
    if limit > 0:
        gate, up = mx.minimum(gate, limit), mx.clip(up, -limit, limit)
    return nn.silu(gate) * up


class SharedExpert(nn.Module):
    """The expert that every token passes."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(args.hidden_size, args.moe_intermediate_size, bias=False)
        self.up_proj = nn.Linear(args.hidden_size, args.moe_intermediate_size, bias=False)
        self.down_proj = nn.Linear(args.moe_intermediate_size, args.hidden_size, bias=False)
        self.limit = args.swiglu_limit

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., D] to [..., D]."""
        hidden = swiglu(self.gate_proj(x), self.up_proj(x), self.limit).astype(x.dtype)
        output: mx.array = self.down_proj(hidden)
        return output


class SwitchLinear(nn.Module):
    """One matrix per expert, weight [E, out, in], dense or quantized."""

    def __init__(self, inputs: int, outputs: int, experts: int) -> None:
        super().__init__()
        self.weight = mx.zeros((experts, outputs, inputs))

    def __call__(self, x: mx.array, picks: mx.array, is_sorted: bool = False) -> mx.array:
        """x [..., 1, in] with broadcast `picks` [...] to [..., 1, out]."""
        if (is_sorted and on_cpu()) or self.is_wide_on_cpu():
            return self._by_expert(x, picks)
        return mx.gather_mm(x, self.weight.swapaxes(-1, -2), rhs_indices=picks, sorted_indices=is_sorted)

    def is_wide_on_cpu(self) -> bool:
        """Whether mlx lacks the gathered product: its CPU kernel exists for float32 only."""
        return on_cpu() and self.weight.dtype != mx.float32

    def matrix(self, expert: int) -> mx.array:
        """Dense matrix [out, in] of one expert."""
        return self.weight[expert]

    def _by_expert(self, x: mx.array, picks: mx.array) -> mx.array:
        """One dense product per expert in use, for the CPU; costs one synchronisation."""
        shape = mx.broadcast_shapes(x.shape[:-2], picks.shape)
        rows = mx.broadcast_to(x, (*shape, *x.shape[-2:])).reshape(-1, x.shape[-1])
        chosen: list[int] = mx.broadcast_to(picks, shape).flatten().tolist()  # type: ignore[assignment]
        order = sorted(range(len(chosen)), key=chosen.__getitem__)
        parts, start = [], 0
        ordered = rows[mx.array(order)]
        while start < len(order):
            expert, end = chosen[order[start]], start
            while end < len(order) and chosen[order[end]] == expert:
                end += 1
            parts.append(ordered[start:end] @ self.matrix(expert).astype(x.dtype).T)
            start = end
        back = mx.argsort(mx.array(order))
        return mx.concatenate(parts)[back].reshape(*shape, 1, -1)

    def to_quantized(self, group_size: int | None = None, bits: int | None = None, mode: str = "affine") -> nn.Module:
        """The same matrices, quantized; called by mlx.nn.quantize."""
        return QuantizedSwitchLinear(self.weight, group_size, bits, mode)


class QuantizedSwitchLinear(SwitchLinear):
    """One quantized matrix per expert: weight uint32 [E, out, in * bits / 32], scales [E, out, in /
    group].
    """

    def __init__(self, weight: mx.array, group_size: int | None, bits: int | None, mode: str) -> None:
        nn.Module.__init__(self)
        self.group_size, self.bits, self.mode = group_size, bits, mode
        self.weight, self.scales, *biases = mx.quantize(weight, group_size, bits, mode=mode)
        if biases:
            self.biases = biases[0]

    def is_wide_on_cpu(self) -> bool:
        """Never: the quantized product exists for every dtype."""
        return False

    def matrix(self, expert: int) -> mx.array:
        """Dense matrix [out, in] of one expert."""
        biases = self.biases[expert] if "biases" in self else None
        packed, scales = self.weight[expert], self.scales[expert]
        return mx.dequantize(packed, scales, biases, self.group_size, self.bits, mode=self.mode)

    def __call__(self, x: mx.array, picks: mx.array, is_sorted: bool = False) -> mx.array:
        """x [..., 1, in] with broadcast `picks` [...] to [..., 1, out]."""
        if is_sorted and on_cpu():
            return self._by_expert(x, picks)
        return mx.gather_qmm(
            x,
            self.weight,
            self.scales,
            self.get("biases"),
            rhs_indices=picks,
            transpose=True,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
            sorted_indices=is_sorted,
        )


def on_cpu() -> bool:
    """Whether this pass runs on the CPU."""
    return mx.default_device().type == mx.cpu


class SwitchMLP(nn.Module):
    """The routed experts."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        width, inner, experts = args.hidden_size, args.moe_intermediate_size, args.n_routed_experts
        self.gate_proj = SwitchLinear(width, inner, experts)
        self.up_proj = SwitchLinear(width, inner, experts)
        self.down_proj = SwitchLinear(inner, width, experts)
        self.limit = args.swiglu_limit

    def __call__(self, x: mx.array, picks: mx.array) -> mx.array:
        """x [N, D] through the experts `picks` [N, K]: [N, K, D]."""
        count, chosen = picks.shape
        if count * chosen < SORT_ROWS:
            return self._experts(x[:, None, None], picks, False).squeeze(-2)
        order = mx.argsort(picks.flatten())
        rows = self._experts(x[order // chosen][:, None], picks.flatten()[order], True).squeeze(-2)
        return rows[mx.argsort(order)].reshape(count, chosen, -1)

    def _experts(self, x: mx.array, picks: mx.array, is_sorted: bool) -> mx.array:
        gate = self.gate_proj(x, picks, is_sorted)
        up = self.up_proj(x, picks, is_sorted)
        output: mx.array = self.down_proj(swiglu(gate, up, self.limit).astype(x.dtype), picks, is_sorted)
        return output


class Gate(nn.Module):
    """Chooses experts and their weights: by score, or by token id in hash layers (section 8)."""

    def __init__(self, args: ModelArgs, layer: int) -> None:
        super().__init__()
        self.weight = mx.zeros((args.n_routed_experts, args.hidden_size))
        if args.uses_hash(layer):
            self.tid2eid = mx.zeros((args.vocab_size, args.num_experts_per_tok), dtype=mx.int32)
        else:
            self.e_score_correction_bias = mx.zeros((args.n_routed_experts,), dtype=mx.float32)
        self.chosen, self.factor = args.num_experts_per_tok, args.routed_scaling_factor

    def __call__(self, x: mx.array, tokens: mx.array) -> tuple[mx.array, mx.array]:
        """x [N, D] and token ids [N] to (experts int [N, K], weights float32 [N, K])."""
        logits = x.astype(mx.float32) @ self.weight.astype(mx.float32).T
        scores = mx.sqrt(mx.logaddexp(logits, 0.0))
        if "tid2eid" in self:
            picks = self.tid2eid[tokens]
        else:
            ranked = mx.argpartition(-(scores + self.e_score_correction_bias), self.chosen - 1, axis=-1)
            picks = mx.stop_gradient(ranked[:, : self.chosen])  # mlx-lm's trainers of scales take gradients
        weights = mx.take_along_axis(scores, picks, axis=-1)
        return picks, weights / weights.sum(axis=-1, keepdims=True) * self.factor


class MoE(nn.Module):
    """Routed experts, weighted and summed in float32, plus the shared expert."""

    def __init__(self, args: ModelArgs, layer: int) -> None:
        super().__init__()
        self.gate = Gate(args, layer)
        self.switch_mlp = SwitchMLP(args)
        self.shared_experts = SharedExpert(args)
        self.layer = layer

    def __call__(self, x: mx.array, tokens: mx.array, step: Step) -> mx.array:
        """x [B, L, D] and token ids [B, L] to [B, L, D]."""
        flat = x.reshape(-1, x.shape[-1])
        picks, weights = self.gate(flat, tokens.flatten())
        if step.trace is not None:
            step.trace("experts", self.layer, picks.reshape(*tokens.shape, -1))
        routed = weights[:, None] @ self.switch_mlp(flat, picks).astype(mx.float32)
        output = routed.squeeze(-2) + self.shared_experts(flat).astype(mx.float32)
        return output.reshape(x.shape).astype(x.dtype)
