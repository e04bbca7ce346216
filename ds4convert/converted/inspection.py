"""What a checkpoint is and holds: the facts behind `inspect`, as values."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ds4convert.checkpoint import config
from ds4convert.checkpoint.family import head_stems
from ds4convert.checkpoint.folder import CONFIG_NAME, Checkpoint, is_mlx, read_checkpoint
from ds4convert.checkpoint.headers import DTYPE_BYTES
from ds4convert.checkpoint.inventory import HEAD, HEAD_GROUPS, Inventory, TensorSpec, compare, expected, group_of
from ds4convert.checkpoint.source import Source
from ds4convert.checkpoint.tensors import LogicalTensor
from ds4convert.checkpoint.types import DRAFTER, JSON, Finding, LeftOut, Provenance, TensorInfo
from ds4convert.converted import grouping, names, rounding_losses
from ds4convert.converted.folder import MlxFolder, is_drafter
from ds4convert.converted.grouping import Item
from ds4convert.converted.modules import ConvertedModel
from ds4convert.converted.open import PlainFiles, opened
from ds4convert.converted.records import Manifest
from ds4convert.converted.rounding_losses import LayerLoss


@dataclass(frozen=True)
class Row:
    """One tensor of a report."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    group: str
    file: str = ""


@dataclass(frozen=True)
class Inspection:
    """The facts of one checkpoint. `format` is official, mlx, config (no tensors were read) or plain.

    `inventory` is what its config implies, with the head that is there; None where nothing says what it should hold.
    `matrices` says, per group and layer, how the matrices are stored where no manifest tells it.
    `origin` is the repo and commit that an official checkpoint on this machine says it came from.
    """

    family: str | None
    format: str
    head_kind: str
    rows: tuple[Row, ...]
    weights: int
    problems: tuple[Finding, ...]
    note: str = ""
    manifest: Manifest | None = None
    left_out: tuple[LeftOut, ...] = ()
    inventory: Inventory | None = field(default=None, repr=False)
    matrices: tuple[LayerLoss, ...] = field(default=(), repr=False)
    origin: Provenance | None = None

    @property
    def size(self) -> int:
        """Return the bytes of all tensors."""
        return sum(r.size for r in self.rows)

    @property
    def bits_per_weight(self) -> float | None:
        """Return 8 x bytes / logical weights, or None where the number of weights is not known."""
        return round(8 * self.size / self.weights, 4) if self.weights else None

    def groups(self) -> list[JSON]:
        """Return per group: name, tensors, bytes, dtypes; in the order of first appearance."""
        found = grouping.by_role(Item(r.group, r.dtype, "", r.size) for r in self.rows)
        return [g.as_json("dtypes") for g in found]

    def layers(self) -> tuple[LayerLoss, ...]:
        """Return how the matrices of each group and layer are stored; () where it is not known what the tensors are."""
        return self.manifest.layers() if self.manifest else self.matrices

    def losses(self) -> tuple[LayerLoss, ...]:
        """Return what rounding cost per group and layer, where a manifest tells it."""
        return self.manifest.losses() if self.manifest else ()

    def as_json(self) -> JSON:
        """Return the facts under the keys of the command line contract."""
        head = [r for r in self.rows if r.group.startswith(HEAD_GROUPS)]
        return {
            "family": self.family,
            "format": self.format,
            HEAD: {"kind": self.head_kind, "tensors": len(head), "bytes": sum(r.size for r in head)},
            "tensors": len(self.rows),
            "bytes": self.size,
            "bits_per_weight": self.bits_per_weight,
            "groups": self.groups(),
            "problems": [p.as_json() for p in self.problems],
            "left_out": [{"tensor": x.tensor, "why": x.why} for x in self.left_out],
        }

    def matching(self, glob: str) -> list[JSON]:
        """Return the tensors whose names match a shell pattern."""
        return [
            {
                "name": r.name,
                "dtype": r.dtype,
                "shape": list(r.shape),
                "bytes": r.size,
                "group": r.group,
                "file": r.file,
            }
            for r in self.rows
            if fnmatch.fnmatchcase(r.name, glob)
        ]


