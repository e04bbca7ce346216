"""What fields of a request mean: the switches of thinking that clients know, numbers of tokens, prompts, histories.

Sources: api-docs.deepseek.com, guides/thinking_mode (thinking on by default; `thinking`, `reasoning_effort`,
`reasoning.effort`, efforts minimal to ultra); OpenRouter's `reasoning`; BerriAI/litellm 27453; ml-explore/mlx-lm 1065 and
LibreChat 12836 (histories); LM Studio's examples (`max_tokens: -1`); cubist38/mlx-openai-server 78 (too low defaults).
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from ds4convert.inference import chat
from ds4convert.serving import thinking, validation
from ds4convert.serving.refused import Refused
from ds4convert.serving.validation import CHAT, TEXT, Asked, Limits

LIMITS = Limits(1000, 300, 1000, 500, ("demo",), {"temperature": 0.6, "top_k": 40})
USER = {"role": "user", "content": "2 and 3?"}
OFF = [
    {"thinking": {"type": "disabled"}}, {"thinking": False}, {"thinking": "disabled"}, {"enable_thinking": False},
    {"think": False}, {"think": "none"}, {"reasoning": {"effort": "none"}}, {"reasoning": {"enabled": False}},
    {"reasoning_effort": "none"}, {"output_config": {"effort": "none"}},
    {"chat_template_kwargs": {"enable_thinking": False}}, {"chat_template_kwargs": {"thinking": False}},
    {"chat_template_kwargs": {"thinking": {"type": "disabled"}}}, {"chat_template_kwargs": {"thinking_mode": "chat"}},
    {"chat_template_kwargs": {"reasoning_effort": "none"}},
]  # fmt: skip
ON = [
    {"thinking": {"type": "enabled"}}, {"thinking": {"type": "adaptive"}}, {"enable_thinking": True}, {"think": True},
    {"reasoning": {"enabled": True}}, {"chat_template_kwargs": {"thinking_mode": "thinking"}},
]  # fmt: skip


def asked(kind: str = CHAT, **fields: Any) -> Asked:
    body = {"messages": [USER]} if kind == CHAT else {"prompt": "x"}
    return validation.parse(json.dumps(body | fields).encode(), kind, LIMITS)


def refusal(kind: str = CHAT, **fields: Any) -> Refused:
    with pytest.raises(Refused) as found:
        asked(kind, **fields)
    return found.value


def opening(fields: dict[str, Any]) -> str:
    """What the prompt ends with under the fields."""
    template = asked(**fields).template
    mode = "thinking" if template.get("thinking", True) else "chat"
    return chat.render([USER], mode=mode, effort="max" if template.get("reasoning_effort") == "max" else None)


@pytest.mark.parametrize("fields", OFF, ids=json.dumps)
def test_every_switch_turns_thinking_off(fields: dict[str, Any]) -> None:
    assert asked(**fields).template == {"enable_thinking": False, "thinking": False}
    assert opening(fields).endswith("</think>")
    assert asked(TEXT, **fields).prompts == ("x",), "a text has no thinking to turn off"


@pytest.mark.parametrize(
    "fields", [*ON, {}, {"thinking": None}, {"reasoning": {}}, {"reasoning": {"effort": None}}], ids=json.dumps
)
def test_thinking_is_on_where_nothing_turns_it_off(fields: dict[str, Any]) -> None:
    assert opening(fields).endswith("<think>")


@pytest.mark.parametrize(
    ("fields", "effort"),
    [
        ({"reasoning_effort": "max"}, "max"), ({"reasoning_effort": "ultra"}, "max"), ({"reasoning": {"effort": "low"}}, "low"),
        ({"think": "high"}, "high"), ({"output_config": {"effort": "max"}}, "max"),
        ({"chat_template_kwargs": {"reasoning_effort": "max"}, "reasoning_effort": "max"}, "max"),
        ({"thinking": {"type": "disabled"}, "reasoning_effort": "high"}, None),
    ],
)  # fmt: skip
def test_efforts_are_passed_on(fields: dict[str, Any], effort: str | None) -> None:
    assert asked(**fields).template.get("reasoning_effort") == effort


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"thinking": {"type": "off"}}, "thinking"), ({"thinking": 0}, "thinking"), ({"thinking": {}}, "thinking"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking.budget_tokens"),
        ({"reasoning": {"max_tokens": 9}}, "reasoning.max_tokens"), ({"reasoning": True}, "reasoning"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort"), ({"reasoning": {"enabled": 1}}, "reasoning.enabled"),
        ({"thinking_budget": 5}, "thinking_budget"), ({"enable_thinking": 1}, "enable_thinking"),
        ({"reasoning_effort": True}, "reasoning_effort"), ({"include_reasoning": "no"}, "include_reasoning"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"), ({"chat_template_kwargs": {"tools": []}}, "tools"),
        ({"chat_template_kwargs": {"drop_thinking": 1}}, "drop_thinking"),
        ({"thinking": {"type": "disabled"}, "enable_thinking": True}, "contradict"),
        ({"reasoning_effort": "none", "thinking": True}, "contradict"),
        ({"reasoning_effort": "max", "reasoning": {"effort": "high"}}, "contradict"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_by_its_name(fields: dict[str, Any], says: str) -> None:
    found = refusal(**fields)
    assert found.status == 422 and says in found.message


def test_reasoning_is_told_unless_it_is_unwanted() -> None:
    assert thinking.read({}) == ({}, True)
    assert not asked(reasoning={"exclude": True}).tells_reasoning and not asked(include_reasoning=False).tells_reasoning


@pytest.mark.parametrize(
    ("fields", "most"),
    [
        ({}, 300), ({"max_tokens": 5}, 5), ({"max_tokens": 32000}, 1000), ({"max_completion_tokens": 2**62}, 1000),
        ({"max_tokens": -1}, 1000), ({"max_tokens": 7, "max_completion_tokens": 6}, 6), ({"max_tokens": None}, 300),
    ],
)  # fmt: skip
def test_more_tokens_than_there_are_means_all(fields: dict[str, Any], most: int) -> None:
    assert asked(**fields).max_tokens == most


@pytest.mark.parametrize("value", [0, -2, 1.5, "5", True, 10**30, []])
@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_what_is_no_number_of_tokens_is_refused(name: str, value: Any) -> None:
    assert name in refusal(**{name: value}).message


def test_numbers_have_bounds_and_defaults() -> None:
    assert asked().numbers["temperature"] == 0.6 and asked().numbers["top_k"] == 40
    for tiny in (0, 1e-9, 5e-324, 0.0099):
        assert asked(temperature=tiny).numbers["temperature"] == 0.0, "greedy, as division by it would overflow"
    assert asked(temperature=0.01).numbers["temperature"] == 0.01
    for name, bad in {
        "temperature": (-1e-9, 101, True), "repetition_penalty": (-1, 1e-30, 0.09, 11, 1e30, True),
        "presence_penalty": (-2.1, 2.1), "frequency_penalty": (-2.1, 1e9), "top_p": (-0.1, 1.1), "top_k": (-1, 0.5),
    }.items():  # fmt: skip
        for value in bad:
            assert name in refusal(**{name: value}).message
    assert asked(temperature=1, top_p=0).numbers["temperature"] == 0.0, "no share of the likeliest but the likeliest"
    assert asked(repetition_penalty=0).numbers["repetition_penalty"] == 0


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("a", ("a",)), (["a"], ("a",)), (["a", "b"], ("a", "b")), ([5, 6], ((5, 6),)), ([[5, 6]], ((5, 6),)),
        ([[5], [6, 7]], ((5,), (6, 7))), (["a", [5]], ("a", (5,))),
    ],
)  # fmt: skip
def test_prompts_are_texts_and_token_ids_one_or_several(prompt: Any, wanted: Any) -> None:
    assert asked(TEXT, prompt=prompt).prompts == wanted


def test_log_probabilities_are_asked_for_in_both_forms() -> None:
    assert (asked(logprobs=True).logprobs, asked(logprobs=True).top_logprobs) == (True, 0)
    assert (asked(top_logprobs=20).logprobs, asked(top_logprobs=20).top_logprobs) == (True, 20)
    assert asked(logprobs=False, top_logprobs=3).top_logprobs == 0
    assert (asked(TEXT, logprobs=0).logprobs, asked(TEXT, logprobs=5).top_logprobs) == (True, 5)
    assert "logprobs" in refusal(logprobs=3).message and "top_logprobs" in refusal(top_logprobs=21).message


# histories


def history(*messages: dict[str, Any]) -> Any:
    return asked(messages=[USER, *messages]).messages[1:]


def calling(arguments: Any, **more: Any) -> dict[str, Any]:
    function = {"name": "add"} | ({} if arguments is ... else {"arguments": arguments})
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "c", "type": "function", "function": function}],
        **more,
    }


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ('{"a": 2}', {"a": 2}),
        ("", {}),
        (" \n", {}),
        (None, {}),
        (..., {}),
        ({"a": 1}, {"a": 1}),
        ('{"a": 1e3}', {"a": 1000.0}),
    ],
)
def test_arguments_come_back_as_they_were_sent(arguments: Any, wanted: Any) -> None:
    (message,) = history(calling(arguments))
    assert message["tool_calls"][0]["function"]["arguments"] == wanted and message["content"] == ""


@pytest.mark.parametrize(
    "arguments",
    ['{"a": ', '{"a"', "[1]", "5", "null x", '{"a": NaN}', "[" * 5000, '{"a": "\\ud800"}', 5, [1], "1" * 9999],
)
def test_arguments_that_were_cut_off_are_named_by_message(arguments: Any) -> None:
    for messages in ([calling(arguments)], [USER, calling("{}"), calling(arguments)]):
        found = refusal(messages=[USER, *messages])
        assert f"messages[{len(messages)}].tool_calls[0].function.arguments" in found.message == found.args[0]
        assert found.status == 422 and found.field is not None


def test_contents_are_texts_parts_and_nothing() -> None:
    part = {"type": "text", "text": "a"}
    two = [part, {"type": "input_text", "text": "b"}]
    assert [m["content"] for m in history({"role": "user", "content": two}, {"role": "assistant"})] == ["ab", ""]
    assert history({"role": "tool", "tool_call_id": "c", "content": two})[0]["content"] == "a\n\nb", "as officially"
    assert history({"role": "developer", "content": "x"})[0]["role"] == "system", "OpenAI's word for the system prompt"
    for name in ("prefix", "wo_eos"):
        assert history({"role": "assistant", "content": "It is", name: True})[0]["wo_eos"] is True
    thought = history({"role": "assistant", "content": "x", "reasoning_content": "hm", "unknown": {"deep": []}})[0]
    assert thought == {"role": "assistant", "content": "x", "reasoning_content": "hm"}


@pytest.mark.parametrize(
    ("message", "where"),
    [
        (5, "messages[1]"), ({"role": "king"}, "messages[1].role"), ({"role": ["user"]}, "messages[1].role"),
        ({"role": "user", "content": 5}, "messages[1].content"),
        ({"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url"}]}, "messages[1].content[1]"),
        ({"role": "assistant", "tool_calls": 5}, "messages[1].tool_calls"),
        ({"role": "assistant", "tool_calls": [5]}, "messages[1].tool_calls[0]"),
        ({"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}, "messages[1].tool_calls[0]"),
        ({"role": "assistant", "reasoning_content": 5}, "messages[1].reasoning_content"),
        ({"role": "tool", "tool_call_id": 5}, "messages[1].tool_call_id"), ({"role": "user", "task": "x"}, "messages[1].task"),
        ({"role": "assistant", "wo_eos": 1}, "messages[1].wo_eos"), ({"role": "system", "tools": [5]}, "messages[1].tools[0]"),
        ({"role": "system", "response_format": "x"}, "messages[1].response_format"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named_by_message(message: Any, where: str) -> None:
    found = refusal(messages=[USER, message])
    assert found.field == where and found.message.startswith(where + ": ")


@pytest.mark.parametrize(
    "tools", [5, [5], [{"type": "web_search"}], [{"type": "custom", "custom": {"name": "x"}}], [{"function": 1}]]
)
def test_tools_that_are_no_functions_are_refused(tools: Any) -> None:
    assert "tools" in refusal(tools=tools).message


@pytest.mark.parametrize(
    ("function", "where"),
    [
        ({}, "name"), ({"name": 5}, "name"), ({"name": ""}, "name"), ({"name": "f", "parameters": [1]}, "parameters"),
        ({"name": "f", "description": 5}, "description"), ({"name": "f", "parameters": "{}"}, "parameters"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_declared_function_is_named(function: dict[str, Any], where: str) -> None:
    good = {"type": "function", "function": {"name": "g", "description": None}}
    assert asked(tools=[good, {"name": "flat", "parameters": {}}])
    assert refusal(tools=[good, {"type": "function", "function": function}]).field == f"tools[1].function.{where}"


def test_values_are_shown_as_they_were_sent() -> None:
    assert 'found {"5": "x", "é": true}' in refusal(logit_bias={"5": "x", "é": True}).message
    assert "found true" in refusal(max_tokens=True).message


def test_editors_send_many_stop_words() -> None:
    """Continue cuts its list to 16 or 4 words for hosts that it knows, and for none else (core/llm, getMaxStopWords)."""
    words = [f"\n{n}" for n in range(64)]
    assert asked(TEXT, stop=words).stop == tuple(words) and asked(stop="x").stop == ("x",)
    for bad in ([*words, "more"], [""], [5], "", {"a": 1}):
        assert "stop" in refusal(stop=bad).message
