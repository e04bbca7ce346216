"""What a request may say: a table of fields, checked before mlx-lm's server sees the body.

Only fields of the table go on. Fields of other hosts are left out, as OpenAI's clients send many; those whose meaning
cannot be honoured are refused rather than ignored.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ds4convert import strictjson
from ds4convert.errors import InputError
from ds4convert.types import JSON

CHAT, TEXT = "chat", "text"
ROLES = ("system", "user", "assistant", "tool", "developer", "latest_reminder")
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
TEMPLATE_FIELDS = ("enable_thinking", "thinking", "thinking_mode", "reasoning_effort", "drop_thinking")
MAX_STOPS, MAX_STOP_LENGTH, MAX_TOP = 16, 1000, 10
MAX_SEED = 2**63 - 1


class Refused(Exception):
    """A request that is not answered: HTTP status, message, and the field at fault."""

    def __init__(self, status: int, message: str, field: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.field, self.code = status, message, field, code

    def as_json(self) -> JSON:
        """Return the body of the response, in OpenAI's form."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.field, "code": self.code}}


@dataclass(frozen=True)
class Limits:
    """What the server allows: most new tokens of a request, tokens of the model's context, names of the model."""

    max_tokens: int
    context: int
    models: frozenset[str]


Check = Callable[[Any], bool]


def _number(low: float, high: float) -> Check:
    return lambda v: type(v) in (int, float) and math.isfinite(v) and low <= v <= high


def _whole(low: int, high: int) -> Check:
    return lambda v: type(v) is int and low <= v <= high


def _is_flag(value: Any) -> bool:
    return type(value) is bool


def _is_stop(value: Any) -> bool:
    words = [value] if isinstance(value, str) else value
    return (
        isinstance(words, list)
        and len(words) <= MAX_STOPS
        and all(isinstance(w, str) and 0 < len(w) <= MAX_STOP_LENGTH for w in words)
    )


def _is_bias(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and len(value) <= 1024
        and all(k.isascii() and k.isdigit() and len(k) < 9 for k in value)
        and all(_number(-1e6, 1e6)(v) for v in value.values())
    )


def _is_usage_option(value: Any) -> bool:
    return isinstance(value, dict) and _is_flag(value.get("include_usage", False))


def _is_template_choice(value: Any) -> bool:
    return isinstance(value, dict) and all(
        k in TEMPLATE_FIELDS and isinstance(v, str | bool | None) for k, v in value.items()
    )


def _is_tools(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(t, dict) and isinstance(t.get("function", t), dict) for t in value
    )


FIELDS: dict[str, tuple[Check, str]] = {
    "stream": (_is_flag, "true or false"),
    "stream_options": (_is_usage_option, 'an object such as {"include_usage": true}'),
    "temperature": (_number(0, 100), "a number from 0 (greedy) to 100"),
    "top_p": (_number(0, 1), "a number from 0 to 1"),
    "top_k": (_whole(0, 2**31 - 1), "a whole number, 0 (off) or more"),
    "min_p": (_number(0, 1), "a number from 0 to 1"),
    "repetition_penalty": (_number(0, 100), "a number from 0 (off) to 100"),
    "repetition_context_size": (_whole(0, 10**6), "a whole number from 0 to 1000000"),
    "presence_penalty": (_number(-100, 100), "a number from -100 to 100"),
    "presence_context_size": (_whole(0, 10**6), "a whole number from 0 to 1000000"),
    "frequency_penalty": (_number(-100, 100), "a number from -100 to 100"),
    "frequency_context_size": (_whole(0, 10**6), "a whole number from 0 to 1000000"),
    "xtc_probability": (_number(0, 1), "a number from 0 to 1"),
    "xtc_threshold": (_number(0, 0.5), "a number from 0 to 0.5"),
    "logit_bias": (_is_bias, "an object of token ids to numbers"),
    "top_logprobs": (_whole(0, MAX_TOP), f"a whole number from 0 to {MAX_TOP}"),
    "seed": (_whole(-MAX_SEED, MAX_SEED), "a whole number of 63 bits"),
    "stop": (_is_stop, f"a text or a list of at most {MAX_STOPS} texts, none of them empty"),
    "chat_template_kwargs": (_is_template_choice, f"an object with some of {', '.join(TEMPLATE_FIELDS)}"),
    "reasoning_effort": (lambda v: v in EFFORTS, f"one of {', '.join(EFFORTS)}"),
    "tools": (_is_tools, "a list of functions"),
}  # fmt: skip
"""Fields that both kinds of request may have, null or absent meaning the default."""

