"""Where temporary folders of the tests lie: in memory where there is room, as most of their time is waiting for a drive.

The program syncs every file and folder that it finishes; thousands of tests do little else than finish small ones.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

MEMORY = Path("/dev/shm")
ROOM_BYTES = 6 << 30
"""What two workers need at the most at one moment, twice over."""


def in_memory() -> Path | None:
    """Return a new folder in memory; None where there is no such place, too little room, or one was asked for."""
    asked = os.environ.get("TMPDIR") or os.environ.get("PYTEST_DEBUG_TEMPROOT")
    if asked or not MEMORY.is_dir() or not os.access(MEMORY, os.W_OK) or _available() < 2 * ROOM_BYTES:
        return None
    about = os.statvfs(MEMORY)
    runs_programs = not about.f_flag & getattr(os, "ST_NOEXEC", 0)  # environments are made there
    if not runs_programs or about.f_bavail * about.f_frsize < ROOM_BYTES:
        return None
    folder = Path(tempfile.mkdtemp(prefix="ds4convert-tests-", dir=MEMORY))
    folder.chmod(0o755)  # as /tmp is to other users: some tests become one
    return folder


def _available() -> int:
    """Return the bytes of memory that this machine has to spare."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))


def use(folder: Path) -> None:
    """Have pytest, this process and those that it starts make their temporary folders in `folder`."""
    os.environ["TMPDIR"] = os.environ["PYTEST_DEBUG_TEMPROOT"] = tempfile.tempdir = str(folder)


def give_back(folder: Path) -> None:
    """Remove the folder with all that is left in it."""
    shutil.rmtree(folder, ignore_errors=True)
