"""Steps that round: a source's exact values in row chunks, encoded by a codec, with what the rounding cost.

Each chunk is a `Job`: what was read, as a `Chunk` that any process can encode, and what to do with the result. A chunk
lies within one matrix (of one expert), as importance is given per matrix. Faulty values raise `ValueFault` with tensor
and index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ds4convert.formats import blocks, scalars
from ds4convert.formats.codecs import CODECS
from ds4convert.formats.encode import Encoded, decode, encode, encode_fp4
from ds4convert.formats.transforms import (
    TRANSFORMS,
    Job,
    Operand,
    Piece,
    Read,
    as_bytes,
    check_codes,
    numbers,
    row_chunks,
)
from ds4convert.types import Loss, Step

CHUNK_VALUES = 1 << 19
"""Weights that one job rounds: enough to outweigh the cost of a call, few enough for small buffers."""

Importance = Callable[[str, int], "scalars.F32 | None"]
"""Returns the importance of the input columns of a module (by key) and expert, or None where all count alike."""


def no_importance(key: str, expert: int) -> scalars.F32 | None:
    """Return None: all columns count alike."""
    return None


@dataclass(frozen=True)
class Unfit:
    """The first value of a chunk that no quantized format holds: its place among the chunk's values, and the value."""

    at: int
    value: float


@dataclass(frozen=True)
class Chunk:
    """Rows of one matrix as they were read, and how to encode them: plain data, so that any process can.

    `store` is fp4, fp8, bf16 or codec; `row` is the first row's number in its matrix (FP8 scales are per tile); `grid`
    is the shape of the scales. `source` is the codec of rows that are in one (store codec), `biases` its biases.
    """

    store: str
    data: bytes
    scales: bytes
    grid: tuple[int, int]
    tile: tuple[int, int]
    rows: int
    cols: int
    row: int
    codec: str
    rounding: str
    weigh: scalars.F32 | None
    source: str = ""
    biases: bytes = b""

    def encoded(self) -> Encoded | Unfit:
        """Return the rows encoded; the first value that cannot be, where there is one."""
        return ENCODE[self.store](self)


def _encode_fp4(c: Chunk) -> Encoded | Unfit:
    codes = np.frombuffer(c.data, np.uint8).reshape(c.rows, -1)
    scales = np.frombuffer(c.scales, np.uint8).reshape(c.grid)
    return encode_fp4(codes, scales, CODECS[c.codec], c.rounding, c.weigh)


def _encode_fp8(c: Chunk) -> Encoded | Unfit:
    codes = np.frombuffer(c.data, np.uint8).reshape(c.rows, -1)
    grid = np.frombuffer(c.scales, np.uint8).reshape(c.grid)
    return _encode_values(c, blocks.decode_fp8(codes, grid, c.row, c.tile))


def _encode_bf16(c: Chunk) -> Encoded | Unfit:
    return _encode_values(c, scalars.bf16_values(np.frombuffer(c.data, "<u2").reshape(c.rows, -1)))


def _encode_values(c: Chunk, values: scalars.F32) -> Encoded | Unfit:
    try:
        return encode(values, CODECS[c.codec], c.rounding, c.weigh)
    except ValueError:
        bad = np.flatnonzero(~np.isfinite(values))
        if not bad.size:
            raise
        return Unfit(int(bad[0]), float(values.reshape(-1)[bad[0]]))


def _encode_codec(c: Chunk) -> Encoded | Unfit:
    codec = CODECS[c.source]
    dtype = "<u2" if codec.scale_dtype == "BF16" else "u1"
    scales, biases = (np.frombuffer(raw, dtype).reshape(c.grid) if raw else None for raw in (c.scales, c.biases))
    assert scales is not None
    words = np.frombuffer(c.data, "<u4").reshape(c.rows, -1)
    return _encode_values(c, decode(codec, words, scales, biases))


ENCODE: Mapping[str, Callable[[Chunk], Encoded | Unfit]] = {
    "fp4": _encode_fp4,
    "fp8": _encode_fp8,
    "bf16": _encode_bf16,
    "codec": _encode_codec,
}


def pieces(step: Step, read: Read, importance: Importance = no_importance) -> Iterator[Piece | Job]:
    """Yield the pieces of a step, or jobs that give them."""
    if step.transform not in STORES:
        return iter(TRANSFORMS[step.transform](step, read))
    return _jobs(step, read, importance)


def _jobs(step: Step, read: Read, importance: Importance) -> Iterator[Job]:
    p, key = numbers(step), step.params.get("importance")
    reader = Reader(step, read)
    for expert in range(reader.matrices):
        weigh = importance(str(key), expert) if key else None
        for row, rows in row_chunks(p["rows"], p["cols"], CHUNK_VALUES):
            chunk = reader.chunk(expert, row, rows, weigh)
            yield Job(chunk.encoded, partial(reader.pieces, expert * p["rows"] + row))


