"""Real clients against the demo checkpoint, with and without drafting: the openai client, raw sockets, curl.

The forms are those of the openai client's own types; a stream is put together by its own helper, which adds up every
text of the deltas (openai/lib/streaming/_deltas.py). Other sources: theroyallab/tabbyAPI 141 and ml-explore/mlx-lm 1630
(log-probabilities of other tokens, or dropped from streams); cline/cline 13194 (the words of a full context).
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from queue import Queue
from types import SimpleNamespace
from typing import Any

import openai
import pytest

from ds4convert.serving.metrics import Metrics
from ds4convert.serving.refused import Refused
from ds4convert.serving.seam import Decoder, Job, Ticket
from ds4convert.serving.validation import TEXT, Asked
from tests.serving.running import SLOW_END, Running

pytest.importorskip("openai")

PROMPT = "Now after many days the word of the LORD came"
MESSAGES: Any = [{"role": "user", "content": PROMPT}]
OFF: Any = {"thinking": {"type": "disabled"}}


@pytest.fixture(params=["mtp", "plain"])
def server(request: pytest.FixtureRequest) -> Running:
    found: Running = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def client(server: Running) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_log_probabilities_are_those_of_the_text_whole_and_streamed(client: Any) -> None:
    ask: Any = {"model": "demo-mlx", "messages": MESSAGES, "max_tokens": 12, "logprobs": True, "extra_body": OFF}
    for sampled in ({"temperature": 0}, {"temperature": 1.5, "seed": 3}):
        whole = client.chat.completions.create(**ask, **sampled, top_logprobs=3).choices[0]
        entries = whole.logprobs.content
        assert "".join(e.token for e in entries) == whole.message.content and len(entries) == 12
        assert b"".join(bytes(e.bytes) for e in entries) == whole.message.content.encode()
        for entry in entries:
            tops = [t.logprob for t in entry.top_logprobs]
            assert len(tops) == 3 and tops == sorted(tops, reverse=True) and entry.logprob <= tops[0] <= 0
            same = [t.logprob for t in entry.top_logprobs if t.token == entry.token]
            assert not same or same == [entry.logprob]
        bare = client.chat.completions.create(**ask, **sampled).choices[0].logprobs.content
        assert [(e.token, e.logprob) for e in bare] == [(e.token, e.logprob) for e in entries]
        chunks = list(client.chat.completions.create(**ask, **sampled, top_logprobs=3, stream=True))
        streamed = [e for c in chunks for x in c.choices if x.logprobs for e in x.logprobs.content]
        assert streamed == entries
        for chunk in chunks[:-1]:
            for choice in chunk.choices:
                assert "".join(e.token for e in choice.logprobs.content) == choice.delta.content
    assert any(e.token not in [t.token for t in e.top_logprobs] for e in entries), (
        "a sampled token is none of the likeliest"
    )


def test_log_probabilities_of_texts_have_the_older_form(client: Any) -> None:
    ask: Any = {"model": "demo-mlx", "prompt": PROMPT, "max_tokens": 8, "logprobs": 2, "temperature": 1.5, "seed": 5}
    whole = client.completions.create(**ask).choices[0]
    found = whole.logprobs
    assert "".join(found.tokens) == whole.text
    assert found.text_offset == [len("".join(found.tokens[:n])) for n in range(8)]
    assert all(
        t in top and top[t] == p
        for t, p, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True)
    )
    parts = [c.choices[0].logprobs for c in client.completions.create(**ask, stream=True)]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [x for p in parts if p for x in getattr(p, name)] == getattr(found, name)


def test_the_clients_own_helper_puts_a_stream_together(client: Any) -> None:
    for extra in ({}, OFF):
        ask: Any = {"model": "demo-mlx", "messages": MESSAGES, "max_tokens": 12}
        long = client.chat.completions.create(**ask, extra_body=extra).choices[0].message
        ask["stop"] = [(long.content or long.reasoning_content)[-9:]]  # the helper refuses what max_tokens cut off
        with client.chat.completions.stream(**ask, extra_body=extra) as stream:
            final = stream.get_final_completion().choices[0]
        whole = client.chat.completions.create(**ask, extra_body=extra).choices[0]
        assert final.message.role == "assistant" and final.finish_reason == whole.finish_reason == "stop"
        assert (final.message.content or None) == whole.message.content
        thought = [getattr(x.message, "reasoning_content", None) for x in (final, whole)]
        assert thought[0] == thought[1] and bool(thought[0]) == (extra == {})


def test_several_prompts_and_token_ids_are_continued_in_their_order(client: Any) -> None:
    ask: Any = {"model": "demo-mlx", "max_tokens": 6, "temperature": 0}
    single = [client.completions.create(**ask, prompt=p) for p in (PROMPT, [40, 50, 60], "In the")]
    texts = [s.choices[0].text for s in single]
    several = client.completions.create(**ask, prompt=[PROMPT, [40, 50, 60], "In the"])
    assert [(c.index, c.text) for c in several.choices] == list(enumerate(texts))
    assert several.usage.prompt_tokens == sum(s.usage.prompt_tokens for s in single)
    assert several.usage.completion_tokens == 18 and single[1].usage.prompt_tokens == 3
    assert [c.text for c in client.completions.create(**ask, prompt=[[40, 50, 60]]).choices] == texts[1:2]
    streamed = ["", "", ""]
    options = {"include_usage": True}
    for chunk in client.completions.create(
        **ask, prompt=[PROMPT, [40, 50, 60], "In the"], stream=True, stream_options=options
    ):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == texts and chunk.usage.completion_tokens == 18


def test_more_tokens_than_the_context_leaves_are_what_it_leaves(folder: Path, tmp_path: Path) -> None:
    small = tmp_path / "small-context"
    shutil.copytree(folder, small)
    config = json.loads((small / "config.json").read_text())
    config["max_position_embeddings"] = 64
    (small / "config.json").write_text(json.dumps(config))
    server = Running(small, tmp_path / "log", "--default-max-tokens", 9)
    try:
        assert server.text(PROMPT, max_tokens=None).json["usage"]["completion_tokens"] == 9
        for wish in ({"max_tokens": 32000}, {"max_tokens": -1}, {"max_completion_tokens": 32000, "max_tokens": None}):
            usage = server.text(PROMPT, **wish).json["usage"]
            assert usage["total_tokens"] == 64 > usage["prompt_tokens"] > 5
        full = server.text([40] * 64).json["error"]
        assert full["code"] == "context_length_exceeded" and "maximum context length is 64" in full["message"]
        before = server.peak_bytes()
        for body in (server.text("a " * 1_900_000), server.chat("a " * 1_900_000)):
            assert body.json["error"]["code"] == "context_length_exceeded"
        assert server.peak_bytes() < before + (60 << 20), "a text is not taken apart before it is known that it may fit"
        assert server.text([40] * 64).status == 400
        assert server.text([40] * 63, max_tokens=5).json["usage"]["completion_tokens"] == 1
        assert "Traceback" not in server.log
    finally:
        assert server.end() == 0


def test_the_time_for_draining_ends_a_stream_and_its_client_is_told(folder: Path, tmp_path: Path) -> None:
    server = Running(folder, tmp_path / "log", "--drain-seconds", 1)
    connection = server.raw(server.post_bytes({"prompt": PROMPT, "max_tokens": 4000, "stream": True}))
    received = connection.recv(100)
    while b'"text"' not in received:
        received += connection.recv(4096)
    waiting = server.raw(server.post_bytes({"prompt": PROMPT, "max_tokens": 4000}))
    server.wait_for("queue_waiting", 1)
    server.process.send_signal(signal.SIGTERM)
    while part := connection.recv(65536):
        received += part
    assert json.loads(received.rstrip().rpartition(b"data: ")[2])["error"]["code"] == "draining"
    assert b"[DONE]" not in received
    assert b" 503 " in waiting.recv(100)
    assert server.process.wait(SLOW_END) == 0
    assert "Ending what still runs after 1 s" in server.log and "Traceback" not in server.log


@pytest.mark.sampled(2)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGTERM])
def test_signals_end_an_idle_server_at_once(folder: Path, tmp_path: Path, number: int) -> None:
    server = Running(folder, tmp_path / "log")
    silent = server.raw(b"")  # as browsers open connections that they may need
    assert server.ask("GET", "/health").status == 200  # connections are taken in order: the silent one has been
    server.process.send_signal(number)
    assert server.process.wait(SLOW_END) == 0
    assert "Ending what still runs" not in server.log, "nothing ran, so nothing was waited for"
    assert "Traceback" not in server.log
    silent.close()


def test_curl_sends_chunks_and_the_log_has_the_request(server: Running) -> None:
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    body = json.dumps({"prompt": PROMPT, "max_tokens": 3})
    headers = ["-H", "Content-Type: application/json", "-H", "Transfer-Encoding: chunked"]
    done = subprocess.run(
        ["curl", "-s", *headers, "-d", body, f"{server.url}/v1/completions"], capture_output=True, text=True, timeout=60
    )
    count = json.loads(done.stdout)["usage"]["prompt_tokens"]
    until = time.monotonic() + SLOW_END
    while f"POST /v1/completions 200 {count}+3 tokens" not in server.log:
        assert time.monotonic() < until, server.log[-2000:]
        time.sleep(0.05)


def test_a_quiet_server_has_no_log(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ds4convert", "serve", str(folder), "--json", "-q", "--no-mtp", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        facts = json.loads(process.stdout.readline())
        assert facts["mtp_active"] is False
        with urllib.request.urlopen(facts["url"] + "/health", timeout=30) as answer:
            assert answer.status == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(SLOW_END) == 0 and process.stderr.read() == ""


class Panic(BaseException):
    """As pyo3's PanicException: no `Exception`."""


