"""Work on all cores: a few worker processes, each fed by a thread.

numpy's calls on a cache's worth of values are too short for threads of one interpreter to share (measured: two threads
are no faster than one). A worker is this interpreter once more, told what to do through its standard input: it ends
when that ends, so none outlives a run, however the run ends. Nothing of the caller's own script, or of the
current folder (`isolation`), is imported.
"""

from __future__ import annotations

import os
import pickle
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, Any, TypeVar

from ds4convert import isolation
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


def started(code: str, kept_open: Collection[int] = ()) -> subprocess.Popen[bytes]:
    """Start an interpreter that runs `code` and is told what to do through its standard input.

    One thread per process: the processes are the cores. A session of its own: Ctrl-C is for the run, which ends it.
    `kept_open` are descriptors that it keeps, and with them the locks on their files.
    """
    return subprocess.Popen(
        isolation.interpreter(code),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=isolation.environment(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1"),
        start_new_session=True,
        pass_fds=tuple(kept_open),
    )


def has_ended(process: subprocess.Popen[bytes]) -> EnvironmentFault:
    """Return the error of a process that ended before its work."""
    return EnvironmentFault(
        f"a worker process ended (exit code {process.wait()}); out of memory? Run the command again: it goes on where "
        "it stopped"
    )


class _Worker:
    def __init__(self) -> None:
        self.process = started("from ds4convert.execution.workers import serve; serve()")

    def run(self, work: Callable[[], Any]) -> Any:
        """Return what `work` returns in the worker; raise what it raises."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            send(self.process.stdin, work)
            good, value = receive(self.process.stdout)
        except (OSError, EOFError):
            raise has_ended(self.process) from None
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
    """Runs work on `cores`. `processes` false: in threads of this interpreter, for little work and for GPUs."""

    def __init__(self, processes: bool, cores: int | None = None) -> None:
        self.cores = min(cores or all_cores(), MOST_FED if processes and cores else FED)
        self._processes = processes
        self._threads = ThreadPoolExecutor(self.cores, "round")
        self._workers: list[_Worker] = []
        self._local = threading.local()

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Return the future result of `work`, which has to be plain data and a function of a module."""
        return self._threads.submit(self._run, work)

    def on_all(self, work: Callable[[], object]) -> None:
        """Do `work` in every worker process, all of which are started for it."""
        ready = threading.Barrier(self.cores)
        for done in [self._threads.submit(self._together, ready, work) for _ in range(self.cores)]:
            done.result()

    def _together(self, ready: threading.Barrier, work: Callable[[], object]) -> None:
        ready.wait()  # so that each thread takes one
        self._run(work)

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

FED = 8
"""Worker processes that one interpreter feeds, where another can be had for more: each takes and hands on all bytes of
its workers, which costs it 1.25 ms for every 30 ms of theirs, and reads, writes and hashes besides."""

MOST_FED = 24
"""Worker processes that one interpreter can keep at work at all, by these figures."""

WORKER_BYTES = 80 << 20
"""Memory of a worker process (measured: a run of two workers takes 191 MB in all, benchmarks/quantize_time.py)."""


COMPILED_BYTES = 180 << 20
"""What a worker takes more once it rounds with compiled loops: numba, and its compiler where it has to compile."""


def all_cores() -> int:
    """Return the cores that this process may use: a container or a scheduler may have given it some only."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def uses_processes(weights: int, cores: int | None = None) -> bool:
    """Return whether rounding so many weights is done in processes: not for little, and not where a GPU does it.

    One core alone has a process for little work as well: numpy's products of matrices would take all cores here.
    """
    from ds4convert.formats.array_backends import on_host

    return (weights >= ENOUGH_WEIGHTS or (weights > 0 and cores == 1)) and on_host()


def rounding_pool(weights: int, compensated: bool = False, cores: int | None = None) -> Pool:
    """Return a pool for rounding so many weights on so many cores; on those that one interpreter feeds if not said.

    Compensated rounding multiplies matrices, whose sums depend on the number of threads of a library: a worker has one.
    """
    return Pool(compensated or uses_processes(weights, cores), cores)


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
