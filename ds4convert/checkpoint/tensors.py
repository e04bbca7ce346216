"""Tensors by logical key, however they are stored: byte ranges, block scales, decoded rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from ds4convert.checkpoint.folder import Checkpoint
from ds4convert.checkpoint.headers import DTYPE_BYTES
from ds4convert.checkpoint.inventory import Inventory, Module, fused_name, key_of
from ds4convert.checkpoint.names import Named
from ds4convert.checkpoint.types import TensorInfo
from ds4convert.formats import blocks, rounding, small_floats
from ds4convert.formats.codecs import CODECS, Codec
from ds4convert.storage.byte_source import ByteSource, Cached, Numbered, are_here, extents
from ds4convert.storage.records import ByteRange

ROWS_BYTES = 8 << 20
U8 = small_floats.U8


@dataclass(frozen=True, slots=True)
class LogicalTensor:
    """One logical tensor: `matrices` slices (experts) of `[rows, cols]`, each found at one byte range.

    `store` is how values lie in those bytes: fp4 (also mxfp4), fp8 (tiles), mxfp8, another codec's name, or a plain
    dtype in lower case. `bias_at` is empty but for affine codecs. `official`: a converted folder has it under the
    official checkpoint's dtypes.
    """

    key: str
    name: str
    file: str
    shape: tuple[int, ...]
    rows: int
    cols: int
    store: str
    weight_at: tuple[ByteRange, ...]
    scale_at: tuple[ByteRange, ...]
    tile: tuple[int, int]
    part: str
    role: str
    layer: int | None
    size: int
    bias_at: tuple[ByteRange, ...] = ()
    scale_dtype: str = "F8_E8M0"
    official: bool = False

    @property
    def codec(self) -> Codec | None:
        """Return the codec of a tensor in groups, None for plain tensors and the source's own tiles."""
        return CODECS.get("mxfp4" if self.store == "fp4" else self.store)

    @property
    def matrices(self) -> int:
        """Return the number of slices."""
        return len(self.weight_at)

    @property
    def label(self) -> str:
        """Return the format as people call it."""
        return {"fp4": "fp4", "fp8": "fp8"}.get(self.store, self.store)

    def row_bytes(self) -> int:
        """Return the bytes of one row of codes."""
        return self.weight_at[0].size // self.rows


@dataclass(frozen=True)
class TensorView:
    """All logical tensors of a folder by key, with what reads their bytes: files by number, as `ByteRange.file`."""

    kind: str
    tensors: Mapping[str, LogicalTensor]
    names: tuple[str, ...]
    source: ByteSource

    def reader(self) -> Numbered:
        """Return what reads the tensors; the caller closes it. Blocks of files that are elsewhere are kept a while."""
        if are_here(self.source, self.names):
            return Numbered(self.source, self.names)
        ranges = (r for t in self.tensors.values() for r in (*t.weight_at, *t.scale_at, *t.bias_at))
        return Numbered(Cached(self.source, extents(ranges, self.names)), self.names)


def codes(view: LogicalTensor, reader: Numbered, matrix: int, first: int, rows: int) -> U8:
    """Return the stored codes of some rows of one slice, uint8 `[rows, row_bytes]`."""
    width = view.row_bytes()
    raw = reader.get(view.weight_at[matrix], first * width, rows * width)
    return np.frombuffer(raw, np.uint8).reshape(rows, width)


@dataclass(frozen=True)
class Grid:
    """Scales of one slice, and biases where its codec has them: uint8, or uint16 (BF16 bits), one row per row."""

    scales: np.ndarray
    biases: small_floats.U16 | None = None

    def equals(self, other: Grid, rows: slice) -> bool:
        """Return whether some rows of both are the same bytes."""
        pairs = ((self.scales, other.scales), (self.biases, other.biases))
        return all(a is b or (a is not None and b is not None and np.array_equal(a[rows], b[rows])) for a, b in pairs)


