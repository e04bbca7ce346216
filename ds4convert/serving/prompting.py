"""From a request to token ids: the chat template or a raw prompt, and where its segments end.

Segments end where another request may go on differently: after the system messages, after the user's message. State is
kept there (see `seam.Decoder`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ds4convert.checkpoint.types import JSON
from ds4convert.errors import InputError
from ds4convert.inference import chat
from ds4convert.inference import tokens as texts
from ds4convert.serving.history import shown
from ds4convert.serving.refused import Refused
from ds4convert.serving.reply import CONTENT, REASONING
from ds4convert.serving.validation import ANY_OBJECT, CHAT, Asked, Prompt

TAIL = 11
"""Tokens at the end of a prompt within which the mark that opens the reasoning is looked for."""


@dataclass(frozen=True)
class Encoded:
    """A prompt's tokens, cut into segments (kinds "system", "user", "assistant"), and what the reply begins with."""

    tokens: list[int]
    segments: list[list[int]]
    kinds: list[str]
    state: str = CONTENT


def encode(tokenizer: Any, asked: Asked, prompt: Prompt | None, vocabulary: int) -> Encoded:
    """Return the tokens of a chat, or of one `prompt` of a text. Raises `Refused`: 422 for what the template cannot
    write, 500 where the tokenizer fails.
    """
    try:
        found = _chat(tokenizer, asked) if asked.kind == CHAT else _text(tokenizer, prompt)
    except Refused:
        raise
    except BaseException as e:  # the library is written in Rust: its panics are no `Exception`
        if _is_of_the_messages(e):
            raise Refused(422, f"messages: they cannot be written as a prompt: {shown(str(e))}", "messages") from None
        raise Refused(500, f"the tokenizer failed ({type(e).__name__}) with this prompt; others are served") from e
    if not found.tokens or max(found.tokens) >= vocabulary:
        raise Refused(422, f"the prompt: expected at least one token, and ids below {vocabulary:,}")
    return found


def longest_token(tokenizer: Any) -> int:
    """Return the length of the longest token of a vocabulary, in its own spelling: one character for each byte."""
    return max(map(len, tokenizer.get_vocab()), default=1)


def fewest_tokens(asked: Asked, prompt: Prompt | None, longest: int) -> int:
    """Return how many tokens the texts of a request have at the least, as no token is longer than `longest`.

    The tokenizer's library takes some 500 bytes for each token of a text, so this is asked before it is.
    """
    texts = [prompt] if prompt is not None else [m.get("content") for m in asked.messages]
    return sum(-(-len(t) // longest) for t in texts if isinstance(t, str))


def _is_of_the_messages(error: BaseException) -> bool:
    from jinja2 import TemplateError

    return isinstance(error, TemplateError | InputError | RecursionError)


def _text(tokenizer: Any, prompt: Prompt | None) -> Encoded:
    tokens = texts.encode(tokenizer, prompt) if isinstance(prompt, str) else list(prompt or ())
    return Encoded(tokens, [tokens], ["assistant"])


def _chat(tokenizer: Any, asked: Asked) -> Encoded:
    tokens = _written(tokenizer, list(asked.messages), asked, True)
    state = CONTENT
    if tokenizer.has_thinking and tokenizer.rfind_think_start(tokens) > tokenizer.rfind_think_end(tokens):
        state = REASONING
    if asked.messages[-1]["role"] != "user":
        return Encoded(tokens, [tokens], ["assistant"], state)
    ends = [(_system_end(tokenizer, asked, tokens), "system"), (_user_end(tokenizer, tokens), "user")]
    segments, kinds, begin = [], [], 0
    for end, kind in [*ends, (len(tokens), "assistant")]:
        if end > begin:
            segments.append(tokens[begin:end])
            kinds.append(kind)
            begin = end
    return Encoded(tokens, segments, kinds, state)


def _written(tokenizer: Any, messages: list[JSON], asked: Asked, prompts_reply: bool) -> list[int]:
    """Return the tokens of messages: by the folder's template, else in the official format."""
    if tokenizer.has_chat_template:
        options = {"tools": list(asked.tools) or None, "add_generation_prompt": prompts_reply, **asked.template}
        if asked.schema not in (None, ANY_OBJECT):
            options["response_format"] = asked.schema  # DeepSeek-V4's format tells the model of it
        return list(tokenizer.apply_chat_template(messages, tokenize=True, **options))
    text = chat.render(
        messages,
        mode="thinking" if asked.template.get("thinking", True) else "chat",
        effort="max" if asked.template.get("reasoning_effort") == "max" else None,
        tools=list(asked.tools) or None,
        drop=asked.template.get("drop_thinking", True),
        add_generation_prompt=prompts_reply,
    )
    return list(tokenizer.encode(text, add_special_tokens=False))


def _system_end(tokenizer: Any, asked: Asked, tokens: list[int]) -> int:
    """Return how many tokens are the same whatever follows the system messages; 0 without any."""
    count = next((n for n, m in enumerate(asked.messages) if m["role"] != "system"), 0)
    if not count:
        return 0
    other = _written(tokenizer, [*asked.messages[:count], {"role": "user", "content": ""}], asked, False)
    return next((n for n, (a, b) in enumerate(zip(other, tokens, strict=False)) if a != b), 0)


def _user_end(tokenizer: Any, tokens: list[int]) -> int:
    """Return where the mark that opens the reasoning begins, at the end of the prompt; all of it without one."""
    if not tokenizer.has_thinking:
        return len(tokens)
    found: int = tokenizer.rfind_think_start(tokens, start=len(tokens) - TAIL)
    return found if found >= 0 else len(tokens)
