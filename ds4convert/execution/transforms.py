"""The making of output bytes from source bytes, piece by piece. Pure: reading is handed in, nothing is written.

Each transform is a generator of `Piece`s of about a megabyte. A piece is either bytes, or a source range that the
executor may move as it is (by the kernel, if it can). Faulty values raise `ValueFault` with tensor and index.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from ds4convert.checkpoint.headers import DTYPE_BYTES
from ds4convert.errors import ValueFault
from ds4convert.formats import blocks, small_floats
from ds4convert.formats.codecs import CODECS
from ds4convert.formats.rounding import decode
from ds4convert.planning.types import Loss, Step
from ds4convert.storage.byte_source import Read
from ds4convert.storage.records import ByteRange

CHUNK_BYTES = 1 << 20
"""Size of one piece: large enough for sequential disk speed, small enough to stay in a core's cache on its way."""
PASSED = "passed"
"""A param of steps that a run goes on with: how many of its pieces (or jobs) an earlier run has written."""

MAY_PASS = ("copy", "copy_e4m3", "copy_e8m0")
"""Transforms that can begin after some of their pieces, without reading what these came from; so can all that round."""

Buffer = bytes | memoryview


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of output number `output` of a step at `offset`: either `data`, or to be moved from `source`.

    The pieces of each output come in order. `loss` is what rounding these weights cost, on one of their pieces.
    """

    output: int
    offset: int
    data: Buffer | None = None
    source: ByteRange | None = None
    loss: Loss | None = None


@dataclass(frozen=True)
class Job:
    """Work that takes long: `work` may run on any core, in any process; `finish` makes its result pieces, here.

    The pieces take the job's place among those of the transform.
    """

    work: Callable[[], Any]
    finish: Callable[[Any], Sequence[Piece]]


class Operand:
    """One operand of a step as a single run of bytes, whatever ranges it lies in."""

    def __init__(self, step: Step, number: int, read: Read) -> None:
        self.ranges = step.operands[number]
        self.size = sum(r.size for r in self.ranges)
        self._read = read
        self._step = step
        self._number = number

    def unread(self, size: int = CHUNK_BYTES) -> Iterator[tuple[int, ByteRange]]:
        """Yield what `chunks` yields, without those that a run is to pass over (param `passed`)."""
        return islice(self.chunks(size), int(self._step.params.get(PASSED, 0)), None)

    def chunks(self, size: int = CHUNK_BYTES) -> Iterator[tuple[int, ByteRange]]:
        """Yield (position in the operand, range of at most `size` bytes) in order."""
        at = 0
        for r in self.ranges:
            for start in range(0, r.size, size):
                n = min(size, r.size - start)
                yield at + start, ByteRange(r.file, r.offset + start, n)
            at += r.size

    def get(self, start: int, size: int) -> bytes:
        """Return `size` bytes from position `start` of the operand."""
        out, at, end = [], 0, start + size
        for r in self.ranges:
            low, high = max(start, at), min(end, at + r.size)
            if low < high:
                out.append(self._read(ByteRange(r.file, r.offset + low - at, high - low)))
            at += r.size
            if at >= end:
                break
        return out[0] if len(out) == 1 else b"".join(out)

    def read(self, r: ByteRange) -> bytes:
        """Return the bytes of a range that `chunks` gave."""
        return self._read(r)

    def fault(
        self, element: int, what: str, hint: str = "the checkpoint is damaged, download the file again"
    ) -> NoReturn:
        """Raise `ValueFault` for the element at byte-per-element position `element`, naming tensor and index."""
        names, shape = self._step.sources[self._number], self._step.source_shapes[self._number]
        expert, rest = divmod(element, math.prod(shape))
        index = [int(i) for i in np.unravel_index(rest, shape)]
        first = numbers(self._step).get("fused_first_row" if self._number == 0 else "fused_first_scale_row")
        if first is not None:  # one tensor [E, rows of all parts, in] holds the slices of all experts
            index = [expert, first + index[0], *index[1:]]
        name, place = names[0 if first is not None else expert], ", ".join(map(str, index))
        raise ValueFault(f"{name}: element [{place}] is {what}; {hint}", tensor=name, hint=hint)


class FloatScales(Operand):
    """Block scales stored as floats, read as the E8M0 bytes of the same values: sizes and places count scales.

    A scale that is no power of two stops the run: E8M0 has no such value, and a rounded one would be another weight.
    """

    def __init__(self, step: Step, number: int, read: Read) -> None:
        super().__init__(step, number, read)
        self.dtype = str(step.params.get("scale_dtype", "F32"))
        self.width = DTYPE_BYTES[self.dtype]
        self.size //= self.width

    def get(self, start: int, size: int) -> bytes:
        """Return `size` scales from number `start`, one byte each."""
        values = small_floats.as_f32(super().get(start * self.width, size * self.width), self.dtype)
        codes, wrong = small_floats.e8m0_codes(values)
        if wrong is not None:
            self.fault(
                start + wrong,
                f"{values[wrong]:.9g}, which is no power of two, so MLX's block scales (E8M0) cannot hold it without "
                "rounding",
                "take the release of this model whose scales are powers of two (scale_fmt ue8m0), or dequantize it to "
                "BF16 with the program that made it and convert that",
            )
        return codes.tobytes()


class Narrowed(Operand):
    """Weights stored in F32 or F16 (param `weight_dtype`), read as the BF16 of the same values, two bytes each.

    A value that BF16 has not stops the run: a rounded one would be another weight.
    """

    def __init__(self, step: Step, number: int, read: Read, dtype: str = "") -> None:
        super().__init__(step, number, read)
        self.dtype = dtype or str(step.params["weight_dtype"])
        self.width = DTYPE_BYTES[self.dtype]
        self.size = self.size // self.width * BF16_BYTES

    def get(self, start: int, size: int) -> bytes:
        """Return `size` bytes of BF16 from byte `start`, which are whole numbers of values."""
        first, count = start // BF16_BYTES, size // BF16_BYTES
        values = small_floats.as_f32(super().get(first * self.width, count * self.width), self.dtype)
        bits = values.view(np.uint32)
        bad = np.flatnonzero(bits & 0xFFFF)
        if bad.size:
            self.fault(
                first + int(bad[0]),
                f"{values[bad[0]]:.9g} in {self.dtype}, where the model has BF16, which cannot hold it without "
                "rounding",
                "save this tensor in BF16 with the program that made the checkpoint",
            )
        return (bits >> 16).astype("<u2").tobytes()


BF16_BYTES = 2


def weights_of(step: Step, read: Read) -> Operand:
    """Return the first operand of a step that rounds: in the usual dtype, whichever it is stored in."""
    return (Narrowed if "weight_dtype" in step.params else Operand)(step, 0, read)


def scales_of(step: Step, number: int, read: Read) -> Operand:
    """Return the operand of block scales, as E8M0 bytes, whichever dtype they are stored in."""
    return (FloatScales if step.params.get("scale_dtype") in small_floats.FLOATS else Operand)(step, number, read)


_ONLY_SCALES = ("narrow_f32_e8m0", "tile_f32_e8m0", "narrow_float_e8m0", "tile_float_e8m0")
NARROWING = {"narrow_f32": "F32", "narrow_f16": "F16"}
"""Transforms of plain tensors that BF16 has to hold, by the dtype that they are in."""


def as_floats(step: Step, read: Read) -> Iterator[FloatScales]:
    """Yield the operands of a step that are block scales in floats."""
    if step.transform in _ONLY_SCALES:
        yield FloatScales(step, 0, read)
    elif step.params.get("scale_dtype") in small_floats.FLOATS:
        yield FloatScales(step, 1, read)


def to_be_narrowed(step: Step, read: Read) -> Iterator[Narrowed]:
    """Yield the operand of a step that is of weights in F32 or F16 which BF16 has to hold."""
    if step.transform in NARROWING or "weight_dtype" in step.params:
        yield Narrowed(step, 0, read, NARROWING.get(step.transform, ""))


def copy(step: Step, read: Read) -> Iterator[Piece]:
    """Every byte as it is."""
    for at, r in Operand(step, 0, read).unread():
        yield Piece(0, at, source=r)


def widen_bf16(step: Step, read: Read) -> Iterator[Piece]:
    """BF16 as F32: the same values."""
    operand = Operand(step, 0, read)
    for at, r in operand.chunks(CHUNK_BYTES // 2):
        yield Piece(0, at * 2, data=as_bytes(small_floats.bf16_values(np.frombuffer(operand.read(r), "<u2"))))


def widen_f16(step: Step, read: Read) -> Iterator[Piece]:
    """F16 as F32: the same values."""
    operand = Operand(step, 0, read)
    for at, r in operand.chunks(CHUNK_BYTES // 2):
        yield Piece(0, at * 2, data=as_bytes(small_floats.as_f32(operand.read(r), "F16")))


def narrow_f32(step: Step, read: Read) -> Iterator[Piece]:
    """F32 as BF16 where BF16 holds every value; another value stops the run."""
    yield from narrow_f16(step, read)


def narrow_f16(step: Step, read: Read) -> Iterator[Piece]:
    """F16 as BF16 where BF16 holds every value; another value stops the run."""
    operand = Narrowed(step, 0, read, NARROWING[step.transform])
    for first, count in row_chunks(operand.size // BF16_BYTES, operand.width):
        at = first * BF16_BYTES
        yield Piece(0, at, data=operand.get(at, count * BF16_BYTES))


def narrow_f32_e8m0(step: Step, read: Read) -> Iterator[Piece]:
    """F32 block scales as the E8M0 bytes of the same powers of two; another value stops the run."""
    yield from narrow_float_e8m0(step, read)


def narrow_float_e8m0(step: Step, read: Read) -> Iterator[Piece]:
    """Block scales in a float (param `scale_dtype`) as the E8M0 bytes of the same powers of two."""
    operand = FloatScales(step, 0, read)
    for first, count in row_chunks(operand.size, operand.width):
        yield Piece(0, first, data=operand.get(first, count))


def _copy_without(step: Step, read: Read, codes: tuple[int, ...], what: str) -> Iterator[Piece]:
    operand = Operand(step, 0, read)
    for at, r in operand.unread():
        data = operand.read(r)
        check_codes(operand, data, at, codes, what)
        yield Piece(0, at, data=data)


def check_codes(operand: Operand, data: bytes, at: int, codes: tuple[int, ...], what: str) -> None:
    """Raise `ValueFault` if one of `codes` is among the bytes `data`, which begin at position `at`."""
    for code in codes:
        found = data.find(code)
        if found >= 0:
            operand.fault(at + found, f"{what} (byte 0x{code:02X})")


def copy_e4m3(step: Step, read: Read) -> Iterator[Piece]:
    """FP8 codes as they are; a NaN code stops the run."""
    return _copy_without(step, read, small_floats.E4M3_NAN_CODES, "NaN in FP8 E4M3")


def copy_e8m0(step: Step, read: Read) -> Iterator[Piece]:
    """E8M0 scales as they are; a NaN scale stops the run."""
    return _copy_without(step, read, (small_floats.E8M0_NAN_CODE,), "NaN in E8M0 block scales")


def tile_f32_e8m0(step: Step, read: Read) -> Iterator[Piece]:
    """As `tile_e8m0`, of scales stored as F32 powers of two."""
    yield from tile_e8m0(step, read, FloatScales)


def tile_float_e8m0(step: Step, read: Read) -> Iterator[Piece]:
    """As `tile_e8m0`, of scales stored as powers of two in a float (param `scale_dtype`)."""
    yield from tile_e8m0(step, read, FloatScales)


def tile_e8m0(step: Step, read: Read, operand_of: type[Operand] | None = None) -> Iterator[Piece]:
    """Tile scales spread over rows and groups of 32 columns, one matrix (of one expert) at a time.

    Params: rows, cols, tile_rows, tile_cols. Output uint8 `[experts, rows, cols/32]`.
    """
    p = numbers(step)
    tile = (p["tile_rows"], p["tile_cols"])
    grid_rows, grid_cols = -(-p["rows"] // tile[0]), -(-p["cols"] // tile[1])
    each_in, each_out = grid_rows * grid_cols, p["rows"] * (p["cols"] // blocks.MX_GROUP)
    operand = (operand_of or Operand)(step, 0, read)
    for expert in range(operand.size // each_in):
        data = operand.get(expert * each_in, each_in)
        check_codes(operand, data, expert * each_in, (small_floats.E8M0_NAN_CODE,), "NaN in E8M0 block scales")
        grid = np.frombuffer(data, np.uint8).reshape(grid_rows, grid_cols)
        scales = np.ascontiguousarray(blocks.mx_scales(grid, p["rows"], p["cols"], tile))
        yield Piece(0, expert * each_out, data=as_bytes(scales))


def codec_to_bf16(step: Step, read: Read) -> Iterator[Piece]:
    """Rows of a codec (param `from`; operands weight, scales, and biases where it has them) decoded to BF16."""
    p, codec = numbers(step), CODECS[str(step.params["from"])]
    operands = [Operand(step, n, read) for n in range(len(step.operands))]
    rows = step.outputs[0].size // 2 // p["cols"]
    groups, wide = p["cols"] // codec.group_size, 2 if codec.scale_dtype == "BF16" else 1
    widths = (p["cols"] * codec.bits // 8, groups * wide, groups * wide)
    dtypes = ("<u4", *["<u2" if wide == 2 else "u1"] * 2)
    for row, count in row_chunks(rows, p["cols"] * 2, CHUNK_BYTES):
        parts = [
            np.frombuffer(o.get(row * w, count * w), d).reshape(count, -1)
            for o, w, d in zip(operands, widths, dtypes, strict=False)
        ]
        values = decode(codec, parts[0], parts[1], parts[2] if len(parts) > 2 else None)
        yield Piece(0, row * p["cols"] * 2, data=as_bytes(small_floats.bf16_bits(values)))


PRUNED = (
    "config.json's n_routed_experts allows no such expert. If experts were pruned, this table has to be re-mapped with "
    "the program that pruned them; else the checkpoint is damaged, download the file again"
)


def narrow_i64(step: Step, read: Read) -> Iterator[Piece]:
    """I64 as I32; a value below 0 or not below `limit` (param) stops the run."""
    yield from indices(step, read)


def indices(step: Step, read: Read) -> Iterator[Piece]:
    """Integers (param `int_dtype`, else I64) as I32; a value below 0 or not below `limit` (param) stops the run."""
    operand, limit = Operand(step, 0, read), numbers(step)["limit"]
    dtype = str(step.params.get("int_dtype", "I64"))
    width = DTYPE_BYTES[dtype]
    for at, r in operand.chunks(CHUNK_BYTES // 4 * width // 2):
        values = np.frombuffer(operand.read(r), f"<{dtype[0].lower()}{width}")
        bad = np.flatnonzero((values < 0) | (values >= limit))
        if bad.size:
            operand.fault(at // width + int(bad[0]), f"{int(values[bad[0]])}, expected 0 to {limit - 1}", PRUNED)
        yield Piece(0, at // width * 4, data=as_bytes(values.astype("<i4")))


def fp4_to_bf16(step: Step, read: Read) -> Iterator[Piece]:
    """Packed FP4 and its scales, dequantized to BF16 in row chunks. Params: rows, cols."""
    p = numbers(step)
    weight, scale = Operand(step, 0, read), scales_of(step, 1, read)
    row_bytes, row_scales = p["cols"] // 2, p["cols"] // blocks.MX_GROUP
    for first, rows in row_chunks(weight.size // row_bytes, p["cols"] * 4):
        codes = np.frombuffer(weight.get(first * row_bytes, rows * row_bytes), np.uint8).reshape(rows, -1)
        raw = scale.get(first * row_scales, rows * row_scales)
        check_codes(scale, raw, first * row_scales, (small_floats.E8M0_NAN_CODE,), "NaN in E8M0 block scales")
        scales = np.frombuffer(raw, np.uint8).reshape(rows, -1)
        yield _bf16_piece(blocks.decode_fp4(codes, scales), first * p["cols"])


def fp8_to_bf16(step: Step, read: Read) -> Iterator[Piece]:
    """FP8 and its tile scales, dequantized to BF16 in row chunks. Params: rows, cols, tile_rows, tile_cols."""
    p = numbers(step)
    tile = (p["tile_rows"], p["tile_cols"])
    grid_rows, grid_cols = -(-p["rows"] // tile[0]), -(-p["cols"] // tile[1])
    weight, scale = Operand(step, 0, read), scales_of(step, 1, read)
    each = grid_rows * grid_cols
    for expert in range(scale.size // each):
        raw = scale.get(expert * each, each)
        check_codes(scale, raw, expert * each, (small_floats.E8M0_NAN_CODE,), "NaN in E8M0 block scales")
        grid = np.frombuffer(raw, np.uint8).reshape(grid_rows, grid_cols)
        start = expert * p["rows"]
        for first, rows in row_chunks(p["rows"], p["cols"] * 4):
            at = (start + first) * p["cols"]
            data = weight.get(at, rows * p["cols"])
            check_codes(weight, data, at, small_floats.E4M3_NAN_CODES, "NaN in FP8 E4M3")
            codes = np.frombuffer(data, np.uint8).reshape(rows, -1)
            yield _bf16_piece(blocks.decode_fp8(codes, grid, first, tile), at)


def numbers(step: Step) -> dict[str, int]:
    """Return the parameters of a step that are numbers."""
    return {k: v for k, v in step.params.items() if isinstance(v, int)}


def as_bytes(values: NDArray[Any]) -> memoryview:
    """Return the bytes of a contiguous array, not copied."""
    return values.reshape(-1).view(np.uint8).data


def row_chunks(rows: int, row_size: int, size: int = CHUNK_BYTES) -> Iterator[tuple[int, int]]:
    """Yield (first row, number of rows) in chunks of about `size`, where a row takes `row_size`."""
    step = max(1, size // max(row_size, 1))
    for first in range(0, rows, step):
        yield first, min(step, rows - first)


def _bf16_piece(values: small_floats.F32, element: int) -> Piece:
    bits = small_floats.bf16_bits(values)
    return Piece(0, element * DTYPE_BYTES["BF16"], data=as_bytes(bits))


TRANSFORMS: Mapping[str, Callable[[Step, Read], Iterator[Piece]]] = {
    "copy": copy,
    "widen_bf16": widen_bf16,
    "copy_e4m3": copy_e4m3,
    "copy_e8m0": copy_e8m0,
    "tile_e8m0": tile_e8m0,
    "narrow_i64": narrow_i64,
    "fp4_to_bf16": fp4_to_bf16,
    "fp8_to_bf16": fp8_to_bf16,
    "codec_to_bf16": codec_to_bf16,
    "narrow_f32": narrow_f32,
    "narrow_f32_e8m0": narrow_f32_e8m0,
    "tile_f32_e8m0": tile_f32_e8m0,
    "widen_f16": widen_f16,
    "narrow_f16": narrow_f16,
    "narrow_float_e8m0": narrow_float_e8m0,
    "tile_float_e8m0": tile_float_e8m0,
    "indices": indices,
}
"""All transforms that round nothing, by their names on disk: in plans, whose ids come from them, and in manifests.

A function may get another name, a key never: plans and manifests that people have would name what is not there.
"""
