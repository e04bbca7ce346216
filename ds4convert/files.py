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
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from ds4convert.errors import EnvironmentFault

PARTIAL = ".partial"
PAGE = 4096
WRITE_BYTES = 256 << 10
"""Largest single write. Measured on ext4: whole aligned megabytes cost the kernel three to nine times as much,
presumably in finding pages that large; smaller writes never do (benchmarks/RESULTS.md)."""
_NO_KERNEL_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.ETXTBSY}
_NO_LINK = {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOSYS, errno.EOPNOTSUPP}
COPY_BYTES = 4 << 20
_FULL = {errno.ENOSPC, errno.EDQUOT}


@contextlib.contextmanager
def disk_errors(doing: str, path: Path) -> Iterator[None]:
    """Turn an OSError into an `EnvironmentFault` that says what failed, where, and what is safe to do next."""
    try:
        yield
    except OSError as e:
        if e.errno in _FULL:
            free = free_bytes(path)
            raise EnvironmentFault(
                f"{doing} {path}: the disk is full ({free:,} bytes free). What is finished is safe: free space on "
                "this disk and run the same command again, it goes on from there"
            ) from e
        raise EnvironmentFault(
            f"{doing} {path}: {e.strerror or e}. What is finished is safe: mend this and run the same command again"
        ) from e


def free_bytes(path: Path) -> int:
    """Return the bytes that an ordinary user may still write on the disk of `path` or its nearest parent."""
    while not path.exists():
        path = path.parent
    usage = os.statvfs(path)
    return usage.f_bavail * usage.f_frsize


class Disk:
    """All operations that change the disk, so that a test can put a failing one in its place."""

    def __init__(self) -> None:
        self._kernel_copy = hasattr(os, "copy_file_range")

    def make_folder(self, path: Path) -> None:
        """Create a folder and its parents; a link in its place is refused."""
        path.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():
            raise OSError(errno.ELOOP, "is a link, expected a folder")

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
            if ctypes.get_errno() in _FULL:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        os.ftruncate(fd, size)

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
                if e.errno not in _NO_KERNEL_COPY:
                    raise
                self._kernel_copy = False
                break
            if n == 0:
                raise EOFError
            start, offset, size = start + n, offset + n, size - n
        return size == 0

    def sync_data(self, fd: int) -> None:
        """Return when the file's bytes and size are on the disk itself."""
        if sys.platform == "darwin":
            import fcntl

            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
        else:
            os.fdatasync(fd)

    def sync_folder(self, path: Path) -> None:
        """Return when the folder's entries (renames) are on the disk."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def rename(self, source: Path, target: Path) -> None:
        """Rename within a folder, over an older file of that name, and sync the folder."""
        source.rename(target)
        self.sync_folder(target.parent)

    def write_file(self, path: Path, data: bytes) -> None:
        """Write a small file whole or not at all: partial name, sync, rename, sync of the folder."""
        partial = path.with_name(path.name + PARTIAL)
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
            if e.errno not in _NO_LINK:
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
        """Remove a file, a link, or a folder with what is in it; links are not followed."""
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
