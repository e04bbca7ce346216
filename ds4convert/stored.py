"""A converted folder as what a plan is made of: which tensors each module is stored as, and how they came about.

Joins the tensors of a folder with the records of its manifest, where it has one. Refuses folders that are unfinished,
incomplete, or not what their manifest says.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ds4convert import logical, manifest, sidefiles, spelling
from ds4convert.errors import InputError
from ds4convert.folder import (
    CONFIG_NAME,
    INDEX_NAME,
    Checkpoint,
    read_checkpoint,
    read_header,
    read_small,
    resolve_inside,
)
from ds4convert.formats import Encoding, Part, Spec
from ds4convert.formats.codecs import WORD_BITS
from ds4convert.inventory import BACKBONE, HEAD, Inventory, Module, Storage, expand
from ds4convert.journal import PLAN_NAME, STATE_FOLDER
from ds4convert.layouts import Layout, key_of, layouts
from ds4convert.logical import Logical, MlxFolder
from ds4convert.plan import SOURCE_ONLY_KEYS, findings_error
from ds4convert.strictjson import show
from ds4convert.types import JSON, ByteRange, Done, LeftOut, Loss, SourceFile

DRAFTER = "mtp"
NEW_FOLDER, COMMIT_NAME = "new", "commit.json"
"""Below the state folder: where a change of a finished folder is made ready, and what is done when it is."""

UNKNOWN = "unknown"
"""The recipe of a folder whose manifest is missing."""


@dataclass(frozen=True)
class StoredPart:
    """One part of a module: `at` has the bytes of each of its outputs; the rest is what the manifest knows of them."""

    part: Part
    names: tuple[str, ...]
    at: tuple[ByteRange, ...]
    sources: tuple[str, ...]
    source_dtype: str
    done: Done


@dataclass(frozen=True)
class StoredModule:
    """A module as it is stored: its encoding, whose parts are those of `parts` in the same order."""

    module: Module
    encoding: Encoding
    parts: tuple[StoredPart, ...]


@dataclass(frozen=True)
class Stored:
    """A converted folder. `record` is its manifest; `inventory` has the config as the source had it.

    `files` are those of tensors, as `ByteRange.file` counts them: of the folder itself, then (named `mtp/...`) of its
    drafter folder. `hashing` is whether digests are known (or have to be). `respelled` are the files in which another
    program's names or shapes stand for ours.
    """

    path: Path
    folder: MlxFolder
    record: JSON | None
    inventory: Inventory
    modules: tuple[StoredModule, ...]
    files: tuple[SourceFile, ...]
    hashing: bool
    respelled: frozenset[int] = frozenset()

    @property
    def places(self) -> tuple[tuple[Path, str], ...]:
        """Return where each file lies: a folder, and its name in it."""
        return self.folder.view.paths

    def of(self, part: str) -> list[StoredModule]:
        """Return the modules of the backbone or of the head."""
        return [m for m in self.modules if m.module.part == part]

    @property
    def has_head(self) -> bool:
        """Return whether a head is stored."""
        return self.folder.head_kind != "none"

    @property
    def formats(self) -> dict[str, str]:
        """Return the format of each part: as recorded, else the one that most of its matrices have."""
        known = (self.record or {}).get("formats")
        if isinstance(known, dict) and all(isinstance(v, str) for v in known.values()):
            return dict(known)
        wide = [m for m in self.modules if m.module.may_quantize]
        groups = {
            "backbone": [m for m in wide if m.module.part == BACKBONE and not m.module.experts],
            "experts": [m for m in wide if m.module.part == BACKBONE and m.module.experts],
            "mtp": [m for m in wide if m.module.part == HEAD],
        }
        return {k: _commonest(m.encoding.label for m in found) for k, found in groups.items() if found}

    @property
    def layout(self) -> Layout | None:
        """Return the layout that the manifest names, None where it is not known."""
        return layouts().get((self.record or {}).get("layout", ""))

    def sources(self) -> tuple[SourceFile, ...]:
        """Return the source files that the manifest names."""
        listed = (self.record or {}).get("source", {}).get("files", [])
        return tuple(SourceFile(f["name"], f.get("bytes", 0), f.get("header_sha256", "")) for f in listed)

    def left_out(self, key: str) -> tuple[LeftOut, ...]:
        """Return what was left out of the source: tensors (key `left_out`) or files (`files_left_out`)."""
        listed = (self.record or {}).get(key, [])
        return tuple(LeftOut(x.get("tensor") or x.get("file", ""), x.get("why", "")) for x in listed)

    def sha256(self, name: str) -> str | None:
        """Return the recorded sha256 of a file, None where it is not known."""
        return next((f.get("sha256") for f in (self.record or {}).get("files", []) if f["name"] == name), None)


def _commonest(labels: Iterable[str]) -> str:
    return Counter(labels).most_common(1)[0][0]


_DENSE = {BACKBONE: Storage("bf16", "bf16"), HEAD: Storage("bf16", "bf16")}


def read(path: Path, drafter: Path | None = None) -> Stored:
    """Return the converted folder at `path`, whoever wrote it; `drafter` is the folder of its head, if that is apart.

    Raises `InputError` where it is none, unfinished or contradictory.
    """
    if not path.is_dir():
        raise InputError(f"{show(str(path))}: no such folder; expected a converted folder")
    found = _checkpoint(path)
    record = _own_record(path, found)
    state = path / STATE_FOLDER
    if record is None and any((state / n).exists() for n in (PLAN_NAME, COMMIT_NAME)):
        raise InputError(f"{path}: is unfinished; repeat the command that wrote it, then this one")
    theirs = record is None
    checkpoint = spelling.canonical(found) if theirs else found
    if not logical.is_mlx(checkpoint):
        raise InputError(f"{path}: is not a converted folder; convert it first: ds4convert quantize SRC OUT")
    apart = _drafter(path, drafter, theirs)
    folder = logical.read_mlx(path, checkpoint, apart, theirs)
    if folder.findings:
        raise findings_error(folder.findings, f"{path}: config.json and the tensors do not fit; convert it again")
    blocks = {t.layer for t in folder.view.tensors.values() if t.part == HEAD}
    raw = _source_config(folder, len(blocks))
    inventory = expand(replace(folder.config, raw=raw), folder.head_kind, len(blocks), _DENSE)
    below = folder.drafter.files if folder.drafter else ()
    files = (*checkpoint.files, *(replace(f, name=f"{DRAFTER}/{f.name}") for f in below))
    records = None if record is None else {(r["file"], r["name"]): r for r in record["tensors"]}
    modules = tuple(_stored(m, folder.view.tensors[key_of(m)], records, files) for m in inventory.modules)
    hashing = record is None or any(r.get("xxh3_128") for r in record["tensors"])
    respelled = spelling.changed(found, checkpoint)
    return Stored(path, folder, record, inventory, modules, files, hashing, respelled)


def _checkpoint(path: Path) -> Checkpoint:
    """Return the headers of a folder, those of heads that its index leaves out too (some hosts read these)."""
    found = read_checkpoint(path)
    files, heads = list(found.files), list(found.headers)
    for name in sorted(e.name for e in os.scandir(path) if e.name.endswith(".safetensors")):
        if found.has_index and name not in found.file_names:
            file, header = read_header(resolve_inside(path, name), name, len(files))
            if any(t.name.startswith("mtp.") for t in header.tensors):
                files.append(file)
                heads.append(header)
    return replace(found, files=tuple(files), headers=tuple(heads))


def _own_record(path: Path, found: Checkpoint) -> JSON | None:
    """Return the manifest; None without one, or where it came along from another folder: programs copy every JSON."""
    record = manifest.read(path)
    if record is None:
        return None
    manifest.check_facts(record)
    told = {f.get("header_sha256") for f in record["files"]}
    return record if any(f.header_sha256 in told for f in found.files) else None


def _drafter(path: Path, apart: Path | None, theirs: bool) -> Checkpoint | None:
    """Return the headers of the drafter folder in our spelling; None where there is none."""
    below = path / DRAFTER
    if apart is None and not (below / CONFIG_NAME).is_file():
        return None
    found = read_checkpoint(apart or below)
    return spelling.canonical(found) if theirs else found


def _source_config(folder: MlxFolder, stages: int) -> JSON:
    """Return config.json as the source had it: without tables, with the stages that the source states."""
    key = folder.config.family.config_keys["stages"]
    raw = {k: v for k, v in folder.config.raw.items() if k not in SOURCE_ONLY_KEYS}
    if stages and not raw.get(key):
        raw[key] = _drafter_stages(folder, key) or stages
    return raw


def _drafter_stages(folder: MlxFolder, key: str) -> int:
    """Return the stages in the drafter folder's copy of the source's config; 0 where it has none."""
    if folder.drafter is None or folder.drafter.config is None:
        return 0
    text = logical.drafter_config(folder.drafter).get("text_config")
    value = text.get(key) if isinstance(text, dict) else None
    return value if type(value) is int else 0


Records = Mapping[tuple[str, str], JSON]


def _stored(module: Module, found: Logical, records: Records | None, files: Sequence[SourceFile]) -> StoredModule:
    """Return a module with what is known of its tensors."""
    codec = found.codec
    stem = found.name.removesuffix(".weight") if module.is_module else found.name
    if codec is None:
        dtype = (
            found.store.upper() if found.store.upper() in module.store.split(" or ") or module.write else module.store
        )
        specs = [Spec("weight" if module.is_module else "", dtype, found.shape)]
        label, table = dtype.lower(), None
    else:
        *outer, cols = found.shape
        groups = (*outer, cols // codec.group_size)
        specs = [
            Spec("weight", "U32", (*outer, cols * codec.bits // WORD_BITS)),
            Spec("scales", codec.scale_dtype, groups),
            *([Spec("biases", codec.scale_dtype, groups)] if codec.has_biases else []),
        ]
        label, table = codec.name, codec.table()
    ranges = [_whole(at) for at in (found.weight_at, found.scale_at, found.bias_at) if at]
    names = [f"{stem}.{s.suffix}" if s.suffix else stem for s in specs]
    known = [_record(records, n, s, r, files) for n, s, r in zip(names, specs, ranges, strict=True)]
    parts = []
    for rows in _together(known, codec is not None):
        made, first = known[rows[0]], rows[0]
        part = Part(tuple(specs[i] for i in rows), made.get("transform", "copy"), (), made.get("params", {}))
        done = Done(tuple(known[i].get("xxh3_128") for i in rows), _loss(made))
        parts.append(
            StoredPart(part, tuple(names[i] for i in rows), tuple(ranges[i] for i in rows),
                       tuple(known[first].get("sources", ())), made.get("source_dtype", ""), done)
        )  # fmt: skip
    label = known[0].get("format", label)
    return StoredModule(module, Encoding(tuple(p.part for p in parts), table, label), tuple(parts))


def _together(known: Sequence[Mapping[str, Any]], quantized: bool) -> list[list[int]]:
    """Return which outputs were made by one step: those of a rounding one, by its name; the others have one each."""
    transform = known[0].get("transform")
    rounded = transform.startswith("quantize") if isinstance(transform, str) else quantized
    return [[*range(len(known))]] if rounded else [[i] for i in range(len(known))]


def _whole(at: tuple[ByteRange, ...]) -> ByteRange:
    """Return the one range that the slices of a stacked tensor make up."""
    return ByteRange(at[0].file, at[0].offset, sum(r.size for r in at))


def _record(
    records: Records | None, name: str, spec: Spec, at: ByteRange, files: Sequence[SourceFile]
) -> Mapping[str, Any]:
    """Return the manifest's record of a tensor, {} without a manifest. Raises `InputError` where they differ."""
    if records is None:
        return {}
    file = files[at.file].name
    r = records.get((file, name))
    if r is None:
        raise InputError(f"{file}: {name}: the manifest does not record it; convert the folder again")
    if (r["dtype"], r["shape"], r["offset"], r["bytes"]) != (spec.dtype, list(spec.shape), at.offset, at.size):
        raise InputError(f"{file}: {name}: is not what the manifest records; convert the folder again")
    return r


