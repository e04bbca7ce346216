"""What clients get: the same text with and without the head, streamed or not, and what the fields ask for."""

from __future__ import annotations

from typing import Any

import pytest

from tests.serving.running import Answer, Running

PROMPT = "Now after many days the word of the LORD came"


def said(answer: Answer) -> str:
    """The text of a stream, reasoning included."""
    out = ""
    for event in answer.events:
        for choice in event["choices"]:
            delta = choice.get("delta", choice)
            out += delta.get("text") or delta.get("reasoning") or delta.get("content") or ""
    return out


@pytest.fixture(params=["mtp", "plain"])
def server(request: pytest.FixtureRequest) -> Running:
    found: Running = request.getfixturevalue(request.param)
    return found


@pytest.mark.parametrize("stream", [False, True])
def test_openai_clients_get_the_same_text_with_and_without_the_head(mtp: Running, plain: Running, stream: bool) -> None:
    openai = pytest.importorskip("openai")
    texts: dict[str, list[str]] = {}
    for name, server in (("mtp", mtp), ("plain", plain)):
        client: Any = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
        model = client.models.list().data[0].id
        messages = [{"role": "system", "content": "Speak."}, {"role": "user", "content": PROMPT}]
        chat = client.chat.completions.create(
            model=model, messages=messages, max_tokens=40, temperature=0, stream=stream
        )
        text = client.completions.create(model=model, prompt=PROMPT, max_tokens=60, temperature=0, stream=stream)
        if stream:
            deltas = [c.choices[0].delta for c in chat if c.choices]
            parts = ["".join((d.content or "") + (getattr(d, "reasoning", None) or "") for d in deltas)]
            texts[name] = [*parts, "".join(c.choices[0].text for c in text if c.choices)]
        else:
            message = chat.choices[0].message
            texts[name] = [(message.content or "") + (getattr(message, "reasoning", None) or ""), text.choices[0].text]
            assert text.usage.completion_tokens == 60 and chat.usage.completion_tokens == 40
    assert texts["mtp"] == texts["plain"]
    assert all(texts["mtp"])


def test_a_request_may_leave_the_head_out_and_the_next_one_drafts_as_before(mtp: Running, plain: Running) -> None:
    """State that was kept before stays good for both: the head knows nothing of a reply that it had no part in."""
    first = mtp.text(PROMPT, max_tokens=24).json
    without = mtp.text(PROMPT, max_tokens=24, mtp=False).json
    again = mtp.text(PROMPT, max_tokens=24).json
    assert first["choices"][0]["text"] == without["choices"][0]["text"] == again["choices"][0]["text"]
    told = without["usage"]["ds4convert"]
    assert (told["mtp_active"], told["drafted"], told["passes"]) == (False, 0, 23) and "drafted_at" not in told
    assert again["usage"]["ds4convert"]["accepted"] == first["usage"]["ds4convert"]["accepted"] > 0
    longer = PROMPT + without["choices"][0]["text"]
    assert mtp.text(longer, max_tokens=8).json["usage"]["ds4convert"]["accepted"] > 0
    assert plain.text(PROMPT, max_tokens=8, mtp=True).json["usage"]["ds4convert"]["mtp_active"] is False


def test_the_model_tells_pages_what_may_be_set(mtp: Running, plain: Running) -> None:
    [told] = [m["ds4convert"] for m in mtp.ask("GET", "/v1/models").json["data"]]
    assert (told["mtp_active"], told["draft_depth"], told["thinks"]) == (True, 2, True)
    fields = told["fields"]
    assert fields["temperature"] == {"min": 0, "max": 100, "whole": False, "default": 0.0}
    assert fields["max_tokens"]["max"] == told["context"] and fields["repetition_penalty"]["least"] == 0.1
    assert plain.ask("GET", "/v1/models").json["data"][0]["ds4convert"]["draft_depth"] == 0


