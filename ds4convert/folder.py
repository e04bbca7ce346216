"""A checkpoint on disk: which files it has and what their headers say. Reads only; trusts nothing.

Owns the rules for what may be opened: plain files inside the folder (a link may stay inside it; the Hub cache's
own links from `snapshots/REV/` to `blobs/` are known and allowed), named by the index if there is one.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from ds4convert import headers
from ds4convert.config import MAX_TENSORS
from ds4convert.errors import ConfigError, EnvironmentFault, HeaderError, InputError
from ds4convert.strictjson import show
from ds4convert.types import Header, SourceFile, TensorInfo

INDEX_NAME = "model.safetensors.index.json"
CONFIG_NAME = "config.json"
MAX_SMALL_BYTES = 100_000_000
MAX_FILES = 10_000
_NO_PLAIN_FILE = {errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR, errno.ENXIO}
"""Errors of opening that say what the name stands for, not that the machine failed: loops of links, sockets."""


@dataclass(frozen=True)
class Checkpoint:
    """All headers of a checkpoint. `TensorInfo.file` indexes `files`; `config` is the raw config.json, if any."""

    path: Path
    files: tuple[SourceFile, ...]
    headers: tuple[Header, ...]
    config: bytes | None
    has_index: bool

    def tensors(self) -> Iterable[TensorInfo]:
        """Yield every tensor of every file."""
        for header in self.headers:
            yield from header.tensors

    @property
    def file_names(self) -> tuple[str, ...]:
        """Return the names of the safetensors files, in the order of `TensorInfo.file`."""
        return tuple(f.name for f in self.files)


def resolve_inside(folder: Path, name: str) -> Path:
    """Return the real path of `folder/name`. Raises `HeaderError` if a link leads out of the folder."""
    path = folder / name
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    if real.is_relative_to(home) or (home.parent.name == "snapshots" and real.parent == home.parent.parent / "blobs"):
        return real
    raise HeaderError(f"{name}: is a link that leads out of the folder, to {show(str(real))}; it is not followed")


def open_file(path: Path, name: str) -> int:
    """Return a read-only descriptor of a regular file. Raises `HeaderError` if it is missing or no plain file."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise HeaderError(f"{name}: the file is missing; download it again") from None
    except OSError as e:
        if e.errno in _NO_PLAIN_FILE:
            raise HeaderError(f"{show(name)}: is not a regular file: {e.strerror}") from None
        raise EnvironmentFault(f"{name}: cannot be opened: {e.strerror}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise HeaderError(f"{name}: is not a regular file")
    return fd


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


def read_header(path: Path, name: str, file: int = 0) -> tuple[SourceFile, Header]:
    """Return the facts and the validated header of one safetensors file; `name` is used in messages."""
    fd = open_file(path, name)
    with os.fdopen(fd, "rb") as f:
        size = os.fstat(f.fileno()).st_size
        try:
            prefix = f.read(headers.LENGTH_BYTES)
            raw = _read_json(f.read, headers.header_length(prefix, size, name), name)
        except OSError as e:
            raise EnvironmentFault(f"{name}: cannot be read: {e.strerror}") from None
    return SourceFile(name, size, hashlib.sha256(raw).hexdigest()), headers.parse_header(raw, size, name, file)


def _read_json(read: Callable[[int], bytes], length: int, name: str) -> bytes:
    """Return `length` bytes, giving up at the first piece that cannot be JSON: a huge sparse file costs nothing."""
    pieces: list[bytes] = []
    left = length
    while left:
        piece = read(min(left, 1 << 20))
        if not piece:
            raise HeaderError(f"{name}: the file ended inside its header; it is being changed, or is truncated")
        if (not pieces and not piece.startswith(b"{")) or b"\0" in piece:
            raise HeaderError(f"{name}: the header is not JSON text; this is not a safetensors file")
        pieces.append(piece)
        left -= len(piece)
    return b"".join(pieces)


ReadHeader = Callable[[str, int], tuple[SourceFile, Header]]
"""From the name of a safetensors file and its number to its facts and header."""


def read_checkpoint(path: Path, read: ReadHeader | None = None, listed: list[str] | None = None) -> Checkpoint:
    """Return the headers of the checkpoint at `path`: a folder, or a single .safetensors file.

    `read` and `listed` are given where the shards lie elsewhere: how to read one, and which there are.

    With an index, its files are read and must hold exactly its tensors; without one, every `*.safetensors` of the
    folder is read. Raises `InputError` (or a kind of it) before anything else is done with the checkpoint.
    """
    if not path.exists():
        raise InputError(f"{show(str(path))}: no such file or folder")
    if path.is_file():
        source, header = read_header(path, path.name)
        return Checkpoint(path.parent, (source,), (header,), None, False)
    index = _read_index(path)
    names = sorted(set(index.values())) if index is not None else listed or _safetensors_names(path)
    if not names:
        raise InputError(f"{show(str(path))}: holds no .safetensors file; is this a checkpoint folder?")
    if len(names) > MAX_FILES:
        raise InputError(f"{show(str(path))}: names {len(names)} files, expected at most {MAX_FILES}")
    pairs: list[tuple[SourceFile, Header]] = []
    count = 0
    for at, name in enumerate(names):
        pairs.append(read(name, at) if read else read_header(resolve_inside(path, name), name, at))
        count += len(pairs[-1][1].tensors)
        if count > MAX_TENSORS:
            raise HeaderError(f"{name}: with it there are {count} tensors, expected at most {MAX_TENSORS}")
    found = Checkpoint(path, tuple(s for s, _ in pairs), tuple(h for _, h in pairs), _config(path), index is not None)
    _check_placement(found, index)
    return found


def _read_index(path: Path) -> dict[str, str] | None:
    if not os.path.lexists(path / INDEX_NAME):
        return None
    return headers.parse_index(read_small(path, INDEX_NAME), INDEX_NAME)


def _safetensors_names(path: Path) -> list[str]:
    return sorted(e.name for e in os.scandir(path) if e.name.endswith(".safetensors"))


def _config(path: Path) -> bytes | None:
    return read_small(path, CONFIG_NAME) if os.path.lexists(path / CONFIG_NAME) else None


def _check_placement(found: Checkpoint, index: dict[str, str] | None) -> None:
    """Raise unless each tensor lies in one file, the one that the index (if any) names."""
    names = found.file_names
    seen: dict[str, int] = {}
    for tensor in found.tensors():
        if tensor.name in seen:
            first, second = names[seen[tensor.name]], names[tensor.file]
            raise HeaderError(f"{second}: {show(tensor.name)}: is in {first} as well; expected in one file only")
        seen[tensor.name] = tensor.file
    if index is None:
        return
    for name, file in index.items():
        at = seen.pop(name, None)
        if at is None:
            raise HeaderError(f"{file}: {show(name)}: the index places it here, but the header has no such tensor")
        if names[at] != file:
            raise HeaderError(f"{names[at]}: {show(name)}: the index places it in {file}")
    if seen:
        name, at = next(iter(seen.items()))
        raise HeaderError(f"{names[at]}: {show(name)}: is not in the index ({len(seen)} such tensors)")


def need_config(found: Checkpoint) -> bytes:
    """Return the raw config.json. Raises `ConfigError` when the folder has none."""
    if found.config is None:
        raise ConfigError(f"{CONFIG_NAME}: missing in {show(str(found.path))}; download it again")
    return found.config
