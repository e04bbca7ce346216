"""Rows of an engram table, read where they lie: a table is larger than the memory, and a pass needs few rows of it."""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ds4convert.errors import InputError
from ds4convert.storage.safe_open import open_file, resolve_inside

from ..tensor_files import DTYPES, Stored

MXFP8 = {"group_size": 32, "bits": 8, "mode": "mxfp8"}
"""What a table of the official format is: FP8, with a scale for every row and 32 columns."""

RAW = {1: np.uint8, 2: np.uint16, 4: np.uint32}
"""What rows are read as, by the bytes of an element: numpy knows neither BF16 nor FP8."""

Rows = NDArray[np.int64]


class Leaf(Protocol):
    """One tensor of a table."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and columns."""

    @property
    def dtype(self) -> mx.Dtype:
        """As stored."""

    def take(self, rows: Rows) -> mx.array:
        """Rows [n, columns] as stored."""


class MappedLeaf:
    """A tensor of a file, mapped: the system reads the pages of the rows that are asked for, and no others."""

    def __init__(self, stored: Stored) -> None:
        if stored.dtype not in DTYPES:
            raise InputError(f"{stored.name}: dtype {stored.dtype} is not one that the model reads ({stored.path})")
        self.shape, self.dtype = stored.shape, getattr(mx, DTYPES[stored.dtype])
        descriptor = open_file(resolve_inside(stored.path.parent, stored.path.name), stored.path.name)
        try:
            self._map = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        finally:
            os.close(descriptor)
        if hasattr(mmap, "MADV_RANDOM"):  # rows lie far apart: reading ahead would read what nobody asks for
            self._map.madvise(mmap.MADV_RANDOM)
        count = stored.size_bytes // self.dtype.size
        self._rows = np.frombuffer(self._map, RAW[self.dtype.size], count, stored.start).reshape(stored.shape)

    def take(self, rows: Rows) -> mx.array:
        """Rows [n, columns] as stored."""
        return mx.array(self._rows[rows]).view(self.dtype)


@dataclass(frozen=True)
class HeldLeaf:
    """A tensor that is in memory, as small checkpoints have it."""

    value: mx.array

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and columns."""
        return self.value.shape

    @property
    def dtype(self) -> mx.Dtype:
        """As stored."""
        return self.value.dtype

    def take(self, rows: Rows) -> mx.array:
        """Rows [n, columns] as stored."""
        return self.value[mx.array(rows)]


class Table:
    """One table: its tensors `weight`, and where it is packed `scales` (and `biases`) with their format `form`."""

    def __init__(self, leaves: Mapping[str, Leaf], form: Mapping[str, Any] | None, shape: tuple[int, int]) -> None:
        """`shape` is that of the values. Raises ValueError, naming the tensor, on one that does not fit."""
        self.leaves, self.form = leaves, form
        rows, columns = shape
        wanted = {"weight": (rows, columns)}
        if form is not None:
            width = columns * form["bits"] // 8 // leaves["weight"].dtype.size if "weight" in leaves else 0
            wanted = {"weight": (rows, width), "scales": (rows, columns // form["group_size"])}
            wanted |= {"biases": wanted["scales"]} if form["mode"] == "affine" else {}
        for name in sorted(wanted.keys() | leaves.keys()):
            found = leaves[name].shape if name in leaves else None
            if found != wanted.get(name):
                expected = list(wanted[name]) if name in wanted else "none"
                raise ValueError(f"{name}: expected {expected}, found {list(found) if found else 'none'}")

    def rows(self, numbers: Rows, dtype: mx.Dtype) -> mx.array:
        """Values [..., columns] of the rows `numbers` [...]."""
        flat = numbers.reshape(-1)
        found = {name: leaf.take(flat) for name, leaf in self.leaves.items()}
        values = found["weight"]
        if self.form is not None:
            wide = {k: x.astype(mx.float32) if mx.issubdtype(x.dtype, mx.floating) else x for k, x in found.items()}
            values = mx.dequantize(values.view(mx.uint32), wide["scales"], wide.get("biases"), **self.form)
        return values.astype(dtype).reshape(*numbers.shape, -1)