def test_usage_tells_what_was_drafted_and_accepted(mtp: Running, plain: Running) -> None:
    usage = mtp.text(PROMPT, max_tokens=30).json["usage"]
    ours = usage["ds4convert"]
    assert ours["mtp_active"] and 0 < ours["accepted"] <= ours["drafted"]
    assert (sum(ours["drafted_at"]), sum(ours["accepted_at"])) == (ours["drafted"], ours["accepted"])
    assert usage["completion_tokens"] == 30 == 1 + ours["passes"] + ours["accepted"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + 30
    assert plain.text(PROMPT).json["usage"]["ds4convert"] == {
        "mtp_active": False, "drafted": 0, "accepted": 0, "passes": 15, "acceptance": None, "tokens_per_pass": 1.0,
    }  # fmt: skip


def test_a_stream_marks_the_tokens_that_the_head_drafted(mtp: Running) -> None:
    events = mtp.text(PROMPT, max_tokens=30, stream=True, stream_options={"include_usage": True}).events
    tokens = [t for e in events if "ds4convert" in e for t in e["ds4convert"]["tokens"]]
    usage = events[-1]["usage"]
    assert len(tokens) == usage["completion_tokens"] == 30
    assert sum(t["drafted"] for t in tokens) == usage["ds4convert"]["accepted"] > 0
    assert "".join(t["text"] for t in tokens) == mtp.text(PROMPT, max_tokens=30).json["choices"][0]["text"]


def test_a_stream_and_a_whole_response_say_the_same(server: Running) -> None:
    whole = server.text(PROMPT, max_tokens=25).json["choices"][0]
    assert said(server.text(PROMPT, max_tokens=25, stream=True)) == whole["text"]
    assert whole["finish_reason"] == "length"


@pytest.mark.parametrize("stop", ["Moses", ["absent", "\n"], "h"])
def test_text_ends_before_the_first_stop_word(server: Running, stop: Any) -> None:
    full = server.text(PROMPT, max_tokens=60).json["choices"][0]["text"]
    places = [at for word in ([stop] if isinstance(stop, str) else stop) if (at := full.find(word)) >= 0]
    answer = server.text(PROMPT, max_tokens=60, stop=stop).json
    assert answer["choices"][0]["text"] == (full[: min(places)] if places else full)
    assert answer["choices"][0]["finish_reason"] == ("stop" if places else "length")
    assert said(server.text(PROMPT, max_tokens=60, stop=stop, stream=True)) == answer["choices"][0]["text"]


def test_one_seed_draws_one_text_and_another_another(server: Running) -> None:
    texts = [server.text(PROMPT, seed=s, temperature=1.0, top_p=0.95).json["choices"][0]["text"] for s in (1, 1, 2, 3)]
    assert texts[0] == texts[1]
    assert len(set(texts)) > 1


@pytest.mark.parametrize(
    "fields",
    [{"top_k": 5}, {"min_p": 0.1}, {"xtc_probability": 0.5}, {"repetition_penalty": 1.3}, {"logit_bias": {"5": -9}}],
)
def test_sampling_options_and_processors_decode_with_the_head(mtp: Running, fields: dict[str, Any]) -> None:
    usage = mtp.text(PROMPT, temperature=0.8, **fields).json["usage"]
    assert usage["completion_tokens"] <= 16 and usage["ds4convert"]["drafted"] > 0


def test_penalties_give_the_same_greedy_text_with_and_without_the_head(mtp: Running, plain: Running) -> None:
    fields = {"repetition_penalty": 1.5, "presence_penalty": 0.5, "max_tokens": 30}
    assert mtp.text(PROMPT, **fields).json["choices"] == plain.text(PROMPT, **fields).json["choices"]


def test_log_probabilities_are_those_of_the_backbone(mtp: Running, plain: Running) -> None:
    for server in (mtp, plain):
        content = server.chat("Speak.", logprobs=True, top_logprobs=3).json["choices"][0]["logprobs"]["content"]
        assert len(content) == 16 and all(len(c["top_logprobs"]) == 3 for c in content)
    rows = [s.text(PROMPT, logprobs=1).json["choices"][0]["logprobs"]["content"] for s in (mtp, plain)]
    assert [r["id"] for r in rows[0]] == [r["id"] for r in rows[1]]
    assert [r["logprob"] for r in rows[0]] == pytest.approx([r["logprob"] for r in rows[1]], abs=1e-3)


def test_thinking_is_a_choice(mtp: Running) -> None:
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    thought, spoken = (mtp.chat("Speak.", **f).json["choices"][0]["message"] for f in ({}, off))
    assert thought["reasoning"] and thought["content"] is None
    assert spoken["content"] and "reasoning" not in spoken
    assert "reasoning" not in mtp.chat("Speak.", reasoning_effort="none").json["choices"][0]["message"]


def test_tools_are_told_to_the_model(mtp: Running) -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
    with_tool = mtp.chat("Speak.", tools=[tool]).json["usage"]["prompt_tokens"]
    assert with_tool > mtp.chat("Speak.").json["usage"]["prompt_tokens"] + 100
    assert mtp.chat("Speak.", tools=[tool], tool_choice="none").json["usage"]["prompt_tokens"] < with_tool
