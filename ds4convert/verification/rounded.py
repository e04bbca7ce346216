"""Rounding done once more: are the codes, scales and biases of a folder those that the source's values give?

Rounding is deterministic on one kind of processor. On another one sums differ in their last bits, so that of two ways
to round a group that are as good as each other the other one may have been taken: such a group is told as tied.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ds4convert.checkpoint.compare import SAME_CODES, Difference, Repeated
from ds4convert.checkpoint.inventory import Inventory
from ds4convert.checkpoint.tensors import Grid, LogicalTensor, TensorView, codes, decode, grid_of
from ds4convert.converted.records import Manifest
from ds4convert.errors import InputError
from ds4convert.evaluate import calibration as calibrations
from ds4convert.evaluate.calibration import Calibration
from ds4convert.execution.rounding_steps import CHUNK_VALUES, Chunk, Unfit
from ds4convert.execution.transforms import row_chunks
from ds4convert.execution.workers import Pool
from ds4convert.formats import rounding as encoding
from ds4convert.formats.blocks import MX_GROUP
from ds4convert.formats.codecs import CODECS, Codec
from ds4convert.formats.rounding import Encoded
from ds4convert.formats.second_moments import COMPENSATED
from ds4convert.formats.small_floats import F32, as_f32, bf16_bits
from ds4convert.storage.byte_source import Numbered

REPEATABLE = {"nearest", "optimal"}
"""Ways of rounding that need nothing but the values of a matrix, and the importance of its columns."""

TIE = 1e-5
"""Relative difference of two groups' squared errors that the order of float32 sums may make."""


@dataclass(frozen=True)
class How:
    """How a tensor was rounded: `key` and `digest` name its importance in a calibration file, "" without one."""

    codec: str
    rounding: str
    key: str = ""
    digest: str = ""


def hows(record: Manifest | None) -> dict[tuple[str, str], How]:
    """Return how each rounded tensor was rounded, as a manifest tells, by (file, name)."""
    out = {}
    for t in record.tensors if record else ():
        if t.error is not None:
            told = (str(t.params.get(k, "")) for k in ("codec", "rounding", "importance", "calibration"))
            out[t.file, t.name] = How(*told)
    return out


@dataclass(frozen=True)
class Again:
    """Compares rounded tensors by rounding again. `unknown`: no manifest tells how, so MLX's own rounding is tried."""

    hows: Mapping[tuple[str, str], How]
    calibration: Calibration | None
    pool: Pool
    unknown: bool = False

    def how(self, a: LogicalTensor, b: LogicalTensor) -> How | None:
        """Return how `b` was rounded from `a`; None where it was not, or nothing tells."""
        found = self.hows.get((b.file, b.name))
        if found is None and self.unknown and b.codec is not None and a.store != b.store:
            return None if (a.store, b.store) in SAME_CODES else How(b.codec.name, "nearest")
        return found

    def is_compensated(self, b: LogicalTensor) -> bool:
        """Return whether the rounding of `b` went by a text."""
        how = self.hows.get((b.file, b.name))
        return how is not None and how.rounding == COMPENSATED

    def __call__(self, a: LogicalTensor, b: LogicalTensor, ra: Numbered, rb: Numbered) -> Difference | None:
        """Return the comparison; None where the tensor was not rounded, or that cannot be repeated."""
        how = self.how(a, b)
        if how is None or b.codec is None or how.codec != b.codec.name or not can_repeat(how, self.calibration):
            return None
        return again(a, b, ra, rb, how, self.calibration, self.pool)


def importance(how: How, calibration: Calibration | None, expert: int) -> F32 | None:
    """Return the weights of a matrix's input columns; None where all count alike."""
    return calibration.importance(how.key, expert) if calibration is not None and how.key else None


def weights_of(view: TensorView, hows: Mapping[tuple[str, str], How], every: bool) -> int:
    """Return how many weights of a folder are rounded again: those with a recorded rounding, or all in a codec."""
    found = (t for t in view.tensors.values() if (t.file, t.name) in hows or (every and t.codec is not None))
    return sum(t.matrices * t.rows * t.cols for t in found)


