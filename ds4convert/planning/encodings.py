"""Formats: what a module becomes. The only dispatch on format names.

A format tells, from sizes alone, which tensors it writes and which transform makes each (`Encoding`); the transforms
themselves are in `transforms`. A new format is a function here or in a file of its own, and a row of `ENCODERS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from ds4convert.checkpoint.headers import DTYPE_BYTES
from ds4convert.checkpoint.inventory import FP4_GROUP, Module
from ds4convert.errors import InputError
from ds4convert.formats.codecs import CODECS, WORD_BITS, Codec
from ds4convert.formats.small_floats import FLOATS

MX_GROUP = 32


@dataclass(frozen=True, slots=True)
class Spec:
    """One tensor that a module becomes: name suffix, dtype, shape."""

    suffix: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """Tensors that a module becomes together: what they are, and the transform that makes them, with its operands."""

    outputs: tuple[Spec, ...]
    transform: str
    operands: tuple[str, ...]
    params: Mapping[str, int | str]


@dataclass(frozen=True, slots=True)
class Encoding:
    """All parts of a module, its entry in the quantization table (None where stored dense), and what it is called."""

    parts: tuple[Part, ...]
    table: Mapping[str, int | str] | None
    label: str = ""

    @property
    def size_bytes(self) -> int:
        """Return the bytes of all tensors."""
        specs = [spec for part in self.parts for spec in part.outputs]
        return sum(math.prod(s.shape) * DTYPE_BYTES[s.dtype] for s in specs)


MXFP4: Mapping[str, int | str] = {"group_size": MX_GROUP, "bits": 4, "mode": "mxfp4"}
MXFP8: Mapping[str, int | str] = {"group_size": MX_GROUP, "bits": 8, "mode": "mxfp8"}


def _stacked(module: Module, *shape: int) -> tuple[int, ...]:
    return (module.experts, *shape) if module.experts else shape


def _part(
    suffix: str, dtype: str, shape: tuple[int, ...], transform: str, operands: tuple[str, ...],
    params: Mapping[str, int | str],
) -> Part:  # fmt: skip
    return Part((Spec(suffix, dtype, shape),), transform, operands, params)


_HALVES = ("BF16", "F16")
E8M0_FROM = {"F8_E8M0": "copy_e8m0", "U8": "copy_e8m0", "F32": "narrow_f32_e8m0"} | dict.fromkeys(
    _HALVES, "narrow_float_e8m0"
)
TILES_FROM = {"F8_E8M0": "tile_e8m0", "U8": "tile_e8m0", "F32": "tile_f32_e8m0"} | dict.fromkeys(
    _HALVES, "tile_float_e8m0"
)
"""Transforms of block scales, as they lie or spread over tiles, by their dtype on disk."""


def _halves(module: Module) -> dict[str, int | str]:
    """Return the dtype of block scales for a transform whose name does not tell it."""
    return {"scale_dtype": module.scale_dtype} if module.scale_dtype in _HALVES else {}


def _scaled(module: Module) -> dict[str, int | str]:
    """Return the geometry of a matrix for a transform that decodes it, and the dtypes that are not the usual ones."""
    wide = {"weight_dtype": module.found_dtype} if module.found_dtype else {}
    is_float = module.has_scale and module.scale_dtype in FLOATS
    return _geometry(module) | wide | ({"scale_dtype": module.scale_dtype} if is_float else {})


def _geometry(module: Module) -> dict[str, int | str]:
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
            f"{module.weight_name()}: [{rows}, {cols}] with tiles of {module.tile[1]} columns "
            f"cannot be written in groups of {MX_GROUP} without rounding",
            hint="write this part as bf16 instead",
        )
    scales = _stacked(module, rows, cols // MX_GROUP)
    if module.store == "fp4":
        weight = _part("weight", "U32", _stacked(module, rows, cols // 8), "copy", ("weight",), {})
        return Encoding(
            (weight, _part("scales", "U8", scales, E8M0_FROM[module.scale_dtype], ("scale",), _halves(module))),
            MXFP4,
            "mxfp4",
        )
    weight = _part("weight", "U32", _stacked(module, rows, cols // 4), "copy_e4m3", ("weight",), {})
    if module.tile == (1, MX_GROUP):  # as MLX has them already: nothing to spread
        same = _part("scales", "U8", scales, E8M0_FROM[module.scale_dtype], ("scale",), _halves(module))
        return Encoding((weight, same), MXFP8, "mxfp8")
    how = _geometry(module) | _halves(module)
    spread = _part("scales", "U8", scales, TILES_FROM[module.scale_dtype], ("scale",), how)
    return Encoding((weight, spread), MXFP8, "mxfp8")


def _bf16(module: Module) -> Encoding:
    """Dequantized to BF16, exactly as the official code defines it (rounded where BF16 has no such value)."""
    if not module.has_scale:
        return _plain(module)
    rows, cols = module.shape
    if module.store == "fp4" and cols % FP4_GROUP:
        raise InputError(f"{module.weight_name()}: [{rows}, {cols}] in FP4 has no whole groups of {FP4_GROUP} columns")
    transform = {"fp4": "fp4_to_bf16", "fp8": "fp8_to_bf16"}[module.store]
    shape = _stacked(module, *module.shape)
    part = _part("weight", "BF16", shape, transform, ("weight", "scale"), _scaled(module))
    return Encoding((part,), None, "bf16")


PLAIN = {
    ("BF16", "F32"): "widen_bf16", ("F16", "F32"): "widen_f16", ("F32", "BF16"): "narrow_f32",
    ("F16", "BF16"): "narrow_f16",
}  # fmt: skip
"""Transforms of plain tensors by (dtype found, dtype written)."""


def _plain(module: Module) -> Encoding:
    """A tensor as it is: stacked where it is of experts, narrowed where the family says so."""
    shape = _stacked(module, *module.shape)
    suffix = "weight" if module.is_module else ""
    if module.write:
        how: dict[str, int | str] = {"limit": module.values_below}
        if module.found_dtype:
            how["int_dtype"] = module.found_dtype
        part = _part(suffix, module.write, shape, "indices" if module.found_dtype else "narrow_i64", ("weight",), how)
        return Encoding((part,), None, module.write.lower())
    transform = PLAIN.get((module.found_dtype, module.store), "copy")
    part = _part(suffix, module.store, shape, transform, ("weight",), {})
    return Encoding((part,), None, module.store.lower())


SAME_CODES = {("fp4", "mxfp4"), ("fp8", "mxfp8")}
"""Pairs of (source store, codec) where the source's own codes are the result: nothing is rounded."""


