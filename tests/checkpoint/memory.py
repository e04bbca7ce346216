"""Files in memory, and logical tensors over them: for tests of what compares and decodes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ds4convert.checkpoint.tensors import LogicalTensor, TensorView
from ds4convert.errors import HeaderError
from ds4convert.storage.byte_source import ByteSource
from ds4convert.storage.records import ByteRange, Fingerprint


class Memory(ByteSource):
    """Files by name, in memory; `asked` counts the bytes that were read of each."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.files, self.asked = dict(files), dict.fromkeys(files, 0)

    def size(self, name: str) -> int:
        return len(self.files[name])

    def fingerprint(self, name: str) -> Fingerprint:
        return len(self.files[name]), 0

    def read_into(self, name: str, start: int, view: memoryview) -> None:
        if start + len(view) > len(self.files[name]):
            raise HeaderError(f"{name}: ends")
        self.asked[name] += len(view)
        view[:] = self.files[name][start : start + len(view)]


def logical(
    store: str,
    weight: np.ndarray,
    scales: np.ndarray | None = None,
    biases: np.ndarray | None = None,
    tile: tuple[int, int] = (1, 32),
    key: str = "k",
) -> tuple[LogicalTensor, list[bytes]]:
    """Return a tensor of one or several slices as it lies in file number 0, and its bytes: weight, scales, biases.

    `weight` is `[rows, bytes or values]` or `[slices, rows, ...]`, as stored.
    """
    parts = [np.ascontiguousarray(a) for a in (weight, scales, biases) if a is not None]
    stacked = weight.ndim == 3
    count, rows = (weight.shape[0], weight.shape[1]) if stacked else (1, weight.shape[0])
    cols = weight.shape[-1] * (2 if store == "fp4" else 1)
    if biases is not None and scales is not None:
        cols = scales.shape[-1] * int(store.rpartition("g")[2])
    at, ranges = 0, []
    for part in parts:
        each = part.nbytes // count
        ranges.append(tuple(ByteRange(0, at + n * each, each) for n in range(count)))
        at += part.nbytes
    ranges += [()] * (3 - len(ranges))
    shape = (count, rows, cols) if stacked else (rows, cols)
    made = LogicalTensor(
        key,
        f"{key}.weight",
        "f",
        shape,
        rows,
        cols,
        store,
        ranges[0],
        ranges[1],
        tile,
        "backbone",
        "r",
        0,
        at,
        ranges[2],
    )
    return made, [p.tobytes() for p in parts]


def view(*tensors: tuple[LogicalTensor, list[bytes]]) -> TensorView:
    """Return a view of tensors, each in a file of its own by its key."""
    from ds4convert.checkpoint.tensors import shifted

    files = {t.key: b"".join(parts) for t, parts in tensors}
    return TensorView("plain", {t.key: shifted(t, n) for n, (t, _) in enumerate(tensors)}, tuple(files), Memory(files))
