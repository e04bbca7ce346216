"""The head that is trained: its config, inventory, first weights, forward pass, and its file.

Everything is a function of (config, weights by official name, activations), as in `tools/train_demo/model.py`, whose
blocks it is made of. Shapes: N blocks, S slots, M streams, D hidden size, W window. Source: DSpark description, 1 to 4.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from tools.train_demo import checkpoint, model, spec
from tools.train_demo.spec import Config, Kind

STAGES, BLOCK, RANK = 1, 5, 64
NOISE = 1023
"""The last chat marker: the training text does not have it."""
TARGETS = (1, 2, 3)
FILE = "model-00004-of-00004.safetensors"
"""The shard of the classic demo that holds the head alone, whose place this head takes."""

Weights = dict[str, Tensor]
LAST = f"mtp.{STAGES - 1}"


def config_fields(classic: Path) -> dict[str, object]:
    """The config.json of the demo with this head: the classic one's, a ratio per stage, and the head's own keys."""
    fields = json.loads((classic / "config.json").read_text())
    ratios = fields["compress_ratios"][: fields["num_hidden_layers"]] + [0] * STAGES
    own = {"dspark_block_size": BLOCK, "dspark_markov_rank": RANK, "dspark_noise_token_id": NOISE}
    return fields | {"compress_ratios": ratios} | own | {"dspark_target_layer_ids": list(TARGETS)}


def inventory(cfg: Config) -> list[spec.Tensor]:
    """All tensors of the head, experts stacked."""
    stages = [row for stage in range(STAGES) for row in spec.block_rows(cfg, f"mtp.{stage}", 0)]
    return [
        *stages,
        spec.Tensor("mtp.0.main_proj.weight", (cfg.dim, len(TARGETS) * cfg.dim), Kind.FP8),
        spec.Tensor("mtp.0.main_norm.weight", (cfg.dim,), Kind.BF16),
        spec.Tensor(f"{LAST}.norm.weight", (cfg.dim,), Kind.BF16),
        *spec.hyper_head_rows(cfg, f"{LAST}."),
        spec.Tensor(f"{LAST}.markov_head.markov_w1.weight", (cfg.vocab, RANK), Kind.BF16),
        spec.Tensor(f"{LAST}.markov_head.markov_w2.weight", (cfg.vocab, RANK), Kind.BF16),
        spec.Tensor(f"{LAST}.confidence_head.proj.weight", (1, cfg.dim + RANK), Kind.BF16),
    ]


def initial(cfg: Config, classic: Weights, counts: Tensor, seed: int) -> Weights:
    """First weights: a stage begins as the trained block of the classic head, the Markov tables as a table of what
    follows what in the text (`counts` [V, V] of pairs), the rest as noise.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for row in inventory(cfg):
        known = classic.get("mtp.0." + row.name.split(".", 2)[2])
        noise = torch.randn(row.shape, generator=generator)
        if known is not None:
            weights[row.name] = known.clone()
        elif "norm" in row.name:
            weights[row.name] = torch.ones(row.shape)
        elif "confidence" in row.name:
            weights[row.name] = torch.zeros(row.shape)
        else:
            weights[row.name] = noise * row.shape[-1] ** -0.5
    first, second = markov(counts)
    return weights | {f"{LAST}.markov_head.markov_w1.weight": first, f"{LAST}.markov_head.markov_w2.weight": second}


