"""A change of a finished folder in its own place: new files are made aside, then moved in; and the way back.

    1. `.ds4convert/new/` is filled like an output folder of its own. The folder itself is untouched: killed here, it
       is the old folder.
    2. `.ds4convert/commit.json` says what is moved and what is removed. From here on the change goes forward.
    3. The old manifest is removed: the folder is unfinished, and `verify` says so.
    4. Files are moved in by rename, tensors first, config last; what is no longer of the folder is removed.
    5. The new manifest is moved in, and the state is removed.

Each step may be repeated, so a later run finishes what an earlier one began. Where the folder before cannot be told
from the folder after (another program wrote it), its small files are kept in `.ds4convert_undo/`.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from ds4convert.checkpoint.folder import CONFIG_NAME, INDEX_NAME
from ds4convert.checkpoint.inventory import HEAD
from ds4convert.checkpoint.names import Named
from ds4convert.checkpoint.source import Source
from ds4convert.checkpoint.types import DRAFTER
from ds4convert.converted import manifest, modules
from ds4convert.converted.manifest import MANIFEST_NAME
from ds4convert.converted.modules import COMMIT_NAME, NEW_FOLDER
from ds4convert.derive import derivation
from ds4convert.derive.derivation import Derivation
from ds4convert.derive.graft import Graft
from ds4convert.derive.plan_builder import can_keep
from ds4convert.errors import InputError, OutputError
from ds4convert.execution import file_writer, journal, run
from ds4convert.execution.completion import Aside
from ds4convert.execution.locking import Lock, is_lock
from ds4convert.files import Disk, disk_errors
from ds4convert.planning.layouts import beside_names, layout_for
from ds4convert.storage import strict_json
from ds4convert.storage.safe_open import names_in, read_small
from ds4convert.storage.state_folder import STATE_FOLDER
from ds4convert.storage.untrusted.fields import Fields

UNDO_FOLDER, UNDO_NAME = ".ds4convert_undo", "undo.json"
GRAFTED, REMOVED = "graft", "remove"
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Undo:
    """What takes a change back: small files to put back, with their sha256, and files to remove. Named as on disk."""

    restore: tuple[str, ...]
    remove: tuple[str, ...]
    sha256: Mapping[str, str]

    @classmethod
    def read(cls, f: Fields) -> Undo:
        """Return the record in a document. Raises `InputError` for the first field that is not as it has to be."""
        return cls(f.texts("restore"), f.texts("remove"), f.text_by_name("sha256"))


@dataclass(frozen=True)
class Commit:
    """What a change does once it is ready: files to move in, in this order, and files to remove. Named as on disk."""

    kind: str
    place: tuple[str, ...]
    remove: tuple[str, ...]

    @classmethod
    def read(cls, f: Fields) -> Commit:
        """Return the record in a document. Raises `InputError` for the first field that is not as it has to be."""
        return cls(f.text("kind"), f.texts("place"), f.texts("remove"))


@dataclass(frozen=True)
class Changed:
    """What was done: `resumed` where an earlier run had begun it."""

    written: tuple[str, ...]
    removed: tuple[str, ...]
    resumed: bool


def recover(folder: Path, disk: Disk | None = None) -> str | None:
    """Finish a change that an earlier run had begun to move in; return its kind (graft or remove), None without one.

    What a run left that ended before it had begun, or after all was done, is removed.
    """
    state = folder / STATE_FOLDER
    if state.is_symlink() or not state.is_dir():
        return None
    begun = (state / COMMIT_NAME).is_file()
    if not begun and not all(map(is_lock, names_in(state))):
        return None
    disk = disk or Disk()
    with disk_errors("writing", folder):
        lock = Lock(state)
    try:
        if (state / COMMIT_NAME).is_file():
            return _commit(folder, disk).kind
        with disk_errors("cleaning", state):
            disk.remove(state)
        return None
    finally:
        lock.release()


def graft(graft: Graft, jobs: int = 2, overwrite: bool = False, progress: Progress = lambda n: None,
          disk: Disk | None = None) -> Changed:  # fmt: skip
    """Put the head into the folder itself. `overwrite` starts over what an earlier run left with other settings."""
    made, disk = graft.made, disk or Disk()
    layout = layout_for(made.result_plan.layout, made.result_plan.family)
    if not can_keep(made.base, layout):
        raise InputError(
            f"{made.base.path}: its files are spelled as another program or layout does it, so they cannot stay "
            "as they are; --out DIR writes the folder anew"
        )
    run.check_places(graft.source.checkpoint.path, made.base.path)
    old = _small_files(made)
    new = {f.name for f in made.write_plan.files} | set(made.result_plan.texts)
    undo = {} if _reversible(made) else _undo(made, old, new)
    removed = tuple(sorted(n for n in old if n not in new and n != MANIFEST_NAME))
    return _change(made, graft.source, undo, removed, GRAFTED, run.Way(jobs, overwrite, progress, disk))


def remove(folder: Path, model_source: bytes, disk: Disk | None = None) -> Changed:
    """Take the head out of the folder: it is again what it was before `graft`, or what `--drop-mtp` writes.

    A graft that was not finished is called off. Without a head there is nothing to do: another run may have ended just
    when it was out, so that is no error.
    """
    disk = disk or Disk()
    base = modules.read(folder)
    if not base.has_head:
        return Changed((), (), _call_off(folder, disk))
    source = Source(base.folder.checkpoint, base.inventory, Named({}, ()))
    if (folder / UNDO_FOLDER / UNDO_NAME).exists():
        return _restore(folder, disk)
    if base.record is None or not can_keep(base, derivation.layout_of_stored(base)):
        raise InputError(f"{folder}: was not written by ds4convert, which does not know what it was without a head")
    made = derivation.without_head(base, model_source)
    kept = {f.name for f in made.result_plan.files}
    small = set(_small_files(made)) - set(made.result_plan.texts) - {MANIFEST_NAME}
    gone = {f.name for f in base.files} - kept | small
    removed = (*sorted(gone), *([DRAFTER] if base.folder.drafter else []), *_emptied(folder, gone))
    return _change(made, source, {}, removed, REMOVED, run.Way(disk=disk))


def _call_off(folder: Path, disk: Disk) -> bool:
    """Remove what an unfinished graft left, where it had not begun to change the folder; return whether it did."""
    state = folder / STATE_FOLDER
    if not (state / NEW_FOLDER).is_dir() or state.is_symlink():
        return False
    lock = Lock(state)
    try:
        with disk_errors("cleaning", state):
            disk.remove(state)
            disk.sync_folder(folder)
    finally:
        lock.release()
    return True


def _state(folder: Path) -> Path:
    """Return the state folder. Raises `OutputError` where it is a link."""
    state = folder / STATE_FOLDER
    if state.is_symlink():
        raise OutputError(f"{state}: is a link", hint="remove it")
    return state


def _small_files(made: Derivation) -> dict[str, bytes]:
    """Return the small files that the folder has now and that a change may replace or remove."""
    base = made.base
    names = {CONFIG_NAME, INDEX_NAME, MANIFEST_NAME, *made.result_plan.texts, *modules.model_files()}
    names |= {f"{DRAFTER}/{CONFIG_NAME}", f"{DRAFTER}/{INDEX_NAME}"} if base.folder.drafter else set()
    names |= {n for n in beside_names() if base.record is not None and base.record.file(n) is not None}
    return {n: read_small(base.path, n) for n in sorted(names) if (base.path / n).is_file()}


def _reversible(made: Derivation) -> bool:
    """Return whether `without_head` of the grafted folder is the folder as it is now, to the byte."""
    base, result = made.base, made.result_plan
    if base.record is None or base.layout is None:
        return False
    model = result.texts.get(base.layout.model_file, b"")
    if result.layout != base.layout.name or result.formats != base.formats or result.sources != base.sources():
        return False
    if any(base.record.file(n) is None and (base.path / n).exists() for n in result.texts):
        return False  # a file of the user's that is in the way has to come back
    again = derivation.without_head(base, model)
    heads = {n for s in result.steps if s.part == HEAD for names in s.sources for n in names}
    told = {x.tensor: x.why for x in result.left_out} | dict.fromkeys(heads, derivation.DROPPED)
    if told != {x.tensor: x.why for x in base.left_out}:
        return False
    hashes = {n: base.sha256(f.name) for n, f in enumerate(again.result_plan.files)}
    texts = dict(again.result_plan.texts) | {MANIFEST_NAME: manifest.build(again.result_plan, again.recorded, hashes)}
    return texts == _small_files(again)


def _undo(made: Derivation, old: dict[str, bytes], new: set[str]) -> dict[str, bytes]:
    """Return the files of the undo folder, by name in the folder."""
    digests = {n: hashlib.sha256(data).hexdigest() for n, data in old.items()}
    undo = Undo(tuple(sorted(old)), tuple(sorted(n for n in new if n not in old)), digests)
    out = {f"{UNDO_FOLDER}/files/{n}": data for n, data in old.items()}
    return out | {f"{UNDO_FOLDER}/{UNDO_NAME}": strict_json.pretty(dataclasses.asdict(undo))}


def _restore(folder: Path, disk: Disk) -> Changed:
    """Put back the small files of the folder before, and remove what came since."""
    where = f"{UNDO_FOLDER}/{UNDO_NAME}"
    undo = Undo.read(Fields.of(strict_json.loads(read_small(folder, where), where), where, _UNREADABLE))
    names, gone = _names(undo.restore, where), _names(undo.remove, where)
    old = {}
    for name in names:
        old[name] = read_small(folder, f"{UNDO_FOLDER}/files/{name}")
        if hashlib.sha256(old[name]).hexdigest() != undo.sha256.get(name):
            raise InputError(f"{UNDO_FOLDER}/files/{name}: altered since it was written; the head cannot be taken out")
    state = _state(folder)
    for name in (*names, *gone):
        _inside(folder, name)
    with disk_errors("writing", state):
        disk.make_folder(state)
        lock = Lock(state)
        try:
            for name, data in old.items():
                path = _inside(folder, f"{STATE_FOLDER}/{NEW_FOLDER}/{name}")
                disk.make_folder(path.parent)
                disk.write_file(path, data)
            folders = sorted({n.partition("/")[0] for n in gone if "/" in n} - {n.partition("/")[0] for n in names})
            removed = [*gone, *(f for f in folders if f == DRAFTER or f in _emptied(folder, gone)), UNDO_FOLDER]
            _write_commit(state, _in_order(names), removed, REMOVED, disk)
            _commit(folder, disk)
        finally:
            lock.release()
    return Changed(tuple(names), tuple(removed), False)


def _emptied(folder: Path, removed: Iterable[str]) -> list[str]:
    """Return the folders below, but for the drafter's, that hold nothing but files that are to be removed."""
    gone = set(removed)
    parents = sorted({n.rpartition("/")[0] for n in gone if "/" in n} - {DRAFTER})
    here = [p for p in parents if (folder / p).is_dir()]
    return [p for p in here if {f"{p}/{n.name}" for n in (folder / p).iterdir()} <= gone]


