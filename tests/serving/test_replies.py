"""Replies as models really write them, however the text is cut into tokens: reasoning, calls, stop words, marks.

Sources: vllm-project/vllm 45862 (`</think>` left out before a call), 40801 (tags in the text), 41241 (quoted numbers,
text that was held back and lost); ggml-org/llama.cpp 25891.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds4convert.inference import chat
from ds4convert.inference.chat import ReplyError, read_calls
from ds4convert.serving.http.responses import finite
from ds4convert.serving.reply import CALLS, CONTENT, REASONING, Marks, Piece, Splitter, StopText
from tests.serving.scripted import MARKS, Wire, serving

pytest.importorskip("mlx.core")

D = chat.DSML


def value(key: str, text: str, is_text: str = "false") -> str:
    return f'<{D}parameter name="{key}" string="{is_text}">{text}</{D}parameter>\n'


def call(*values: str, name: str = "add") -> str:
    return f'<{D}invoke name="{name}">\n{"".join(values)}</{D}invoke>\n'


def block(*calls: str) -> str:
    return f"<{D}tool_calls>\n{''.join(calls)}</{D}tool_calls>"


ONE = block(call(value("a", "2")))

REPLIES: dict[str, tuple[str, str, str, list[dict[str, Any]]]] = {
    "as trained": ("I add</think>Sure\n\n" + ONE, "I add", "Sure", [{"a": 2}]),
    "no end of thinking": ("I add\n\n" + ONE, "I add", "", [{"a": 2}]),
    "no line before the block": ("x</think>Sure" + ONE, "x", "Sure", [{"a": 2}]),
    "two calls": ("x</think>" + block(call(value("a", "2")), call(value("b", "[1]"))), "x", "", [{"a": 2}, {"b": [1]}]),
    "two blocks": ("x</think>" + ONE + "\n\n" + ONE, "x", "", [{"a": 2}, {"a": 2}]),
    "no values": ("x</think>" + block(call()), "x", "", [{}]),
    "a quoted number stays a text": ("x</think>" + block(call(value("a", "2", "true"))), "x", "", [{"a": "2"}]),
    "no JSON is a text": ("x</think>" + block(call(value("a", "Rome"))), "x", "", [{"a": "Rome"}]),
    "no number of JSON": ("x</think>" + block(call(value("a", "NaN"))), "x", "", [{"a": "NaN"}]),
    "line ends left out": ("x</think>" + ONE.replace("\n", ""), "x", "", [{"a": 2}]),
    "indented": ("x</think>" + ONE.replace("\n", "\n  "), "x", "", [{"a": 2}]),
    "the block's end in a value": (
        "x</think>" + block(call(value("a", f"</{D}tool_calls>", "true"))), "x", "", [{"a": f"</{D}tool_calls>"}]),
    "less at the end": ("x</think>is 2 <", "x", "is 2 <", []),
    "lines and less at the end": ("x</think>is 2\n\n<", "x", "is 2\n\n<", []),
    "half a mark at the end": ("x</think>is 2 <｜DSM", "x", "is 2 <｜DSM", []),
    "half an end of thinking": ("is 2 </thi", "is 2 </thi", "", []),
    "less in the middle": ("x</think>1 < 2\n\n< 3", "x", "1 < 2\n\n< 3", []),
    "a stray tag": (f"x</think>a</{D}invoke>b", "x", "ab", []),
    "thinking again": ("x</think>a<think>b</think>c", "xb", "ac", []),
}  # fmt: skip

CUT = {
    "in the opening": f"<{D}tool_ca",
    "after the opening": f"<{D}tool_calls>",
    "in a value": ONE[:90],
    "after a call": ONE[: -len(f"</{D}tool_calls>")],
    "a call without a block": call(value("a", "2")),
    "malformed": ONE.replace("string=", "text="),
    "a repeated key": block(call(value("a", "1"), value("a", "2"))),
    "empty": block(),
}


@pytest.fixture(scope="module")
def wire() -> Iterator[Wire]:
    with serving() as found:
        yield found


def told(wire: Wire, text: str, size: int, stream: bool, reason: str = "stop", **fields: Any) -> Any:
    """(reasoning, content, arguments, finish reason) of a reply, and the ids of calls are good."""
    texts = [text[n : n + size] for n in range(0, len(text), size)]
    answer = wire.chat(texts, reason, stream=stream, **fields)
    assert answer.status == 200
    if not stream:
        choice = answer.json["choices"][0]
        message, calls = choice["message"], choice["message"].get("tool_calls", [])
        parts = message.get("reasoning") or "", message["content"] or "", calls, choice["finish_reason"]
        assert message.get("reasoning") == message.get("reasoning_content")
    else:
        deltas = [c for e in answer.events for c in e["choices"]]
        assert [c["delta"].get("role") for c in deltas] == ["assistant"] + [None] * (len(deltas) - 1), "told once"
        calls = [k for c in deltas for k in c["delta"].get("tool_calls", [])]
        assert [k["index"] for k in calls] == list(range(len(calls)))
        assert [c["finish_reason"] for c in deltas[:-1]] == [None] * (len(deltas) - 1)
        texts = ["".join(c["delta"].get(k) or "" for c in deltas) for k in ("reasoning", "content")]
        parts = (*texts, calls, deltas[-1]["finish_reason"])
    assert len({k["id"] for k in calls}) == len(calls) and all(k["type"] == "function" for k in calls)
    return parts[0], parts[1], [json.loads(k["function"]["arguments"]) for k in parts[2]], parts[3]


@pytest.mark.parametrize("name", REPLIES)
@pytest.mark.parametrize("stream", [False, True])
def test_nothing_that_was_said_is_lost_and_no_mark_is_told(wire: Wire, name: str, stream: bool) -> None:
    text, reasoning, content, arguments = REPLIES[name]
    for size in (1, 7, 1000):
        wanted = (reasoning, content, arguments, "tool_calls" if arguments else "stop")
        assert told(wire, text, size, stream) == wanted


@pytest.mark.parametrize("name", CUT)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("reason", ["stop", "length"])
def test_an_unfinished_call_is_none(wire: Wire, name: str, stream: bool, reason: str) -> None:
    for size in (3, 1000):
        reasoning, content, arguments, finish = told(wire, "x</think>a\n\n" + CUT[name], size, stream, reason)
        assert (reasoning, arguments, finish) == ("x", [], reason)
        assert content.startswith("a") and D not in content


def test_a_finished_call_before_one_that_is_cut_off_does_not_make_the_reply_whole(wire: Wire) -> None:
    for stream in (False, True):
        *_, arguments, finish = told(wire, "x</think>" + ONE + "\n\n" + ONE[:60], 5, stream)
        assert arguments == [{"a": 2}] and finish == "stop"


def test_one_call_at_most_where_that_is_asked_for(wire: Wire) -> None:
    for text in (block(call(value("a", "2")), call(value("a", "3"))), ONE + "\n\n" + ONE.replace("2", "3")):
        for stream in (False, True):
            assert told(wire, "</think>" + text, 9, stream, parallel_tool_calls=False)[2:] == ([{"a": 2}], "tool_calls")


def test_reasoning_that_is_not_wanted_is_not_told(wire: Wire) -> None:
    for stream in (False, True):
        for fields in ({"reasoning": {"exclude": True}}, {"include_reasoning": False}):
            assert told(wire, "secret thought</think>said", 3, stream, **fields)[:2] == ("", "said")
            texts = ["secret", " thought", "</think>", "said"]
            answer = wire.chat(texts, stream=stream, logprobs=True, **fields)
            assert b"thought" not in answer.body and b"token0" not in answer.body and b"token3" in answer.body


def test_texts_are_not_split(wire: Wire) -> None:
    wire.script.texts, wire.script.reason = ["<thi", "nk>a</think>", ONE], "stop"
    for stream in (False, True):
        answer = wire.ask("POST", "/v1/completions", {"prompt": "x", "stream": stream})
        choices = [e["choices"][0] for e in answer.events] if stream else answer.json["choices"]
        assert "".join(c["text"] for c in choices) == "<think>a</think>" + ONE


@pytest.mark.parametrize("logprob", [-math.inf, math.nan, math.inf, -1e9])
@pytest.mark.parametrize("stream", [False, True])
def test_json_has_no_infinity(wire: Wire, logprob: float, stream: bool) -> None:
    wire.script.logprob = logprob
    try:
        answer = wire.chat(["a", "b"], stream=stream, logprobs=True, top_logprobs=2)
        text = wire.ask("POST", "/v1/completions", {"prompt": "x", "stream": stream, "logprobs": 2})
    finally:
        wire.script.logprob = -0.5
    for found in (answer.body, text.body):
        assert b"Infinity" not in found and b"NaN" not in found and b"-9999.0" in found
    assert finite(-2.5) == -2.5


# the mechanisms


@pytest.mark.parametrize("size", [1, 2, 3, 50])
def test_a_stop_word_is_found_however_the_text_is_cut(size: int) -> None:
    text, stop, seen = "aab aba abab stop", StopText(["abab", "stop"]), []
    for at in range(0, len(text), size):
        seen += stop.push(Piece(text[at : at + size], at, 0.0))
        if stop.is_found:
            break
    assert "".join(p.text for p in seen) == "aab aba "
    assert all(p.is_told == (p.token < len("aab aba ")) for p in seen)


def test_text_that_only_begins_a_stop_word_comes_out_at_the_end() -> None:
    stop = StopText(["stop"])
    assert [p.text for p in stop.push(Piece("a st", 1, 0.0))] == []
    assert [p.text for p in stop.push(Piece("o", 2, 0.0))] == []
    assert [p.text for p in stop.rest()] == ["a st", "o"] and not stop.is_found


@settings(max_examples=300)
@given(
    st.lists(
        st.sampled_from(["a", "b", "ab", "c", "", "<", "｜DSML｜", "</think>", "\n\n", "tool_calls>"]), max_size=12
    )
)
def test_what_is_split_adds_up(pieces: list[str]) -> None:
    whole, cut = (Splitter(MARKS, REASONING) for _ in range(2))
    one, many = list(whole.push("".join(pieces))), []
    for piece in pieces:
        many += cut.push(piece)
    for said in (one, many):
        assert all(D not in s.text or s.state == CALLS for s in said)
    one, many = one + whole.end(), many + cut.end()
    for state in (REASONING, CONTENT, CALLS):
        assert "".join(s.text for s in one if s.state == state) == "".join(s.text for s in many if s.state == state)


def test_marks_of_another_tokenizer() -> None:
    marks = Marks("<think>", "</think>", "<call>", "</call>", lambda text: [{"name": text, "arguments": "{}"}])
    splitter = Splitter(marks, CONTENT)
    said = [s for c in "a<call>f</call>b<｜DSML｜" for s in splitter.push(c)] + splitter.end()
    assert [s.text for s in said if s.state == CALLS] == ["f"]
    assert "".join(s.text for s in said if s.state == CONTENT) == "ab<｜DSML｜"


def test_calls_are_read_with_their_tags_alone() -> None:
    assert read_calls("\n" + ONE + "\n") == [{"name": "add", "arguments": '{"a": 2}'}]
    text = block(call(value("a", ' "x"\n<b>', "true"), value("b", " {}")), call(name='q"r'))
    assert read_calls(text) == [
        {"name": "add", "arguments": '{"a": " \\"x\\"\\n<b>", "b": {}}'}, {"name": 'q"r', "arguments": "{}"},
    ]  # fmt: skip
    for bad in (*list(CUT.values()), ONE + "x", "x" + ONE, ONE + ONE):
        with pytest.raises(ReplyError):
            read_calls(bad)


@pytest.mark.parametrize("size", [1, 9, 1000])
def test_the_openai_client_gets_calls_from_a_stream_and_from_a_whole_response(wire: Wire, size: int) -> None:
    openai = pytest.importorskip("openai")
    client: Any = openai.OpenAI(base_url=f"http://localhost:{wire.port}/v1", api_key="none", max_retries=0)
    text = "hm</think>Sure\n\n" + block(call(value("a", "2")), call(value("s", "x y", "true"), name="find"))
    wire.script.texts, wire.script.reason = [text[n : n + size] for n in range(0, len(text), size)], "stop"
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    tools = [{"type": "function", "function": {"name": n, "parameters": schema}} for n in ("add", "find")]
    ask: Any = {"model": "demo", "messages": [{"role": "user", "content": "2+3"}], "tools": tools}
    whole = client.chat.completions.create(**ask).choices[0]
    with client.chat.completions.stream(**ask) as stream:
        streamed = stream.get_final_completion().choices[0]
    for choice in (whole, streamed):
        assert choice.finish_reason == "tool_calls" and choice.message.content == "Sure"
        assert choice.message.reasoning_content == "hm"
        found = [(c.type, c.function.name, json.loads(c.function.arguments)) for c in choice.message.tool_calls]
        assert found == [("function", "add", {"a": 2}), ("function", "find", {"s": "x y"})]
        history = [*ask["messages"], choice.message.to_dict()]  # as clients send it back
        results = [{"role": "tool", "tool_call_id": c.id, "content": "5"} for c in choice.message.tool_calls]
        client.chat.completions.create(model="demo", tools=tools, messages=[*history, *results])
        sent = wire.script.seen[-1].asked.messages
        assert [c["function"]["arguments"] for c in sent[1]["tool_calls"]] == [{"a": 2}, {"s": "x y"}]
