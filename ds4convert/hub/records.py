"""A repo and its files as values, and which names of files are refused."""

from __future__ import annotations

import hashlib
import re
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ds4convert.errors import Ds4Error, InputError
from ds4convert.storage.belonging import belongs
from ds4convert.storage.byte_source import ByteSource, ended, fill
from ds4convert.storage.records import Fingerprint
from ds4convert.words.terminal import show

_DEVICES = {"con", "prn", "aux", "nul", *(f"{d}{n}" for d in ("com", "lpt") for n in range(1, 10))}


_OBEYED = re.compile(r"\.git|git~\d+|\.ds4convert|ds4con~\d+")
"""Folders that git and this program obey, and their short names on Windows, where dots at the end count nothing."""

MAX_NAME_BYTES = 700
"""A path in a repo, so that with the folder it goes to it stays under what macOS allows (PATH_MAX, 1,024)."""


@dataclass(frozen=True)
class RemoteFile:
    """One file of a repo: its size in bytes; `etag` is its sha256 where it is stored as a large file, else git's id."""

    name: str
    size: int
    etag: str
    sha256: str | None


@dataclass(frozen=True)
class Repo:
    """A repo at one commit; `cached_in` is the folder of the Hub client's cache that it was read from, offline."""

    kind: ClassVar[str] = "hub"

    name: str
    commit: str
    files: tuple[RemoteFile, ...]
    endpoint: str | None = None
    token: str | None = None
    cached_in: Path | None = None

    def shards(self) -> list[RemoteFile]:
        """Return the safetensors files at the top of the repo."""
        return [f for f in self.files if f.name.endswith(".safetensors") and "/" not in f.name and belongs(f.name)]


def check_name(name: str, repo: str) -> None:
    """Raise `InputError` unless a file's name stays inside its folder on every system."""
    parts = name.split("/")
    bad = (
        not name.isprintable()
        or any(c in name for c in '\\:*?"<>|')
        or any(p in {"", ".", ".."} or len(p.encode()) > 255 or p != p.strip() for p in parts)
        or any(p.split(".")[0].lower() in _DEVICES for p in parts)
        or any(_OBEYED.fullmatch(p.rstrip(". ").lower()) for p in parts)
        or parts[0].lower() == ".cache"
        or len(name.encode()) > MAX_NAME_BYTES
        or parts[-1].lower() in {".gitmodules", ".gitconfig"}
    )
    if bad:
        raise InputError(
            f"{repo}: holds a file named {show(name)!r}, which is not a safe file name; the repo is refused. "
            "Nothing was written"
        )


class ListedFiles(ByteSource):
    """Files elsewhere, as they were listed. A kind says how a range is fetched, and what it has at hand already.

    `told` is what people should know of them before they are read, None where there is nothing to say.
    """

    told: str | None = None

    def __init__(self, files: Iterable[RemoteFile]) -> None:
        self._files = {f.name: f for f in files}

    @abstractmethod
    def _missing(self, name: str) -> Ds4Error:
        """Return the error of a file that the list does not have."""

    @abstractmethod
    def _at_hand(self, file: RemoteFile, end: int) -> bytes | None:
        """Return bytes of a file from its beginning, `end` of them or more, where that takes no request."""

    @abstractmethod
    def _fetched(self, file: RemoteFile, start: int, n: int) -> Iterator[bytes]:
        """Yield bytes of a file as they come from where it lies."""

    def _file(self, name: str) -> RemoteFile:
        if name not in self._files:
            raise self._missing(name)
        return self._files[name]

    def size(self, name: str) -> int:
        """Return the bytes of a file, as they are listed."""
        return self._file(name).size

    def pieces(self, name: str, start: int, n: int) -> Iterator[bytes]:
        """Yield bytes of a file as they come; those at hand without a request."""
        file = self._file(name)
        if start + n > file.size:
            raise ended(name, start + n)
        if not n:
            return
        known = self._at_hand(file, start + n)
        if known is not None:
            yield known[start : start + n]
        else:
            yield from self._fetched(file, start, n)

    def read_into(self, name: str, start: int, view: memoryview) -> None:
        """Fill `view` with the bytes of a file from `start`: one request, or more where the connection breaks."""
        fill(view, name, start, self.pieces(name, start, len(view)))

    def digest(self, name: str) -> str | None:
        """Return the sha256 that the list tells."""
        return self._file(name).sha256

    def fingerprint(self, name: str) -> Fingerprint:
        """Return size, and a number made of the etag."""
        file = self._file(name)
        return file.size, int(hashlib.sha256(file.etag.encode()).hexdigest()[:12], 16)
