"""How many files this process may have open. macOS gives a program 256 until it asks for more."""

from __future__ import annotations

import contextlib
import resource
from typing import Any

WANTED = 8192
"""More than any model has shards; macOS refuses what is above its `kern.maxfilesperproc` (10,240 and more)."""


MLX_LM_WANTS = 4096


def raise_open_files(wanted: int = WANTED) -> int:
    """Raise the limit of open files to `wanted`, or as far as is allowed; return what it is now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def forgive_refusals() -> None:
    """Let a library ask for more open files than are allowed here, from now on; that it may not have them is no error.

    `mlx_lm.utils` sets 2,048 of at most 4,096 whenever it is imported, and the import fails where that is refused.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or hard >= MLX_LM_WANTS:
        return
    real = resource.setrlimit

    def careful(*args: Any) -> None:
        try:
            real(*args)
        except (ValueError, OSError):
            if args[0] != resource.RLIMIT_NOFILE:
                raise

    resource.setrlimit = careful
