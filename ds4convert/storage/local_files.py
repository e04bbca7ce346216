"""Files here that are read by range for hours: few of them open at once, and noticed when somebody changes them.

A model of Pro's size has hundreds of shards, and a Mac gives a program 256 open files.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ds4convert.errors import EnvironmentFault, HeaderError
from ds4convert.storage import drives
from ds4convert.storage.byte_source import ByteSource, Joined, ended
from ds4convert.storage.records import Fingerprint
from ds4convert.storage.safe_open import open_file, resolve_inside

MOST_OPEN = 48

Place = tuple[Path, str]
"""A folder, and the name of a file in it, which may not lead out of the folder."""


class SourceChanged(EnvironmentFault):
    """A file that a run reads was changed under it; `name` is the file."""

    def __init__(self, name: str, how: str) -> None:
        """`how` says what was seen."""
        super().__init__(
            f"{name}: was changed while it was read ({how}), so the run stopped. When nothing writes to it any more, "
            "run the same command again: what came from this file is made anew, all else that is finished stays"
        )
        self.name, self.how = name, how

    def __reduce__(self) -> tuple[type[SourceChanged], tuple[str, str], dict[str, object]]:
        """Return how the error is made again in the process that started this one."""
        return type(self), (self.name, self.how), self.__dict__


@dataclass(frozen=True)
class Look:
    """What a file looked like when it was first opened: bytes, modification time (ns), and which file it is."""

    size: int
    mtime_ns: int
    device: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> Look:
        """Return the look that a file's status shows."""
        return cls(status.st_size, status.st_mtime_ns, status.st_dev, status.st_ino)


_GRAINS_NS = (100, 1000, 10**6, 10**7, 10**9, 2 * 10**9)
"""To what drives round times: SMB and NTFS 100 ns, NFS 1 us, exFAT 10 ms, HFS+ 1 s, FAT32 2 s."""


def _same_time(first: int, now: int) -> bool:
    """Return whether two modification times (ns) are one, the second perhaps rounded.

    A network drive shows the time of a file that was just written exactly, and later as the server has rounded it.
    """
    return first == now or any(first % g and not now % g and abs(first - now) < g for g in _GRAINS_NS)


