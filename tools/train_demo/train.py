"""Joint training of backbone and MTP head, at the end on the exact grids of the checkpoint."""

from __future__ import annotations

import json
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checkpoint, model, text
from .optimizer import Optimizer
from .spec import Config, Kind, inventory

CONFIG = Path(__file__).parent / "config.json"
SHARDS = 4
LOG = ("lm", "head", "divergence", "agreement", "indexer", "ties")
MUON = ("wq_a", "wq_b", "wkv", "wo_a", "wo_b", "wgate", "w1", "w2", "w3", "e_proj", "h_proj")


@dataclass(frozen=True)
class Recipe:
    """All choices of a training run; the defaults made the checkpoint in manifests/demo."""

    steps: int = 1800
    tokens: int = 1024  # per step
    short: int = 256  # row length of the first phase
    long: int = 512  # row length of the second phase: grids, indexer selection
    second_phase: float = 0.6  # begins at this share of the steps
    warmup: int = 40
    hold: float = 0.2  # learning rate is constant up to this share, then falls linearly
    muon_lr: float = 0.02
    adam_lr: float = 0.006
    momentum: float = 0.95
    decay: float = 0.05
    mtp_truth: tuple[float, float] = (0.3, 0.1)  # weight of the head's loss on the text, per phase
    mtp_backbone: tuple[float, float] = (0.3, 0.7)  # and on what the backbone predicts one step later
    balance: float = 0.002  # step of the router bias
    seed: int = 1


def initial_weights(cfg: Config, seed: int) -> dict[str, Tensor]:
    """Fresh master weights by inventory name."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for number, t in enumerate(inventory(cfg)):
        weights[t.name] = _initial(cfg, t.name, t.shape, number, generator)
    return weights


def _initial(cfg: Config, name: str, shape: tuple[int, ...], number: int, generator: torch.Generator) -> Tensor:
    leaf = name.rsplit(".", 1)[-1]
    normal = torch.randn(shape, generator=generator)
    if leaf == "tid2eid":
        return torch.rand(cfg.vocab, cfg.experts, generator=generator).topk(cfg.top_experts).indices
    if name == "embed.weight":
        return 0.3 * normal
    if name == "head.weight":
        return 0.02 * normal
    if "norm" in name:
        return torch.ones(shape)
    if leaf.endswith("_scale"):
        return torch.full(shape, 0.1)
    if leaf in ("hc_attn_base", "hc_ffn_base"):
        return _initial_mixing(cfg.streams, number)
    if leaf in ("attn_sink", "bias", "hc_head_base"):
        return torch.zeros(shape)
    if leaf == "ape":
        return 0.1 * normal
    if name.endswith("indexer.wq_b.weight"):  # pairs of opposite heads: no entry is rectified by all
        half = normal[: len(normal) // 2]
        normal = torch.cat((half, -half))
    gain = 0.5 if "wo_b" in name or leaf == "w2" or "w2.weight" in name else 1.0
    return gain * normal / math.sqrt(shape[-1])


def _initial_mixing(streams: int, number: int) -> Tensor:
    """Read all streams about equally, write to all with one preferred, keep streams apart."""
    read = torch.full((streams,), -1.1)
    write = torch.zeros(streams)
    read[number % streams] += 0.5
    write[number % streams] += 0.5
    return torch.cat((read, write, 3 * torch.eye(streams).flatten()))


def is_muon(name: str, kind: Kind) -> bool:
    """Whether a tensor is stepped by Muon: the matrices of attention, compressors and experts."""
    return kind in (Kind.FP8, Kind.FP4, Kind.BF16) and any(part in MUON for part in name.split("."))


def is_learned(name: str) -> bool:
    """Router bias and hash table are not learned by gradient."""
    return not name.endswith(("gate.bias", "gate.tid2eid"))


def on_grids(cfg: Config, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the exported files will hold, with straight-through gradients to the master weights."""
    with torch.no_grad():
        rounded = {t.name: checkpoint.on_grid(weights[t.name], t.kind) for t in inventory(cfg)}
    return {name: w if w is rounded[name] else w + (rounded[name] - w.detach()) for name, w in weights.items()}


