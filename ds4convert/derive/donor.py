"""A head that is converted already: a drafter folder, or a converted folder with a head, as what `graft` takes it from.

Its tensors keep the format that they have: nothing is rounded again, bytes move under the names of the new layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ds4convert.checkpoint.folder import Checkpoint, is_mlx, read_checkpoint
from ds4convert.checkpoint.inventory import HEAD, Inventory
from ds4convert.checkpoint.types import DRAFTER, JSON, Header
from ds4convert.converted import modules
from ds4convert.converted.folder import MlxFolder, drafter_place, is_drafter
from ds4convert.errors import InputError
from ds4convert.planning.recipes import head_roles
from ds4convert.storage import strict_json
from ds4convert.storage.records import SourceFile

SUFFIXES = ("", ".weight", ".scales", ".biases")


@dataclass(frozen=True)
class Donor:
    """A head to be grafted: its headers as those of a drafter folder, and what is known of it.

    `inventory` has its modules, with the config of its model. `records` is what a manifest tells of its tensors, by the
    names that `headers` has. `backbone` is the folder's own, None of a drafter. `sources` are the files that the head
    came from, and `formats` how its parts are stored, where a manifest tells them.
    """

    path: Path
    headers: Checkpoint
    inventory: Inventory
    records: modules.Records
    backbone: MlxFolder | None
    sources: tuple[SourceFile, ...]
    formats: Mapping[str, str]


def is_one(path: Path) -> bool:
    """Return whether a local folder is converted already: a drafter, or in MLX's spelling."""
    if not path.is_dir():
        return False
    found = read_checkpoint(path, head_alone=True)
    return is_drafter(found) or is_mlx(found)


def read(path: Path) -> Donor:
    """Return the head of the folder at `path`. Raises `InputError` where it has none, or it is not whole."""
    checkpoint = read_checkpoint(path, head_alone=True)
    if is_drafter(checkpoint):
        found = modules.open_head(checkpoint)
        _check(path, found.folder)
        return Donor(path, found.checkpoint, found.inventory, {}, None, (), {})
    whole = modules.read(path)
    folder = whole.folder
    if folder.place is None:
        raise InputError(f"{path}: has no head to graft", hint="name a checkpoint or a folder that has one")
    inventory = replace(whole.inventory, modules=tuple(m for m in whole.inventory.modules if m.part == HEAD))
    told = whole.record
    formats = {k: v for k, v in whole.formats.items() if k == HEAD or k in head_roles()} if told else {}
    known = told.by_place() if told else {}
    if folder.place.folder and folder.drafter is not None:
        below = f"{DRAFTER}/"
        records = {
            (f"{modules.APART}/{f.removeprefix(below)}", n): r for (f, n), r in known.items() if f.startswith(below)
        }
        return Donor(path, folder.drafter, inventory, records, folder, whole.sources(), formats)
    headers, names = _as_drafter(folder, inventory)
    records = {
        (f"{modules.APART}/{headers.file_names[t.file]}", t.name): replace(known[key], name=t.name)
        for t in headers.tensors()
        if (key := (headers.file_names[t.file], names[t.name])) in known
    }
    return Donor(path, headers, inventory, records, folder, whole.sources(), formats)


def _check(path: Path, folder: MlxFolder) -> None:
    if folder.place is None:
        raise InputError(f"{path}: its tensors are no head that is known", hint="name the checkpoint with the head")
    if folder.findings:
        raise InputError(f"{path}: the head is not whole: {folder.findings[0]} ({len(folder.findings)} such)")


def _as_drafter(folder: MlxFolder, inventory: Inventory) -> tuple[Checkpoint, dict[str, str]]:
    """Return the head that lies in a folder itself as the headers of a drafter folder, and its own names by theirs."""
    assert folder.place is not None
    here = folder.place
    there = drafter_place(folder.config.family, inventory.head_kind) or here
    own = {t.name: t for t in folder.checkpoint.tensors()}
    table: JSON = {}
    tensors, names = [], {}
    for module in inventory.modules:
        for suffix in SUFFIXES:
            info = own.get(here.name(module) + suffix)
            if info is not None:
                name = there.name(module) + suffix
                names[name] = info.name
                tensors.append(replace(info, name=name))
        listed = (folder.table.get(n) for n in here.table_names(module))
        if entry := next((e for e in listed if isinstance(e, dict)), None):
            table[there.table_names(module)[0]] = entry
    config = strict_json.pretty({"quantization": table, "text_config": dict(inventory.config.raw)})
    return replace(folder.checkpoint, headers=(Header(tuple(tensors), {}, 0),), config=config), names