def inspect(path: Path) -> Inspection:
    """Return the facts of the folder or file at `path`, from its headers alone.

    Raises `InputError` for what cannot be read as a checkpoint; differences from the config are `problems`.
    """
    found = read_checkpoint(path)
    if path.is_file():
        return _plain(found, "a single file: without its folder there is nothing to compare it with")
    return inspect_checkpoint(found)


def inspect_checkpoint(checkpoint: Checkpoint) -> Inspection:
    """Return the facts of a checkpoint whose headers have been read, wherever its tensors lie."""
    kind = names.stranger(checkpoint) if checkpoint.config is not None and is_mlx(checkpoint) else ""
    if kind and not is_drafter(checkpoint):
        return replace(_plain(checkpoint, f"This is {kind}"), family=_family(checkpoint), format="mlx")
    found = opened(checkpoint)
    if isinstance(found, PlainFiles):
        return _plain(checkpoint, "no config.json: there is nothing to compare the tensors with")
    if isinstance(found, Source):
        return _source(found)
    return _drafter(found.folder) if found.is_head else _mlx(found)


def inspect_config(raw: bytes, where: str) -> Inspection:
    """Return what a model of this config holds, from the config alone."""
    inventory = expected(config.parse_config(raw, where))
    rows = tuple(_expected_row(s) for s in inventory.tensors())
    weights = _weights(inventory)
    name = inventory.config.family.name
    return Inspection(
        name,
        "config",
        inventory.head_kind,
        rows,
        weights,
        (),
        where,
        inventory=inventory,
        matrices=rounding_losses.of_official(inventory),
    )


def _expected_row(spec: TensorSpec) -> Row:
    size = DTYPE_BYTES[spec.dtypes[0]]
    for n in spec.shape:
        size *= n
    return Row(spec.name, spec.dtypes[0], spec.shape, size, group_of(spec.part, spec.role))


def _weights(inventory: Inventory) -> int:
    return sum(m.weights for m in inventory.modules)


def _rows(
    infos: Iterable[tuple[str, TensorInfo]], groups: Mapping[str, str], files: tuple[str, ...]
) -> tuple[Row, ...]:
    return tuple(Row(t.name, t.dtype, t.shape, t.size, groups.get(name, "unknown"), files[t.file]) for name, t in infos)


def _source(source: Source) -> Inspection:
    inventory, found = source.inventory, source.named.tensors
    files = source.checkpoint.file_names
    problems = compare(inventory, source.named, files)
    groups = {s.name: group_of(s.part, s.role) for s in inventory.tensors()}
    is_of_head = inventory.config.family.is_of_head
    groups |= {n: f"{HEAD_GROUPS}unknown" for n in found if is_of_head(n) and n not in groups}
    present = [m for m in inventory.modules if m.weight_name() in found or m.fused is not None]
    has_head = any(is_of_head(n) for n in found)
    alone = has_head and all(is_of_head(n) for n in found)
    if alone:
        problems = [p for p in problems if p.kind != "missing" or is_of_head(p.tensor)]
    order = {name: i for i, name in enumerate(groups)}
    infos = sorted(found.items(), key=lambda x: order.get(x[0], len(order)))
    return Inspection(
        family=inventory.config.family.name,
        format="official",
        head_kind=inventory.head_kind if has_head else "none",
        rows=_rows(infos, groups, files),
        weights=sum(m.weights for m in present),
        problems=tuple(problems),
        note="" if not alone else "A head alone, complete" if not problems else "A head alone, without its backbone",
        left_out=source.checkpoint.left_out,
        inventory=None if alone else inventory,
        matrices=rounding_losses.of_official(replace(inventory, modules=tuple(present))),
        origin=source.origin,
    )


