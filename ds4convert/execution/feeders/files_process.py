"""The process that writes files for a run: told their numbers, it tells what is finished, and ends with the run.

It appends nothing to the journal. What it has synced it tells the run, which records it, so that a folder has one
journal and one writer of it. It holds the lock of the run's writers: a run that follows waits until it has ended.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from ds4convert.execution.elsewhere.deposit import Deposit, Stays
from ds4convert.execution.file_writer import Run, Stopped
from ds4convert.execution.journal import Begun, Finished, Log
from ds4convert.execution.rounding_steps import Importance
from ds4convert.execution.sources import Sources
from ds4convert.execution.workers import receive, send
from ds4convert.files import Disk
from ds4convert.planning.types import Done, Plan
from ds4convert.storage.local_files import LocalFiles, Place, SourceChanged
from ds4convert.storage.records import Fingerprint

Order = int | Literal["end", "stop"]
"""A number of a file to write; no more will come; drop what is not begun and stop between two pieces."""

TOLD_EVERY_S = 0.2
"""How often progress is told at most: a message for every piece would keep the run's own interpreter busy."""


@dataclass(frozen=True)
class Setup:
    """What a process needs to know of the run, as plain data."""

    plan: Plan
    out: Path
    places: Mapping[str, Place]
    prints: Mapping[str, Fingerprint]
    finished: Finished
    disk: Disk
    importance: Importance
    jobs: int
    cores: int
    deposit: Deposit = field(default_factory=Stays)


class Talk(Log):
    """The way to the run. Safe to use from several threads."""

    def __init__(self, sink: IO[bytes]) -> None:
        self._sink, self._lock = sink, threading.Lock()
        self._bytes, self._told = 0, time.monotonic()

    def say(self, kind: str, *values: Any) -> None:
        """Send one message, and the progress that is due before it."""
        with self._lock:
            self._send_progress()
            send(self._sink, (kind, *values))

    def _send_progress(self) -> None:
        if self._bytes:
            send(self._sink, ("progress", self._bytes))
        self._bytes, self._told = 0, time.monotonic()

    def progress(self, n: int) -> None:
        """Count bytes; tell them when it is time."""
        with self._lock:
            self._bytes += n
            if time.monotonic() - self._told >= TOLD_EVERY_S:
                self._send_progress()

    def steps(self, done: Mapping[int, Done]) -> None:
        """Tell of steps whose bytes have been synced."""
        if done:
            self.say("steps", dict(done))

    def begun(self, n: int, so_far: Begun) -> None:
        """Tell how far a large step has come, whose bytes up to there have been synced."""
        self.say("begun", n, so_far)

    def file(self, number: int, sha256: str | None) -> None:
        """Tell that a file has its final name."""
        self.say("file", number, sha256)


def serve() -> None:
    """Be such a process."""
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    sys.stdout = sys.stderr  # whatever prints must not reach the pipe
    talk = Talk(sink)
    try:
        _work(receive(source), talk, source)
    except EOFError:
        return
    except Exception as e:
        talk.say("failed", e)
    else:
        talk.say("ended")
    os._exit(0)  # a thread still waits for orders, and an ordinary end would wait for it


def _work(setup: Setup, talk: Talk, source: IO[bytes]) -> None:
    sources = Sources(LocalFiles(setup.places), setup.plan)
    try:
        for name, seen in setup.prints.items():
            if sources.prints.files[name] != seen:
                raise SourceChanged(name, "it has another size or modification time")
        run = Run(
            setup.plan, setup.out, sources, setup.disk, talk, setup.finished, talk.progress, setup.importance,
            cores=setup.cores, deposit=setup.deposit,
        )  # fmt: skip
        with run.pool:
            _files(run, setup.jobs, talk, source)
    finally:
        sources.close()


def _files(run: Run, jobs: int, talk: Talk, source: IO[bytes]) -> None:
    """Write the files whose numbers come, `jobs` at a time."""
    todo: queue.SimpleQueue[int | None] = queue.SimpleQueue()

    def listen() -> None:
        while True:
            try:
                order: Order = receive(source)
            except (EOFError, OSError):
                os._exit(1)  # the run has ended without a word: nothing is written for it any more
            if isinstance(order, int):
                todo.put(order)
                continue
            if order == "stop":
                run.stop.set()
            for _ in range(jobs):
                todo.put(None)

    def write() -> None:
        while (number := todo.get()) is not None:
            try:
                run.one_file(number)
            except BaseException:
                for _ in range(jobs):
                    todo.put(None)
                raise
            talk.say("done", number, run.result.hashes[number], {n: run.result.steps[n] for n in run.steps_of[number]})

    threading.Thread(target=listen, daemon=True).start()
    with ThreadPoolExecutor(jobs, "convert") as pool:
        futures = [pool.submit(write) for _ in range(jobs)]
        wait(futures)
    failed = [e for f in futures if (e := f.exception()) is not None]
    told = [e for e in failed if not isinstance(e, Stopped)]
    if told:
        raise told[0]
