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

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ds4convert import assembly, convert, execute, journal, manifest, stored, strictjson
from ds4convert.assembly import Assembly
from ds4convert.convert import Source
from ds4convert.errors import InputError, OutputError
from ds4convert.files import Disk, disk_errors
from ds4convert.folder import CONFIG_NAME, INDEX_NAME, read_small
from ds4convert.graft import Graft
from ds4convert.inventory import Named
from ds4convert.journal import STATE_FOLDER
from ds4convert.manifest import MANIFEST_NAME
from ds4convert.stored import COMMIT_NAME, DRAFTER, NEW_FOLDER
from ds4convert.types import JSON

UNDO_FOLDER, UNDO_NAME = ".ds4convert_undo", "undo.json"
GRAFTED, REMOVED = "graft", "remove"
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Changed:
    """What was done: `resumed` where an earlier run had begun it."""

    written: tuple[str, ...]
    removed: tuple[str, ...]
    resumed: bool


def recover(folder: Path, disk: Disk | None = None) -> str | None:
    """Finish a change that an earlier run had begun to move in; return its kind (graft or remove), None without one."""
    state = folder / STATE_FOLDER
    if state.is_symlink() or not (state / COMMIT_NAME).is_file():
        return None
    disk = disk or Disk()
    lock = journal.Lock(state)
    try:
        return str(_commit(folder, disk)["kind"])
    finally:
        lock.release()


def graft(graft: Graft, jobs: int = 2, overwrite: bool = False, progress: Progress = lambda n: None,
          disk: Disk | None = None) -> Changed:  # fmt: skip
    """Put the head into the folder itself. `overwrite` starts over what an earlier run left with other settings."""
    made, disk = graft.made, disk or Disk()
    if not assembly.can_keep(made.base):
        raise InputError(
            f"{made.base.path}: its files are spelled as another program does it, so they cannot stay as they are; "
            "--out DIR writes the folder anew"
        )
    convert.check_places(graft.source.checkpoint.path, made.base.path)
    old = _small_files(made)
    new = {f.name for f in made.work.files} | set(made.account.texts)
    undo = {} if _reversible(made) else _undo(made, old, new)
    removed = tuple(sorted(n for n in old if n not in new and n != MANIFEST_NAME))
    return _change(made, graft.source, undo, removed, GRAFTED, disk, jobs, overwrite, progress)


def remove(folder: Path, model_source: bytes, disk: Disk | None = None) -> Changed:
    """Take the head out of the folder: it is again what it was before `graft`, or what `--drop-mtp` writes.

    A graft that was not finished is called off. Raises `InputError` where there is no head.
    """
    disk = disk or Disk()
    base = stored.read(folder)
    if not base.has_head:
        if _call_off(folder, disk):
            return Changed((), (), True)
        raise InputError(f"{folder}: has no head; there is nothing to remove")
    source = Source(base.folder.checkpoint, base.inventory, Named({}, ()))
    if (folder / UNDO_FOLDER / UNDO_NAME).exists():
        return _restore(folder, disk)
    if base.record is None or not assembly.can_keep(base):
        raise InputError(f"{folder}: was not written by ds4convert, which does not know what it was without a head")
    made = assembly.without_head(base, model_source)
    kept = {f.name for f in made.account.files}
    gone = {f.name for f in base.files} - kept | (set(_small_files(made)) - set(made.account.texts) - {MANIFEST_NAME})
    removed = (*sorted(gone), *([DRAFTER] if base.folder.drafter else []))
    return _change(made, source, {}, removed, REMOVED, disk)


def _call_off(folder: Path, disk: Disk) -> bool:
    """Remove what an unfinished graft left, where it had not begun to change the folder; return whether it did."""
    state = folder / STATE_FOLDER
    if not (state / NEW_FOLDER).is_dir() or state.is_symlink():
        return False
    lock = journal.Lock(state)
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
        raise OutputError(f"{state}: is a link; remove it")
    return state