def _mlx(found: ConvertedModel) -> Inspection:
    folder = found.folder
    problems = list(folder.findings)
    stages = folder.config.stages
    if stages and folder.head_kind == "none":
        wanted = f"a head of {stages} stage(s), as config.json says"
        problems.append(Finding("missing", folder.config.family.of_head, wanted, "no tensor of a head"))
    return Inspection(
        family=folder.config.family.name,
        format="mlx",
        head_kind=folder.head_kind,
        rows=tuple(_mlx_rows(folder, _their_names(found))),
        weights=sum(_count(t) for t in folder.view.tensors.values()),
        problems=tuple(problems),
        note="" if found.record or not found.found.is_here else _whose(found, problems),
        manifest=found.record,
        inventory=found.inventory,
        matrices=() if found.record else rounding_losses.of_folder(folder.view.tensors.values()),
    )


def _whose(opened: ConvertedModel, problems: Sequence[Finding]) -> str:
    """Return what is to be known of a folder without a manifest of ours."""
    if problems:
        return f"No manifest of ds4convert; {names.unfit(problems)}"
    other = " in another program's spelling" if names.changed(opened.found, opened.checkpoint) else ""
    return (
        f"No manifest of ds4convert: another program's folder{other}. `ds4convert relayout` writes it in the spelling "
        "of a host, with a manifest"
    )


def _family(checkpoint: Checkpoint) -> str:
    raw = checkpoint.config or b""
    return config.parse_config(raw, CONFIG_NAME, is_mlx=True).family.name


def _their_names(opened: ConvertedModel) -> dict[str, str]:
    """Return the names as they lie in the folder, by ours."""
    pairs = zip(opened.found.tensors(), opened.checkpoint.tensors(), strict=True)
    return {ours.name: theirs.name for theirs, ours in pairs}


def _drafter(folder: MlxFolder) -> Inspection:
    """Return the facts of a head alone, as an mlx-vlm drafter."""
    whole = "" if folder.findings else ", complete"
    note = f"A head alone{whole} (an mlx-vlm drafter): `ds4convert graft MLX_DIR --from` it puts it into its backbone"
    return Inspection(
        family=folder.config.family.name,
        format="mlx",
        head_kind=folder.head_kind,
        rows=tuple(_mlx_rows(folder, {})),
        weights=sum(_count(t) for t in folder.view.tensors.values()),
        problems=folder.findings,
        note=note,
    )


def _count(tensor: LogicalTensor) -> int:
    return tensor.matrices * tensor.rows * tensor.cols


def _mlx_rows(folder: MlxFolder, theirs: Mapping[str, str]) -> Iterable[Row]:
    """Yield a row per stored tensor: weights and scales of a module share its group; a second copy of the head none.

    `theirs` has the names on disk by ours.
    """
    groups: dict[tuple[bool, str], str] = {}
    for t in folder.view.tensors.values():
        stem = t.name.removesuffix(".weight")
        below = t.file.startswith(f"{DRAFTER}/")
        for name in (t.name, f"{stem}.scales", f"{stem}.biases"):
            groups[below, name] = group_of(t.part, t.role)
    for below, checkpoint in ((False, folder.checkpoint), (True, folder.drafter)):
        if checkpoint is None:
            continue
        other = "copy of the head" if below and folder.place and not folder.place.folder else "unknown"
        for info in checkpoint.tensors():
            file = (f"{DRAFTER}/" if below else "") + checkpoint.file_names[info.file]
            name = info.name if below else theirs.get(info.name, info.name)
            yield Row(name, info.dtype, info.shape, info.size, groups.get((below, info.name), other), file)


def _plain(checkpoint: Checkpoint, note: str) -> Inspection:
    files = checkpoint.file_names
    rows = tuple(Row(t.name, t.dtype, t.shape, t.size, t.dtype, files[t.file]) for t in checkpoint.tensors())
    kind = "unknown" if any(r.name.startswith(head_stems()) for r in rows) else "none"
    return Inspection(None, "plain", kind, rows, 0, (), note)
