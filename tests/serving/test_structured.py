"""Replies that keep to a JSON schema: right by an independent validator, and the same with the head as without."""

from __future__ import annotations

import json
import random
import sys
from typing import Any

import jsonschema
import mlx.core as mx
import pytest

from ds4convert.serving import structured, validation
from ds4convert.serving.refused import Refused
from tests.serving.running import Running

PROMPT = "Now after many days the word of the LORD came"
SCHEMAS: dict[str, dict[str, Any]] = {
    "enums": {
        "type": "object",
        "properties": {
            "mood": {"enum": ["glad", "sorrowful"]},
            "days": {"type": "integer", "minimum": 1, "maximum": 40},
        },
        "required": ["mood", "days"],
        "additionalProperties": False,
    },
    "nested": {
        "type": "object",
        "properties": {
            "names": {"type": "array", "items": {"type": "string", "maxLength": 6}, "minItems": 2, "maxItems": 3},
            "child": {"anyOf": [{"type": "null"}, {"type": "boolean"}]},
        },
        "required": ["names", "child"],
        "additionalProperties": False,
    },
    "array": {"type": "array", "items": {"const": "Amen"}, "minItems": 1, "maxItems": 2},
}


def form(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}


def content(server: Running, schema: dict[str, Any], **options: Any) -> str:
    options = {"max_tokens": 400, "temperature": 0, "thinking": False} | options
    answer = server.chat(PROMPT, response_format=form(schema), **options).json
    assert answer["choices"][0]["finish_reason"] == "stop", str(answer)[:2000]
    return str(answer["choices"][0]["message"]["content"])


@pytest.mark.parametrize("name", ["enums", "array", pytest.param("nested", marks=pytest.mark.nightly)])
def test_the_reply_keeps_to_its_schema_and_the_head_changes_nothing(name: str, mtp: Running, plain: Running) -> None:
    found = content(mtp, SCHEMAS[name])
    jsonschema.validate(json.loads(found), SCHEMAS[name])
    assert found == content(mtp, SCHEMAS[name], mtp=False) == content(plain, SCHEMAS[name])


def test_sampled_replies_keep_to_it_as_well(mtp: Running) -> None:
    said = {content(mtp, SCHEMAS["nested"], temperature=1.2, seed=n) for n in range(3)}
    for found in said:
        jsonschema.validate(json.loads(found), SCHEMAS["nested"])
    assert len(said) > 1


def test_a_stream_and_raw_text_keep_to_it(mtp: Running) -> None:
    options = {"max_tokens": 200, "temperature": 0, "response_format": form(SCHEMAS["enums"])}
    deltas = [c["delta"] for e in mtp.chat(PROMPT, stream=True, thinking=False, **options).events for c in e["choices"]]
    streamed = "".join(d.get("content") or "" for d in deltas)
    raw = mtp.text(PROMPT, **options).json["choices"][0]["text"]
    for found in (streamed, raw):
        jsonschema.validate(json.loads(found), SCHEMAS["enums"])


def test_any_object_will_do_where_no_schema_is_given(mtp: Running) -> None:
    answer = mtp.chat(
        PROMPT, thinking=False, max_tokens=40, temperature=0, response_format={"type": "json_object"}
    ).json
    assert answer["choices"][0]["message"]["content"].startswith("{")
    assert mtp.chat(PROMPT, max_tokens=4, response_format={"type": "text"}).status == 200