def grid_of(view: LogicalTensor, reader: Numbered, matrix: int) -> Grid | None:
    """Return all scales (and biases) of one slice, `[scale rows, scale columns]`; None for a plain tensor."""
    if not view.scale_at:
        return None
    codec = view.codec
    width = -(-view.cols // view.tile[1]) if codec is None else view.cols // codec.group_size
    if view.scale_dtype in small_floats.FLOATS:
        raw = reader.get(view.scale_at[matrix], 0, view.scale_at[matrix].size)
        values = small_floats.as_f32(raw, view.scale_dtype)
        return Grid(small_floats.e8m0_bytes(values, view.name).reshape(-1, width))
    dtype = "<u2" if codec is not None and codec.scale_dtype == "BF16" else np.uint8
    read = [np.frombuffer(reader.get(at[matrix], 0, at[matrix].size), dtype).reshape(-1, width)
            for at in (view.scale_at, view.bias_at) if at]  # fmt: skip
    return Grid(*read)


def decode(view: LogicalTensor, packed: U8, grid: Grid | None, first: int) -> np.ndarray:
    """Return the values of some rows (from `first`) by codes and scales: float32, integers and F64 as they are."""
    if grid is not None:
        rows, codec = slice(first, first + packed.shape[0]), view.codec
        if codec is None:
            return blocks.decode_fp8(packed, grid.scales, first, view.tile)
        if codec.name == "mxfp4":
            return blocks.decode_fp4(packed, grid.scales[rows])
        if codec.name == "mxfp8":
            return blocks.decode_mxfp8(packed, grid.scales[rows])
        biases = None if grid.biases is None else grid.biases[rows]
        values: np.ndarray = rounding.decode(codec, packed.view("<u4"), grid.scales[rows], biases)
        return values
    if view.store == "bf16":
        return small_floats.bf16_values(packed.view("<u2"))
    dtype = _NUMBERS.get(view.store)
    return packed.view(dtype) if dtype else packed


_NUMBERS = {
    "f32": "<f4", "f16": "<f2", "f64": "<f8",
    "i64": "<i8", "i32": "<i4", "i16": "<i2", "i8": "i1", "u64": "<u8", "u32": "<u4", "u16": "<u2",
}  # fmt: skip


def row_chunks(view: LogicalTensor) -> Iterator[tuple[int, int, int]]:
    """Yield (slice, first row, rows) in pieces whose float32 values take about 8 MB."""
    step = max(1, ROWS_BYTES // max(view.cols * 4, 1))
    for matrix in range(view.matrices):
        for first in range(0, view.rows, step):
            yield matrix, first, min(step, view.rows - first)


def _geometry(module: Module) -> tuple[tuple[int, ...], int, int]:
    shape = (module.experts, *module.shape) if module.experts else module.shape
    cols = module.shape[-1]
    return shape, math.prod(module.shape) // cols, cols


def source_view(checkpoint: Checkpoint, inventory: Inventory, named: Named) -> TensorView:
    """Return the logical tensors of a source; no module that lacks a tensor."""
    out: dict[str, LogicalTensor] = {}
    for module in inventory.modules:
        found = _source_ranges(module, named)
        if found is None:
            continue
        weight, scale, info = found
        shape, rows, cols = _geometry(module)
        store = module.store if module.has_scale else info.dtype.lower()
        size = sum(r.size for r in (*weight, *scale))
        out[key_of(module)] = LogicalTensor(
            key_of(module), info.name, checkpoint.file_names[info.file], shape, rows, cols, store,
            weight, scale, module.tile, module.part, module.role, module.block, size, scale_dtype=module.scale_dtype,
        )  # fmt: skip
    return TensorView("source", out, checkpoint.file_names, checkpoint.bytes)


def _source_ranges(
    module: Module, named: Named
) -> tuple[tuple[ByteRange, ...], tuple[ByteRange, ...], TensorInfo] | None:
    if module.fused is not None:
        return _fused_ranges(module, named)
    experts = range(module.experts or 1)
    weights = [named.tensors.get(module.weight_name(e)) for e in experts]
    found_scales = [named.tensors.get(module.scale_name(e)) for e in experts] if module.has_scale else []
    whole = [t for t in [*weights, *found_scales] if t is not None]
    if len(whole) < len(weights) + len(found_scales):
        return None
    ranges = [ByteRange(t.file, t.start, t.size) for t in whole]
    return tuple(ranges[: len(weights)]), tuple(ranges[len(weights) :]), whole[0]


def _fused_ranges(
    module: Module, named: Named
) -> tuple[tuple[ByteRange, ...], tuple[ByteRange, ...], TensorInfo] | None:
    assert module.fused is not None
    parts = len(module.fused.parts)
    at = module.fused.parts.index(module.name.rpartition(".")[2])
    out = []
    for suffix in ("", module.fused_scale) if module.has_scale else ("",):
        info = named.tensors.get(fused_name(module) + suffix)
        if info is None:
            return None
        each = info.size // (module.experts * parts)
        starts = [info.start + (e * parts + at) * each for e in range(module.experts)]
        out.append((tuple(ByteRange(info.file, s, each) for s in starts), info))
    return out[0][0], out[1][0] if len(out) > 1 else (), out[0][1]


def plain_view(checkpoint: Checkpoint) -> TensorView:
    """Return every tensor of files that no family explains, each under its own name."""
    out = {t.name: _plain(t, checkpoint.file_names[t.file], 0) for t in checkpoint.tensors() if t.size}
    return TensorView("plain", out, checkpoint.file_names, checkpoint.bytes)


def _plain(t: TensorInfo, file: str, shift: int) -> LogicalTensor:
    """Return a tensor that nothing explains as a logical tensor of its own."""
    cols = t.shape[-1] if t.shape else 1
    rows = max(math.prod(t.shape) // cols, 1) if cols else 1
    return LogicalTensor(
        t.name, t.name, file, t.shape, rows, t.size // rows // DTYPE_BYTES[t.dtype],
        t.dtype.lower(), (ByteRange(t.file + shift, t.start, t.size),), (), (1, 1), "", "", None, t.size,
    )  # fmt: skip


def shifted(tensor: LogicalTensor, by: int) -> LogicalTensor:
    """Return a logical tensor whose files are counted from `by`."""
    weight, scale, bias = (
        tuple(replace(r, file=r.file + by) for r in at) for at in (tensor.weight_at, tensor.scale_at, tensor.bias_at)
    )
    return replace(tensor, weight_at=weight, scale_at=scale, bias_at=bias)
