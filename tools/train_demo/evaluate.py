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

PROMPT_TOKENS, NEW_TOKENS, PROMPTS = 48, 128, 24
EARLY, TEMPERATURE, SAMPLES = 32, 0.7, 6
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
    """Of the backbone on held-out text, teacher-forced; and how well the head agrees there."""

    per_token: float
    per_byte: float
    tokens: int
    head_on_text: float  # share of positions where the head's first choice is the token after next
    head_on_backbone: float  # and where it is the backbone's first choice
    overlap: float  # mean of sum(min(p, q)): the acceptance of speculative sampling at temperature 1


@torch.inference_mode()
def perplexity(demo: Demo, passages: list[text.Passage]) -> Perplexity:
    """One row per passage, cut at `ROW` tokens."""
    nats, tokens, size, right, agree, overlap, drafts = 0.0, 0, 0, 0, 0, 0.0, 0
    for passage in passages:
        ids = torch.tensor(demo.ids("".join(passage))[: ROW + 2])
        logits, streams = model.backbone(demo.cfg, demo.weights, ids[None, :-1])
        nats += F.cross_entropy(logits[0], ids[1:], reduction="sum").item()
        tokens += len(ids) - 1
        size += len(demo.tokenizer.decode(ids[1:].tolist()).encode())
        guess = model.mtp(demo.cfg, demo.weights, streams[:, :-1], ids[None, 1:-1])[0]
        right += (guess.argmax(-1) == ids[2:]).sum().item()
        agree += (guess.argmax(-1) == logits[0, 1:].argmax(-1)).sum().item()
        overlap += torch.minimum(guess.softmax(-1), logits[0, 1:].softmax(-1)).sum().item()
        drafts += len(guess)
    return Perplexity(
        per_token=math.exp(nats / tokens),
        per_byte=math.exp(nats / size),
        tokens=tokens,
        head_on_text=right / drafts,
        head_on_backbone=agree / drafts,
        overlap=overlap / drafts,
    )


@dataclass(frozen=True)
class Acceptance:
    """Drafts of depth 1 against plain greedy decoding, pooled over the prompts."""

    prompts: int
    new_tokens: int
    positions: float  # share of all generated positions whose draft is right
    early: float  # the same over the first `EARLY` positions, before greedy text repeats itself
    loop: float  # share of the drafts that a draft/verify loop makes
    loop_by_prompt: list[float]
    distinct: float  # distinct 4-token runs of the generated text, as a share of all: 1 is no repetition
    index_ties: float  # share of selecting queries whose last selected and first dropped indexer scores are equal
    texts: list[tuple[str, str]]  # (prompt, continuation)


def continue_prompts(demo: Demo, ids: Tensor, new_tokens: int, temperature: float = 0.0) -> Tensor:
    """[B, T] to [B, T + new_tokens] by whole passes, greedily or by sampling with a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(new_tokens):
        last = model.backbone(demo.cfg, demo.weights, ids)[0][:, -1]
        if temperature:
            chosen = torch.multinomial((last / temperature).softmax(-1), 1, generator=generator)
        else:
            chosen = last.argmax(-1, keepdim=True)
        ids = torch.cat((ids, chosen), dim=1)
    return ids


def texts_of(demo: Demo, ids: Tensor, start: int) -> list[tuple[str, str]]:
    """(prompt without BOS, continuation up to EOS) of each row."""
    decode = demo.tokenizer.decode
    return [(decode(row[1:start]), decode(_until_eos(row[start:]))) for row in ids.tolist()]


@torch.inference_mode()
def acceptance(demo: Demo, prompts: list[list[int]], new_tokens: int) -> Acceptance:
    """Decode all prompts (one length) greedily, past EOS, then score the drafts in one pass."""
    ids = continue_prompts(demo, torch.tensor(prompts), new_tokens)
    start = len(prompts[0])
    trace = model.Trace()
    _, streams = model.backbone(demo.cfg, demo.weights, ids[:, :-1], trace)
    draft = model.mtp(demo.cfg, demo.weights, streams[:, :-1], ids[:, 1:-1]).argmax(-1)
    # Pair t drafts token t + 2; the first draft comes from the pair (last prompt token, first new token).
    match = (draft == ids[:, 2:])[:, start - 1 :]
    loops = [_loop(row) for row in match.tolist()]
    return Acceptance(
        prompts=len(prompts),
        new_tokens=new_tokens,
        positions=match.float().mean().item(),
        early=match[:, :EARLY].float().mean().item(),
        loop=sum(sum(row) for row in loops) / sum(map(len, loops)),
        loop_by_prompt=[sum(row) / len(row) for row in loops],
        distinct=sum(_distinct(row[start:]) for row in ids.tolist()) / len(prompts),
        index_ties=_ties(demo.cfg, trace),
        texts=texts_of(demo, ids, start),
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
    prompts = held_out_prompts(demo, passages, PROMPT_TOKENS, PROMPTS)
    a = acceptance(demo, prompts, NEW_TOKENS)
    few = torch.tensor(prompts[:: PROMPTS // SAMPLES])
    with torch.inference_mode():
        sampled = continue_prompts(demo, few, NEW_TOKENS, TEMPERATURE)
    size = sum(file.stat().st_size for file in folder.iterdir())
    lines = [
        f"all files: {size} bytes",
        f"held-out perplexity: {p.per_token:.2f} per token, {p.per_byte:.3f} per byte ({p.tokens} tokens)",
        f"head, teacher-forced: first choice right on the text {p.head_on_text:.1%}, "
        f"equal to the backbone's {p.head_on_backbone:.1%}",
        f"acceptance by speculative sampling at temperature 1, teacher-forced: {p.overlap:.1%}",
        f"acceptance, greedy, {a.prompts} prompts x {a.new_tokens} tokens: {a.loop:.1%} of the loop's drafts "
        f"(worst prompt {min(a.loop_by_prompt):.1%}), {a.positions:.1%} of all positions, "
        f"{a.early:.1%} of the first {EARLY}",
        f"distinct 4-token runs: {a.distinct:.1%}; tied indexer selections: {a.index_ties:.2%}",
    ]
    greedy = a.texts[:: PROMPTS // SAMPLES]
    for (prompt, best), (_, drawn) in zip(greedy, texts_of(demo, sampled, PROMPT_TOKENS), strict=True):
        lines += ["", f"prompt: {prompt!r}", f"greedy: {best!r}", f"temperature {TEMPERATURE}: {drawn!r}"]
    return "\n".join(lines)