def markov(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Tables [V, r] whose product is, as far as the rank allows, how much likelier a pair is than by chance (log)."""
    smooth = counts + 0.05
    ratio = smooth * smooth.sum() / (smooth.sum(1, keepdim=True) * smooth.sum(0, keepdim=True))
    u, s, v = torch.linalg.svd(ratio.log().clamp_min(0))
    return u[:, :RANK] * s[:RANK].sqrt(), v[:RANK].T * s[:RANK].sqrt()


# -- forward pass --


@dataclass(frozen=True)
class Row:
    """A row of text as the backbone sees it: ids [L], taps [L, T * D], log-probabilities [L, V] of what follows."""

    ids: Tensor
    taps: Tensor
    logprobs: Tensor


@torch.no_grad()
def seen(cfg: Config, w: Weights, ids: Tensor) -> list[Row]:
    """What the frozen backbone makes of rows [B, L]. A tap is the mean of the streams after a whole layer."""
    x = F.embedding(ids, w["embed.weight"]).unsqueeze(2).expand(-1, -1, cfg.streams, -1)
    taps = []
    for number, (prefix, ratio) in enumerate(cfg.blocks()[: cfg.layers]):
        x = model.block(cfg, w, prefix, ratio, x, ids, model.Trace())
        if number in TARGETS:
            taps.append(x.mean(2))
    logits = F.linear(model.rms(model.hc_head(cfg, w, "", x), w["norm.weight"], cfg.eps), w["head.weight"])
    joined = torch.cat(taps, -1)
    return [Row(*parts) for parts in zip(ids, joined, logits.log_softmax(-1), strict=True)]


def _turned(x: Tensor, positions: Tensor, frequencies: Tensor, inverse: bool = False) -> Tensor:
    """Rotate [N, S, ..., d] by positions [N, S]."""
    flat = model.rope(x.flatten(0, 1)[None], positions.flatten(), frequencies, inverse)
    return flat.view_as(x)


def _attention(cfg: Config, w: Weights, p: str, x: Tensor, context: Tensor, anchors: Tensor) -> Tensor:
    """Block attention of normed input [N, S, D]: the W context keys before each anchor, and all slots of the block."""
    count, slots, _ = x.shape
    frequencies = model.rope_frequencies(cfg, 0)
    places = anchors[:, None] + torch.arange(slots)
    q = F.linear(model.rms(F.linear(x, w[f"{p}.wq_a.weight"]), w[f"{p}.q_norm.weight"], cfg.eps), w[f"{p}.wq_b.weight"])
    q = model.rms(q.unflatten(-1, (cfg.heads, cfg.head_dim)), None, cfg.eps)
    q = _turned(q, places, frequencies) * cfg.head_dim**-0.5
    own = _turned(_key(cfg, w, p, x), places, frequencies)
    before = anchors[:, None] - cfg.window + torch.arange(cfg.window)
    keys = torch.cat((context[before.clamp_min(0)], own), dim=1)
    scores = (q.flatten(1, 2) @ keys.transpose(1, 2)).unflatten(1, (slots, cfg.heads))
    hidden = F.pad(before < 0, (0, slots), value=False)
    scores = scores.masked_fill(hidden[:, None, None], model.NEGATIVE)
    sink = w[f"{p}.attn_sink"][:, None].expand(count, slots, cfg.heads, 1)
    shares = torch.cat((scores, sink), dim=-1).softmax(-1)[..., :-1]
    o = (shares.flatten(1, 2) @ keys).unflatten(1, (slots, cfg.heads))
    o = _turned(o, places, frequencies, inverse=True).reshape(count, slots, cfg.groups, -1)
    z = torch.einsum("btgi,goi->btgo", o, w[f"{p}.wo_a.weight"].unflatten(0, (cfg.groups, cfg.o_rank)))
    return F.linear(z.flatten(2), w[f"{p}.wo_b.weight"])


def _key(cfg: Config, w: Weights, p: str, x: Tensor) -> Tensor:
    return model.rms(F.linear(x, w[f"{p}.wkv.weight"]), w[f"{p}.kv_norm.weight"], cfg.eps)


def blocks(cfg: Config, w: Weights, embed: Tensor, row: Row, anchors: Tensor) -> Tensor:
    """What the head's hc_head gives [N, S, D] of blocks at `anchors` [N], positions of a row."""
    ids = torch.full((len(anchors), BLOCK), NOISE)
    ids[:, 0] = row.ids[anchors]
    condensed = model.rms(F.linear(row.taps, w["mtp.0.main_proj.weight"]), w["mtp.0.main_norm.weight"], cfg.eps)
    positions, frequencies = torch.arange(len(row.ids)), model.rope_frequencies(cfg, 0)
    x = F.embedding(ids, embed).unsqueeze(2).expand(-1, -1, cfg.streams, -1)
    for stage in range(STAGES):
        p = f"mtp.{stage}"
        context = model.rope(_key(cfg, w, f"{p}.attn", condensed)[None], positions, frequencies)[0]
        y, post, comb = model.hc_pre(cfg, w, f"{p}.hc_attn", x)
        y = _attention(cfg, w, f"{p}.attn", model.rms(y, w[f"{p}.attn_norm.weight"], cfg.eps), context, anchors)
        x = model.hc_post(y, x, post, comb)
        y, post, comb = model.hc_pre(cfg, w, f"{p}.hc_ffn", x)
        y = model.moe(cfg, w, p, model.rms(y, w[f"{p}.ffn_norm.weight"], cfg.eps), ids, model.Trace())
        x = model.hc_post(y, x, post, comb)
    return model.hc_head(cfg, w, f"{LAST}.", x)


@dataclass(frozen=True)
class Slots:
    """Teacher-forced drafts of N blocks: log-probabilities [N, S, V] of head and backbone, raw confidence [N, S]."""

    own: Tensor
    target: Tensor
    confidence: Tensor
    following: Tensor  # the text's tokens [N, S]

    def accepted(self) -> Tensor:
        """Share that sampling accepts [N, S]: 1 - half the L1 distance of the distributions."""
        return 1 - 0.5 * (self.own.exp() - self.target.exp()).abs().sum(-1)

    def agree(self) -> Tensor:
        """Whether the first choices are equal, [N, S]."""
        return self.own.argmax(-1) == self.target.argmax(-1)


def forced(cfg: Config, w: Weights, backbone: Weights, row: Row, anchors: Tensor) -> Slots:
    """Blocks at `anchors` [N] of a row, each slot given the text's own token before it."""
    hidden = blocks(cfg, w, backbone["embed.weight"], row, anchors)
    base = F.linear(model.rms(hidden, w[f"{LAST}.norm.weight"], cfg.eps), backbone["head.weight"])
    places = anchors[:, None] + torch.arange(BLOCK)
    rows = F.embedding(row.ids[places], w[f"{LAST}.markov_head.markov_w1.weight"])
    logits = base + F.linear(rows, w[f"{LAST}.markov_head.markov_w2.weight"])
    confidence = F.linear(torch.cat((hidden, rows), -1), w[f"{LAST}.confidence_head.proj.weight"])[..., 0]
    return Slots(logits.log_softmax(-1), row.logprobs[places], confidence, row.ids[places + 1])


# -- files --


def write(folder: Path, classic: Path, cfg: Config, weights: Weights) -> None:
    """Write the head's shard and the config of the checkpoint that it belongs to."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config_fields(classic), indent=2, ensure_ascii=False) + "\n"
    (folder / "config.json").write_text(text)
    tensors: Weights = {}
    for row in inventory(cfg):
        tensors |= checkpoint.encode(row.name, row.kind, weights[row.name].detach().contiguous())
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / FILE, metadata={"format": "pt"})
    (folder / FILE).chmod(0o644)


def read(folder: Path, cfg: Config) -> Weights:
    """The float32 weights of a written head."""
    raw = load_file(folder / FILE)
    return {row.name: checkpoint.decode(raw, row.name, row.kind, cfg.experts) for row in inventory(cfg)}
