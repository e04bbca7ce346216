"""From a source folder to a finished MLX folder: the order in which the stages run, and the guards around them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ds4convert import config as configs
from ds4convert import execute, journal, logical, manifest
from ds4convert import origin as origins
from ds4convert import plan as plans
from ds4convert.errors import EnvironmentFault, InputError, OutputError, ValueFault
from ds4convert.files import PARTIAL, Disk, disk_errors, free_bytes
from ds4convert.folder import Checkpoint, need_config, read_checkpoint, read_small
from ds4convert.formats.quantize import Importance, no_importance
from ds4convert.formats.transforms import Read
from ds4convert.inventory import Inventory, Named, name_tensors, recognise
from ds4convert.journal import STATE_FOLDER, Finished
from ds4convert.layouts import layouts
from ds4convert.manifest import MANIFEST_NAME, VERIFY_NAME
from ds4convert.sidefiles import CARRIED, survey
from ds4convert.types import Origin, Plan
from ds4convert.window import Ranges, Remote, Window

WINDOW_BYTES = 8 * 10**9
"""Most bytes of a source elsewhere that lie on the disk at once."""

CONNECTIONS = 8
MARGIN_BYTES = 16 << 20
"""Room for folders, the journal and the manifest beside the planned bytes."""


@dataclass(frozen=True)
class Source:
    """A checkpoint whose config and headers have been read: what is expected, what was found.

    `remote`: its files are somewhere else, and its folder holds the small ones alone.
    """

    checkpoint: Checkpoint
    inventory: Inventory
    named: Named
    origin: Origin | None = None
    remote: Remote | None = None


@dataclass(frozen=True)
class Outcome:
    """What a conversion did. `resumed`: an earlier run had finished some of it; `already_done`: all of it."""

    plan: Plan
    manifest: Path
    resumed: bool
    already_done: bool


@dataclass(frozen=True)
class Ending:
    """What a run does when the files of its plan are written, and how its finished result is told.

    `id` is the plan in the manifest, `sizes` and `small` the files of the result by name (those of tensors with their
    sizes), `apart` the folders that the output folder may not overlap, `more_bytes` what `write` needs beside the
    plan. `places` is where the plan's source files lie (a folder, a name in it), if not in the source's folder. `write`
    puts small files and the manifest, last, into the folder.
    """

    id: str
    sizes: Mapping[str, int]
    small: tuple[str, ...]
    apart: tuple[Path, ...]
    write: Callable[[Path, execute.Result, Disk], None]
    more_bytes: int = 0
    places: tuple[tuple[Path, str], ...] = ()


def _plain_ending(source: Source, plan: Plan) -> Ending:
    """Return the ending of a conversion: the small files of the plan, then the manifest."""
    folder = source.checkpoint.path

    def write(out: Path, result: execute.Result, disk: Disk) -> None:
        for name in plan.copies:
            disk.write_file(out / name, read_small(folder, name))
        for name, text in plan.texts.items():
            disk.write_file(out / name, text)
        disk.write_file(out / MANIFEST_NAME, manifest.build(plan, result.steps, result.hashes))

    sizes = {f.name: f.size for f in plan.files}
    return Ending(plan.id, sizes, (*plan.texts, *plan.copies), (folder,), write)


def open_source(path: Path) -> Source:
    """Return the source checkpoint at `path`, read and recognised, not yet compared with what its config implies."""
    if path.is_file():
        raise InputError(f"{path}: a single file cannot be converted; name the checkpoint folder")
    checkpoint = read_checkpoint(path)
    if logical.is_mlx(checkpoint):
        raise InputError(
            f"{path}: is a converted folder, its values may be rounded already; convert the official checkpoint, or "
            "say --from-mlx to convert this one again"
        )
    return recognised(checkpoint, origins.of(checkpoint))


def recognised(checkpoint: Checkpoint, origin: Origin | None = None, remote: Remote | None = None) -> Source:
    """Return a checkpoint whose headers have been read as a source: official names, kind of head, storage."""
    config = configs.parse_config(need_config(checkpoint))
    named = name_tensors(config.family, checkpoint.tensors())
    return Source(checkpoint, recognise(config, named.tensors), named, origin, remote)


@contextmanager
def reading(source: Source) -> Iterator[Read]:
    """Yield what reads byte ranges of the source's files; those elsewhere are fetched one by one."""
    if source.remote is not None:
        yield Ranges(source.remote, source.checkpoint.file_names).read
        return
    files = execute.Sources.of(source.checkpoint.path, source.checkpoint.files)
    try:
        yield files.read
    finally:
        files.close()


