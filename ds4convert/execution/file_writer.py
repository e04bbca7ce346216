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
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import xxhash

from ds4convert.execution.elsewhere.deposit import Deposit, Leaving, Stays
from ds4convert.execution.journal import Begun, Finished, Log
from ds4convert.execution.rounding_steps import STORES, Importance, no_importance, pieces
from ds4convert.execution.sources import Sources
from ds4convert.execution.threads import AtOnce
from ds4convert.execution.transforms import CHUNK_BYTES, MAY_PASS, PASSED, Job, Piece
from ds4convert.execution.workers import all_cores, rounding_pool
from ds4convert.files import PARTIAL, Disk, disk_errors
from ds4convert.formats.second_moments import COMPENSATED
from ds4convert.planning.types import Done, Loss, OutputFile, Plan, Step
from ds4convert.storage.digests import feed
from ds4convert.storage.local_files import LocalFiles
from ds4convert.storage.records import ByteRange
from ds4convert.words import activity

LONG_BYTES = 4 << 30
"""Of a step of more bytes a run records how far it has come each time that it has written so many: a table of 98 GB is
one tensor, and one step."""

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
        self.hasher = ThreadPoolExecutor(1, "hash") if run.cores > 1 else AtOnce()
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
            self.run.sources.check(self.run.read_by(self.number))
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
                self.run.finished.begun.pop(n, None)

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
        tally, done, written = self._gone_on_with(n)
        going_on = replace(step, params={**step.params, PASSED: done}) if done else step
        recorded, may_pass = sum(written), _may_pass(step)
        for piece in self.run.in_order(pieces(going_on, self.run.sources.read, self.run.importance)):
            self.run.check_stop()
            if piece.output == 0:  # what came before it is whole
                if may_pass and sum(written) - recorded >= LONG_BYTES:
                    recorded = sum(written)
                    so_far = partial(self._begun, n, tally, done, tuple(written), tally.loss)
                    self.hashing.append(self.hasher.submit(so_far))
                done += 1
            written[piece.output] = piece.offset + self._piece(step, piece, tally)
        self.run.sources.done(n)
        self.hashing.append(self.hasher.submit(self._finish, n, tally))
        while self.hashing and self.hashing[0].done():
            self.hashing.pop(0).result()

    def _gone_on_with(self, n: int) -> tuple[Tally, int, list[int]]:
        """Return what is known of a step, how many pieces of it are there already, and the bytes of each output.

        With hashing on they are read back: what is not as an earlier run recorded it is made again.
        """
        step, begun = self.run.plan.steps[n], self.run.finished.begun.get(n)
        tally, none = Tally(step, self.sha is not None), [0 for _ in step.outputs]
        local = all(self._is_local(r.file) for operand in step.operands for r in operand)
        if begun is None or not _may_pass(step) or not local:
            return tally, 0, none
        self._drain()
        if self.sha is not None:
            self._catch_up(step.outputs[0].offset)
            trial = self.sha.copy()
            for i, (o, size) in enumerate(zip(step.outputs, begun.sizes, strict=True)):
                for data in self._read_back(o.offset, o.offset + size):
                    tally.digests[i].update(data)
                    if i == 0:
                        trial.update(data)
            if tuple(d.hexdigest() for d in tally.digests) != begun.so_far.digests:
                return Tally(step, True), 0, none
            self.sha, self.hashed = trial, step.outputs[0].offset + begun.sizes[0]
        tally.loss = begun.so_far.loss
        self.run.progress(sum(begun.sizes))
        return tally, begun.pieces, list(begun.sizes)

    def _is_local(self, number: int) -> bool:
        """Return whether a source file lies here: one elsewhere is fetched ahead, in the order of its bytes."""
        descriptor = self.run.sources.fileno(number)
        if descriptor is None:
            return False
        with descriptor:
            return True

    def _begun(self, n: int, tally: Tally, pieces: int, written: tuple[int, ...], loss: Loss | None) -> None:
        """On the hashing thread: some of a step is written and hashed; have that synced and recorded."""
        digests = tuple(d.hexdigest() for d in tally.digests) or (None,) * len(written)
        so_far = Begun(pieces, written, Done(digests, loss))
        self.syncing.append(self.syncer.submit(self._sync, partial(self.run.journal.begun, n, so_far)))

    def _piece(self, step: Step, piece: Piece, tally: Tally) -> int:
        """Write one piece and return its size; hand its bytes to the hasher if hashing is on."""
        if piece.loss is not None:
            tally.loss = piece.loss if tally.loss is None else tally.loss + piece.loss
        at = step.outputs[piece.output].offset + piece.offset
        disk = self.run.disk
        r = piece.source
        if r is not None and self.sha is None and self._kernel_copied(r, at):
            self.run.progress(r.size)
            return r.size
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
        return len(data)

    def _kernel_copied(self, r: ByteRange, at: int) -> bool:
        descriptor = self.run.sources.fileno(r.file)
        if descriptor is None:
            return False
        with descriptor as source:
            return self.run.disk.copy_range(source, r.offset, self.fd, at, r.size)

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
            self.syncing.append(self.syncer.submit(self._sync, partial(self.run.journal.steps, batch)))

    def _sync(self, record: Callable[[], None]) -> None:
        """Sync the file, then record what is in it. A system tells of a lost write once: after that nothing is safe."""
        if self.sync_failed:
            return
        self.sync_failed = True
        with disk_errors("writing", self.partial):
            self.run.disk.sync_data(self.fd)
        record()
        self.sync_failed = False


