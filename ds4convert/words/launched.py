"""Which of several processes this is, where mlx.launch or mpirun started them: the first alone says what comes out."""

from __future__ import annotations

import os

VARIABLES = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
"""Where a launcher tells the number of a process: mlx.launch with ring, JACCL and NCCL; Open MPI; MPICH."""


def rank() -> int | None:
    """Return the number of this process by what its launcher told, None where nothing launched it."""
    for name in VARIABLES:
        if os.environ.get(name, "").isdecimal():
            return int(os.environ[name])
    return None


def is_first() -> bool:
    """Return whether this process is the one that prints and writes: the first, or one that runs by itself."""
    return rank() in {None, 0}
