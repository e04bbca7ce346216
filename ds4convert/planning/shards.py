"""Sizes to files and offsets. Knows nothing of data, names of models, or disks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ds4convert.checkpoint import headers

METADATA = {"format": "mlx"}


@dataclass(frozen=True, slots=True)
class Draft:
    """An output tensor before it has a place: name, dtype, shape, size in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int


@dataclass(frozen=True, slots=True)
class Placed:
    """One file: its exact header bytes, full size, and (position in `Shard` input, absolute offset) per tensor."""

    header: bytes
    size: int
    offsets: tuple[tuple[int, int], ...]


def split(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Return the positions of `sizes` in consecutive groups of at most `limit` bytes.

    A single size over the limit makes a group of its own; no group is empty.
    """
    groups: list[list[int]] = []
    room = 0
    for at, size in enumerate(sizes):
        if not groups or size > room:
            groups.append([])
            room = limit
        groups[-1].append(at)
        room -= size
    return groups


def place(tensors: Sequence[Draft]) -> Placed:
    """Return header and offsets of one file that holds `tensors`.

    Wider dtypes come first, as the safetensors library orders them, so that every tensor is aligned to its dtype
    without padding; within a dtype width the given order is kept.
    """
    order = sorted(range(len(tensors)), key=lambda i: -headers.DTYPE_BYTES[tensors[i].dtype])
    ordered = [tensors[i] for i in order]
    header = headers.build_header(((t.name, t.dtype, t.shape, t.size) for t in ordered), METADATA)
    offsets, at = [], len(header)
    for i, t in zip(order, ordered, strict=True):
        offsets.append((i, at))
        at += t.size
    return Placed(header, at, tuple(offsets))


def file_names(stem: str, count: int, always_number: bool) -> list[str]:
    """Return `count` shard names such as `model-00001-of-00003.safetensors`; a lone one may go unnumbered."""
    if count == 1 and not always_number:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
