"""From a source folder to a finished MLX folder: the order in which the stages run, and the guards around them."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from ds4convert.checkpoint.folder import CONFIG_NAME
from ds4convert.checkpoint.source import Source
from ds4convert.converted.manifest import MANIFEST_NAME
from ds4convert.errors import EnvironmentFault, InputError, OutputError, UsageError, ValueFault
from ds4convert.execution import file_writer, journal, ownership
from ds4convert.execution.completion import Completion
from ds4convert.execution.elsewhere.deposit import Deposit, Stays
from ds4convert.execution.feeders import division
from ds4convert.execution.feeders.files_process import Setup
from ds4convert.execution.feeders.parent import Feeders
from ds4convert.execution.locking import Lock
from ds4convert.execution.ownership import Marks
from ds4convert.execution.prefetch import PrefetchWindow
from ds4convert.execution.rounding_steps import Importance, no_importance
from ds4convert.execution.sources import Sources, begin_of
from ds4convert.execution.transforms import TRANSFORMS, as_floats, to_be_narrowed
from ds4convert.execution.workers import all_cores
from ds4convert.files import PARTIAL, Disk, disk_errors, free_bytes
from ds4convert.planning import build, parts
from ds4convert.planning.parts import Part
from ds4convert.planning.types import Plan
from ds4convert.storage.byte_source import ByteSource, Cached, Numbered, Read, are_here
from ds4convert.storage.local_files import LocalFiles, SourceChanged
from ds4convert.storage.safe_open import names_in, read_small
from ds4convert.storage.state_folder import CLEARING_NAME, PLAN_NAME, STATE_FOLDER

WINDOW_BYTES = 8 * 10**9
"""Most bytes of a source elsewhere that lie on the disk at once."""

CONNECTIONS = 8
SAMPLE_BYTES = 256 << 20
"""Most bytes of ranges of a source elsewhere that are held in memory, as samples are read repeatedly."""

MARGIN_BYTES = 16 << 20
"""Room for folders, the journal and the manifest beside the planned bytes."""


@dataclass(frozen=True)
class Outcome:
    """What a conversion did. `resumed`: an earlier run had finished some of it; `already_done`: all of it.

    `complete` is false after a part of a plan: the run that ends the conversion writes `manifest`.
    """

    plan: Plan
    manifest: Path
    resumed: bool
    already_done: bool
    complete: bool = True


def _plain(source: Source, plan: Plan) -> Completion:
    """Return how a conversion ends: its source's small files may not have changed on the way."""
    folder = source.checkpoint.path

    def carried(name: str, sha256: str) -> bytes:
        data = _bytes_of(folder, name)
        if data is None or hashlib.sha256(data).hexdigest() != sha256:
            raise SourceChanged(name, "it has other bytes")
        return data

    def account(out: Path, written: file_writer.Result, disk: Disk) -> file_writer.Result:
        if source.checkpoint.config is not None and _bytes_of(folder, CONFIG_NAME) != source.checkpoint.config:
            raise SourceChanged(CONFIG_NAME, "it has other bytes")
        return written

    return Completion(plan, carried, (folder,), account=account)


def _bytes_of(folder: Path, name: str) -> bytes | None:
    try:
        return read_small(folder, name)
    except InputError:
        return None


@contextmanager
def reading(source: Source) -> Iterator[Read]:
    """Yield what reads byte ranges of the source's files; those elsewhere are fetched one by one, and kept a while."""
    whole = source.bytes if source.checkpoint.is_here else Cached(source.bytes, most=SAMPLE_BYTES)
    with closing(Numbered(whole, source.checkpoint.file_names)) as files:
        for file in source.checkpoint.files if whole is source.bytes else ():
            begin_of(whole, file)
        yield files.read


def check_values(source: Source, plan: Plan) -> None:
    """Raise `ValueFault` for values that a plan counts on and that are cheap to see, before anything is written.

    These are the experts that tables of tokens name (pruning leaves wrong ones), block scales in floats, and the
    first weights of each tensor that BF16 has to hold: one that was saved anew in F32 holds others everywhere.
    """
    with reading(source) as read:
        for step in plan.steps:
            if step.transform in {"narrow_i64", "indices"}:
                for _ in TRANSFORMS[step.transform](step, read):
                    pass
            for scales in as_floats(step, read):
                scales.get(0, scales.size)
            for weights in to_be_narrowed(step, read):
                weights.get(0, min(weights.size, LOOKED_AT_BYTES))


