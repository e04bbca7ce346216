"""Ctrl-C, `kill` and a closed terminal: the run stops between two pieces, says how to go on, and exits 130, 143 or 129.

A second signal ends the process at once, wherever it is: what is finished was made to outlast `kill -9`. Signals that
whoever started this process had set to be ignored (`nohup`, jobs of a script) stay ignored.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAID = b"Interrupted. What is finished is safe; the same command goes on from there.\n"

_received: list[int] = []


def _at_once(number: int, frame: FrameType | None) -> None:
    try:
        os.write(2, SAID)
    finally:
        os._exit(128 + number)


def _in_order(number: int, frame: FrameType | None) -> None:
    if _received:
        _at_once(number, frame)
    _received.append(number)
    raise KeyboardInterrupt


def _set(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            with contextlib.suppress(ValueError):  # in a thread of another program, which has its own ways
                signal.signal(number, handler)


def _while_loading() -> None:
    """Until `heed` is called, let a signal end the process without a traceback; only where this is the program."""
    program = Path(sys.argv[0])
    if program.name == "ds4convert" or program.parts[-2:] == ("ds4convert", "__main__.py"):
        _set(_at_once)


def heed() -> None:
    """From now on, raise `KeyboardInterrupt` in the main thread at the first signal, and exit at the second."""
    _set(_in_order)


def done() -> None:
    """The command has ended: a signal while the interpreter goes down does not matter any more."""
    _set(signal.SIG_DFL)


def exit_code() -> int:
    """Return the exit code of an interrupted run: 128 and the number of the signal, 130 for Ctrl-C."""
    return 128 + (_received[0] if _received else signal.SIGINT)


_while_loading()
