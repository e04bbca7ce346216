"""What drafts for the decoding loop: one protocol for both kinds of head.

`ChainDrafter` is the classic head: it reads pairs (hidden state at t, token t + 1), and for drafts 2..K its own output
stands in for hidden states it has not yet got; those positions are taken back and fed again with the true ones.
`BlockDrafter` is the DSpark head: it drafts a whole block at once from taps of committed tokens, and verifies the first
K, or the longest prefix whose estimated acceptance reaches a threshold.

Both note what the backbone shows of committed tokens only, and take it in when it is needed, so that tokens which the
consumer never saw can still be dropped. Sources: architecture description, section 9; DSpark description, section 5.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import mlx.core as mx

from .deepseek_v4.cache import SPARE
from .sampling import Draft, Rule

Logprobs = Callable[[mx.array, list[Draft]], mx.array]
"""Log-probabilities [1, V] of logits [1, V] that follow some drafts."""


class Rewindable(Protocol):
    """State of one layer."""

    offset: int

    def trim(self, count: int) -> int:
        """Take back the last `count` tokens exactly."""

    @property
    def state(self) -> Any:
        """Arrays to evaluate."""


class Drafter(Protocol):
    """A head, as the decoding loop sees it; features [1, n, ...] are what it reads of the backbone's pass."""

    caches: list[Any]

    def backbone_pass(self, tokens: list[int], cache: list[Any]) -> tuple[mx.array, mx.array]:
        """Logits [1, n, V] and features of `tokens`, which go into the backbone's cache."""

    def note_prompt(self, features: mx.array, tokens: list[int]) -> None:
        """Note the features of the next tokens of the text, which were not drafted."""

    def note_round(self, features: mx.array, accepted: list[int]) -> None:
        """Note the features of the token that was drafted after, and of the accepted drafts."""

    def note_newest(self, newest: int) -> None:
        """Note the newest token, which the backbone has yet to see."""

    def take_in(self) -> None:
        """Use up all that was noted, as far as it can be."""

    def drop(self, count: int) -> None:
        """Forget the last `count` noted tokens, and their features."""

    def draft(self, depth: int, rule: Rule, logprobs: Logprobs) -> list[Draft]:
        """Up to `depth` drafts after the newest token."""

    def settle(self) -> None:
        """Leave in the caches what is still noted."""

    def waiting(self) -> list[mx.array]:
        """Arrays that were noted and are not in the caches."""


def take_back(caches: Sequence[Any], count: int) -> None:
    """Take back the last `count` tokens of every cache."""
    if count:
        for cache in caches:
            cache.trim(count)


def covered(caches: list[Any]) -> int:
    """How many of the backbone's tokens a head's caches know of; -1 without any."""
    if not caches:
        return -1
    pending = getattr(caches[0], "pending", None)
    return int(caches[0].offset) + (0 if pending is None else pending.shape[1])


def is_block_head(model: Any) -> bool:
    """Whether a model's head drafts in blocks."""
    return getattr(getattr(model, "head", None), "kind", "classic") == "dspark"


def make_drafter(model: Any, caches: list[Any], position: int, confidence: float = 0.0) -> Drafter:
    """The drafter of a model's kind of head; `position` is where the backbone stands.

    Raises ValueError where `confidence` is asked of a head that does not estimate.
    """
    if is_block_head(model):
        return BlockDrafter(model, caches, position, confidence)
    if confidence:
        raise ValueError("a confidence threshold needs a DSpark head; a classic head does not estimate acceptance")
    return ChainDrafter(model, caches)