def make_plan(source: Source, options: plans.Options) -> Plan:
    """Return the plan for converting `source`. Raises `InputError` with every difference found."""
    side = survey(source.checkpoint.path, source.inventory.config.family.name)
    made = plans.build(source.inventory, source.named, source.checkpoint.files, options, side)
    return replace(made, origin=source.origin)


def check_places(source: Path, out: Path) -> None:
    """Raise `OutputError` when one of the two folders lies in the other."""
    a, b = Path(os.path.realpath(source)), Path(os.path.realpath(out))
    if b.is_relative_to(a) or a.is_relative_to(b):
        raise OutputError(f"{out}: source and output folder may not lie in each other; choose another output folder")
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out}: is a file, expected a folder or nothing")


def _ours(name: str) -> bool:
    """Return whether a conversion may have written the top-level entry `name`."""
    plain = name.removesuffix(PARTIAL)
    fixed = {
        "config.json",
        plans.INDEX_NAME,
        MANIFEST_NAME,
        VERIFY_NAME,
        STATE_FOLDER,
        "mtp",
    } | CARRIED
    fixed |= {layout.model_file for layout in layouts().values() if layout.model_file}
    return plain in fixed or (plain.startswith("model") and plain.endswith(".safetensors"))


def is_done(out: Path, ending: Ending) -> bool:
    """Return whether the folder holds the finished result, by manifest and file sizes."""
    with contextlib.suppress(InputError):
        found = manifest.read(out)
        return (
            found is not None
            and found["plan"] == ending.id
            and all((out / n).is_file() and (out / n).stat().st_size == size for n, size in ending.sizes.items())
            and all((out / n).is_file() for n in ending.small)
        )
    return False


def _clear(out: Path, disk: Disk) -> None:
    """Remove what a conversion writes, and nothing else; its state (but for our lock) and the manifest go first."""
    for path in sorted((out / STATE_FOLDER).iterdir()):
        if path.name != journal.LOCK_NAME:
            disk.remove(path)
    for entry in sorted(os.scandir(out), key=lambda e: e.name != MANIFEST_NAME):
        if _ours(entry.name) and entry.name != STATE_FOLDER:
            disk.remove(Path(entry.path))


def _check_output(out: Path, plan: Plan, overwrite: bool) -> None:
    """Raise `OutputError` when the folder holds what is neither this plan's unfinished run nor empty."""
    if overwrite or not out.exists():
        return
    state = out / STATE_FOLDER
    if state.is_symlink():
        raise OutputError(f"{state}: is a link; remove it")
    if state.is_dir():
        journal.check_same_plan(state, plan)
        return
    names = sorted(e.name for e in os.scandir(out) if not e.name.startswith("."))
    if names:
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        raise OutputError(f"{out}: is not empty (it holds {shown}); choose another folder, or add --overwrite")


def _check_room(out: Path, plan: Plan, fresh: bool, more_bytes: int) -> None:
    """Raise `EnvironmentFault` when the disk cannot hold what is still to be written.

    `fresh`: what an earlier conversion left in the folder will be removed, so its room counts as free.
    """
    need = plans.output_bytes(plan) + more_bytes + MARGIN_BYTES
    for f in plan.files:
        for path in (out / f.name, out / (f.name + PARTIAL)):
            if path.is_file() and not fresh:
                need -= min(path.stat().st_blocks * 512, f.size)
    free = free_bytes(out) + (_removable_bytes(out) if fresh else 0)
    if need > free:
        raise EnvironmentFault(
            f"{out}: the result needs {need:,} more bytes, but this disk has {free:,} free; "
            f"free {need - free:,} bytes, or choose a folder on another disk. Nothing was written"
        )