class LocalFiles(ByteSource):
    """Files here by name. At most `most` stay open, besides those that are being read.

    A file may not change from its first opening to `close`.
    """

    def __init__(self, places: Mapping[str, Place], most: int | None = None) -> None:
        """Take files by the names that they are called, each at its place; none is opened yet."""
        self.places = dict(places)
        self._most = MOST_OPEN if most is None else most
        self._fds: OrderedDict[str, int] = OrderedDict()  # the one used last stands last
        self._users: dict[int, int] = {}  # by descriptor
        self._orphans: set[int] = set()  # descriptors that were in use when all was closed
        self._looks: dict[str, Look] = {}
        self._lock = threading.Lock()

    @classmethod
    def of(cls, folder: Path, names: Iterable[str]) -> LocalFiles:
        """Return files of one folder, called by their names in it."""
        return cls({name: (folder, name) for name in names})

    def __reduce__(self) -> tuple[type[LocalFiles], tuple[dict[str, Place], int]]:
        """Return how another process, wherever it runs, comes to the files of the same places."""
        return type(self), ({n: (folder.absolute(), name) for n, (folder, name) in self.places.items()}, self._most)

    @classmethod
    def at(cls, path: Path) -> LocalFiles:
        """Return the one file at `path`, called by its name."""
        return cls.of(path.parent, [path.name])

    def size(self, name: str) -> int:
        """Return the bytes of a file."""
        return self.look(name).size

    def fingerprint(self, name: str) -> Fingerprint:
        """Return size and modification time of a file."""
        look = self.look(name)
        return look.size, look.mtime_ns

    def folder(self, name: str) -> Path | None:
        """Return the folder that a file is in."""
        return self._place(name)[0]

    def look(self, name: str) -> Look:
        """Return what a file looked like when it was first opened."""
        with self._lock:
            self._open(name)
            return self._looks[name]

    def read(self, name: str, start: int, n: int) -> bytes:
        """Return bytes of a file."""
        try:
            with self.fileno(name) as fd:
                data = os.pread(fd, n, start)
        except OSError as e:
            raise _unreadable(name, start, n, e) from e
        if len(data) == n:
            return data
        whole = bytearray(n)  # the kernel gave less than asked for: a signal, or the end of the file
        self.read_into(name, start, memoryview(whole))
        return bytes(whole)

    def read_into(self, name: str, start: int, view: memoryview) -> None:
        """Fill `view` with the bytes of a file from `start`."""
        done = 0
        try:
            with self.fileno(name) as fd:
                while done < len(view):
                    n = os.preadv(fd, [view[done:]], start + done)
                    if n == 0:
                        raise ended(name, start + len(view))
                    done += n
        except OSError as e:
            raise _unreadable(name, start, len(view), e) from e

    @contextmanager
    def fileno(self, name: str) -> Iterator[int]:
        """Yield a descriptor of a file. Raises `SourceChanged` when it is not what it was when first opened."""
        with self._lock:
            fd = self._open(name)
            self._users[fd] = self._users.get(fd, 0) + 1
        try:
            yield fd
        finally:
            with self._lock:
                self._users[fd] -= 1
                if not self._users[fd]:
                    del self._users[fd]
                    if fd in self._orphans:
                        self._orphans.discard(fd)
                        os.close(fd)

    def _place(self, name: str) -> Place:
        if name not in self.places:
            raise HeaderError(f"{name}: the file is missing", hint="download it again")
        return self.places[name]

    def _open(self, name: str) -> int:
        if name in self._fds:
            self._fds.move_to_end(name)
            return self._fds[name]
        self._close_some()
        fd = open_file(resolve_inside(*self._place(name)), name)
        try:
            self._compare(name, Look.of(os.fstat(fd)))
        except BaseException:
            os.close(fd)
            raise
        self._fds[name] = fd
        return fd

    def _close_some(self) -> None:
        idle = [n for n, fd in self._fds.items() if not self._users.get(fd)]
        for n in idle[: max(0, len(self._fds) - self._most + 1)]:
            os.close(self._fds.pop(n))

    def _compare(self, name: str, now: Look) -> None:
        first = self._looks.setdefault(name, now)
        if now.size != first.size:
            raise SourceChanged(name, f"{now.size} bytes, {first.size} before")
        if not _same_time(first.mtime_ns, now.mtime_ns):
            raise SourceChanged(name, "it has another modification time")

    def check(self, name: str) -> None:
        """Raise `SourceChanged` when a file, or what has its name by now, is not what was first opened."""
        with self._lock:
            if name not in self._looks:
                return
            try:
                self._compare(name, Look.of(resolve_inside(*self._place(name)).stat()))
                status = os.fstat(self._fds[name]) if name in self._fds else None
            except OSError as e:
                raise SourceChanged(name, e.strerror or str(e)) from None
            if status is not None:
                self._compare(name, Look.of(status))
                # Only a file that has lost its name was replaced: some drives give a file another number at every look.
                if status.st_nlink == 0:
                    raise SourceChanged(name, "another file has its name")

    def close(self) -> None:
        """Close all files, those that another thread is reading once it is done; forget what they looked like."""
        with self._lock:
            for fd in self._fds.values():
                if self._users.get(fd):
                    self._orphans.add(fd)
                    continue
                with suppress(OSError):
                    os.close(fd)
            self._fds.clear()
            self._looks.clear()


def _unreadable(name: str, start: int, n: int, e: OSError) -> EnvironmentFault:
    place = f"bytes {start}..{start + n}"
    return EnvironmentFault(f"{name}: {place} cannot be read: {e.strerror}; {drives.advice(e)}".rstrip("; "))


def joined(*parts: tuple[ByteSource, Mapping[str, str]]) -> ByteSource:
    """Return several sources as one; each comes with its files: what they are called in the result, and in it.

    Files here are read under their new names, so that messages tell them apart; those that are elsewhere keep theirs.
    """
    places: dict[str, Place] = {}
    far: dict[str, ByteSource] = {}
    for source, names in parts:
        if isinstance(source, LocalFiles):
            places |= {new: source.places[old] for new, old in names.items()}
        else:
            assert all(new == old for new, old in names.items())
            far |= dict.fromkeys(names, source)
    here = LocalFiles(places)
    return Joined({**dict.fromkeys(places, here), **far}) if far else here
