"""The run's side of the processes that write files: it hands out numbers of files, and records what is finished."""

from __future__ import annotations

import contextlib
import queue
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from ds4convert.execution.feeders.child import LAST, Child, Message
from ds4convert.execution.feeders.files_process import Setup
from ds4convert.execution.file_writer import Result, Run
from ds4convert.execution.workers import has_ended

SERVE = "from ds4convert.execution.feeders.files_process import serve; serve()"
LOOK_S = 0.2
ENDING_S = 60
"""How long processes may take to sync what they have written when a run stops."""


class Feeders:
    """The processes of a run and what they have still to do."""

    def __init__(self, run: Run, numbers: Iterable[int]) -> None:
        # The largest files first, so that no core is left with one in the end.
        self._todo = deque(sorted(numbers, key=lambda n: -run.plan.files[n].size))
        self._run = run
        self._heard: queue.SimpleQueue[tuple[Child, Message]] = queue.SimpleQueue()
        self._processes: list[Child] = []
        self._ending = False

    def write(self, setup: Setup, workers: Iterable[int], lock: int) -> Result:
        """Write the files with a process for each share of workers. Raises what the first of them to fail raised."""
        try:
            shares = list(workers)
            self._processes = [Child(SERVE, self._heard, [lock]) for _ in shares]
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

    def _next(self, process: Child) -> None:
        """Give a process its next file; when there is none left, tell all that no more will come."""
        if self._todo:
            process.order(self._todo.popleft())
        elif not self._ending:
            self._ending = True
            for other in self._processes:
                other.order("end")

    def _hear(self, act: Callable[[Child, str, tuple[Any, ...]], None]) -> None:
        with contextlib.suppress(queue.Empty):  # looks up now and then, so that a signal arrives
            process, (kind, *values) = self._heard.get(timeout=LOOK_S)
            process.over |= kind in LAST
            self._record(kind, tuple(values))
            act(process, kind, tuple(values))

    def _record(self, kind: str, values: tuple[Any, ...]) -> None:
        if kind == "steps":
            self._run.journal.steps(*values)
        elif kind == "begun":
            self._run.journal.begun(*values)
        elif kind == "file":
            self._run.journal.file(*values)

    def _act(self, process: Child, kind: str, values: tuple[Any, ...]) -> None:
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
