"""Where bytes are: a range of a source file, and what a source file was when it was planned."""

from __future__ import annotations

from dataclasses import dataclass

LENGTH_BYTES = 8

Fingerprint = tuple[int, int]
"""Size and modification time (ns) of a file, or numbers as good: enough to notice that it was replaced between two
runs."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One source file: its name relative to the checkpoint folder, size in bytes, sha256 of its header."""

    name: str
    size: int
    header_sha256: str


@dataclass(frozen=True, slots=True)
class ByteRange:
    """`size` bytes from absolute `offset` of source file number `file`."""

    file: int
    offset: int
    size: int
