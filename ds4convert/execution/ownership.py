"""Which files of a folder ds4convert wrote: what `--overwrite` may remove, and nothing else.

Two things tell: the manifest of a finished conversion, and in `.ds4convert/` the plan of an unfinished one. Both name
files and say what marks each of them as ours; neither is believed when it names what no conversion writes, or a file
that is not what it was. Then nothing at all is removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import unicodedata
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds4convert.checkpoint.folder import INDEX_NAME, header_at
from ds4convert.checkpoint.types import DRAFTER
from ds4convert.converted import manifest
from ds4convert.converted.manifest import MANIFEST_NAME, VERIFY_NAME
from ds4convert.errors import Ds4Error, InputError, OutputError
from ds4convert.execution.locking import is_lock
from ds4convert.files import PARTIAL, Disk
from ds4convert.planning.layouts import beside_names, layouts
from ds4convert.planning.side_files import CARRIED
from ds4convert.planning.types import Plan
from ds4convert.storage import strict_json
from ds4convert.storage.local_files import LocalFiles
from ds4convert.storage.records import LENGTH_BYTES
from ds4convert.storage.safe_open import names_in, read_small
from ds4convert.storage.state_folder import CLEARING_NAME, PLAN_NAME, STATE_FOLDER
from ds4convert.words.terminal import show

NAMES = "names"
"""The key of plan.json under which the files of the result stand."""


@dataclass(frozen=True)
class Mark:
    """What a file of ours is known by: bytes and the sha256 of its header (tensors), or its sha256 (small files)."""

    size: int | None = None
    header_sha256: str | None = None
    sha256: str | None = None


Marks = Mapping[str, Mark]
"""The files of a conversion by their name in the folder."""


def marks_of(plan: Plan) -> Marks:
    """Return the files that a conversion of `plan` is made of, but for its manifest."""
    out = {f.name: Mark(f.size, hashlib.sha256(f.header[LENGTH_BYTES:]).hexdigest()) for f in plan.files}
    out |= {n: Mark(sha256=hashlib.sha256(text).hexdigest()) for n, text in plan.texts.items()}
    return out | {n: Mark(sha256=sha256) for n, sha256 in plan.copies.items()}


def as_table(marks: Marks) -> dict[str, list[Any]]:
    """Return marks as JSON."""
    return {n: [m.size, m.header_sha256, m.sha256] for n, m in marks.items()}


def _from_table(table: object) -> Marks:
    """Return the marks in a JSON table; {} where it is none of ours."""
    if not isinstance(table, dict) or not all(isinstance(v, list) and len(v) == 3 for v in table.values()):
        return {}
    marks = {n: Mark(*v) for n, v in table.items()}
    kinds = all(
        type(m.size) in {int, type(None)} and all(type(x) in {str, type(None)} for x in (m.header_sha256, m.sha256))
        for m in marks.values()
    )
    return marks if kinds else {}


def _may_write(name: str) -> bool:
    """Return whether a conversion may write a file of this name."""
    folder, _, file = name.rpartition("/")
    if folder == DRAFTER:
        return file in {"config.json", INDEX_NAME} or _is_shard(file)
    if folder:
        return name in beside_names()
    return (
        _is_shard(name)
        or name in {"config.json", INDEX_NAME, MANIFEST_NAME, VERIFY_NAME}
        or name in CARRIED
        or name in {layout.model_file for layout in layouts().values() if layout.model_file}
    )


def _folders() -> list[str]:
    """Return the folders below a result in which a conversion may write."""
    return sorted({DRAFTER, *(name.rpartition("/")[0] for name in beside_names() if "/" in name)})


def _is_shard(name: str) -> bool:
    return name.startswith("model") and name.endswith(".safetensors") and "/" not in name


def _recorded(out: Path) -> Marks | None:
    """Return the files that the folder's manifest names; None without one that we wrote."""
    try:
        record = manifest.read(out)
        if record is None:
            return None
    except Ds4Error:
        return None
    marks = {f.name: Mark(f.size, f.header_sha256) if f.holds_tensors else Mark(sha256=f.sha256) for f in record.files}
    return marks | {MANIFEST_NAME: Mark(), VERIFY_NAME: Mark()}


def _begun(state: Path) -> Marks | None:
    """Return the files that an unfinished run, or an unfinished clearing, names; None where there is neither."""
    out: dict[str, Mark] | None = None
    if state.is_symlink():
        return None
    for name in (CLEARING_NAME, PLAN_NAME):
        with contextlib.suppress(Ds4Error, OSError):
            table = strict_json.loads(read_small(state, name), name)
            if isinstance(table, dict):
                out = (out or {}) | dict(_from_table(table.get(NAMES)))
    return out


def read(out: Path) -> Marks | None:
    """Return the files of the folder that ds4convert wrote or was writing; None where nothing there is ours."""
    recorded, begun = _recorded(out), _begun(out / STATE_FOLDER)
    if recorded is None and begun is None:
        return None
    marks = dict(begun or {}) | dict(recorded or {})
    return marks if all(map(_may_write, marks)) else None


