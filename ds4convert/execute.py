"""Carries out a plan: read range, transform, write at offset, hash, journal. Decides nothing.

Memory: a worker holds a few megabytes, whatever the size of a tensor or a model. Each worker writes one file from
front to back, so that its sha256 comes from the bytes as they pass; hashing, and syncing finished batches to the
disk, each have a thread of their own. Rounding is done on all cores: a step's jobs run side by side, and their pieces
are written in order. What a lossy step makes beside its codes (scales, biases: an eighth or less) lies further back
in the file and is read again when the hash of the file comes to it.
"""

from __future__ import annotations

import hashlib
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from ds4convert.errors import EnvironmentFault, HeaderError
from ds4convert.files import PARTIAL, Disk, disk_errors
from ds4convert.folder import open_file, resolve_inside
from ds4convert.formats.quantize import STORES, Importance, no_importance, pieces
from ds4convert.formats.transforms import CHUNK_BYTES, Job, Piece
from ds4convert.journal import Fingerprint, Finished, Journal
from ds4convert.pool import rounding_pool
from ds4convert.types import ByteRange, Done, Loss, OutputFile, Plan, SourceFile, Step
from ds4convert.window import Window

BATCH_BYTES = 256 << 20
"""Finished steps are synced and journalled together when they come to this size, or when their file is whole."""

BUFFERS = 8
"""Pieces of one worker that may be in flight between reading and hashing."""

Progress = Callable[[int], None]


class Stopped(Exception):
    """Another worker failed, or the user interrupted; this one stopped between two pieces."""


@dataclass
class Result:
    """What is known of each step by its number, and sha256 hex per file number; None where hashing is off."""

    steps: dict[int, Done] = field(default_factory=dict)
    hashes: dict[int, str | None] = field(default_factory=dict)


class Sources:
    """Open source files, read by range. Refuses files that are no longer what the plan saw.

    Some of them may be somewhere else: those are read through a `window`.
    """

    @classmethod
    def of(cls, folder: Path, files: Sequence[SourceFile]) -> Sources:
        """Open the files of one folder."""
        return cls([(folder, f.name) for f in files], files)

    def __init__(
        self, places: Sequence[tuple[Path, str]], files: Sequence[SourceFile], window: Window | None = None
    ) -> None:
        """Open source `files`, each at its place: a folder, and its name in it; those of the window by themselves."""
        self.fds: list[int] = []  # -1 for a file of the window
        self.prints: dict[str, Fingerprint] = {}
        self.window = window
        self._names = [s.name for s in files]
        try:
            for n, (s, (folder, name)) in enumerate(zip(files, places, strict=True)):
                if window is not None and n in window.names:
                    self.fds.append(-1)
                    self.prints[s.name] = window.fingerprint(n)
                    continue
                fd = open_file(resolve_inside(folder, name), s.name)
                self.fds.append(fd)
                status = os.fstat(fd)
                self.prints[s.name] = (status.st_size, status.st_mtime_ns)
                if status.st_size != s.size:
                    raise HeaderError(f"{s.name}: {status.st_size} bytes, but {s.size} when the run was planned")
        except BaseException:
            self.close()
            raise

    def begin(self, plan: Plan, finished: Finished) -> None:
        """Have what the unfinished steps of a plan read fetched from elsewhere."""
        if self.window is not None:
            self.window.begin(plan, finished)

    def done(self, step: int) -> None:
        """Tell that a step has read all that it will."""
        if self.window is not None:
            self.window.done(step)

    def finish(self) -> None:
        """Wait for the checks of what came from elsewhere."""
        if self.window is not None:
            self.window.finish()

    def read(self, r: ByteRange) -> bytes:
        """Return the bytes of a range. Raises `HeaderError` when the file ends early."""
        if self.fds[r.file] < 0:
            whole = bytearray(r.size)
            self.read_into(memoryview(whole), r)
            return bytes(whole)
        try:
            data = os.pread(self.fds[r.file], r.size, r.offset)
        except OSError as e:
            raise self._unreadable(r, e) from e
        if len(data) == r.size:
            return data
        whole = bytearray(r.size)  # the kernel gave less than asked for: a signal, or the end of the file
        self.read_into(memoryview(whole), r)
        return bytes(whole)

    def read_into(self, view: memoryview, r: ByteRange) -> None:
        """Fill `view`, which is as long as the range."""
        if self.fds[r.file] < 0:
            assert self.window is not None
            self.window.read_into(view, r.file, r.offset)
            return
        done = 0
        try:
            while done < r.size:
                n = os.preadv(self.fds[r.file], [view[done:]], r.offset + done)
                if n == 0:
                    self.ended(r)
                done += n
        except OSError as e:
            raise self._unreadable(r, e) from e

    def _unreadable(self, r: ByteRange, e: OSError) -> EnvironmentFault:
        place = f"bytes {r.offset}..{r.offset + r.size}"
        return EnvironmentFault(f"{self._names[r.file]}: {place} cannot be read: {e.strerror}")

    def ended(self, r: ByteRange) -> None:
        """Raise the error of a source file that ends before a planned range does."""
        raise HeaderError(
            f"{self._names[r.file]}: ends before byte {r.offset + r.size}; the file is being changed, or is truncated"
        )

    def close(self) -> None:
        """Close all files."""
        if self.window is not None:
            self.window.close()
        for fd in self.fds:
            if fd >= 0:
                os.close(fd)