def _small_files(made: Assembly) -> dict[str, bytes]:
    """Return the small files that the folder has now and that a change may replace or remove."""
    base = made.base
    names = {CONFIG_NAME, INDEX_NAME, MANIFEST_NAME, *made.account.texts, *stored.model_files()}
    names |= {f"{DRAFTER}/{CONFIG_NAME}", f"{DRAFTER}/{INDEX_NAME}"} if base.folder.drafter else set()
    return {n: read_small(base.path, n) for n in sorted(names) if (base.path / n).is_file()}


def _reversible(made: Assembly) -> bool:
    """Return whether `without_head` of the grafted folder is the folder as it is now, to the byte."""
    base, account = made.base, made.account
    if base.record is None or base.layout is None:
        return False
    model = account.texts.get(base.layout.model_file, b"")
    if account.layout != base.layout.name or account.formats != base.formats or account.sources != base.sources():
        return False
    again = assembly.without_head(base, model)
    heads = {n for s in account.steps if s.part == "mtp" for names in s.sources for n in names}
    told = {x.tensor: x.why for x in account.left_out} | dict.fromkeys(heads, assembly.DROPPED)
    if told != {x.tensor: x.why for x in base.left_out("left_out")}:
        return False
    hashes = {n: base.sha256(f.name) for n, f in enumerate(again.account.files)}
    texts = dict(again.account.texts) | {MANIFEST_NAME: manifest.build(again.account, again.recorded, hashes)}
    return texts == _small_files(again)


def _undo(made: Assembly, old: dict[str, bytes], new: set[str]) -> dict[str, bytes]:
    """Return the files of the undo folder, by name in the folder."""
    table = {
        "restore": sorted(old),
        "remove": sorted(n for n in new if n not in old),
        "sha256": {n: hashlib.sha256(data).hexdigest() for n, data in old.items()},
    }
    out = {f"{UNDO_FOLDER}/files/{n}": data for n, data in old.items()}
    return out | {f"{UNDO_FOLDER}/{UNDO_NAME}": strictjson.pretty(table)}


def _restore(folder: Path, disk: Disk) -> Changed:
    """Put back the small files of the folder before, and remove what came since."""
    where = f"{UNDO_FOLDER}/{UNDO_NAME}"
    table = strictjson.loads(read_small(folder, where), where)
    if not isinstance(table, dict) or not all(isinstance(table.get(k), t) for k, t in _UNDO_KEYS.items()):
        raise InputError(f"{where}: not an undo record that this version of ds4convert reads")
    names, gone = _names(table["restore"], where), _names(table["remove"], where)
    old = {}
    for name in names:
        old[name] = read_small(folder, f"{UNDO_FOLDER}/files/{name}")
        if hashlib.sha256(old[name]).hexdigest() != table["sha256"].get(name):
            raise InputError(f"{UNDO_FOLDER}/files/{name}: altered since it was written; the head cannot be taken out")
    state = _state(folder)
    for name in (*names, *gone):
        _inside(folder, name)
    with disk_errors("writing", state):
        disk.make_folder(state)
        lock = journal.Lock(state)
        try:
            for name, data in old.items():
                path = _inside(folder, f"{STATE_FOLDER}/{NEW_FOLDER}/{name}")
                disk.make_folder(path.parent)
                disk.write_file(path, data)
            folders = sorted({n.partition("/")[0] for n in gone if "/" in n} - {n.partition("/")[0] for n in names})
            removed = [*gone, *folders, UNDO_FOLDER]
            _write_commit(state, _in_order(names), removed, REMOVED, disk)
            _commit(folder, disk)
        finally:
            lock.release()
    return Changed(tuple(names), tuple(removed), False)


_UNDO_KEYS = {"restore": list, "remove": list, "sha256": dict}


def _names(values: list[object], where: str) -> list[str]:
    """Return names of files inside a folder. Raises `InputError` for any that could lead out of it."""
    for v in values:
        parts = PurePosixPath(v).parts if isinstance(v, str) else ()
        if not parts or ".." in parts or parts[0].startswith("/") or parts[0] == STATE_FOLDER:
            raise InputError(f"{where}: {strictjson.show(str(v))} is no name of a file in the folder")
    return [str(v) for v in values]


