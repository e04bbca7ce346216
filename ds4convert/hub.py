"""A checkpoint on the Hugging Face Hub: its files at one commit, its small files, byte ranges of the others.

Listing and whole files are left to huggingface_hub. Ranges are own requests with its session, headers and endpoint;
each answer has to be exactly the range asked for, of the file that the listing describes. Names of a repo are
untrusted: one that could leave a folder, or that some system takes for a device, refuses the repo.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ds4convert import headers
from ds4convert.convert import Source, recognised
from ds4convert.errors import EnvironmentFault, HeaderError, InputError, UsageError
from ds4convert.files import Disk, disk_errors
from ds4convert.folder import CONFIG_NAME, INDEX_NAME, MAX_FILES, MAX_SMALL_BYTES, Checkpoint, read_checkpoint
from ds4convert.hub_errors import AGAIN, hub_errors
from ds4convert.sidefiles import CARRIED
from ds4convert.strictjson import show
from ds4convert.types import Header, Origin, SourceFile

SCHEME = "hf://"
FIRST_BYTES = 224 << 10
"""Read of each shard at first: its header with few exceptions, and 46 shards together stay below 12 MB."""

PIECE_BYTES = 1 << 20
TRIES = 6
LONGEST_WAIT_S = 30.0
TRANSIENT = {408, 429, 500, 502, 503, 504}
_DEVICES = {"con", "prn", "aux", "nul", *(f"{d}{n}" for d in ("com", "lpt") for n in range(1, 10))}


@dataclass(frozen=True)
class RemoteFile:
    """One file of a repo: its size in bytes; `etag` is its sha256 where it is stored as a large file, else git's id."""

    name: str
    size: int
    etag: str
    sha256: str | None


@dataclass(frozen=True)
class Repo:
    """A repo at one commit."""

    name: str
    commit: str
    files: tuple[RemoteFile, ...]
    endpoint: str | None = None
    token: str | None = None

    def shards(self) -> list[RemoteFile]:
        """Return the safetensors files at the top of the repo."""
        return [f for f in self.files if f.name.endswith(".safetensors") and "/" not in f.name]


def split_name(src: str, revision: str | None = None) -> tuple[str, str | None]:
    """Return (owner/name, revision or None) of `[hf://]owner/name[@revision]`. Raises `UsageError`."""
    name, at, found = src.removeprefix(SCHEME).partition("@")
    parts = name.split("/")
    if len(parts) != 2 or not all(parts) or (at and not found) or not name.isprintable():
        raise UsageError(f"{show(src)}: is not a repo of the Hub; expected hf://owner/name or hf://owner/name@revision")
    if found and revision and found != revision:
        raise UsageError(f"{show(src)}: names the revision {show(found)}, --revision another; give one of them")
    return name, revision or found or None


def check_name(name: str, repo: str) -> None:
    """Raise `InputError` unless a file's name stays inside its folder on every system."""
    parts = name.split("/")
    bad = (
        not name.isprintable()
        or any(c in name for c in '\\:*?"<>|')
        or any(p in {"", ".", ".."} or len(p.encode()) > 255 or p != p.strip() for p in parts)
        or any(p.split(".")[0].lower() in _DEVICES for p in parts)
        or parts[0] in {".ds4convert", ".cache"}
    )
    if bad:
        raise InputError(
            f"{repo}: holds a file named {show(name)!r}, which is not a safe file name; the repo is refused. "
            "Nothing was written"
        )


def open_repo(src: str, revision: str | None = None, endpoint: str | None = None, token: str | None = None) -> Repo:
    """Return the files of a repo at the commit that its revision (default: main) names now: one request."""
    from huggingface_hub import HfApi

    name, revision = split_name(src, revision)
    with hub_errors(name):
        info = HfApi(endpoint=endpoint, token=token).model_info(name, revision=revision, files_metadata=True)
    files = []
    for f in info.siblings or []:
        check_name(f.rfilename, name)
        size, sha256 = f.size, f.lfs.sha256 if f.lfs else None
        if size is None or size < 0 or not (sha256 or f.blob_id):
            raise EnvironmentFault(f"{name}: the Hub does not tell size and digest of {show(f.rfilename)}. {AGAIN}")
        files.append(RemoteFile(f.rfilename, size, sha256 or f.blob_id or "", sha256))
    if len(files) > MAX_FILES or len({f.name.casefold() for f in files}) != len(files):
        raise InputError(f"{name}: over {MAX_FILES} files, or two names that some systems take for one; refused")
    if not info.sha:
        raise EnvironmentFault(f"{name}: the Hub does not tell the commit. {AGAIN}")
    return Repo(name, info.sha, tuple(files), endpoint, token)


