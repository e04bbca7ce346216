"""Figures of a written head, from its files alone, teacher-forced on held-out text."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer

from tools.train_demo import checkpoint, text

from . import head

LENGTH = 512


@torch.inference_mode()
def report(source: Path, demo: Path, folder: Path) -> str:
    """Acceptance by slot on every held-out passage, cut at `LENGTH` tokens; every second position begins a block."""
    cfg, backbone = checkpoint.read(demo)
    weights = head.read(folder, cfg)
    tokenizer = Tokenizer.from_file(str(demo / "tokenizer.json"))
    _, passages = text.split_held_out(text.read_passages(source))
    sums, blocks = torch.zeros(3, head.BLOCK), 0
    for passage in passages:
        ids = torch.tensor(tokenizer.encode(text.BOS + "".join(passage)).ids[:LENGTH])
        if len(ids) <= head.BLOCK + 2:
            continue
        (row,) = head.seen(cfg, backbone, ids[None])
        slots = head.forced(cfg, weights, backbone, row, torch.arange(1, len(ids) - head.BLOCK, 2))
        found = (slots.agree().float(), slots.accepted(), slots.confidence.sigmoid())
        sums += torch.stack([values.sum(0) for values in found])
        blocks += len(slots.own)
    names = ("first choice equals the backbone's", "accepted by sampling at temperature 1", "mean confidence")
    lines = [f"{blocks} blocks on {len(passages)} held-out passages, each slot given the text before it"]
    for name, values in zip(names, (sums / blocks).tolist(), strict=True):
        lines.append(f"{name}, by slot: " + ", ".join(f"{value:.1%}" for value in values))
    return "\n".join(lines)
