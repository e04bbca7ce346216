"""Where finished files go that do not stay in the folder they are written in: what a run asks of such a place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from ds4convert.execution.journal import Finished, Prints
from ds4convert.planning.types import Done, Plan


class Deposit(Protocol):
    """A place that takes the files of a result, each whole and once. As plain data it goes to the writing processes."""

    keeps: bool
    """Whether files stay where they are written: then nothing else is asked."""

    def begin(self, plan: Plan, prints: Prints) -> Finished:
        """Return what earlier runs of this plan, parts included, put there. `prints` are those of the source now."""

    def holds(self, number: int) -> bool:
        """Return whether a file of the plan was there when the run began, as it was recorded."""

    def put(
        self, number: int, path: Path, done: Mapping[int, Done], sha256: str | None, look: Callable[[], None]
    ) -> None:
        """Put a whole file there, and record it; once this returns, the copy at `path` may go.

        `done` are its steps by number. `look` is called now and then while this waits: what it raises ends the waiting.
        """

    def end(self, out: Path, small: Sequence[str], manifest: str) -> None:
        """Put the small files of the folder `out` there, and the manifest last."""


class Stays(Deposit):
    """Files stay in the folder they are written in."""

    keeps = True

    def begin(self, plan: Plan, prints: Prints) -> Finished:
        """Return nothing: the journal tells all."""
        return Finished()

    def holds(self, number: int) -> bool:
        """Return false: no file is anywhere else."""
        return False

    def put(
        self, number: int, path: Path, done: Mapping[int, Done], sha256: str | None, look: Callable[[], None]
    ) -> None:
        """Leave the file where it is."""

    def end(self, out: Path, small: Sequence[str], manifest: str) -> None:
        """Leave the files where they are."""


class Leaving:
    """The finished files that do not stay: each goes once the digests of the source files it is made of are known.

    What another place has taken cannot be made anew. Of a source that is elsewhere one file at a time is written, and
    its digests are taken as it is fetched, so few files wait.
    """

    def __init__(self, proven: Callable[[int], bool], put: Callable[[int], None]) -> None:
        self._proven, self._put = proven, put
        self._waiting: list[int] = []

    def finished(self, number: int) -> None:
        """Put a file where it goes, and those that waited, as far as their sources are proven."""
        if not self._proven(number):
            self._waiting.append(number)
            return
        self._put(number)
        for n in [n for n in self._waiting if self._proven(n)]:
            self._waiting.remove(n)
            self._put(n)

    def rest(self) -> None:
        """Put the files that waited: all digests are known by now."""
        while self._waiting:
            self._put(self._waiting.pop())
