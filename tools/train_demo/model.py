"""Forward pass of backbone and MTP head over a dictionary of float32 weights (architecture.md, 2 to 9).

Everything is a function of (config, weights by official name, activations). No caches: a whole sequence at a
time. Shapes: B sequences, T positions, M streams, D hidden size, H heads, d head_dim, W window, N compressed
entries.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .spec import Config

Weights = Mapping[str, Tensor]
NEGATIVE = float("-inf")
TIE_MARGIN = 0.5


@dataclass
class Trace:
    """What a training step wants besides the logits."""

    sparse: bool = True  # let the indexer select; False: attend to all compressed entries
    want_indexer_loss: bool = False
    indexer_losses: list[Tensor] = field(default_factory=list)
    tie_losses: list[Tensor] = field(default_factory=list)
    loads: dict[str, Tensor] = field(default_factory=dict)  # block prefix -> tokens per expert
    selected: dict[str, Tensor] = field(default_factory=dict)  # block prefix -> selection mask [B, T, N]
    scores: dict[str, Tensor] = field(default_factory=dict)  # block prefix -> indexer scores [B, T, N]


def rms(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMS norm over the last axis."""
    return F.rms_norm(x, x.shape[-1:], weight, eps)


# -- hyper-connections (section 3) --


def sinkhorn(logits: Tensor, rounds: int, eps: float) -> Tensor:
    """Near doubly stochastic matrices from logits [M, M, ...]: axis 0 is j (rows), axis 1 is k (columns)."""
    c = logits.softmax(1) + eps
    c = c / (c.sum(0, keepdim=True) + eps)
    for _ in range(rounds - 1):
        c = c / (c.sum(1, keepdim=True) + eps)
        c = c / (c.sum(0, keepdim=True) + eps)
    return c