def _removable_bytes(out: Path) -> int:
    """Return the bytes that `_clear` frees: of files without a second name elsewhere."""
    tops = [Path(e.path) for e in os.scandir(out) if _ours(e.name)] if out.is_dir() else []
    paths = [p for top in tops for p in ([*top.rglob("*")] if top.is_dir() and not top.is_symlink() else [top])]
    sizes = [p.lstat() for p in paths]
    return sum(s.st_blocks * 512 for s in sizes if s.st_nlink == 1)


def run(
    source: Source,
    plan: Plan,
    out: Path,
    jobs: int = 2,
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda n: None,
    disk: Disk | None = None,
    importance: Importance = no_importance,
    ending: Ending | None = None,
    window_bytes: int = WINDOW_BYTES,
) -> Outcome:
    """Carry out `plan` into the folder `out`, resuming what an earlier run of it left there.

    `progress` is called with numbers of bytes as they are written or found finished; `importance` is that of the
    calibration that the plan was made with. A source that is somewhere else is read through a window of at most
    `window_bytes` on the disk, and one file is written at a time. Raises `InputError` or
    `EnvironmentFault`; what was finished stays recorded, and the same call goes on from there, with `overwrite` too:
    what this very plan left unfinished is never thrown away.
    """
    disk = disk or Disk()
    ending = ending or _plain_ending(source, plan)
    for folder in ending.apart:
        check_places(folder, out)
    if not overwrite and out.is_dir() and is_done(out, ending):
        with disk_errors("cleaning", out):
            disk.remove(out / STATE_FOLDER)
        progress(sum(ending.sizes.values()))
        return Outcome(plan, out / MANIFEST_NAME, True, True)
    _check_output(out, plan, overwrite)
    state = out / STATE_FOLDER
    fresh = overwrite and not journal.is_of(state, plan)
    window_bytes = min(window_bytes, sum(s.size for s in plan.sources)) if source.remote else 0
    _check_room(out, plan, fresh, ending.more_bytes + window_bytes)
    with disk_errors("writing", out):
        disk.make_folder(out)
        if fresh and (state.is_symlink() or state.is_file()):
            disk.remove(state)
        disk.make_folder(state)
        lock = journal.Lock(state)
    try:
        if fresh:
            with disk_errors("clearing", out):
                _clear(out, disk)
        return _locked(source, plan, out, jobs, progress, disk, importance, ending, window_bytes)
    finally:
        lock.release()


def _window(
    source: Source, plan: Plan, places: Sequence[tuple[Path, str]], state: Path, limit: int, jobs: int, disk: Disk
) -> Window | None:
    """Return the window of the source's files among those of the plan; None where all are here."""
    if source.remote is None:
        return None
    files = [n for n, (folder, _) in enumerate(places) if folder == source.remote.path]
    return Window(source.remote, plan.sources, files, state, limit, max(CONNECTIONS, jobs), disk) if files else None


def _locked(
    source: Source, plan: Plan, out: Path, jobs: int, progress: Callable[[int], None], disk: Disk,
    importance: Importance, ending: Ending, window_bytes: int,
) -> Outcome:  # fmt: skip
    state = out / STATE_FOLDER
    places = ending.places or tuple((source.checkpoint.path, s.name) for s in plan.sources)
    window = _window(source, plan, places, state, window_bytes, jobs, disk)
    sources = execute.Sources(places, plan.sources, window)
    try:
        with disk_errors("writing", state):
            finished = journal.begin(disk, state, plan, sources.prints)
            sources.begin(plan, finished)
            log = journal.Journal(disk, state)
        try:
            resumed = bool(finished.steps or finished.files)
            run_ = execute.Run(plan, out, sources, disk, log, finished, progress, importance)
            result = run_.files(1 if window else jobs)
            sources.finish()
        except ValueFault as e:
            if window is None:
                raise
            raise EnvironmentFault(
                f"{e}. Unless the repo is damaged, a byte came wrong: run the same command again, it fetches this anew"
            ) from e
        finally:
            log.close()
        with disk_errors("writing", out):
            ending.write(out, result, disk)
            disk.remove(out / STATE_FOLDER)
            disk.sync_folder(out)
    finally:
        sources.close()
    return Outcome(plan, out / MANIFEST_NAME, resumed, False)


__all__ = ["Ending", "Finished", "Outcome", "Source", "check_places", "make_plan", "open_source", "run"]
