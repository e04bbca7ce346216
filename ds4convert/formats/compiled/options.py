"""How the kernels are compiled: without any licence to reorder or fuse, so that every result is that of numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba

from ds4convert.formats.compiled.keeping import is_kept
from ds4convert.formats.small_floats import F32

Function = TypeVar("Function", bound=Callable[..., object])


def kernel(function: Function) -> Function:
    """Return a function compiled on its first call, for each kind of arguments."""
    made: Any = numba.njit(error_model="numpy", nogil=True, boundscheck=False, fastmath=False, cache=is_kept())
    compiled: Function = made(function)
    return compiled


__all__ = ["F32", "kernel"]
