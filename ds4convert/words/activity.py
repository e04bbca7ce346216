"""The file that is worked on now, for whoever shows progress: said where a file is begun, read where a bar is drawn.

Several may be worked on at once; the last that was begun is the one that is shown. So it says where a run is, and is
never what anything depends on.
"""

from __future__ import annotations

_now = ""


def at(name: str) -> None:
    """Say that work on a file begins; "" when there is none any more."""
    global _now
    _now = name


def now() -> str:
    """Return the file that was begun last, "" where none is worked on."""
    return _now
