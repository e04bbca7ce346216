"""Downloads from the Hub: the tensors of one part, by byte range.

A part becomes a checkpoint of its own: shards that hold the part's tensors in the order of the source, an index, the
small files, and `ds4convert_pull.json`, written last, which tells where each byte came from. Finished ranges are noted
in `.ds4convert/` after their bytes are synced, so that the same command goes on after an interruption.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ds4convert.checkpoint.folder import INDEX_NAME, read_checkpoint
from ds4convert.checkpoint.headers import build_header
from ds4convert.checkpoint.inventory import compare
from ds4convert.checkpoint.provenance import PULL_RECORD
from ds4convert.checkpoint.source import recognised
from ds4convert.checkpoint.types import JSON, TensorInfo
from ds4convert.errors import EnvironmentFault, InputError, InventoryError, OutputError, ValueFault
from ds4convert.execution.locking import Lock
from ds4convert.execution.threads import each
from ds4convert.files import PARTIAL, Disk, disk_errors, free_bytes
from ds4convert.hub.byte_ranges import read_range
from ds4convert.hub.errors import AGAIN
from ds4convert.hub.records import RemoteFile, Repo
from ds4convert.hub.remote_checkpoint import fetch_small, read_remote, small_files
from ds4convert.planning.shards import file_names
from ds4convert.storage import strict_json
from ds4convert.storage.digests import Hash, feed, git_blob
from ds4convert.storage.local_files import LocalFiles
from ds4convert.storage.safe_open import names_in, read_own
from ds4convert.storage.state_folder import STATE_FOLDER

JOURNAL_NAME = "pull.jsonl"
RANGE_BYTES = 32 << 20
"""Largest range of one request, and what an interruption costs at most per worker."""

SCAN_BYTES = 16 << 20
_NOT_FINITE: dict[str, tuple[str, int, int]] = {
    "F8_E4M3": ("u1", 0x7F, 0x7F), "F8_E8M0": ("u1", 0xFF, 0xFF), "BF16": ("<u2", 0x7F80, 0x7F80),
    "F16": ("<u2", 0x7C00, 0x7C00), "F32": ("<u4", 0x7F800000, 0x7F800000),
}  # fmt: skip
"""Per dtype: how its codes are stored, and (mask, value) of those that are NaN or infinite."""

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Target:
    """One shard to be written: `header` first, then the bytes of `ranges` (source start, size) one after the other.

    `header_sha256` is of the source's header. A target that is its source file as a whole (`whole`) has no header of
    ours: it is copied from the first byte on, and has the digest that the Hub lists.
    """

    name: str
    source: RemoteFile
    header_sha256: str
    header: bytes
    tensors: tuple[TensorInfo, ...]
    ranges: tuple[tuple[int, int], ...]
    whole: bool = False

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

    def sizes(self) -> list[tuple[str, int]]:
        """Return the files that are fetched with their bytes; the index is made here."""
        small = [(f.name, f.size) for f in small_files(self.repo) if f.name != INDEX_NAME]
        return sorted([*small, *((t.name, t.size) for t in self.targets)])

    @property
    def id(self) -> str:
        """Return what an unfinished folder has to agree in to be gone on with."""
        files = [(t.name, t.source.name, t.source.etag, t.size, t.ranges) for t in self.targets]
        return strict_json.digest([self.repo.name, self.repo.commit, self.only, files])


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
    source = recognised(read_remote(repo, jobs))
    findings = compare(source.inventory, source.named, source.checkpoint.file_names)
    if findings:
        raise InventoryError(f"{repo.name}: {findings[0]} ({len(findings)} differences from its config.json)")
    family = source.inventory.config.family
    head = {t.name for name, t in source.named.tensors.items() if family.is_of_head(name)}
    if not head:
        raise InputError(f"{repo.name}: has no MTP head (no tensor under {family.of_head})")
    files = {f.name: f for f in repo.files}
    parts = []
    for found, header in zip(source.checkpoint.files, source.checkpoint.headers, strict=True):
        chosen = tuple(t for t in header.tensors if (t.name in head) == (only == "mtp"))
        if chosen:
            parts.append((files[found.name], found.header_sha256, chosen))
    counts = {f.name: len(h.tensors) for f, h in zip(source.checkpoint.files, source.checkpoint.headers, strict=True)}
    targets = [
        _target(name, file, digest, chosen, whole=len(chosen) == counts[file.name] and file.sha256 is not None)
        for name, (file, digest, chosen) in zip(file_names(f"model-{only}", len(parts), True), parts, strict=True)
    ]
    return Selection(repo, only, tuple(targets))


def _target(name: str, file: RemoteFile, digest: str, chosen: tuple[TensorInfo, ...], whole: bool) -> Target:
    """Return one shard to be written. A source file whose tensors all belong to the part is taken as it is."""
    if whole:
        return Target(name, file, digest, b"", chosen, ((0, file.size),), whole=True)
    header = build_header(((t.name, t.dtype, t.shape, t.size) for t in chosen), {"format": "pt"})
    return Target(name, file, digest, header, chosen, merged(chosen))


def pull_part(selection: Selection, dest: Path, jobs: int, progress: Progress) -> JSON:
    """Write a selection into `dest`, going on with what an earlier run left. Return the facts for the report."""
    disk, state = Disk(), dest / STATE_FOLDER
    if (done := _finished(selection, dest)) is not None:
        if state.is_dir() and not state.is_symlink():  # killed between its last file and the end
            with disk_errors("writing", dest):
                disk.remove(state)
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
            _check_whole(path, target, selection, disk)
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


def _check_whole(path: Path, target: Target, selection: Selection, disk: Disk) -> None:
    """Raise `EnvironmentFault` where a whole shard lacks its digest. It is removed, so that the next run fetches it."""
    if not target.whole or has_file_digest(path, target.source):
        return
    journal = path.parent / STATE_FOLDER / JOURNAL_NAME
    lines = [line for line in _journal(path.parent / STATE_FOLDER) if line.get("file") != target.name]
    with disk_errors("writing", path):
        disk.write_file(journal, b"".join(strict_json.dumps(line) + b"\n" for line in lines))
        disk.remove(path)
    raise EnvironmentFault(
        f"{selection.repo.name}: {target.source.name}: the bytes that came do not have the sha256 that the Hub lists; "
        f"removed. {AGAIN}"
    )


def _names(selection: Selection) -> list[str]:
    small = [f.name for f in small_files(selection.repo)]
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
        raise OutputError(f"{dest}: is a link or no folder", hint="choose another place")
    lines = _journal(state)
    if lines and lines[0].get("selection") != selection.id:
        raise OutputError(
            f"{dest}: holds an unfinished pull of another repo, revision or part (or the repo has got a new commit): "
            "name that --revision again, or choose another folder"
        )
    if not lines and names_in(dest):
        raise OutputError(f"{dest}: is not empty", hint="choose another folder")
    have = sum((dest / n).stat().st_blocks * 512 for n in names_in(dest) if n.startswith("model-"))
    if selection.size - have > free_bytes(dest):
        raise EnvironmentFault(f"{dest}: {selection.size - have:,} bytes are needed, {free_bytes(dest):,} are free")


def _journal(state: Path) -> list[JSON]:
    """Return the whole lines of the journal; a torn last line is dropped."""
    try:
        lines = [strict_json.plain(line) for line in read_own(state, JOURNAL_NAME).split(b"\n")[:-1]]
        whole = all(isinstance(line, dict) for line in lines) and all(map(_is_range, lines[1:]))
    except ValueError:
        whole = False
    if not whole:
        raise OutputError(f"{state / JOURNAL_NAME}: is not a journal of this program", hint="remove the folder")
    return lines


def _is_range(line: JSON) -> bool:
    """Return whether a line names a file, and where in it the range lies that was fetched."""
    return isinstance(line.get("file"), str) and isinstance(line.get("offset"), int)


def _fetch(selection: Selection, dest: Path, jobs: int, progress: Progress, disk: Disk) -> int:
    """Fetch every range that the journal does not have. Return the bytes received."""
    state = dest / STATE_FOLDER
    lines = _journal(state)
    done = {(line["file"], line["offset"]) for line in lines[1:]}
    with disk_errors("writing", dest):
        # Rewritten whole, so that a line torn by a crash does not run into the next one.
        kept = lines or [{"selection": selection.id}]
        disk.write_file(state / JOURNAL_NAME, b"".join(strict_json.dumps(line) + b"\n" for line in kept))
        log = disk.open_log(state / JOURNAL_NAME)
        places = {t.name: dest / t.name for t in selection.targets}
        places = {n: p if p.exists() else p.with_name(n + PARTIAL) for n, p in places.items()}
        fds = {t.name: disk.open_partial(places[t.name], t.size) for t in selection.targets}
        for t in selection.targets:
            disk.write_at(fds[t.name], t.header, 0)

    def one(item: tuple[Target, int, int, int]) -> int:
        target, offset, start, size = item
        fd, at = fds[target.name], offset
        for piece in read_range(selection.repo, target.source, start, size):
            if stop.is_set():
                return 0
            with disk_errors("writing", dest):
                disk.write_at(fd, piece, at)
            at += len(piece)
            progress(len(piece))
        with disk_errors("writing", dest):
            disk.sync_data(fd)
            disk.append(log, strict_json.dumps({"file": target.name, "offset": offset}) + b"\n")
        return size

    everything = [(t, *piece) for t in selection.targets for piece in t.pieces()]
    left = [x for x in everything if (x[0].name, x[1]) not in done]
    progress(sum(x[3] for x in everything) - sum(x[3] for x in left))
    stop = threading.Event()
    received = each(one, left, jobs, stop)
    # After an error the files stay open: a thread that still waits for the network may write to them once more.
    for fd in (*fds.values(), log):
        os.close(fd)
    return sum(received)


def scan(path: Path, target: Target) -> None:
    """Raise `ValueFault` at the first NaN or infinite value of a written shard."""
    offset = len(target.header)
    if target.whole:
        offset = target.tensors[0].start
    with closing(LocalFiles.at(path)) as files:
        for t in target.tensors:
            if t.dtype in _NOT_FINITE:
                kind, mask, value = _NOT_FINITE[t.dtype]
                for at in range(0, t.size, SCAN_BYTES):
                    raw = files.read(path.name, offset + at, min(SCAN_BYTES, t.size - at))
                    if bool(((np.frombuffer(raw, kind) & mask) == value).any()):
                        raise ValueFault(
                            f"{target.source.name}: {t.name}: holds a value that is NaN or infinite, in bytes "
                            f"{t.start + at}..{t.start + at + len(raw)}; the repo's file is damaged",
                            file=target.source.name,
                            tensor=t.name,
                        )
            offset += t.size


def has_file_digest(path: Path, file: RemoteFile) -> bool:
    """Return whether a file has the listed size and digest (sha256 of a large one, else git's id)."""
    if not path.is_file() or path.is_symlink() or path.stat().st_size != file.size:
        return False
    made: Hash = hashlib.sha256() if file.sha256 else git_blob(file.size)
    with closing(LocalFiles.at(path)) as files:
        feed(files, path.name, made)
    return made.hexdigest() == file.etag


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
    return strict_json.pretty(table)


def _write_small(selection: Selection, dest: Path, disk: Disk) -> None:
    """Write small files, index and record, in this order, and read the result back as a checkpoint."""
    for file in small_files(selection.repo):
        if file.name != INDEX_NAME:
            raw = fetch_small(selection.repo, file)
            with disk_errors("writing", dest):
                disk.write_file(dest / file.name, raw)
    weight_map = {t.name: target.name for target in selection.targets for t in target.tensors}
    total = sum(t.size for target in selection.targets for t in target.tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    with disk_errors("writing", dest):
        disk.write_file(dest / INDEX_NAME, strict_json.pretty(index))
    read_checkpoint(dest)
    with disk_errors("writing", dest):
        disk.write_file(dest / PULL_RECORD, record(selection))
