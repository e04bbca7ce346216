"""The source files of a run, read by the plan's numbers: here, or somewhere else through a window.

Refuses files that are not what the plan saw, or that change.
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import xxhash

from ds4convert.errors import HeaderError
from ds4convert.execution.journal import Finished, Prints
from ds4convert.execution.prefetch import PrefetchWindow, Reads
from ds4convert.planning.types import Plan
from ds4convert.storage.byte_source import ByteSource, Numbered
from ds4convert.storage.records import LENGTH_BYTES, ByteRange, Fingerprint, SourceFile


def reads_of(plan: Plan, begins: Mapping[int, int]) -> dict[str, Reads]:
    """Return what a plan reads of some source files, by name; `begins` has their numbers, and where their data begin.

    Steps are told by their numbers.
    """
    out: dict[int, list[tuple[int, int, int]]] = {f: [] for f in begins}
    for n, step in enumerate(plan.steps):
        for operand in step.operands:
            for r in operand:
                if r.file in out and r.size:
                    out[r.file].append((r.offset, r.offset + r.size, n))
    return {plan.sources[f].name: Reads(begins[f], sorted(found)) for f, found in out.items()}


def begin_of(source: ByteSource, file: SourceFile) -> int:
    """Return where the data of a file begin. Raises `HeaderError` unless it still has the size and header it had."""
    size = source.size(file.name)
    if size != file.size:
        raise HeaderError(f"{file.name}: {size} bytes, but {file.size} when the run was planned")
    if not file.header_sha256:
        return 0
    length = int.from_bytes(source.read(file.name, 0, min(LENGTH_BYTES, size)), "little")
    raw = source.read(file.name, LENGTH_BYTES, length) if LENGTH_BYTES + length <= size else b""
    if hashlib.sha256(raw).hexdigest() != file.header_sha256:
        raise HeaderError(
            f"{file.name}: has another header than when the run was planned", hint="run the command again"
        )
    return LENGTH_BYTES + length


SAMPLES, SAMPLE_BYTES = 64, 4096
"""Blocks of a source file by which copies on two machines are compared, and the bytes of each."""


def _place(folders: Iterable[Path]) -> str:
    """Return what tells this machine's copy of the source files from another's."""
    named = "\0".join([socket.gethostname(), *sorted({os.path.realpath(f) for f in folders})])
    return hashlib.sha256(named.encode("utf-8", "surrogateescape")).hexdigest()[:16]


class Sources:
    """The source files of a plan; `window` is the source itself where some of them are somewhere else."""

    def __init__(self, source: ByteSource, plan: Plan, window: PrefetchWindow | None = None) -> None:
        """Look at every file of the plan: `prints` are their fingerprints by name."""
        self._source = source if window is None else window
        self._names = [s.name for s in plan.sources]
        self._numbered = Numbered(self._source, self._names)
        self._window = window
        self._far: dict[int, int] = {}
        prints: dict[str, Fingerprint] = {}
        try:
            for n, file in enumerate(plan.sources):
                begin = begin_of(self._source, file)
                prints[file.name] = self._source.fingerprint(file.name)
                if self._source.fileno(file.name) is None:
                    self._far[n] = begin
        except BaseException:
            self.close()
            raise
        self.prints = Prints(prints, _place(filter(None, map(source.folder, self._names))), self._sample)

    def _sample(self, name: str) -> str | None:
        """Return a digest of blocks all over a local file: two models of one shape differ in nearly every block."""
        if self._source.fileno(name) is None:
            return None
        size, digest = self._source.size(name), xxhash.xxh3_128()
        for n in range(SAMPLES):
            at = max(size - SAMPLE_BYTES, 0) * n // (SAMPLES - 1)
            digest.update(self._source.read(name, at, min(SAMPLE_BYTES, size)))
        return digest.hexdigest()

    def read(self, r: ByteRange) -> bytes:
        """Return the bytes of a range."""
        return self._numbered.read(r)

    def fileno(self, n: int) -> AbstractContextManager[int] | None:
        """Return what yields a descriptor of file `n`, None where it is somewhere else."""
        return self._source.fileno(self._names[n])

    def check(self, numbers: Iterable[int]) -> None:
        """Raise `SourceChanged` when one of these files was changed since the run began; costs a look at each."""
        for n in sorted(numbers):
            self._source.check(self._names[n])

    def begin(self, plan: Plan, finished: Finished, numbers: Collection[int]) -> None:
        """Have fetched from elsewhere what the unfinished steps of these output files of a plan read."""
        if self._window is not None:
            steps = {n for n, s in enumerate(plan.steps) if s.outputs[0].file in numbers}
            done = {n for n in range(len(plan.steps)) if n in finished.steps or n not in steps}
            reads = reads_of(plan, self._far)
            self._window.begin({f: r for f, r in reads.items() if any(n in steps for _, _, n in r.ranges)}, done)

    def done(self, step: int) -> None:
        """Tell that a step has read all that it will."""
        if self._window is not None:
            self._window.done(step)

    def proven(self, numbers: Iterable[int]) -> bool:
        """Return whether no digest of these files is still being taken: those elsewhere are checked as they come."""
        return self._window is None or not any(self._window.is_checking(self._names[n]) for n in numbers)

    def finish(self) -> None:
        """Wait for the checks of what came from elsewhere."""
        if self._window is not None:
            self._window.finish()

    def read_into(self, view: memoryview, r: ByteRange) -> None:
        """Fill `view`, which is as long as the range."""
        self._source.read_into(self._names[r.file], r.offset, view)

    def stop(self) -> None:
        """Have nobody wait any longer for what comes from elsewhere: the run is being stopped."""
        if self._window is not None:
            self._window.stop()

    def close(self) -> None:
        """Close all files."""
        self._source.close()