def calibration_of(path: Path | None, inventory: Inventory, hows: Mapping[tuple[str, str], How]) -> Calibration | None:
    """Return the calibration file, None without one. Raises `InputError` where the folder was made with another."""
    if path is None:
        return None
    found = calibrations.read(path, inventory)
    wanted = {h.digest for h in hows.values()} - {""}
    if found.digest not in wanted:
        other = f"with another one (sha256 {', '.join(sorted(wanted))})" if wanted else "without any"
        raise InputError(f"{path}: sha256 {found.digest}; the folder was converted {other}")
    return found


def can_repeat(how: How, calibration: Calibration | None) -> bool:
    """Return whether a rounding can be done again with what is at hand."""
    known = not how.digest or (calibration is not None and calibration.digest == how.digest)
    return how.rounding in REPEATABLE and how.codec in CODECS and known


def again(
    a: LogicalTensor,
    b: LogicalTensor,
    ra: Numbered,
    rb: Numbered,
    how: How,
    calibration: Calibration | None,
    pool: Pool,
) -> Difference:
    """Return how the values of the rounded tensor `b` differ from its source `a`; `repeated` says how its codes do."""
    if (a.matrices, a.rows, a.cols) != (b.matrices, b.rows, b.cols):
        return Difference(a.key, "shape", False, detail=f"{list(a.shape)} and {list(b.shape)}")
    total, found = _Error(), Repeated()
    for place, chunk, made in _in_order(_chunks(a, ra, how, calibration), pool):
        matrix, row, rows = place
        stored = _Stored(b, rb, matrix, row, rows)
        if isinstance(made, Unfit):
            return Difference(a.key, "value", False, (matrix, row, 0), math.inf, math.inf)
        found = found.plus(_compared(stored, chunk, made, place, total))
    first = found.first or ((0, 0, 0) if total.squared else None)
    relative = total.squared / total.norm if total.norm else (math.inf if total.squared else 0.0)
    status = "value" if total.squared or found.unlike else "same"
    return Difference(a.key, status, False, first, total.max_abs, relative, repeated=found)


Place = tuple[int, int, int]
"""A matrix, its first row, and how many."""


def _chunks(
    a: LogicalTensor, reader: Numbered, how: How, calibration: Calibration | None
) -> Iterator[tuple[Place, Chunk]]:
    for matrix in range(a.matrices):
        grid, weigh = grid_of(a, reader, matrix), importance(how, calibration, matrix)
        for row, rows in row_chunks(a.rows, a.cols, CHUNK_VALUES):
            yield (matrix, row, rows), _chunk(a, codes(a, reader, matrix, row, rows), grid, row, how, weigh)


def _chunk(
    a: LogicalTensor, packed: NDArray[np.uint8], grid: Grid | None, row: int, how: How, weigh: F32 | None
) -> Chunk:
    """Return rows of a source's matrix as the rounding of a conversion has them."""
    rows = len(packed)
    if a.store in {"f32", "f16"}:  # a conversion takes them only where BF16 holds them
        packed = bf16_bits(as_f32(packed.tobytes(), a.store.upper())).view(np.uint8).reshape(rows, -1)
    plain = Chunk("bf16", packed.tobytes(), b"", (0, 0), (1, a.cols), rows, a.cols, row, how.codec, how.rounding, weigh)
    if grid is None:
        return plain
    if a.store == "fp8":
        scales = np.ascontiguousarray(grid.scales)
        shape = (scales.shape[0], scales.shape[1])
        return replace(plain, store="fp8", scales=scales.tobytes(), grid=shape, tile=a.tile)
    part = np.ascontiguousarray(grid.scales[row : row + rows])
    plain = replace(plain, scales=part.tobytes(), grid=(part.shape[0], part.shape[1]))
    if a.store == "fp4":
        return replace(plain, store="fp4")
    if a.store == "mxfp8":
        return replace(plain, store="fp8", tile=(1, MX_GROUP), row=0)
    biases = b"" if grid.biases is None else np.ascontiguousarray(grid.biases[row : row + rows]).tobytes()
    return replace(plain, store="codec", source=a.store, biases=biases)


def _in_order(made: Iterator[tuple[Place, Chunk]], pool: Pool) -> Iterator[tuple[Place, Chunk, Encoded | Unfit]]:
    """Yield chunks with what they are rounded to, in their order, a few ahead of the reader."""
    waiting: deque[tuple[Place, Chunk, Future[Encoded | Unfit]]] = deque()
    try:
        for place, chunk in made:
            waiting.append((place, chunk, pool.submit(chunk.encoded)))
            if len(waiting) > pool.cores:
                at, item, future = waiting.popleft()
                yield at, item, _result(future)
        while waiting:
            at, item, future = waiting.popleft()
            yield at, item, _result(future)
    finally:
        for _, _, future in waiting:
            future.cancel()


