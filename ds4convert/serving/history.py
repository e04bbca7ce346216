"""The messages of a chat, checked one by one and brought to the one form that the chat template reads.

Histories come back from clients as they stored them: contents as parts, null beside calls, arguments as JSON text,
cut off where a reply was. What cannot be read is refused by the message's number.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

from ds4convert.checkpoint.types import JSON
from ds4convert.serving.refused import Refused
from ds4convert.words.terminal import show

ROLES = ("system", "user", "assistant", "tool", "developer", "latest_reminder")
PARTS = ("text", "input_text", "output_text")
TASKS = ("action", "query", "authority", "domain", "title", "read_url")
TEXTS = ("reasoning_content", "reasoning", "tool_call_id")
DEVELOPER = {"developer": "system"}
"""OpenAI's clients name the system prompt so. The format's own `developer` is another thing, of an internal search."""


def read(body: JSON) -> list[JSON]:
    """Return the messages of a body. Raises `Refused` with 422, naming the message."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refused(422, f"messages: expected a list that is not empty, found {shown(messages)}", "messages")
    return [_message(m, f"messages[{n}]") for n, m in enumerate(messages)]


def _message(message: Any, where: str) -> JSON:
    if not isinstance(message, dict):
        _refuse(where, "expected an object", message)
    role = message.get("role")
    if role not in ROLES:
        _refuse(f"{where}.role", f"expected one of {', '.join(ROLES)}", role)
    out: JSON = {
        "role": DEVELOPER.get(role, role),
        "content": _content(message.get("content"), role, f"{where}.content"),
    }
    for name in TEXTS:
        if (value := message.get(name)) is not None:
            if not isinstance(value, str):
                _refuse(f"{where}.{name}", "expected a text", value)
            out[name] = value
    if message.get("tool_calls"):
        out["tool_calls"] = _calls(message["tool_calls"], f"{where}.tool_calls")
    return out | _extras(message, where)


def _extras(message: JSON, where: str) -> JSON:
    """Return the format's own fields of a message, which OpenAI's clients do not send."""
    out: JSON = {}
    if (task := message.get("task")) is not None:
        if task not in TASKS:
            _refuse(f"{where}.task", f"expected one of {', '.join(TASKS)}", task)
        out["task"] = task
    for name in ("wo_eos", "prefix"):  # the second is the word of DeepSeek's API: the reply goes on from this message
        if (open_end := message.get(name)) is not None:
            if type(open_end) is not bool:
                _refuse(f"{where}.{name}", "expected true or false", open_end)
            out["wo_eos"] = out.get("wo_eos", False) or open_end
    if (found := message.get("tools")) is not None:
        out["tools"] = tools(found, f"{where}.tools")
    if (form := message.get("response_format")) is not None:
        if not isinstance(form, dict):
            _refuse(f"{where}.response_format", "expected an object", form)
        out["response_format"] = form
    return out


def _content(content: Any, role: str, where: str) -> str:
    """Return the text of a content; parts of a tool's result are paragraphs, as in the official encoding."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        _refuse(where, "expected a text or a list of text parts", content)
    for n, part in enumerate(content):
        if not (isinstance(part, dict) and part.get("type") in PARTS and isinstance(part.get("text"), str)):
            _refuse(f"{where}[{n}]", "expected a text part: this model reads text only", part)
    return ("\n\n" if role == "tool" else "").join(part["text"] for part in content)


def tools(value: Any, where: str = "tools") -> list[JSON]:
    """Return the declared tools. Raises `Refused` where one is no function."""
    if not isinstance(value, list):
        _refuse(where, "expected a list of functions", value)
    for n, tool in enumerate(value):
        is_function = isinstance(tool, dict) and isinstance(tool.get("function", tool), dict)
        if not is_function or tool.get("type", "function") != "function":
            _refuse(f"{where}[{n}]", "expected a function: this server has no tools of its own", tool)
        _check_function(tool.get("function", tool), f"{where}[{n}].function")
    return value


def _check_function(function: JSON, where: str) -> None:
    """Raise `Refused` where a declared function has no name, or parts of other types than the template writes."""
    if not isinstance(function.get("name"), str) or not function["name"]:
        _refuse(f"{where}.name", "expected the function's name", function.get("name"))
    for key, kind, wanted in (
        ("description", str, "a text"),
        ("parameters", dict, "a JSON schema, which is an object"),
    ):
        if not isinstance(function.get(key), kind | None):
            _refuse(f"{where}.{key}", f"expected {wanted}", function[key])


def _calls(calls: Any, where: str) -> list[JSON]:
    if not isinstance(calls, list):
        _refuse(where, "expected a list of calls", calls)
    return [_call(call, f"{where}[{n}]") for n, call in enumerate(calls)]


def _call(call: Any, where: str) -> JSON:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        _refuse(where, "expected a call: an object with a function that has a name", call)
    arguments = _arguments(function.get("arguments"), f"{where}.function.arguments")
    out: JSON = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    if (name := call.get("id")) is not None:
        if not isinstance(name, str):
            _refuse(f"{where}.id", "expected a text", name)
        out["id"] = name
    return out


def _arguments(value: Any, where: str) -> JSON:
    """Return the arguments of a call. They come as the JSON text that a model wrote, which may have been cut off."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return {}
    if isinstance(value, str):
        try:
            value = json.loads(value, parse_constant=_no_constant)
            json.dumps(value, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as e:
            why = f"{e.msg} at character {e.pos}" if isinstance(e, json.JSONDecodeError) else str(e)
            raise Refused(
                422,
                f"{where}: not the JSON of an object ({show(why, 80)}). A reply that max_tokens cut off "
                "ends so: leave this call out of the history, or send its arguments whole",
                where,
            ) from None
    if not isinstance(value, dict):
        _refuse(where, "expected the JSON text of an object", value)
    return value


def _no_constant(literal: str) -> NoReturn:
    raise ValueError(f"{literal} is not JSON")


def _refuse(where: str, wanted: str, found: Any) -> NoReturn:
    raise Refused(422, f"{where}: {wanted}, found {shown(found)}", where)


def shown(value: Any) -> str:
    """Return a value of a request as a message shows it: in JSON, as it was sent."""
    return "nothing" if value is None else show(json.dumps(value, ensure_ascii=False)[:400], 80)
