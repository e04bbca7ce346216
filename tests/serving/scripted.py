"""A server in this process whose decoder says what a test tells it: HTTP and replies without a model."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection
from queue import Empty, Queue
from typing import Any

from ds4convert.inference import chat
from ds4convert.inference.decode import DecodeStats
from ds4convert.serving.http.access import Policy, origin_of
from ds4convert.serving.http.handler import Site
from ds4convert.serving.metrics import Metrics
from ds4convert.serving.reply import REASONING, Marks, Piece, StopText
from ds4convert.serving.seam import Context, Job
from ds4convert.serving.server import Server
from ds4convert.serving.validation import Limits
from tests.serving.running import SLOW_END, Answer

MARKS = Marks("<think>", "</think>", parse=chat.read_calls, is_dsml=True)


@dataclass
class Script:
    """What the decoder says: texts of tokens, then why they end; or an error in their place."""

    texts: Sequence[str] = ("a", "b")
    reason: str = "stop"
    state: str = REASONING
    error: BaseException | None = None
    logprob: float = -0.5
    delay: float = 0.0
    seen: list[Job] = field(default_factory=list)


class Scripted:
    """A decoder of its own thread, as far as the handler knows one."""

    draft_depth, marks, is_healthy = 1, MARKS, True

    def token_bytes(self, token: int) -> bytes:
        return f"token{token}".encode()

    def __init__(self, script: Script) -> None:
        self.script, self.requests, self.ends = script, Queue[Job](), False
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while not self.ends:
            with suppress(Empty):
                self._say(self.requests.get(timeout=0.05))

    def _say(self, job: Job) -> None:
        script, stop = self.script, StopText(list(job.asked.stop))
        script.seen.append(job)
        time.sleep(script.delay)
        if script.error is not None:
            job.ticket.put(script.error)
            return
        job.ticket.put(Context(3, 0, script.state, True, DecodeStats(generated=len(script.texts))))
        for n, text in enumerate(script.texts):
            for piece in stop.push(Piece(text, n, script.logprob, ((n, script.logprob),) * job.asked.top_logprobs)):
                job.ticket.put(piece)
        for piece in stop.rest():
            job.ticket.put(piece)
        job.ticket.put(script.reason)


@dataclass
class Wire:
    """A running server, and how to talk to it byte by byte."""

    port: int
    script: Script
    lines: list[str]
    site: Site

    def raw(self, data: bytes, wait: float = SLOW_END) -> bytes:
        """Send bytes; return all that comes back."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=wait) as connection:
            connection.sendall(data)
            return everything(connection)

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
        raw = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection = HTTPConnection("127.0.0.1", self.port, timeout=SLOW_END)
        connection.request(method, path, raw, headers or {})
        response = connection.getresponse()
        answer = Answer(response.status, response.read(), dict(response.getheaders()))
        connection.close()
        return answer

    def chat(self, texts: Sequence[str], reason: str = "stop", **fields: Any) -> Answer:
        self.script.texts, self.script.reason = texts, reason
        return self.ask("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]} | fields)


def everything(connection: socket.socket) -> bytes:
    found = b""
    while part := connection.recv(65536):
        found += part
    return found


@contextmanager
def serving(
    api_key: str | None = None, origins: Sequence[str] = (), host: str = "127.0.0.1", seconds: float = 10.0
) -> Iterator[Wire]:
    """Serve on a free port of the loopback; bodies of 2,000 bytes at most, requests within `seconds`."""
    lines: list[str] = []
    script = Script()
    decoder: Any = Scripted(script)
    limits = Limits(1000, 100, 1000, 500, ("demo", "default_model", "/secret/place/demo"), {})
    policy = Policy(host, api_key, frozenset(map(origin_of, origins)))
    site = Site(decoder, Metrics(True), limits, policy, "print", b"<html>", 2000, lines.append, seconds)
    server = Server(("127.0.0.1", 0), socket.AF_INET, site)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield Wire(server.server_address[1], script, lines, site)
    finally:
        decoder.ends = True
        server.shutdown()
        server.server_close()
