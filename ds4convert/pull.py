"""Downloads from the Hub: a whole repo, its small files, or the tensors of one part by byte range.

A part becomes a checkpoint of its own: shards that hold the part's tensors in the order of the source, an index, the
small files, and `ds4convert_pull.json`, written last, which tells where each byte came from. Finished ranges are noted
in `.ds4convert/` after their bytes are synced, so that the same command goes on after an interruption.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ds4convert import convert, hub, strictjson
from ds4convert.errors import EnvironmentFault, InputError, InventoryError, OutputError, ValueFault
from ds4convert.files import PARTIAL, Disk, disk_errors, free_bytes
from ds4convert.folder import INDEX_NAME, read_checkpoint
from ds4convert.headers import build_header
from ds4convert.hub import RemoteFile, Repo
from ds4convert.hub_errors import AGAIN, hub_errors
from ds4convert.inventory import compare
from ds4convert.journal import STATE_FOLDER, Lock
from ds4convert.origin import PULL_RECORD
from ds4convert.shards import file_names
from ds4convert.types import JSON, TensorInfo

JOURNAL_NAME = "pull.jsonl"
RANGE_BYTES = 32 << 20
"""Largest range of one request, and what an interruption costs at most per worker."""

SCAN_BYTES = 16 << 20
DOWNLOADS = 2
"""How often a whole file whose bytes came wrong is fetched."""

_NOT_FINITE: dict[str, tuple[str, int, int]] = {
    "F8_E4M3": ("u1", 0x7F, 0x7F), "F8_E8M0": ("u1", 0xFF, 0xFF), "BF16": ("<u2", 0x7F80, 0x7F80),
    "F16": ("<u2", 0x7C00, 0x7C00), "F32": ("<u4", 0x7F800000, 0x7F800000),
}  # fmt: skip
"""Per dtype: how its codes are stored, and (mask, value) of those that are NaN or infinite."""

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Target:
    """One shard to be written: `header` first, then the bytes of `ranges` (source start, size) one after the other.

    `header_sha256` is of the source's header.
    """

    name: str
    source: RemoteFile
    header_sha256: str
    header: bytes
    tensors: tuple[TensorInfo, ...]
    ranges: tuple[tuple[int, int], ...]

    @property
    def size(self) -> int:
        """Return the full length in bytes."""
        return len(self.header) + sum(size for _, size in self.ranges)

    def pieces(self) -> Iterable[tuple[int, int, int]]:
        """Yield (offset here, start in the source, size) of each request."""
        offset = len(self.header)
        for start, size in self.ranges:
            for at in range(0, size, RANGE_BYTES):
                yield offset + at, start + at, min(RANGE_BYTES, size - at)
            offset += size


@dataclass(frozen=True)
class Selection:
    """What `--only mtp|backbone` will write."""

    repo: Repo
    only: str
    targets: tuple[Target, ...]

    @property
    def size(self) -> int:
        """Return the bytes of the shards."""
        return sum(t.size for t in self.targets)

    @property
    def id(self) -> str:
        """Return what an unfinished folder has to agree in to be gone on with."""
        files = [(t.name, t.source.name, t.source.etag, t.size, t.ranges) for t in self.targets]
        return strictjson.digest([self.repo.name, self.repo.commit, self.only, files])


def merged(tensors: Iterable[TensorInfo]) -> tuple[tuple[int, int], ...]:
    """Return (start, size) of the byte ranges of tensors in order, neighbours joined."""
    out: list[tuple[int, int]] = []
    for t in tensors:
        if out and out[-1][0] + out[-1][1] == t.start:
            out[-1] = (out[-1][0], out[-1][1] + t.size)
        else:
            out.append((t.start, t.size))
    return tuple(r for r in out if r[1])


def select(repo: Repo, only: str, jobs: int) -> Selection:
    """Return which ranges make up a part. Raises `InputError` where the repo is not a whole checkpoint."""
    source = convert.recognised(hub.read_remote(repo, jobs))
    findings = compare(source.inventory, source.named, source.checkpoint.file_names)
    if findings:
        raise InventoryError(f"{repo.name}: {findings[0]} ({len(findings)} differences from its config.json)")
    head = {t.name for name, t in source.named.tensors.items() if name.startswith("mtp.")}
    if not head:
        raise InputError(f"{repo.name}: has no MTP head (no tensor under mtp.*)")
    files = {f.name: f for f in repo.files}
    parts = []
    for found, header in zip(source.checkpoint.files, source.checkpoint.headers, strict=True):
        chosen = tuple(t for t in header.tensors if (t.name in head) == (only == "mtp"))
        if chosen:
            parts.append((files[found.name], found.header_sha256, chosen))
    targets = [
        Target(
            name, file, digest, build_header(((t.name, t.dtype, t.shape, t.size) for t in chosen), {"format": "pt"}),
            chosen, merged(chosen),
        )
        for name, (file, digest, chosen) in zip(file_names(f"model-{only}", len(parts), True), parts, strict=True)
    ]  # fmt: skip
    return Selection(repo, only, tuple(targets))


def pull_part(selection: Selection, dest: Path, jobs: int, progress: Progress) -> JSON:
    """Write a selection into `dest`, going on with what an earlier run left. Return the facts for the report."""
    disk, state = Disk(), dest / STATE_FOLDER
    if (done := _finished(selection, dest)) is not None:
        progress(selection.size)
        return _facts(selection.repo, dest, done, 0)
    _check_place(selection, dest)
    with disk_errors("writing", dest):
        disk.make_folder(dest)
        disk.make_folder(state)
        lock = Lock(state)
    try:
        received = _fetch(selection, dest, jobs, progress, disk)
        for target in selection.targets:
            path = dest / (target.name if (dest / target.name).exists() else target.name + PARTIAL)
            scan(path, target)
            if path.name != target.name:
                with disk_errors("writing", path):
                    disk.rename(path, dest / target.name)
        _write_small(selection, dest, disk)
    finally:
        lock.release()
    with disk_errors("writing", dest):
        disk.remove(state)
    return _facts(selection.repo, dest, _names(selection), received)


def _names(selection: Selection) -> list[str]:
    small = [f.name for f in hub.small_files(selection.repo)]
    return sorted({*small, INDEX_NAME, PULL_RECORD, *(t.name for t in selection.targets)})


def _facts(repo: Repo, dest: Path, names: list[str], received: int) -> JSON:
    size = sum((dest / n).stat().st_size for n in names)
    return {
        "repo": repo.name, "revision": repo.commit, "folder": str(dest), "files": names, "bytes": size,
        "bytes_received": received,
    }  # fmt: skip


def _finished(selection: Selection, dest: Path) -> list[str] | None:
    """Return the names of a folder that holds the finished selection, by its record and sizes."""
    if not (dest / PULL_RECORD).is_file() or (dest / PULL_RECORD).read_bytes() != record(selection):
        return None
    whole = all((dest / t.name).is_file() and (dest / t.name).stat().st_size == t.size for t in selection.targets)
    names = _names(selection)
    return names if whole and all((dest / n).is_file() for n in names) else None


def _check_place(selection: Selection, dest: Path) -> None:
    """Raise unless the folder is new, empty or this selection's unfinished own, on a disk with room."""
    state = dest / STATE_FOLDER
    if dest.is_symlink() or state.is_symlink() or (dest.exists() and not dest.is_dir()):
        raise OutputError(f"{dest}: is a link or no folder; choose another place")
    lines = _journal(state)
    if lines and lines[0].get("selection") != selection.id:
        raise OutputError(
            f"{dest}: holds an unfinished pull of another repo, revision or part (or the repo has got a new commit): "
            "name that --revision again, or choose another folder"
        )
    if not lines and dest.exists() and any(e.name != STATE_FOLDER for e in os.scandir(dest)):
        raise OutputError(f"{dest}: is not empty; choose another folder")
    have = sum(p.stat().st_blocks * 512 for p in dest.glob("model-*")) if dest.exists() else 0
    if selection.size - have > free_bytes(dest):
        raise EnvironmentFault(f"{dest}: {selection.size - have:,} bytes are needed, {free_bytes(dest):,} are free")


