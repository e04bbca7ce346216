"""The run's side of the processes that write files: it hands out numbers of files, and records what is finished."""

from __future__ import annotations

import contextlib
import queue
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from ds4convert.execution.feeders.files_process import Order, Setup
from ds4convert.execution.file_writer import Result, Run
from ds4convert.execution.workers import has_ended, receive, send, started

Message = tuple[Any, ...]
LOOK_S = 0.2
ENDING_S = 60
"""How long processes may take to sync what they have written when a run stops."""


class _Process:
    """One process; what it says is put into `heard` by a thread."""

    def __init__(self, lock: int, heard: queue.SimpleQueue[tuple[_Process, Message]]) -> None:
        self.process: subprocess.Popen[bytes] = started(
            "from ds4convert.execution.feeders.files_process import serve; serve()", [lock]
        )
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
            if message[0] in {"gone", "ended", "failed"}:
                return

    def order(self, what: Order | Setup) -> None:
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


class Feeders:
    """The processes of a run and what they have still to do."""

    def __init__(self, run: Run, numbers: Iterable[int]) -> None:
        # The largest files first, so that no core is left with one in the end.
        self._todo = deque(sorted(numbers, key=lambda n: -run.plan.files[n].size))
        self._run = run
        self._heard: queue.SimpleQueue[tuple[_Process, Message]] = queue.SimpleQueue()
        self._processes: list[_Process] = []
        self._ending = False

    def write(self, setup: Setup, workers: Iterable[int], lock: int) -> Result:
        """Write the files with a process for each share of workers. Raises what the first of them to fail raised."""
        try:
            shares = list(workers)
            self._processes = [_Process(lock, self._heard) for _ in shares]
            for process, cores in zip(self._processes, shares, strict=True):
                process.order(replace(setup, cores=cores))
            for _ in range(setup.jobs):
                for process in self._processes:
                    self._next(process)
            while not all(p.over for p in self._processes):
                self._hear(self._act)
        except BaseException:
            self._stop()
            raise
        finally:
            for process in self._processes:
                process.close()
        return self._run.result

    def _next(self, process: _Process) -> None:
        """Give a process its next file; when there is none left, tell all that no more will come."""
        if self._todo:
            process.order(self._todo.popleft())
        elif not self._ending:
            self._ending = True
            for other in self._processes:
                other.order("end")

    def _hear(self, act: Callable[[_Process, str, tuple[Any, ...]], None]) -> None:
        with contextlib.suppress(queue.Empty):  # looks up now and then, so that a signal arrives
            process, (kind, *values) = self._heard.get(timeout=LOOK_S)
            process.over |= kind in {"ended", "failed", "gone"}
            self._record(kind, tuple(values))
            act(process, kind, tuple(values))

    def _record(self, kind: str, values: tuple[Any, ...]) -> None:
        if kind == "steps":
            self._run.journal.steps(*values)
        elif kind == "begun":
            self._run.journal.begun(*values)
        elif kind == "file":
            self._run.journal.file(*values)

    def _act(self, process: _Process, kind: str, values: tuple[Any, ...]) -> None:
        if kind == "progress":
            self._run.progress(*values)
        elif kind == "done":
            number, sha256, steps = values
            self._run.result.hashes[number] = sha256
            self._run.result.steps |= steps
            self._next(process)
        elif kind == "failed":
            raise values[0]
        elif kind == "gone":
            raise has_ended(process.process)

    def _stop(self) -> None:
        """Have all stop between two pieces, and record what they have finished until then."""
        for process in self._processes:
            process.order("stop")
        until = time.monotonic() + ENDING_S
        while not all(p.over for p in self._processes) and time.monotonic() < until:
            self._hear(lambda process, kind, values: None)
