"""A converted folder as what a plan is made of: which tensors each module is stored as, and how they came about.

Joins the tensors of a folder with the records of its manifest, where it has one. Refuses folders that are unfinished,
incomplete, or not what their manifest says.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from ds4convert.checkpoint.families import keys
from ds4convert.checkpoint.family import expert_stems
from ds4convert.checkpoint.folder import CONFIG_NAME, INDEX_NAME, Checkpoint, is_mlx, read_checkpoint, read_header
from ds4convert.checkpoint.inventory import BACKBONE, HEAD, Inventory, Module, Storage, expand, key_of
from ds4convert.checkpoint.published.findings import findings_error
from ds4convert.checkpoint.tensors import LogicalTensor, TensorView
from ds4convert.checkpoint.types import DRAFTER, JSON, LeftOut, Provenance
from ds4convert.converted import manifest
from ds4convert.converted import names as spelling
from ds4convert.converted.folder import MlxFolder, drafter_config, is_drafter, read_drafter, read_mlx
from ds4convert.converted.records import Manifest, TensorRecord
from ds4convert.errors import InputError
from ds4convert.formats.codecs import WORD_BITS
from ds4convert.planning import build, side_files
from ds4convert.planning.config_files import source_only_keys
from ds4convert.planning.encodings import Encoding, Part, Spec, as_packed
from ds4convert.planning.layouts import Layout, beside_names, head_stems_inside, layouts
from ds4convert.planning.types import Done, Loss, RoundingError
from ds4convert.storage.byte_source import ByteSource
from ds4convert.storage.local_files import LocalFiles
from ds4convert.storage.records import ByteRange, SourceFile
from ds4convert.storage.safe_open import read_small, safetensors_in
from ds4convert.storage.state_folder import PLAN_NAME, STATE_FOLDER
from ds4convert.words.terminal import show

APART = "HEAD_DIR"
"""What the folder of a head is called in an account, where it is another one than that of the backbone."""

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
class ConvertedModules:
    """A converted folder. `record` is its manifest; `inventory` has the config as the source had it.

    `files` are those of tensors, as `ByteRange.file` counts them: of the folder itself, then (named `mtp/...`) of its
    drafter folder. `hashing` is whether digests are known (or have to be). `respelled` are the files in which another
    program's names or shapes stand for ours. `config_sha256` is that of config.json as it lies there.
    """

    path: Path
    folder: MlxFolder
    record: Manifest | None
    inventory: Inventory
    modules: tuple[StoredModule, ...]
    files: tuple[SourceFile, ...]
    hashing: bool
    respelled: frozenset[int] = frozenset()
    config_sha256: str = ""

    @property
    def bytes(self) -> LocalFiles:
        """Return what reads the files of tensors, by their names in `files`."""
        here = self.folder.view.source
        assert isinstance(here, LocalFiles)  # such folders are read from here alone
        return LocalFiles({f.name: here.places[n] for f, n in zip(self.files, self.folder.view.names, strict=True)})

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
        if self.record is not None:
            return dict(self.record.formats)
        wide = [m for m in self.modules if m.module.may_quantize]
        groups = {
            "backbone": [m for m in wide if m.module.part == BACKBONE and not m.module.experts],
            "experts": [m for m in wide if m.module.part == BACKBONE and m.module.experts],
            HEAD: [m for m in wide if m.module.part == HEAD],
        }
        return {k: commonest(m.encoding.label for m in found) for k, found in groups.items() if found}

    @property
    def layout(self) -> Layout | None:
        """Return the layout that the manifest names, None where it is not known."""
        return layouts().get(self.record.layout) if self.record else None

    def sources(self) -> tuple[SourceFile, ...]:
        """Return the source files that the manifest names."""
        listed = self.record.source.files if self.record else ()
        return tuple(SourceFile(f.name, f.size, f.header_sha256) for f in listed)

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """Return the tensors of the source that were left out, as the manifest tells."""
        return self.record.left_out if self.record else ()

    def sha256(self, name: str) -> str | None:
        """Return the recorded sha256 of a file, None where it is not known."""
        found = self.record.file(name) if self.record else None
        return found.sha256 if found else None


def commonest(labels: Iterable[str]) -> str:
    """Return the label that occurs most often."""
    return Counter(labels).most_common(1)[0][0]


_DENSE = {BACKBONE: Storage("bf16", "bf16"), HEAD: Storage("bf16", "bf16")}


Records = Mapping[tuple[str, str], TensorRecord | None]
"""What a manifest tells of tensors, by (file, name); None for one of a folder apart, whose head none tells of."""


def read(path: Path, drafter: Path | Checkpoint | None = None, more: Records | None = None) -> ConvertedModules:
    """Return the converted folder at `path`, whoever wrote it; `drafter` is the folder of its head, if that is apart.

    It may be given by its headers, in our spelling, and `more` is then what a manifest of its own tells of its tensors.

    Raises `InputError` where it is none, unfinished or contradictory.
    """
    if not path.is_dir():
        raise InputError(f"{show(str(path))}: no such folder; expected a converted folder")
    opened = open_folder(path, _checkpoint(path), drafter)
    found, checkpoint, record, folder = opened.found, opened.checkpoint, opened.record, opened.folder
    if folder.findings:
        raise findings_error(folder.findings, f"{path}: {spelling.unfit(folder.findings)}")
    inventory = inventory_of(folder)
    below = folder.drafter.files if folder.drafter else ()
    label = APART if isinstance(drafter, Checkpoint) else DRAFTER
    files = (*checkpoint.files, *(replace(f, name=f"{label}/{f.name}") for f in below))
    records: Records | None = None if record is None else dict(record.by_place())
    if drafter is not None and folder.drafter is not None:
        heads: Records = {
            (f"{label}/{folder.drafter.file_names[t.file]}", t.name): None for t in folder.drafter.tensors()
        }
        records = None if records is None else {**records, **heads, **(more or {})}
    modules = tuple(_stored(m, folder.view.tensors[key_of(m)], records, files) for m in inventory.modules)
    hashing = record is None or any(t.xxh3_128 for t in record.tensors)
    respelled = spelling.changed(found, checkpoint)
    digest = hashlib.sha256(found.config or b"").hexdigest()
    return ConvertedModules(path, folder, record, inventory, modules, files, hashing, respelled, digest)


@dataclass(frozen=True)
class ConvertedModel:
    """A converted folder, whoever wrote it: `found` is as it lies there, `checkpoint` in our spelling.

    `record` is its manifest, None where another program wrote it, or copied one along. `is_head`: it is a head alone,
    as mlx-vlm's drafters are. What does not fit its config is in `folder.findings`.
    """

    found: Checkpoint
    checkpoint: Checkpoint
    record: Manifest | None
    folder: MlxFolder
    is_head: bool = False

    @property
    def bytes(self) -> ByteSource:
        """Return what reads the files of tensors, those of a drafter folder (`mtp/NAME`) too."""
        return self.folder.view.source

    @property
    def view(self) -> TensorView:
        """Return the tensors by key, and what reads them."""
        return self.folder.view

    @property
    def tensors(self) -> Mapping[str, LogicalTensor]:
        """Return the tensors by key."""
        return self.folder.view.tensors

    @property
    def inventory(self) -> Inventory:
        """Return what its config implies with the head that is there; of a head alone the head's part."""
        if not self.is_head:
            return inventory_of(self.folder)
        stages = len({t.layer for t in self.tensors.values() if t.part == HEAD})
        whole = expand(self.folder.config, self.folder.head_kind, stages, _DENSE)
        return replace(whole, modules=tuple(m for m in whole.modules if m.part == HEAD))

    @property
    def provenance(self) -> Provenance | None:
        """Return the repo and commit that its source came from, None where no manifest tells."""
        return None if self.record is None else self.record.origin


