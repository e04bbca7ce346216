"""The only module that opens files for writing. Owns durability: what is synced, in which order, under which name.

Policy: data is written to `NAME.partial` at its planned offsets; it counts as safe only after `sync_data` of the
file has returned; a file gets its final name by rename after its last sync; the folder is synced after each rename.
On macOS plain fsync stops at the drive's cache, so F_FULLFSYNC is used there.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from ds4convert.errors import EnvironmentFault
from ds4convert.storage import drives

PARTIAL = ".partial"
PAGE = 4096
WRITE_BYTES = 256 << 10
"""Largest single write. Measured on ext4: whole aligned megabytes cost the kernel three to nine times as much,
presumably in finding pages that large; smaller writes never do (benchmarks/RESULTS.md)."""
COPY_BYTES = 4 << 20
UNKNOWN_BYTES = 1 << 62
"""What a drive that tells no size (some network drives) is taken to have free."""


@contextlib.contextmanager
def disk_errors(doing: str, path: Path) -> Iterator[None]:
    """Turn an OSError into an `EnvironmentFault` that says what failed, where, and what is safe to do next."""
    try:
        yield
    except OSError as e:
        if isinstance(e.filename, str | os.PathLike) and Path(e.filename).is_relative_to(path):
            path = Path(e.filename)  # what failed may lie below what was being written
        if e.errno in drives.FULL:
            raise EnvironmentFault(
                f"{doing} {path}: the disk is full{_free_words(path)}. What is finished is safe: free space on "
                "this disk and run the same command again, it goes on from there"
            ) from e
        more = drives.advice(e)
        raise EnvironmentFault(
            f"{doing} {path}: {e.strerror or e}{'; ' if more else ''}{more}. What is finished is safe: mend this and "
            "run the same command again"
        ) from e


def _free_words(path: Path) -> str:
    with contextlib.suppress(OSError):
        return f" ({free_bytes(path):,} bytes free)"
    return ""


def free_bytes(path: Path) -> int:
    """Return the bytes that an ordinary user may still write on the disk of `path` or its nearest parent.

    A drive that tells no size at all, as some network drives do, is taken to be large enough (`UNKNOWN_BYTES`).
    """
    while not path.exists():
        path = path.parent
    usage = os.statvfs(path)
    if usage.f_blocks == 0 and not _is_pseudo(path):
        return UNKNOWN_BYTES
    return usage.f_bavail * usage.f_frsize


def _is_pseudo(path: Path) -> bool:
    """Return whether a path is of the kernel's own file systems, which have no room for anything."""
    roots = [Path(r) for r in ("/proc", "/sys") if Path(r).exists()]
    return path.stat().st_dev in {r.stat().st_dev for r in roots if r.is_mount()}