def make_optimizer(cfg: Config, weights: dict[str, Tensor], recipe: Recipe) -> Optimizer:
    """Sort the learned weights into Muon and AdamW groups."""
    learned = [t for t in inventory(cfg) if is_learned(t.name)]
    rates = {"embed.weight": 2.0, "head.weight": 0.7}
    groups: dict[float, list[Tensor]] = {}
    for t in learned:
        weights[t.name].requires_grad_()
        if not is_muon(t.name, t.kind):
            groups.setdefault(rates.get(t.name, 1.0), []).append(weights[t.name])
    adam = [{"params": params, "lr": recipe.adam_lr * rate} for rate, params in groups.items()]
    muon = [weights[t.name] for t in learned if is_muon(t.name, t.kind)]
    return Optimizer(muon, adam, recipe.muon_lr, recipe.momentum, recipe.decay)


def losses(cfg: Config, w: dict[str, Tensor], ids: Tensor, trace: model.Trace) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of rows [B, T + 2]: backbone's loss, head's on the text, head against backbone, their agreement."""
    logits, streams = model.backbone(cfg, w, ids[:, :-2], trace)
    draft = model.mtp(cfg, w, streams, ids[:, 1:-1], trace)
    lm = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:-1].flatten())
    truth = F.cross_entropy(draft.flatten(0, 1), ids[:, 2:].flatten())
    target, guess = logits.detach()[:, 1:], draft[:, :-1]
    divergence = F.kl_div(
        guess.log_softmax(-1), target.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1).mean()  # fmt: skip
    agreement = (guess.argmax(-1) == target.argmax(-1)).float().mean()
    return lm, truth, divergence, agreement


def learning_rate(recipe: Recipe, step: int) -> float:
    """Factor on the base rates: linear warm-up, constant, linear fall to 2 %."""
    rise = min(1.0, (step + 1) / recipe.warmup)
    fall = (recipe.steps - step) / (recipe.steps * (1 - recipe.hold))
    return rise * max(0.02, min(1.0, fall))


@torch.no_grad()
def balance_experts(weights: dict[str, Tensor], loads: dict[str, Tensor], step: float) -> None:
    """Move router biases towards equal load (no auxiliary loss)."""
    for prefix, load in loads.items():
        bias = weights.get(f"{prefix}.ffn.gate.bias")
        if bias is not None:
            bias += step * torch.sign(load.float().mean() - load)


def train(source: Path, folder: Path, recipe: Recipe) -> None:
    """Train on the text at `source` and write a whole checkpoint to `folder`."""
    torch.manual_seed(recipe.seed)
    cfg = Config.from_folder(CONFIG.parent)
    passages, _ = text.split_held_out(text.read_passages(source))
    tokenizer = text.train_tokenizer(passages, cfg.vocab)
    rows = text.Rows.of(passages, tokenizer, recipe.seed)
    weights = initial_weights(cfg, recipe.seed)
    optimizer = make_optimizer(cfg, weights, recipe)
    start, mean = time.process_time(), torch.zeros(len(LOG))
    for step in range(recipe.steps):
        phase = int(step >= recipe.second_phase * recipe.steps)
        length = recipe.long if phase else recipe.short
        trace = model.Trace(sparse=bool(phase), want_indexer_loss=True)
        w = on_grids(cfg, weights) if phase else weights
        lm, truth, divergence, agreement = losses(cfg, w, rows.batch(recipe.tokens // length, length + 2), trace)
        loss = lm + recipe.mtp_truth[phase] * truth + recipe.mtp_backbone[phase] * divergence
        (loss + sum(trace.indexer_losses) + sum(trace.tie_losses)).backward()
        factor = learning_rate(recipe, step)
        optimizer.step(factor)
        balance_experts(weights, trace.loads, recipe.balance * factor)
        seen = torch.stack((lm, truth, divergence, agreement, sum(trace.indexer_losses), sum(trace.tie_losses)))
        mean = torch.lerp(mean, seen.detach(), 1 / min(step + 1, 20))
        if step % 50 == 0 or step == recipe.steps - 1:
            values = " ".join(f"{name} {value:.3f}" for name, value in zip(LOG, mean.tolist(), strict=True))
            print(f"step {step} {values} cpu {time.process_time() - start:.0f} s", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.write(folder, cfg, weights, SHARDS)
    shutil.copyfile(CONFIG, folder / "config.json")
    text.write_tokenizer(tokenizer, folder, json.loads(CONFIG.read_text())["max_position_embeddings"])
