"""What a DSpark head computes, under the keys of a recording (golden/dspark-*/README.md), from its own token ids.

The prompt is prefilled at once; the recorded greedy tokens are then fed one by one. Before each of the first N of them
a block is drafted, and where a speculative loop would draft, the block is verified in one pass and taken back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import mlx.core as mx

from ds4convert.inference.drafter import take_back

if TYPE_CHECKING:
    from ds4convert.inference.deepseek_v4.model import Model


DRAFT_LOGITS = ("draft_base_logits", "draft_logits", "confidence", "verify_logits")
STATES = (
    "tap_lastw", "main_x_lastw", "context_kv", "decode_tap",
    "stage_hidden_first", "stage_hidden_last", "draft_hidden_first", "draft_hidden_last",
)  # fmt: skip
EXACT = ("draft_ids", "accepted", "round_step", "draft_expert_ids_first", "draft_expert_ids_last")
KEYS = (*DRAFT_LOGITS, *STATES, *EXACT)

Tensors = Mapping[str, mx.array]


def record(model: Model, wanted: Tensors, trace: object = None) -> dict[str, mx.array]:
    """Every key of one prompt, the backbone's as well; `trace` is told what the prompt's pass shows."""
    cache, head_cache = model.make_cache(), model.make_mtp_cache()
    ids = wanted["input_ids"].astype(mx.int32)
    logits, taps, hidden = model.tapped_forward(ids[None], cache, trace)  # type: ignore[arg-type]
    model.append_context(taps, head_cache)
    mx.eval(logits, taps, hidden, [c.state for c in cache + head_cache])
    window = model.args.sliding_window
    count = min(ids.size, window)
    out = {
        "logits": logits[0],
        "hidden_last8": hidden[0, -8:],
        "tap_lastw": taps[0, -window:],
        "main_x_lastw": model.dspark.condense(taps)[0, -window:],
        "context_kv": mx.stack([c.window.read(ids.size - count, count)[0] for c in head_cache]),
    }
    steps = _Steps(model, wanted, cache, head_cache)
    steps.run()
    first = logits[0, -1:]
    out["greedy_ids"] = mx.concatenate([first, *steps.logits]).argmax(axis=-1)
    return out | steps.values()


class _Steps:
    """The recorded greedy tokens, one by one, with the blocks drafted before them."""

    def __init__(self, model: Model, wanted: Tensors, cache: list, head_cache: list) -> None:  # type: ignore[type-arg]
        self.model, self.cache, self.head_cache = model, cache, head_cache
        greedy = wanted.get("greedy_ids")
        self.tokens: list[int] = [] if greedy is None else greedy.tolist()  # type: ignore[assignment]
        self.slots = model.args.dspark_block_size
        self.drafting = max(0, len(self.tokens) - self.slots - 1)
        self.logits: list[mx.array] = []
        self.taps: list[mx.array] = []
        self.blocks: list[dict[str, mx.array]] = []
        self.accepted: list[int] = []
        self.rounds: list[int] = []
        self.verified: list[mx.array] = []
        self.traced: dict[str, mx.array] = {}

    def run(self) -> None:
        """Go through all tokens but the last."""
        following = 0
        for at, token in enumerate(self.tokens[:-1]):
            if at < self.drafting:
                drafts = self._draft(at, token)
                wanted = self.tokens[at + 1 : at + 1 + self.slots]
                same = [a == b for a, b in zip(drafts, wanted, strict=False)]
                self.accepted.append(same.index(False) if False in same else len(same))
                if at == following:
                    self._verify([token, *drafts])
                    self.rounds.append(at)
                    following = at + self.accepted[-1] + 1
            logits, taps, _ = self.model.tapped_forward(mx.array([[token]]), self.cache)
            self.model.append_context(taps, self.head_cache)
            mx.eval(logits, taps, [c.state for c in self.cache + self.head_cache])
            self.logits.append(logits[0])
            self.taps.append(taps[0])

    def _draft(self, at: int, anchor: int) -> list[int]:
        stages: dict[int, mx.array] = {}
        experts: dict[int, mx.array] = {}

        def trace(kind: str, number: int, value: mx.array) -> None:
            (stages if kind == "stage" else experts)[number] = value[0]

        block = self.model.draft_block(anchor, self.head_cache, trace)
        rows: list[mx.array] = []
        drafts: list[mx.array] = []
        for slot in range(self.slots):
            rows.append(block.logits(slot, drafts))
            drafts.append(rows[-1].argmax(axis=-1))
        found = {
            "draft_base_logits": block.base,
            "draft_logits": mx.concatenate(rows),
            "draft_ids": mx.concatenate(drafts),
            "confidence": block.confidence(drafts),
        }
        mx.eval(found)
        self.blocks.append(found)
        for name in {0: ("first",), self.drafting - 1: ("last",)}.get(at, ()):
            layers = self.model.args.num_hidden_layers
            self.traced[f"stage_hidden_{name}"] = mx.stack([stages[n] for n in sorted(stages)])
            self.traced[f"draft_hidden_{name}"] = block.hidden
            self.traced[f"draft_expert_ids_{name}"] = mx.stack([mx.sort(experts[layers + n]) for n in sorted(stages)])
            mx.eval(self.traced)
        return found["draft_ids"].tolist()  # type: ignore[return-value]

    def _verify(self, tokens: list[int]) -> None:
        """The backbone on a block, and back."""
        logits, _, _ = self.model.tapped_forward(mx.array([tokens]), self.cache)
        mx.eval(logits, [c.state for c in self.cache])
        take_back(self.cache, len(tokens))
        self.verified.append(logits[0])

    def values(self) -> dict[str, mx.array]:
        """What was found, under the keys of a recording."""
        out = dict(self.traced)
        if self.logits:
            out |= {"decode_logits": mx.concatenate(self.logits), "decode_tap": mx.concatenate(self.taps)}
        if self.blocks:
            out |= {key: mx.stack([block[key] for block in self.blocks]) for key in self.blocks[0]}
            out |= {"accepted": mx.array(self.accepted), "round_step": mx.array(self.rounds)}
            out["verify_logits"] = mx.stack(self.verified)
        return out