class Disk:
    """All operations that change the disk, so that a test can put a failing one in its place."""

    def __init__(self) -> None:
        self._kernel_copy = hasattr(os, "copy_file_range")

    def make_folder(self, path: Path) -> None:
        """Create a folder and its parents; a link in its place is refused."""
        path.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():
            raise OSError(errno.ELOOP, "is a link, expected a folder", str(path))

    def open_partial(self, path: Path, size: int) -> int:
        """Return a read-write descriptor of `path`, created with room for `size` bytes if it is not there."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            if os.fstat(fd).st_size != size:
                os.ftruncate(fd, 0)
                self.reserve(fd, size)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def reserve(self, fd: int, size: int) -> None:
        """Reserve `size` bytes for the file, so that a full disk shows now; where unsupported, only set the size."""
        if size and sys.platform == "linux":
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(size)) == 0:
                return
            if ctypes.get_errno() in drives.FULL:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        try:
            os.ftruncate(fd, size)
        except OSError as e:
            if not size or not drives.unsupported(e):
                raise
            os.pwrite(fd, b"\0", size - 1)  # FAT drivers that do not extend a file do so for a write at its end

    def write_at(self, fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
        """Write all of `data` at `offset`."""
        view = memoryview(data)
        while view:
            n = os.pwrite(fd, view[:WRITE_BYTES], offset)
            view, offset = view[n:], offset + n

    def copy_range(self, source: int, start: int, target: int, offset: int, size: int) -> bool:
        """Move `size` bytes inside the kernel. Return False where that is not possible or not worth it.

        Where source and target lie differently within their pages, no disk can share the blocks, and the kernel
        takes half as long again as a copy through a buffer (benchmarks/RESULTS.md): those are left to the caller.
        """
        if (start - offset) % PAGE:
            return False
        while self._kernel_copy and size:
            try:
                n = os.copy_file_range(source, target, size, start, offset)
            except OSError as e:
                if e.errno not in drives.NO_KERNEL_COPY:
                    raise
                self._kernel_copy = False
                break
            if n == 0:
                break  # the end of the source, or a drive that cannot: whoever copies through a buffer will see
            start, offset, size = start + n, offset + n, size - n
        return size == 0

    def sync_data(self, fd: int) -> None:
        """Return when the file's bytes and size are on the disk itself, as far as the drive can tell."""
        if sys.platform == "darwin" and _full_sync(fd):
            return
        try:
            if sys.platform == "darwin":
                os.fsync(fd)
            else:
                os.fdatasync(fd)
        except OSError as e:
            if not drives.unsupported(e):
                raise
            drives.note("this drive cannot say when data is safely on it: a power cut may lose what was written last")

    def sync_folder(self, path: Path) -> None:
        """Return when the folder's entries (renames) are on the disk; some drives do that by themselves or never."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as e:
            if e.errno not in drives.NO_FOLDER_SYNC:
                raise
            drives.note("this drive cannot sync folders: after a power cut, verify what was written last")

    def rename(self, source: Path, target: Path) -> None:
        """Rename within a folder, over an older file of that name, and sync the folder."""
        try:
            source.rename(target)
        except OSError as e:
            if not drives.unsupported(e) and e.errno != errno.EEXIST:
                raise
            self._move(source, target)
        self.sync_folder(target.parent)

    def _move(self, source: Path, target: Path) -> None:
        """Do what a rename does where the drive has none over an older file, or none at all."""
        if source.is_dir():
            raise OSError(errno.ENOTSUP, "this drive cannot rename folders")
        target.unlink(missing_ok=True)
        try:
            source.rename(target)
        except OSError as e:
            if not drives.unsupported(e):
                raise
            self._copy_file(source, target)
            source.unlink()

    def write_file(self, path: Path, data: bytes, writer: str = "") -> None:
        """Write a small file whole or not at all: partial name, sync, rename, sync of the folder.

        `writer` keeps the partial names of several processes apart that may write the file at the same time.
        """
        partial = path.with_name(path.name + writer + PARTIAL)
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            self.write_at(fd, data, 0)
            self.sync_data(fd)
        finally:
            os.close(fd)
        self.rename(partial, path)

    def link_or_copy(self, source: Path, target: Path) -> None:
        """Give the file `source` a second name; where the disk cannot do that, copy it whole or not at all."""
        if target.exists() and target.samefile(source):
            return  # a rename of one name of a file over another of its names does nothing
        partial = target.with_name(target.name + PARTIAL)
        partial.unlink(missing_ok=True)
        try:
            os.link(source, partial)
        except OSError as e:
            if e.errno not in drives.NO_LINK:
                raise
            self._copy_file(source, partial)
        self.rename(partial, target)

    def _copy_file(self, source: Path, target: Path) -> None:
        with source.open("rb", buffering=0) as f:
            fd = self.open_partial(target, os.fstat(f.fileno()).st_size)
            try:
                at = 0
                while data := f.read(COPY_BYTES):
                    self.write_at(fd, data, at)
                    at += len(data)
                self.sync_data(fd)
            finally:
                os.close(fd)

    def open_log(self, path: Path) -> int:
        """Return a descriptor that appends to `path`."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)

    def append(self, fd: int, data: bytes) -> None:
        """Append `data` and return when it is on the disk."""
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        self.sync_data(fd)

    def remove(self, path: Path) -> None:
        """Remove a file, a link, or a folder with what is in it; links are not followed, what is gone is no error."""
        if path.is_dir() and not path.is_symlink():
            _remove_folder(path)
        else:
            path.unlink(missing_ok=True)


def create_new(path: Path, data: bytes) -> bool:
    """Write a file that is not there yet; return False, and write nothing, where there is one."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except FileExistsError:
        return False
    try:
        os.write(fd, data)
    finally:
        os.close(fd)
    return True


def remove_if(path: Path, data: bytes, aside: Path) -> bool:
    """Remove a file if it still holds `data`; return whether this process did it. `aside` is a name of its own."""
    try:
        path.rename(aside)
    except FileNotFoundError:
        return False
    if aside.read_bytes() != data:
        aside.rename(path)
        return False
    aside.unlink()
    return True


def _full_sync(fd: int) -> bool:
    """Have a Mac empty the drive's own cache; False where the drive does not know that, and fsync has to do."""
    import fcntl

    try:
        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)  # type: ignore[attr-defined,unused-ignore]
    except OSError as e:
        if not drives.unsupported(e):
            raise
        return False
    return True


def _remove_folder(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        for entry in sorted(os.scandir(path), key=lambda e: e.name):
            if entry.is_dir(follow_symlinks=False):
                _remove_folder(Path(entry.path))
            else:
                with contextlib.suppress(FileNotFoundError):
                    Path(entry.path).unlink()
        try:
            path.rmdir()
        except OSError as e:
            # A network drive keeps an open file under such a name until it is closed: `.nfs000...`, `.smbdelete...`.
            left = [p for p in path.iterdir() if not p.name.startswith((".nfs", ".smbdelete"))]
            if e.errno not in {errno.ENOTEMPTY, errno.EBUSY} or left:
                raise
