"""The switches by which clients turn thinking on and off, and what the chat template is told of them.

Every family of clients has a spelling of its own for the same wish:

- DeepSeek's API: `thinking: {"type": "enabled" | "disabled"}` and `reasoning_effort` (api-docs.deepseek.com,
  guides/thinking_mode; its Responses form is `reasoning: {"effort": ...}`, its Anthropic form `output_config`);
- OpenRouter: `reasoning: {"enabled", "effort", "exclude"}` and `include_reasoning`;
- DashScope, SiliconFlow: `enable_thinking`; Ollama: `think`; vLLM, SGLang, mlx-lm: `chat_template_kwargs`.

All of them are honoured. Two that contradict each other are refused, as is what cannot be kept (a budget of tokens).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from ds4convert.checkpoint.types import JSON
from ds4convert.serving.refused import Refused
from ds4convert.words.terminal import show

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra")
ON, OFF = ("enabled", "adaptive", "auto", "thinking"), ("disabled", "chat")
FLAG_FIELDS = ("enable_thinking", "think", "thinking", "thinking_mode")
KWARGS = "chat_template_kwargs"
KWARGS_FIELDS = ("enable_thinking", "thinking", "thinking_mode", "reasoning_effort", "drop_thinking")
BUDGETS = ("thinking_budget", "reasoning_budget", "thinking_budget_tokens", "thinking_token_budget")
"""Other hosts' names of a bound for the reasoning alone, which the decoding loop cannot keep."""


@dataclass
class _Wishes:
    """What the fields of one request ask for: by field, thinking or not; by field, an effort."""

    switches: dict[str, bool] = field(default_factory=dict)
    efforts: dict[str, str] = field(default_factory=dict)

    def switch(self, where: str, value: Any) -> None:
        """Note a switch: true, false, a word, or an object with the word as `type`."""
        word = value.get("type") if isinstance(value, dict) else value
        if isinstance(value, dict) and (more := sorted(set(value) - {"type"})):
            raise Refused(422, f"{where}.{more[0]}: this cannot be kept; only the type is taken", f"{where}.{more[0]}")
        if isinstance(word, str) and word in (*ON, *OFF):
            word = word in ON
        if type(word) is not bool:
            wanted = 'true, false or {"type": "enabled"} or {"type": "disabled"}'
            raise Refused(422, f"{where}: expected {wanted}, found {_shown(value)}", where)
        self.switches[where] = word

    def effort(self, where: str, value: Any) -> None:
        """Note an effort; "none" is a switch too."""
        if not isinstance(value, str) or value not in EFFORTS:
            raise Refused(422, f"{where}: expected one of {', '.join(EFFORTS)}, found {_shown(value)}", where)
        if value == "none":
            self.switches[where] = False
        else:
            self.efforts[where] = "max" if value == "ultra" else value

    def template(self) -> JSON:
        """Return the variables of the template. Raises `Refused` where two fields contradict each other."""
        told: JSON = {}
        if self.switches:
            told["enable_thinking"] = told["thinking"] = _agreed(self.switches)
        if self.efforts and told.get("thinking", True):
            told["reasoning_effort"] = _agreed(self.efforts)
        return told


def _agreed(wishes: dict[str, Any]) -> Any:
    """Return the value that all fields have. Raises `Refused` naming two that differ."""
    (first, value), *others = wishes.items()
    for other, found in others:
        if found != value:
            raise Refused(422, f"{first} and {other} contradict each other; send one of them", other)
    return value


def read(body: JSON) -> tuple[JSON, bool]:
    """Return the template's variables, and whether the reasoning is to be sent. Raises `Refused` with 422."""
    wishes, tells = _Wishes(), True
    for name in BUDGETS:
        if body.get(name) is not None:
            raise Refused(
                422, f"{name}: a budget for the reasoning alone cannot be kept; bound all with max_tokens", name
            )
    for name in FLAG_FIELDS[:3]:
        if (value := body.get(name)) is not None:
            wishes.effort(name, value) if name == "think" and value in EFFORTS else wishes.switch(name, value)
    for name in ("reasoning_effort", "output_config"):
        if (value := body.get(name)) is not None:
            _effort(wishes, name, value)
    if (value := body.get("reasoning")) is not None:
        tells = _reasoning(wishes, value)
    if (value := body.get("include_reasoning")) is not None:
        _check_flag("include_reasoning", value)
        tells = tells and value
    drops = _kwargs(wishes, body[KWARGS]) if body.get(KWARGS) is not None else {}
    return wishes.template() | drops, tells


def _effort(wishes: _Wishes, name: str, value: Any) -> None:
    if name == "reasoning_effort":
        wishes.effort(name, value)
    elif isinstance(value, dict) and value.get("effort") is not None:
        wishes.effort("output_config.effort", value["effort"])


def _reasoning(wishes: _Wishes, value: Any) -> bool:
    """Note what the object `reasoning` asks for; returns whether the reasoning is to be sent."""
    if not isinstance(value, dict):
        raise Refused(
            422, f'reasoning: expected an object such as {{"effort": "none"}}, found {_shown(value)}', "reasoning"
        )
    for name, item in value.items():
        where = f"reasoning.{name}"
        if item is None:
            continue
        if name == "effort":
            wishes.effort(where, item)
        elif name in ("enabled", "exclude"):
            _check_flag(where, item)
            if name == "enabled":
                wishes.switches[where] = item
        elif name not in ("summary", "generate_summary"):  # the reasoning is sent whole, so no summary is missed
            raise Refused(422, f"{where}: this cannot be kept; effort, enabled and exclude are taken", where)
    return not value.get("exclude")


def _kwargs(wishes: _Wishes, value: Any) -> JSON:
    if not isinstance(value, dict) or (more := sorted(set(value) - set(KWARGS_FIELDS))):
        names = ", ".join(KWARGS_FIELDS)
        found = _shown(value) if not isinstance(value, dict) else _shown(more[0])
        raise Refused(422, f"{KWARGS}: expected an object with some of {names}, found {found}", KWARGS)
    for name, item in value.items():
        where = f"{KWARGS}.{name}"
        if item is None:
            continue
        if name == "reasoning_effort":
            wishes.effort(where, item)
        elif name == "drop_thinking":
            _check_flag(where, item)
        else:
            wishes.switch(where, item)
    return {} if value.get("drop_thinking") is None else {"drop_thinking": value["drop_thinking"]}


def _check_flag(where: str, value: Any) -> None:
    if type(value) is not bool:
        raise Refused(422, f"{where}: expected true or false, found {_shown(value)}", where)


def _shown(value: Any) -> str:
    return show(json.dumps(value, ensure_ascii=False)[:400], 80)