ROUNDED_FROM = {"fp4": "quantize_fp4", "fp8": "quantize_fp8", "bf16": "quantize_bf16"}
"""Transforms that round, by how the source stores the matrix."""


def _quantized(codec: Codec, module: Module) -> Encoding:
    """In groups of the codec, rounded from the source's exact values; a matrix that has these codes keeps them."""
    if not module.may_quantize:
        raise InputError(f"{module.weight_name()}: a {module.role} tensor is never quantized; expected native")
    rows, cols = module.shape
    fits = module.store != "fp8" or module.tile[1] % MX_GROUP == 0
    if (module.store, codec.name) in SAME_CODES and cols % MX_GROUP == 0 and fits:
        return _native(module)
    if cols % codec.group_size or (module.store == "fp4" and cols % FP4_GROUP):
        whole = ", ".join(c.name for c in CODECS.values() if cols % c.group_size == 0 and c.bits == codec.bits)
        raise InputError(
            f"{module.weight_name()}: {cols} columns are no whole groups of {codec.group_size} ({codec.name}); "
            f"formats of {codec.bits} bits that fit: {whole or 'none'}; or keep it native"
        )
    words = cols * codec.bits // WORD_BITS
    outputs = [
        Spec("weight", "U32", _stacked(module, rows, words)),
        Spec("scales", codec.scale_dtype, _stacked(module, rows, cols // codec.group_size)),
    ]
    if codec.has_biases:
        outputs.append(Spec("biases", codec.scale_dtype, outputs[1].shape))
    operands = ("weight", "scale") if module.has_scale else ("weight",)
    params = _scaled(module) | {"codec": codec.name}
    transform = ROUNDED_FROM[module.store.lower()]
    return Encoding((Part(tuple(outputs), transform, operands, params),), codec.table(), codec.name)


OFFICIAL = {"U32": "F8_E4M3", "U8": "F8_E8M0"}
"""The official checkpoint's dtypes of the bytes of FP8 with a scale per 32 columns, by those that MLX has for them."""


def as_official(module: Module, encoding: Encoding) -> Encoding:
    """Return an encoding under the names and dtypes of the official checkpoint, for hosts that read tables so.

    The bytes of mxfp8 are the same; dense and affine ones have no other form. Raises `InputError` for the rest.
    """
    if encoding.table is None or encoding.table["mode"] == "affine":
        return encoding
    if encoding.label != "mxfp8":
        raise InputError(
            f"{module.weight_name()}: the hosts of this layout read it as FP8, bf16 or affine, and not as "
            f"{encoding.label}; choose another format for {module.role} (--engram)"
        )
    rows, cols = module.shape
    shapes = {"U32": ("weight", (rows, cols)), "U8": ("scale", (rows, cols // MX_GROUP))}
    return _respecified(encoding, {d: Spec(n, OFFICIAL[d], shape) for d, (n, shape) in shapes.items()}, None)


def as_packed(module: Module, encoding: Encoding) -> Encoding:
    """Return an encoding of which `as_official` may have changed names and dtypes as MLX has it."""
    if encoding.label != "mxfp8" or encoding.table is not None:
        return encoding
    rows, cols = module.shape
    packed = {"F8_E4M3": Spec("weight", "U32", (rows, cols // 4))}
    packed["F8_E8M0"] = Spec("scales", "U8", (rows, cols // MX_GROUP))
    return _respecified(encoding, packed, MXFP8)


def _respecified(encoding: Encoding, specs: Mapping[str, Spec], table: Mapping[str, int | str] | None) -> Encoding:
    parts = tuple(replace(p, outputs=tuple(specs[s.dtype] for s in p.outputs)) for p in encoding.parts)
    return Encoding(parts, table, encoding.label)


ENCODERS: Mapping[str, Callable[[Module], Encoding]] = {
    "native": _native,
    "bf16": _bf16,
    **{codec.name: partial(_quantized, codec) for codec in CODECS.values()},
}
"""What a module becomes in each format, by the name that users write. Raises `InputError` where it cannot."""


def codec_of(name: str) -> Codec | None:
    """Return the codec that a format of quantized matrices is written by; None for formats that are not quantized."""
    return CODECS.get(name)


__all__ = [
    "ENCODERS",
    "FP4_GROUP",
    "MXFP4",
    "MXFP8",
    "MX_GROUP",
    "Encoding",
    "Part",
    "Spec",
    "as_official",
    "as_packed",
    "codec_of",
]
