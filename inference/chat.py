"""Messages to the prompt text of DeepSeek-V4, and the text of a reply back to a message.

Owns the two directions of the official encoding: `render` runs the chat template that converted folders
carry (manifests/templates/deepseek_v4.jinja) under the settings of transformers, so that the text is the
same in every host; `parse_reply` reads what the model wrote. Refuses what the format cannot say, and
recovers nothing: a reply that was cut off is an error, never a shorter message.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NoReturn

from ds4convert.errors import InputError

if TYPE_CHECKING:
    from jinja2 import Template


Message = dict[str, Any]

MODES = ("chat", "thinking")
EFFORTS = (None, "high", "max")

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
THINK_START = "<think>"
THINK_END = "</think>"
DSML = "｜DSML｜"
CALLS_START = f"\n\n<{DSML}tool_calls"
CALLS_END = f"</{DSML}tool_calls>"
INVOKE_START = f"<{DSML}invoke"
INVOKE_END = f"</{DSML}invoke"
PARAMETER_START = f"<{DSML}parameter"
PARAMETER_END = f"/{DSML}parameter"
LINE_END = ">\n"
STRING_MARKS = ('" string="true">', '" string="false">')


BLOCK_ENDS = (CALLS_END, f"</{DSML}function_calls>")
_BLOCK_OPEN = re.compile(rf"\s*<{DSML}(tool_calls|function_calls)>\s*")
_BLOCK_CLOSE = re.compile(rf"\s*</{DSML}(tool_calls|function_calls)>\s*")
_CALL_OPEN = re.compile(rf'\s*<{DSML}invoke\s+name="(.*?)"\s*>\s*', re.S)
_CALL_CLOSE = re.compile(rf"\s*</{DSML}invoke\s*>\s*")
_VALUE_OPEN = re.compile(rf'\s*<{DSML}parameter\s+name="(.*?)"\s+string="(true|false)"\s*>', re.S)
_VALUE_CLOSE = f"</{DSML}parameter>"


class PromptError(InputError):
    """Messages or switches that the format cannot express."""

    kind = "prompt"


class ReplyError(InputError):
    """A reply that is not complete and well formed."""

    kind = "reply"


# ------------------------------------------------------------------ messages to text


@lru_cache(maxsize=1)
def template_text() -> str:
    """Return the chat template, as it is written into converted folders."""
    from importlib.resources import files

    path = files("ds4convert.manifests") / "templates" / "deepseek_v4.jinja"
    return path.read_text(encoding="utf-8")


@lru_cache(maxsize=1)
def _template() -> Template:
    """Return the compiled template, in the sandbox and with the filters and functions of transformers."""
    from datetime import datetime

    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template_text())


def render(
    messages: Sequence[Mapping[str, Any]],
    *,
    mode: str = "thinking",
    effort: str | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    drop: bool = True,
    add_generation_prompt: bool = True,
) -> str:
    """Return the prompt text of a conversation, BOS included.

    `mode` is "thinking" or "chat"; `effort` None, "high" (the same text) or "max" (without effect in chat).
    `tools` stand on the leading system message, which is made if there is none. `drop` leaves out old
    reasoning, unless tools are declared. Without `add_generation_prompt` the text ends with the last
    message; the official encoder always goes on to what starts the reply. The messages are not modified.
    Raises `PromptError`.
    """
    from jinja2 import TemplateError

    _check_choice("mode", mode, MODES)
    _check_choice("effort", effort, EFFORTS)
    plain = [_with_parsed_arguments(message, at) for at, message in enumerate(messages)]
    try:
        return _template().render(
            messages=plain,
            tools=list(tools) if tools else None,
            thinking_mode=mode,
            reasoning_effort=effort,
            drop_thinking=drop,
            add_generation_prompt=add_generation_prompt,
        )
    except (TemplateError, TypeError, ValueError, RecursionError) as error:
        raise PromptError(f"messages cannot be encoded: {error}") from error


def _check_choice(name: str, value: str | None, allowed: tuple[str | None, ...]) -> None:
    if value not in allowed:
        raise PromptError(f"{name}: expected one of {', '.join(map(str, allowed))}, found {value!r}")


def _with_parsed_arguments(message: Mapping[str, Any], at: int) -> Message:
    """Return a copy of a message in which the `arguments` of a call are a mapping, if its JSON is an object.

    The template can read JSON too, as hosts hand it texts; the standard library is faster and is the
    format's own definition. What is not an object is left to the template, which refuses it or writes it as
    it is.
    """
    if not isinstance(message, Mapping):
        raise PromptError(f"messages[{at}]: expected an object, found {type(message).__name__}")
    calls = message.get("tool_calls")
    if not isinstance(calls, list | tuple):
        return dict(message)
    return {**message, "tool_calls": [_with_parsed_call(call) for call in calls]}


def _with_parsed_call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except RecursionError as error:
        raise PromptError(f"arguments of {function.get('name')!r} are nested too deeply") from error
    except ValueError:
        return call
    if not isinstance(arguments, dict):
        return call
    return {**call, "function": {**function, "arguments": arguments}}


# ------------------------------------------------------------------ text to message


@dataclass
class _Cursor:
    """A place in the reply, and the two ways to move it: to the next of some literals, or over one of
    them."""

    text: str
    at: int = 0

    def until(self, *literals: str) -> tuple[str, str]:
        """Return the text before the earliest literal, and that literal ("" if none); move behind it."""
        found = [(place, literal) for literal in literals if (place := self.text.find(literal, self.at)) >= 0]
        if not found:
            return self.text[self.at :], ""
        place, literal = min(found)
        before = self.text[self.at : place]
        self.at = place + len(literal)
        return before, literal

    def over(self, *literals: str) -> str:
        """Return the literal that stands here, and move behind it; an error if none of them does."""
        for literal in literals:
            if self.text.startswith(literal, self.at):
                self.at += len(literal)
                return literal
        raise self.fault("expected " + " or ".join(map(repr, literals)))

    def fault(self, what: str) -> ReplyError:
        """Return an error that says where the cursor stands and what is there instead."""
        rest = self.text[self.at : self.at + 40]
        found = repr(rest) if rest else "the end of the reply (was it cut off? raise the token limit)"
        return ReplyError(f"reply, character {self.at}: {what}, found {found}")


def parse_reply(text: str, mode: str = "thinking") -> Message:
    """Return the assistant message in a reply: `role`, `content`, `reasoning_content`, `tool_calls`.

    `text` is what the model wrote after the prompt's `<think>` (thinking) or `</think>` (chat), EOS
    included. White space is kept. A call is `{"type": "function", "function": {"name", "arguments"}}`, with
    no id; `arguments` is a JSON text, in which the value of a parameter that is not a string stands as the
    model wrote it, unchecked. Raises `ReplyError` if anything is missing, doubled, out of place or left
    over; stricter than the official parser in one point: a block of calls must be closed.
    """
    _check_choice("mode", mode, MODES)
    cursor = _Cursor(text)
    reasoning = _parse_reasoning(cursor) if mode == "thinking" else ""
    content, stop = cursor.until(EOS, CALLS_START)
    if not stop:
        cursor.at = len(text)
        raise cursor.fault(f"expected {EOS!r}")
    calls = _parse_calls(cursor) if stop == CALLS_START else []
    if cursor.at != len(text):
        raise cursor.fault("expected nothing more")
    _refuse_tokens("reasoning", reasoning)
    _refuse_tokens("content", content)
    return {"role": "assistant", "content": content, "reasoning_content": reasoning, "tool_calls": calls}


def _parse_reasoning(cursor: _Cursor) -> str:
    reasoning, stop = cursor.until(THINK_END, CALLS_START)
    if stop == CALLS_START:
        cursor.at -= len(CALLS_START)
        raise cursor.fault(f"expected {THINK_END!r} before any tool call")
    if not stop:
        cursor.at = len(cursor.text)
        raise cursor.fault(f"expected {THINK_END!r}")
    return reasoning


def _parse_calls(cursor: _Cursor) -> list[Message]:
    """Read a block of calls, from behind its opening to behind EOS, which is optional here."""
    calls: list[Message] = []
    cursor.over(LINE_END)
    while cursor.over(INVOKE_START, CALLS_END) == INVOKE_START:
        calls.append({"type": "function", "function": _parse_invoke(cursor)})
        cursor.over(LINE_END)
    if cursor.at != len(cursor.text):
        cursor.over(EOS)
    return calls


def _parse_invoke(cursor: _Cursor) -> dict[str, str]:
    start = cursor.at
    head, stop = cursor.until(PARAMETER_START, INVOKE_END)
    name = _between(head.lstrip(), 'name="', ('">\n\n', '">\n'))
    if not stop or name is None:
        cursor.at = start
        raise cursor.fault(f'expected name="NAME">, a line end, and {PARAMETER_START!r} or {INVOKE_END!r}')
    values: dict[str, str] = {}
    while stop == PARAMETER_START:
        key, value = _parse_parameter(cursor)
        if key in values:
            raise ReplyError(f"reply, character {cursor.at}: parameter {key!r} of {name!r} is given twice")
        values[key] = value
        cursor.over(LINE_END)
        stop = cursor.over(PARAMETER_START, INVOKE_END)
    pairs = (f"{_json(key)}: {value}" for key, value in values.items())
    return {"name": name, "arguments": "{" + ", ".join(pairs) + "}"}


def _parse_parameter(cursor: _Cursor) -> tuple[str, str]:
    """Read a parameter, from behind its opening to behind its closing name: key, and value as JSON."""
    start = cursor.at
    segment, stop = cursor.until(PARAMETER_END)
    body = _between(segment, ' name="', ("<",))
    inner = _Cursor(body or "")
    key, mark = inner.until(*STRING_MARKS)
    if not stop or not mark:
        cursor.at = start
        raise cursor.fault(f'expected name="KEY" string="true|false">VALUE<{PARAMETER_END}>')
    value = inner.text[inner.at :]
    return key, _json(value) if mark == STRING_MARKS[0] else value


def _between(text: str, opening: str, closings: tuple[str, ...]) -> str | None:
    """Return what stands between an opening and the first fitting closing, or None if they do not fit."""
    if text.startswith(opening):
        for closing in closings:
            if text.endswith(closing) and len(text) >= len(opening) + len(closing):
                return text[len(opening) : len(text) - len(closing)]
    return None


def _refuse_tokens(where: str, text: str) -> None:
    for token in (BOS, EOS, THINK_START, THINK_END, DSML):
        if token in text:
            raise ReplyError(f"reply: the {where} holds the token {token!r}, which may not stand there")


def _json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


# ------------------------------------------------------------------ calls as models really write them


def is_in_value(text: str) -> bool:
    """Return whether a block of calls, as far as it has come, ends within the value of a parameter."""
    return text.count(f"<{DSML}parameter") > text.count(_VALUE_CLOSE)


def read_calls(text: str) -> list[dict[str, str]]:
    """Return the calls of a block, its tags included, as `{"name", "arguments"}`; `arguments` is a JSON text.

    Kinder than `parse_reply` in white space alone: the model leaves out line ends, or indents. The block has to be
    whole, and nothing else may stand in it: a call that was cut off is none. A value marked `string="false"` that is no
    JSON is taken as the text that it is, so that the arguments are JSON in any case. Raises `ReplyError`.
    """
    at = _over(_BLOCK_OPEN, text, 0, "the opening of a block of calls")
    calls: list[dict[str, str]] = []
    while not (end := _BLOCK_CLOSE.match(text, at)):
        call, at = _read_call(text, at)
        calls.append(call)
    if end.end() != len(text) or not calls:
        raise ReplyError(f"calls, character {end.end()}: expected one block with a call in it, and nothing after it")
    return calls


def _read_call(text: str, at: int) -> tuple[dict[str, str], int]:
    opening = _CALL_OPEN.match(text, at)
    at = _over(_CALL_OPEN, text, at, "a call")
    name = opening.group(1) if opening else ""
    values: dict[str, str] = {}
    while (found := _VALUE_OPEN.match(text, at)) is not None:
        key, is_text = found.group(1), found.group(2) == "true"
        end = text.find(_VALUE_CLOSE, found.end())
        if end < 0 or key in values:
            raise ReplyError(f"calls, character {at}: parameter {key!r} of {name!r} has no end, or is given twice")
        values[key] = _value(text[found.end() : end], is_text)
        at = end + len(_VALUE_CLOSE)
    at = _over(_CALL_CLOSE, text, at, f"the end of the call of {name!r}")
    pairs = (f"{_json(key)}: {value}" for key, value in values.items())
    return {"name": name, "arguments": "{" + ", ".join(pairs) + "}"}, at


def _over(pattern: re.Pattern[str], text: str, at: int, what: str) -> int:
    found = pattern.match(text, at)
    if found is None:
        raise ReplyError(f"calls, character {at}: expected {what}, found {text[at : at + 40]!r}")
    return found.end()


def _value(text: str, is_text: bool) -> str:
    """Return a parameter as JSON: a text as a string, else what the model wrote, where that is JSON."""
    if is_text:
        return _json(text)
    try:
        json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return _json(text)
    return text.strip()


def _refuse_constant(literal: str) -> NoReturn:
    raise ValueError(f"{literal} is not JSON")