def inventory_of(folder: MlxFolder) -> Inventory:
    """Return what a folder's config implies with the head that is there; the config as the source had it."""
    blocks = {t.layer for t in folder.view.tensors.values() if t.part == HEAD}
    raw = _source_config(folder, len(blocks))
    return expand(replace(folder.config, raw=raw), folder.head_kind, len(blocks), _DENSE)


def open_head(found: Checkpoint) -> ConvertedModel:
    """Return a drafter folder, read as a head alone."""
    headers = spelling.canonical(found)
    return ConvertedModel(found, headers, None, read_drafter(headers), is_head=True)


def open_folder(path: Path, found: Checkpoint, drafter: Path | Checkpoint | None = None) -> ConvertedModel:
    """Return the converted folder at `path`, whose headers are `found`, every tensor matched with its config.

    Other programs' names are told as ours. `drafter` is the folder
    of its head (or its headers, in our spelling), if that is apart. What does not fit is in `folder.findings`. Raises
    `InputError` where it is no converted folder, unfinished, or stored in a way that is not read here.
    """
    record = _own_record(path, found) if found.is_here else None
    state = path / STATE_FOLDER
    if record is None and any((state / n).exists() for n in (PLAN_NAME, COMMIT_NAME)):
        raise InputError(f"{path}: is unfinished", hint="repeat the command that wrote it, then this one")
    if drafter is None and is_drafter(found):
        raise InputError(f"{path}: is {why_no_model(found)}")
    if kind := spelling.stranger(found):
        raise InputError(f"{path}: is {kind}")
    theirs = record is None
    checkpoint = spelling.canonical(found) if theirs else found
    if not is_mlx(checkpoint):
        raise InputError(f"{path}: is not a converted folder", hint="convert it first: ds4convert quantize SRC OUT")
    theirs = theirs or drafter is not None
    apart = drafter if isinstance(drafter, Checkpoint) else _drafter(path, drafter, theirs)
    return ConvertedModel(found, checkpoint, record, read_mlx(path, checkpoint, apart, theirs))