_UNREADABLE = "without it the head cannot be taken out; take the backbone anew from where it came"


def _names(values: Sequence[str], where: str) -> list[str]:
    """Return names of files inside a folder. Raises `InputError` for any that could lead out of it."""
    for v in values:
        parts = PurePosixPath(v).parts
        if not parts or ".." in parts or parts[0].startswith("/") or parts[0] == STATE_FOLDER:
            raise InputError(f"{where}: {v!r} is no name of a file in the folder")
    return list(values)


def _inside(folder: Path, name: str) -> Path:
    """Return the place of a file in the folder. Raises `OutputError` where a link on the way leads elsewhere."""
    at = folder
    for part in PurePosixPath(name).parts[:-1]:
        at /= part
        if at.is_symlink():
            raise OutputError(f"{at}: is a link, expected a folder", hint="remove it")
    return folder / name


def _in_order(names: list[str]) -> list[str]:
    """Return the names in the order in which they are moved in: tensors, then indexes, configs last."""
    rank = {INDEX_NAME: 2, CONFIG_NAME: 3}
    plain = [n for n in names if n != MANIFEST_NAME]
    return sorted(plain, key=lambda n: (0 if n.endswith(".safetensors") else rank.get(n, 1), n))


def _change(
    made: Derivation, source: Source, undo: dict[str, bytes], removed: tuple[str, ...], kind: str, way: run.Way
) -> Changed:
    """Make the new files aside, then move them in."""
    folder, disk = made.base.path, way.disk
    state = _state(folder)
    for name in (*undo, *(f.name for f in made.write_plan.files), *made.result_plan.texts, *removed):
        _inside(folder, name)
    with disk_errors("writing", folder):
        disk.make_folder(state)
        lock = Lock(state)
    try:
        new = state / NEW_FOLDER
        ending = _aside(made, undo, way.progress)
        if way.overwrite and new.is_dir() and not journal.is_of(new / STATE_FOLDER, made.write_plan):
            with disk_errors("clearing", new):
                disk.remove(new)  # all in it is of an earlier run
        outcome = run.run(source.reading(made.bytes), made.write_plan, new, way, ending)
        names = [*ending.sizes, *ending.small]
        with disk_errors("writing", folder):
            _write_commit(state, _in_order(names), list(removed), kind, disk)
            _commit(folder, disk)
    finally:
        lock.release()
    return Changed(tuple(f.name for f in made.write_plan.files), removed, outcome.resumed)