class Buffers:
    """A fixed set of reusable buffers: the bound on a worker's memory, and its back-pressure."""

    def __init__(self, count: int, stop: threading.Event) -> None:
        self._free: queue.LifoQueue[bytearray] = queue.LifoQueue()  # the last used is still in the cache
        self._stop = stop
        for _ in range(count):
            self._free.put(bytearray(CHUNK_BYTES))

    def take(self) -> bytearray:
        """Return a free buffer, waiting for one. Raises `Stopped` when the run is being stopped."""
        while not self._stop.is_set():
            try:
                return self._free.get(timeout=0.2)
            except queue.Empty:
                continue
        raise Stopped

    def give(self, buffer: bytearray) -> None:
        """Take a buffer back."""
        self._free.put(buffer)


class Tally:
    """What is learned of a step while its pieces pass: a digest per output (hashing on), and the loss."""

    def __init__(self, step: Step, hashing: bool) -> None:
        self.digests = [xxhash.xxh3_128() for _ in step.outputs] if hashing else []
        self.loss: Loss | None = None
        self._outputs = len(step.outputs)

    def done(self) -> Done:
        """Return the account of the finished step."""
        digests = tuple(d.hexdigest() for d in self.digests) or (None,) * self._outputs
        return Done(digests, self.loss)