def why_no_model(checkpoint: Checkpoint) -> str:
    """Return why a folder without a manifest is not a converted model; "" where it is."""
    tensors = [t.name for t in checkpoint.tensors()]
    alone = bool(tensors) and all(n.startswith(head_stems_inside()) for n in tensors)
    if is_drafter(checkpoint) or (alone and checkpoint.config is not None):
        return (
            "a head alone, not a model; put it into the converted folder of its backbone: ds4convert graft MLX_DIR "
            "--from HEAD --out OUT"
        )
    if checkpoint.config is not None and not is_mlx(checkpoint) and not spelling.stranger(checkpoint):
        return "not a converted folder; convert it first: ds4convert quantize SRC OUT"
    return ""


def _checkpoint(path: Path) -> Checkpoint:
    """Return the headers of a folder, those of heads that its index leaves out too (some hosts read these)."""
    found = read_checkpoint(path)
    files, heads = list(found.files), list(found.headers)
    for name in safetensors_in(path):
        if found.has_index and name not in found.file_names:
            with closing(LocalFiles.of(path, [name])) as more:
                file, header = read_header(more, name, len(files))
            # One matrix per expert is an official head, raw: hosts do not run it, and `graft` may replace it.
            raw = any(stem in t.name for t in header.tensors for stem in expert_stems())
            if not raw and any(t.name.startswith(head_stems_inside()) for t in header.tensors):
                files.append(file)
                heads.append(header)
    reading = LocalFiles.of(path, [f.name for f in files])
    return replace(found, files=tuple(files), headers=tuple(heads), bytes=reading)


def _own_record(path: Path, found: Checkpoint) -> Manifest | None:
    """Return the manifest; None without one, or where it came along from another folder: programs copy every JSON."""
    record = manifest.read(path)
    if record is None:
        return None
    told = {f.header_sha256 for f in record.files}
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
    family = folder.config.family
    key, skipped = family.config_keys["stages"], source_only_keys(family)
    raw = {k: v for k, v in folder.config.flat.items() if k not in skipped}
    if stages and not raw.get(key):
        raw[key] = _drafter_stages(folder, key) or stages
    return family.unflat(raw)


def _drafter_stages(folder: MlxFolder, key: str) -> int:
    """Return the stages in the drafter folder's copy of the source's config; 0 where it has none."""
    if folder.drafter is None or folder.drafter.config is None:
        return 0
    text = drafter_config(folder.drafter).get("text_config")
    value = keys.get(text, key) if isinstance(text, dict) else None
    return value if type(value) is int else 0


def _stored(module: Module, found: LogicalTensor, records: Records | None, files: Sequence[SourceFile]) -> StoredModule:
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
        if found.official:
            specs = [Spec("weight", "F8_E4M3", found.shape), Spec("scale", "F8_E8M0", groups)]
            table = None
    ranges = [_whole(at) for at in (found.weight_at, found.scale_at, found.bias_at) if at]
    names = [f"{stem}.{s.suffix}" if s.suffix else stem for s in specs]
    known = [_record(records, n, s, r, files) for n, s, r in zip(names, specs, ranges, strict=True)]
    parts = []
    for rows in _together(known, codec is not None):
        made = known[rows[0]]
        transform, params = (made.transform or "copy", made.params) if made else ("copy", {})
        part = Part(tuple(specs[i] for i in rows), transform, (), params)
        digests = tuple(r.xxh3_128 if (r := known[i]) else None for i in rows)
        sources, dtype = (made.sources, made.source_dtype) if made else ((), "")
        at = tuple(ranges[i] for i in rows)
        done = Done(digests, _loss(made.error if made else None))
        parts.append(StoredPart(part, tuple(names[i] for i in rows), at, sources, dtype, done))
    label = known[0].format if known[0] else label
    return StoredModule(module, Encoding(tuple(p.part for p in parts), table, label), tuple(parts))