def test_other_likely_tokens_are_numbers_that_json_has(mtp: Running) -> None:
    options = {"max_tokens": 100, "temperature": 0, "thinking": False, "logprobs": True, "top_logprobs": 20}
    answer = mtp.chat(PROMPT, response_format=form(SCHEMAS["array"]), **options)
    told = json.loads(json.dumps(answer.json, allow_nan=False))["choices"][0]["logprobs"]["content"]
    assert told and any(len(t["top_logprobs"]) < 20 for t in told), "what may not follow is not told as likely"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"type": "xml"}, "expected the type"),
        ("json", "expected the type"),
        ({"type": "json_schema"}, "expected the type"),
        ({"type": "json_schema", "json_schema": {"schema": []}}, "expected the type"),
        (form({"type": "strange"}), "this schema cannot be kept"),
        (form({"$ref": "#/nowhere"}), "this schema cannot be kept"),
        (form({"type": "string", "pattern": "(["}), "this schema cannot be kept"),
        (form({"allOf": [{"type": "string"}, {"type": "integer"}]}), "this schema cannot be kept"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_kept_is_refused_before_a_word(value: Any, words: str, stream: bool, mtp: Running) -> None:
    answer = mtp.chat(PROMPT, response_format=value, stream=stream)
    assert answer.status == 422 and words in answer.body.decode(), answer.body
    assert mtp.chat(PROMPT, max_tokens=2).status == 200


def test_tools_and_a_schema_exclude_each_other(mtp: Running) -> None:
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    asked = {"tools": [tool], "response_format": form(SCHEMAS["array"]), "thinking": False, "temperature": 0}
    assert mtp.chat(PROMPT, **asked).status == 422
    answer = mtp.chat(PROMPT, tool_choice="none", max_tokens=200, **asked).json
    jsonschema.validate(json.loads(answer["choices"][0]["message"]["content"]), SCHEMAS["array"])


def test_without_the_library_the_refusal_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(Refused, match=r"pip install 'ds4convert\[schema\]'"):
        structured.Grammars(None, 10).of({"type": "object"})


# --- the processor alone ---------------------------------------------------------------------------------------------


class Digits:
    """A matcher for three tokens 0 to 4 in rising order, then the end (5), by the methods that are used of llguidance."""

    def __init__(self) -> None:
        self.taken: list[int] = []

    def allowed(self) -> set[int]:
        if len(self.taken) == 3:
            return {5}
        return {t for t in range(5) if not self.taken or t > self.taken[-1]} if 5 not in self.taken else set()

    def validate_tokens(self, tokens: list[int]) -> int:
        before, count = list(self.taken), 0
        for token in tokens:
            if token not in self.allowed():
                break
            self.taken.append(token)
            count += 1
        self.taken = before
        return count

    def consume_tokens(self, tokens: list[int]) -> bool:
        self.taken += tokens
        return True

    def rollback(self, count: int) -> bool:
        del self.taken[len(self.taken) - count :]
        return True

    def compute_logit_bias(self) -> bytes:
        return bytes(200 if t in self.allowed() else 0 for t in range(6))

    def is_error(self) -> bool:
        return False


def test_in_any_order_of_histories_the_mask_is_that_of_a_fresh_matcher() -> None:
    """The loop asks for rows of drafts that are turned down, and for shorter histories after longer ones."""
    rng, kept, prompt = random.Random(7), structured.Kept(Digits(), 2), [9, 9]
    for _ in range(400):
        said = [rng.randrange(6) for _ in range(rng.randrange(5))]
        fresh = Digits()
        whole = fresh.validate_tokens(said) == len(said)
        fresh.consume_tokens(said[: fresh.validate_tokens(said)])
        row = kept(mx.array([*prompt, *said]), mx.zeros((1, 6)))
        free = {t for t in range(6) if row[0, t].item() == 0}
        assert free == (fresh.allowed() or set(range(6)) if whole else set(range(6))), said


def test_reasoning_is_free_until_its_mark() -> None:
    kept = structured.Kept(Digits(), 1, [7, 8], [5])
    free = mx.zeros((1, 6))
    row = kept(mx.array([1, 5, 5, 7]), free)
    assert [n for n in range(6) if row[0, n].item() == 0] == [0, 1, 2, 3, 4], "an end comes behind the answer alone"
    row = kept(mx.array([1, 5, 5, 7, 8, 2]), free)
    assert [n for n in range(6) if row[0, n].item() == 0] == [3, 4], "rising after 2"
    assert structured.after([5, 7, 8, 4], [7, 8]) == 3 and structured.after([5, 7], [7, 8]) is None
    assert structured.after([5], []) == 0


def test_the_fields_are_read_from_the_request_alone() -> None:
    limits = validation.Limits(10, 5, 100, 50, ("m",), {})
    body = {"messages": [{"role": "user", "content": "x"}], "response_format": form(SCHEMAS["array"])}
    asked = validation.parse(json.dumps(body).encode(), validation.CHAT, limits)
    assert asked.schema == SCHEMAS["array"]