def _journal(state: Path) -> list[JSON]:
    """Return the whole lines of the journal; a torn last line is dropped."""
    path = state / JOURNAL_NAME
    if not path.is_file():
        return []
    try:
        return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    except ValueError:
        raise OutputError(f"{path}: is not a journal of this program; remove the folder") from None


def _fetch(selection: Selection, dest: Path, jobs: int, progress: Progress, disk: Disk) -> int:
    """Fetch every range that the journal does not have. Return the bytes received."""
    state = dest / STATE_FOLDER
    lines = _journal(state)
    done = {(line["file"], line["offset"]) for line in lines[1:]}
    with disk_errors("writing", dest):
        # Rewritten whole, so that a line torn by a crash does not run into the next one.
        kept = lines or [{"selection": selection.id}]
        disk.write_file(state / JOURNAL_NAME, b"".join(strictjson.dumps(line) + b"\n" for line in kept))
        log = disk.open_log(state / JOURNAL_NAME)
        places = {t.name: dest / t.name for t in selection.targets}
        places = {n: p if p.exists() else p.with_name(n + PARTIAL) for n, p in places.items()}
        fds = {t.name: disk.open_partial(places[t.name], t.size) for t in selection.targets}
        for t in selection.targets:
            disk.write_at(fds[t.name], t.header, 0)

    def one(item: tuple[Target, int, int, int]) -> int:
        target, offset, start, size = item
        fd, at = fds[target.name], offset
        for piece in hub.read_range(selection.repo, target.source, start, size):
            with disk_errors("writing", dest):
                disk.write_at(fd, piece, at)
            at += len(piece)
            progress(len(piece))
        with disk_errors("writing", dest):
            disk.sync_data(fd)
            disk.append(log, strictjson.dumps({"file": target.name, "offset": offset}) + b"\n")
        return size

    everything = [(t, *piece) for t in selection.targets for piece in t.pieces()]
    left = [x for x in everything if (x[0].name, x[1]) not in done]
    progress(sum(x[3] for x in everything) - sum(x[3] for x in left))
    pool = ThreadPoolExecutor(jobs)
    try:
        return sum(pool.map(one, left))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        for fd in (*fds.values(), log):
            os.close(fd)


