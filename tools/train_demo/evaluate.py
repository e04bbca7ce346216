"""Figures of a checkpoint, from its files alone: perplexity, acceptance and samples on held-out text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from . import checkpoint, model, text
from .spec import Config

PROMPT_TOKENS, NEW_TOKENS, PROMPTS = 48, 160, 24
ROW = 512


@dataclass(frozen=True)
class Demo:
    """A checkpoint read back from disk."""

    cfg: Config
    weights: dict[str, Tensor]
    tokenizer: Tokenizer

    @classmethod
    def read(cls, folder: Path) -> Demo:
        """Weights and tokenizer of a folder."""
        return cls(*checkpoint.read(folder), Tokenizer.from_file(str(folder / "tokenizer.json")))

    def ids(self, document: str) -> list[int]:
        """BOS and the tokens of a text."""
        return self.tokenizer.encode(text.BOS + document).ids


@dataclass(frozen=True)
class Perplexity:
    """Of the backbone on held-out text, teacher-forced; and the head's top-1 agreement there."""

    per_token: float
    per_byte: float
    tokens: int
    head_on_text: float  # share of positions where the head's first choice is the token after next
    head_on_backbone: float  # and where it is the backbone's first choice


@torch.inference_mode()
def perplexity(demo: Demo, passages: list[text.Passage]) -> Perplexity:
    """One row per passage, cut at `ROW` tokens."""
    nats, tokens, size, right, agree, drafts = 0.0, 0, 0, 0, 0, 0
    for passage in passages:
        ids = torch.tensor(demo.ids("".join(passage))[: ROW + 2])
        logits, streams = model.backbone(demo.cfg, demo.weights, ids[None, :-1])
        nats += F.cross_entropy(logits[0], ids[1:], reduction="sum").item()
        tokens += len(ids) - 1
        size += len(demo.tokenizer.decode(ids[1:].tolist()).encode())
        draft = model.mtp(demo.cfg, demo.weights, streams[:, :-1], ids[None, 1:-1])[0].argmax(-1)
        right += (draft == ids[2:]).sum().item()
        agree += (draft == logits[0, 1:].argmax(-1)).sum().item()
        drafts += len(draft)
    return Perplexity(
        math.exp(nats / tokens), 2 ** (nats / size / math.log(2)), tokens, right / drafts, agree / drafts
    )


@dataclass(frozen=True)
class Acceptance:
    """Drafts of depth 1 against plain greedy decoding, pooled over the prompts."""

    prompts: int
    new_tokens: int
    positions: float  # share of all generated positions whose draft is right
    loop: float  # share of the drafts that a draft/verify loop makes
    loop_by_prompt: list[float]
    distinct: float  # distinct 4-token runs of the generated text, as a share of all: 1 is no repetition
    index_ties: (
        float  # share of selecting queries whose last selected and first dropped indexer scores are equal
    )
    texts: list[tuple[str, str]]  # (prompt, continuation)


@torch.inference_mode()
def acceptance(demo: Demo, prompts: list[list[int]], new_tokens: int) -> Acceptance:
    """Decode all prompts (one length) greedily, past EOS, then score the drafts in one pass."""
    ids = torch.tensor(prompts)
    start = ids.shape[1]
    for _ in range(new_tokens):
        logits, streams = model.backbone(demo.cfg, demo.weights, ids)
        ids = torch.cat((ids, logits[:, -1:].argmax(-1)), dim=1)
    trace = model.Trace()
    logits, streams = model.backbone(demo.cfg, demo.weights, ids[:, :-1], trace)
    draft = model.mtp(demo.cfg, demo.weights, streams[:, :-1], ids[:, 1:-1]).argmax(-1)
    # Pair t drafts token t + 2; the first draft comes from the pair (last prompt token, first new token).
    match = (draft == ids[:, 2:])[:, start - 1 :]
    loops = [_loop(row) for row in match.tolist()]
    texts = [
        (demo.tokenizer.decode(row[1:start]), demo.tokenizer.decode(_until_eos(row[start:])))
        for row in ids.tolist()
    ]
    return Acceptance(
        prompts=len(prompts),
        new_tokens=new_tokens,
        positions=match.float().mean().item(),
        loop=sum(sum(row) for row in loops) / sum(map(len, loops)),
        loop_by_prompt=[sum(row) / len(row) for row in loops],
        distinct=sum(_distinct(row[start:]) for row in ids.tolist()) / len(prompts),
        index_ties=_ties(demo.cfg, trace),
        texts=texts,
    )


def _loop(match: list[bool]) -> list[bool]:
    """The drafts that a loop of depth 1 makes: after an accepted draft the next position is skipped."""
    made, position = [], 0
    while position < len(match):
        made.append(match[position])
        position += 2 if match[position] else 1
    return made


def _until_eos(ids: list[int]) -> list[int]:
    return ids[: ids.index(1)] if 1 in ids else ids


def _distinct(ids: list[int]) -> float:
    runs = list(zip(ids, ids[1:], ids[2:], ids[3:], strict=False))
    return len(set(runs)) / len(runs)


def _ties(cfg: Config, trace: model.Trace) -> float:
    tied, selecting = 0, 0
    for scores in trace.scores.values():
        visible = model.visible_entries(scores.shape[1], scores.shape[2], 4)
        ordered = scores.masked_fill(~visible, model.NEGATIVE).sort(-1, descending=True).values
        if ordered.shape[-1] <= cfg.index_topk:
            continue
        last, dropped = ordered[..., cfg.index_topk - 1], ordered[..., cfg.index_topk]
        rows = dropped > model.NEGATIVE
        selecting += rows.sum().item()
        tied += (rows & (last == dropped)).sum().item()
    return tied / max(selecting, 1)


def held_out_prompts(demo: Demo, passages: list[text.Passage], length: int, count: int) -> list[list[int]]:
    """BOS and the first tokens of the first `count` held-out passages that are long enough."""
    encoded = (demo.ids("".join(passage)) for passage in passages)
    return [ids[:length] for ids in encoded if len(ids) >= length][:count]


def report(source: Path, folder: Path) -> str:
    """All figures as lines of text."""
    demo = Demo.read(folder)
    _, passages = text.split_held_out(text.read_passages(source))
    p = perplexity(demo, passages)
    a = acceptance(demo, held_out_prompts(demo, passages, PROMPT_TOKENS, PROMPTS), NEW_TOKENS)
    size = sum(file.stat().st_size for file in folder.iterdir())
    lines = [
        f"all files: {size} bytes",
        f"held-out perplexity: {p.per_token:.2f} per token, {p.per_byte:.3f} per byte ({p.tokens} tokens)",
        f"head, teacher-forced: {p.head_on_text:.1%} right on the text, "
        f"{p.head_on_backbone:.1%} equal to the backbone",
        f"acceptance, greedy, {a.prompts} prompts x {a.new_tokens} tokens: {a.loop:.1%} of the loop's drafts "
        f"(worst prompt {min(a.loop_by_prompt):.1%}), {a.positions:.1%} of all positions",
        f"distinct 4-token runs: {a.distinct:.1%}; tied indexer selections: {a.index_ties:.2%}",
    ]
    for prompt, continuation in a.texts[::4]:
        lines += ["", f"prompt: {prompt!r}", f"greedy: {continuation!r}"]
    return "\n".join(lines)