def _loss(record: Mapping[str, Any]) -> Loss | None:
    """Return the recorded error as a `Loss` that gives the same figures."""
    error = record.get("error")
    if not isinstance(error, dict):
        return None
    try:
        return Loss(float(error["relative_square"]), 1.0, float(error["max_abs"]))
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{manifest.MANIFEST_NAME}: {record['name']}: error is not one that we write") from None


def small_files(stored: Stored) -> tuple[dict[str, str], dict[str, bytes], tuple[LeftOut, ...]]:
    """Return (copies by sha256, texts by bytes, files left out): what stays beside tensors, config and index."""
    family = stored.inventory.config.family.name
    if stored.record is None:
        side = sidefiles.survey(stored.path, family)
        ours = {DRAFTER, STATE_FOLDER, *model_files()}
        return dict(side.copies), dict(side.added), tuple(x for x in side.left_out if x.tensor not in ours)
    remade = {"config.json", INDEX_NAME, f"{DRAFTER}/config.json", f"{DRAFTER}/{INDEX_NAME}", *model_files()}
    plain = [f for f in stored.record["files"] if "header_sha256" not in f and f["name"] not in remade]
    if strange := next((f["name"] for f in plain if f["name"] not in sidefiles.CARRIED), None):
        raise InputError(f"{manifest.MANIFEST_NAME}: names {show(strange)}, which no converted folder has")
    texts = {f["name"]: checked_small(stored, f["name"]) for f in plain if "bytes" in f}
    return {f["name"]: f["sha256"] for f in plain if "bytes" not in f}, texts, stored.left_out("files_left_out")


def model_files() -> set[str]:
    """Return the names of the model files that layouts add."""
    return {y.model_file for y in layouts().values() if y.model_file}


def checked_small(stored: Stored, name: str, sha256: str | None = None) -> bytes:
    """Return a small file of the folder. Raises `InputError` when it is not what the manifest records."""
    data = read_small(stored.path, name)
    wanted = sha256 or stored.sha256(name)
    if wanted is not None and hashlib.sha256(data).hexdigest() != wanted:
        raise InputError(f"{name}: altered since it was written; convert the folder again")
    return data