def scan(path: Path, target: Target) -> None:
    """Raise `ValueFault` at the first NaN or infinite value of a written shard."""
    offset = len(target.header)
    with path.open("rb", buffering=0) as f:
        for t in target.tensors:
            if t.dtype in _NOT_FINITE:
                kind, mask, value = _NOT_FINITE[t.dtype]
                for at in range(0, t.size, SCAN_BYTES):
                    raw = os.pread(f.fileno(), min(SCAN_BYTES, t.size - at), offset + at)
                    if bool(((np.frombuffer(raw, kind) & mask) == value).any()):
                        raise ValueFault(
                            f"{target.source.name}: {t.name}: holds a value that is NaN or infinite, in bytes "
                            f"{t.start + at}..{t.start + at + len(raw)}; the repo's file is damaged"
                        )
            offset += t.size


def record(selection: Selection) -> bytes:
    """Return the account of where each byte of the shards came from."""
    files = [
        {
            "name": t.name, "header_bytes": len(t.header), "source": t.source.name, "etag": t.source.etag,
            "source_bytes": t.source.size, "source_header_sha256": t.header_sha256,
            "ranges": [{"start": a, "bytes": n} for a, n in t.ranges],
        }
        for t in selection.targets
    ]  # fmt: skip
    table = {"repo": selection.repo.name, "revision": selection.repo.commit, "only": selection.only, "files": files}
    return strictjson.pretty(table)


def _write_small(selection: Selection, dest: Path, disk: Disk) -> None:
    """Write small files, index and record, in this order, and read the result back as a checkpoint."""
    for file in hub.small_files(selection.repo):
        if file.name != INDEX_NAME:
            raw = hub.fetch_small(selection.repo, file)
            with disk_errors("writing", dest):
                disk.write_file(dest / file.name, raw)
    weight_map = {t.name: target.name for target in selection.targets for t in target.tensors}
    total = sum(t.size for target in selection.targets for t in target.tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    with disk_errors("writing", dest):
        disk.write_file(dest / INDEX_NAME, strictjson.pretty(index))
    read_checkpoint(dest)
    with disk_errors("writing", dest):
        disk.write_file(dest / PULL_RECORD, record(selection))


# --- whole files -------------------------------------------------------------------------------------------------


def pull_files(repo: Repo, dest: Path, with_shards: bool, jobs: int, progress: Progress) -> JSON:
    """Download whole files through huggingface_hub, which resumes by itself, and check every digest."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined,unused-ignore]

    wanted = [f for f in repo.files if with_shards or not f.name.endswith(".safetensors")]
    if not wanted:
        raise InputError(f"{repo.name}: holds no file to download")
    for path in (dest, *(dest / f.name for f in wanted)):
        if path.is_symlink():
            raise OutputError(f"{path}: is a link; remove it, or choose another folder")
    disable_progress_bars()
    left_out = [] if with_shards else ["*.safetensors"]
    missing = sum(f.size for f in wanted if not (dest / f.name).is_file())
    for _ in range(DOWNLOADS):
        with hub_errors(repo.name):
            snapshot_download(
                repo.name, revision=repo.commit, local_dir=dest, ignore_patterns=left_out, max_workers=jobs,
                endpoint=repo.endpoint, token=repo.token,
            )  # fmt: skip
        bad = [f.name for f in wanted if not _is_whole(dest / f.name, f)]
        for name in bad:
            with disk_errors("removing", dest / name):
                Disk().remove(dest / name)
        if not bad:
            break
    else:
        raise EnvironmentFault(
            f"{repo.name}: {', '.join(bad)}: the bytes that came do not have the digest that was listed, {DOWNLOADS} "
            f"times; removed. {AGAIN}"
        )
    progress(sum(f.size for f in wanted))
    rows = [{"name": f.name, "bytes": f.size, "etag": f.etag} for f in wanted]
    table = {"repo": repo.name, "revision": repo.commit, "only": "all" if with_shards else "meta", "files": rows}
    with disk_errors("writing", dest / PULL_RECORD):
        Disk().write_file(dest / PULL_RECORD, strictjson.pretty(table))
    return _facts(repo, dest, sorted([*(f.name for f in wanted), PULL_RECORD]), missing)


def _is_whole(path: Path, file: RemoteFile) -> bool:
    """Return whether a downloaded file has the listed size and digest (sha256, or git's of small files)."""
    if not path.is_file() or path.is_symlink() or path.stat().st_size != file.size:
        return False
    made = hashlib.sha256() if file.sha256 else hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
    with path.open("rb") as f:
        while piece := f.read(1 << 20):
            made.update(piece)
    return made.hexdigest() == file.etag