REFUSED: dict[str, tuple[Check, str]] = {
    "n": (lambda v: v == 1 and type(v) is int, "1: this server makes one choice"),
    "best_of": (lambda v: v == 1 and type(v) is int, "1: this server makes one choice"),
    "echo": (lambda v: v is False, "false: the prompt is not repeated"),
    "suffix": (lambda v: v == "", "nothing: there is no text after the gap"),
    "adapters": (lambda v: False, "nothing: this server has no adapters"),
    "draft_model": (lambda v: False, "nothing: the drafts come from the model's own head"),
    "response_format": (
        lambda v: isinstance(v, dict) and v.get("type") == "text",
        'the type "text": output is not constrained to a schema',
    ),
    "tool_choice": (
        lambda v: isinstance(v, str) and v in ("auto", "none"),
        '"auto" or "none": a call cannot be forced',
    ),
}
"""Fields that mean something which this server cannot do, and the value that asks for nothing."""


def parse(raw: bytes, kind: str, limits: Limits) -> JSON:
    """Return the body that mlx-lm's server gets. Raises `Refused` with 400, 404 or 422."""
    try:
        body = strictjson.loads(raw, "the request body")
    except InputError as e:
        raise Refused(400, str(e), code="invalid_json") from None
    if not isinstance(body, dict):
        raise Refused(400, "the request body: expected a JSON object", code="invalid_json")
    _check_model(body.get("model"), limits)
    for name, (check, wanted) in REFUSED.items():
        _check(body, name, check, wanted)
    clean = {name: body[name] for name, (check, wanted) in FIELDS.items() if _check(body, name, check, wanted)}
    clean |= _max_tokens(body, limits) | _logprobs(body, kind)
    if "stream_options" in clean:
        clean["stream_options"] = {"include_usage": clean["stream_options"].get("include_usage", False)}
    for name in ("xtc_probability", "xtc_threshold"):
        clean |= {name: float(clean[name])} if name in clean else {}
    if (effort := clean.pop("reasoning_effort", None)) is not None:
        clean["chat_template_kwargs"] = {"reasoning_effort": effort} | clean.get("chat_template_kwargs", {})
    if body.get("tool_choice") == "none":
        clean.pop("tools", None)
    return clean | (_messages(body) if kind == CHAT else _prompt(body))


def _check(body: JSON, name: str, check: Check, wanted: str) -> bool:
    """Return whether `name` is there; null is as if it were not."""
    value = body.get(name)
    if value is None:
        return False
    if not check(value):
        raise Refused(422, f"{name}: expected {wanted}, found {_shown(value)}", name)
    return True


def _check_model(name: Any, limits: Limits) -> None:
    if name is None:
        return
    if not isinstance(name, str):
        raise Refused(422, f"model: expected a text, found {_shown(name)}", "model")
    if name not in limits.models:
        known = ", ".join(sorted(limits.models))
        raise Refused(404, f"model: {_shown(name)} is not served here; known: {known}", "model", "model_not_found")


def _max_tokens(body: JSON, limits: Limits) -> JSON:
    for name in ("max_completion_tokens", "max_tokens"):
        if _check(body, name, _whole(1, limits.max_tokens), f"a whole number from 1 to {limits.max_tokens:,}"):
            return {"max_tokens": body[name]}
    return {}


def _logprobs(body: JSON, kind: str) -> JSON:
    """Return the fields as chats have them: a number of likeliest tokens is the older form of text completions."""
    value = body.get("logprobs")
    if kind == TEXT and type(value) is int:
        if not 0 <= value <= MAX_TOP:
            raise Refused(422, f"logprobs: expected 0 to {MAX_TOP}, found {value}", "logprobs")
        return {"logprobs": True, "top_logprobs": value} if value else {"logprobs": True}
    return {"logprobs": value} if _check(body, "logprobs", _is_flag, "true or false") else {}


def _prompt(body: JSON) -> JSON:
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str) or not prompt:
        raise Refused(422, f"prompt: expected a text that is not empty, found {_shown(body.get('prompt'))}", "prompt")
    return {"prompt": prompt}


def _messages(body: JSON) -> JSON:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refused(422, f"messages: expected a list that is not empty, found {_shown(messages)}", "messages")
    return {"messages": [_message(m, f"messages[{n}]") for n, m in enumerate(messages)]}


def _message(message: Any, where: str) -> JSON:
    if not isinstance(message, dict):
        raise Refused(422, f"{where}: expected an object, found {_shown(message)}", where)
    if message.get("role") not in ROLES:
        role = _shown(message.get("role"))
        raise Refused(422, f"{where}.role: expected one of {', '.join(ROLES)}, found {role}", f"{where}.role")
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    if not isinstance(content, str | list | None) or not all(map(_is_text_part, parts)):
        raise Refused(
            422,
            f"{where}.content: expected a text or a list of text parts, found {_shown(content)}",
            f"{where}.content",
        )
    calls = message.get("tool_calls")
    if calls is not None and not _is_tools(calls):
        raise Refused(
            422, f"{where}.tool_calls: expected a list of calls, found {_shown(calls)}", f"{where}.tool_calls"
        )
    return {k: v for k, v in message.items() if v is not None}


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _shown(value: Any) -> str:
    return "nothing" if value is None else strictjson.show(repr(value)[:400], 80)
