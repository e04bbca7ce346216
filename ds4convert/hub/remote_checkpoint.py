"""A repo of the Hub as a checkpoint: headers by byte range, small files kept in a cache."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from ds4convert.checkpoint import headers
from ds4convert.checkpoint.folder import CONFIG_NAME, INDEX_NAME, Checkpoint, read_checkpoint
from ds4convert.checkpoint.types import Provenance
from ds4convert.errors import Ds4Error, EnvironmentFault, HeaderError, InputError
from ds4convert.execution.threads import each
from ds4convert.files import Disk, disk_errors
from ds4convert.hub import cache
from ds4convert.hub.byte_ranges import read_bytes, read_range
from ds4convert.hub.errors import AGAIN
from ds4convert.hub.records import ListedFiles, RemoteFile, Repo
from ds4convert.hub.repo import open_repo
from ds4convert.planning.side_files import CARRIED
from ds4convert.storage.digests import git_id
from ds4convert.storage.records import LENGTH_BYTES
from ds4convert.storage.safe_open import MAX_SMALL_BYTES

FIRST_BYTES = 224 << 10
"""Read of each shard at first: its header with few exceptions, and 46 shards together stay below 12 MB."""


# --- headers -----------------------------------------------------------------------------------------------------


def _header_bytes(repo: Repo, file: RemoteFile) -> bytes:
    """Return length and JSON of a shard's header: one request, or two where it is long."""
    where = f"{repo.name}: {file.name}"
    first = read_bytes(repo, file, 0, min(FIRST_BYTES, file.size))
    length = headers.header_length(first[:LENGTH_BYTES], file.size, where)
    if not first.startswith(b"{", LENGTH_BYTES):
        raise HeaderError(f"{where}: the header is not JSON text; this is not a safetensors file")
    end = LENGTH_BYTES + length
    rest = read_bytes(repo, file, len(first), end - len(first)) if end > len(first) else b""
    return (first + rest)[:end]


class RemoteFiles(ListedFiles):
    """The shards of a repo, read by range. What is told of their headers is kept in `folder`, our cache of the repo."""

    def __init__(self, repo: Repo, folder: Path) -> None:
        super().__init__(repo.shards())
        self._repo, self._folder = repo, folder
        self._begins: dict[str, int] = {}  # where data begin, of files whose header is in the cache

    def __reduce__(self) -> tuple[Callable[[Repo], RemoteFiles], tuple[Repo]]:
        """Return how another process reads the same commit: with a cache and a login of its own."""
        return _read_again, (replace(self._repo, token=None),)

    def _missing(self, name: str) -> Ds4Error:
        if self._repo.cached_in is not None:
            return _not_cached(self._repo, f"no {name}")
        return HeaderError(f"{self._repo.name}: {name}: the index names it, but the repo has no such file")

    def _at_hand(self, file: RemoteFile, end: int) -> bytes | None:
        return self._head(file) if end <= self._begins.get(file.name, 0) else None

    def _fetched(self, file: RemoteFile, start: int, n: int) -> Iterator[bytes]:
        return read_range(self._repo, file, start, n)

    def fill_cache(self, jobs: int) -> None:
        """Fetch all headers into the cache, several at a time."""

        def one(file: RemoteFile) -> None:
            self._begins[file.name] = len(self._head(file))

        each(one, list(self._files.values()), jobs)

    def _head(self, file: RemoteFile) -> bytes:
        return _cached_header(self._repo, file, self._folder, Disk())

    def distrust(self, name: str) -> None:
        """Fetch a file from now on, whatever the Hub client's cache holds of it: its bytes were wrong."""
        cache.distrust(self._repo.name, self._repo.commit, name)


def _read_again(repo: Repo) -> RemoteFiles:
    return RemoteFiles(repo, _cache(repo))


def origin(repo: Repo) -> Provenance:
    """Return where the files of a repo come from."""
    return Provenance(repo.name, repo.commit, {f.name: f.sha256 or f.etag for f in repo.shards()})


def _cache(repo: Repo) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "ds4convert" / repo.name.replace("/", "--") / repo.commit


