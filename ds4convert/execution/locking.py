"""One process at a time in an output folder: by `flock`, and by a file that names its holder where the drive has none.

`flock` ends with its process. Where a drive does not know it (SMB, NFS mounted with `nolocks`, some FUSE), the file
`holder` beside the lock names process and machine; one whose process has ended does not count.

Parts of one plan (`planning.parts`) may write side by side: each holds a lock of its own, and the folder's lock shared.
A division into another number of parts draws its lines elsewhere, so two divisions never run at once.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ds4convert.errors import EnvironmentFault
from ds4convert.files import create_new, remove_if
from ds4convert.planning.parts import Part
from ds4convert.storage import drives

T = TypeVar("T")
LOCK_NAME, HOLDER_NAME = "lock", "holder"
WRITERS_NAME = "writers"
"""A file whose lock the processes that write for a run hold with it: they may outlive it for a moment."""

_HELD = {errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES}
_NO_LOCKS = drives.UNSUPPORTED | {errno.EBADF, errno.EPERM}
"""What `flock` answers where the drive cannot lock: NFS over another mount says EBADF."""

_WRITERS_END_S = 60
"""How long processes of a run that was killed are waited for: they end at once, unless the disk holds them up."""

_PATIENCE = 10
"""How often a holder's file that is still empty is read again, a tenth of a second apart."""


def is_lock(name: str) -> bool:
    """Return whether a file of the state folder belongs to a lock."""
    return re.fullmatch(r"(lock|holder|writers)(-\d+-of-\d+)?", name, re.ASCII) is not None


class Busy(EnvironmentFault):
    """Another process has what was to be taken; it may let go of it, or has ended and the drive does not know yet."""


def patiently(take: Callable[[], T], seconds: float, look_s: float = 0.5) -> T:
    """Return what `take` returns; where another process is in the way, try again for so long, then raise `Busy`."""
    until = time.monotonic() + seconds
    while True:
        try:
            return take()
        except Busy:
            if time.monotonic() > until:
                raise
            time.sleep(look_s)


