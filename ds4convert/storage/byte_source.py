"""The one way to read bytes of files: by name and range, wherever the files are.

`ByteSource` is what every reader takes. `LocalFiles` (local_files) are files here, `RemoteFiles` (hub) those of a repo.
`Cached` keeps what was read, `Joined` makes several sources one, `PrefetchWindow` (execution) fetches ahead of use.
None of them knows plans or tensors. `Numbered` reads by the numbers that a `ByteRange` has.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ds4convert.errors import HeaderError
from ds4convert.storage.records import ByteRange, Fingerprint

Read = Callable[[ByteRange], bytes]

PIECE_BYTES = 1 << 20
BLOCK_BYTES, KEPT_BYTES = 8 << 20, 192 << 20


class ByteSource(Protocol):
    """Files by name, read by range. Safe for several threads.

    Reading raises `HeaderError` where a file is missing or ends before the range does, and `EnvironmentFault` where it
    cannot be read or was changed meanwhile. A closed source may be read again: it then opens what it needs anew.
    """

    @abstractmethod
    def size(self, name: str) -> int:
        """Return the bytes of a file."""

    @abstractmethod
    def read_into(self, name: str, start: int, view: memoryview) -> None:
        """Fill `view` with the bytes of a file from `start`."""

    @abstractmethod
    def fingerprint(self, name: str) -> Fingerprint:
        """Return two numbers of which one changes when the file does."""

    def read(self, name: str, start: int, n: int) -> bytes:
        """Return `n` bytes of a file from `start`."""
        return b"".join(self.pieces(name, start, n))

    def pieces(self, name: str, start: int, n: int) -> Iterator[bytes]:
        """Yield `n` bytes of a file from `start` in pieces of about a megabyte, as they come."""
        for at in range(start, start + n, PIECE_BYTES):
            piece = bytearray(min(PIECE_BYTES, start + n - at))
            self.read_into(name, at, memoryview(piece))
            yield bytes(piece)

    def digest(self, name: str) -> str | None:
        """Return the sha256 of a whole file as somebody else tells it, without reading it; None where nobody does."""
        return None

    def fileno(self, name: str) -> AbstractContextManager[int] | None:
        """Return what yields an open descriptor of a file; None where the file is not on a drive of this machine."""
        return None

    def folder(self, name: str) -> Path | None:
        """Return the folder of this machine that a file is in; None where it is elsewhere."""
        return None

    def check(self, name: str) -> None:
        """Raise `SourceChanged` where a file is seen to be another than when it was first read."""
        return

    def distrust(self, name: str) -> None:
        """Forget copies of a file: the bytes that came were wrong. From now on they are taken from their origin."""
        return

    def close(self) -> None:
        """Release what is open or kept."""
        return


def ended(name: str, end: int) -> HeaderError:
    """Return the error of a file that ends before a range of it does."""
    return HeaderError(f"{name}: ends before byte {end}; the file is being changed, or is truncated")


def fill(view: memoryview, name: str, start: int, pieces: Iterable[bytes]) -> None:
    """Fill `view` with the bytes of a file from `start` that come in pieces. Raises where they are too few."""
    at = 0
    for piece in pieces:
        view[at : at + len(piece)] = piece
        at += len(piece)
    if at < len(view):
        raise ended(name, start + len(view))


def are_here(source: ByteSource, names: Iterable[str]) -> bool:
    """Return whether all of these files are on drives of this machine."""
    return all(source.fileno(name) is not None for name in names)


@dataclass(frozen=True)
class Numbered:
    """Files of a source by number, as `ByteRange.file` counts them."""

    source: ByteSource
    names: Sequence[str]

    def read(self, r: ByteRange) -> bytes:
        """Return the bytes of a range."""
        return self.source.read(self.names[r.file], r.offset, r.size)

    def get(self, r: ByteRange, start: int, size: int) -> bytes:
        """Return `size` bytes from `start` within the range `r`."""
        return self.source.read(self.names[r.file], r.offset + start, size)

    def close(self) -> None:
        """Close the source."""
        self.source.close()


class Wrapped(ByteSource):
    """What a wrapper leaves to the source inside."""

    def __init__(self, source: ByteSource) -> None:
        self._source = source

    def size(self, name: str) -> int:
        """Return the bytes of a file."""
        return self._source.size(name)

    def read_into(self, name: str, start: int, view: memoryview) -> None:
        """Fill `view` with the bytes of a file from `start`."""
        self._source.read_into(name, start, view)

    def fingerprint(self, name: str) -> Fingerprint:
        """Return two numbers of which one changes when the file does."""
        return self._source.fingerprint(name)

    def digest(self, name: str) -> str | None:
        """Return the listed sha256 of a whole file, None without one."""
        return self._source.digest(name)

    def fileno(self, name: str) -> AbstractContextManager[int] | None:
        """Return what yields a descriptor of a local file, None for others."""
        return self._source.fileno(name)

    def folder(self, name: str) -> Path | None:
        """Return the folder of this machine that a file is in, None for others."""
        return self._source.folder(name)

    def check(self, name: str) -> None:
        """Raise `SourceChanged` where a file is seen to be another than when it was first read."""
        self._source.check(name)

    def distrust(self, name: str) -> None:
        """Forget copies of a file."""
        self._source.distrust(name)

    def close(self) -> None:
        """Close the source inside."""
        self._source.close()


Extents = Mapping[str, Sequence[tuple[int, int]]]
"""By file name: (start, end) of the ranges that will be read, in the order of the file."""


def extents(ranges: Iterable[ByteRange], names: Sequence[str]) -> Extents:
    """Return the extents of byte ranges of numbered files."""
    out: dict[str, set[tuple[int, int]]] = {}
    for r in ranges:
        out.setdefault(names[r.file], set()).add((r.offset, r.offset + r.size))
    return {name: sorted(found) for name, found in out.items()}


class Cached(Wrapped):
    """A source whose last reads are kept, up to `most` bytes.

    A read within one of the `extents` takes whole blocks, counted from where the extent begins and never beyond its
    end: such ranges are read front to back. Any other read is kept as it is.
    """

    def __init__(
        self, source: ByteSource, extents: Extents | None = None, block: int = BLOCK_BYTES, most: int = KEPT_BYTES
    ) -> None:
        super().__init__(source)
        self._extents, self._block, self._most = dict(extents or {}), block, most
        self._kept: OrderedDict[tuple[str, int, int], bytes] = OrderedDict()  # the one used last stands last
        self._held = 0
        self._lock = threading.Lock()

    def read(self, name: str, start: int, n: int) -> bytes:
        """Return bytes of a file, as far as they are kept without asking the source."""
        found = self._extent(name, start, start + n)
        if found is None:
            return self._get(name, start, n)
        first, end = found
        out = bytearray()
        while len(out) < n:
            at = start + len(out)
            block = at - (at - first) % self._block
            data = self._get(name, block, min(self._block, end - block))
            out += data[at - block : at - block + n - len(out)]
        return bytes(out)

    def read_into(self, name: str, start: int, view: memoryview) -> None:
        """Fill `view`, as `read`."""
        view[:] = self.read(name, start, len(view))

    def distrust(self, name: str) -> None:
        """Forget what is kept of a file."""
        with self._lock:
            for key in [k for k in self._kept if k[0] == name]:
                self._held -= len(self._kept.pop(key))
        super().distrust(name)

    def close(self) -> None:
        """Forget all and close the source."""
        with self._lock:
            self._kept.clear()
            self._held = 0
        super().close()

    def _extent(self, name: str, start: int, end: int) -> tuple[int, int] | None:
        known = self._extents.get(name, ())
        n = bisect_right(known, (start, 1 << 63)) - 1
        return known[n] if n >= 0 and end <= known[n][1] and start < end else None

    def _get(self, name: str, start: int, n: int) -> bytes:
        key = (name, start, n)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        data = self._source.read(name, start, n)
        with self._lock:
            if key not in self._kept:
                self._kept[key] = data
                self._held += n
            while self._held > self._most:
                self._held -= len(self._kept.popitem(last=False)[1])
        return data


class Joined(ByteSource):
    """Several sources as one: each name is read from the source that it is listed with."""

    def __init__(self, parts: Mapping[str, ByteSource]) -> None:
        self._parts = dict(parts)

    def _of(self, name: str) -> ByteSource:
        if name not in self._parts:
            raise HeaderError(f"{name}: the file is missing", hint="download it again")
        return self._parts[name]

    def size(self, name: str) -> int:
        """Return the bytes of a file."""
        return self._of(name).size(name)

    def read(self, name: str, start: int, n: int) -> bytes:
        """Return bytes of a file."""
        return self._of(name).read(name, start, n)

    def read_into(self, name: str, start: int, view: memoryview) -> None:
        """Fill `view` with the bytes of a file from `start`."""
        self._of(name).read_into(name, start, view)

    def pieces(self, name: str, start: int, n: int) -> Iterator[bytes]:
        """Yield bytes of a file as they come."""
        return self._of(name).pieces(name, start, n)

    def fingerprint(self, name: str) -> Fingerprint:
        """Return two numbers of which one changes when the file does."""
        return self._of(name).fingerprint(name)

    def digest(self, name: str) -> str | None:
        """Return the listed sha256 of a whole file, None without one."""
        return self._of(name).digest(name)

    def fileno(self, name: str) -> AbstractContextManager[int] | None:
        """Return what yields a descriptor of a local file, None for others."""
        return self._of(name).fileno(name)

    def folder(self, name: str) -> Path | None:
        """Return the folder of this machine that a file is in, None for others."""
        return self._of(name).folder(name)

    def check(self, name: str) -> None:
        """Raise `SourceChanged` where a file is seen to be another than when it was first read."""
        self._of(name).check(name)

    def distrust(self, name: str) -> None:
        """Forget copies of a file."""
        self._of(name).distrust(name)

    def close(self) -> None:
        """Close all sources."""
        for source in {id(s): s for s in self._parts.values()}.values():
            source.close()
