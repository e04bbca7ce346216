"""What a checkpoint is and holds: the facts behind `inspect`, as values."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ds4convert import config as configs
from ds4convert import convert, logical, manifest, stored
from ds4convert.folder import Checkpoint, read_checkpoint
from ds4convert.headers import DTYPE_BYTES
from ds4convert.inventory import HEAD, Inventory, TensorSpec, compare, expected
from ds4convert.types import JSON, Finding, TensorInfo


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
    """The facts of one checkpoint. `format` is official, mlx, config (no tensors were read) or plain."""

    family: str | None
    format: str
    head_kind: str
    rows: tuple[Row, ...]
    weights: int
    problems: tuple[Finding, ...]
    note: str = ""
    manifest: JSON | None = None

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
        out: dict[str, JSON] = {}
        for r in self.rows:
            g = out.setdefault(r.group, {"name": r.group, "tensors": 0, "bytes": 0, "dtypes": {}})
            g["tensors"] += 1
            g["bytes"] += r.size
            g["dtypes"][r.dtype] = g["dtypes"].get(r.dtype, 0) + r.size
        for g in out.values():
            g["dtypes"] = sorted(g["dtypes"], key=g["dtypes"].__getitem__, reverse=True)
        return list(out.values())

    def as_json(self) -> JSON:
        """Return the facts under the keys of the command line contract."""
        head = [r for r in self.rows if r.group.startswith("mtp.")]
        return {
            "family": self.family,
            "format": self.format,
            "mtp": {"kind": self.head_kind, "tensors": len(head), "bytes": sum(r.size for r in head)},
            "tensors": len(self.rows),
            "bytes": self.size,
            "bits_per_weight": self.bits_per_weight,
            "groups": self.groups(),
            "problems": [p.as_json() for p in self.problems],
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


def group_of(part: str, role: str) -> str:
    """Return the name under which reports add up a role: the head's roles begin with `mtp.`."""
    return f"mtp.{role.removeprefix('mtp_')}" if part == HEAD else role


def inspect(path: Path) -> Inspection:
    """Return the facts of the folder or file at `path`, from its headers alone.

    Raises `InputError` for what cannot be read as a checkpoint; differences from the config are `problems`.
    """
    if path.is_file():
        return _plain(read_checkpoint(path), "a single file: without its folder there is nothing to compare it with")
    return inspect_checkpoint(read_checkpoint(path))


def inspect_checkpoint(checkpoint: Checkpoint) -> Inspection:
    """Return the facts of a checkpoint whose headers have been read, wherever its tensors lie."""
    if checkpoint.config is None:
        return _plain(checkpoint, "no config.json: there is nothing to compare the tensors with")
    if logical.is_mlx(checkpoint):
        return _mlx(checkpoint.path, checkpoint)
    return _source(convert.recognised(checkpoint))


def inspect_config(raw: bytes, where: str) -> Inspection:
    """Return what a model of this config holds, from the config alone."""
    inventory = expected(configs.parse_config(raw, where))
    rows = tuple(_expected_row(s) for s in inventory.tensors())
    return Inspection(inventory.config.family.name, "config", inventory.head_kind, rows, _weights(inventory), (), where)


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


def _source(source: convert.Source) -> Inspection:
    inventory, found = source.inventory, source.named.tensors
    files = source.checkpoint.file_names
    problems = compare(inventory, source.named, files)
    groups = {s.name: group_of(s.part, s.role) for s in inventory.tensors()}
    groups |= {n: "mtp.unknown" for n in found if n.startswith("mtp.") and n not in groups}
    present = {m for m in inventory.modules if m.weight_name() in found or m.fused is not None}
    has_head = any(n.startswith("mtp.") for n in found)
    order = {name: i for i, name in enumerate(groups)}
    infos = sorted(found.items(), key=lambda x: order.get(x[0], len(order)))
    return Inspection(
        family=inventory.config.family.name,
        format="official",
        head_kind=inventory.head_kind if has_head else "none",
        rows=_rows(infos, groups, files),
        weights=sum(m.weights for m in present),
        problems=tuple(problems),
    )


def _mlx(path: Path, checkpoint: Checkpoint) -> Inspection:
    folder = logical.read_mlx(path, checkpoint)
    problems = list(folder.findings)
    stages = folder.config.stages
    if stages and folder.head_kind == "none":
        wanted = f"a head of {stages} stage(s), as config.json says"
        problems.append(Finding("missing", "mtp.*", wanted, "no tensor of a head"))
    return Inspection(
        family=folder.config.family.name,
        format="mlx",
        head_kind=folder.head_kind,
        rows=tuple(_mlx_rows(folder)),
        weights=sum(_count(t) for t in folder.view.tensors.values()),
        problems=tuple(problems),
        manifest=manifest.read(path),
    )


def _count(tensor: logical.Logical) -> int:
    return tensor.matrices * tensor.rows * tensor.cols


def _mlx_rows(folder: logical.MlxFolder) -> Iterable[Row]:
    """Yield a row per stored tensor: weights and scales of a module share its group; a second copy of the head none."""
    groups: dict[tuple[bool, str], str] = {}
    for t in folder.view.tensors.values():
        stem = t.name.removesuffix(".weight")
        below = t.file.startswith("mtp/")
        for name in (t.name, f"{stem}.scales", f"{stem}.biases"):
            groups[below, name] = group_of(t.part, t.role)
    for below, checkpoint in ((False, folder.checkpoint), (True, folder.drafter)):
        if checkpoint is None:
            continue
        other = "copy of the head" if below and folder.place and not folder.place.folder else "unknown"
        for info in checkpoint.tensors():
            file = ("mtp/" if below else "") + checkpoint.file_names[info.file]
            yield Row(info.name, info.dtype, info.shape, info.size, groups.get((below, info.name), other), file)


def _plain(checkpoint: Checkpoint, note: str) -> Inspection:
    files = checkpoint.file_names
    rows = tuple(Row(t.name, t.dtype, t.shape, t.size, t.dtype, files[t.file]) for t in checkpoint.tensors())
    kind = "unknown" if any(r.name.startswith("mtp.") for r in rows) else "none"
    return Inspection(None, "plain", kind, rows, 0, (), note)


def view_of(path: Path) -> logical.View:
    """Return the logical tensors of any checkpoint that can be compared: source, converted, or plain files.

    Raises `InputError` when a source or converted folder does not hold what its config implies.
    """
    checkpoint = read_checkpoint(path)
    return logical.plain_view(checkpoint) if path.is_file() else view_of_headers(checkpoint)


def view_of_headers(checkpoint: Checkpoint) -> logical.View:
    """Return the logical tensors of a checkpoint whose headers have been read, wherever it is. Raises as `view_of`."""
    if checkpoint.config is None:
        return logical.plain_view(checkpoint)
    if logical.is_mlx(checkpoint):
        return logical.read_mlx(checkpoint.path, checkpoint).view
    source = convert.recognised(checkpoint)
    return logical.source_view(source.checkpoint, source.inventory, source.named)


def inventory_of(path: Path) -> Inventory:
    """Return what a source or a converted folder holds. Raises `InputError` where it is not whole."""
    if path.is_dir() and logical.is_mlx(read_checkpoint(path)):
        return stored.read(path).inventory
    return convert.open_source(path).inventory