class ChainDrafter:
    """The classic head. `hidden` [1, n, ...] and `due` (n tokens) are pairs that the head has not seen."""

    most = 8
    """Deepest draft: within what the caches can take back exactly."""

    def __init__(self, model: Any, caches: list[Any]) -> None:
        self.model, self.caches = model, caches
        self.hidden: mx.array | None = getattr(caches[0], "pending", None)
        self.due: list[int] = []

    def backbone_pass(self, tokens: list[int], cache: list[Any]) -> tuple[mx.array, mx.array]:
        """Logits [1, n, V] and hidden states [1, n, ...] of `tokens`."""
        result: tuple[mx.array, mx.array] = self.model(mx.array([tokens]), cache=cache, return_hidden=True)
        return result

    def note_prompt(self, features: mx.array, tokens: list[int]) -> None:
        """Note hidden states of `tokens`: each token is the one due after the hidden state before it."""
        self.due += tokens if self.hidden is not None else tokens[1:]
        self._join(features)

    def note_round(self, features: mx.array, accepted: list[int]) -> None:
        """Note the hidden states of the newest token and the accepted drafts, which are due as next tokens."""
        self._join(features)
        self.due += accepted

    def note_newest(self, newest: int) -> None:
        """The newest token is due after the last hidden state."""
        self.due.append(newest)

    def _join(self, features: mx.array) -> None:
        self.hidden = features if self.hidden is None else mx.concatenate([self.hidden, features], axis=1)

    def take_in(self) -> None:
        """Give the head every pair that is complete."""
        count = len(self.due)
        if count and self.hidden is not None:
            pairs, self.hidden = self.hidden[:, :count], self.hidden[:, count:]
            self.model.mtp_forward(pairs, mx.array([self.due]), self.caches)
            self.due = []

    def drop(self, count: int) -> None:
        """Forget the last `count` hidden states and due tokens."""
        if self.hidden is not None and count:
            self.hidden, self.due = self.hidden[:, :-count], self.due[:-count]

    def draft(self, depth: int, rule: Rule, logprobs: Logprobs) -> list[Draft]:
        """Drafts from the due pairs, then from the head's own output, which is taken back."""
        if depth == 0 or self.hidden is None:
            return []
        hidden, tokens = self.hidden, mx.array([self.due])
        drafts: list[Draft] = []
        while len(drafts) < depth:
            logits, hidden = self.model.mtp_forward(hidden, tokens, self.caches, return_hidden=True)
            drafts.append(rule.draft(logprobs(logits[0, -1:], drafts)[-1:]))
            hidden, tokens = hidden[:, -1:], drafts[-1].token[None]
        mx.eval([draft.token for draft in drafts])
        take_back(self.caches, depth - 1)
        self.hidden, self.due = None, []
        return drafts

    def settle(self) -> None:
        """Keep the hidden state that waits for its next token."""
        self.caches[0].pending = self.hidden

    def waiting(self) -> list[mx.array]:
        """Hidden states without a next token."""
        return [] if self.hidden is None else [self.hidden]


class BlockDrafter:
    """The DSpark head. `taps` [1, n, ...] are those of committed positions that are not in the context yet."""

    most = SPARE
    """Most drafts of a block that are verified: what every cache can take back exactly."""

    def __init__(self, model: Any, caches: list[Any], position: int, confidence: float = 0.0) -> None:
        self.model, self.caches, self.confidence = model, caches, confidence
        self.taps: mx.array | None = None
        self.newest = -1
        if caches[0].offset != position:  # what was before is not known: the context begins here
            for cache in caches:
                cache.restart(position)

    def backbone_pass(self, tokens: list[int], cache: list[Any]) -> tuple[mx.array, mx.array]:
        """Logits [1, n, V] and taps [1, n, ...] of `tokens`."""
        logits, taps, _ = self.model.tapped_forward(mx.array([tokens]), cache)
        return logits, taps

    def note_prompt(self, features: mx.array, tokens: list[int]) -> None:
        """Note the taps of tokens of the text."""
        self.taps = features if self.taps is None else mx.concatenate([self.taps, features], axis=1)

    def note_round(self, features: mx.array, accepted: list[int]) -> None:
        """Note the taps of the token that was drafted after, and of the accepted drafts."""
        self.note_prompt(features, accepted)

    def note_newest(self, newest: int) -> None:
        """The newest token is the anchor of the next block."""
        self.newest = newest

    def take_in(self) -> None:
        """Append the context keys of what was noted."""
        if self.taps is not None and self.taps.shape[1]:
            self.model.append_context(self.taps, self.caches)
        self.taps = None

    def drop(self, count: int) -> None:
        """Forget the last `count` taps."""
        if self.taps is not None and count:
            self.taps = self.taps[:, :-count]

    def draft(self, depth: int, rule: Rule, logprobs: Logprobs) -> list[Draft]:
        """The first `depth` drafts of a full block, or fewer: up to the first whose estimate is below the threshold."""
        self.take_in()
        if depth == 0:
            return []
        block = self.model.draft_block(self.newest, self.caches)
        drafts: list[Draft] = []
        for slot in range(min(depth, block.base.shape[0])):
            logits = block.logits(slot, [draft.token for draft in drafts])
            drafts.append(rule.draft(logprobs(logits, drafts)))
        estimates = mx.sigmoid(block.confidence([draft.token for draft in drafts]))
        mx.eval([draft.token for draft in drafts], estimates)
        values: list[float] = estimates.tolist()  # type: ignore[assignment]
        keep = next((n for n, value in enumerate(values) if value < self.confidence), len(drafts))
        return [dataclasses.replace(d, estimate=v) for d, v in zip(drafts[:keep], values[:keep], strict=True)]

    def settle(self) -> None:
        """Nothing waits: every committed position is in the context."""
        self.take_in()

    def waiting(self) -> list[mx.array]:
        """Taps that are not in the context."""
        return [] if self.taps is None else [self.taps]
