"""HTTP as clients really send it: chunks, other origins and hosts, slow and refused bodies; and what the log tells.

Sources: RFC 9112 (sections 3.2, 6.1, 6.3, 7.1) for framing and Host; the Fetch standard's CORS protocol and Private
Network Access for preflights; reports of clients on Chromium's and .NET's network stack that send chunks only, and of
browser clients that a local server did not let in (issues of ml-explore/mlx-examples 716, oobabooga/textgen 3870).
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ds4convert.errors import UsageError
from ds4convert.serving.http import exchange
from ds4convert.serving.http.access import Policy, host_name, log_line, origin_of
from ds4convert.serving.refused import Refused
from ds4convert.serving.server import Options
from tests.serving.running import SLOW_END
from tests.serving.scripted import Wire, everything, serving

pytest.importorskip("mlx.core")

BODY = b'{"prompt": "x", "max_tokens": 2}'
SITE = "http://app.example:3000"


@pytest.fixture(scope="module")
def wire() -> Iterator[Wire]:
    with serving() as found:
        yield found


@pytest.fixture(scope="module")
def guarded() -> Iterator[Wire]:
    with serving(api_key="sesame", origins=[SITE + "/", "null"]) as found:
        yield found


def post(head: str, body: bytes, version: str = "1.1") -> bytes:
    return f"POST /v1/completions HTTP/{version}\r\nHost: localhost\r\n{head}\r\n".encode() + body


def chunked(*parts: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    return post("Transfer-Encoding: chunked\r\n", b"".join(b"%X\r\n%s\r\n" % (len(p), p) for p in parts) + end)


def status(answer: bytes) -> int:
    return int(answer.split()[1])


def eventually(is_true: Callable[[], bool]) -> None:
    until = time.monotonic() + SLOW_END
    while not is_true():
        assert time.monotonic() < until
        time.sleep(0.02)


# chunked bodies


@pytest.mark.parametrize(
    "data",
    [
        chunked(BODY),
        chunked(*(BODY[n : n + 1] for n in range(len(BODY)))),
        chunked(BODY[:5], BODY[5:], end=b"0\r\nX-Checksum: 1\r\nOther: 2\r\n\r\n"),
        chunked(BODY, end=b"000\r\n\r\n"),
        chunked(BODY).replace(b"20\r\n", b'20;name="value"\r\n', 1),
        chunked(BODY).replace(b"20\r\n", b"0020 \r\n", 1),
    ],
)
def test_chunked_bodies_are_read(wire: Wire, data: bytes) -> None:
    answer = wire.raw(data)
    assert status(answer) == 200, answer
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["choices"][0]["text"] == "ab"


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (chunked(BODY).replace(b"20\r\n", b"xx\r\n", 1), 400),
        (chunked(BODY).replace(b"20\r\n", b"-20\r\n", 1), 400),
        (chunked(BODY).replace(b"20\r\n", b"0x20\r\n", 1), 400),
        (chunked(BODY).replace(b"20\r\n", b"20\n", 1), 400),
        (chunked(BODY).replace(b"20\r\n", b"\r\n", 1), 400),
        (chunked(BODY).replace(b"20\r\n", b"1F\r\n", 1), 400),
        (chunked(BODY).replace(b"20\r\n", b"F" * 17 + b"\r\n", 1), 400),
        (chunked(BODY).replace(b"20\r\n", b"20;" + b"x" * 9000 + b"\r\n", 1), 400),
        (chunked(BODY, end=b"0\r\n" + b"A: b\r\n" * 200 + b"\r\n"), 400),
        (chunked(b"{" * 3000), 413),
        (chunked(*[b"{" * 100] * 30), 413),
        (chunked(BODY).replace(b"20\r\n", b"FFFFFFFFFFFFFFFF\r\n", 1)[:-5], 413),
        (post("Transfer-Encoding: chunked\r\nContent-Length: 3\r\n", b"0\r\n\r\n"), 400),
        (post("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", b"0\r\n\r\n"), 400),
        (post("Transfer-Encoding: gzip, chunked\r\n", b"0\r\n\r\n"), 400),
        (post("Transfer-Encoding: identity\r\n", BODY), 400),
        (post("Transfer-Encoding: chunked\r\n", b"0\r\n\r\n", version="1.0"), 400),
        (post("Content-Length: 5\r\nContent-Length: 6\r\n", BODY), 400),
        (post("Content-Length: +5\r\n", BODY), 400),
    ],
)
def test_bad_framing_is_refused_and_the_refusal_can_be_read(wire: Wire, data: bytes, wanted: int) -> None:
    with socket.create_connection(("127.0.0.1", wire.port), timeout=SLOW_END) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        answer = everything(connection)
    assert status(answer) == wanted, answer
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"


def test_a_body_is_asked_for_only_where_it_is_wanted(guarded: Wire) -> None:
    expecting = f"Expect: 100-continue\r\nContent-Length: {len(BODY)}\r\n"
    with socket.create_connection(("127.0.0.1", guarded.port), timeout=SLOW_END) as connection:
        connection.sendall(post("Authorization: Bearer sesame\r\n" + expecting, b""))
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(BODY)
        assert status(everything(connection)) == 200
    with serving(api_key="sesame", seconds=3600) as patient:  # who waits for a body that is not sent never answers
        assert status(patient.raw(post(expecting, b""))) == 401
        too_large = "Expect: 100-continue\r\nContent-Length: 900000\r\nAuthorization: Bearer sesame\r\n"
        assert status(patient.raw(post(too_large, b""))) == 413


# refused bodies


@pytest.mark.parametrize(
    ("path", "headers", "wanted"),
    [
        ("/v1/completions", {}, 401),
        ("/v1/nothing", {"Authorization": "Bearer sesame"}, 404),
        ("/v1/completions", {"Authorization": "Bearer sesame"}, 413),
        ("/v1/completions", {"Origin": "http://elsewhere.example"}, 403),
    ],
)
@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_client_that_sends_all_before_it_reads_can_read_the_refusal(
    guarded: Wire, path: str, headers: dict[str, str], wanted: int, is_chunked: bool
) -> None:
    large = b"x" * 12_000
    body: Any = iter([large]) if is_chunked else large
    from http.client import HTTPConnection

    connection = HTTPConnection("127.0.0.1", guarded.port, timeout=SLOW_END)
    connection.request("POST", path, body, headers, encode_chunked=is_chunked)
    response = connection.getresponse()
    assert response.status == wanted
    assert "error" in json.loads(response.read())
    connection.close()


def test_a_body_without_a_length_is_refused_and_the_refusal_can_be_read(wire: Wire) -> None:
    with socket.create_connection(("127.0.0.1", wire.port), timeout=SLOW_END) as connection:
        connection.sendall(post("", b"x" * 50_000))
        eventually(lambda: any(" 411 " in line for line in wire.lines))  # the answer is out, and the server done
        answer = b""
        while b'"code"' not in answer:
            answer += connection.recv(65536)
    assert status(answer) == 411 and b"Content-Length" in answer


# time


@pytest.mark.parametrize(
    "begin",
    [
        b"P",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n",
        post("Content-Length: 1000\r\n", b"{"),
        chunked(b"{")[:-5],
    ],
)
def test_a_request_that_drips_in_has_one_deadline(begin: bytes) -> None:
    with (
        serving(seconds=1.0) as slow,
        socket.create_connection(("127.0.0.1", slow.port), timeout=SLOW_END) as connection,
    ):
        connection.sendall(begin)
        until = time.monotonic() + SLOW_END
        connection.settimeout(0.2)
        answer = b""
        while not answer and time.monotonic() < until:
            try:
                connection.sendall(b"a")
                answer = connection.recv(65536)
            except TimeoutError:
                continue
        assert status(answer) == 408, answer
        eventually(lambda: any(" 408 " in line for line in slow.lines))


def test_a_connection_that_says_nothing_is_closed_without_a_word() -> None:
    with (
        serving(seconds=0.5) as slow,
        socket.create_connection(("127.0.0.1", slow.port), timeout=SLOW_END) as connection,
    ):
        assert connection.recv(100) == b"" and not slow.lines


def test_a_stream_that_waits_for_its_turn_has_begun_and_shows_it(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients on Node give up after 300 s without headers (undici's headersTimeout)."""
    monkeypatch.setattr(exchange, "WAITING_SECONDS", 0.2)
    wire.script.delay = 1.0
    try:
        streamed = wire.ask("POST", "/v1/completions", json.loads(BODY) | {"stream": True})
        whole = wire.ask("POST", "/v1/completions", BODY)
        wire.script.error = Refused(422, "no such words")
        failed = wire.ask("POST", "/v1/completions", json.loads(BODY) | {"stream": True})
    finally:
        wire.script.delay, wire.script.error = 0.0, None
    assert streamed.body.startswith(b": waiting\n\n") and len(streamed.events) == 2 + 1
    assert b"waiting" not in whole.body and whole.status == 200
    assert failed.status == 200 and b'data: {"error": {"message": "no such words"' in failed.body