class _Again(Exception):
    """An answer that may be better next time; `wait_s` is what the Hub asked for."""

    def __init__(self, why: str, wait_s: float = 0.0) -> None:
        super().__init__(why)
        self.wait_s = wait_s


def read_range(repo: Repo, file: RemoteFile, start: int, size: int) -> Iterator[bytes]:
    """Yield the bytes `start .. start + size` of a file in pieces; a cut connection goes on where it broke off.

    Raises `EnvironmentFault` after several tries in a row without a byte, and at once where the file is no longer the
    one that was listed; `InputError` where the answer is not the file's bytes at all.
    """
    done = failed = 0
    while done < size:
        try:
            for piece in _request(repo, file, start + done, size - done):
                yield piece
                done, failed = done + len(piece), 0
            if done < size:
                raise _Again("the connection was cut")
        except _Again as e:
            failed += 1
            if failed == TRIES:
                raise EnvironmentFault(f"{repo.name}: {file.name}: {e}, {TRIES} times. {AGAIN}") from None
            time.sleep(min(LONGEST_WAIT_S, max(e.wait_s, 0.1 * 2**failed)))


def _request(repo: Repo, file: RemoteFile, start: int, size: int) -> Iterator[bytes]:
    from huggingface_hub import constants, errors, get_session, hf_hub_url
    from huggingface_hub.utils import (  # type: ignore[attr-defined,unused-ignore]
        build_hf_headers,
        hf_raise_for_status,
    )

    url = hf_hub_url(repo.name, file.name, revision=repo.commit, endpoint=repo.endpoint)
    wanted = {"range": f"bytes={start}-{start + size - 1}", "accept-encoding": "identity"}
    head = build_hf_headers(token=repo.token, headers=wanted)
    transport = errors.HTTPError  # type: ignore[attr-defined,unused-ignore]
    try:
        with get_session().stream("GET", url, headers=head, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as answer:
            expired = answer.status_code == 403 and answer.history  # of a signed address; the next request gets another
            if answer.status_code in TRANSIENT or expired:
                raise _Again(f"the Hub answered HTTP {answer.status_code}", _wait(answer.headers.get("retry-after")))
            if answer.status_code >= 400:
                with hub_errors(repo.name):
                    answer.read()
                    hf_raise_for_status(answer)
            _check_answer(repo, file, [*answer.history, answer], start, size)
            left = size
            for piece in answer.iter_raw(PIECE_BYTES):
                if len(piece) > left:
                    raise _Again("the Hub sent more than was asked for")
                left -= len(piece)
                yield piece
    except transport as e:
        if isinstance(e, errors.HfHubHTTPError):
            raise
        raise _Again(f"the connection failed ({type(e).__name__})") from None
    except errors.OfflineModeIsEnabled as e:
        with hub_errors(repo.name):
            raise e


def _wait(text: str | None) -> float:
    with suppress(ValueError, TypeError):
        return max(0.0, float(text or 0))
    return 0.0


def _check_answer(repo: Repo, file: RemoteFile, chain: list[object], start: int, size: int) -> None:
    """Raise unless the answer at the end of the redirects `chain` is the range asked for, of the file listed."""
    tables = [getattr(a, "headers") for a in chain]  # noqa: B009 - the type differs between versions of the client
    tags = [t.get("x-linked-etag") for t in tables if t.get("x-linked-etag")] or [tables[0].get("etag")]
    tag = (tags[0] or "").removeprefix("W/").strip('"')
    if tag != file.etag:
        raise EnvironmentFault(
            f"{repo.name}: {file.name}: the Hub serves another file than it listed (etag {show(tag)}, expected "
            f"{file.etag}); it is being changed. Nothing of it was used. Run the command again, or name a revision"
        )
    status = getattr(chain[-1], "status_code")  # noqa: B009
    found, expected = tables[-1].get("content-range"), f"bytes {start}-{start + size - 1}/{file.size}"
    if status != 206:
        raise _Again(f"the Hub ignored the byte range (HTTP {status})")
    if found != expected:
        raise _Again(f"the Hub sent {show(str(found))}, expected {expected}")


def read_bytes(repo: Repo, file: RemoteFile, start: int, size: int) -> bytes:
    """Return a range that fits in memory."""
    return b"".join(read_range(repo, file, start, size))


# --- headers -----------------------------------------------------------------------------------------------------


def _header_bytes(repo: Repo, file: RemoteFile) -> bytes:
    """Return length and JSON of a shard's header: one request, or two where it is long."""
    where = f"{repo.name}: {file.name}"
    first = read_bytes(repo, file, 0, min(FIRST_BYTES, file.size))
    length = headers.header_length(first[: headers.LENGTH_BYTES], file.size, where)
    if not first.startswith(b"{", headers.LENGTH_BYTES):
        raise HeaderError(f"{where}: the header is not JSON text; this is not a safetensors file")
    end = headers.LENGTH_BYTES + length
    rest = read_bytes(repo, file, len(first), end - len(first)) if end > len(first) else b""
    return (first + rest)[:end]


@dataclass(frozen=True)
class Files:
    """A repo's shards as a conversion reads them (`window.Remote`): `path` is the cache folder of its small files."""

    repo: Repo
    path: Path

    def _file(self, name: str) -> RemoteFile:
        return next(f for f in self.repo.files if f.name == name)

    def fetch(self, name: str, start: int, size: int) -> Iterator[bytes]:
        """Yield the bytes of a range, as `read_range`."""
        return read_range(self.repo, self._file(name), start, size)

    def sha256(self, name: str) -> str | None:
        """Return the digest that the Hub lists."""
        return self._file(name).sha256

    def mark(self, name: str) -> int:
        """Return a number made of the etag."""
        return int(hashlib.sha256(self._file(name).etag.encode()).hexdigest()[:12], 16)

    def head(self, name: str) -> bytes:
        """Return length and text of a shard's header, from the cache."""
        return _cached_header(self.repo, self._file(name), self.path, Disk())


def origin(repo: Repo) -> Origin:
    """Return where the files of a repo come from."""
    return Origin(repo.name, repo.commit, {f.name: f.sha256 or f.etag for f in repo.shards()})


def source(repo: Repo, jobs: int = 8) -> Source:
    """Return a repo as the source of a conversion, which fetches its tensors as they are needed."""
    found = read_remote(repo, jobs)
    return recognised(found, origin(repo), Files(repo, found.path))


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


def fetch_small(repo: Repo, file: RemoteFile) -> bytes:
    """Return a whole small file, checked against its digest."""
    raw = read_bytes(repo, file, 0, file.size) if file.size else b""
    git = hashlib.sha1(b"blob %d\0" % len(raw) + raw, usedforsecurity=False).hexdigest()
    if (hashlib.sha256(raw).hexdigest() if file.sha256 else git) != file.etag:
        raise EnvironmentFault(f"{repo.name}: {file.name}: its bytes do not have the digest that was listed. {AGAIN}")
    return raw


def _fill(repo: Repo, folder: Path, disk: Disk, jobs: int) -> None:
    """Write the small files into the cache, and empty ones for the names that a conversion leaves out anyway."""
    small = small_files(repo)

    def one(file: RemoteFile) -> None:
        path = folder / file.name
        if not (path.is_file() and path.stat().st_size == file.size):
            raw = fetch_small(repo, file)
            with disk_errors("writing", path):
                disk.write_file(path, raw)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, small))
    known = {f.name for f in small}
    for top, slash, _ in {f.name.partition("/") for f in repo.files if f.name not in known}:
        if not (top.endswith(".safetensors") or top.startswith(".") or (folder / top).exists()):
            with disk_errors("writing", folder / top):
                if slash:
                    disk.make_folder(folder / top)
                else:
                    disk.write_file(folder / top, b"")


def read_remote(repo: Repo, jobs: int = 8, progress: Callable[[int], None] = lambda n: None) -> Checkpoint:
    """Return the headers of a repo's checkpoint, without its tensors. `path` is a cache folder of its small files."""
    folder, disk = _cache(repo), Disk()
    with disk_errors("writing", folder):
        disk.make_folder(folder / ".headers")
    shards = {f.name: f for f in repo.shards()}
    if not shards:
        raise InputError(f"{repo.name}: holds no .safetensors file; is this a checkpoint?")
    _fill(repo, folder, disk, jobs)

    with ThreadPoolExecutor(jobs) as pool:
        raws = dict(
            zip(shards, pool.map(lambda f: _cached_header(repo, f, folder, disk), shards.values()), strict=True)
        )

    def header(name: str, at: int) -> tuple[SourceFile, Header]:
        if name not in raws:
            raise HeaderError(f"{repo.name}: {name}: the index names it, but the repo has no such file")
        raw, size = raws[name][headers.LENGTH_BYTES :], shards[name].size
        progress(1)
        return SourceFile(name, size, hashlib.sha256(raw).hexdigest()), headers.parse_header(raw, size, name, at)

    return read_checkpoint(folder, header, sorted(shards))
