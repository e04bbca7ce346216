"""Bad requests, keys, limits, endings: always a clear answer in JSON, never a 5xx or a traceback."""

from __future__ import annotations

import json
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import support
from tests.serving.running import SLOW_END, Running

PROMPT = "In the beginning"
GOOD = {"prompt": PROMPT, "max_tokens": 2}
MESSAGES = [{"role": "user", "content": "x"}]


@pytest.fixture(scope="module")
def guarded(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    log = tmp_path_factory.mktemp("log") / "guarded"
    server = Running(folder, log, "--mtp", "--api-key", "sesame", "--max-tokens", 64, "--max-body", "20kB", "-v")
    yield server
    assert server.end() == 0
    assert "Traceback" not in server.log and "failed" not in server.log


KEY = {"Authorization": "Bearer sesame"}


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"{", 400, "JSON"),
        (b"", 400, "JSON"),
        (b"\xff\xfe{}", 400, "UTF-8"),
        (b"[1]", 400, "object"),
        (b'{"prompt": "a", "prompt": "b"}', 400, "prompt"),
        (b'{"prompt": "a", "temperature": NaN}', 400, "NaN"),
        (b'{"prompt": "\\ud800"}', 400, "request body"),
        (b"[" * 15000, 400, "request body"),
        ({**GOOD, "model": "gpt-9"}, 404, "demo-mlx"),
        ({**GOOD, "model": 5}, 422, "model"),
        ({**GOOD, "max_tokens": 0}, 422, "max_tokens"),
        ({**GOOD, "max_tokens": 10**30}, 422, "max_tokens"),
        ({**GOOD, "max_completion_tokens": -2}, 422, "max_completion_tokens"),
        ({**GOOD, "max_tokens": "2"}, 422, "max_tokens"),
        ({**GOOD, "max_tokens": True}, 422, "max_tokens"),
        ({**GOOD, "temperature": -1}, 422, "temperature"),
        ({**GOOD, "temperature": "hot"}, 422, "temperature"),
        ({**GOOD, "stop": [""]}, 422, "stop"),
        ({**GOOD, "stop": [1]}, 422, "stop"),
        ({**GOOD, "logprobs": 11}, 422, "logprobs"),
        ({**GOOD, "logit_bias": {"99999999": 1}}, 422, "logit_bias"),
        ({**GOOD, "logit_bias": {"x": 1}}, 422, "logit_bias"),
        ({**GOOD, "n": 2}, 422, "n: "),
        ({**GOOD, "adapters": "x"}, 422, "adapters"),
        ({**GOOD, "stream_options": []}, 422, "stream_options"),
        ({**GOOD, "seed": 2**70}, 422, "seed"),
        ({**GOOD, "response_format": {"type": "xml"}}, 422, "response_format"),
        ({"max_tokens": 2}, 422, "prompt"),
        ({"prompt": []}, 422, "prompt"),
        ({"prompt": ["a", ""]}, 422, "prompt[1]"),
        ({"prompt": ["a", 5]}, 422, "prompt[1]"),
        ({"prompt": [5, -1]}, 422, "prompt[1]"),
        ({"prompt": [[5], [10**7]]}, 422, "prompt[1][0]"),
        ({"prompt": [True]}, 422, "prompt[0]"),
        ({"prompt": ["a"] * 129}, 422, "128"),
        ({**GOOD, "temperature": 101}, 422, "temperature"),
        ({**GOOD, "repetition_penalty": 1e-30}, 422, "repetition_penalty"),
        ({**GOOD, "repetition_penalty": -1}, 422, "repetition_penalty"),
        ({**GOOD, "repetition_penalty": 11}, 422, "repetition_penalty"),
        ({**GOOD, "presence_penalty": 2.1}, 422, "presence_penalty"),
        ({**GOOD, "frequency_penalty": -1e9}, 422, "frequency_penalty"),
        ({**GOOD, "echo": True}, 422, "echo"),
        ({**GOOD, "functions": [{"name": "f"}]}, 422, "tools"),
    ],
)
def test_a_bad_body_gets_a_clear_answer(guarded: Running, body: Any, status: int, says: str) -> None:
    answer = guarded.ask("POST", "/v1/completions", body, KEY)
    assert answer.status == status, answer.body
    assert says in answer.json["error"]["message"]
    assert answer.json["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "messages",
    [
        None, [], "x", [1], [{}], [{"role": "king", "content": "x"}], [{"role": "user", "content": 5}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x"}}]}],
        [{"role": "assistant", "content": "x", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
        [{"role": "assistant", "tool_calls": 5}],
    ],
)  # fmt: skip
def test_bad_messages_are_refused(guarded: Running, messages: Any) -> None:
    answer = guarded.ask("POST", "/v1/chat/completions", {"messages": messages, "max_tokens": 2}, KEY)
    assert answer.status == 422 and "message" in answer.json["error"]["message"], answer.body


def test_the_key_is_asked_for_everywhere_but_at_the_page_and_health(guarded: Running) -> None:
    for path in ("/v1/models", "/metrics", "/nothing"):
        answer = guarded.ask("GET", path)
        assert answer.status == 401 and answer.headers["WWW-Authenticate"] == "Bearer"
    for value in ("Bearer", "Bearer sesam", "Basic sesame", "Bearer s\xe9same"):
        assert guarded.ask("POST", "/v1/completions", GOOD, {"Authorization": value}).status == 401
    assert guarded.ask("POST", "/v1/completions", GOOD, KEY).status == 200
    assert guarded.ask("GET", "/health").json == {"status": "ok", "mtp_active": True}
    assert guarded.ask("GET", "/").status == 200


def test_what_is_too_large_or_unknown_is_refused(guarded: Running) -> None:
    answer = guarded.ask("POST", "/v1/completions", b"x" * 100_000, KEY)
    assert answer.status == 413 and "20,000" in answer.json["error"]["message"]
    assert guarded.ask("POST", "/v1/nothing", GOOD, KEY).status == 404
    assert guarded.ask("GET", "/v1/nothing", None, KEY).status == 404
    assert guarded.ask("GET", "/v1/completions", None, KEY).status == 405
    assert guarded.ask("GET", "/v1/models/other", None, KEY).status == 404
    assert guarded.ask("PUT", "/v1/completions", GOOD, KEY).status == 405
    foreign = guarded.ask("POST", "/v1/completions", GOOD, KEY | {"Origin": "http://elsewhere.example"})
    assert foreign.status == 403 and foreign.json["error"]["code"] == "foreign_origin"


@pytest.mark.parametrize(
    "head",
    [
        "POST /v1/completions HTTP/1.1\r\nContent-Length: x\r\n\r\n",
        "POST /v1/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
        "POST /v1/completions HTTP/1.1\r\n\r\n",
        "POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n",
        "POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        "POST /v1/completions HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "GET /health HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
        "POST /v1/completions HTTP/9.9\r\n\r\n",
        "NONSENSE\r\n\r\n",
        "GET " + "/x" * 40000 + " HTTP/1.1\r\n\r\n",
        "GET / HTTP/1.1\r\n" + "A: b\r\n" * 300 + "\r\n",
    ],
)
def test_a_bad_head_is_the_clients_fault(mtp: Running, head: str) -> None:
    connection = mtp.raw(head.encode())
    first = connection.recv(65536).split(b"\r\n")[0]
    assert first.split()[1].startswith(b"4"), first


def mutated(rng: random.Random) -> tuple[bytes, dict[str, str]]:
    """A request that was good: a field with another value, bytes changed, or headers that do not fit."""
    values: list[Any] = [None, True, -1, 0, 1e400, 2**80, "", "x" * 50, [], [[]], {}, {"a": []}, [None], "\u0000\uffff"]
    chat = rng.random() < 0.5
    body: dict[str, Any] = {"messages": MESSAGES} if chat else dict(GOOD)
    body["max_tokens"] = 1
    fields = [
        "model", "stream", "stream_options", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k",
        "min_p", "repetition_penalty", "logit_bias", "logprobs", "top_logprobs", "seed", "stop", "messages", "prompt",
        "tools", "tool_choice", "response_format", "chat_template_kwargs", "xtc_probability", "presence_context_size", "n", "user",
    ]  # fmt: skip
    for _ in range(rng.randint(1, 3)):
        body[rng.choice(fields)] = rng.choice(values)
    if chat and rng.random() < 0.3:
        body["messages"] = [{"role": rng.choice(["user", "tool", "assistant", 3]), "content": rng.choice(values)}]
    raw = bytearray(json.dumps(body).encode())
    if rng.random() < 0.4:
        for _ in range(rng.randint(1, 4)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
    headers = {"Content-Length": str(len(raw)), "Host": "localhost"}
    if rng.random() < 0.2:
        headers[rng.choice(["Content-Length", "Expect", "Authorization", "Origin", "Transfer-Encoding", "Accept"])] = (
            rng.choice(["", "0", "1", "-1", "chunked", "1e3", "\x7f", "9" * 30, "a" * 5000, "100-continue"])
        )
    path = "/v1/chat/completions" if chat else "/v1/completions"
    head = "".join(f"{k}: {v}\r\n" for k, v in headers.items())
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + bytes(raw), headers


@pytest.fixture
def brief(folder: Path, tmp_path: Path) -> Iterator[Running]:
    """A server whose every answer is short, whatever a request says."""
    server = Running(folder, tmp_path / "log", "--no-mtp", "--max-tokens", 8)
    yield server
    assert server.end() == 0


@pytest.mark.nightly
@pytest.mark.slow
def test_a_thousand_mutated_requests_do_no_harm(brief: Running) -> None:
    plain = brief
    rng, seen = random.Random(7), set()
    for _ in range(1000):
        data, _ = mutated(rng)
        with plain.raw(data) as connection:
            connection.shutdown(1) if rng.random() < 0.02 else None
            connection.settimeout(60)
            try:
                first = connection.recv(4096)
            except ConnectionError:
                continue
            if first.startswith(b"HTTP/1.1 100") or first.startswith(b"HTTP/1.0 100"):
                first = connection.recv(4096)
            seen.add(int(first.split()[1]) if first else 0)
    assert seen <= {0, 200, 400, 401, 403, 404, 405, 411, 413, 417, 422, 431}, seen
    assert {200, 400, 422} <= seen
    assert "Traceback" not in plain.log
    assert plain.text(PROMPT).status == 200


def test_a_client_that_leaves_while_it_waits_is_not_served(mtp: Running) -> None:
    left = mtp.figure("disconnects_total")
    busy = mtp.raw(mtp.post_bytes({"prompt": PROMPT, "max_tokens": 300, "stream": True}))
    busy.recv(100)
    waiting = [mtp.raw(mtp.post_bytes({"prompt": PROMPT + str(n), "max_tokens": 2000})) for n in range(3)]
    mtp.wait_for("queue_waiting", 3)
    for connection in (*waiting, busy):
        connection.close()
    mtp.wait_for("disconnects_total", left + 4)
    mtp.wait_for("queue_waiting", 0)
    assert mtp.text(PROMPT).status == 200


def test_the_figures_count_what_was_done(folder: Path, tmp_path: Path) -> None:
    server = Running(folder, tmp_path / "log", "--mtp")
    try:
        usage = [server.text(PROMPT, max_tokens=20).json["usage"] for _ in range(3)]
        server.ask("POST", "/v1/completions", {})
        wanted = [f'requests_total{{endpoint="/v1/completions",status="{s}"}} {n}\n' for s, n in ((200, 3), (422, 1))]
        deadline = time.monotonic() + SLOW_END  # a request is counted when its answer is out, a moment after it is here
        while not all(w in (text := server.ask("GET", "/metrics").body.decode()) for w in wanted):
            assert time.monotonic() < deadline, text
        assert "ds4convert_mtp_active 1\n" in text
        assert server.figure("generated_tokens_total") == 60
        for name in ("drafted", "accepted"):
            assert server.figure(f"{name}_tokens_total") == sum(u["ds4convert"][name] for u in usage)
        assert server.figure("cached_tokens_total") > 0
        assert server.figure("request_seconds_count") == server.figure("first_token_seconds_count") == 3
        assert server.figure('request_seconds_bucket{le="+Inf"}') == 3
        assert server.figure("queue_running") == server.figure("queue_waiting") == 0
    finally:
        assert server.end() == 0


def test_a_folder_without_a_head_is_served_plainly_with_the_reason(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "headless"
    assert support.run("quantize", support.ROOT / "manifests" / "demo", out, "--drop-mtp").code == 0
    server = Running(out, tmp_path / "log", "--mtp")
    try:
        assert "Warning: --mtp has no effect" in server.log and "--drop-mtp" in server.log
        assert server.text(PROMPT).json["usage"]["ds4convert"]["mtp_active"] is False
        assert "mtp_active 0" in server.ask("GET", "/metrics").body.decode()
    finally:
        assert server.end() == 0


def test_sigterm_finishes_what_runs_and_refuses_the_rest(folder: Path, tmp_path: Path) -> None:
    server = Running(folder, tmp_path / "log", "--mtp")
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(server.text(PROMPT, max_tokens=400)))
    thread.start()
    server.wait_for("queue_running", 1)
    server.process.send_signal(signal.SIGTERM)
    until = time.monotonic() + SLOW_END
    while "Draining" not in server.log:
        assert time.monotonic() < until, server.log
        time.sleep(0.02)
    assert server.text(PROMPT).json["error"]["code"] == "draining"
    thread.join(60)
    assert results[0].status == 200 and results[0].json["usage"]["completion_tokens"] > 16
    assert server.process.wait(SLOW_END) == 0
    assert "Traceback" not in server.log


def test_other_hosts_are_warned_of_and_bad_places_refused(folder: Path, tmp_path: Path) -> None:
    server = Running(folder, tmp_path / "log", "--host", "0.0.0.0", "--json")
    facts = {"url": f"http://0.0.0.0:{server.port}", "model": "demo-mlx", "mtp_active": True}
    assert json.dumps({"schema": 2} | facts) in server.log.splitlines(), "one JSON document on standard output"
    assert "other machines can reach this server" in server.log and "--api-key" in server.log
    taken = support.run_process("serve", folder, "--port", server.port)
    assert server.end() == 0
    support.assert_refused(taken, str(server.port), "--port", code=4)
    support.assert_refused(support.run_process("serve", tmp_path / "absent"), "absent", code=3)
    support.assert_refused(support.run_process("serve", folder, "--host", "no.such.host.invalid"), "--host", code=2)
