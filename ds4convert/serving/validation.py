"""What a request may say: a table of fields, checked before anything is decoded.

Only fields of the table count. Fields of other hosts are left out, as OpenAI's clients send many; those whose meaning
cannot be honoured are refused rather than ignored. A number of new tokens is different: no client can know what the
context leaves, so more than that means all of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ds4convert.checkpoint.types import JSON
from ds4convert.errors import InputError
from ds4convert.serving import history, thinking
from ds4convert.serving.history import shown
from ds4convert.serving.refused import Refused
from ds4convert.storage import strict_json

CHAT, TEXT = "chat", "text"
MAX_STOPS, MAX_STOP_LENGTH, MAX_TOP, MAX_TOP_OF_TEXT = 64, 1000, 20, 10
MAX_PROMPTS = 128
MAX_SEED = 2**63 - 1
GREEDY_BELOW = 0.01
"""Temperatures below mean greedy: clients send them where a host takes no 0, and logits divided by less overflow."""

Prompt = str | tuple[int, ...]


@dataclass(frozen=True)
class Limits:
    """What the server allows: most new tokens of a request and those of one that names none, tokens of the model's
    context, size of its vocabulary, names of the model (the first is the one that is told), sampling by default.
    """

    max_tokens: int
    default_tokens: int
    context: int
    vocabulary: int
    names: tuple[str, ...]
    sampling: Mapping[str, float]


@dataclass(frozen=True)
class Asked:
    """A request that can be decoded. A chat has messages; a text has one prompt or several, each a text or token ids.

    `template` holds variables of the chat template; `numbers` are fields of sampling and penalties by their names.
    `mtp` false decodes without the head, where there is one. `schema` is the JSON schema that the reply has to keep to.
    """

    kind: str
    max_tokens: int
    numbers: Mapping[str, float]
    prompts: tuple[Prompt, ...] = ()
    messages: tuple[JSON, ...] = ()
    tools: tuple[JSON, ...] = ()
    parallel_calls: bool = True
    template: JSON = field(default_factory=dict)
    tells_reasoning: bool = True
    mtp: bool = True
    stream: bool = False
    tells_usage: bool = False
    stop: tuple[str, ...] = ()
    logprobs: bool = False
    top_logprobs: int = 0
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    schema: JSON | None = None


Check = Callable[[Any], bool]


@dataclass(frozen=True, slots=True)
class Bounds:
    """A number that a request may have: from `low` to `high`, whole or not, 0 or from `least` on; else its default."""

    low: float
    high: float
    default: float
    is_whole: bool = False
    least: float = 0.0

    def holds(self, value: Any) -> bool:
        """Return whether a value of JSON is such a number."""
        if self.is_whole:
            return _whole(int(self.low), int(self.high))(value)
        return _number(self.low, self.high)(value) and (not self.least or value >= self.least or value == 0)

    @property
    def told(self) -> str:
        """Return what is expected, in words."""
        if self.least:
            return f"0 (off), or a number from {self.least} to {self.high}"
        return f"a {'whole ' if self.is_whole else ''}number from {self.low} to {self.high}"


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


NUMBERS: dict[str, Bounds] = {
    "temperature": Bounds(0, 100, 0.0),
    "top_p": Bounds(0, 1, 1.0),
    "top_k": Bounds(0, 2**31 - 1, 0, is_whole=True),
    "min_p": Bounds(0, 1, 0.0),
    "repetition_penalty": Bounds(0, 10, 0.0, least=0.1),  # logits are multiplied and divided by it; 0: mlx-lm's off
    "repetition_context_size": Bounds(0, 10**6, 20, is_whole=True),
    "presence_penalty": Bounds(-2, 2, 0.0),
    "presence_context_size": Bounds(0, 10**6, 20, is_whole=True),
    "frequency_penalty": Bounds(-2, 2, 0.0),
    "frequency_context_size": Bounds(0, 10**6, 20, is_whole=True),
    "xtc_probability": Bounds(0, 1, 0.0),
    "xtc_threshold": Bounds(0, 0.5, 0.1),
}
"""Sampling and penalties: what is taken, and what stands where a request says nothing."""

FIELDS: dict[str, tuple[Check, str]] = {
    "stream": (_is_flag, "true or false"),
    "mtp": (_is_flag, "true, or false to decode without the head"),
    "stream_options": (_is_usage_option, 'an object such as {"include_usage": true}'),
    "parallel_tool_calls": (_is_flag, "true, or false for one call at most"),
    "logit_bias": (_is_bias, "an object of token ids to numbers"),
    "top_logprobs": (_whole(0, MAX_TOP), f"a whole number from 0 to {MAX_TOP}"),
    "seed": (_whole(-MAX_SEED, MAX_SEED), "a whole number of 63 bits"),
    "stop": (_is_stop, f"a text or a list of at most {MAX_STOPS} texts, none of them empty"),
}
"""Other fields that both kinds of request may have, null or absent meaning the default."""

REFUSED: dict[str, tuple[Check, str]] = {
    "n": (lambda v: v == 1 and type(v) is int, "1: this server makes one choice"),
    "best_of": (lambda v: v == 1 and type(v) is int, "1: this server makes one choice"),
    "echo": (lambda v: v is False, "false: the prompt is not repeated"),
    "suffix": (lambda v: v == "", "nothing: there is no text after the gap"),
    "adapters": (lambda v: False, "nothing: this server has no adapters"),
    "draft_model": (lambda v: False, "nothing: the drafts come from the model's own head"),
    "functions": (lambda v: v == [], "nothing: functions are declared as `tools`"),
    "function_call": (lambda v: v in ("auto", "none"), '"auto" or "none": a call cannot be forced'),
    "tool_choice": (
        lambda v: isinstance(v, str) and v in ("auto", "none"),
        '"auto" or "none": a call cannot be forced',
    ),
}
"""Fields that mean something which this server cannot do, and the value that asks for nothing."""


def allowed(limits: Limits) -> JSON:
    """Return the numbers that a request may have, with bounds and what is taken where it says nothing: for pages."""
    told: JSON = {
        name: {
            "min": b.low, "max": b.high, "whole": b.is_whole, "default": limits.sampling.get(name, b.default),
            **({"least": b.least} if b.least else {}),
        }
        for name, b in NUMBERS.items()
    }  # fmt: skip
    most = {"min": 1, "max": limits.max_tokens, "whole": True, "default": limits.default_tokens}
    return told | {"max_tokens": most}


def parse(raw: bytes, kind: str, limits: Limits) -> Asked:
    """Return what a body asks for. Raises `Refused` with 400, 404 or 422."""
    try:
        body = strict_json.loads(raw, "the request body", is_file=False)
    except InputError as e:
        raise Refused(400, str(e), code="invalid_json") from None
    if not isinstance(body, dict):
        raise Refused(400, "the request body: expected a JSON object", code="invalid_json")
    _check_model(body.get("model"), limits)
    for name, (check, wanted) in (REFUSED | FIELDS).items():
        _check(body, name, check, wanted)
    options, (template, tells) = body.get("stream_options") or {}, thinking.read(body)
    logprobs, top = _logprobs(body, kind)
    stop = body.get("stop") or []
    tools = history.tools(body["tools"]) if body.get("tools") is not None else []
    return Asked(
        kind,
        _max_tokens(body, limits),
        _numbers(body, limits),
        prompts=_prompts(body.get("prompt"), limits) if kind == TEXT else (),
        messages=tuple(history.read(body)) if kind == CHAT else (),
        tools=() if body.get("tool_choice") == "none" else tuple(tools),
        parallel_calls=body.get("parallel_tool_calls") is not False,
        template=template,
        tells_reasoning=tells,
        mtp=body.get("mtp") is not False,
        stream=bool(body.get("stream")),
        tells_usage=bool(options.get("include_usage")),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        logprobs=logprobs,
        top_logprobs=top,
        seed=body.get("seed"),
        logit_bias=_bias(body, limits),
        schema=_schema(body, bool(tools) and body.get("tool_choice") != "none"),
    )


ANY_OBJECT: JSON = {"type": "object"}
FORMS = 'the type "text", "json_object", or "json_schema" with a schema in json_schema.schema'


def _schema(body: JSON, has_tools: bool) -> JSON | None:
    """Return the JSON schema that a reply has to keep to, None where it is free."""
    form = body.get("response_format")
    if form is None or (isinstance(form, dict) and form.get("type") == "text"):
        return None
    where, schema = "response_format", None
    if isinstance(form, dict) and form.get("type") == "json_object":
        schema = ANY_OBJECT
    elif isinstance(form, dict) and form.get("type") == "json_schema":
        where, told = "response_format.json_schema", form.get("json_schema")
        schema = told.get("schema") if isinstance(told, dict) else None
    if not isinstance(schema, dict):
        raise Refused(422, f"{where}: expected {FORMS}, found {shown(form)}", where)
    if has_tools:
        raise Refused(422, "response_format and tools: a reply keeps to one of them; send tool_choice none", where)
    return schema


def _check(body: JSON, name: str, check: Check, wanted: str) -> bool:
    """Return whether `name` is there; null is as if it were not."""
    value = body.get(name)
    if value is None:
        return False
    if not check(value):
        raise Refused(422, f"{name}: expected {wanted}, found {shown(value)}", name)
    return True


def _check_model(name: Any, limits: Limits) -> None:
    if name is None:
        return
    if not isinstance(name, str):
        raise Refused(422, f"model: expected a text, found {shown(name)}", "model")
    if name not in limits.names:
        told = f"model: {shown(name)} is not served here; known: {limits.names[0]}"
        raise Refused(404, told, "model", "model_not_found")


def _max_tokens(body: JSON, limits: Limits) -> int:
    """Return how many new tokens are wanted at most. -1 is LM Studio's and llama.cpp's word for no bound."""
    wanted = "a whole number from 1 on, or -1 for as many as the context leaves"
    for name in ("max_completion_tokens", "max_tokens"):
        _check(body, name, lambda v: _whole(1, MAX_SEED)(v) or (type(v) is int and v == -1), wanted)
    found = body.get("max_completion_tokens")
    found = body.get("max_tokens") if found is None else found
    found = limits.default_tokens if found is None else limits.max_tokens if found < 0 else int(found)
    return min(found, limits.max_tokens)


def _numbers(body: JSON, limits: Limits) -> dict[str, float]:
    out = {name: limits.sampling.get(name, bounds.default) for name, bounds in NUMBERS.items()}
    for name, bounds in NUMBERS.items():
        if _check(body, name, bounds.holds, bounds.told):
            out[name] = body[name]
    if out["temperature"] < GREEDY_BELOW or body.get("top_p") == 0:  # of the likeliest share 0 one token is left
        out["temperature"] = 0.0
    return out


def _bias(body: JSON, limits: Limits) -> dict[int, float]:
    bias = {int(k): float(v) for k, v in (body.get("logit_bias") or {}).items()}
    if bias and max(bias) >= limits.vocabulary:
        told = f"logit_bias: expected token ids below {limits.vocabulary:,}, found {max(bias)}"
        raise Refused(422, told, "logit_bias")
    return bias


def _logprobs(body: JSON, kind: str) -> tuple[bool, int]:
    """Return whether log-probabilities are told, and of how many others: the older form of texts is that number."""
    value, top = body.get("logprobs"), body.get("top_logprobs") or 0
    if kind == TEXT and type(value) is int:
        if not 0 <= value <= MAX_TOP_OF_TEXT:
            raise Refused(422, f"logprobs: expected 0 to {MAX_TOP_OF_TEXT}, found {value}", "logprobs")
        return True, max(value, top)
    _check(body, "logprobs", _is_flag, "true or false")
    wanted = bool(top) if value is None else value
    return wanted, top if wanted else 0


def _prompts(value: Any, limits: Limits) -> tuple[Prompt, ...]:
    """Return the prompts: one text, one list of token ids, or a list of either."""
    if isinstance(value, list) and any(isinstance(p, str | list) for p in value):
        if len(value) > MAX_PROMPTS:
            raise Refused(422, f"prompt: expected at most {MAX_PROMPTS} prompts, found {len(value):,}", "prompt")
        return tuple(_one_prompt(p, f"prompt[{n}]", limits) for n, p in enumerate(value))
    return (_one_prompt(value, "prompt", limits),)


def _one_prompt(value: Any, where: str, limits: Limits) -> Prompt:
    if isinstance(value, str) and value:
        return value
    if not isinstance(value, list) or not value:
        wanted = "a text, or a list of token ids, that is not empty, or a list of those"
        raise Refused(422, f"{where}: expected {wanted}, found {shown(value)}", "prompt")
    for n, token in enumerate(value):
        if type(token) is not int or not 0 <= token < limits.vocabulary:
            wanted = f"a token id below {limits.vocabulary:,}"
            raise Refused(422, f"{where}[{n}]: expected {wanted}, found {shown(token)}", "prompt")
    return tuple(value)