LOOKED_AT_BYTES = 16_000_000


def check_places(source: Path, out: Path) -> None:
    """Raise `OutputError` when one of the two folders lies in the other, by whatever names they are called."""
    a, b = Path(os.path.realpath(source)), Path(os.path.realpath(out))
    if _lies_in(b, a) or _lies_in(a, b):
        raise OutputError(
            f"{out}: source and output folder may not lie in each other", hint="choose another output folder"
        )
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out}: is a file, expected a folder or nothing")


def _lies_in(inner: Path, outer: Path) -> bool:
    """Return whether `inner` is `outer` or below it; where names differ in case only, the disk tells what is one."""
    if inner.is_relative_to(outer):
        return True
    with contextlib.suppress(OSError):
        wanted = outer.stat()
        return any(os.path.samestat(p.stat(), wanted) for p in (inner, *inner.parents) if p.exists())
    return False


def _check_output(out: Path, plan: Plan, marks: Marks, overwrite: bool) -> None:
    """Raise `OutputError` when the folder holds what is neither this plan's unfinished run nor empty."""
    if overwrite or not out.exists():
        return
    state = out / STATE_FOLDER
    if state.is_symlink():
        raise OutputError(f"{state}: is a link", hint="remove it")
    if state.is_dir():
        journal.check_same_plan(state, plan)
        return
    if names := names_in(out):
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        told = f"{out}: is not empty (it holds {shown})"
        if ownership.ours(out, marks):
            raise OutputError(
                f"{told}", hint="choose another folder, or add --overwrite to replace the conversion there"
            )
        raise OutputError(f"{told}, and that is not all of ds4convert's making", hint="choose another folder")


def _check_room(out: Path, plan: Plan, fresh: bool, more_bytes: int, way: Way) -> None:
    """Raise `EnvironmentFault` when the disk cannot hold what is still to be written, of a part what that writes.

    `fresh`: what an earlier conversion left in the folder will be removed, so its room counts as free. Of files that do
    not stay, as many lie here as are written at a time, and those that wait for the digest of a source file elsewhere.
    """
    part = way.part
    files = plan.files if part is None else [plan.files[n] for n in parts.files_of(plan, part)]
    need = build.output_bytes(plan) if part is None else sum(f.size for f in files)
    if not way.deposit.keeps:
        at_once = way.jobs * len(division.divided(plan, way.cores or all_cores(), len(files)).workers)
        files = sorted(files, key=lambda f: -f.size)[:at_once]
        need = sum(f.size for f in files) + (max((s.size for s in plan.sources), default=0) if way.window_bytes else 0)
    need += more_bytes + MARGIN_BYTES
    for f in files:
        for path in (out / f.name, out / (f.name + PARTIAL)):
            if path.is_file() and not fresh:
                need -= min(path.stat().st_blocks * 512, f.size)
    free = free_bytes(out) + (_removable_bytes(out) if fresh else 0)
    if need > free:
        raise EnvironmentFault(
            f"{out}: the result needs {need:,} more bytes, but this disk has {free:,} free",
            hint=(f"free {need - free:,} bytes, or choose a folder on another disk. Nothing was written"),
        )


def _removable_bytes(out: Path) -> int:
    """Return the bytes that clearing frees: of files without a second name elsewhere."""
    sizes = [p.lstat() for p in ownership.removable(out)]
    return sum(s.st_blocks * 512 for s in sizes if s.st_nlink == 1)


