"""The making of output bytes from source bytes, piece by piece. Pure: reading is handed in, nothing is written.

Each transform is a generator of `Piece`s of about a megabyte. A piece is either bytes, or a source range that the
executor may move as it is (by the kernel, if it can). Faulty values raise `ValueFault` with tensor and index.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from ds4convert.errors import ValueFault
from ds4convert.formats import blocks, scalars
from ds4convert.formats.codecs import CODECS
from ds4convert.formats.encode import decode
from ds4convert.headers import DTYPE_BYTES
from ds4convert.types import ByteRange, Loss, Step

CHUNK_BYTES = 1 << 20
"""Size of one piece: large enough for sequential disk speed, small enough to stay in a core's cache on its way."""

Read = Callable[[ByteRange], bytes]
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

    def fault(self, element: int, what: str) -> NoReturn:
        """Raise `ValueFault` for the element at byte-per-element position `element`, naming tensor and index."""
        names, shape = self._step.sources[self._number], self._step.source_shapes[self._number]
        expert, rest = divmod(element, math.prod(shape))
        index = [int(i) for i in np.unravel_index(rest, shape)]
        first = numbers(self._step).get("fused_first_row" if self._number == 0 else "fused_first_scale_row")
        if first is not None:  # one tensor [E, rows of all parts, in] holds the slices of all experts
            index = [expert, first + index[0], *index[1:]]
        name, place = names[0 if first is not None else expert], ", ".join(map(str, index))
        raise ValueFault(f"{name}: element [{place}] is {what}; the checkpoint is damaged, download the file again")


def copy(step: Step, read: Read) -> Iterator[Piece]:
    """Every byte as it is."""
    for at, r in Operand(step, 0, read).chunks():
        yield Piece(0, at, source=r)


def widen_bf16(step: Step, read: Read) -> Iterator[Piece]:
    """BF16 as F32: the same values."""
    operand = Operand(step, 0, read)
    for at, r in operand.chunks(CHUNK_BYTES // 2):
        yield Piece(0, at * 2, data=as_bytes(scalars.bf16_values(np.frombuffer(operand.read(r), "<u2"))))


def _copy_without(step: Step, read: Read, codes: tuple[int, ...], what: str) -> Iterator[Piece]:
    operand = Operand(step, 0, read)
    for at, r in operand.chunks():
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
    return _copy_without(step, read, scalars.E4M3_NAN_CODES, "NaN in FP8 E4M3")


def copy_e8m0(step: Step, read: Read) -> Iterator[Piece]:
    """E8M0 scales as they are; a NaN scale stops the run."""
    return _copy_without(step, read, (scalars.E8M0_NAN_CODE,), "NaN in E8M0 block scales")


def tile_e8m0(step: Step, read: Read) -> Iterator[Piece]:
    """Tile scales spread over rows and groups of 32 columns, one matrix (of one expert) at a time.

    Params: rows, cols, tile_rows, tile_cols. Output uint8 `[experts, rows, cols/32]`.
    """
    p = numbers(step)
    tile = (p["tile_rows"], p["tile_cols"])
    grid_rows, grid_cols = -(-p["rows"] // tile[0]), -(-p["cols"] // tile[1])
    each_in, each_out = grid_rows * grid_cols, p["rows"] * (p["cols"] // blocks.MX_GROUP)
    operand = Operand(step, 0, read)
    for expert in range(operand.size // each_in):
        data = operand.get(expert * each_in, each_in)
        check_codes(operand, data, expert * each_in, (scalars.E8M0_NAN_CODE,), "NaN in E8M0 block scales")
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
        yield Piece(0, row * p["cols"] * 2, data=as_bytes(scalars.bf16_bits(values)))


def narrow_i64(step: Step, read: Read) -> Iterator[Piece]:
    """I64 as I32; a value below 0 or not below `limit` (param) stops the run."""
    operand, limit = Operand(step, 0, read), numbers(step)["limit"]
    for at, r in operand.chunks():
        values = np.frombuffer(operand.read(r), "<i8")
        bad = np.flatnonzero((values < 0) | (values >= limit))
        if bad.size:
            operand.fault(at // 8 + int(bad[0]), f"{int(values[bad[0]])}, expected 0 to {limit - 1}")
        yield Piece(0, at // 2, data=as_bytes(values.astype("<i4")))


def fp4_to_bf16(step: Step, read: Read) -> Iterator[Piece]:
    """Packed FP4 and its scales, dequantized to BF16 in row chunks. Params: rows, cols."""
    p = numbers(step)
    weight, scale = Operand(step, 0, read), Operand(step, 1, read)
    row_bytes, row_scales = p["cols"] // 2, p["cols"] // blocks.MX_GROUP
    for first, rows in row_chunks(weight.size // row_bytes, p["cols"] * 4):
        codes = np.frombuffer(weight.get(first * row_bytes, rows * row_bytes), np.uint8).reshape(rows, -1)
        raw = scale.get(first * row_scales, rows * row_scales)
        check_codes(scale, raw, first * row_scales, (scalars.E8M0_NAN_CODE,), "NaN in E8M0 block scales")
        scales = np.frombuffer(raw, np.uint8).reshape(rows, -1)
        yield _bf16_piece(blocks.decode_fp4(codes, scales), first * p["cols"])


def fp8_to_bf16(step: Step, read: Read) -> Iterator[Piece]:
    """FP8 and its tile scales, dequantized to BF16 in row chunks. Params: rows, cols, tile_rows, tile_cols."""
    p = numbers(step)
    tile = (p["tile_rows"], p["tile_cols"])
    grid_rows, grid_cols = -(-p["rows"] // tile[0]), -(-p["cols"] // tile[1])
    weight, scale = Operand(step, 0, read), Operand(step, 1, read)
    each = grid_rows * grid_cols
    for expert in range(scale.size // each):
        raw = scale.get(expert * each, each)
        check_codes(scale, raw, expert * each, (scalars.E8M0_NAN_CODE,), "NaN in E8M0 block scales")
        grid = np.frombuffer(raw, np.uint8).reshape(grid_rows, grid_cols)
        start = expert * p["rows"]
        for first, rows in row_chunks(p["rows"], p["cols"] * 4):
            at = (start + first) * p["cols"]
            data = weight.get(at, rows * p["cols"])
            check_codes(weight, data, at, scalars.E4M3_NAN_CODES, "NaN in FP8 E4M3")
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


def _bf16_piece(values: scalars.F32, element: int) -> Piece:
    bits = scalars.bf16_bits(values)
    return Piece(0, element * DTYPE_BYTES["BF16"], data=as_bytes(bits))


TRANSFORMS: Mapping[str, Callable[[Step, Read], Iterator[Piece]]] = {
    f.__name__: f for f in (copy, widen_bf16, copy_e4m3, copy_e8m0, tile_e8m0, narrow_i64, fp4_to_bf16, fp8_to_bf16,
                              codec_to_bf16)
}  # fmt: skip
"""All transforms by the name that a plan uses."""
