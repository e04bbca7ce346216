"""Steps that round: a source's exact values in row chunks, encoded by a codec, with what the rounding cost.

Each chunk is a `Job`, so that an executor may run several at once. A chunk lies within one matrix (of one expert), as
importance is given per matrix. Faulty values raise `ValueFault` with tensor and index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ds4convert.formats import blocks, scalars
from ds4convert.formats.codecs import CODECS, Codec
from ds4convert.formats.encode import Encoded, encode, encode_fp4
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


def pieces(step: Step, read: Read, importance: Importance = no_importance) -> Iterator[Piece | Job]:
    """Yield the pieces of a step, or jobs that return them."""
    if step.transform in LOADERS:
        return _quantize(step, read, importance)
    return iter(TRANSFORMS[step.transform](step, read))


@dataclass(frozen=True)
class _Rows:
    """Some rows of one matrix: `first` counts from the top of the whole stack, `row` from that of its matrix."""

    expert: int
    row: int
    first: int
    rows: int


Load = Callable[[_Rows, Codec, str, "scalars.F32 | None"], Encoded]
"""Reads rows of the source and returns them encoded."""


def _quantize(step: Step, read: Read, importance: Importance) -> Iterator[Job]:
    p, codec = numbers(step), CODECS[str(step.params["codec"])]
    rounding, key = str(step.params["rounding"]), step.params.get("importance")
    load = LOADERS[step.transform](step, read)
    matrices = step.outputs[0].shape[0] if len(step.outputs[0].shape) == 3 else 1
    for expert in range(matrices):
        weigh = importance(str(key), expert) if key else None
        for row, rows in row_chunks(p["rows"], p["cols"], CHUNK_VALUES):
            part = _Rows(expert, row, expert * p["rows"] + row, rows)
            yield partial(_job, load, part, codec, rounding, weigh)


def _job(load: Load, part: _Rows, codec: Codec, rounding: str, weigh: scalars.F32 | None) -> list[Piece]:
    found = load(part, codec, rounding, weigh)
    made = [found.weight, found.scales, *([found.biases] if found.biases is not None else [])]
    loss = Loss(found.squared, found.norm, found.max_abs)
    return [_piece(n, part, values, loss if n == 0 else None) for n, values in enumerate(made)]


def _piece(output: int, part: _Rows, values: NDArray[Any], loss: Loss | None) -> Piece:
    row_bytes = values.shape[1] * values.itemsize
    return Piece(output, part.first * row_bytes, data=as_bytes(np.ascontiguousarray(values)), loss=loss)


def _fp4(step: Step, read: Read) -> Load:
    """Packed FP4 with its scales."""
    cols = numbers(step)["cols"]
    weight, scale = Operand(step, 0, read), Operand(step, 1, read)
    row_bytes, row_scales = cols // 2, cols // blocks.MX_GROUP

    def load(part: _Rows, codec: Codec, rounding: str, weigh: scalars.F32 | None) -> Encoded:
        codes = np.frombuffer(weight.get(part.first * row_bytes, part.rows * row_bytes), np.uint8)
        raw = scale.get(part.first * row_scales, part.rows * row_scales)
        check_codes(scale, raw, part.first * row_scales, (scalars.E8M0_NAN_CODE,), "NaN in E8M0 block scales")
        scales = np.frombuffer(raw, np.uint8).reshape(part.rows, row_scales)
        return encode_fp4(codes.reshape(part.rows, row_bytes), scales, codec, rounding, weigh)

    return load


def _fp8(step: Step, read: Read) -> Load:
    """FP8 with its tile scales."""
    p = numbers(step)
    tile = (p["tile_rows"], p["tile_cols"])
    grid_rows, grid_cols = -(-p["rows"] // tile[0]), -(-p["cols"] // tile[1])
    each = grid_rows * grid_cols
    weight, scale = Operand(step, 0, read), Operand(step, 1, read)

    def load(part: _Rows, codec: Codec, rounding: str, weigh: scalars.F32 | None) -> Encoded:
        raw = scale.get(part.expert * each, each)
        check_codes(scale, raw, part.expert * each, (scalars.E8M0_NAN_CODE,), "NaN in E8M0 block scales")
        at = part.first * p["cols"]
        data = weight.get(at, part.rows * p["cols"])
        check_codes(weight, data, at, scalars.E4M3_NAN_CODES, "NaN in FP8 E4M3")
        codes = np.frombuffer(data, np.uint8).reshape(part.rows, p["cols"])
        grid = np.frombuffer(raw, np.uint8).reshape(grid_rows, grid_cols)
        values = blocks.decode_fp8(codes, grid, part.row, tile)
        return encode(_finite(weight, values, at), codec, rounding, weigh)

    return load


def _bf16(step: Step, read: Read) -> Load:
    """BF16 as it is."""
    cols = numbers(step)["cols"]
    weight = Operand(step, 0, read)

    def load(part: _Rows, codec: Codec, rounding: str, weigh: scalars.F32 | None) -> Encoded:
        at = part.first * cols
        bits = np.frombuffer(weight.get(at * 2, part.rows * cols * 2), "<u2").reshape(part.rows, cols)
        return encode(_finite(weight, scalars.bf16_values(bits), at), codec, rounding, weigh)

    return load


def _finite(operand: Operand, values: scalars.F32, element: int) -> scalars.F32:
    """Return `values`. Raises `ValueFault` for NaN and infinity, which no quantized format holds."""
    if not np.isfinite(values.sum(dtype=np.float64)):
        bad = np.flatnonzero(~np.isfinite(values))
        if bad.size:
            operand.fault(element + int(bad[0]), f"{values.reshape(-1)[bad[0]]}, which cannot be quantized")
    return values


LOADERS: Mapping[str, Callable[[Step, Read], Load]] = {
    "quantize_fp4": _fp4,
    "quantize_fp8": _fp8,
    "quantize_bf16": _bf16,
}
"""How each kind of source is read, by the name of the transform in a plan."""
