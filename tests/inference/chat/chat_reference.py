"""A second encoder, written from the description of the format alone, as the judge of the template.

It shares nothing with inference/chat.py or the template: Python values instead of text splitting, the
standard library's JSON, whole passes over lists instead of one loop. It raises `Refused` where the format
has no text.
"""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

VECTORS = Path(__file__).parents[1] / "encoding"
USER, ASSISTANT, REMINDER = "<｜User｜>", "<｜Assistant｜>", "<｜latest_reminder｜>"
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
PLAIN_TASKS = ("query", "authority", "domain", "title", "read_url")


class Refused(Exception):
    """The format has no text for these messages."""


def vector(number: int) -> tuple[list[dict[str, Any]], str, str]:
    """Return messages, mode and expected text of an official vector."""
    given = json.loads((VECTORS / f"test_input_{number}.json").read_text(encoding="utf-8"))
    expected = (VECTORS / f"test_output_{number}.txt").read_bytes().decode("utf-8")
    if isinstance(given, dict):
        given["messages"][0]["tools"] = given["tools"]
        given = given["messages"]
    return given, "chat" if number == 4 else "thinking", expected


def dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def fixed_tools_texts() -> tuple[str, str]:
    """Cut the tools text, without the schemas, out of the first official vector."""
    text = vector(1)[2]
    start = text.index("## Tools")
    before, rest = text[start:].split('{"name": "get_weather"', 1)
    after = rest[rest.index("\n\nYou MUST strictly follow") : rest.index(USER)]
    return before, after


def encode(
    messages: list[dict[str, Any]],
    mode: str,
    drop: bool = True,
    effort: str | None = None,
    suffix_at_end: bool = True,
) -> str:
    thinking = mode == "thinking"
    turns = normalise(messages)
    if any(turn.get("tools") for turn in turns):
        drop = False
    if thinking and drop:
        turns = without_old(turns)
    last = last_asking(turns)
    text = BOS
    if thinking and effort == "max":
        text += (VECTORS / "reasoning_effort_max.txt").read_bytes().decode("utf-8")
    for at, turn in enumerate(turns):
        task_before = at > 0 and turns[at - 1].get("task")
        reasons = thinking and not task_before and (not drop or at > last)
        text += body(turn, reasons)
        following = turns[at + 1].get("role") if at + 1 < len(turns) else None
        if following in ("assistant", "latest_reminder") or (at + 1 == len(turns) and suffix_at_end):
            text += suffix(turn, thinking, thinking and (not drop or at >= last))
    return text


# section 3


def normalise(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    turns: list[dict[str, Any]] = []
    for is_run, group in groupby(messages, lambda m: m.get("role") in ("user", "tool")):
        if not is_run:
            turns += group
            continue
        for message in group:
            is_user = message["role"] == "user"
            open_turn = turns[-1] if turns and turns[-1].get("role") == "user" else None
            if open_turn is None or (is_user and open_turn["task"] is not None):
                open_turn = {"role": "user", "blocks": [], "task": message.get("task") if is_user else None}
                turns.append(open_turn)
            kind = "text" if is_user else "result"
            open_turn["blocks"].append((kind, message.get("content", ""), message.get("tool_call_id")))
    sort_results(turns)
    return turns


def sort_results(turns: list[dict[str, Any]]) -> None:
    position: dict[str, int] = {}
    for turn in turns:
        if turn.get("role") == "assistant" and turn.get("tool_calls"):
            calls = enumerate(turn["tool_calls"])
            position = {name: at for at, call in calls if (name := call.get("id") or call["function"].get("id"))}
        elif turn.get("role") == "user" and position:
            slots = [at for at, block in enumerate(turn["blocks"]) if block[0] == "result"]
            results = sorted((turn["blocks"][at] for at in slots), key=lambda b: position.get(b[2], 0))
            for at, block in zip(slots, results, strict=True):
                turn["blocks"][at] = block


# section 4


def last_asking(turns: list[dict[str, Any]]) -> int:
    return max((at for at, turn in enumerate(turns) if turn.get("role") in ("user", "developer")), default=-1)


def without_old(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    last = last_asking(turns)
    stays = ("system", "user", "assistant", "latest_reminder")
    return [turn for at, turn in enumerate(turns) if at >= last or turn.get("role") in stays]


# section 5


def body(turn: dict[str, Any], reasons: bool) -> str:
    role, content = turn.get("role"), turn.get("content")
    if role == "system":
        return (content or "") + declared(turn)
    if role == "developer":
        if not content:
            raise Refused("empty developer")
        return USER + content + declared(turn)
    if role == "user":
        return USER + "\n\n".join(map(block_text, turn["blocks"]))
    if role == "latest_reminder":
        return REMINDER + str(content)
    if role == "assistant":
        text = (turn.get("reasoning_content") or "") + "</think>" if reasons else ""
        text += (content or "") + calls_text(turn.get("tool_calls") or [])
        return text + ("" if turn.get("wo_eos") else EOS)
    raise Refused(f"role {role}")


def block_text(block: tuple[str, Any, Any]) -> str:
    kind, content, _ = block
    if kind == "text":
        if not isinstance(content, str):
            raise Refused("user content")
        return content
    if isinstance(content, list):
        content = "\n\n".join(p["text"] if p["type"] == "text" else f"[Unsupported {p['type']}]" for p in content)
    return f"<tool_result>{content}</tool_result>"


def declared(turn: dict[str, Any]) -> str:
    text = ""
    if turn.get("tools"):
        before, after = fixed_tools_texts()
        text += "\n\n" + before + "\n".join(dumps(tool["function"]) for tool in turn["tools"]) + after
    if turn.get("response_format"):
        text += "\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
        text += dumps(turn["response_format"])
    return text


def suffix(turn: dict[str, Any], thinking: bool, opens: bool) -> str:
    task = turn.get("task")
    if task == "action":
        return ASSISTANT + ("<think>" if thinking else "</think>") + "<｜action｜>"
    if task in PLAIN_TASKS:
        return f"<｜{task}｜>"
    if task is not None:
        raise Refused("task")
    if turn.get("role") in ("user", "developer"):
        return ASSISTANT + ("<think>" if opens else "</think>")
    return ""


# section 8


def calls_text(calls: list[dict[str, Any]]) -> str:
    if not calls:
        return ""
    invokes = "\n".join(invoke_text(call["function"]) for call in calls)
    return f"\n\n<｜DSML｜tool_calls>\n{invokes}\n</｜DSML｜tool_calls>"


def invoke_text(function: dict[str, Any]) -> str:
    lines = []
    for key, value in arguments_of(function["arguments"]).items():
        is_text = isinstance(value, str)
        shown = value if is_text else dumps(value)
        head = f'<｜DSML｜parameter name="{key}" string="{str(is_text).lower()}">'
        lines.append(f"{head}{shown}</｜DSML｜parameter>")
    return f'<｜DSML｜invoke name="{function["name"]}">\n' + "\n".join(lines) + "\n</｜DSML｜invoke>"


def arguments_of(given: Any) -> dict[str, Any]:
    """Read arguments as officially, except that a mapping is taken for what it is."""
    if isinstance(given, dict):
        return given
    if not isinstance(given, str):
        return {"arguments": given}
    try:
        value = json.loads(given)
    except ValueError:
        return {"arguments": given}
    if not isinstance(value, dict):
        raise Refused("arguments")
    return value
