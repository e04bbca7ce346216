"""Answers that no Hub gives, from a server of bytes: packed bodies, redirects to elsewhere, listings that cannot be.

What the client asks for by itself: huggingface_hub 2.4.0 (`utils/_detect_agent.py`) reads `{ENDPOINT}/api/agent-harnesses`
whole before its first request unless HF_HUB_DISABLE_TELEMETRY is set, and its session sends `Accept-Encoding: gzip`.
"""

from __future__ import annotations

import gzip
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import Result, assert_refused, run_process

NAME, REPO = "owner/model", "hf://owner/model"
LISTING = json.dumps({"sha": "ab" * 20, "siblings": []}).encode()

Server = Callable[[bytes], "Scripted"]


class Scripted:
    """A server that answers every request with the same bytes, and keeps what it was asked."""

    def __init__(self, answer: bytes) -> None:
        self.answer, self.heads = answer, []  # type: tuple[bytes, list[bytes]]
        self.socket = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.socket.getsockname()[1]}"

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self.socket.accept()
            except OSError:
                return
            with client:
                client.settimeout(60)
                try:
                    self.heads.append(client.recv(1 << 16))
                    client.sendall(self.answer)
                except OSError:  # a client that leaves in the middle of a body is what is asked for here
                    continue


def http(status: int, body: bytes = b"", **headers: str) -> bytes:
    """Return an answer as bytes; underlines in names of headers are hyphens."""
    lines = [f"{k.replace('_', '-')}: {v}" for k, v in headers.items()]
    head = "\r\n".join([f"HTTP/1.1 {status} X", *lines, f"Content-Length: {len(body)}", "Connection: close"])
    return head.encode("latin1") + b"\r\n\r\n" + body


@pytest.fixture
def serve() -> Iterator[Server]:
    """Return what starts a server."""
    made: list[Scripted] = []

    def started(answer: bytes) -> Scripted:
        made.append(Scripted(answer))
        return made[-1]

    yield started
    for server in made:
        server.socket.close()


def ask(server: Scripted, home: Path, *words: str) -> Result:
    """Run the program against a server from an empty HF_HOME."""
    variables = {"HF_ENDPOINT": server.url, "HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "0"}
    return run_process(*words, variables=variables, cwd=home)


def test_nothing_is_asked_but_the_listing_and_that_unpacked(serve: Server, tmp_path: Path) -> None:
    server = serve(http(200, LISTING))
    assert_refused(ask(server, tmp_path, "inspect", REPO), NAME, "no .safetensors file")
    (head,) = server.heads
    assert head.startswith(b"GET /api/models/owner/model/revision/main") and b"ccept-encoding: identity" in head.lower()


def test_a_listing_that_comes_packed_all_the_same_is_read(serve: Server, tmp_path: Path) -> None:
    server = serve(http(200, gzip.compress(LISTING), Content_Encoding="gzip"))
    assert_refused(ask(server, tmp_path, "inspect", REPO), NAME, "no .safetensors file")


@pytest.mark.sampled(2)
@pytest.mark.parametrize("status", [200, 404, 500 - 97])
def test_bodies_that_unpack_to_no_end_are_bounded(serve: Server, tmp_path: Path, status: int) -> None:
    server = serve(http(status, gzip.compress(bytes(300 << 20), 1), Content_Encoding="gzip"))
    result = ask(server, tmp_path, "inspect", REPO)
    assert_refused(result, NAME, code=4)


@pytest.mark.parametrize("body", [b"\x1f\x8bnonsense", b"\xff\xfe\xfd"])
def test_an_error_in_other_bytes_than_text_is_an_error_all_the_same(serve: Server, tmp_path: Path, body: bytes) -> None:
    assert_refused(ask(serve(http(404, body)), tmp_path, "inspect", REPO), NAME, "HTTP 404", code=4)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("place", ["file:///etc/passwd", "http://[::1/x", "http://127.0.0.1:99999999/x", "ftp://h/x"])
def test_a_redirect_to_what_is_no_address_is_refused_at_once(serve: Server, tmp_path: Path, place: str) -> None:
    server = serve(http(302, Location=place))
    assert_refused(ask(server, tmp_path, "inspect", REPO), NAME, "redirects", code=4)
    assert len(server.heads) == 1


def test_a_refusal_without_a_token_is_not_an_expired_address(serve: Server, tmp_path: Path) -> None:
    result = ask(serve(http(403, b"blocked", X_Error_Message="\x1b[2Jno")), tmp_path, "inspect", REPO)
    assert_refused(result, NAME, "HTTP 403", "proxy", code=4)
    assert "\x1b" not in result.err and "expired" not in result.err


def test_a_server_that_asks_to_wait_for_days_is_not_waited_for(serve: Server, tmp_path: Path) -> None:
    server = serve(http(429, Retry_After="99999999"))
    assert_refused(ask(server, tmp_path, "inspect", REPO), NAME, "429", "asks to wait", code=4)
    assert len(server.heads) == 1


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["config.json", "config.json/x"], "a file and a folder"),
        (["a/b/c", "A/B"], "a file and a folder"),
        (["/".join(["a" * 200] * 5)], "not a safe file name"),
        (["config.json", "config.json.partial"], "is not whole"),
        (["a\u0000b"], "not a safe file name"),
    ],
)
def test_names_that_cannot_lie_in_one_folder_refuse_the_repo(
    serve: Server, tmp_path: Path, names: list[str], words: str
) -> None:
    rows = [{"rfilename": n, "size": 1, "blobId": "0" * 40} for n in names]
    server = serve(http(200, json.dumps({"sha": "ab" * 20, "siblings": rows}).encode()))
    assert_refused(ask(server, tmp_path, "pull", "owner/model", "dest"), NAME, words)
    assert not (tmp_path / "dest").exists()


def test_publish_to_what_answers_other_things_is_told_so(serve: Server, tmp_path: Path, mini_source: Path) -> None:
    assert run_process("quantize", mini_source, "out", cwd=tmp_path).code == 0
    for body in (LISTING, b"[]", b'"text"', b"{}", b"7"):
        result = ask(serve(http(200, body)), tmp_path, "publish", "out", NAME, "--token", "hf_x")
        assert result.code == 4 and "bug" not in result.err and NAME in result.err, result
