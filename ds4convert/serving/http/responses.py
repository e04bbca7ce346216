"""Responses in OpenAI's forms: whole and in chunks, of chats and of texts, with log-probabilities and usage.

The forms are those of the openai client's own types (`openai.types.chat`, `openai.types.completion`); the reasoning is
told as `reasoning_content` (DeepSeek's API, llama.cpp) and as `reasoning` (mlx-lm, vLLM, OpenRouter), as clients read
the one or the other. The figures of the head are in a field of their own.
"""

from __future__ import annotations

import codecs
import json
import math
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ds4convert.checkpoint.types import JSON
from ds4convert.inference.decode import DecodeStats
from ds4convert.serving.metrics import add_counts
from ds4convert.serving.reply import Piece
from ds4convert.serving.validation import CHAT, Asked

EXTENSION = "ds4convert"
"""Name of the added field in responses; OpenAI's clients leave it alone."""

LEAST = -9999.0
"""What OpenAI tells of a token that is as good as impossible: JSON has no infinity."""

TokenBytes = Callable[[int], bytes]


def dumps(value: JSON) -> bytes:
    """Return JSON as it is sent; a number that JSON does not have is a bug, and not sent."""
    return json.dumps(value, allow_nan=False).encode()


def event(value: JSON) -> bytes:
    """Return one event of a stream."""
    return b"data: " + dumps(value) + b"\n\n"


@dataclass
class Part:
    """What of one choice can be told: texts, calls, and the tokens behind them."""

    content: str = ""
    reasoning: str = ""
    calls: list[JSON] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)

    @property
    def is_told(self) -> bool:
        """Whether there is anything that a client would show."""
        return bool(self.content or self.reasoning or self.calls)


@dataclass
class Usage:
    """Tokens of one request, and what the head did; several prompts add up."""

    prompt: int = 0
    cached: int = 0
    generated: int = 0
    drafted: int = 0
    accepted: int = 0
    passes: int = 0
    is_active: bool = False
    drafted_at: list[int] = field(default_factory=list)
    accepted_at: list[int] = field(default_factory=list)

    def add(self, prompt: int, cached: int, stats: DecodeStats) -> None:
        """Add one generation."""
        self.prompt += prompt
        self.cached += cached
        self.generated += stats.generated
        self.drafted += stats.drafted
        self.accepted += stats.accepted
        self.passes += stats.passes
        add_counts(self.drafted_at, stats.drafted_at)
        add_counts(self.accepted_at, stats.accepted_at)

    def as_json(self) -> JSON:
        """Return OpenAI's usage, with the head's figures; drafts by their place in the pass where a head drafts."""
        places = {"drafted_at": self.drafted_at, "accepted_at": self.accepted_at} if self.is_active else {}
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.generated,
            "total_tokens": self.prompt + self.generated,
            "prompt_tokens_details": {"cached_tokens": self.cached},
            EXTENSION: {
                "mtp_active": self.is_active,
                "drafted": self.drafted,
                "accepted": self.accepted,
                "passes": self.passes,
                "acceptance": round(self.accepted / self.drafted, 4) if self.drafted else None,
                "tokens_per_pass": round(1 + self.accepted / self.passes, 4) if self.passes else 1.0,
                **places,
            },
        }