def _may_pass(step: Step) -> bool:
    """Return whether a run can go on in the middle of a step: its pieces come from places of their own."""
    return step.transform in MAY_PASS or (step.transform in STORES and step.params.get("rounding") != COMPENSATED)


@dataclass
class Run:
    """One execution of a plan: what all workers share."""

    plan: Plan
    out: Path
    sources: Sources
    disk: Disk
    journal: Log
    finished: Finished
    progress: Progress
    importance: Importance = no_importance
    cores: int = field(default_factory=all_cores)
    stop: threading.Event = field(default_factory=threading.Event)
    result: Result = field(default_factory=Result)
    deposit: Deposit = field(default_factory=Stays)

    def __post_init__(self) -> None:
        self.steps_of: list[list[int]] = [[] for _ in self.plan.files]
        for n, step in enumerate(self.plan.steps):
            self.steps_of[step.outputs[0].file].append(n)
        rounded = [s for s in self.plan.steps if s.transform in STORES]
        self.compensated = any(s.params.get("rounding") == COMPENSATED for s in rounded)
        self.weights = sum(s.weights for s in rounded)
        self.pool = rounding_pool(self.weights, self.compensated, self.cores)
        self.leaving = Leaving(lambda n: self.sources.proven(self.read_by(n)), self.put)

    def in_order(self, made: Iterable[Piece | Job]) -> Iterator[Piece]:
        """Yield pieces as they come, those of jobs in their turn: the jobs run side by side, a few ahead.

        On one core none runs ahead: what is rounded is waited for, and written, before the next is begun.
        """
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
                waiting.append((item, self.pool.submit(item.work)))
                if len(waiting) > (self.pool.cores if self.cores > 1 else 0):
                    yield from first()
            while waiting:
                yield from first()
        finally:
            for _, future in waiting:
                future.cancel()

    def read_by(self, number: int) -> set[int]:
        """Return the source files that the steps of an output file read."""
        steps = (self.plan.steps[n] for n in self.steps_of[number])
        return {r.file for s in steps for ranges in s.operands for r in ranges}

    def check_stop(self) -> None:
        """Raise `Stopped` when the run is being stopped."""
        if self.stop.is_set():
            raise Stopped

    def one_file(self, number: int) -> None:
        """Write one file; at a failure no other is begun."""
        try:
            self._whole_file(number)
        except BaseException:
            self.stop.set()  # at once, so that no other file is begun
            raise

    def _whole_file(self, number: int) -> None:
        self.check_stop()
        name = self.plan.files[number].name
        activity.at(name)
        with disk_errors("writing", self.out / name):
            self.disk.make_folder((self.out / name).parent)
        there = self.deposit.holds(number)
        if there or (number in self.finished.files and self._whole(number)):
            self.result.hashes[number] = self.finished.files[number]
            for n in self.steps_of[number]:
                self.result.steps[n] = self.finished.steps[n]
            self.progress(self.plan.files[number].size - len(self.plan.files[number].header))
        else:
            FileWriter(self, number).write()
        if not there and not self.deposit.keeps:
            self.leaving.finished(number)

    def put(self, number: int) -> None:
        """Hand a finished file over to where it goes, and drop the copy here."""
        path = self.out / self.plan.files[number].name
        done = {n: self.result.steps[n] for n in self.steps_of[number]}
        self.deposit.put(number, path, done, self.result.hashes[number], self.check_stop)
        with disk_errors("removing", path):
            self.disk.remove(path)

    def _whole(self, number: int) -> bool:
        """Return whether a file that an earlier run finished is what the journal says; hashing on, it is read back."""
        file, path = self.plan.files[number], self.out / self.plan.files[number].name
        if any(n not in self.finished.steps for n in self.steps_of[number]):
            return False
        if path.is_symlink() or not path.is_file() or path.stat().st_size != file.size:
            return False
        with disk_errors("reading", path), closing(LocalFiles.at(path)) as source:
            if source.read(path.name, 0, len(file.header)) != file.header:
                return False
            return not self.plan.hashing or self._reads_back(source, path.name, number)

    def _reads_back(self, source: LocalFiles, name: str, number: int) -> bool:
        """Return whether each tensor of a file, and the file as a whole, has its recorded digest."""
        file = self.plan.files[number]
        pairs = [
            pair
            for n in self.steps_of[number]
            for pair in zip(self.plan.steps[n].outputs, self.finished.steps[n].digests, strict=True)
        ]
        whole = hashlib.sha256(file.header)
        for output, digest in sorted(pairs, key=lambda pair: pair[0].offset):
            tensor = xxhash.xxh3_128()
            self.check_stop()
            feed(
                source, name, whole, tensor, start=output.offset, size=output.size, progress=lambda n: self.check_stop()
            )
            if tensor.hexdigest() != digest:
                return False
        return whole.hexdigest() == self.finished.files[number]

    def files(self, jobs: int, numbers: Iterable[int]) -> Result:
        """Write these files with `jobs` workers. The first failure, or an interrupt, stops the others cleanly."""
        with self.pool, ThreadPoolExecutor(jobs, "convert") as pool:
            waiting = {pool.submit(self.one_file, n) for n in numbers}
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
                self.sources.stop()
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