class FileWriter:
    """Writes one file of the plan: its header, then its steps in order; resumes what an earlier run left."""

    def __init__(self, run: Run, number: int) -> None:
        self.run, self.number = run, number
        self.file: OutputFile = run.plan.files[number]
        self.path = run.out / self.file.name
        self.partial = self.path.with_name(self.path.name + PARTIAL)
        self.sha = hashlib.sha256() if run.plan.hashing else None
        self.hashed = 0  # the file's first bytes, up to here, are in `sha`; of the hashing thread while it runs
        self.batch: dict[int, Done] = {}
        self.batch_bytes = 0
        self.buffers = Buffers(BUFFERS, run.stop)
        self.hasher = ThreadPoolExecutor(1, "hash")
        self.syncer = ThreadPoolExecutor(1, "sync")
        self.hashing: list[Future[None]] = []  # appended to by the worker only
        self.syncing: list[Future[None]] = []  # appended to by the hashing thread, or by the worker when that is idle
        self.fd = -1
        self.sync_failed = False

    def write(self) -> None:
        """Produce the file under its final name, or raise with all finished steps recorded."""
        with disk_errors("writing", self.partial):
            self._recover_name()
            self.fd = self.run.disk.open_partial(self.partial, self.file.size)
            try:
                self._contents()
            finally:
                self.hasher.shutdown(wait=True)
                self.syncer.shutdown(wait=True)
                os.close(self.fd)
            self.run.disk.rename(self.partial, self.path)
        sha256 = self.sha.hexdigest() if self.sha else None
        self.run.journal.file(self.number, sha256)
        self.run.result.hashes[self.number] = sha256

    def _recover_name(self) -> None:
        """A run that ended between rename and record leaves the final name: take it back to be checked."""
        if self.path.exists() and not self.path.is_symlink() and self.path.stat().st_size == self.file.size:
            self.run.disk.rename(self.path, self.partial)
        if not self.partial.exists() or self.partial.stat().st_size != self.file.size:
            for n in self.run.steps_of[self.number]:
                self.run.finished.steps.pop(n, None)

    def _contents(self) -> None:
        try:
            self.run.disk.write_at(self.fd, self.file.header, 0)
            if self.sha:
                self._absorb(self.file.header, 0)
            for n in self.run.steps_of[self.number]:
                if not self._kept(n):
                    self._step(n)
        finally:
            self._drain()
            self._commit()
            self._drain()
        self._catch_up(self.file.size)
        self.run.disk.sync_data(self.fd)

    def _drain(self) -> None:
        """Wait for hashing, then syncing, in flight; the first failure is raised."""
        for waiting in (self.hashing, self.syncing):
            while waiting:
                waiting.pop(0).result()

    def _kept(self, n: int) -> bool:
        """Return whether an earlier run finished step `n`; with hashing on, its bytes are read back and compared."""
        if n not in self.run.finished.steps:
            return False
        self._drain()
        outputs, done = self.run.plan.steps[n].outputs, self.run.finished.steps[n]
        if self.sha is not None:
            first = outputs[0]
            self._catch_up(first.offset)
            # The file's hash has to see these bytes anyway; on a mismatch it must not have.
            trial = self.sha.copy()
            for output, digest in zip(outputs, done.digests, strict=True):
                tensor = xxhash.xxh3_128()
                for data in self._read_back(output.offset, output.offset + output.size):
                    tensor.update(data)
                    if output is first:
                        trial.update(data)
                if tensor.hexdigest() != digest:
                    return False
            self.sha, self.hashed = trial, first.offset + first.size
        self.run.result.steps[n] = done
        self.run.sources.done(n)
        self.run.progress(sum(o.size for o in outputs))
        return True

    def _read_back(self, start: int, end: int) -> Iterator[bytes]:
        """Yield the bytes of the file from `start` to `end`, all of them written before."""
        for at in range(start, end, CHUNK_BYTES):
            self.run.check_stop()
            yield os.pread(self.fd, min(CHUNK_BYTES, end - at), at)

    def _catch_up(self, to: int) -> None:
        """Hash the bytes before `to` that did not pass in order: scales and biases of steps before this place."""
        if self.sha is not None and to > self.hashed:
            for data in self._read_back(self.hashed, to):
                self.sha.update(data)
            self.hashed = to

    def _absorb(self, data: bytes | memoryview, at: int) -> None:
        """Hash bytes that pass in order, written at `at`."""
        assert self.sha is not None
        self._catch_up(at)
        self.sha.update(data)
        self.hashed = at + len(data)

    def _step(self, n: int) -> None:
        step = self.run.plan.steps[n]
        tally = Tally(step, self.sha is not None)
        for piece in self.run.in_order(pieces(step, self.run.sources.read, self.run.importance)):
            self.run.check_stop()
            self._piece(step, piece, tally)
        self.run.sources.done(n)
        self.hashing.append(self.hasher.submit(self._finish, n, tally))
        while self.hashing and self.hashing[0].done():
            self.hashing.pop(0).result()

    def _piece(self, step: Step, piece: Piece, tally: Tally) -> None:
        """Write one piece; hand its bytes to the hasher if hashing is on."""
        if piece.loss is not None:
            tally.loss = piece.loss if tally.loss is None else tally.loss + piece.loss
        at = step.outputs[piece.output].offset + piece.offset
        disk = self.run.disk
        r = piece.source
        if r is not None and self.sha is None and self._kernel_copied(r, at):
            self.run.progress(r.size)
            return
        buffer = self.buffers.take()  # for bytes that a transform made, only a token that bounds what is in flight
        if r is not None:
            data: bytes | memoryview = memoryview(buffer)[: r.size]
            self.run.sources.read_into(memoryview(buffer)[: r.size], r)
        else:
            assert piece.data is not None
            data = piece.data
        disk.write_at(self.fd, data, at)
        self.run.progress(len(data))
        if self.sha is not None:
            self.hashing.append(self.hasher.submit(self._hash, data, at, piece.output, tally, buffer))
        else:
            self.buffers.give(buffer)

    def _kernel_copied(self, r: ByteRange, at: int) -> bool:
        if self.run.sources.fds[r.file] < 0:
            return False
        try:
            return self.run.disk.copy_range(self.run.sources.fds[r.file], r.offset, self.fd, at, r.size)
        except EOFError:
            self.run.sources.ended(r)
            raise

    def _hash(self, data: bytes | memoryview, at: int, output: int, tally: Tally, buffer: bytearray) -> None:
        if output == 0:
            self._absorb(data, at)
        tally.digests[output].update(data)
        self.buffers.give(buffer)

    def _finish(self, n: int, tally: Tally) -> None:
        """On the hashing thread: the step's bytes are written and hashed; have them synced with their batch."""
        self.run.result.steps[n] = self.batch[n] = tally.done()
        self.batch_bytes += sum(o.size for o in self.run.plan.steps[n].outputs)
        if self.batch_bytes >= BATCH_BYTES:
            self._commit()

    def _commit(self) -> None:
        """Sync the batch, then record it. Runs on the syncing thread, while later pieces are written."""
        batch, self.batch, self.batch_bytes = self.batch, {}, 0
        if batch:
            self.syncing.append(self.syncer.submit(self._sync, batch))

    def _sync(self, batch: Mapping[int, Done]) -> None:
        """Sync the file, then record the batch. A system tells of a lost write once: after that nothing is safe."""
        if self.sync_failed:
            return
        self.sync_failed = True
        with disk_errors("writing", self.partial):
            self.run.disk.sync_data(self.fd)
        self.run.journal.steps(batch)
        self.sync_failed = False


