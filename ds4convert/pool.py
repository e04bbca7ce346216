"""Work on all cores: a few worker processes, each fed by a thread.

numpy's calls on a cache's worth of values are too short for threads of one interpreter to share (measured: two threads
are no faster than one). A worker is this interpreter once more, told what to do through its standard input: it ends
when that ends, so none outlives a run, however the run ends. Nothing of the caller's own script is imported again.
"""

from __future__ import annotations

import os
import pickle
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, TypeVar

from ds4convert.errors import EnvironmentFault

T = TypeVar("T")
LENGTH = struct.Struct("<Q")


def send(stream: IO[bytes], value: object) -> None:
    """Write a value with its length in front."""
    data = pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
    stream.write(LENGTH.pack(len(data)))
    stream.write(data)
    stream.flush()


def receive(stream: IO[bytes]) -> Any:
    """Return the next value. Raises `EOFError` at the end."""
    head = stream.read(LENGTH.size)
    if len(head) < LENGTH.size:
        raise EOFError
    data = stream.read(LENGTH.unpack(head)[0])
    return pickle.loads(data)


class _Worker:
    def __init__(self) -> None:
        root = str(Path(__file__).resolve().parent.parent)
        code = f"import sys; sys.path.insert(0, {root!r}); from ds4convert.pool import serve; serve()"
        # One thread per worker: the workers are the cores. A session of its own: Ctrl-C is for the run, which ends it.
        environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )

    def run(self, work: Callable[[], Any]) -> Any:
        """Return what `work` returns in the worker; raise what it raises."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            send(self.process.stdin, work)
            good, value = receive(self.process.stdout)
        except (OSError, EOFError):
            raise EnvironmentFault(
                f"a worker process ended (exit code {self.process.wait()}); out of memory? Run the command again: it "
                "goes on where it stopped"
            ) from None
        if not good:
            raise value
        return value

    def close(self) -> None:
        """End the worker."""
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                try:
                    stream.close()
                except OSError:  # it ended before
                    pass
        self.process.wait()


class Pool:
    """Runs work on all cores. `processes` false: in threads of this interpreter, for little work and for GPUs."""

    def __init__(self, processes: bool) -> None:
        self.cores = workers()
        self._processes = processes
        self._threads = ThreadPoolExecutor(self.cores, "round")
        self._workers: list[_Worker] = []
        self._local = threading.local()

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Return the future result of `work`, which has to be plain data and a function of a module."""
        return self._threads.submit(self._run, work)

    def _run(self, work: Callable[[], T]) -> T:
        if not self._processes:
            return work()
        if not hasattr(self._local, "worker"):
            self._local.worker = _Worker()
            self._workers.append(self._local.worker)
        result: T = self._local.worker.run(work)
        return result

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.close()


ENOUGH_WEIGHTS = 16 << 20
"""Weights to round from which on starting processes pays."""

MOST_WORKERS = 8
"""Worker processes at most: each is an interpreter with numpy, and a run is to stay below 1 GB in all."""

WORKER_BYTES = 80 << 20
"""Memory of a worker process (measured: a run of two workers takes 191 MB in all, benchmarks/quantize_time.py)."""


def workers() -> int:
    """Return how many pieces of work go on at once."""
    return min(os.cpu_count() or 1, MOST_WORKERS)


def uses_processes(weights: int) -> bool:
    """Return whether rounding so many weights is done in processes: not for little, and not where a GPU does it."""
    from ds4convert.formats.arrays import on_host

    return weights >= ENOUGH_WEIGHTS and on_host()


def rounding_pool(weights: int) -> Pool:
    """Return a pool for rounding so many weights."""
    return Pool(uses_processes(weights))


def serve() -> None:
    """Be a worker: do what comes in until nothing more does."""
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    sys.stdout = sys.stderr  # whatever prints must not reach the pipe
    while True:
        try:
            work = receive(source)
        except (EOFError, KeyboardInterrupt):
            return
        try:
            answer = (True, work())
        except Exception as e:
            answer = (False, e)
        send(sink, answer)
