"""Weights that were never written: zeros in a shard whose room a downloader had reserved, and the files it leaves.

Such a shard has the right size and a good header. No trained matrix is zero throughout, so some bytes of each are
looked at, and all of those that look so. Finding nothing proves nothing; `verify --source` and digests do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from ds4convert.checkpoint.folder import Checkpoint, read_checkpoint
from ds4convert.checkpoint.types import DRAFTER, TensorInfo
from ds4convert.errors import InputError
from ds4convert.storage.byte_source import ByteSource
from ds4convert.storage.safe_open import names_in
from ds4convert.words.terminal import show

LEFT_BY_DOWNLOADS = (".aria2", ".incomplete", ".part", ".partial", ".crdownload", ".download", ".opdownload")
"""Endings of what stands beside (or for) a file that is being downloaded: aria2, huggingface_hub, wget, browsers."""

LOOKS = 20_000
"""Matrices that are looked at, at most, before they are all read anyway: on a hard disk each costs milliseconds."""

FEW_LOOKS = 2_000
"""The same for commands that read headers alone, which name a few matrices of zeros and do not count the others. A
shard that was not downloaded has zeros at most of its places."""

LOOK_BYTES = 64
SHOWN = 3
MAY_BE_ZERO = ("embed", "norm", "markov", "bias")
"""Parts of names of what a training may leave at zero: rows of unused tokens, norms, biases."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """One matrix of a file: its name (with the expert, where a tensor holds several) and its bytes."""

    name: str
    start: int
    size: int


def warnings(checkpoint: Checkpoint, looks: int = LOOKS) -> list[str]:
    """Return what tells of an interrupted download in a folder: one text per file; `looks` matrices are looked at."""
    return [*unfinished(checkpoint), *(t for t in _zeros(checkpoint, looks) if t)]


def of_folder(folder: Path, looks: int = LOOKS) -> list[str]:
    """Return the warnings of a folder and of its drafter folder; none where headers cannot be read."""
    out: list[str] = []
    for place in (folder, folder / DRAFTER):
        with suppress(InputError):
            out += warnings(read_checkpoint(place), looks)
    return out


def unfinished(checkpoint: Checkpoint) -> list[str]:
    """Return a text for each shard that a downloader's control file stands beside."""
    there = set(names_in(checkpoint.path))
    return [
        f"{show(name)}: {show(name + end)} lies beside it, so its download was not finished: let the downloader "
        "finish, or fetch the file again"
        for name in checkpoint.file_names
        for end in LEFT_BY_DOWNLOADS
        if name + end in there
    ]


def _zeros(checkpoint: Checkpoint, looks: int) -> Iterator[str]:
    step = max(1, sum(1 for h in checkpoint.headers for _ in _matrices(h.tensors)) // looks)
    with closing(checkpoint.bytes) as source:
        for number, name in enumerate(checkpoint.file_names):
            matrices = list(_matrices(checkpoint.headers[number].tensors))
            yield _of_file(source, name, matrices, step, looks >= LOOKS)


def _of_file(source: ByteSource, name: str, matrices: list[Matrix], step: int, all_of_them: bool) -> str:
    zero = (m.name for m in matrices[::step] if _is_zero(source, name, m))
    found = list(islice(zero, None if all_of_them else SHOWN + 1))
    if found and step > 1 and all_of_them:
        found = [m.name for m in matrices if _is_zero(source, name, m)]
    if not found:
        return ""
    count = f"{len(found) - SHOWN:,} more matrices" if all_of_them else "more"
    more = f" and {count}" if len(found) > SHOWN else ""
    return (
        f"{show(name)}: {', '.join(show(n) for n in found[:SHOWN])}{more}: zeros throughout, as no trained matrix is. "
        "Its download was not finished, or the disk lost it: fetch the file again and compare its sha256"
    )


def _matrices(tensors: Iterable[TensorInfo]) -> Iterator[Matrix]:
    for t in tensors:
        if len(t.shape) not in {2, 3} or not t.size or not t.name.endswith((".weight", "_proj")):
            continue
        if any(part in t.name for part in MAY_BE_ZERO):
            continue
        count = t.shape[0] if len(t.shape) == 3 else 1
        each = t.size // count
        for n in range(count):
            yield Matrix(f"{t.name}[{n}]" if count > 1 else t.name, t.start + n * each, each)


def _is_zero(source: ByteSource, name: str, m: Matrix) -> bool:
    middle = m.size // 2
    if source.read(name, m.start + middle, min(LOOK_BYTES, m.size - middle)).strip(b"\0"):
        return False
    return not any(piece.strip(b"\0") for piece in source.pieces(name, m.start, m.size))
