"""Digests of files: one way to put bytes into them, whatever the kind, and wherever the file is."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Protocol

from ds4convert.storage.byte_source import ByteSource
from ds4convert.storage.local_files import LocalFiles
from ds4convert.words import activity
from ds4convert.words.figures import Progress

HASH_CHUNK = 4 << 20


class Hash(Protocol):
    """A digest that is being taken: of hashlib or xxhash."""

    def update(self, data: bytes | memoryview, /) -> None:
        """Take in the next bytes."""

    def hexdigest(self) -> str:
        """Return the digest of what was taken in."""


def feed(
    source: ByteSource, name: str, *digests: Hash, start: int = 0, size: int | None = None,
    progress: Progress = lambda n: None,
) -> None:  # fmt: skip
    """Put `size` bytes of a file from `start` (all that follow, without a size) into `digests`, read once."""
    end = source.size(name) if size is None else start + size
    buffer = memoryview(bytearray(max(0, min(HASH_CHUNK, end - start))))
    for at in range(start, end, HASH_CHUNK):
        piece = buffer[: min(HASH_CHUNK, end - at)]
        source.read_into(name, at, piece)
        for digest in digests:
            digest.update(piece)
        progress(len(piece))


def git_blob(size: int) -> Hash:
    """Return the beginning of the id that git gives to a file of `size` bytes; its bytes are put in after."""
    return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)


def git_id(data: bytes) -> str:
    """Return the id that git gives to a file with these bytes."""
    made = git_blob(len(data))
    made.update(data)
    return made.hexdigest()


def sha256_of(source: ByteSource, name: str, progress: Progress = lambda n: None) -> str:
    """Return the sha256 hex digest of a file, read in pieces."""
    digest = hashlib.sha256()
    feed(source, name, digest, progress=progress)
    return digest.hexdigest()


def sha256_file(folder: Path, name: str, progress: Progress = lambda n: None) -> str:
    """Return the sha256 hex digest of a file of a folder here."""
    files = LocalFiles.of(folder, [name])
    activity.at(name)
    try:
        return sha256_of(files, name, progress)
    finally:
        files.close()