class Lock:
    """Holds an output folder for one process, by its state folder; with `part`, for one part of a divided plan.

    `first` tells, of a part, that no other was at work when it came: it may write what all parts read, and lets them in
    by `share`.
    """

    def __init__(self, state: Path, part: Part | None = None) -> None:
        """Take the lock. Raises `EnvironmentFault` where another process has it, `OSError` where the disk fails."""
        self._state, self.part = state, part
        self._holder, self._holder_path = b"", state / HOLDER_NAME
        self.first, self._main = True, -1
        self._fds: list[int] = []
        try:
            if part is None:
                self._take(LOCK_NAME, HOLDER_NAME)
            else:
                self._take_part(part)
            self._await_writers()
        except BaseException:
            self._close()
            raise

    def _open(self, name: str) -> int:
        fd = os.open(self._state / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        self._fds.append(fd)
        return fd

    def _take(self, name: str, holder: str) -> None:
        """Take one lock for this process alone, by the holder's file where the drive has no locks."""
        taken = _flock(self._open(name), fcntl.LOCK_EX)
        if taken is False:
            raise Busy(
                f"{self._state.parent}: another ds4convert is writing {self._what()}", hint="wait for it, or end it"
            )
        if taken is None:
            whole = [] if self.part is None else [self._state / HOLDER_NAME]
            for other in (*self._rivals(HOLDER_NAME), *(p for p in whole if p.exists())):
                _take_away(other)
            self._holder_path = self._state / holder
            self._holder = _hold(self._holder_path)
            drives.note(
                f"the disk of {self._state.parent} cannot lock files: do not write to this folder from two machines at "
                "once"
            )

    def _what(self) -> str:
        return "to this folder" if self.part is None else f"part {self.part} of this folder"

    def _take_part(self, part: Part) -> None:
        """Take a part's lock, then the folder's for a moment alone, or shared where other parts are at work."""
        self._take(f"{LOCK_NAME}-{part.name}", f"{HOLDER_NAME}-{part.name}")
        if self._holder:
            return
        self._main = self._open(LOCK_NAME)
        for _ in range(_PATIENCE * 10):
            if _flock(self._main, fcntl.LOCK_EX):
                break
            if _flock(self._main, fcntl.LOCK_SH):
                self.first = False
                break
            time.sleep(0.1)
        else:
            raise Busy(
                f"{self._state.parent}: another ds4convert is writing to this folder, and not a part of it",
                hint="wait for it, or end it",
            )
        for other in self._rivals(LOCK_NAME):
            if _is_held(other):
                raise Busy(
                    f"{self._state.parent}: a division into another number of parts is being written ({other.name})",
                    hint="run parts of one number only, or wait until those have ended",
                )

    def _rivals(self, kind: str) -> list[Path]:
        """Return the files of parts that may not be at work beside this process: all, or those of other divisions."""
        found = sorted(p for p in self._state.glob(f"{kind}-*") if is_lock(p.name))
        return [p for p in found if self.part is None or not p.name.endswith(f"-of-{self.part.count}")]

    def share(self) -> None:
        """Let other parts of the plan in."""
        if self.part is not None and not self._holder and not _flock(self._main, fcntl.LOCK_SH):
            raise Busy(f"{self._state.parent}: another ds4convert is writing to this folder", hint="wait for it")

    def _writers_name(self, part: Part | None) -> str:
        return WRITERS_NAME if part is None else f"{WRITERS_NAME}-{part.name}"

    def _await_writers(self) -> None:
        """Wait for the processes that still write for a run that has ended, except those of parts at work beside."""
        mine = [self._state / self._writers_name(p) for p in {self.part, None}]
        left = [p for p in (*mine, *self._rivals(WRITERS_NAME)) if p.exists()]
        until = time.monotonic() + _WRITERS_END_S
        while left := [p for p in left if _is_held(p)]:
            if time.monotonic() > until:
                raise Busy(
                    f"{self._state.parent}: processes of a run that has ended are still writing here; end them, or "
                    "wait for the disk, and run the command again"
                )
            time.sleep(0.05)

    def for_writers(self) -> int:
        """Return a descriptor for the processes that write for this run: while one has it, no other run begins."""
        fd = self._open(self._writers_name(self.part))
        _flock(fd, fcntl.LOCK_SH)
        return fd

    def release(self) -> None:
        """Let other processes in."""
        if self._holder:
            with contextlib.suppress(OSError):
                remove_if(self._holder_path, self._holder, _aside(self._state))
        self._close()

    def _close(self) -> None:
        for fd in self._fds:
            os.close(fd)


def _flock(fd: int, kind: int) -> bool | None:
    """Return whether a lock was taken, None where the drive has no locks."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno in _HELD:
            return False
        if e.errno in _NO_LOCKS:
            return None
        raise
    return True


def _is_held(path: Path) -> bool:
    """Return whether a process holds the lock of a file; what is no plain file, or gone by now, nobody holds."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as e:
        if e.errno in {errno.ELOOP, errno.ENOENT}:
            return False
        raise
    try:
        return not _flock(fd, fcntl.LOCK_EX)
    finally:
        os.close(fd)


def _aside(state: Path) -> Path:
    return state / f"{HOLDER_NAME}.{os.getpid()}"


def _hold(path: Path) -> bytes:
    """Create the holder's file; return what it says. Raises `EnvironmentFault` where its holder is alive."""
    mine = f"{os.getpid()} {_started(os.getpid())} {socket.gethostname()}\n".encode()
    for _ in range(3):
        if create_new(path, mine):
            return mine
        _take_away(path)
    raise _held(path, "other processes keep taking it")


def _take_away(path: Path) -> None:
    """Remove the file of a holder that has ended. Raises `EnvironmentFault` where it is alive or on another machine."""
    found = _read(path)
    pid, _, rest = found.decode("utf-8", "replace").partition(" ")
    started, _, host = rest.strip().partition(" ")
    if found and host != socket.gethostname():
        raise _held(path, f"process {pid} on {host}")
    if found and _alive(pid, started):
        raise _held(path, f"process {pid}")
    if not remove_if(path, found, _aside(path.parent)) and path.exists():
        raise _held(path, "another process was first")


def _read(path: Path) -> bytes:
    """Return what a holder's file says; b"" where it stays empty: its process ended before it wrote."""
    for _ in range(_PATIENCE):
        with contextlib.suppress(FileNotFoundError):
            if found := path.read_bytes():
                return found
        time.sleep(0.1)
    return b""


def _held(path: Path, by: str) -> Busy:
    return Busy(
        f"{path.parent.parent}: another ds4convert is writing to this folder ({by})",
        hint=f"wait for it, or end it. If it is not running any more, delete {path}",
    )


def _alive(pid: str, started: str) -> bool:
    """Return whether the process runs that had the number `pid` and began at `started`."""
    if not re.fullmatch(r"\d{1,18}", pid, re.ASCII) or int(pid) <= 0:
        return False
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass  # of another user
    now = _started(int(pid))
    return "unknown" in {now, started} or now == started


def _started(pid: int) -> str:
    """Return when a process began, in one word: numbers are given again to later processes."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        told = subprocess.run(["/bin/ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, timeout=5)
        return "-".join(told.stdout.split()) or "unknown"
    return "unknown"
