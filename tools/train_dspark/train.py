"""The objective and the loop.

The objective is that of DeepSeek's public trainer (deepseek-ai/DeepSpec, `deepspec/modeling/dspark/loss.py` and the
settings of `config/dspark/dspark_qwen3_4b_online.py`, read in November 2026): the backbone, its embedding and its
output matrix are frozen; blocks begin at random positions of the text; the token before each slot is the text's; and

    loss = 0.1 x cross entropy with the text
         + 0.9 x L1 distance of the head's distribution from the backbone's
         + 1.0 x binary cross entropy of the confidence with 1 - L1 / 2, the share that sampling accepts,

slot i weighed by exp(-i / 4). How DeepSeek trained the heads of its V4 releases is not public: optimizer, schedule,
sizes and first weights are ours. So are three differences: in the first steps, where distributions that hardly overlap
give L1 little to go by, KL(backbone || head) stands in its place; the text is what the demo's backbone was trained on,
which that trainer has the target model write anew; and at the end weights are rounded to their formats at every step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from tools.train_demo import checkpoint, text
from tools.train_demo.optimizer import Optimizer

from . import head

Weights = dict[str, Tensor]
MUON = ("wq_a", "wq_b", "wkv", "wo_a", "wo_b", "w1", "w2", "w3", "main_proj")


@dataclass(frozen=True)
class Recipe:
    """All choices of a training run; the defaults made the head in manifests/demo/dspark."""

    steps: int = 330
    rows: int = 2  # per step
    length: int = 256
    anchors: int = 160  # blocks per row
    on_grids: float = 0.6  # from this share of the steps on, weights are rounded to their formats
    divergence: float = 0.7  # up to this share of the steps KL takes the place of L1
    warmup: int = 10
    rate: float = 1.0  # factor on both learning rates
    muon_lr: float = 0.02
    adam_lr: float = 0.006
    momentum: float = 0.95
    weight_decay: float = 0.0
    cross_entropy: float = 0.1
    distance: float = 0.9
    confidence: float = 1.0
    decay: float = 4.0  # slots
    seed: int = 1


def pairs(rows: text.Rows, vocabulary: int) -> Tensor:
    """How often each token follows each in the passages of `rows`, [V, V] by (token before, token)."""
    counts = torch.zeros(vocabulary * vocabulary)
    for passage in rows.passages:  # chat markers are left out
        ids = torch.tensor([i for sentence in passage for i in sentence])
        counts += torch.bincount(ids[:-1] * vocabulary + ids[1:], minlength=vocabulary**2).float()
    return counts.view(vocabulary, vocabulary)


def loss_of(slots: head.Slots, recipe: Recipe, early: bool) -> Tensor:
    """The objective, averaged over weighed slots."""
    weights = torch.exp(-torch.arange(head.BLOCK) / recipe.decay).expand(slots.following.shape)
    entropy = -slots.own.gather(-1, slots.following[..., None])[..., 0]
    rate = slots.accepted()
    sure = F.binary_cross_entropy_with_logits(slots.confidence, rate.detach().clamp(0, 1), reduction="none")
    kl = F.kl_div(slots.own, slots.target, log_target=True, reduction="none").sum(-1) if early else None
    apart = 2 * (1 - rate) if kl is None else kl
    mixed = recipe.cross_entropy * entropy + recipe.distance * apart + recipe.confidence * sure
    return (mixed * weights).sum() / weights.sum()


def factor_at(recipe: Recipe, step: int) -> float:
    """Factor on the base rates: linear rise, then linear fall to 2 %."""
    return recipe.rate * min(1.0, (step + 1) / recipe.warmup) * max(0.02, 1 - step / recipe.steps)


class Trainer:
    """A run: the frozen backbone, the rows of text, the head and its optimizer."""

    def __init__(self, source: Path, demo: Path, recipe: Recipe, start: Path | None = None) -> None:
        passages, _ = text.split_held_out(text.read_passages(source))
        tokenizer = Tokenizer.from_file(str(demo / "tokenizer.json"))
        self.rows = text.Rows.of(passages, tokenizer, recipe.seed)
        self.recipe = recipe
        self.cfg, self.backbone = checkpoint.read(demo)
        if start is None:
            counts = pairs(self.rows, self.cfg.vocab)
            self.weights = head.initial(self.cfg, self.backbone, counts, recipe.seed)
        else:
            self.weights = head.read(start, self.cfg)
        self.optimizer = self._optimizer()

    def _optimizer(self) -> Optimizer:
        """Muon for the matrices of attention, experts and taps; Adam for the rest; router biases stay as they are."""
        learned = {name: w.requires_grad_() for name, w in self.weights.items() if not name.endswith("gate.bias")}
        muon = [w for name, w in learned.items() if any(part in MUON for part in name.split("."))]
        rest = [w for name, w in learned.items() if not any(part in MUON for part in name.split("."))]
        recipe = self.recipe
        adam = [{"params": rest, "lr": recipe.adam_lr}]
        return Optimizer(muon, adam, recipe.muon_lr, recipe.momentum, recipe.weight_decay)

    def rounded(self) -> Weights:
        """What the files will hold, with gradients that pass straight through."""
        with torch.no_grad():
            grid = {r.name: checkpoint.on_grid(self.weights[r.name], r.kind) for r in head.inventory(self.cfg)}
        return {n: w if w is grid[n] else w + (grid[n] - w.detach()) for n, w in self.weights.items()}

    def anchors(self) -> Tensor:
        """Positions of the blocks of a row, in order; the token after the last slot is still in the row."""
        last = self.recipe.length - head.BLOCK
        return torch.tensor(sorted(self.rows.rng.sample(range(1, last), self.recipe.anchors)))

    def step(self, number: int) -> Tensor:
        """One update; returns the loss, and per slot the share accepted by sampling and of equal first choices."""
        recipe = self.recipe
        w = self.rounded() if number >= recipe.on_grids * recipe.steps else self.weights
        early = number < recipe.divergence * recipe.steps
        found, loss = [], torch.zeros(())
        for row in head.seen(self.cfg, self.backbone, self.rows.batch(recipe.rows, recipe.length)):
            slots = head.forced(self.cfg, w, self.backbone, row, self.anchors())
            loss = loss + loss_of(slots, recipe, early) / recipe.rows
            found.append(torch.stack((slots.accepted().mean(0), slots.agree().float().mean(0))).detach())
        loss.backward()
        self.optimizer.step(factor_at(recipe, number))
        return torch.cat((loss.detach()[None], torch.stack(found).mean(0).flatten()))


def train(
    source: Path, demo: Path, folder: Path, recipe: Recipe, say: Callable[[str], None], first: Path | None = None
) -> None:
    """Train a head for the demo's backbone on the text at `source`; write it to `folder` now and then, and last.

    `first`: the folder of a head to go on from.
    """
    torch.manual_seed(recipe.seed)
    trainer, start = Trainer(source, demo, recipe, first), time.process_time()
    mean = torch.zeros(1 + 2 * head.BLOCK)
    for step in range(recipe.steps):
        mean = torch.lerp(mean, trainer.step(step), 1 / min(step + 1, 20))
        is_last = step == recipe.steps - 1
        if step % 10 == 0 or is_last:
            loss, *rates = mean.tolist()
            shown = " ".join(f"{value:.3f}" for value in rates)
            say(f"step {step} loss {loss:.3f} accepted, equal by slot {shown} cpu {time.process_time() - start:.0f} s")
        if step % 25 == 24 or is_last:
            head.write(folder, demo, trainer.cfg, trainer.weights)
