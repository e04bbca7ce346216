"""Replies that keep to a JSON schema: tokens that would break it are never drawn, with the head or without.

The grammar is llguidance's (the extra `schema`), which says for any beginning of a reply which tokens may follow. As it
is asked for every row of a verification pass, drafts that break the schema are turned down like any other wrong draft,
and the text is the one that decoding without the head gives.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from ds4convert.checkpoint.types import JSON
from ds4convert.serving.history import shown
from ds4convert.serving.refused import Refused

FIELD = "response_format"
SPACE = r"( |\n {0,16})?"
"""White space between two marks of a reply: a space, or a line break and its indent; a reply of nothing else ends."""

NEEDED = "replies that keep to a schema need llguidance on this server: pip install 'ds4convert[schema]'"


class Grammars:
    """Makes grammars for one tokenizer, whose vocabulary is read once, when the first request asks for one."""

    def __init__(self, tokenizer: Any, vocabulary: int) -> None:
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        self._words: Any = None

    def of(self, schema: JSON) -> Any:
        """Return a matcher for replies to a schema. Raises `Refused` with 422 for a schema that cannot be kept."""
        try:
            from llguidance import LLMatcher
        except ImportError:
            raise Refused(422, f"{FIELD}: {NEEDED}", FIELD) from None
        try:
            told = json.dumps(schema)
            grammar = LLMatcher.grammar_from_json_schema(told, overrides={"whitespace_pattern": SPACE})
            matcher = LLMatcher(self._known(), grammar, log_level=0)
            error = matcher.get_error() if matcher.is_error() else ""
        except (ValueError, RecursionError) as e:
            error = str(e)
        if error:
            raise Refused(422, f"{FIELD}: this schema cannot be kept: {shown(error.splitlines()[0])}", FIELD)
        return matcher

    def _known(self) -> Any:
        """Return the vocabulary as llguidance has it; building it takes about a second for 129,000 tokens."""
        if self._words is None:
            from llguidance import LLTokenizer

            plain = copy.copy(self._tokenizer.backend_tokenizer)
            plain.no_padding()
            plain.no_truncation()
            ends = sorted(self._tokenizer.eos_token_ids)
            self._words = LLTokenizer(plain.to_str(), n_vocab=self._vocabulary, eos_token=ends)
        return self._words


@dataclass
class Kept:
    """A logits processor that leaves only tokens which keep a reply within a grammar.

    `start` is the length of the history before the reply. Where the reply begins with reasoning, `opens` has the tokens
    that end it, and everything before is free but for `ends`, the tokens that end a reply: the answer has to come.
    """

    matcher: Any
    start: int
    opens: Sequence[int] = ()
    ends: Sequence[int] = ()
    taken: list[int] = field(default_factory=list)

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """Return logits [1, V] of the token after `tokens` [n], with those that break the grammar at -infinity."""
        said: list[int] = tokens[self.start :].tolist()  # type: ignore[assignment]
        begin = after(said, self.opens)
        if begin is None:
            return mx.put_along_axis(logits, mx.array([list(self.ends)]), mx.array(-mx.inf, logits.dtype), axis=-1)
        if not self._follow(said[begin:]):
            return logits
        mask: bytes = self.matcher.compute_logit_bias()  # a byte a token, 0 for those that may not follow
        if not any(mask):
            return logits
        free = mx.array(memoryview(mask)) != 0  # type: ignore[arg-type,unused-ignore]
        return mx.where(free, logits, -mx.inf)

    def _follow(self, said: list[int]) -> bool:
        """Bring the matcher to the end of `said`; return False where it breaks the grammar: such a draft is lost."""
        same = next((n for n, (a, b) in enumerate(zip(said, self.taken, strict=False)) if a != b), None)
        same = min(len(said), len(self.taken)) if same is None else same
        if len(self.taken) > same:
            self.matcher.rollback(len(self.taken) - same)
            del self.taken[same:]
        more = said[same:]
        count = self.matcher.validate_tokens(more) if more else 0
        self.matcher.consume_tokens(more[:count])
        self.taken += more[:count]
        return count == len(more) and not self.matcher.is_error()


def after(said: Sequence[int], opens: Sequence[int]) -> int | None:
    """Return where the answer begins in the tokens of a reply: behind the first `opens`; None before that."""
    if not opens:
        return 0
    size = len(opens)
    return next((n + size for n in range(len(said) - size + 1) if list(said[n : n + size]) == list(opens)), None)
