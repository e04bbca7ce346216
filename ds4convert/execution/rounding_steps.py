"""Steps that round: a source's exact values in row chunks, encoded by a codec, with what the rounding cost.

Each chunk is a `Job`: what was read, as a `Chunk` that any process can encode, and what to do with the result. A chunk
lies within one matrix (of one expert), as importance is given per matrix. Faulty values raise `ValueFault` with tensor
and index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ds4convert.execution.transforms import (
    PASSED,
    TRANSFORMS,
    Job,
    Operand,
    Piece,
    as_bytes,
    check_codes,
    numbers,
    row_chunks,
    scales_of,
    weights_of,
)
from ds4convert.formats import blocks, compensated, small_floats
from ds4convert.formats.codecs import CODECS
from ds4convert.formats.rounding import Encoded, decode, encode, encode_fp4
from ds4convert.formats.second_moments import COMPENSATED, Inputs, factor_of
from ds4convert.planning.types import Loss, Step
from ds4convert.storage.byte_source import Read

CHUNK_VALUES = 1 << 19
"""Weights that one job rounds: enough to outweigh the cost of a call, few enough for small buffers."""

COMPENSATED_VALUES = 1 << 23
"""The same for rounding against inputs: a matrix of an expert of Flash is one job, as each worker that gets a part of a
matrix makes its factor, which takes as long as rounding it."""

Importance = Callable[[str, int], "small_floats.F32 | Inputs | None"]
"""Returns what is known of the inputs of a module (by key) and expert: the importance of its columns, or where rows of
inputs lie; None where nothing is known and all columns count alike."""


def no_importance(key: str, expert: int) -> small_floats.F32 | None:
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
    weigh: small_floats.F32 | Inputs | None
    source: str = ""
    biases: bytes = b""

    def encoded(self) -> Encoded | Unfit:
        """Return the rows encoded; the first value that cannot be, where there is one."""
        if self.rounding != COMPENSATED:
            return ENCODE[self.store](self)
        plain = ENCODE[self.store](replace(self, rounding="optimal", weigh=None))
        if isinstance(plain, Unfit) or not isinstance(self.weigh, Inputs) or not plain.squared:
            return plain
        factor = factor_of(self.weigh)
        if factor is None:
            return plain
        return compensated.compensated(self.values(), CODECS[self.codec], factor, plain)

    def importance(self) -> small_floats.F32 | None:
        """Return the importance of the columns, where that is what is known."""
        return None if isinstance(self.weigh, Inputs) else self.weigh

    def values(self) -> small_floats.F32:
        """Return the values that are to be rounded."""
        return VALUES[self.store](self)


def _fp4(c: Chunk) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    return np.frombuffer(c.data, np.uint8).reshape(c.rows, -1), np.frombuffer(c.scales, np.uint8).reshape(c.grid)


def _values_fp4(c: Chunk) -> small_floats.F32:
    return blocks.decode_fp4(*_fp4(c))


def _values_fp8(c: Chunk) -> small_floats.F32:
    codes = np.frombuffer(c.data, np.uint8).reshape(c.rows, -1)
    grid = np.frombuffer(c.scales, np.uint8).reshape(c.grid)
    return blocks.decode_fp8(codes, grid, c.row, c.tile)


def _values_bf16(c: Chunk) -> small_floats.F32:
    return small_floats.bf16_values(np.frombuffer(c.data, "<u2").reshape(c.rows, -1))


def _values_codec(c: Chunk) -> small_floats.F32:
    codec = CODECS[c.source]
    dtype = "<u2" if codec.scale_dtype == "BF16" else "u1"
    scales, biases = (np.frombuffer(raw, dtype).reshape(c.grid) if raw else None for raw in (c.scales, c.biases))
    assert scales is not None
    return decode(codec, np.frombuffer(c.data, "<u4").reshape(c.rows, -1), scales, biases)


VALUES: Mapping[str, Callable[[Chunk], small_floats.F32]] = {
    "fp4": _values_fp4,
    "fp8": _values_fp8,
    "bf16": _values_bf16,
    "codec": _values_codec,
}


def _encode_fp4(c: Chunk) -> Encoded | Unfit:
    return encode_fp4(*_fp4(c), CODECS[c.codec], c.rounding, c.importance())


def _encode_values(c: Chunk) -> Encoded | Unfit:
    values = c.values()
    try:
        return encode(values, CODECS[c.codec], c.rounding, c.importance())
    except ValueError:
        bad = np.flatnonzero(~np.isfinite(values))
        if not bad.size:
            raise
        return Unfit(int(bad[0]), float(values.reshape(-1)[bad[0]]))


ENCODE: Mapping[str, Callable[[Chunk], Encoded | Unfit]] = {
    "fp4": _encode_fp4,
    "fp8": _encode_values,
    "bf16": _encode_values,
    "codec": _encode_values,
}


def pieces(step: Step, read: Read, importance: Importance = no_importance) -> Iterator[Piece | Job]:
    """Yield the pieces of a step, or jobs that give them."""
    if step.transform not in STORES:
        return iter(TRANSFORMS[step.transform](step, read))
    return _jobs(step, read, importance)


def _jobs(step: Step, read: Read, importance: Importance) -> Iterator[Job]:
    p, key = numbers(step), step.params.get("importance")
    reader, passed = Reader(step, read), p.get(PASSED, 0)
    for expert in range(reader.matrices):
        weigh = importance(str(key), expert) if key else None
        for row, rows in chunks_of(str(step.params["rounding"]), p["rows"], p["cols"]):
            if passed > 0:
                passed -= 1
                continue
            chunk = reader.chunk(expert, row, rows, weigh)
            yield Job(chunk.encoded, partial(reader.pieces, expert * p["rows"] + row))


def chunks_of(rounding: str, rows: int, cols: int) -> Iterator[tuple[int, int]]:
    """Yield (first row, number of rows) of the chunks of a matrix; whole blocks where compensation works on blocks."""
    if rounding != COMPENSATED:
        return row_chunks(rows, cols, CHUNK_VALUES)
    block = compensated.BLOCK
    return (
        (n * block, min(k * block, rows - n * block))
        for n, k in row_chunks(-(-rows // block), cols * block, COMPENSATED_VALUES)
    )


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
        self.weight = weights_of(step, read)
        self.scale = scales_of(step, 1, read) if len(step.operands) > 1 else None
        self.bias = Operand(step, 2, read) if len(step.operands) > 2 else None
        self.source = str(step.params.get("from", ""))
        self.bits = CODECS[self.source].bits if self.source else BITS[self.store]
        self.tile = (self.p["tile_rows"], self.p["tile_cols"])
        self.matrices = step.outputs[0].shape[0] if len(step.outputs[0].shape) == 3 else 1

    def chunk(self, expert: int, row: int, rows: int, weigh: small_floats.F32 | Inputs | None) -> Chunk:
        """Return rows of one expert's matrix. Raises `ValueFault` for a code that means no number."""
        cols, first = self.p["cols"], expert * self.p["rows"] + row
        row_bytes = cols * self.bits // 8
        data = self.weight.get(first * row_bytes, rows * row_bytes)
        if self.store == "fp8":
            check_codes(self.weight, data, first * row_bytes, small_floats.E4M3_NAN_CODES, "NaN in FP8 E4M3")
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
        check_codes(self.scale, raw, at, (small_floats.E8M0_NAN_CODE,), "NaN in E8M0 block scales")
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


STORES: Mapping[str, str] = {
    "quantize_fp4": "fp4",
    "quantize_fp8": "fp8",
    "quantize_bf16": "bf16",
    "quantize_codec": "codec",
}
"""How the source of each rounding transform is stored, by the transform's name on disk (as in `TRANSFORMS`)."""

BITS = {"fp4": 4, "fp8": 8, "bf16": 16}
"""Bits per weight on disk, scales aside."""
