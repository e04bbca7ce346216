"""Formats: what a module becomes. The only dispatch on format names.

A format tells, from sizes alone, which tensors it writes and which transform makes each (`Encoding`); the transforms
themselves are in `transforms`. A new format is a function here or in a file of its own, and a row of `ENCODERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ds4convert.errors import InputError
from ds4convert.inventory import FP4_GROUP, Module

MX_GROUP = 32


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor that a module becomes: name suffix, dtype, shape, and the transform with its operands."""

    suffix: str
    dtype: str
    shape: tuple[int, ...]
    transform: str
    operands: tuple[str, ...]
    params: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Encoding:
    """All parts of a module, and its entry in the quantization table (None where it is stored dense)."""

    parts: tuple[Part, ...]
    table: Mapping[str, int | str] | None


MXFP4: Mapping[str, int | str] = {"group_size": MX_GROUP, "bits": 4, "mode": "mxfp4"}
MXFP8: Mapping[str, int | str] = {"group_size": MX_GROUP, "bits": 8, "mode": "mxfp8"}


def _stacked(module: Module, *shape: int) -> tuple[int, ...]:
    return (module.experts, *shape) if module.experts else shape


def _geometry(module: Module) -> dict[str, int]:
    rows, cols = module.shape
    tile_rows, tile_cols = module.tile
    return {"rows": rows, "cols": cols, "tile_rows": tile_rows, "tile_cols": tile_cols}


def _native(module: Module) -> Encoding:
    """FP4 as mxfp4 and FP8 as mxfp8, the same codes byte for byte; all else as it is."""
    if not module.has_scale:
        return _plain(module)
    rows, cols = module.shape
    if cols % MX_GROUP or (module.store == "fp8" and module.tile[1] % MX_GROUP):
        raise InputError(
            f"{module.weight_name()}: [{rows}, {cols}] with tiles of {module.tile[1]} columns cannot be written in "
            f"groups of {MX_GROUP} without rounding; write this part as bf16 instead"
        )
    scales = _stacked(module, rows, cols // MX_GROUP)
    if module.store == "fp4":
        weight = Part("weight", "U32", _stacked(module, rows, cols // 8), "copy", ("weight",), {})
        return Encoding((weight, Part("scales", "U8", scales, "copy_e8m0", ("scale",), {})), MXFP4)
    weight = Part("weight", "U32", _stacked(module, rows, cols // 4), "copy_e4m3", ("weight",), {})
    return Encoding((weight, Part("scales", "U8", scales, "tile_e8m0", ("scale",), _geometry(module))), MXFP8)


def _bf16(module: Module) -> Encoding:
    """Dequantized to BF16, exactly as the official code defines it (rounded where BF16 has no such value)."""
    if not module.has_scale:
        return _plain(module)
    rows, cols = module.shape
    if module.store == "fp4" and cols % FP4_GROUP:
        raise InputError(f"{module.weight_name()}: [{rows}, {cols}] in FP4 has no whole groups of {FP4_GROUP} columns")
    transform = {"fp4": "fp4_to_bf16", "fp8": "fp8_to_bf16"}[module.store]
    shape = _stacked(module, *module.shape)
    part = Part("weight", "BF16", shape, transform, ("weight", "scale"), _geometry(module))
    return Encoding((part,), None)


def _plain(module: Module) -> Encoding:
    """A tensor as it is: stacked where it is of experts, narrowed where the family says so."""
    shape = _stacked(module, *module.shape)
    suffix = "weight" if module.is_module else ""
    if module.write:
        limit = {"limit": module.values_below}
        return Encoding((Part(suffix, module.write, shape, "narrow_i64", ("weight",), limit),), None)
    return Encoding((Part(suffix, module.store, shape, "copy", ("weight",), {}),), None)


ENCODERS: Mapping[str, Callable[[Module], Encoding]] = {"native": _native, "bf16": _bf16}

__all__ = ["ENCODERS", "FP4_GROUP", "MXFP4", "MXFP8", "MX_GROUP", "Encoding", "Part"]