def _inside(folder: Path, name: str) -> Path:
    """Return the place of a file in the folder. Raises `OutputError` where a link on the way leads elsewhere."""
    at = folder
    for part in PurePosixPath(name).parts[:-1]:
        at /= part
        if at.is_symlink():
            raise OutputError(f"{at}: is a link, expected a folder; remove it")
    return folder / name


def _in_order(names: list[str]) -> list[str]:
    """Return the names in the order in which they are moved in: tensors, then indexes, configs last."""
    rank = {INDEX_NAME: 2, CONFIG_NAME: 3}
    plain = [n for n in names if n != MANIFEST_NAME]
    return sorted(plain, key=lambda n: (0 if n.endswith(".safetensors") else rank.get(n, 1), n))


def _change(
    made: Assembly, source: Source, undo: dict[str, bytes], removed: tuple[str, ...], kind: str, disk: Disk,
    jobs: int = 2, overwrite: bool = False, progress: Progress = lambda n: None,
) -> Changed:  # fmt: skip
    """Make the new files aside, then move them in."""
    folder = made.base.path
    state = _state(folder)
    for name in (*undo, *(f.name for f in made.work.files), *made.account.texts, *removed):
        _inside(folder, name)
    with disk_errors("writing", folder):
        disk.make_folder(state)
        lock = journal.Lock(state)
    try:
        new = state / NEW_FOLDER
        ending = _aside(made, undo, progress)
        outcome = convert.run(source, made.work, new, jobs, overwrite, progress, disk, ending=ending)
        names = [*ending.sizes, *ending.small]
        with disk_errors("writing", folder):
            _write_commit(state, _in_order(names), list(removed), kind, disk)
            _commit(folder, disk)
    finally:
        lock.release()
    return Changed(tuple(f.name for f in made.work.files), removed, outcome.resumed)


def _aside(made: Assembly, undo: dict[str, bytes], progress: Progress) -> convert.Ending:
    """Return the ending of a run whose kept files lie in the folder itself."""
    texts = dict(made.account.texts) | undo

    def write(out: Path, result: execute.Result, disk: Disk) -> None:
        known, hashes = assembly.merged(made, result), assembly.new_hashes(made, result)
        for n in made.kept:
            name = made.account.files[n].name
            recorded = assembly.Seen(made.base.sha256(name), {})
            seen = recorded if made.base.record is not None else assembly.check_kept(made, n, progress)
            assembly.absorb(made, n, seen, known, hashes)
        for name, sha256 in made.account.copies.items():
            stored.checked_small(made.base, name, sha256)
        for name, text in texts.items():
            disk.make_folder((out / name).parent)
            disk.write_file(out / name, text)
        disk.write_file(out / MANIFEST_NAME, manifest.build(made.account, known, hashes))

    return convert.Ending(
        made.account.id, {f.name: f.size for f in made.work.files}, tuple(texts), (), write, 0, made.places
    )


def _write_commit(state: Path, place: list[str], remove: list[str], kind: str, disk: Disk) -> None:
    table = {"kind": kind, "place": place, "remove": remove}
    disk.write_file(state / COMMIT_NAME, strictjson.pretty(table))


def _commit(folder: Path, disk: Disk) -> JSON:
    """Carry out the commit that is written down, from wherever an earlier run had come to; return it."""
    state = folder / STATE_FOLDER
    where = f"{STATE_FOLDER}/{COMMIT_NAME}"
    table = strictjson.loads(read_small(folder, where), where)
    if not isinstance(table, dict) or not all(isinstance(table.get(k), t) for k, t in _COMMIT_KEYS.items()):
        raise InputError(f"{where}: not one that this version of ds4convert wrote; remove {state}")
    place, remove = _names(table["place"], where), _names(table["remove"], where)
    new = state / NEW_FOLDER
    with disk_errors("writing", folder):
        account = new / MANIFEST_NAME
        if account.exists() or any((new / n).exists() for n in place):
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
        if account.exists():
            disk.rename(account, folder / MANIFEST_NAME)
        disk.remove(state / COMMIT_NAME)
        disk.remove(state)
        disk.sync_folder(folder)
    return table


_COMMIT_KEYS = {"kind": str, "place": list, "remove": list}
