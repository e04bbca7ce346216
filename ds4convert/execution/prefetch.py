"""Files that are somewhere else, read through a window: pieces are fetched ahead of use, and dropped after.

What will be read is told beforehand, as ranges of files and the steps that read them, which are numbers here and no
more. Neighbouring ranges become pieces of a few megabytes. Several connections fetch them, file by file and front to
back, into small files of the window's folder, as long as these take no more than the window may. A piece goes when all
steps that read it are done. Where the window is too small for what a step needs at once, its bytes are fetched by
themselves once more: slower, never wrong. What was not told is read from where it is.

As pieces come in order, the sha256 of each whole file is taken from them and compared with what the other side lists: a
file of which all bytes passed is taken only then. Files that are read in part alone cannot be checked so.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from ds4convert.errors import EnvironmentFault
from ds4convert.files import Disk, disk_errors
from ds4convert.storage import strict_json
from ds4convert.storage.byte_source import ByteSource, Wrapped, ended
from ds4convert.storage.local_files import LocalFiles
from ds4convert.storage.records import Fingerprint
from ds4convert.storage.safe_open import read_own

FOLDER = "window"
SHARDS_NAME = "shards.json"
MOST_PIECE, LEAST_PIECE = 16 << 20, 64 << 10
LEAST_WINDOW = 10**6
GAP_BYTES = 256 << 10
"""Unneeded bytes between two ranges that are fetched along with them: less than what a request costs."""


LOOK_S = 0.5
"""How often who waits for bytes looks up, so that the end of a run is noticed."""

GRACE_S = 1.0
"""How long the end of a run waits for connections: a server may be silent for much longer."""


class Closed(Exception):
    """The run is being stopped; what was waited for is not fetched any more."""


@dataclass(frozen=True)
class Reads:
    """What will be read of a file: (start, end, number of the step) of each range, in the order of the file.

    `begin` is where its data begin: what lies before (a header) was read already, and costs nothing to read again.
    """

    begin: int
    ranges: Sequence[tuple[int, int, int]]


@dataclass
class Piece:
    """Bytes `start .. start + size` of a file, and what has become of them."""

    file: str
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
        self.taken: set[int] = set()  # pieces, by their start, of which all that was known has been compared

    def covers(self) -> bool:
        """Return whether header and pieces are the whole file, without a gap."""
        at = self.at
        for piece in self.pieces:
            if piece.start > at:
                return False
            at = max(at, piece.end)
        return at == self.size


def pieces_of(file: str, reads: Reads, most: int) -> list[Piece]:
    """Return the pieces that hold the ranges: neighbours joined, none larger than `most`; each knows its steps.

    Bytes from `begin` (the end of the header) to the first range are fetched along, as other small gaps are.
    """
    ranges, begin = reads.ranges, reads.begin
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


class PrefetchWindow(Wrapped):
    """A source of which some ranges are fetched ahead of use, into at most `limit` bytes of the folder `state`."""

    def __init__(self, source: ByteSource, state: Path, limit: int, connections: int, disk: Disk) -> None:
        super().__init__(source)
        self._state, self._folder, self._disk = state, state / FOLDER, disk
        self._limit, self._connections = max(limit, LEAST_WINDOW), connections
        self._most = min(MOST_PIECE, max(LEAST_PIECE, self._limit // (4 * connections)))
        self._shards = _read_shards(state)
        self._changed = threading.Condition()
        self._pieces: dict[str, list[Piece]] = {}
        self._starts: dict[str, list[int]] = {}
        self._paths: dict[str, int] = {}
        self._order: list[Piece] = []
        self._next = self._held = self._fetching = 0
        self._checks: dict[str, _Check] = {}
        self._of_step: dict[int, list[Piece]] = {}
        self._error: BaseException | None = None
        self._closed = False
        self._threads: list[threading.Thread] = []

    def fingerprint(self, name: str) -> Fingerprint:
        """Return what tells that a file changed, or that its bytes turned out wrong, since an earlier run."""
        size, mark = self._source.fingerprint(name)
        if self._source.fileno(name) is not None:
            return size, mark
        return size, mark * 1000 + int(self._shards.get("wrong", {}).get(name, 0))

    def begin(self, reads: Mapping[str, Reads], done: Collection[int] = ()) -> None:
        """Start fetching what will be read by steps that are not `done`, and what whole files lack for their digest."""
        known, past = set(self._shards.get("checked", [])), set(done)
        first: dict[str, tuple[float, int]] = {}
        for number, (file, wanted) in enumerate(reads.items()):
            self._paths[file] = number
            self._begin_file(file, wanted, file in known, past)
            step = min((n for _, _, n in wanted.ranges if n not in past), default=float("inf"))
            first[file] = step, number
        for file in sorted(self._pieces, key=first.__getitem__):
            self._order += [p for p in self._pieces[file] if p.state == "waiting"]
        with disk_errors("writing", self._folder):
            self._disk.remove(self._folder)
            self._disk.make_folder(self._folder)
        for _ in range(self._connections):
            thread = threading.Thread(target=self._work, daemon=True)
            thread.start()
            self._threads.append(thread)  # only then: Ctrl-C may come between, and what never began cannot be joined

    def _begin_file(self, file: str, reads: Reads, known: bool, done: set[int]) -> None:
        pieces, listed = pieces_of(file, reads, self._most), self._source.digest(file)
        for piece in pieces:
            piece.left -= done
        # What is read again is checked again, whole.
        checked = listed is not None and (not known or any(p.left for p in pieces))
        if checked and listed is not None:
            head = self._source.read(file, 0, reads.begin)
            check = _Check(file, self._source.size(file), head, listed, pieces)
            checked = check.covers()
            if checked:
                self._checks[file] = check
        for piece in pieces:
            piece.hashed = not checked
            piece.state = "waiting" if piece.left or checked else "gone"
            for step in piece.left:
                self._of_step.setdefault(step, []).append(piece)
        self._pieces[file], self._starts[file] = pieces, [p.start for p in pieces]

    # --- the reader's side -----------------------------------------------------------------------------------------

    def read_into(self, name: str, start: int, view: memoryview) -> None:
        """Fill `view` with the bytes of a file from `start`, waiting for those that are on their way."""
        if name not in self._pieces:
            self._source.read_into(name, start, view)
            return
        if start + len(view) > self._source.size(name):
            raise ended(name, start + len(view))
        done = 0
        while done < len(view):
            at = start + done
            piece = self._at(name, at)
            if piece is None:
                size = len(view) - done
                self._direct(view[done:], name, at)
            else:
                size = min(len(view) - done, piece.end - at)
                if not self._from(piece, view[done : done + size], at):
                    self._direct(view[done : done + size], name, at)
                    self._remember(piece, view[done : done + size], at)
            done += size

    def read(self, name: str, start: int, n: int) -> bytes:
        """Return bytes of a file, waiting for those that are on their way."""
        whole = bytearray(n)
        self.read_into(name, start, memoryview(whole))
        return bytes(whole)

    def _at(self, file: str, offset: int) -> Piece | None:
        n = bisect_right(self._starts.get(file, []), offset) - 1
        if n < 0 or self._pieces[file][n].end <= offset:
            return None
        return self._pieces[file][n]

    def _from(self, piece: Piece, view: memoryview, at: int) -> bool:
        """Fill `view` from a piece, waiting for it while it is on its way; False where it is not."""
        with self._changed:
            while piece.state in {"waiting", "fetching"} and not self._stuck(piece):
                self._raise()
                self._check_open()
                self._changed.wait(LOOK_S)
            self._check_open()
            self._raise()
            if piece.state != "here":
                return False
            path = self._path(piece)
            here = LocalFiles.at(path)
            here.size(path.name)  # it is open from now on, and may lose its name meanwhile
        with closing(here):
            here.read_into(path.name, at - piece.start, view)
        return True

    def _stuck(self, piece: Piece) -> bool:
        """Return whether a piece will not come before something else goes."""
        room = self._next < len(self._order) and self._fits(self._order[self._next])
        return piece.state == "waiting" and not room and not self._fetching

    def _direct(self, view: memoryview, name: str, start: int) -> None:
        """Fetch bytes for one use, on a thread that is left behind where the window closes meanwhile."""
        found: Future[bytes] = Future()

        def fetch() -> None:
            try:
                found.set_result(self._source.read(name, start, len(view)))
            except BaseException as e:
                found.set_exception(e)

        threading.Thread(target=fetch, daemon=True).start()
        while not wait([found], timeout=LOOK_S).done:
            self._check_open()
        view[:] = found.result()

    def _remember(self, piece: Piece, view: memoryview, at: int) -> None:
        """Keep the digest of bytes fetched by themselves: they have to be those that the file's is taken of."""
        check = self._checks.get(piece.file)
        if check is not None:
            first, digest = at - piece.start, xxhash.xxh3_128_hexdigest(view)
            with self._changed:
                if piece.start not in check.taken:
                    check.direct.setdefault(piece.start, []).append((first, len(view), digest))
                    return
            # It came, and was taken into the file's digest, meanwhile; it stays as long as a step that reads it runs.
            if self._path(piece).read_bytes()[first : first + len(view)] != bytes(view):
                check.differs = True
                self._judge(check)

    def done(self, step: int) -> None:
        """Drop what no other step reads."""
        with self._changed:
            for piece in self._of_step.pop(step, []):
                piece.left.discard(step)
                self._drop(piece)
            self._changed.notify_all()

    def is_checking(self, name: str) -> bool:
        """Return whether the digest of a file is still to be compared. Raises `EnvironmentFault` if one was wrong."""
        with self._changed:
            self._raise()
            check = self._checks.get(name)
            return check is not None and check.next < len(check.pieces)

    def finish(self) -> None:
        """Wait for the digest of every file that passed whole. Raises `EnvironmentFault` where it is wrong."""
        with self._changed:
            while any(c.next < len(c.pieces) for c in self._checks.values()):
                self._raise()
                self._changed.wait(LOOK_S)
            self._raise()

    def stop(self) -> None:
        """Stop fetching; who waits for bytes gets `Closed`."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def close(self) -> None:
        """Stop fetching and remove the window. Threads that wait for a silent server are left behind."""
        self.stop()
        until = time.monotonic() + GRACE_S
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        with suppress(OSError):
            self._disk.remove(self._folder)
        self._pieces, self._starts = {}, {}  # what is read from now on is read from where it is
        super().close()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _check_open(self) -> None:
        if self._closed:
            raise Closed

    # --- the fetching side -----------------------------------------------------------------------------------------

    def _path(self, piece: Piece) -> Path:
        return self._folder / f"{self._paths[piece.file]}-{piece.start}"

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
                self._changed.wait(LOOK_S)
            return None

    def _fetch(self, piece: Piece) -> None:
        path, at = self._path(piece), 0
        with disk_errors("writing", path):
            fd = self._disk.open_partial(path, piece.size)
        try:
            for data in self._source.pieces(piece.file, piece.start, piece.size):
                with disk_errors("writing", path):
                    self._disk.write_at(fd, data, at)
                at += len(data)
                if self._closed:
                    return
        finally:
            os.close(fd)

    def _hash(self, file: str) -> None:
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
            with self._changed:
                check.taken.add(piece.start)
                fetched = check.direct.pop(piece.start, [])
            for at, size, digest in fetched:
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
                self._shards["checked"] = [n for n in self._shards.get("checked", []) if n != check.name]
                wrong = self._shards.setdefault("wrong", {})
                wrong[check.name] = wrong.get(check.name, 0) + 1
            with disk_errors("writing", self._state / SHARDS_NAME):
                self._disk.write_file(self._state / SHARDS_NAME, _dump(self._shards))
        if not good:
            self._source.distrust(check.name)
            raise EnvironmentFault(
                f"{check.name}: the bytes that came have not the sha256 that is listed; what was "
                "made of them is not used",
                hint=("Run the same command again: it fetches this file anew, and goes on with the others"),
            )


def _read_shards(state: Path) -> dict[str, Any]:
    """Return which files have been checked, and how often one was wrong: by this run, and by the parts of it."""
    checked: set[str] = set()
    wrong: dict[str, int] = {}
    for path in (state / SHARDS_NAME, *sorted(state.glob(f"*-of-*/{SHARDS_NAME}"))):
        with suppress(ValueError, TypeError, AttributeError):
            found = strict_json.plain(read_own(path.parent, path.name))
            names, counts = found.get("checked", []), found.get("wrong", {})
            if all(isinstance(n, str) for n in names) and all(isinstance(n, int) for n in counts.values()):
                checked |= set(names)
                wrong |= {name: max(n, wrong.get(name, 0)) for name, n in counts.items()}
    return {"checked": sorted(checked), "wrong": wrong}


def _dump(shards: Mapping[str, Any]) -> bytes:
    return json.dumps(shards, sort_keys=True).encode()