def _cached_header(repo: Repo, file: RemoteFile, folder: Path, disk: Disk) -> bytes:
    """Return a header from the cache, where it lies under the file's etag with a sha256 of its own; else fetch it."""
    path = folder / ".headers" / hashlib.sha256(f"{file.name}\n{file.etag}".encode()).hexdigest()
    with suppress(OSError):
        digest, _, raw = path.read_bytes().partition(b"\n")
        if hashlib.sha256(raw).hexdigest().encode() == digest:
            return raw
    raw = _header_bytes(repo, file)
    with disk_errors("writing", path):
        disk.write_file(path, hashlib.sha256(raw).hexdigest().encode() + b"\n" + raw)
    return raw


def small_files(repo: Repo) -> list[RemoteFile]:
    """Return the files of a repo that a checkpoint needs beside its shards."""
    wanted = {CONFIG_NAME, INDEX_NAME, *CARRIED}
    found = [f for f in repo.files if f.name in wanted]
    if large := next((f for f in found if f.size > MAX_SMALL_BYTES), None):
        raise HeaderError(f"{repo.name}: {large.name}: {large.size} bytes, expected at most {MAX_SMALL_BYTES}")
    return found


def has_digest(raw: bytes, file: RemoteFile) -> bool:
    """Return whether bytes have the digest that is listed for a file: sha256 of a large one, else git's id."""
    return (hashlib.sha256(raw).hexdigest() if file.sha256 else git_id(raw)) == file.etag


def fetch_small(repo: Repo, file: RemoteFile) -> bytes:
    """Return a whole small file, checked against its digest."""
    raw = read_bytes(repo, file, 0, file.size) if file.size else b""
    if not has_digest(raw, file):
        cache.distrust(repo.name, repo.commit, file.name)
        raw = read_bytes(repo, file, 0, file.size) if file.size else b""
    if not has_digest(raw, file):
        raise EnvironmentFault(f"{repo.name}: {file.name}: its bytes do not have the digest that was listed. {AGAIN}")
    return raw


def _is_kept(path: Path, file: RemoteFile) -> bool:
    """Return whether our cache holds a small file, by its digest."""
    with suppress(OSError):
        return path.is_file() and path.stat().st_size == file.size and has_digest(path.read_bytes(), file)
    return False


def _fill(repo: Repo, folder: Path, disk: Disk, jobs: int) -> None:
    """Write the small files into the cache, and empty ones for the names that a conversion leaves out anyway."""
    small = small_files(repo)

    def one(file: RemoteFile) -> None:
        path = folder / file.name
        if not _is_kept(path, file):
            raw = fetch_small(repo, file)
            with disk_errors("writing", path):
                disk.write_file(path, raw)

    each(one, small, jobs)
    known = {f.name for f in small}
    for top, slash, _ in {f.name.partition("/") for f in repo.files if f.name not in known}:
        if not (top.endswith(".safetensors") or top.startswith(".") or (folder / top).exists()):
            with disk_errors("writing", folder / top):
                if slash:
                    disk.make_folder(folder / top)
                else:
                    disk.write_file(folder / top, b"")


def _not_cached(repo: Repo, what: str) -> EnvironmentFault:
    return EnvironmentFault(
        f"{repo.name}: offline mode is on (HF_HUB_OFFLINE), and the Hub client's cache ("
        f"{repo.cached_in}) holds only a part of the repo: {what}",
        hint="Unset it, or name a local folder",
    )


def read_remote(repo: Repo, jobs: int = 8) -> Checkpoint:
    """Return the headers of a repo's checkpoint, without its tensors. `path` is a cache folder of its small files."""
    folder, disk = _cache(repo), Disk()
    with disk_errors("writing", folder):
        disk.make_folder(folder / ".headers")
    if not repo.shards() and repo.cached_in is not None:
        raise _not_cached(repo, "no .safetensors file")
    if not repo.shards():
        raise InputError(f"{repo.name}: holds no .safetensors file; is this a checkpoint?")
    _fill(repo, folder, disk, jobs)
    files = RemoteFiles(repo, folder)
    files.fill_cache(jobs)
    return read_checkpoint(folder, files, sorted(f.name for f in repo.shards()))


class _Door:
    """How repos of the Hub are opened."""

    def listed(self, text: str) -> Repo:
        """Return the repo that a text names, listed."""
        return open_repo(text)

    def headers(self, listing: Repo) -> Checkpoint:
        """Return its checkpoint by headers; tensors are read when they are asked for."""
        return read_remote(listing)

    def provenance(self, listing: Repo) -> Provenance:
        """Return the repo and its commit."""
        return origin(listing)


DOOR = _Door()
