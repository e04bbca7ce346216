"""Open a file of an untrusted folder: no links that leave it, plain files only, bounded small files."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from ds4convert.errors import EnvironmentFault, HeaderError, InputError, naming
from ds4convert.storage.belonging import belongs
from ds4convert.storage.untrusted import links
from ds4convert.words.terminal import show

MAX_SMALL_BYTES = 100_000_000
_NO_PLAIN_FILE = {errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR, errno.ENXIO}
"""Errors of opening that say what the name stands for, not that the machine failed: loops of links, sockets."""


def names_in(folder: Path) -> list[str]:
    """Return the sorted names in a folder that belong to it; [] where there is no folder."""
    try:
        return sorted(e.name for e in os.scandir(folder) if belongs(e.name))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as e:
        raise EnvironmentFault(f"{folder}: cannot be listed: {e.strerror}") from None


def safetensors_in(folder: Path) -> list[str]:
    """Return the sorted names of the safetensors files of a folder, as `names_in`."""
    return [n for n in names_in(folder) if n.endswith(".safetensors")]


@naming(file="name")
def resolve_inside(folder: Path, name: str) -> Path:
    """Return the real path of `folder/name`.

    Raises `HeaderError` if a link leads out to where `links` allows none, or to a file that is not there.
    """
    if "\0" in name or "\0" in str(folder):
        raise HeaderError(f"{show(name)}: has a NUL in its name, which no file can have")
    path = folder / name
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    if real.is_relative_to(home) or links.may_leave(home, name, real):
        if why := links.dangling(path, real):
            raise HeaderError(f"{show(name)}: {why}")
        return real
    raise HeaderError(f"{name}: is a link that leads out of the folder, to {show(str(real))}; it is not followed")


@naming(file="name")
def open_file(path: Path, name: str) -> int:
    """Return a read-only descriptor of a regular file. Raises `HeaderError` if it is missing or no plain file."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise HeaderError(f"{name}: the file is missing; download it again", hint="download it again") from None
    except OSError as e:
        if e.errno in _NO_PLAIN_FILE:
            raise HeaderError(f"{show(name)}: is not a regular file: {e.strerror}") from None
        raise EnvironmentFault(f"{name}: cannot be opened: {e.strerror}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise HeaderError(f"{name}: is not a regular file")
    return fd


def read_own(folder: Path, name: str, limit: int = MAX_SMALL_BYTES) -> bytes:
    """Return the bytes of a file in which this program remembers something, b"" where there is none that can be read.

    What another program put in its place, a pipe or a file without end, counts as none: it is not waited for.
    """
    try:
        return read_small(folder, name, limit)
    except (InputError, EnvironmentFault):
        return b""


@naming(file="name")
def read_small(folder: Path, name: str, limit: int = MAX_SMALL_BYTES) -> bytes:
    """Return the bytes of a small file of the folder. Raises `HeaderError` when it is larger than `limit`."""
    fd = open_file(resolve_inside(folder, name), name)
    with os.fdopen(fd, "rb") as f:
        size = os.fstat(f.fileno()).st_size
        if size > limit:
            raise HeaderError(f"{name}: {size} bytes, expected at most {limit}")
        try:
            return f.read(limit)
        except OSError as e:
            raise EnvironmentFault(f"{name}: cannot be read: {e.strerror}") from None
