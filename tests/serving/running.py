"""A server in a process of its own, and how tests talk to it: HTTP by the standard library, the log, the figures."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from tests import support

SLOW_START = 60
"""Seconds after which a test gives up on a server: far more than it needs, as other tests run beside it."""

SLOW_END = 60
"""Seconds after which a test gives up on what a server does without being in a hurry: ending, counting, writing a line."""


@dataclass
class Answer:
    status: int
    body: bytes
    headers: dict[str, str]

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The events of a stream, without the closing [DONE]."""
        lines = [x.removeprefix("data: ") for x in self.body.decode().splitlines() if x.startswith("data: ")]
        assert lines[-1] == "[DONE]", lines[-1]
        return [json.loads(x) for x in lines[:-1]]


class Running:
    """`ds4convert serve` on a free port of the loopback."""

    def __init__(self, folder: Path, log: Path, *options: object, variables: dict[str, str] | None = None) -> None:
        env = os.environ | {"PYTHONPATH": str(support.ROOT), "PYTHONDONTWRITEBYTECODE": "1"} | (variables or {})
        command = [sys.executable, "-m", "ds4convert", "serve", folder, "--port", "0", *options]
        self.log_path, begun = log, time.monotonic()
        with log.open("wb") as out:
            words = [str(x) for x in command]
            die = support.die_with_parent
            self.process = subprocess.Popen(words, stdout=out, stderr=out, env=env, preexec_fn=die)
        while not (found := re.search(r"at http://(\S+):(\d+) ", self.log)):
            assert self.process.poll() is None, self.log
            assert time.monotonic() - begun < SLOW_START, self.log
            time.sleep(0.02)
        self.start_seconds = time.monotonic() - begun
        self.port = int(found[2])
        self.url = f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
        raw = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, raw, headers or {})
            response = connection.getresponse()
            return Answer(response.status, response.read(), dict(response.getheaders()))
        finally:
            connection.close()

    def text(self, prompt: str, **fields: Any) -> Answer:
        return self.ask("POST", "/v1/completions", {"prompt": prompt, "max_tokens": 16} | fields)

    def chat(self, *contents: str, **fields: Any) -> Answer:
        roles = ("user", "assistant")
        messages = [{"role": roles[n % 2], "content": c} for n, c in enumerate(contents)]
        return self.ask("POST", "/v1/chat/completions", {"messages": messages, "max_tokens": 16} | fields)

    def raw(self, data: bytes) -> socket.socket:
        """Send bytes on a connection of their own, and leave it open."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        connection.sendall(data)
        return connection

    def post_bytes(self, fields: dict[str, Any], path: str = "/v1/completions") -> bytes:
        body = json.dumps(fields).encode()
        return f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body

    def figure(self, name: str) -> float:
        """A series of /metrics, by its name and labels."""
        for line in self.ask("GET", "/metrics").body.decode().splitlines():
            if line.startswith(f"ds4convert_{name} "):
                return float(line.rpartition(" ")[2])
        raise KeyError(name)

    def wait_for(self, name: str, value: float, seconds: float = SLOW_END) -> None:
        until = time.monotonic() + seconds
        while (found := self.figure(name)) != value:
            assert time.monotonic() < until, f"{name} is {found}, not {value}"
            time.sleep(0.05)

    def resident_bytes(self) -> int:
        fields = Path(f"/proc/{self.process.pid}/statm").read_text().split()
        return int(fields[1]) * os.sysconf("SC_PAGESIZE")

    def peak_bytes(self) -> int:
        """The most memory that the process has had at any time."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) << 10

    def end(self) -> int:
        """Ask it to end; returns its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(SLOW_END)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