def ours(out: Path, written: Iterable[str] = ()) -> bool:
    """Return whether `--overwrite` would be granted for the folder as it is, to a run that writes these files."""
    try:
        check(out, written)
    except Ds4Error:
        return False
    return read(out) is not None


def check(out: Path, written: Iterable[str]) -> None:
    """Raise `OutputError` unless all that stands in the way of the files `written` is ours and unaltered.

    Files of the user that are in nobody's way are no hindrance; they stay.
    """
    state = out / STATE_FOLDER
    if state.is_symlink() or (state.exists() and not state.is_dir()):
        raise OutputError(f"{state}: is a link or a file, expected a folder", hint="remove it")
    names, marks = names_in(out), read(out)
    if marks is None:
        if names:
            raise _foreign(out, names, [])
        return
    below = []
    for folder in _folders():
        if (out / folder).is_symlink():
            raise OutputError(f"{out / folder}: is a link, expected a folder", hint="remove it")
        below += [f"{folder}/{n}" for n in names_in(out / folder)]
    wanted = {_one_name(n) for n in (*written, MANIFEST_NAME)}
    found = (n for n in (*names, *below) if n not in marks)
    strange = [n for n in found if _one_name(n) in wanted or _is_shard(n.rpartition("/")[2])]
    strange = [n for n in strange if n.removesuffix(PARTIAL) not in marks]
    strange += [f for f in _folders() if (out / f).is_file() and any(n.startswith(f"{f}/") for n in wanted)]
    altered = [n for n, m in marks.items() if not _is_ours(out, n, m)]
    if strange or altered:
        raise _foreign(out, sorted(strange), sorted(altered))


def _one_name(name: str) -> str:
    """Return a name as APFS and exFAT compare it: without regard to case, and to how accents are written."""
    return unicodedata.normalize("NFC", name).casefold()


def _foreign(out: Path, names: list[str], altered: list[str]) -> OutputError:
    found = [show(n) for n in names] + [f"{show(n)}, altered since" for n in altered]
    shown = "; ".join(found[:5]) + ("; ..." if len(found) > 5 else "")
    return OutputError(
        f"{out}: holds something that ds4convert did not write ({shown}), so nothing there is replaced",
        hint="choose another folder, or move that away",
    )


def _is_ours(out: Path, name: str, mark: Mark) -> bool:
    """Return whether a file of ours is gone, or still what its mark says (damaged data included)."""
    path = out / name
    if path.is_symlink():
        return False
    if not path.exists():
        return True
    if not path.is_file():
        return False
    if mark.header_sha256 is not None:
        return _has_header(path, mark)
    return mark.sha256 is None or hashlib.sha256(_bytes(path)).hexdigest() == mark.sha256


def _bytes(path: Path) -> bytes:
    try:
        return read_small(path.parent, path.name)
    except InputError:
        return b""


def _has_header(path: Path, mark: Mark) -> bool:
    """Return whether a file of tensors has the header that we wrote; one of its very size may have a damaged header."""
    size = path.stat().st_size
    try:
        return header_at(path)[0].header_sha256 == mark.header_sha256
    except InputError:
        return size == mark.size or size == 0 or _starts_alike(path, mark)


def _starts_alike(path: Path, mark: Mark) -> bool:
    """Return whether the header is ours and the data behind it was cut off."""
    with closing(LocalFiles.at(path)) as files:
        size = files.size(path.name)
        length = int.from_bytes(files.read(path.name, 0, min(LENGTH_BYTES, size)), "little")
        if LENGTH_BYTES + length > size:
            return False
        return hashlib.sha256(files.read(path.name, LENGTH_BYTES, length)).hexdigest() == mark.header_sha256


def removable(out: Path) -> list[Path]:
    """Return the files that `clear` removes, partial ones too."""
    marks = read(out)
    paths = [] if marks is None else [out / n for n in {*marks, MANIFEST_NAME} if n in marks or not (out / n).exists()]
    return [p for q in paths for p in (q, q.with_name(q.name + PARTIAL)) if p.is_file() and not p.is_symlink()]


def clear(out: Path, disk: Disk) -> None:
    """Remove the files of ours, after `check`, under the lock of the folder.

    What is ours is written down first, so that a clearing that was broken off can be finished, and stays until the next
    plan is; the manifest goes before the files, so that nothing half there looks whole.
    """
    state, paths = out / STATE_FOLDER, removable(out)
    table = {NAMES: as_table(read(out) or {})}
    disk.write_file(state / CLEARING_NAME, json.dumps(table).encode())
    for entry in sorted(os.scandir(state), key=lambda e: e.name):
        if not is_lock(entry.name) and entry.name != CLEARING_NAME:
            disk.remove(Path(entry.path))
    for path in sorted(paths, key=lambda p: (p.name not in {MANIFEST_NAME, VERIFY_NAME}, p.name)):
        disk.remove(path)
    for folder in (out / name for name in _folders()):
        if folder.is_dir() and not folder.is_symlink() and not any(os.scandir(folder)):
            disk.remove(folder)
    disk.sync_folder(out)