def test_a_panic_of_the_tokenizer_is_answered_and_the_next_request_served() -> None:
    def encode(text: str, **_: Any) -> list[int]:
        raise Panic("/secret/tokenizer.json")

    tokenizer = SimpleNamespace(
        encode=encode, get_vocab=lambda: {"x": 0}, bos_token=None, has_thinking=False, has_tool_calling=False, has_chat_template=True,
        chat_template="", detokenizer=None, eos_token_ids={1},
    )  # fmt: skip
    model = SimpleNamespace(args=SimpleNamespace(vocab_size=10), make_cache=lambda: 1 / 0)
    decoder = Decoder(model, tokenizer, 0, 100, 2, Metrics(False))
    try:
        for prompt in ("x", (1, 2)):  # the tokenizer panics, then the model fails
            ticket: Queue[Any] = Ticket()
            decoder.requests.put(Job(ticket, Asked(TEXT, 5, {}), prompt))  # type: ignore[arg-type]
            error = ticket.get(timeout=30)
            assert isinstance(error, Refused) and error.status == 500 and "secret" not in error.message
        assert decoder.is_healthy
    finally:
        decoder.stop_and_join()


def test_a_second_signal_ends_what_runs_at_its_next_token(folder: Path, tmp_path: Path) -> None:
    server = Running(folder, tmp_path / "log")
    connection = server.raw(server.post_bytes({"prompt": PROMPT, "max_tokens": 4000, "stream": True}))
    connection.recv(100)
    server.process.send_signal(signal.SIGINT)
    until = time.monotonic() + SLOW_END
    while "Draining" not in server.log:
        assert time.monotonic() < until, server.log
        time.sleep(0.05)
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(SLOW_END) == 130 and "Traceback" not in server.log
    connection.close()


def test_forbidden_tokens_and_extreme_settings_are_told_in_json(server: Running) -> None:
    first = server.text(PROMPT, max_tokens=1, logprobs=0).json["choices"][0]["logprobs"]["content"][0]["id"]
    banned = {"logit_bias": {str(first): -1e6}, "max_tokens": 4, "logprobs": 10}
    for fields in (
        banned,
        banned | {"temperature": 1e-300, "repetition_penalty": 10, "presence_penalty": 2, "frequency_penalty": -2},
        banned | {"temperature": 100, "top_p": 0, "repetition_penalty": 0.1, "repetition_context_size": 0},
        {"logit_bias": {str(first): 1e6}, "logprobs": 10, "temperature": 1, "max_tokens": 3},
    ):
        answer = server.text(PROMPT, **fields)
        assert answer.status == 200 and b"Infinity" not in answer.body and b"NaN" not in answer.body
        entries = answer.json["choices"][0]["logprobs"]["content"]
        assert (first in [e["id"] for e in entries]) == (fields["logit_bias"][str(first)] > 0)
        assert all(-9999.0 <= t["logprob"] <= 0.001 for e in entries for t in (e, *e["top_logprobs"]))