@dataclass(frozen=True)
class Way:
    """How a plan is carried out.

    `jobs` files are written at a time, on so many `cores` of this machine, all if not said; on one alone, one file is
    written at a time, and each thing is done after the other. `overwrite` replaces a conversion that is there.
    `progress` is called with numbers of bytes as they are written or found finished. `importance` is that of the
    calibration that the plan was made with. A source that is somewhere else is read through a window of at most
    `window_bytes` on the disk, and one file is written at a time.

    With `part`, only the files of that part are written, beside other parts that may run at the same time; a run
    without one then takes in what all parts finished, writes what is missing, and ends the conversion.

    Files stay in the output folder, or go from there to `deposit` one by one.
    """

    jobs: int = 2
    overwrite: bool = False
    progress: Callable[[int], None] = lambda n: None
    disk: Disk = field(default_factory=Disk)
    importance: Importance = no_importance
    window_bytes: int = WINDOW_BYTES
    part: Part | None = None
    cores: int | None = None
    deposit: Deposit = field(default_factory=Stays)


@dataclass(frozen=True)
class Looked:
    """A folder that has been looked at, and what a run would do there; nothing has been written.

    `way` and `ending` are settled; `fresh`: what an earlier conversion left in the folder will be removed.
    """

    way: Way
    ending: Completion
    fresh: bool


def look(source: Source, plan: Plan, out: Path, way: Way, ending: Completion | None = None) -> Looked | Outcome:
    """Return what a run would do in the folder `out`; the outcome where it holds the finished conversion.

    Raises `InputError` or `EnvironmentFault` where it cannot be written there, or for values of the source.
    """
    if way.part is not None and way.overwrite:
        raise UsageError(
            "--part and --overwrite: a part adds to what others write", hint="remove the folder before the first"
        )
    if ending is None and source.checkpoint.is_here:
        check_values(source, plan)
    ending = ending or _plain(source, plan)
    for folder in ending.apart:
        check_places(folder, out)
    if not way.overwrite and out.is_dir() and ending.is_done(out):
        way.progress(sum(ending.sizes.values()))
        return _already_done(plan, out, way.disk)
    _check_output(out, plan, ending.marks, way.overwrite)
    fresh = way.overwrite and not journal.is_of(out / STATE_FOLDER, plan)
    if fresh:
        ownership.check(out, ending.marks)
    way = replace(way, window_bytes=_window_size(source, plan, way.window_bytes), cores=way.cores or all_cores())
    _check_room(out, plan, fresh, ending.more_bytes + way.window_bytes, way)
    return Looked(way, ending, fresh)


def run(source: Source, plan: Plan, out: Path, way: Way | None = None, ending: Completion | None = None) -> Outcome:
    """Carry out `plan` into the folder `out`, resuming what an earlier run of it left there.

    Raises `InputError` or `EnvironmentFault`; what was finished stays recorded, and the same call goes on from there,
    with `overwrite` too: what this very plan left unfinished is never thrown away.
    """
    found = look(source, plan, out, way or Way(), ending)
    if isinstance(found, Outcome):
        return found
    lock = _taken(out, found.way)
    try:
        if done := _cleared(plan, out, found):
            return done
        outcome = _locked(source.bytes, plan, out, found.way, found.ending.marks, lock, found.ending)
    finally:
        lock.release()
    with contextlib.suppress(OSError):
        (out / STATE_FOLDER).rmdir()  # still there on a network drive, which keeps the lock's file until it is closed
    return outcome


def _taken(out: Path, way: Way) -> Lock:
    """Return the lock of the folder, which is made where it is missing."""
    state = out / STATE_FOLDER
    with disk_errors("writing", out):
        way.disk.make_folder(out)
        way.disk.make_folder(state)
        return Lock(state, way.part)


def _cleared(plan: Plan, out: Path, found: Looked) -> Outcome | None:
    """Under the lock, remove what is to be replaced; the outcome where another run ended the conversion meanwhile."""
    if not found.way.overwrite and found.ending.is_done(out):
        return _already_done(plan, out, found.way.disk)
    if found.fresh:
        with disk_errors("clearing", out):
            ownership.clear(out, found.way.disk)
    return None


def begin_parts(plan: Plan, out: Path, found: Looked) -> Outcome | None:
    """Make the folder ready for parts of the plan that other processes write with `write_part`."""
    lock, state, disk = _taken(out, found.way), out / STATE_FOLDER, found.way.disk
    try:
        if done := _cleared(plan, out, found):
            return done
        with disk_errors("writing", state):
            if not journal.is_of(state, plan):
                journal.record_plan(disk, state, plan, found.ending.marks)
            disk.remove(state / CLEARING_NAME)
    finally:
        lock.release()
    return None


