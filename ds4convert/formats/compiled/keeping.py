"""Whether compiled code is kept for the next process."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def is_kept() -> bool:
    """Return whether compiled code can be kept: beside the sources, as Python keeps its own, and nowhere else."""
    here = Path(__file__).parent
    cache = here / "__pycache__"
    return not sys.dont_write_bytecode and os.access(cache if cache.is_dir() else here, os.W_OK)