def sample(step: Step, read: Read, importance: Importance, values: int, experts: int) -> list[Chunk]:
    """Return about `values` weights of a step: rows from the middle of one matrix, or of `experts` of a stack."""
    p, key = numbers(step), step.params.get("importance")
    reader = Reader(step, read)
    rows = min(p["rows"], max(1, values // p["cols"]))
    first = (p["rows"] - rows) // 2
    chosen = sorted({n * reader.matrices // experts for n in range(experts)})
    return [reader.chunk(e, first, rows, importance(str(key), e) if key else None) for e in chosen]


class Reader:
    """Reads chunks of a step's source, checks their codes, and places what becomes of them."""

    def __init__(self, step: Step, read: Read) -> None:
        self.step, self.p = step, numbers(step)
        self.store = STORES[step.transform]
        self.weight = Operand(step, 0, read)
        self.scale = Operand(step, 1, read) if len(step.operands) > 1 else None
        self.bias = Operand(step, 2, read) if len(step.operands) > 2 else None
        self.source = str(step.params.get("from", ""))
        self.bits = CODECS[self.source].bits if self.source else BITS[self.store]
        self.tile = (self.p["tile_rows"], self.p["tile_cols"])
        self.matrices = step.outputs[0].shape[0] if len(step.outputs[0].shape) == 3 else 1

    def chunk(self, expert: int, row: int, rows: int, weigh: scalars.F32 | None) -> Chunk:
        """Return rows of one expert's matrix. Raises `ValueFault` for a code that means no number."""
        cols, first = self.p["cols"], expert * self.p["rows"] + row
        row_bytes = cols * self.bits // 8
        data = self.weight.get(first * row_bytes, rows * row_bytes)
        if self.store == "fp8":
            check_codes(self.weight, data, first * row_bytes, scalars.E4M3_NAN_CODES, "NaN in FP8 E4M3")
        scales, grid = self._scales(expert, first, rows)
        biases = b"" if self.bias is None else self._of_groups(self.bias, first, grid)
        params = self.step.params
        return Chunk(
            self.store, data, scales, grid, self.tile, rows, cols, row,
            str(params["codec"]), str(params["rounding"]), weigh, self.source, biases,
        )  # fmt: skip

    def _scales(self, expert: int, first: int, rows: int) -> tuple[bytes, tuple[int, int]]:
        """Return the scales of a chunk: FP4 those of its rows, FP8 the whole grid of its matrix."""
        if self.scale is None:
            return b"", (0, 0)
        if self.store == "codec":
            grid = (rows, self.p["cols"] // CODECS[self.source].group_size)
            return self._of_groups(self.scale, first, grid), grid
        if self.store == "fp4":
            grid = (rows, self.p["cols"] // blocks.MX_GROUP)
            at = first * grid[1]
        else:
            grid = (-(-self.p["rows"] // self.tile[0]), -(-self.p["cols"] // self.tile[1]))
            at = expert * grid[0] * grid[1]
        raw = self.scale.get(at, grid[0] * grid[1])
        check_codes(self.scale, raw, at, (scalars.E8M0_NAN_CODE,), "NaN in E8M0 block scales")
        return raw, grid

    def _of_groups(self, operand: Operand, first: int, grid: tuple[int, int]) -> bytes:
        """Return scales or biases of some rows of a codec's groups, as they are stored."""
        row = grid[1] * (2 if CODECS[self.source].scale_dtype == "BF16" else 1)
        return operand.get(first * row, grid[0] * row)

    def pieces(self, first: int, found: Encoded | Unfit) -> list[Piece]:
        """Return the pieces of the step's outputs that an encoded chunk is; `first` is its first row in the stack."""
        if isinstance(found, Unfit):
            self.weight.fault(first * self.p["cols"] + found.at, f"{found.value}, which cannot be quantized")
        made = [found.weight, found.scales, *([found.biases] if found.biases is not None else [])]
        loss = Loss(found.squared, found.norm, found.max_abs)
        return [_piece(n, first, values, loss if n == 0 else None) for n, values in enumerate(made)]


def _piece(output: int, first: int, values: NDArray[Any], loss: Loss | None) -> Piece:
    row_bytes = values.shape[1] * values.itemsize
    return Piece(output, first * row_bytes, data=as_bytes(np.ascontiguousarray(values)), loss=loss)


STORES: Mapping[str, str] = {"quantize_fp4": "fp4", "quantize_fp8": "fp8", "quantize_bf16": "bf16",
                                "quantize_codec": "codec"}  # fmt: skip
"""How the source of each rounding transform is stored."""

BITS = {"fp4": 4, "fp8": 8, "bf16": 16}
"""Bits per weight on disk, scales aside."""
