"""A folder of an object store as a checkpoint: headers by byte range, small files kept in a cache.

Stores tell no sha256 of a whole object. Where a file SHA256SUMS lies beside the shards, what is fetched is compared
with its digests; elsewhere length, order and ETag are all that is known.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ds4convert.checkpoint.folder import CONFIG_NAME, INDEX_NAME, Checkpoint, read_checkpoint
from ds4convert.errors import EnvironmentFault, HeaderError, InputError
from ds4convert.execution.threads import each
from ds4convert.files import Disk, disk_errors
from ds4convert.hub.objects.address import Address, parse
from ds4convert.hub.objects.store import AGAIN, ObjectFolder, listed, opened, read_range
from ds4convert.hub.records import ListedFiles, RemoteFile
from ds4convert.planning.side_files import CARRIED
from ds4convert.storage.safe_open import MAX_SMALL_BYTES

SUMS_NAME = "SHA256SUMS"
FIRST_BYTES = 224 << 10
"""Read of each shard at first and kept: its header with few exceptions."""

JOBS = 8
_SUM = re.compile(r"([0-9a-fA-F]{64}) [ *](?:\./)?(\S.*)")


class ObjectFiles(ListedFiles):
    """The shards of a folder, read by range; the first bytes of each are kept, as headers are read several times."""

    def __init__(self, folder: ObjectFolder) -> None:
        """Take a folder as it was listed."""
        super().__init__(folder.shards())
        self.told = without_digest(folder)
        self._folder = folder
        self._firsts: dict[str, bytes] = {}

    def __reduce__(self) -> tuple[Callable[[Address, tuple[RemoteFile, ...]], ObjectFiles], tuple[Any, ...]]:
        """Return how another process reads the same objects, versions included: with rights of its own."""
        return _read_again, (self._folder.address, self._folder.files)

    def fetch_firsts(self) -> None:
        """Fetch the beginning of all shards, several at a time."""

        def one(file: RemoteFile) -> None:
            self._firsts[file.name] = b"".join(read_range(self._folder, file, 0, min(FIRST_BYTES, file.size)))

        each(one, list(self._files.values()), JOBS)

    def _missing(self, name: str) -> HeaderError:
        return HeaderError(f"{self._folder.name}: {name}: the index names it, but the folder has no such file")

    def _at_hand(self, file: RemoteFile, end: int) -> bytes | None:
        first = self._firsts.get(file.name, b"")
        return first if end <= len(first) else None

    def _fetched(self, file: RemoteFile, start: int, n: int) -> Iterator[bytes]:
        return read_range(self._folder, file, start, n)


def _read_again(address: Address, files: tuple[RemoteFile, ...]) -> ObjectFiles:
    return ObjectFiles(ObjectFolder(address, files, opened(address)))


def open_folder(src: str) -> ObjectFolder:
    """Return the folder that an address names, listed, with the digests that its SHA256SUMS tells."""
    folder = listed(parse(src))
    sums = next((f for f in folder.files if f.name == SUMS_NAME), None)
    if sums is None:
        return folder
    digests = _sums(_small(folder, sums).decode("utf-8", "replace"))
    return replace(folder, files=tuple(replace(f, sha256=digests.get(f.name)) for f in folder.files))


def _sums(text: str) -> dict[str, str]:
    """Return sha256 by file name from the lines that `sha256sum` writes."""
    found = (_SUM.fullmatch(line.strip()) for line in text.splitlines())
    return {m[2]: m[1].lower() for m in found if m}


def without_digest(folder: ObjectFolder) -> str | None:
    """Return what is to be said where nobody tells the digests of shards; None where all are known."""
    bare = [f.name for f in folder.shards() if f.sha256 is None]
    if not bare:
        return None
    return (
        f"{folder.name}: no sha256 is known of {len(bare)} of {len(folder.shards())} shards, as stores tell none: "
        f"length and ETag are all that is known. A file {SUMS_NAME} beside them helps (sha256sum *.safetensors)"
    )


def _small(folder: ObjectFolder, file: RemoteFile) -> bytes:
    if file.size > MAX_SMALL_BYTES:
        raise HeaderError(f"{folder.name}: {file.name}: {file.size} bytes, expected at most {MAX_SMALL_BYTES}")
    raw = b"".join(read_range(folder, file, 0, file.size)) if file.size else b""
    if file.sha256 is not None and hashlib.sha256(raw).hexdigest() != file.sha256:
        raise EnvironmentFault(f"{folder.name}: {file.name}: its bytes do not have the digest of {SUMS_NAME}. {AGAIN}")
    return raw


def _cache(folder: ObjectFolder) -> Path:
    """Return where the small files of this state of the folder are kept."""
    from huggingface_hub import constants

    told = "\n".join([folder.name, *(f"{f.name} {f.size} {f.etag}" for f in folder.files)])
    return Path(constants.HF_HOME) / "ds4convert" / "objects" / hashlib.sha256(told.encode()).hexdigest()[:32]


def read_objects(folder: ObjectFolder) -> Checkpoint:
    """Return the headers of a folder's checkpoint, without its tensors. `path` is a cache of its small files."""
    if not folder.shards():
        raise InputError(f"{folder.name}: holds no .safetensors file; is this a checkpoint?")
    path, disk = _cache(folder), Disk()
    wanted = {CONFIG_NAME, INDEX_NAME, *CARRIED}

    def one(file: RemoteFile) -> None:
        raw = _small(folder, file)
        with disk_errors("writing", path):
            disk.write_file(path / file.name, raw)

    with disk_errors("writing", path):
        disk.make_folder(path)
    each(one, [f for f in folder.files if f.name in wanted], JOBS)
    files = ObjectFiles(folder)
    files.fetch_firsts()
    return read_checkpoint(path, files, [f.name for f in folder.shards()])


class _Door:
    """How folders of object stores are opened. A copy of one here makes the same result, its manifest included."""

    def listed(self, text: str) -> ObjectFolder:
        """Return the folder that a text names, listed."""
        return open_folder(text)

    def headers(self, listing: ObjectFolder) -> Checkpoint:
        """Return its checkpoint by headers; tensors are read when they are asked for."""
        return read_objects(listing)

    def provenance(self, listing: ObjectFolder) -> None:
        """Return nothing: a copy of the files is as good."""
        return None


DOOR = _Door()
