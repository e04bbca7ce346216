"""Modules and tensors: what a family's rows come to for one config, and how their weights lie on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ds4convert.checkpoint.config import ModelConfig
from ds4convert.checkpoint.families.rows import EXPERT, Fused
from ds4convert.errors import InventoryError

FP4_GROUP = 32
"""Columns that share one E8M0 scale in packed FP4 weights. Source: architecture.md section 10."""

BACKBONE, HEAD = "backbone", "mtp"
"""The parts of a model, by the names that manifests, recipes and reports have for them, whatever the family."""


@dataclass(frozen=True, slots=True)
class Storage:
    """How the weights of one part (backbone or head) lie on disk.

    `dense` is fp8 or bf16, `experts` is fp4, fp8 or bf16; `fused` is true where the experts of a layer lie in
    stacked tensors of the Transformers namespace.
    """

    dense: str
    experts: str
    fused: bool = False


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One expected tensor: official name, shape, acceptable dtypes (the first is the usual one), and its place.

    Of block scales, `scales` is the store of the matrix (fp4, fp8), and `group` the columns that share one. Values of
    whole numbers are under `values_below`.
    """

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    role: str
    part: str
    layer: int | None
    scales: str = ""
    group: int = 0
    values_below: int = 0


@dataclass(frozen=True, slots=True)
class Module:
    """A weight with what belongs to it (block scales), or a lone tensor; the unit that is converted as one.

    `name` is official and may hold `{expert}`; `mlx` is the path below the block, whose own path in the backbone is
    `at` (with its dot; "" at the root). `apart`: it is of a tower. `shape` is logical, of one expert
    where `experts` is not 0. `store` is fp4, fp8, or the dtype of a plain tensor. `own` is true for what only a
    head block has. `found_dtype` is that on disk where a plain tensor lies there in another dtype that holds the same
    values; `scale_dtype` that of the block scales.
    """

    name: str
    mlx: str
    role: str
    part: str
    block: int | None
    shape: tuple[int, ...]
    store: str
    experts: int
    tile: tuple[int, int]
    is_module: bool
    own: bool = False
    write: str = ""
    values_below: int = 0
    fused: Fused | None = None
    fused_scale: str = ""
    found_dtype: str = ""
    scale_dtype: str = "F8_E8M0"
    at: str = ""
    apart: bool = False

    def weight_name(self, expert: int = 0) -> str:
        """Return the official name of the weight (of one expert)."""
        name = self.name.replace(EXPERT, str(expert)) if self.experts else self.name
        return f"{name}.weight" if self.is_module else name

    def scale_name(self, expert: int = 0) -> str:
        """Return the official name of the block scales (of one expert)."""
        return self.weight_name(expert).removesuffix("weight") + "scale"

    @property
    def has_scale(self) -> bool:
        """Return whether block scales are stored beside the weight."""
        return self.store in {"fp4", "fp8"}

    @property
    def may_quantize(self) -> bool:
        """Return whether a recipe may choose its format: matrices alone, never norms, router, sinks and the like."""
        return self.is_module

    @property
    def weights(self) -> int:
        """Return the number of logical weights, all experts counted."""
        n = self.experts or 1
        for size in self.shape:
            n *= size
        return n

    def weight_spec(self) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Return (shape, acceptable dtypes) of one weight tensor on disk."""
        if self.store == "fp4":
            return (self.shape[0], self.shape[1] // 2), ("I8", "U8")
        if self.store == "fp8":
            return self.shape, ("F8_E4M3",)
        return self.shape, (self.found_dtype,) if self.found_dtype else tuple(self.store.split(" or "))

    def scale_shape(self) -> tuple[int, int]:
        """Return the shape of one block scale tensor on disk; grids are ceil-sized."""
        rows, cols = self.shape[0], self.shape[1]
        if self.store == "fp4":
            return rows, cols // FP4_GROUP
        return -(-rows // self.tile[0]), -(-cols // self.tile[1])

    @property
    def scale_group(self) -> int:
        """Return the columns that share one block scale."""
        return FP4_GROUP if self.store == "fp4" else self.tile[1]


@dataclass(frozen=True)
class Inventory:
    """All modules of a checkpoint in their natural order: embedding, layers, output, head."""

    config: ModelConfig
    head_kind: str
    stages: int
    storage: Mapping[str, Storage]
    modules: tuple[Module, ...]

    def tensors(self) -> Iterator[TensorSpec]:
        """Yield every expected tensor once, weights before their scales."""
        fused: set[str] = set()
        for module in self.modules:
            if module.fused is None:
                yield from _module_specs(module)
            elif (name := fused_name(module)) not in fused:
                fused.add(name)
                yield from _fused_specs(module)


def fused_name(module: Module) -> str:
    """Return the official-namespace name of the fused tensor that holds a module's weights."""
    assert module.fused is not None
    return module.name[: module.name.index(module.fused.stem)] + module.fused.name


def _module_specs(module: Module) -> Iterator[TensorSpec]:
    shape, dtypes = module.weight_spec()
    place = (module.role, module.part, module.block)
    scales = module.scale_shape() if module.has_scale else None  # once, not for each of many experts
    for expert in range(max(module.experts, 1)):
        name = module.weight_name(expert)
        yield TensorSpec(name, shape, dtypes, *place, values_below=module.values_below)
        if scales is not None:
            yield _scale_spec(module, name.removesuffix("weight") + "scale", scales)


def _scale_spec(module: Module, name: str, shape: tuple[int, ...]) -> TensorSpec:
    place = (module.role, module.part, module.block)
    return TensorSpec(name, shape, (module.scale_dtype,), *place, scales=module.store, group=module.scale_group)


def _fused_specs(module: Module) -> Iterator[TensorSpec]:
    assert module.fused is not None
    name, parts = fused_name(module), len(module.fused.parts)
    (rows, *rest), dtypes = module.weight_spec()
    place = (module.role, module.part, module.block)
    yield TensorSpec(name, (module.experts, parts * rows, *rest), dtypes, *place)
    if module.has_scale:
        if module.store == "fp8" and parts > 1 and rows % module.tile[0]:
            raise InventoryError(
                f"{name}: a tile of {module.tile[0]} rows spans two matrices of {rows} rows each; this is not supported"
            )
        rows, cols = module.scale_shape()
        yield _scale_spec(module, name + module.fused_scale, (module.experts, parts * rows, cols))


def backbone_name(module: Module) -> str:
    """Return the MLX path of a backbone module: the same in every layout."""
    return module.at + module.mlx


def key_of(module: Module) -> str:
    """Return the key of a module in all layouts: its MLX path, the head's as if it lay in the folder."""
    return backbone_name(module) if module.part == BACKBONE else f"{HEAD}.{module.block}.{module.mlx}"


def group_of(part: str, role: str) -> str:
    """Return the name under which reports add up a role: the head's roles begin with `mtp.`."""
    return HEAD_GROUPS + role.removeprefix(f"{HEAD}_") if part == HEAD else role


HEAD_GROUPS = f"{HEAD}."
"""What the names of the head's groups begin with."""
