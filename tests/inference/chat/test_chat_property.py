"""Random conversations render the same in the template and in the judge, by us and by transformers."""

from __future__ import annotations

import copy
import json

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError

from ds4convert.inference.chat import PromptError, render
from tests.inference.chat.chat_hosts import by_renderer
from tests.inference.chat.chat_reference import Refused, encode

CASES = max(300, settings.default.max_examples)
relaxed = settings(max_examples=CASES, suppress_health_check=list(HealthCheck))

PIECES = (
    "", " ", "\n", "\n\n", '"', "\\", "'", "<&>", "{{ x }}", "{% if %}", "{# c #}", "é中😀\u2028\u00a0",
    "<think>", "</think>", "｜DSML｜", "<｜User｜>", "</tool_result>", "None", '{"a": 1}',
)  # fmt: skip
TEXT = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=5)), max_size=3).map("".join)
SCALAR = st.one_of(TEXT, st.none(), st.booleans(), st.integers(), st.floats())
JSON = st.recursive(
    SCALAR,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=6,
)
OBJECT = st.dictionaries(TEXT, JSON, max_size=3)


@st.composite
def json_texts(draw):
    """Texts that are JSON in one of its spellings, or nearly so."""
    value = draw(st.one_of(OBJECT, OBJECT, OBJECT, JSON))
    indent = draw(st.sampled_from([None, 1, "\t"]))
    text = json.dumps(value, ensure_ascii=draw(st.booleans()), indent=indent)
    if draw(st.integers(0, 3)) == 0:
        at = draw(st.integers(0, len(text)))
        patch = [
            '"',
            "\\",
            "{",
            "}",
            ",",
            ":",
            "]",
            "1E3",
            "-0",
            "01",
            ".5",
            "\\ud83d",
            "\\u00e9",
            '"a": 1,',
            "\x01",
        ]
        text = text[:at] + draw(st.sampled_from(patch)) + text[at + draw(st.integers(0, 2)) :]
    return text


ARGUMENTS = st.one_of(json_texts(), json_texts(), OBJECT, st.none(), st.lists(JSON, max_size=2))
IDS = st.sampled_from([None, "a", "b", "c"])
TOOLS = st.lists(OBJECT.map(lambda function: {"type": "function", "function": function}), max_size=2)
TASKS = st.sampled_from([*([None] * 5), "action", "query", "authority", "domain", "title", "read_url"])
PARTS = st.lists(
    st.one_of(
        TEXT.map(lambda text: {"type": "text", "text": text}),
        st.just({"type": "image", "image": "x"}),
    ),
    max_size=3,
)


@st.composite
def calls(draw):
    function = {"name": draw(TEXT), "arguments": draw(ARGUMENTS)}
    call = {"type": "function", "function": function}
    where = draw(st.sampled_from([call, call, function]))
    where["id"] = draw(IDS)
    return call


@st.composite
def messages(draw):
    role = draw(st.sampled_from(["system", "developer", "latest_reminder", *["user", "assistant", "tool"] * 3, "user"]))
    role = "critic" if draw(st.integers(0, 40)) == 40 else role
    nullable = st.one_of(st.none(), TEXT) if role in ("system", "assistant", "latest_reminder", "tool") else TEXT
    if draw(st.integers(0, 40)) == 40:
        nullable = st.none()
    message = {"role": role, "content": draw(nullable), "task": draw(TASKS), "mask": 1}
    if draw(st.integers(0, 20)) == 20:
        message |= {"task": draw(st.sampled_from(["", "odd"]))}
    if draw(st.integers(0, 20)) == 20 and role not in ("critic", "latest_reminder"):
        del message["content"]
    if role == "tool":
        message |= {"tool_call_id": draw(IDS)}
        if draw(st.integers(0, 3)) == 0:
            message["content"] = draw(st.one_of(PARTS, OBJECT))
    if role == "assistant":
        message |= {
            "reasoning_content": draw(st.one_of(st.none(), TEXT)),
            "tool_calls": draw(st.lists(calls(), max_size=3)),
            "wo_eos": draw(st.sampled_from([False, False, True])),
        }
    if draw(st.integers(0, 5)) == 0:
        message |= {"tools": draw(TOOLS), "response_format": draw(OBJECT)}
    return message


def outcome(errors, work):
    try:
        return work()
    except errors:
        return "refused"