def packed(m: StoredModule) -> StoredModule:
    """Return a module that may be stored under the official checkpoint's dtypes as MLX has the same bytes."""
    return _respecified(m, as_packed(m.module, m.encoding))


def shaped(m: StoredModule, layout: Layout) -> StoredModule:
    """Return a module as a layout has the same bytes: its hosts may read them under other names and dtypes."""
    return _respecified(m, build.shaped(m.module, m.encoding, layout))


def _respecified(m: StoredModule, encoding: Encoding) -> StoredModule:
    parts = tuple(replace(p, part=q) for p, q in zip(m.parts, encoding.parts, strict=True))
    return replace(m, encoding=encoding, parts=parts)


def _together(known: Sequence[TensorRecord | None], quantized: bool) -> list[list[int]]:
    """Return which outputs were made by one step: those of a rounding one, by its name; the others have one each."""
    rounded = known[0].transform.startswith("quantize") if known[0] and known[0].transform else quantized
    return [[*range(len(known))]] if rounded else [[i] for i in range(len(known))]


def _whole(at: tuple[ByteRange, ...]) -> ByteRange:
    """Return the one range that the slices of a stacked tensor make up."""
    return ByteRange(at[0].file, at[0].offset, sum(r.size for r in at))


def _record(
    records: Records | None, name: str, spec: Spec, at: ByteRange, files: Sequence[SourceFile]
) -> TensorRecord | None:
    """Return the manifest's record of a tensor, None without a manifest. Raises `InputError` where they differ."""
    if records is None:
        return None
    file = files[at.file].name
    if (file, name) not in records:
        raise InputError(f"{file}: {name}: the manifest does not record it", hint="convert the folder again")
    r = records[file, name]
    if r is not None and (r.dtype, r.shape, r.offset, r.size) != (spec.dtype, spec.shape, at.offset, at.size):
        raise InputError(f"{file}: {name}: is not what the manifest records", hint="convert the folder again")
    return r


def _loss(error: RoundingError | None) -> Loss | None:
    """Return the recorded error as a `Loss` that gives the same figures."""
    return None if error is None else Loss(float(error.relative_square), 1.0, float(error.max_abs))


def small_files(stored: ConvertedModules) -> tuple[dict[str, str], dict[str, bytes], tuple[LeftOut, ...]]:
    """Return (copies by sha256, texts by bytes, files left out): what stays beside tensors, config and index."""
    family = stored.inventory.config.family.name
    if stored.record is None:
        side = side_files.survey(stored.path, family)
        ours = {DRAFTER, STATE_FOLDER, *model_files(), *(n.partition("/")[0] for n in beside_names())}
        return dict(side.copies), dict(side.added), tuple(x for x in side.left_out if x.tensor not in ours)
    remade = {"config.json", INDEX_NAME, f"{DRAFTER}/config.json", f"{DRAFTER}/{INDEX_NAME}", *model_files()}
    remade |= beside_names()
    plain = [f for f in stored.record.files if not f.holds_tensors and f.name not in remade]
    if strange := next((f.name for f in plain if f.name not in side_files.CARRIED), None):
        raise InputError(f"{manifest.MANIFEST_NAME}: names {show(strange)}, which no converted folder has")
    texts = {f.name: checked_small(stored, f.name) for f in plain if f.size is not None}
    copies = {f.name: f.sha256 or "" for f in plain if f.size is None}
    for name, sha256 in copies.items():  # now, and not when the tensors are written already
        checked_small(stored, name, sha256)
    return copies, texts, stored.record.files_left_out


def model_files() -> set[str]:
    """Return the names of the model files that layouts add."""
    return {y.model_file for y in layouts().values() if y.model_file}


def checked_small(stored: ConvertedModules, name: str, sha256: str | None = None) -> bytes:
    """Return a small file of the folder. Raises `InputError` when it is not what the manifest records."""
    data = read_small(stored.path, name)
    wanted = sha256 or stored.sha256(name)
    if wanted is not None and hashlib.sha256(data).hexdigest() != wanted:
        raise InputError(f"{name}: altered since it was written", hint="convert the folder again")
    return data
