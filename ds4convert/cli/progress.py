"""How far a command is: a bar on a terminal, a line a minute in a pipe or a log."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from ds4convert.api.reporting import Progress, SecondsLeft, linear
from ds4convert.words import terminal

LINE_EVERY_S = 60.0
"""Seconds between two lines where there is no terminal."""

SURE_SHARE = 0.05
"""Share of the work from which on its own speed says how long the rest takes; before, the estimate does."""

Say = Callable[[str], None]


class Meter:
    """Shows what a function reports of its progress: one thing after another, each with a bar or lines of its own."""

    def __init__(self, say: Say, detail: Say) -> None:
        self._say, self._detail = say, detail
        self._shown, self._latest = ExitStack(), Progress("", 0, 0, finished=True)
        self._count: Callable[[int], None] = lambda n: None
        self._start = 0.0

    def heard(self, now: Progress) -> None:
        """Show how far the function is."""
        before, self._latest = self._latest, now
        if before.finished or before.what != now.what:
            self.close()
            self._start, before = time.monotonic(), Progress(now.what, 0, now.total)
            left: SecondsLeft = lambda done, seconds: self._latest.seconds_left  # noqa: E731
            shows = shown(now.total, now.what, self._say, left, lambda: self._latest.where)
            self._count = self._shown.enter_context(shows)
        self._count(now.done - before.done)
        if now.finished:
            self.close()
            self._detail(f"{now.what}: {now.total:,} bytes in {time.monotonic() - self._start:.1f} s")

    def close(self) -> None:
        """End what is shown, finished or not."""
        self._shown.close()


@contextmanager
def shown(
    total: int, what: str, say: Say, left: SecondsLeft | None = None, where: Callable[[], str] = lambda: ""
) -> Iterator[Callable[[int], None]]:
    """Yield a callback for numbers of bytes done; `say` prints a line, `left` knows the time left, `where` the file."""
    left = left or linear(total)
    with _bar(total, what, left, where) if sys.stderr.isatty() else _lines(total, what, say, left, where) as done:
        yield done


@contextmanager
def _bar(total: int, what: str, left: SecondsLeft, where: Callable[[], str]) -> Iterator[Callable[[int], None]]:
    from tqdm import tqdm

    start = time.monotonic()
    form = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}, {rate_fmt}{postfix}]"
    bar = tqdm(
        total=total, unit="B", unit_scale=True, desc=what, smoothing=0.05, leave=False, bar_format=form,
        file=terminal.plain(sys.stderr),
    )  # fmt: skip

    def done(n: int) -> None:
        seconds = left(int(bar.n) + n, time.monotonic() - start)
        bar.set_description_str(" ".join(filter(None, (what, terminal.line(where())))), refresh=False)
        bar.set_postfix_str("" if seconds is None else f"{_duration(seconds)} left", refresh=False)
        bar.update(n)

    with bar:
        yield done


def _duration(seconds: float) -> str:
    from ds4convert.words.figures import duration

    return duration(seconds)


@contextmanager
def _lines(
    total: int, what: str, say: Say, left: SecondsLeft, where: Callable[[], str]
) -> Iterator[Callable[[int], None]]:
    count, start, lock = 0, time.monotonic(), threading.Lock()
    ended = threading.Event()

    def done(n: int) -> None:
        nonlocal count
        with lock:
            count += n

    def tell() -> None:
        while not ended.wait(LINE_EVERY_S):
            say(_line(what, count, total, time.monotonic() - start, left) + (f"; {name}" if (name := where()) else ""))

    thread = threading.Thread(target=tell, name="progress", daemon=True)
    thread.start()
    try:
        yield done
    finally:
        ended.set()
        thread.join()


def _line(what: str, done: int, total: int, seconds: float, left: SecondsLeft) -> str:
    from ds4convert.words.figures import duration, size

    share = f" ({done / total:.0%})" if total else ""
    rest = left(done, seconds)
    told = "" if rest is None else f", about {duration(rest)} left"
    return f"{what}: {size(done)} of {size(total)}{share} in {duration(seconds)}{told}"
