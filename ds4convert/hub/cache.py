"""The Hub client's own cache, read where a file lies whole in it: by commit, size, and the digest in its name."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ds4convert.errors import EnvironmentFault, HeaderError
from ds4convert.files import Disk, disk_errors
from ds4convert.storage.digests import feed, git_blob, git_id
from ds4convert.storage.local_files import LocalFiles
from ds4convert.storage.safe_open import MAX_SMALL_BYTES
from ds4convert.words.terminal import show

if TYPE_CHECKING:
    from ds4convert.hub.records import RemoteFile, Repo


_DIGEST = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def _folder(repo: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"


def whole_in_cache(repo: str, commit: str, name: str, size: int, etag: str) -> Path | None:
    """Return the path of a file that the client has downloaded whole, None where it has not.

    The client names a blob by its ETag and links to it; a partial download has another name until it is whole. On a
    disk without links the file itself lies there, under its own name. A file whose bytes turned out wrong
    (`distrust`) counts as not there.
    """
    path = _folder(repo) / "snapshots" / commit / name
    with suppress(OSError, ValueError):
        target = path.resolve(strict=True)
        is_blob = path.is_symlink() and target.name == etag
        if not (is_blob or not path.is_symlink()) or _mark(repo, commit, name).exists():
            return None
        if target.is_relative_to(_folder(repo).resolve()) and target.stat().st_size == size:
            return target
    return None


def _mark(repo: str, commit: str, name: str) -> Path:
    from huggingface_hub import constants

    key = hashlib.sha256(f"{repo}\n{commit}\n{name}".encode()).hexdigest()
    return Path(constants.HF_HOME) / "ds4convert" / "distrusted" / key


def distrust(repo: str, commit: str, name: str) -> None:
    """Remember that the cached bytes of a file are not those that the Hub lists: from now on it is fetched.

    Offline there is nowhere to fetch it from: raises `EnvironmentFault`, which names the file.
    """
    from huggingface_hub import constants

    path = _folder(repo) / "snapshots" / commit / name
    if not path.exists():
        return
    if constants.is_offline_mode():
        raise EnvironmentFault(
            f"{repo}: {name}: the Hub client's cache holds other bytes than the Hub listed, and offline mode is on "
            f"(HF_HUB_OFFLINE): remove {path.resolve()}, and fetch it again with the network"
        )
    mark = _mark(repo, commit, name)
    with disk_errors("writing", mark):
        Disk().make_folder(mark.parent)
        Disk().write_file(mark, b"")


def read_local(path: Path, start: int, size: int) -> Iterator[bytes]:
    """Yield a range of a local file. Raises `EnvironmentFault` where it ends early."""
    try:
        with closing(LocalFiles.at(path)) as files:
            yield from files.pieces(path.name, start, size)
    except HeaderError as e:
        raise EnvironmentFault(f"{path.parent}: {e}; clear it from the Hub client's cache") from None


def repo_in_cache(name: str, revision: str) -> Repo:
    """Return a repo as the cache holds it, without a request. Raises `EnvironmentFault` where it holds none."""
    from ds4convert.hub.records import Repo, check_name

    folder, commit = _folder(name), revision
    with suppress(OSError, UnicodeDecodeError):
        if not _COMMIT.fullmatch(revision):
            commit = (folder / "refs" / revision).read_text("ascii").strip()
    snapshot = folder / "snapshots" / commit
    if not _COMMIT.fullmatch(commit) or not snapshot.is_dir():
        raise EnvironmentFault(
            f"{name}: offline mode is on (HF_HUB_OFFLINE), and the Hub client's cache ("
            f"{folder.parent}) does not hold revision {show(revision)}",
            hint="unset it, or name a local folder",
        )
    files: list[RemoteFile] = []
    for path in sorted(p for p in snapshot.rglob("*") if p.is_file()):
        file = path.relative_to(snapshot).as_posix()
        check_name(file, name)
        files.append(_cached_file(file, path))
    return Repo(name, commit, tuple(files), cached_in=snapshot)


def _cached_file(name: str, path: Path) -> RemoteFile:
    from ds4convert.hub.records import RemoteFile

    target = path.resolve()
    size, blob = target.stat().st_size, target.name
    if not (path.is_symlink() and _DIGEST.fullmatch(blob)):  # without links it holds the files themselves
        blob = _git_id(target, size) if size <= MAX_SMALL_BYTES else git_id(f"{name} {size}".encode())
    return RemoteFile(name, size, blob, blob if len(blob) == 64 else None)


def _git_id(path: Path, size: int) -> str:
    digest = git_blob(size)
    with closing(LocalFiles.at(path)) as files:
        feed(files, path.name, digest)
    return digest.hexdigest()