class Form:
    """Writes the responses to one request. `name` and `fingerprint` are the model's and the server's."""

    def __init__(self, asked: Asked, name: str, fingerprint: str, token_bytes: TokenBytes) -> None:
        self.asked, self.token_bytes = asked, token_bytes
        self.is_chat = asked.kind == CHAT
        kind = "chat.completion" if self.is_chat else "text_completion"
        self.head = {
            "id": ("chatcmpl-" if self.is_chat else "cmpl-") + uuid.uuid4().hex,
            "object": kind + ".chunk" if self.is_chat and asked.stream else kind,
            "created": int(time.time()),
            "model": name,
            "system_fingerprint": fingerprint,
        }
        self.offsets: dict[int, int] = {}
        self.counts: dict[int, int] = {}
        self.begun: set[int] = set()

    def whole(self, choices: list[JSON], usage: Usage) -> JSON:
        """Return a whole response."""
        return {**self.head, "choices": choices, "usage": usage.as_json()}

    def choice(self, index: int, part: Part, reason: str) -> JSON:
        """Return one choice of a whole response."""
        out: JSON = {"index": index, "finish_reason": reason, "logprobs": self._logprobs(index, part.pieces)}
        if not self.is_chat:
            return out | {"text": part.content}
        return out | {"message": {"role": "assistant", "content": part.content or None} | self._more(index, part)}

    def chunk(self, index: int, part: Part, reason: str | None, usage: Usage, stats: DecodeStats) -> JSON:
        """Return one chunk of a stream. The role is told once: clients add the texts of deltas up."""
        choice: JSON = {"index": index, "finish_reason": reason, "logprobs": self._logprobs(index, part.pieces)}
        if self.is_chat:
            first: JSON = {} if index in self.begun else {"role": "assistant"}
            told: JSON = {"content": part.content} if part.content or first else {}
            choice["delta"] = first | told | self._more(index, part)
            self.begun.add(index)
        else:
            choice["text"] = part.content
        figures: JSON = {
            "tokens": [{"text": p.text, "drafted": p.drafted} for p in part.pieces],
            "drafted": stats.drafted,
            "accepted": stats.accepted,
            "passes": stats.passes,
        }
        return {**self.head, "choices": [choice], EXTENSION: figures}

    def last(self, usage: Usage) -> JSON:
        """Return the chunk that tells the usage."""
        return {**self.head, "choices": [], "usage": usage.as_json()}

    def _more(self, index: int, part: Part) -> JSON:
        out: JSON = {}
        if part.reasoning:
            out["reasoning"] = out["reasoning_content"] = part.reasoning
        if part.calls:
            out["tool_calls"] = [self._call(index, call) for call in part.calls]
        return out

    def _call(self, index: int, call: JSON) -> JSON:
        number = self.counts.get(index, 0)
        self.counts[index] = number + 1
        out: JSON = {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": call}
        return {"index": number} | out if self.asked.stream else out

    def _logprobs(self, index: int, pieces: list[Piece]) -> JSON | None:
        """Return the log-probabilities of pieces: those of a chat, and for texts the older form beside it."""
        if not self.asked.logprobs:
            return None
        told = [p for p in pieces if p.is_told]
        if not told and self.asked.stream:
            return None
        entries = [
            self._entry(p.token, p.logprob) | {"top_logprobs": [self._entry(*one) for one in p.top]} for p in told
        ]
        if self.is_chat:
            return {"content": entries, "refusal": None}
        tops: list[JSON] | None = None
        if self.asked.top_logprobs:  # the token itself is always told, even where it is none of the likeliest
            tops = [{t["token"]: t["logprob"] for t in [*e["top_logprobs"], e]} for e in entries]
        return {
            "content": entries,
            "tokens": [e["token"] for e in entries],
            "token_logprobs": [e["logprob"] for e in entries],
            "top_logprobs": tops,
            "text_offset": self._text_offsets(index, told),
        }

    def _entry(self, token: int, logprob: float) -> JSON:
        raw = self.token_bytes(token)
        text = raw.decode("utf-8", "replace")
        return {"token": text, "bytes": list(raw), "logprob": finite(logprob), "id": token}

    def _text_offsets(self, index: int, pieces: list[Piece]) -> list[int]:
        out, at = [], self.offsets.get(index, 0)
        for piece in pieces:
            out.append(at)
            at += len(piece.text)
        self.offsets[index] = at
        return out


def finite(logprob: float) -> float:
    """Return a log-probability that JSON can hold."""
    return max(logprob, LEAST) if math.isfinite(logprob) else LEAST


class Detokenizer:
    """Text of tokens as they come, from their bytes: nothing is trimmed (mlx-lm's own drops a first space, which a
    prompt that is continued needs), and a character that is not whole yet waits.
    """

    def __init__(self, token_bytes: TokenBytes) -> None:
        self.token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        """Return the text that is certain after one more token."""
        return self._decoder.decode(self.token_bytes(token))

    def end(self) -> str:
        """Return what is left: a character that was never completed."""
        return self._decoder.decode(b"", final=True)


def byte_reader(tokenizer: Any) -> TokenBytes:
    """Return a function from token ids to the bytes that they stand for.

    A byte-level vocabulary spells bytes as characters (GPT-2's table): so a token that is half of a character has its
    bytes told. What such a table does not explain is decoded.
    """
    table, known = _byte_table(), dict[int, bytes]()

    def read(token: int) -> bytes:
        if token not in known:
            known[token] = _bytes_of(tokenizer, table, token)
        return known[token]

    return read


def _bytes_of(tokenizer: Any, table: dict[str, int], token: int) -> bytes:
    text = str(tokenizer.decode([token]))
    spelled = tokenizer.convert_ids_to_tokens(token)
    if isinstance(spelled, str) and all(c in table for c in spelled):
        raw = bytes(table[c] for c in spelled)
        if raw.decode("utf-8", "replace") == text:
            return raw
    return text.encode("utf-8", "replace")


def _byte_table() -> dict[str, int]:
    """Return GPT-2's characters for bytes: printable ones stand for themselves, others from U+0100 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(others)}