def test_heads_are_bounded_as_a_whole(wire: Wire) -> None:
    lines = b"".join(b"X-%d: %s\r\n" % (n, b"x" * 60_000) for n in range(9))
    with socket.create_connection(("127.0.0.1", wire.port), timeout=SLOW_END) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + lines)
        assert status(everything(connection)) == 431
    assert status(wire.raw(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 60_000 + b"\r\n\r\n")) == 200


def test_a_body_that_nobody_asked_for_does_not_cost_the_answer(wire: Wire) -> None:
    for framing in (b"Content-Length: 100000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n186A0\r\n"):
        answer = wire.raw(b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + framing + b"x" * 100_000)
        assert status(answer) == 200 and answer.endswith(b"}")


# hosts


@pytest.mark.parametrize(
    ("host", "is_good"),
    [
        ("localhost", True), ("LOCALHOST:8080", True), ("localhost.", True), ("127.0.0.1:80", True), ("192.168.1.7", True),
        ("[::1]:8080", True), ("[fe80::1%25en0]", True), ("mymac.local:8080", True),
        ("evil.example", False), ("localhost.evil.example", False), ("127.0.0.1.evil.example", False), ("", False),
        ("evil.example:80", False), ("[evil]", False), ("0x7f.1", False), ("other.local", False),
    ],
)  # fmt: skip
def test_without_a_key_only_names_of_this_machine_are_hosts(host: str, is_good: bool) -> None:
    with serving(host="mymac.local") as named:
        for path in ("/health", "/", "/v1/models"):
            answer = named.ask("GET", path, None, {"Host": host})
            assert answer.status == (200 if is_good else 403), answer.body
            if not is_good:
                assert answer.json["error"]["code"] == "foreign_host" and "--api-key" in answer.json["error"]["message"]


