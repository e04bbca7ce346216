"""Source files that are somewhere else, read through a window: pieces are fetched ahead of use, and dropped after.

The plan says which bytes will be read, and in which order; neighbouring ranges become pieces of a few megabytes.
Several connections fetch them, file by file and front to back, into small files of the window's folder, as long as
these take no more than the window may. A piece goes when all steps that read it are done. Where the window is too
small for what a step needs at once, its bytes are fetched by themselves once more: slower, never wrong.

As pieces come in order, the sha256 of each whole file is taken from them and compared with what the other side lists: a
file of which all bytes passed is taken only then. Files that are read in part alone cannot be checked so.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import xxhash

from ds4convert.errors import EnvironmentFault
from ds4convert.files import Disk, disk_errors
from ds4convert.journal import Fingerprint, Finished
from ds4convert.types import ByteRange, Plan, SourceFile

FOLDER = "window"
SHARDS_NAME = "shards.json"
MOST_PIECE, LEAST_PIECE = 16 << 20, 64 << 10
LEAST_WINDOW = 10**6
GAP_BYTES = 256 << 10
"""Unneeded bytes between two ranges that are fetched along with them: less than what a request costs."""


class Remote(Protocol):
    """A checkpoint whose files are somewhere else; its small files are in a local folder."""

    @property
    def path(self) -> Path:
        """Return the folder of the small files."""

    def fetch(self, name: str, start: int, size: int) -> Iterator[bytes]:
        """Yield the bytes of a range of a file. Raises `EnvironmentFault`."""

    def sha256(self, name: str) -> str | None:
        """Return the digest that the other side lists for a whole file, where it does."""

    def mark(self, name: str) -> int:
        """Return a number that changes when the file does."""

    def head(self, name: str) -> bytes:
        """Return the first bytes of a file as far as they are known: its header."""


@dataclass
class Piece:
    """Bytes `start .. start + size` of a source file, and what has become of them."""

    file: int
    start: int
    size: int
    left: set[int] = field(default_factory=set)
    """Steps that will read it."""

    state: str = "waiting"
    """waiting, fetching, here, or gone."""

    hashed: bool = False

    @property
    def end(self) -> int:
        """Return the offset behind the last byte."""
        return self.start + self.size


class _Check:
    """The running digest of one file: which of its pieces comes next."""

    def __init__(self, name: str, size: int, head: bytes, wanted: str, pieces: Sequence[Piece]) -> None:
        self.name, self.wanted, self.pieces = name, wanted, pieces
        self.sha, self.at, self.next = hashlib.sha256(head), len(head), 0
        self.size = size
        self.busy = self.differs = False
        self.direct: dict[int, list[tuple[int, int, str]]] = {}  # by start of the piece: offset, size, digest

    def covers(self) -> bool:
        """Return whether header and pieces are the whole file, without a gap."""
        at = self.at
        for piece in self.pieces:
            if piece.start > at:
                return False
            at = max(at, piece.end)
        return at == self.size


def ranges_of(plan: Plan, files: Iterable[int]) -> dict[int, list[tuple[int, int, int]]]:
    """Return (start, end, step) of all that a plan reads of some source files, by file, in file order."""
    out: dict[int, list[tuple[int, int, int]]] = {f: [] for f in files}
    for n, step in enumerate(plan.steps):
        for operand in step.operands:
            for r in operand:
                if r.file in out and r.size:
                    out[r.file].append((r.offset, r.offset + r.size, n))
    return {f: sorted(found) for f, found in out.items()}


def pieces_of(file: int, ranges: Sequence[tuple[int, int, int]], begin: int, most: int) -> list[Piece]:
    """Return the pieces that hold the ranges: neighbours joined, none larger than `most`; each knows its steps.

    Bytes from `begin` (the end of the header) to the first range are fetched along, as other small gaps are.
    """
    spans: list[list[int]] = []
    for start, end, _ in ranges:
        at = spans[-1][1] if spans else begin
        if spans and start - at <= GAP_BYTES:
            spans[-1][1] = max(at, end)
        else:
            spans.append([at if start - at <= GAP_BYTES and at <= start else start, end])
    pieces = [Piece(file, at, min(most, end - at)) for start, end in spans for at in range(start, end, most)]
    starts = [p.start for p in pieces]
    for start, end, step in ranges:
        for piece in pieces[max(bisect_right(starts, start) - 1, 0) :]:
            if piece.start >= end:
                break
            piece.left.add(step)
    return pieces


class Window:
    """The remote files of a run. `files` are their numbers among the plan's sources."""

    def __init__(self, remote: Remote, sources: Sequence[SourceFile], files: Sequence[int], state: Path, limit: int,
                 connections: int, disk: Disk) -> None:  # fmt: skip
        self.remote, self.names = remote, {f: sources[f].name for f in files}
        self._sizes = {f: sources[f].size for f in files}
        self._state, self._folder, self._disk = state, state / FOLDER, disk
        self._limit, self._connections = max(limit, LEAST_WINDOW), connections
        self._most = min(MOST_PIECE, max(LEAST_PIECE, self._limit // (4 * connections)))
        self._shards = _read_shards(state)
        self._changed = threading.Condition()
        self._pieces: dict[int, list[Piece]] = {}
        self._starts: dict[int, list[int]] = {}
        self._order: list[Piece] = []
        self._next = self._held = self._fetching = 0
        self._checks: dict[int, _Check] = {}
        self._of_step: dict[int, list[Piece]] = {}
        self._error: BaseException | None = None
        self._closed = False
        self._threads: list[threading.Thread] = []

    def fingerprint(self, file: int) -> Fingerprint:
        """Return what tells that a file changed, or that its bytes turned out wrong, since an earlier run."""
        name = self.names[file]
        again = int(self._shards.get("wrong", {}).get(name, 0))
        return self._sizes[file], self.remote.mark(name) * 1000 + again

    def begin(self, plan: Plan, finished: Finished) -> None:
        """Start fetching what the plan's unfinished steps read, and what whole files lack for their digest."""
        known = set(self._shards.get("checked", []))
        done = set(finished.steps)
        first: dict[int, int] = {}
        for file, ranges in ranges_of(plan, self.names).items():
            name, head = self.names[file], self.remote.head(self.names[file])
            wanted = self.remote.sha256(name)
            pieces = pieces_of(file, ranges, len(head), self._most)
            check = _Check(name, self._sizes[file], head, wanted or "", pieces)
            for piece in pieces:
                piece.left -= done
            # What is read again is checked again, whole.
            fresh = name not in known or any(p.left for p in pieces)
            checked = wanted is not None and fresh and check.covers()
            for piece in pieces:
                piece.hashed = not checked
                piece.state = "waiting" if piece.left or checked else "gone"
                for step in piece.left:
                    self._of_step.setdefault(step, []).append(piece)
            if checked:
                self._checks[file] = check
            self._pieces[file], self._starts[file] = pieces, [p.start for p in pieces]
            first[file] = min((n for _, _, n in ranges if n not in done), default=len(plan.steps))
        for file in sorted(self._pieces, key=lambda f: (first[f], f)):
            self._order += [p for p in self._pieces[file] if p.state == "waiting"]
        with disk_errors("writing", self._folder):
            self._disk.remove(self._folder)
            self._disk.make_folder(self._folder)
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(self._connections)]
        for thread in self._threads:
            thread.start()

    # --- the executor's side ---------------------------------------------------------------------------------------

    def read_into(self, view: memoryview, file: int, offset: int) -> None:
        """Fill `view` with the bytes of a file from `offset`, waiting for them."""
        done = 0
        while done < len(view):
            at = offset + done
            piece = self._at(file, at)
            if piece is None:
                size = len(view) - done
                self._direct(view[done:], file, at)
            else:
                size = min(len(view) - done, piece.end - at)
                if not self._from(piece, view[done : done + size], at):
                    self._direct(view[done : done + size], file, at)
                    self._remember(piece, view[done : done + size], at)
            done += size

    def _at(self, file: int, offset: int) -> Piece | None:
        n = bisect_right(self._starts.get(file, []), offset) - 1
        if n < 0 or self._pieces[file][n].end <= offset:
            return None
        return self._pieces[file][n]

    def _from(self, piece: Piece, view: memoryview, at: int) -> bool:
        """Fill `view` from a piece, waiting for it while it is on its way; False where it is not."""
        with self._changed:
            while piece.state in {"waiting", "fetching"} and not self._stuck(piece):
                self._raise()
                self._changed.wait(0.5)
            self._raise()
            if piece.state != "here":
                return False
            fd = os.open(self._path(piece), os.O_RDONLY | os.O_CLOEXEC)
        try:
            data = os.pread(fd, len(view), at - piece.start)
        finally:
            os.close(fd)
        view[:] = data
        return True

    def _stuck(self, piece: Piece) -> bool:
        """Return whether a piece will not come before something else goes."""
        room = self._next < len(self._order) and self._fits(self._order[self._next])
        return piece.state == "waiting" and not room and not self._fetching

    def _direct(self, view: memoryview, file: int, offset: int) -> None:
        """Fetch bytes for one use."""
        at = 0
        for data in self.remote.fetch(self.names[file], offset, len(view)):
            view[at : at + len(data)] = data
            at += len(data)

    def _remember(self, piece: Piece, view: memoryview, at: int) -> None:
        """Keep the digest of bytes fetched by themselves: they have to be those that the file's is taken of."""
        check = self._checks.get(piece.file)
        if check is not None:
            found = (at - piece.start, len(view), xxhash.xxh3_128_hexdigest(view))
            with self._changed:
                check.direct.setdefault(piece.start, []).append(found)

    def done(self, step: int) -> None:
        """Drop what no other step reads."""
        with self._changed:
            for piece in self._of_step.pop(step, []):
                piece.left.discard(step)
                self._drop(piece)
            self._changed.notify_all()

    def finish(self) -> None:
        """Wait for the digest of every file that passed whole. Raises `EnvironmentFault` where it is wrong."""
        with self._changed:
            while any(c.next < len(c.pieces) for c in self._checks.values()):
                self._raise()
                self._changed.wait(0.5)
            self._raise()

    def close(self) -> None:
        """Stop fetching and remove the window."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        with suppress(OSError):
            self._disk.remove(self._folder)

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    # --- the fetching side -----------------------------------------------------------------------------------------

    def _path(self, piece: Piece) -> Path:
        return self._folder / f"{piece.file}-{piece.start}"

    def _fits(self, piece: Piece) -> bool:
        return self._held + piece.size <= self._limit

    def _drop(self, piece: Piece) -> None:
        """Remove a piece that is used and hashed; the lock is held."""
        if piece.left or not piece.hashed or piece.state not in {"here", "waiting"}:
            return
        if piece.state == "here":
            with suppress(OSError):
                self._disk.remove(self._path(piece))
            self._held -= piece.size
        piece.state = "gone"

    def _work(self) -> None:
        while (piece := self._take()) is not None:
            try:
                self._fetch(piece)
                with self._changed:
                    if self._closed:  # it may not be whole
                        return
                    piece.state = "here"
                    self._fetching -= 1
                    self._drop(piece)
                    self._changed.notify_all()
                self._hash(piece.file)
            except BaseException as e:
                with self._changed:
                    self._error = self._error or e
                    self._changed.notify_all()
                return

    def _take(self) -> Piece | None:
        """Return the next piece to fetch, waiting for room; None at the end."""
        with self._changed:
            while not self._closed and self._error is None:
                while self._next < len(self._order) and self._order[self._next].state != "waiting":
                    self._next += 1
                if self._next == len(self._order):
                    return None
                piece = self._order[self._next]
                if self._fits(piece):
                    self._next += 1
                    self._held += piece.size
                    self._fetching += 1
                    piece.state = "fetching"
                    return piece
                self._changed.wait(0.5)
            return None

    def _fetch(self, piece: Piece) -> None:
        path, at = self._path(piece), 0
        with disk_errors("writing", path):
            fd = self._disk.open_partial(path, piece.size)
        try:
            for data in self.remote.fetch(self.names[piece.file], piece.start, piece.size):
                with disk_errors("writing", path):
                    self._disk.write_at(fd, data, at)
                at += len(data)
                if self._closed:
                    return
        finally:
            os.close(fd)

    def _hash(self, file: int) -> None:
        """Take the pieces of a file that are here, in order, into its digest; one thread at a time."""
        check = self._checks.get(file)
        if check is None:
            return
        with self._changed:
            if check.busy:
                return
            check.busy = True
        while True:
            with self._changed:
                piece = check.pieces[check.next] if check.next < len(check.pieces) else None
                if piece is None or piece.state != "here":
                    check.busy = False
                    return
            data = self._path(piece).read_bytes()
            check.sha.update(data[check.at - piece.start :])
            check.at = piece.end
            for at, size, digest in check.direct.pop(piece.start, []):
                check.differs |= xxhash.xxh3_128_hexdigest(data[at : at + size]) != digest
            if piece is check.pieces[-1]:
                self._judge(check)
            with self._changed:
                piece.hashed = True
                check.next += 1
                self._drop(piece)
                self._changed.notify_all()

    def _judge(self, check: _Check) -> None:
        """Record that a whole file has the listed digest. Raises `EnvironmentFault` where it has not."""
        good = check.sha.hexdigest() == check.wanted and not check.differs
        with self._changed:
            if good:
                self._shards.setdefault("checked", []).append(check.name)
            else:
                wrong = self._shards.setdefault("wrong", {})
                wrong[check.name] = wrong.get(check.name, 0) + 1
            with disk_errors("writing", self._state / SHARDS_NAME):
                self._disk.write_file(self._state / SHARDS_NAME, _dump(self._shards))
        if not good:
            raise EnvironmentFault(
                f"{check.name}: the bytes that came have not the sha256 that is listed; what was made of them is not "
                "used. Run the same command again: it fetches this file anew, and goes on with the others"
            )


class Ranges:
    """Reads of single ranges: each is a request of its own; the last ones are kept, as samples are read repeatedly."""

    def __init__(self, remote: Remote, names: Sequence[str], most: int = 256 << 20) -> None:
        self._remote, self._names, self._most = remote, names, most
        self._kept: dict[ByteRange, bytes] = {}
        self._lock = threading.Lock()

    def read(self, r: ByteRange) -> bytes:
        """Return the bytes of a range."""
        with self._lock:
            data = self._kept.get(r)
        if data is None:
            data = b"".join(self._remote.fetch(self._names[r.file], r.offset, r.size))
            with self._lock:
                self._kept[r] = data
                while sum(map(len, self._kept.values())) > self._most:
                    del self._kept[next(iter(self._kept))]
        return data


class Blocks:
    """Reads inside ranges, front to back as comparisons go: fetched in blocks, of which the last ones are kept."""

    SIZE, KEPT = 8 << 20, 24

    def __init__(self, remote: Remote, names: Sequence[str]) -> None:
        self._ranges = Ranges(remote, names, self.SIZE * self.KEPT)

    def get(self, r: ByteRange, start: int, size: int) -> bytes:
        """Return `size` bytes from `start` within the range `r`."""
        out = bytearray()
        while len(out) < size:
            at = start + len(out)
            first = at - at % self.SIZE
            block = self._ranges.read(ByteRange(r.file, r.offset + first, min(self.SIZE, r.size - first)))
            out += block[at - first : at - first + size - len(out)]
        return bytes(out)


def _read_shards(state: Path) -> dict[str, Any]:
    """Return which files have been checked, and how often one was wrong."""
    with suppress(OSError, ValueError):
        found = json.loads((state / SHARDS_NAME).read_bytes())
        checked, wrong = found.get("checked", []), found.get("wrong", {})
        if all(isinstance(n, str) for n in checked) and all(isinstance(n, int) for n in wrong.values()):
            return {"checked": list(checked), "wrong": dict(wrong)}
    return {}


def _dump(shards: Mapping[str, Any]) -> bytes:
    return json.dumps(shards, sort_keys=True).encode()
