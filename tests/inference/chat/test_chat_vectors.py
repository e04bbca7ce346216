"""The four official vectors, byte for byte, through us and through every host."""

from __future__ import annotations

import copy
import json

import pytest

from ds4convert.inference.chat import render
from tests.inference.chat.chat_hosts import HOSTS, by_renderer
from tests.inference.chat.chat_reference import VECTORS, encode, vector

NUMBERS = (1, 2, 3, 4)


@pytest.mark.parametrize("number", NUMBERS)
def test_render_equals_the_official_vector(number):
    messages, mode, expected = vector(number)
    before = copy.deepcopy(messages)
    assert render(messages, mode=mode).encode() == expected.encode()
    assert messages == before


@pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.__name__)
@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("prompting", [False, True])
def test_every_host_equals_the_official_vector(host, number, prompting):
    messages, mode, expected = vector(number)
    assert host(messages, thinking_mode=mode, add_generation_prompt=prompting) == expected


@pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.__name__)
def test_tools_as_a_variable_equal_tools_on_the_system_message(host):
    given = json.loads((VECTORS / "test_input_1.json").read_text(encoding="utf-8"))
    assert "tools" not in given["messages"][0]
    assert host(given["messages"], tools=given["tools"], enable_thinking=True) == vector(1)[2]
    assert render(given["messages"], tools=given["tools"]) == vector(1)[2]


@pytest.mark.parametrize("number", (1, 3))
def test_arguments_given_as_a_mapping_give_the_same_bytes(number):
    messages, mode, expected = vector(number)
    for message in messages:
        for call in message.get("tool_calls") or []:
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    assert by_renderer(messages, thinking_mode=mode) == expected


@pytest.mark.parametrize("number", NUMBERS)
def test_the_judge_equals_the_official_vector(number):
    messages, mode, expected = vector(number)
    assert encode(messages, mode) == expected
