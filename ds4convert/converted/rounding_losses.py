"""Formats and what rounding cost, by layer and role: for `inspect`, the model card and the pages' pictures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from ds4convert.checkpoint.headers import DTYPE_BYTES
from ds4convert.checkpoint.inventory import Inventory, Module, group_of
from ds4convert.checkpoint.tensors import LogicalTensor
from ds4convert.checkpoint.types import JSON

NEVER_ROUNDED = {"router", "norm"}
"""Roles that no recipe rounds."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """A stored matrix: group and layer, format, its weights and bits for each, and the error of its rounding."""

    group: str
    layer: int | None
    format: str
    weights: float
    bits: float
    relative_square: float
    max_abs: float


@dataclass(frozen=True, slots=True)
class LayerLoss:
    """What rounding cost the matrices of one group in one layer; errors are means over weights, `max_abs` the worst."""

    group: str
    layer: int | None
    formats: tuple[str, ...]
    bits_per_weight: float
    relative_square: float
    max_abs: float

    def as_json(self) -> JSON:
        """Return the figures under the keys of the command line contract."""
        return {
            "group": self.group,
            "layer": self.layer,
            "formats": list(self.formats),
            "bits_per_weight": self.bits_per_weight,
            "relative_square": self.relative_square,
            "max_abs": self.max_abs,
        }


@dataclass(frozen=True, slots=True)
class GroupLoss:
    """What rounding cost a group: means over its layers, and the layer of the largest error."""

    group: str
    formats: tuple[str, ...]
    bits_per_weight: float
    relative_square: float
    max_abs: float
    worst: float
    worst_layer: int | None


def of_official(inventory: Inventory) -> tuple[LayerLoss, ...]:
    """Return how the matrices of an official checkpoint are stored, per group and layer; nothing is lost there."""
    return by_layer(_official(m) for m in inventory.modules if m.is_module and m.role not in NEVER_ROUNDED)


def _official(m: Module) -> Matrix:
    shape, dtypes = m.weight_spec()
    size = DTYPE_BYTES[dtypes[0]] * shape[0] * shape[1]
    if m.has_scale:
        rows, cols = m.scale_shape()
        size += DTYPE_BYTES[m.scale_dtype] * rows * cols
    name = m.store if m.has_scale else dtypes[0].lower()
    return Matrix(group_of(m.part, m.role), m.block, name, m.weights, 8 * size / (m.shape[0] * m.shape[1]), 0.0, 0.0)


def of_folder(tensors: Iterable[LogicalTensor]) -> tuple[LayerLoss, ...]:
    """Return how the matrices of a converted folder are stored, per group and layer; its losses are not known here."""
    return by_layer(_stored(tensors))


def _stored(tensors: Iterable[LogicalTensor]) -> Iterator[Matrix]:
    for t in tensors:
        if t.name.endswith(".weight") and len(t.shape) >= 2 and t.role not in NEVER_ROUNDED:
            count = t.matrices * t.rows * t.cols
            name = "mxfp4" if t.store == "fp4" else t.store
            yield Matrix(group_of(t.part, t.role), t.layer, name, count, 8 * t.size / count, 0.0, 0.0)


@dataclass
class _Sum:
    weights: float = 0.0
    bits: float = 0.0
    error: float = 0.0
    max_abs: float = 0.0
    formats: set[str] = field(default_factory=set)

    def add(self, m: Matrix) -> None:
        self.weights += m.weights
        self.bits += m.bits * m.weights
        self.error += m.relative_square * m.weights
        self.max_abs = max(self.max_abs, m.max_abs)
        self.formats.add(m.format)


def by_layer(matrices: Iterable[Matrix]) -> tuple[LayerLoss, ...]:
    """Return what rounding cost per group and layer, in the order of first appearance."""
    sums: dict[tuple[str, int | None], _Sum] = {}
    for m in matrices:
        sums.setdefault((m.group, m.layer), _Sum()).add(m)
    return tuple(
        LayerLoss(
            group,
            layer,
            tuple(sorted(s.formats)),
            round(s.bits / s.weights, 3),
            float(f"{s.error / s.weights:.6g}"),
            s.max_abs,
        )
        for (group, layer), s in sums.items()
        if s.weights
    )


def by_group(rows: Sequence[LayerLoss]) -> tuple[GroupLoss, ...]:
    """Return what rounding cost per group, in the order of first appearance."""
    groups: dict[str, list[LayerLoss]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    return tuple(_group(name, found) for name, found in groups.items())


def _group(name: str, found: Sequence[LayerLoss]) -> GroupLoss:
    worst = max(found, key=lambda r: r.relative_square)
    return GroupLoss(
        group=name,
        formats=tuple(sorted({f for r in found for f in r.formats})),
        bits_per_weight=sum(r.bits_per_weight for r in found) / len(found),
        relative_square=sum(r.relative_square for r in found) / len(found),
        max_abs=max(r.max_abs for r in found),
        worst=worst.relative_square,
        worst_layer=worst.layer,
    )
