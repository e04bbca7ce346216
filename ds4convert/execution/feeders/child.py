"""A process that works for a run: it is sent orders, and what it says is heard."""

from __future__ import annotations

import contextlib
import queue
import subprocess
import threading
from collections.abc import Collection
from typing import Any

from ds4convert.execution.workers import receive, send, started

Message = tuple[Any, ...]
"""A word that says of what kind it is, and what belongs to it."""

LAST = frozenset({"gone", "ended", "failed"})
"""The messages after which no other comes."""


class Child:
    """One process; what it says is put into `heard` by a thread, its end as `gone` unless it has said its last."""

    def __init__(
        self, code: str, heard: queue.SimpleQueue[tuple[Child, Message]], kept_open: Collection[int] = ()
    ) -> None:
        """Start an interpreter that runs `code`, and keeps some descriptors open."""
        self.process: subprocess.Popen[bytes] = started(code, kept_open)
        self.over = False
        self._heard = heard
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        while True:
            try:
                message = receive(self.process.stdout)
            except Exception:  # the end, or the torn message of a process that was killed in it
                message = ("gone",)
            self._heard.put((self, message))
            if message[0] in LAST:
                return

    def order(self, what: object) -> None:
        """Send an order; one that has ended is heard of by its end."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            send(self.process.stdin, what)

    def close(self) -> None:
        """End the process, which has said its last or does not answer."""
        if not self.over:
            self.process.kill()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        self.process.wait()