def _aside(made: Derivation, undo: dict[str, bytes], progress: Progress) -> Aside:
    """Return how a run ends whose kept files lie in the folder itself."""

    def account(out: Path, written: file_writer.Result, disk: Disk) -> file_writer.Result:
        known, hashes = derivation.step_results(made, written), derivation.new_hashes(made, written)
        for n in made.kept:
            recorded = derivation.FileDigests(made.base.sha256(made.result_plan.files[n].name), {})
            with closing(made.base.bytes) as files:
                is_known = made.base.record is not None
                seen = recorded if is_known else derivation.check_kept(made, n, files, progress)
            derivation.fill_in(made, n, seen, known, hashes)
        return file_writer.Result(known, hashes)

    carried = partial(modules.checked_small, made.base)
    sizes = {f.name: f.size for f in made.write_plan.files}
    return Aside(made.result_plan, carried, account=account, written=sizes, extra=undo)


def _write_commit(state: Path, place: list[str], remove: list[str], kind: str, disk: Disk) -> None:
    made = Commit(kind, tuple(place), tuple(remove))
    disk.write_file(state / COMMIT_NAME, strict_json.pretty(dataclasses.asdict(made)))


def _commit(folder: Path, disk: Disk) -> Commit:
    """Carry out the commit that is written down, from wherever an earlier run had come to; return it."""
    state = folder / STATE_FOLDER
    where = f"{STATE_FOLDER}/{COMMIT_NAME}"
    table = strict_json.loads(read_small(folder, where), where)
    begun = Commit.read(Fields.of(table, where, f"it is none that ds4convert wrote: remove {state}"))
    place, remove = _names(begun.place, where), _names(begun.remove, where)
    new = state / NEW_FOLDER
    with disk_errors("writing", folder):
        manifest_file = new / MANIFEST_NAME
        if manifest_file.exists() or any((new / n).exists() for n in place):
            disk.remove(folder / MANIFEST_NAME)
            disk.sync_folder(folder)
        for name in place:
            source = _inside(folder, f"{STATE_FOLDER}/{NEW_FOLDER}/{name}")
            if source.exists():
                target = _inside(folder, name)
                disk.make_folder(target.parent)
                disk.rename(source, target)
        for name in remove:
            disk.remove(_inside(folder, name))
        disk.sync_folder(folder)
        if manifest_file.exists():
            disk.rename(manifest_file, folder / MANIFEST_NAME)
        _tidy(folder, disk)
    return begun


def _tidy(folder: Path, disk: Disk) -> None:
    """Remove the state of a commit that is carried out: the commit itself only when nothing else is to do."""
    state = folder / STATE_FOLDER
    for name in sorted(p.name for p in state.iterdir() if not is_lock(p.name) and p.name != COMMIT_NAME):
        disk.remove(state / name)
    disk.sync_folder(state)
    disk.sync_folder(folder)
    disk.remove(state / COMMIT_NAME)
    disk.remove(state)