def write_part(source: ByteSource, plan: Plan, out: Path, way: Way, marks: Marks) -> None:
    """Write the part `way.part` in a folder that `begin_parts` has made ready, perhaps on another machine."""
    lock = Lock(out / STATE_FOLDER, way.part)
    try:
        _locked(source, plan, out, way, marks, lock, None)
    finally:
        lock.release()


def _already_done(plan: Plan, out: Path, disk: Disk) -> Outcome:
    """Remove what is left of the state of a conversion that has ended, and say that it had."""
    with disk_errors("cleaning", out):
        disk.remove(out / STATE_FOLDER)
    return Outcome(plan, out / MANIFEST_NAME, True, True)


def _window_size(source: Source, plan: Plan, most: int) -> int:
    """Return the bytes of the window that a run reads through, 0 where all its files are here."""
    if are_here(source.bytes, (s.name for s in plan.sources)):
        return 0
    return min(most, sum(s.size for s in plan.sources))


def _files(
    run_: file_writer.Run, source: ByteSource, jobs: int, numbers: Sequence[int], lock: Lock, here: bool
) -> file_writer.Result:
    """Write files: in this process, or in several where it could not feed all cores."""
    local = source if here and isinstance(source, LocalFiles) else None
    found = division.divided(run_.plan, run_.cores, len(numbers), local is not None)
    if local is None or not found.apart:
        # Layers have to come in their order where they are rounded against what goes into them.
        one = not here or run_.compensated or run_.cores == 1
        return run_.files(1 if one else jobs, numbers)
    setup = Setup(
        run_.plan, run_.out, local.places, run_.sources.prints.files, run_.finished, run_.disk, run_.importance, jobs,
        1, run_.deposit,
    )  # fmt: skip
    return Feeders(run_, numbers).write(setup, found.workers, lock.for_writers())


def _locked(
    source: ByteSource, plan: Plan, out: Path, way: Way, marks: Marks, lock: Lock, ending: Completion | None
) -> Outcome:
    """Write files under the lock; all of them and, by `ending`, what else the folder has, or those of a part."""
    state, part, disk = out / STATE_FOLDER, lock.part, way.disk
    numbers = range(len(plan.files)) if part is None else parts.files_of(plan, part)
    own = state if part is None else state / part.name
    most = way.window_bytes
    window = PrefetchWindow(source, own, most, max(CONNECTIONS, way.jobs), disk) if most else None
    sources = Sources(source, plan, window)
    try:
        with disk_errors("writing", state):
            if part is not None and (state / PLAN_NAME).exists():
                journal.check_same_plan(state, plan)
            finished = journal.begin(disk, state, plan, sources.prints, marks, part, numbers)
            lock.share()
            disk.remove(state / CLEARING_NAME)
            disk.make_folder(own)
            there = way.deposit.begin(plan, sources.prints)
            finished = journal.Finished(finished.steps | there.steps, finished.files | there.files, finished.begun)
            sources.begin(plan, finished, numbers)
            log = journal.Journal(disk, state, part)
        try:
            resumed = bool(finished.steps or finished.files)
            cores = way.cores or all_cores()
            run_ = file_writer.Run(
                plan, out, sources, disk, log, finished, way.progress, way.importance, cores, deposit=way.deposit
            )
            result = _files(run_, source, way.jobs, numbers, lock, window is None)
            sources.finish()
            run_.leaving.rest()
        except SourceChanged as e:
            log.changed(e.name)
            raise
        except ValueFault as e:
            if window is None:
                raise
            raise EnvironmentFault(
                f"{e}. Unless the repo is damaged, a byte came wrong: run the same command again, it fetches this anew"
            ) from e
        finally:
            log.close()
        if part is not None or ending is None:
            return Outcome(plan, out / MANIFEST_NAME, resumed, False, complete=False)
        with disk_errors("writing", out):
            ending.write(out, result, disk)
        way.deposit.end(out, ending.small, MANIFEST_NAME)
    finally:
        sources.close()
    with disk_errors("writing", out):
        disk.remove(state)
        disk.sync_folder(out)
    return Outcome(plan, out / MANIFEST_NAME, resumed, False)
