"""Work on several threads that does not hold up Ctrl-C: the threads are left behind when the program ends."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from typing import Any, TypeVar

A = TypeVar("A")
B = TypeVar("B")

LOOK_S = 0.2
"""How often the caller looks up from waiting, so that a signal arrives."""


def each(work: Callable[[A], B], items: Sequence[A], jobs: int, stop: threading.Event | None = None) -> list[B]:
    """Return `work(item)` of every item in order, at most `jobs` at a time.

    The first exception, Ctrl-C included, is raised at once: `stop` is set, items not begun are dropped, and threads
    that wait for the network are not waited for (they are daemons, so they end with the program).
    """
    stop = stop or threading.Event()
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    for n in range(len(items)):
        todo.put(n)
    done: queue.SimpleQueue[tuple[int, Any, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        while not stop.is_set():
            try:
                n = todo.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((n, work(items[n]), None))
            except BaseException as e:
                done.put((n, None, e))

    results: dict[int, B] = {}
    try:
        for _ in range(min(jobs, len(items))):
            threading.Thread(target=run, daemon=True).start()
        while len(results) < len(items):
            try:
                n, value, error = done.get(timeout=LOOK_S)
            except queue.Empty:
                continue
            if error is not None:
                raise error
            results[n] = value
    finally:
        stop.set()
    return [results[n] for n in range(len(items))]


class AtOnce(Executor):
    """Does work when it is handed over, on the caller's own thread: for runs on one core."""

    def submit(self, fn: Callable[..., B], /, *args: Any, **kwargs: Any) -> Future[B]:
        """Return the future of work that is done already; what it raised is raised by `result`."""
        future: Future[B] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as e:
            future.set_exception(e)
        return future
