"""How a function tells its caller how far it is and what it found on the way; and the shape of every JSON document."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from ds4convert.checkpoint.types import JSON
from ds4convert.errors import Ds4Error
from ds4convert.words import activity

SCHEMA = 2
"""The version of all JSON documents; 1 is what came before documents said it."""


def document(facts: JSON) -> JSON:
    """Return facts as a JSON document: with the version of its keys in front.

    Lists and tables are copies, so that who changes the document does not change the record that it came from.
    """
    return {"schema": SCHEMA, **{key: _copy(value) for key, value in facts.items()}}


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(inner) for key, inner in value.items()}
    return [_copy(inner) for inner in value] if isinstance(value, list) else value


NEXT = {
    "error": "run the command again with -vv and report what it prints",
    "usage": "run the command with --help: it tells arguments, options and an example",
    "input": "correct what the message names; nothing was written",
    "header": "compare the file with the one that was published, and download it again where they differ",
    "config": "compare config.json with that of the release, and take its values for the keys that the message names",
    "inventory": "run `ds4convert inspect` on the folder: it lists what is missing, extra or misshapen",
    "findings": "run `ds4convert inspect` on the folder: it lists all that is missing, extra or misshapen",
    "value": "compare the file with the one that was published, and download it again where they differ",
    "output": "choose another folder for the output; nothing there was changed",
    "environment": "mend what the message names and run the same command again; what is finished is safe",
    "interrupted": "run the same command again: it goes on from there",
    "bug": "run the command again with -vv, and report what it prints with the output of `ds4convert env`",
}
"""What to do next by the kind of an error, for programs, where the error itself knows nothing better."""


@dataclass(frozen=True)
class Failure:
    """What went wrong, for programs: the exit code, the kind of error (`kind` of its class), and what it is about."""

    code: int
    kind: str
    message: str
    file: str | None = None
    tensor: str | None = None
    hint: str | None = None

    @classmethod
    def of(cls, error: Ds4Error) -> Failure:
        """Return what an error of the library says."""
        return cls(error.exit_code, error.kind, str(error), error.file, error.tensor, error.hint)

    def as_json(self) -> JSON:
        """Return the document of a command that failed; where the error has no hint of its own, what helps its kind."""
        return document({"error": dataclasses.asdict(self) | {"hint": self.hint or NEXT[self.kind]}})


@dataclass(frozen=True)
class Progress:
    """How far a function is: `done` of `total` bytes of what it does now.

    `seconds_left` is None while it is not known. A function that does several things, one after another, names each
    in `what`; the last report of each is `finished`. `where` is the file that was begun last, "" where none is known.
    """

    what: str
    done: int
    total: int
    seconds_left: float | None = None
    finished: bool = False
    where: str = ""


@dataclass(frozen=True)
class Message:
    """A sentence on the way: a warning, a note, or a detail that only the curious want. `str()` gives the text."""

    kind: Literal["detail", "note", "warning"]
    text: str

    def __str__(self) -> str:
        return f"Warning: {self.text}" if self.kind == "warning" else self.text


ProgressCallback = Callable[[Progress], None]
MessageCallback = Callable[[Message], None]
Count = Callable[[int], None]
"""Called with a number of bytes that have been done since the last call."""
SecondsLeft = Callable[[int, float], float | None]
"""From bytes done and seconds since the start to the seconds that are left; None where that is not known yet."""


@dataclass(frozen=True)
class Listener:
    """The two callables of a caller, either of which may be missing."""

    progress: ProgressCallback | None = None
    say: MessageCallback | None = None

    def detail(self, text: str) -> None:
        """Tell what is being done."""
        self._tell(Message("detail", text))

    def note(self, text: str) -> None:
        """Tell what was found on the way."""
        self._tell(Message("note", text))

    def warn(self, text: str) -> None:
        """Tell what the caller has to know."""
        self._tell(Message("warning", text))

    def _tell(self, message: Message) -> None:
        if self.say is not None:
            self.say(message)

    @contextmanager
    def counting(self, what: str, total: int, left: SecondsLeft | None = None) -> Iterator[Count]:
        """Yield what counts bytes and reports their sum to the caller, never from two threads at once.

        `left` knows the time that is left where the speed so far does not tell it.
        """
        progress = self.progress
        if progress is None:
            yield lambda n: None
            return
        start, lock, done = time.monotonic(), threading.Lock(), 0
        left = left or linear(total)

        def count(n: int) -> None:
            nonlocal done
            with lock:
                done += n
                seconds = left(done, time.monotonic() - start)
                progress(Progress(what, done, total, seconds, where=activity.now()))

        activity.at("")
        progress(Progress(what, 0, total, left(0, 0.0)))
        yield count
        progress(Progress(what, max(done, total), total, 0.0, True))  # small files are in the total, and not counted


def linear(total: int) -> SecondsLeft:
    """Return what takes the rest to go as fast as what is done."""

    def left(done: int, seconds: float) -> float | None:
        return max(seconds * (total - done) / done, 0.0) if done and seconds >= 1 else None

    return left