def test_rebinding_is_refused_though_origin_and_host_agree(wire: Wire) -> None:
    headers = {"Host": "evil.example:8080", "Origin": "http://evil.example:8080"}
    assert wire.ask("POST", "/v1/completions", BODY, headers).status == 403
    assert wire.ask("OPTIONS", "/v1/completions", None, headers).status == 403


def test_with_a_key_a_name_is_no_matter_and_two_hosts_never_are(guarded: Wire) -> None:
    assert guarded.ask("GET", "/health", None, {"Host": "gateway.example"}).status == 200
    assert status(guarded.raw(b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n")) == 400


def test_names_of_hosts_are_read_without_port_and_case() -> None:
    assert [host_name(h) for h in ("A.b:1", "[::1]:2", "[::1]", "x.", "1.2.3.4:5")] == [
        "a.b",
        "::1",
        "::1",
        "x",
        "1.2.3.4",
    ]


# origins


def test_a_page_of_a_named_origin_may_use_the_server(guarded: Wire) -> None:
    preflight = {
        "Origin": SITE, "Access-Control-Request-Method": "POST", "Access-Control-Request-Private-Network": "true",
        "Access-Control-Request-Headers": "authorization, content-type, x-stainless-os, bad\x01name",
    }  # fmt: skip
    asked = guarded.ask("OPTIONS", "/v1/chat/completions", None, preflight)  # browsers send no key with it
    assert asked.status == 204 and asked.headers["Access-Control-Allow-Origin"] == SITE
    assert asked.headers["Access-Control-Allow-Headers"] == "authorization, content-type, x-stainless-os"
    assert "POST" in asked.headers["Access-Control-Allow-Methods"] and asked.headers["Vary"] == "Origin"
    assert asked.headers["Access-Control-Allow-Private-Network"] == "true"
    for key, wanted in (("sesame", 200), ("wrong", 401)):
        for stream in (False, True):
            body = json.loads(BODY) | {"stream": stream}
            got = guarded.ask("POST", "/v1/completions", body, {"Origin": SITE, "Authorization": f"Bearer {key}"})
            assert got.status == wanted and got.headers["Access-Control-Allow-Origin"] == SITE, (
                "errors are readable too"
            )
    refused = guarded.ask("POST", "/v1/completions", b"{", {"Origin": SITE, "Authorization": "Bearer sesame"})
    assert refused.status == 400 and refused.headers["Access-Control-Allow-Origin"] == SITE


@pytest.mark.parametrize(
    "origin", ["http://app.example", "https://app.example:3000", "http://app.example:3000.evil", "x"]
)
def test_another_origin_is_refused_with_the_option_that_opens_it(guarded: Wire, origin: str) -> None:
    for method in ("OPTIONS", "POST", "GET"):
        answer = guarded.ask(method, "/v1/models", None, {"Origin": origin, "Authorization": "Bearer sesame"})
        assert answer.status == 403 and "Access-Control-Allow-Origin" not in answer.headers
        assert "--allowed-origin" in answer.json["error"]["message"]


def test_the_servers_own_page_and_all_origins(wire: Wire) -> None:
    own = {"Host": f"localhost:{wire.port}", "Origin": f"http://localhost:{wire.port}"}
    assert wire.ask("POST", "/v1/completions", BODY, own).status == 200
    with serving(origins=["*"]) as opened:
        answer = opened.ask("POST", "/v1/completions", BODY, {"Origin": "http://any.example"})
        assert answer.status == 200 and answer.headers["Access-Control-Allow-Origin"] == "*"


def test_origins_are_written_as_browsers_write_them() -> None:
    for given, wanted in {
        "HTTP://Localhost:3000/": "http://localhost:3000", "https://a.example:443": "https://a.example", "*": "*",
        "http://[::1]:80": "http://[::1]", "null": "null", "app://obsidian.md": "app://obsidian.md",
    }.items():  # fmt: skip
        assert origin_of(given) == wanted
    for given in (
        "localhost:3000",
        "a.example",
        "http://a.example/path",
        "",
        "http://",
        "http://a b",
        "http://a:x",
        "a\nb",
    ):
        with pytest.raises(UsageError, match="--allowed-origin"):
            origin_of(given)
    with pytest.raises(UsageError):
        Options(allowed_origin=("x",))
    assert Policy("h", None, frozenset([SITE])).allows("HTTP://APP.example:3000")


# the log


def test_every_request_is_one_line_without_secrets(guarded: Wire) -> None:
    guarded.lines.clear()
    key = {"Authorization": "Bearer sesame"}
    guarded.ask("POST", "/v1/completions", json.loads(BODY) | {"prompt": "private words"}, key)
    guarded.ask("POST", "/v1/completions?key=private", BODY)
    guarded.ask("GET", "/health")
    guarded.ask("GET", "/v1/models/sesame", None, key)
    guarded.raw(b"GET http://user:private@localhost/x\x1b[2J\x07 HTTP/1.1\r\n\r\n")
    guarded.raw(b"NONSENSE /\r\n\r\n")
    eventually(lambda: len(guarded.lines) >= 6)
    text = "\n".join(guarded.lines)
    assert len(guarded.lines) == 6, text
    assert "private" not in text and "sesame" not in text and "\x1b" not in text and "\x07" not in text
    first, second, third, fourth, *_ = guarded.lines
    assert first.split()[1:5] == ["127.0.0.1", "POST", "/v1/completions", "200"] and " 3+2 tokens " in first
    assert first.endswith(" s") and float(first.split()[-2]) >= 0
    assert " 401 - tokens " in second and "GET /health 200" in third and "/v1/models/*** 404" in fourth


def test_what_a_client_sends_cannot_break_a_line() -> None:
    line = log_line("::1", "GET\n", "/a\nb\u2028c" + "x" * 500, 200, None, 1.0, None)
    assert "\n" not in line and "\u2028" not in line and len(line) < 300


def test_no_message_tells_a_path_of_the_machine(wire: Wire) -> None:
    other = wire.ask("POST", "/v1/completions", {"prompt": "x", "model": "gpt"})
    assert other.status == 404 and "demo" in other.json["error"]["message"] and b"secret" not in other.body
    assert wire.ask("POST", "/v1/completions", {"prompt": "x", "model": "/secret/place/demo"}).status == 200
    for error in (OSError(2, "none", "/secret/place/x"), RuntimeError("/secret/place"), SystemExit("/secret/place")):
        wire.script.error = error
        try:
            answer = wire.ask("POST", "/v1/completions", BODY)
        finally:
            wire.script.error = None
        assert answer.status == 500 and b"secret" not in answer.body and type(error).__name__.encode() in answer.body
    assert b"secret" not in wire.ask("GET", "/v1/models").body
    assert wire.ask("POST", "/v1/completions", BODY).status == 200, "the server lives"


def test_options_of_the_command_are_told(folder: Path) -> None:
    from tests import support

    text = support.run("serve", "--help").out
    assert "--allowed-origin" in text and "--default-max-tokens" in text and "--no-mtp" in text
    assert support.run("serve", folder, "--allowed-origin", "localhost").code == 2