class MixStreams(torch.autograd.Function):
    """[N, M, M] and [N, M, D] to sum_j comb_jk X_j: a transposed batched product, for tiny matrices."""

    @staticmethod
    def forward(ctx: Any, comb: Tensor, x: Tensor) -> Tensor:
        """Weighted sums over the first index of comb."""
        ctx.save_for_backward(comb, x)
        return _mix(comb, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of both."""
        comb, x = ctx.saved_tensors
        return x @ grad.transpose(1, 2), _mix(comb.transpose(1, 2), grad)


def _mix(comb: Tensor, x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    for k in range(x.shape[1]):
        torch.mul(comb[:, 0, k, None], x[:, 0], out=out[:, k])
        for j in range(1, x.shape[1]):
            out[:, k].addcmul_(comb[:, j, k, None], x[:, j])
    return out


def hc_pre(cfg: Config, w: Weights, p: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Streams [B, T, M, D] to (sublayer input [B, T, D], post [B, T, M], comb [B, T, M, M])."""
    m = cfg.streams
    mixes = F.linear(rms(x.flatten(2), None, cfg.eps), w[f"{p}_fn"])
    scale, base = w[f"{p}_scale"], w[f"{p}_base"]
    pre = torch.sigmoid(mixes[..., :m] * scale[0] + base[:m]) + cfg.hc_eps
    post = 2 * torch.sigmoid(mixes[..., m : 2 * m] * scale[1] + base[m : 2 * m])
    logits = mixes[..., 2 * m :] * scale[2] + base[2 * m :]
    logits = logits.permute(2, 0, 1).contiguous().unflatten(0, (m, m))
    comb = sinkhorn(logits, cfg.sinkhorn, cfg.hc_eps).permute(2, 3, 0, 1)
    return (pre.unsqueeze(-2) @ x).squeeze(-2), post, comb


def hc_post(out: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """X'_k = post_k out + sum_j comb_jk X_j."""
    mixed = MixStreams.apply(comb.flatten(0, 1), x.flatten(0, 1)).view_as(x)
    return torch.addcmul(mixed, post.unsqueeze(-1), out.unsqueeze(-2))


def hc_head(cfg: Config, w: Weights, p: str, x: Tensor) -> Tensor:
    """Streams [B, T, M, D] to one vector [B, T, D]."""
    mixes = F.linear(rms(x.flatten(2), None, cfg.eps), w[f"{p}hc_head_fn"])
    pre = torch.sigmoid(mixes * w[f"{p}hc_head_scale"] + w[f"{p}hc_head_base"]) + cfg.hc_eps
    return (pre.unsqueeze(-2) @ x).squeeze(-2)


# -- rotary embedding (section 4) --


def rope_frequencies(cfg: Config, ratio: int) -> Tensor:
    """f_j, j < rope_dim / 2: plain for ratio 0, YaRN on the compressed base otherwise."""
    rd = cfg.rope_dim
    pair = torch.arange(rd // 2, dtype=torch.float32)
    if not ratio:
        return cfg.rope_theta ** (-2 * pair / rd)
    plain = cfg.compress_theta ** (-2 * pair / rd)
    if not cfg.rope_length:
        return plain

    def turns_at(n: float) -> float:
        return rd * math.log(cfg.rope_length / (2 * math.pi * n)) / (2 * math.log(cfg.compress_theta))

    low = max(math.floor(turns_at(cfg.beta_fast)), 0)
    high = min(math.ceil(turns_at(cfg.beta_slow)), rd - 1)
    keep = 1 - ((pair - low) / (high - low if high != low else 0.001)).clamp(0, 1)
    return plain / cfg.rope_factor * (1 - keep) + plain * keep


def rope(x: Tensor, positions: Tensor, frequencies: Tensor, inverse: bool = False) -> Tensor:
    """Rotate the last 2 * len(frequencies) columns of [B, T, d] or [B, T, H, d], interleaved pairs."""
    angles = positions.float()[:, None] * frequencies
    if x.ndim == 4:
        angles = angles[:, None]
    cos, sin = angles.cos(), -angles.sin() if inverse else angles.sin()
    still, turning = x.split((x.shape[-1] - 2 * len(frequencies), 2 * len(frequencies)), dim=-1)
    a, b = turning.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
    return torch.cat((still, turned), dim=-1)


# -- attention (sections 5 to 7) --


def compress(cfg: Config, w: Weights, p: str, x: Tensor, ratio: int, frequencies: Tensor) -> Tensor:
    """Entries [B, T // ratio, c] of [B, T, D] (section 6); ratio 4 overlaps with the previous window."""
    count = x.shape[1] // ratio
    x = x[:, : count * ratio]
    values = F.linear(x, w[f"{p}.wkv.weight"]).unflatten(1, (count, ratio))
    gates = F.linear(x, w[f"{p}.wgate.weight"]).unflatten(1, (count, ratio)) + w[f"{p}.ape"]
    if ratio == 4:
        values, gates = _overlap(values, 0.0), _overlap(gates, NEGATIVE)
    entries = rms((gates.softmax(2) * values).sum(2), w[f"{p}.norm.weight"], cfg.eps)
    return rope(entries, torch.arange(count) * ratio, frequencies)


def _overlap(z: Tensor, absent: float) -> Tensor:
    """[B, N, 4, 2c] to [B, N, 8, c]: first halves of the previous window, then second halves of this one."""
    first, second = z.chunk(2, dim=-1)
    previous = F.pad(first[:, :-1], (0, 0, 0, 0, 1, 0), value=absent)
    return torch.cat((previous, second), dim=2)


def visible_entries(length: int, count: int, ratio: int) -> Tensor:
    """[T, N], true where entry j is complete at query t: j < (t + 1) // ratio."""
    return torch.arange(count) < ((torch.arange(length) + 1) // ratio)[:, None]


def indexer_dots(cfg: Config, w: Weights, p: str, x: Tensor, qr: Tensor, frequencies: Tensor) -> Tensor:
    """Products [B, T, heads, N] of indexer queries and entries (section 7).

    The Hadamard rotation is orthonormal and on both sides, so it is left out.
    """
    q = F.linear(qr, w[f"{p}.wq_b.weight"]).unflatten(-1, (cfg.index_heads, cfg.index_dim))
    q = rope(q, torch.arange(x.shape[1]), frequencies)
    entries = compress(cfg, w, f"{p}.compressor", x, 4, frequencies)
    return (q.flatten(1, 2) @ entries.transpose(1, 2)).unflatten(1, (-1, cfg.index_heads))


def indexer_scores(cfg: Config, w: Weights, p: str, x: Tensor, dots: Tensor) -> Tensor:
    """Scores [B, T, N] of all entries: weighted sum of the rectified products."""
    weights = F.linear(x, w[f"{p}.weights_proj.weight"]) * (cfg.index_dim * cfg.index_heads) ** -0.5
    return (weights.unsqueeze(-2) @ torch.relu(dots)).squeeze(-2)


def select_entries(scores: Tensor, visible: Tensor, topk: int) -> Tensor:
    """Mask [B, T, N] of the top-k visible entries of each query."""
    scores = scores.masked_fill(~visible, NEGATIVE)
    best = scores.topk(min(topk, scores.shape[-1]), dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True) & visible


def window_blocks(kv: Tensor, window: int) -> Tensor:
    """[B, n*W, d] to [B, n, 2W, d]: for each block of W queries the previous block's keys and its own."""
    own = kv.unflatten(1, (-1, window))
    previous = F.pad(own[:, :-1], (0, 0, 0, 0, 1, 0))
    return torch.cat((previous, own), dim=2)


def window_mask(blocks: int, window: int) -> Tensor:
    """[n, W, 2W], true where key column c (position c - W in the block) is one of query i's last W keys."""
    query = torch.arange(window)[:, None]
    column = torch.arange(2 * window)
    near = (column > query) & (column <= query + window)
    first = torch.arange(blocks)[:, None, None] == 0
    return near & ~(first & (column < window))


def attention(cfg: Config, w: Weights, prefix: str, x: Tensor, ratio: int, trace: Trace) -> Tensor:
    """Attention of normed input [B, T, D] (section 5)."""
    p, (batch, length, _) = f"{prefix}.attn", x.shape
    frequencies = rope_frequencies(cfg, ratio)
    positions = torch.arange(length)
    qr = rms(F.linear(x, w[f"{p}.wq_a.weight"]), w[f"{p}.q_norm.weight"], cfg.eps)
    q = F.linear(qr, w[f"{p}.wq_b.weight"]).unflatten(-1, (cfg.heads, cfg.head_dim))
    q = rope(rms(q, None, cfg.eps), positions, frequencies) * cfg.head_dim**-0.5
    kv = rope(rms(F.linear(x, w[f"{p}.wkv.weight"]), w[f"{p}.kv_norm.weight"], cfg.eps), positions, frequencies)

    padding = -length % cfg.window
    blocks = (length + padding) // cfg.window
    near_keys = window_blocks(F.pad(kv, (0, 0, 0, padding)), cfg.window)
    queries = F.pad(q, (0, 0, 0, 0, 0, padding)).unflatten(1, (blocks, cfg.window))
    near = (queries.flatten(2, 3) @ near_keys.transpose(2, 3)).unflatten(2, (cfg.window, cfg.heads))
    near = near.masked_fill(~window_mask(blocks, cfg.window)[:, :, None], NEGATIVE)
    sink = w[f"{p}.attn_sink"][:, None].expand(batch, blocks, cfg.window, cfg.heads, 1)
    columns = [near, sink]
    if ratio:
        entries = compress(cfg, w, f"{p}.compressor", x, ratio, frequencies)
        allowed = visible_entries(length, entries.shape[1], ratio)
        if ratio == 4 and entries.shape[1]:
            dots = indexer_dots(cfg, w, f"{p}.indexer", x.detach(), qr.detach(), frequencies)
            scores = trace.scores[prefix] = indexer_scores(cfg, w, f"{p}.indexer", x.detach(), dots)
            if trace.want_indexer_loss:
                trace.tie_losses.append(_tie_loss(dots, allowed))
            if trace.sparse:
                allowed = select_entries(scores.detach(), allowed, cfg.index_topk)
                trace.selected[prefix] = allowed
        far = (queries.flatten(1, 3) @ entries.transpose(1, 2)).unflatten(1, (blocks, cfg.window, cfg.heads))
        blocked = F.pad(~allowed.expand(batch, -1, -1), (0, 0, 0, padding), value=True)
        columns.append(far.masked_fill(blocked.unflatten(1, (blocks, cfg.window))[:, :, :, None], NEGATIVE))
    probabilities = torch.cat(columns, dim=-1).softmax(-1)
    p_near, _, p_far = probabilities.split((2 * cfg.window, 1, probabilities.shape[-1] - 2 * cfg.window - 1), -1)
    o = (p_near.flatten(2, 3) @ near_keys).unflatten(2, (cfg.window, cfg.heads)).flatten(1, 2)
    if ratio:
        o = o + (p_far.flatten(1, 3) @ entries).unflatten(1, (-1, cfg.heads))
    if trace.want_indexer_loss and prefix in trace.scores:
        trace.indexer_losses.append(
            _indexer_loss(p_far.detach().sum(3).flatten(1, 2)[:, :length], trace.scores[prefix], allowed)
        )
    o = rope(o[:, :length], positions, frequencies, inverse=True)
    o = o.reshape(batch, length, cfg.groups, -1)
    z = torch.einsum("btgi,goi->btgo", o, w[f"{p}.wo_a.weight"].unflatten(0, (cfg.groups, cfg.o_rank)))
    return F.linear(z.flatten(2), w[f"{p}.wo_b.weight"])


def _indexer_loss(attended: Tensor, scores: Tensor, allowed: Tensor) -> Tensor:
    """Cross entropy from the attention mass on entries (summed over heads, normalised) to softmax(scores)."""
    target = attended / attended.sum(-1, keepdim=True).clamp_min(1e-9)
    log_guess = scores.masked_fill(~allowed, -1e4).log_softmax(-1)
    rows = allowed.any(-1).expand(target.shape[:2])
    return -(target * log_guess).sum(-1)[rows].mean()


def _tie_loss(dots: Tensor, visible: Tensor) -> Tensor:
    """Small where each visible entry has a clearly positive product in some head.

    Entries that all heads rectify have score 0 alike; which of them is selected would be chance.
    """
    return torch.relu(TIE_MARGIN - dots.amax(2)[:, visible]).mean()


# -- mixture of experts (section 8) --


def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """silu(min(gate, limit)) * clamp(up, -limit, limit)."""
    if limit:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return F.silu(gate) * up


def route(cfg: Config, w: Weights, prefix: str, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Experts [n, K] and their weights [n, K] of tokens [n, D]."""
    gate = f"{prefix}.ffn.gate"
    scores = F.softplus(F.linear(x, w[f"{gate}.weight"])).sqrt()
    if cfg.is_hash_layer(prefix):
        chosen = w[f"{gate}.tid2eid"][ids]
    else:
        chosen = (scores + w[f"{gate}.bias"]).topk(cfg.top_experts, dim=-1).indices
    share = scores.gather(-1, chosen)
    return chosen, share / share.sum(-1, keepdim=True) * cfg.route_scale


def moe(cfg: Config, w: Weights, prefix: str, x: Tensor, ids: Tensor, trace: Trace) -> Tensor:
    """Shared expert plus the weighted routed experts of [B, T, D]; `ids` [B, T] are needed by hash layers."""
    p, flat = f"{prefix}.ffn", x.flatten(0, 1)
    chosen, share = route(cfg, w, prefix, flat, ids.flatten())
    order = chosen.flatten().argsort(stable=True)
    load = chosen.flatten().bincount(minlength=cfg.experts)
    trace.loads[prefix] = load
    w1, w2, w3 = (w[f"{p}.experts.{m}"] for m in ("w1", "w2", "w3"))
    outputs = [
        F.linear(swiglu(F.linear(part, w1[e]), F.linear(part, w3[e]), cfg.swiglu_limit), w2[e])
        for e, part in enumerate(flat[order // cfg.top_experts].split(load.tolist()))
    ]
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    routed = torch.cat(outputs)[back].unflatten(0, chosen.shape)
    shared = {m: w[f"{p}.shared_experts.{m}.weight"] for m in ("w1", "w2", "w3")}
    y = F.linear(swiglu(F.linear(flat, shared["w1"]), F.linear(flat, shared["w3"]), cfg.swiglu_limit), shared["w2"])
    return (y + (share.unsqueeze(-2) @ routed).squeeze(-2)).view_as(x)


# -- blocks and models (sections 2 and 9) --


def block(cfg: Config, w: Weights, prefix: str, ratio: int, x: Tensor, ids: Tensor, trace: Trace) -> Tensor:
    """One block on streams [B, T, M, D]."""
    y, post, comb = hc_pre(cfg, w, f"{prefix}.hc_attn", x)
    y = attention(cfg, w, prefix, rms(y, w[f"{prefix}.attn_norm.weight"], cfg.eps), ratio, trace)
    x = hc_post(y, x, post, comb)
    y, post, comb = hc_pre(cfg, w, f"{prefix}.hc_ffn", x)
    y = moe(cfg, w, prefix, rms(y, w[f"{prefix}.ffn_norm.weight"], cfg.eps), ids, trace)
    return hc_post(y, x, post, comb)


def backbone(cfg: Config, w: Weights, ids: Tensor, trace: Trace | None = None) -> tuple[Tensor, Tensor]:
    """Token ids [B, T] to (logits [B, T, vocab], raw streams [B, T, M, D] that the MTP head consumes)."""
    trace = trace or Trace()
    x = F.embedding(ids, w["embed.weight"]).unsqueeze(2).expand(-1, -1, cfg.streams, -1)
    for prefix, ratio in cfg.blocks()[: cfg.layers]:
        x = block(cfg, w, prefix, ratio, x, ids, trace)
    logits = F.linear(rms(hc_head(cfg, w, "", x), w["norm.weight"], cfg.eps), w["head.weight"])
    return logits, x


def mtp(cfg: Config, w: Weights, streams: Tensor, next_ids: Tensor, trace: Trace | None = None) -> Tensor:
    """Pairs t = (streams at t, token t+1), [B, T, M, D] and [B, T], to logits for the tokens t+2."""
    prefix, ratio = cfg.blocks()[cfg.layers]
    e = rms(F.embedding(next_ids, w["embed.weight"]), w[f"{prefix}.enorm.weight"], cfg.eps)
    n = rms(streams, w[f"{prefix}.hnorm.weight"], cfg.eps)
    z = F.linear(e, w[f"{prefix}.e_proj.weight"]).unsqueeze(2) + F.linear(n, w[f"{prefix}.h_proj.weight"])
    z = block(cfg, w, prefix, ratio, z, next_ids, trace or Trace())
    return F.linear(rms(hc_head(cfg, w, f"{prefix}.", z), w[f"{prefix}.norm.weight"], cfg.eps), w["head.weight"])
