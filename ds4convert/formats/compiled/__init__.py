"""The inner loops of rounding, compiled, where numba is installed (`pip install 'ds4convert[fast]'`).

They give the bytes of the plain path, which stays: numpy rounds where numba is missing, and for the first weights of a
process, as importing and compiling takes longer than a small model. Whether sums come out alike depends on how numpy
was built for a processor, so a process compares a sample before it relies on the kernels.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from ds4convert.formats.array_backends import on_host
from ds4convert.formats.compiled.keeping import is_kept

AFTER, AFTER_UNKEPT = 1 << 24, 1 << 28
"""Weights that a process rounds in the plain way first: what loading the kernels costs, and what compiling does."""


class _Choice:
    """Whether this process uses the kernels: `after` None never, else from so many weights on."""

    def __init__(self) -> None:
        self.after: int | None = AFTER if is_kept() else AFTER_UNKEPT
        self.seen = 0
        self.found: ModuleType | None = None
        self.looked = False


_choice = _Choice()


def use(after: int | None) -> int | None:
    """Use the kernels after so many further weights in this process, at once with 0, never with None.

    Returns what was set before.
    """
    before, _choice.after, _choice.seen = _choice.after, after, 0
    return before


GAIN = 4.0
"""Times that the kernels are as fast as the plain path (benchmarks/RESULTS.md: 3.8 to 5 for affine formats)."""


def settle(weights: int) -> None:
    """Use the kernels at once if so many weights are more than what this process rounds in the plain way first.

    For trials: where compiled code cannot be kept, compiling takes longer than any trial, and `gain` tells instead.
    """
    if _choice.after is not None and weights > _choice.after and is_kept():
        use(0)


def gain(weights: int) -> float:
    """Return how much faster a process that rounds so many weights is than a trial in the plain way shows."""
    return GAIN if weights > AFTER_UNKEPT and not is_kept() and installed() and on_host() else 1.0


def affine(weights: int) -> Any:
    """Return the kernels of affine formats for rounding so many weights; None where the plain path is to be taken."""
    if _choice.after is None or not on_host():
        return None
    if _choice.seen < _choice.after:
        _choice.seen += weights
        return None
    if not _choice.looked:
        _choice.found = _loaded()
        _choice.looked = True
    return _choice.found


def installed() -> bool:
    """Return whether there is a compiler, without loading it."""
    import importlib.util

    return importlib.util.find_spec("numba") is not None


def _loaded() -> ModuleType | None:
    if not installed():
        return None
    try:
        from ds4convert.formats.compiled import affine_kernels
    except ImportError:  # built for another numpy
        return None
    from ds4convert.formats.compiled.sample import equal

    return affine_kernels if equal() else None