@relaxed
@given(
    st.lists(messages(), max_size=9),
    st.sampled_from(["thinking", "chat"]),
    st.sampled_from([None, "high", "max"]),
    st.booleans(),
    st.booleans(),
)
def test_template_and_judge_agree(talk, mode, effort, drop, suffix):
    before = copy.deepcopy(talk)
    expected = outcome(Refused, lambda: encode(talk, mode, drop, effort, suffix))
    switches = {"mode": mode, "effort": effort, "drop": drop, "add_generation_prompt": suffix}
    ours = outcome(PromptError, lambda: render(talk, **switches))
    variables = {"thinking_mode": mode, "reasoning_effort": effort, "drop_thinking": drop}
    theirs = outcome(TemplateError, lambda: by_renderer(talk, add_generation_prompt=suffix, **variables))
    event("refused" if expected == "refused" else "rendered")
    assert ours == expected
    assert theirs == expected
    assert repr(talk) == repr(before)


@relaxed
@given(st.lists(messages(), max_size=5), TOOLS, st.sampled_from(["thinking", "chat"]))
def test_tools_as_a_variable_are_tools_on_the_first_system_message(talk, tools, mode):
    talk = [{key: value for key, value in message.items() if key != "tools"} for message in talk]
    first = talk[:1] if talk and talk[0]["role"] == "system" else [{"role": "system", "content": ""}]
    rest = talk[1:] if talk and talk[0]["role"] == "system" else talk
    moved = [{**first[0], "tools": tools}, *rest] if tools else talk
    expected = outcome(Refused, lambda: encode(moved, mode))
    assert outcome(PromptError, lambda: render(talk, mode=mode, tools=tools)) == expected


@relaxed
@given(json_texts())
def test_the_template_reads_json_as_python_does(text):
    call = {"function": {"name": "f", "arguments": text}}
    talk = [{"role": "assistant", "tool_calls": [call]}]
    expected = outcome(Refused, lambda: encode(talk, "chat"))
    assert outcome(TemplateError, lambda: by_renderer(talk, thinking_mode="chat")) == expected


SPELLINGS = (
    "0", "-0", "-0.0", "-", "+1", "01", "-01", "1.", ".5", "1.5", "1.2.3", "1e5", "1E+5", "1e-5", "1e",
    "1e+", "1e5e5", "e5", "1e5.5", "1_0", "0x1", "\u0661", "\u00b2", "9" * 40, "9" * 4300, "1e400",
    "-1e400", "NaN", "-NaN", "Infinity", "-Infinity", "+Infinity", "nan", "true", "True", "truefalse",
    "null", "none", "[]", "[ ]", "[1,]", "[,1]", "[1 2]", "[1,,2]", "[1]]", "[[1]", "[1}", "{}", "{ }",
    '{"a":1,}', '{"a"}', '{"a":}', '{"a" 1}', "{a:1}", "{1:1}", '{"a":1]', '{"a":1,"b":2,"a":3}',
    '{"":{"":""}}', '""', '"', '"\\"', '"\\\\"', '"\\\\\\""', '"a\\\\" ', '"\\x"', '"\\u12"', '"\\u12g4"',
    '"\\u+123"', '"\\u0000"', '"\\b\\f\\n\\r\\t\\/"', "'a'", '"a" "b"', '"a","b"', ":", ",", "\ufeff1",
    "\u00a01", " 1\t\r\n", "1\x0b", "1 //x", "",
)  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("frame", ['{"k": %s}', '{"k": [%s], "l": 1}', "%s", '{"k": 1%s'])
def test_the_template_reads_each_spelling_as_python_does(spelling, frame):
    call = {"function": {"name": "f", "arguments": frame % spelling}}
    talk = [{"role": "assistant", "tool_calls": [call]}]
    expected = outcome(Refused, lambda: encode(talk, "chat"))
    assert outcome(TemplateError, lambda: by_renderer(talk, thinking_mode="chat")) == expected


@pytest.mark.parametrize("code", range(0x20))
def test_control_characters_in_json_texts_are_not_json(code):
    text = json.dumps({"a": "b"}).replace("b", chr(code))
    talk = [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": text}}]}]
    assert by_renderer(talk, thinking_mode="chat") == encode(talk, "chat")


@pytest.mark.parametrize("low", ["", "\\udc00", "\\udfff", "\\ue000", "\\ud800", "x\\udc00", "\\udc0", "\\\\udc00"])
@pytest.mark.parametrize("high", ["\\ud800", "\\uDBFF", "\\udc00", "\\ud7ff", "\\\\ud800", "\\ud83d\\ud83d"])
def test_surrogates_join_as_in_python(high, low):
    text = f'{{"a": "{high}{low}"}}'
    talk = [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": text}}]}]
    assert by_renderer(talk, thinking_mode="chat") == encode(talk, "chat")