@dataclass
class Run:
    """One execution of a plan: what all workers share."""

    plan: Plan
    out: Path
    sources: Sources
    disk: Disk
    journal: Journal
    finished: Finished
    progress: Progress
    importance: Importance = no_importance
    stop: threading.Event = field(default_factory=threading.Event)
    result: Result = field(default_factory=Result)

    def __post_init__(self) -> None:
        self.steps_of: list[list[int]] = [[] for _ in self.plan.files]
        for n, step in enumerate(self.plan.steps):
            self.steps_of[step.outputs[0].file].append(n)
        self._pool = rounding_pool(sum(s.weights for s in self.plan.steps if s.transform in STORES))

    def in_order(self, made: Iterable[Piece | Job]) -> Iterator[Piece]:
        """Yield pieces as they come, those of jobs in their turn: the jobs run side by side, a few ahead."""
        waiting: deque[tuple[Job, Future[Any]]] = deque()

        def first() -> Sequence[Piece]:
            job, future = waiting.popleft()
            return job.finish(future.result())

        try:
            for item in made:
                if isinstance(item, Piece):
                    while waiting:
                        yield from first()
                    yield item
                    continue
                waiting.append((item, self._pool.submit(item.work)))
                if len(waiting) > self._pool.cores:
                    yield from first()
            while waiting:
                yield from first()
        finally:
            for _, future in waiting:
                future.cancel()

    def check_stop(self) -> None:
        """Raise `Stopped` when the run is being stopped."""
        if self.stop.is_set():
            raise Stopped

    def _file(self, number: int) -> None:
        try:
            self._whole_file(number)
        except BaseException:
            self.stop.set()  # at once, so that no other file is begun
            raise

    def _whole_file(self, number: int) -> None:
        self.check_stop()
        name = self.plan.files[number].name
        with disk_errors("writing", self.out / name):
            self.disk.make_folder((self.out / name).parent)
        if number in self.finished.files and self._whole(number):
            self.result.hashes[number] = self.finished.files[number]
            for n in self.steps_of[number]:
                self.result.steps[n] = self.finished.steps[n]
            self.progress(self.plan.files[number].size - len(self.plan.files[number].header))
            return
        FileWriter(self, number).write()

    def _whole(self, number: int) -> bool:
        path = self.out / self.plan.files[number].name
        known = all(n in self.finished.steps for n in self.steps_of[number])
        return (
            known and path.is_file() and not path.is_symlink() and path.stat().st_size == self.plan.files[number].size
        )

    def files(self, jobs: int) -> Result:
        """Write all files with `jobs` workers. The first failure, or an interrupt, stops the others cleanly."""
        with self._pool, ThreadPoolExecutor(jobs, "convert") as pool:
            waiting = {pool.submit(self._file, n) for n in range(len(self.plan.files))}
            try:
                while waiting:
                    done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_EXCEPTION)
                    failed = [f.exception() for f in done if f.exception()]
                    if failed:
                        self.stop.set()
                        waiting = self._settle(waiting, failed)
                        raise next(e for e in failed if e is not None and not isinstance(e, Stopped))
            except BaseException:
                self.stop.set()
                for future in waiting:
                    future.cancel()
                raise
        return self.result

    @staticmethod
    def _settle(waiting: set[Future[None]], failed: list[BaseException | None]) -> set[Future[None]]:
        """Wait for the other workers to stop, collecting their failures."""
        for future in waiting:
            future.cancel()
        done, _ = wait(waiting)
        failed += [f.exception() for f in done if not f.cancelled() and f.exception()]
        return set()