def _result(future: Future[Encoded | Unfit]) -> Encoded | Unfit:
    try:
        return future.result()
    except ValueError:  # the source's scales make a value that is no number
        return Unfit(0, math.nan)


class _Stored:
    """Rows of a rounded tensor as they are stored: words, scales and biases."""

    def __init__(self, b: LogicalTensor, reader: Numbered, matrix: int, row: int, rows: int) -> None:
        grid = grid_of(b, reader, matrix)
        assert grid is not None and b.codec is not None
        self.logical, self.codec = b, b.codec
        self.packed = codes(b, reader, matrix, row, rows)
        self.weight = self.packed.view("<u4")
        self.scales = grid.scales[row : row + rows]
        self.biases = None if grid.biases is None else grid.biases[row : row + rows]

    def values(self) -> F32:
        """Return the values, float32 `[rows, cols]`."""
        found: F32 = decode(self.logical, self.packed, Grid(self.scales, self.biases), 0)
        return found


@dataclass
class _Error:
    """What rounding cost, added up over chunks."""

    squared: float = 0.0
    norm: float = 0.0
    max_abs: float = 0.0

    def add(self, squared: float, norm: float, max_abs: float) -> None:
        """Add those of a chunk."""
        self.squared, self.norm = self.squared + squared, self.norm + norm
        self.max_abs = max(self.max_abs, max_abs)


def _compared(stored: _Stored, chunk: Chunk, made: Encoded, place: Place, total: _Error) -> Repeated:
    """Return which groups of a chunk are stored otherwise than they were rounded now; their error goes to `total`."""
    codec = stored.codec
    groups = chunk.cols // codec.group_size
    unlike = _unlike(stored, made, groups)
    if not unlike.any():
        total.add(made.squared, made.norm, made.max_abs)
        return Repeated(unlike.size)
    source = chunk.values()
    fresh = encoding.decode(codec, made.weight, made.scales, made.biases)
    with np.errstate(invalid="ignore", over="ignore"):
        delta = source.astype(np.float64) - stored.values()
        delta[np.isnan(delta)] = math.inf
        total.add(float(np.sum(delta**2)), float(np.sum(source.astype(np.float64) ** 2)), float(np.abs(delta).max()))
        weigh = _weights(chunk.importance(), codec, chunk.cols)
        ours, theirs = (_by_group(e, weigh, groups) for e in (source - fresh.astype(np.float64), delta))
        tied = unlike & (np.abs(theirs - ours) <= TIE * ours)
    at = np.argwhere(unlike & ~tied) if (unlike & ~tied).any() else np.argwhere(unlike)
    first = (place[0], place[1] + int(at[0][0]), int(at[0][1]) * codec.group_size)
    return Repeated(unlike.size, int(unlike.sum()), int(tied.sum()), first)


def _unlike(stored: _Stored, made: Encoded, groups: int) -> NDArray[np.bool_]:
    """Return, per row and group, whether words, scale or bias are not the same bytes."""
    rows = len(stored.weight)
    words = (stored.weight != made.weight).reshape(rows, groups, -1).any(axis=2)
    out: NDArray[np.bool_] = words | (stored.scales != made.scales)
    if stored.biases is not None and made.biases is not None:
        out |= stored.biases != made.biases
    return out


def _by_group(error: NDArray[Any], weigh: NDArray[np.float64] | None, groups: int) -> NDArray[np.float64]:
    squares = error**2 if weigh is None else error**2 * weigh
    out: NDArray[np.float64] = squares.reshape(len(error), groups, -1).sum(axis=2)
    return out


def _weights(weigh: F32 | None, codec: Codec, cols: int) -> NDArray[np.float64] | None:
    """Return the weights of the columns as rounding takes them: of mean 1 in each group, none quite 0."""
    if weigh is None:
        return None
    parts = weigh.astype(np.float64).reshape(cols // codec.group_size, -1)
    mean = parts.mean(axis=1, keepdims=True)
    relative = np.divide(parts, mean, out=np.ones_like(parts), where=mean > 0)
    out: NDArray[np.float64] = np.maximum(relative, float(encoding.LEAST_WEIGHT)).reshape(-1)
    return out
