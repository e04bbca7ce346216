"""Two folders compared tensor by tensor: are they the same weights, and if not, how far apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ds4convert.checkpoint.tensors import Grid, LogicalTensor, TensorView, codes, decode, grid_of, row_chunks
from ds4convert.checkpoint.types import JSON
from ds4convert.formats.blocks import MX_GROUP
from ds4convert.storage.byte_source import Numbered
from ds4convert.words import activity

SAME_CODES = {("fp4", "fp4"), ("fp8", "mxfp8"), ("mxfp8", "fp8"), ("fp8", "fp8"), ("mxfp8", "mxfp8")}
"""Pairs of stores that hold the same codes when they hold the same values."""


@dataclass(frozen=True)
class Repeated:
    """What came of rounding again: groups in all, those of other bytes, and of these the ones that are as good."""

    groups: int = 0
    unlike: int = 0
    tied: int = 0
    first: tuple[int, int, int] | None = None

    def plus(self, other: Repeated) -> Repeated:
        """Return the sum; `first` is the earlier one."""
        return Repeated(
            self.groups + other.groups, self.unlike + other.unlike, self.tied + other.tied, self.first or other.first
        )


@dataclass(frozen=True)
class Difference:
    """The comparison of one logical tensor. `status` is same, value, missing or shape.

    `exact`: every value is equal, and so are the stored codes where both sides store codes of the same kind.
    `first` is the first differing element, `[slice, row, column]`; errors are relative to the first folder. `repeated`
    is what came of rounding again, where that was done.
    """

    key: str
    status: str
    exact: bool = True
    first: tuple[int, int, int] | None = None
    max_abs: float = 0.0
    relative_square: float = 0.0
    detail: str = ""
    repeated: Repeated | None = None


Otherwise = Callable[[LogicalTensor, LogicalTensor, Numbered, Numbered], Difference | None]
"""Compares two tensors in a way of its own; None where it has none for them."""


def compare_views(
    a: TensorView,
    b: TensorView,
    jobs: int = 2,
    progress: Callable[[int], None] = lambda n: None,
    otherwise: Otherwise = lambda a, b, ra, rb: None,
) -> Iterator[tuple[str, LogicalTensor | None, LogicalTensor | None, Difference]]:
    """Yield (key, tensor in a, tensor in b, difference) for every key of either side, in the order of `a`, then `b`.

    `otherwise` is asked first for every tensor that both sides have.
    """
    keys = [*a.tensors, *(k for k in b.tensors if k not in a.tensors)]
    ra = a.reader()
    try:
        rb = b.reader()
        try:
            with ThreadPoolExecutor(jobs) as pool:

                def one(key: str) -> Difference:
                    x, y = a.tensors.get(key), b.tensors.get(key)
                    activity.at(key)
                    out = otherwise(x, y, ra, rb) if x is not None and y is not None else None
                    out = out or difference(x, y, ra, rb)
                    progress(a.tensors[key].size if key in a.tensors else b.tensors[key].size)
                    return out

                for key, result in zip(keys, pool.map(one, keys), strict=True):
                    yield key, a.tensors.get(key), b.tensors.get(key), result
        finally:
            rb.close()
    finally:
        ra.close()


def compare_headers(
    a: TensorView, b: TensorView, progress: Callable[[int], None] = lambda n: None
) -> Iterator[tuple[str, LogicalTensor | None, LogicalTensor | None, Difference]]:
    """Yield as `compare_views` what headers alone tell: shapes and formats; values are not read."""
    for key in [*a.tensors, *(k for k in b.tensors if k not in a.tensors)]:
        x, y = a.tensors.get(key), b.tensors.get(key)
        found = Difference(key, "same")
        if x is not None and y is not None and x.shape != y.shape:
            found = Difference(key, "shape", False, detail=f"{list(x.shape)} and {list(y.shape)}")
        progress((x or y).size)  # type: ignore[union-attr]
        yield key, x, y, found


def difference(a: LogicalTensor | None, b: LogicalTensor | None, ra: Numbered, rb: Numbered) -> Difference:
    """Return how the values of `b` differ from those of `a`, streaming both."""
    if a is None or b is None:
        return Difference((a or b).key, "missing", False)  # type: ignore[union-attr]
    if (a.matrices, a.rows, a.cols) != (b.matrices, b.rows, b.cols):
        return Difference(a.key, "shape", False, detail=f"{list(a.shape)} and {list(b.shape)}")
    first: tuple[int, int, int] | None = None
    worst = squares = norm = 0.0
    last = -1
    grid_a: Grid | None = None
    grid_b: Grid | None = None
    for matrix, row, rows in row_chunks(a):
        if matrix != last:
            grid_a, grid_b = grid_of(a, ra, matrix), grid_of(b, rb, matrix)
            last = matrix
            unlike = _scale_difference(a, b, grid_a, grid_b)
            first = first or (unlike and (matrix, *unlike))
        ca, cb = codes(a, ra, matrix, row, rows), codes(b, rb, matrix, row, rows)
        if _equal_bytes(a, b, ca, cb, grid_a, grid_b, row):
            continue
        va, vb = decode(a, ca, grid_a, row), decode(b, cb, grid_b, row)
        found = _first_difference(a, b, ca, cb, va, vb)
        if found is None:
            continue
        first = first or (matrix, row + found[0], found[1])
        with np.errstate(invalid="ignore"):
            delta = va.astype(np.float64) - vb.astype(np.float64)
        delta[np.isnan(delta)] = math.inf  # NaN on one side, or infinities of both signs
        delta[~_unequal(va, vb)] = 0.0
        worst = max(worst, float(np.max(np.abs(delta), initial=0.0)))
        squares += float(np.sum(delta * delta))
        norm += float(np.nansum(va.astype(np.float64) ** 2))
    if first is None:
        return Difference(a.key, "same")
    relative = squares / norm if norm else (math.inf if squares else 0.0)
    return Difference(a.key, "value", False, first, worst, relative)


def _scale_difference(
    a: LogicalTensor, b: LogicalTensor, grid_a: Grid | None, grid_b: Grid | None
) -> tuple[int, int] | None:
    """Return the first element whose block scale differs where both sides keep the source's scales.

    A scale may differ without any value doing so (a group of zeros); it is a difference all the same.
    """
    if grid_a is None or grid_b is None or (a.store, b.store) not in SAME_CODES:
        return None
    groups = np.arange(a.cols // MX_GROUP)[None, :] * MX_GROUP
    for start in range(0, a.rows, SPREAD_ROWS):
        rows = np.arange(start, min(start + SPREAD_ROWS, a.rows))
        spread = [
            grid.scales[rows[:, None] // t.tile[0], groups // t.tile[1]] if t.store == "fp8" else grid.scales[rows]
            for t, grid in ((a, grid_a), (b, grid_b))
        ]
        at = np.argwhere(spread[0] != spread[1])
        if at.size:
            return start + int(at[0][0]), int(at[0][1]) * MX_GROUP
    return None


SPREAD_ROWS = 1 << 16
"""Rows whose scales are compared at a time: a table of V4.1 has 384 million."""


def _equal_bytes(
    a: LogicalTensor,
    b: LogicalTensor,
    ca: np.ndarray,
    cb: np.ndarray,
    grid_a: Grid | None,
    grid_b: Grid | None,
    row: int,
) -> bool:
    """Return whether equal bytes already prove equal values: same store, codes and scales."""
    if a.store != b.store or ca.shape != cb.shape or not np.array_equal(ca, cb):
        return False
    if grid_a is None or grid_b is None:
        return True
    if a.store == "fp8":
        first, last = row // a.tile[0], -(-(row + ca.shape[0]) // a.tile[0])
        return a.tile == b.tile and grid_a.equals(grid_b, slice(first, last))
    return grid_a.equals(grid_b, slice(row, row + ca.shape[0]))


def _unequal(va: np.ndarray, vb: np.ndarray) -> NDArray[np.bool_]:
    """Return where two values differ; NaN equals NaN."""
    unequal: NDArray[np.bool_] = ~((va == vb) | (np.isnan(va) & np.isnan(vb)))
    return unequal


def _first_difference(
    a: LogicalTensor, b: LogicalTensor, ca: np.ndarray, cb: np.ndarray, va: np.ndarray, vb: np.ndarray
) -> tuple[int, int] | None:
    """Return (row, column) of the first element whose value, or code of the same kind, differs."""
    unequal = _unequal(va, vb)
    if (a.store, b.store) in SAME_CODES or (a.store == b.store and a.codec is None):
        other = ca ^ cb
        if ca.shape[1] < unequal.shape[1]:  # two codes in a byte, that of the even column in the low half
            other = np.stack([other & 15, other >> 4], axis=2)
        unequal |= other.reshape(*unequal.shape, -1).any(axis=2)
    at = np.argwhere(unequal)
    return (int(at[0][0]), int(at[0][1])) if at.size else None


def tensor_json(key: str, a: LogicalTensor | None, b: LogicalTensor | None, d: Difference) -> JSON:
    """Return one row of `diff --json`: same, moved, changed (format or value), only_a or only_b."""
    row: JSON = {"tensor": key, "status": _status(a, b, d)}
    if a is not None:
        row["a"] = {"name": a.name, "file": a.file, "format": a.label, "shape": list(a.shape)}
    if b is not None:
        row["b"] = {"name": b.name, "file": b.file, "format": b.label, "shape": list(b.shape)}
    if d.status == "shape":
        row["detail"] = d.detail
    if d.status == "value":
        row["first"] = list(d.first or ())
        row["max_abs_error"] = _finite(d.max_abs)
        row["relative_square_error"] = _finite(d.relative_square)
    return row


def _finite(value: float) -> float | None:
    """Return `value`, or None where JSON has no such number (one side is NaN or infinite)."""
    return value if math.isfinite(value) else None


def summarise(
    compared: Iterator[tuple[str, LogicalTensor | None, LogicalTensor | None, Difference]], values: bool = True
) -> JSON:
    """Return the figures of `diff` under the keys of the command line contract; `same` counts equal values.

    `values`: whether values were compared at all.
    """
    rows = [tensor_json(*c) for c in compared]
    count = {name: sum(r["status"] == name for r in rows) for name in STATUSES}
    return {
        "same": count["same"] + count["moved"] + count["same values, other format"],
        "moved": count["moved"],
        "other_format": count["same values, other format"],
        "changed": count["changed"],
        "only_a": count["only_a"],
        "only_b": count["only_b"],
        "values_compared": values,
        "tensors": rows,
    }


STATUSES = ("same", "moved", "same values, other format", "changed", "only_a", "only_b")


def _status(a: LogicalTensor | None, b: LogicalTensor | None, d: Difference) -> str:
    if a is None:
        return "only_b"
    if b is None:
        return "only_a"
    if d.status != "same":
        return "changed"
    if a.label != b.label:
        return "same values, other format"
    return "same" if (a.name, a.file, a.weight_at[0].offset) == (b.name, b.file, b.weight_at[0].offset) else "moved"
