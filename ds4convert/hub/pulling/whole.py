"""Whole files of a repo, fetched by range: each byte is counted, an interruption costs at most a range per connection.

Finished ranges are noted in `.ds4convert/pull.jsonl` after their bytes are synced. A file gets its name when it is
whole and has the digest that the Hub lists; files that are there already with their digests are not fetched.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ds4convert.checkpoint.provenance import PULL_RECORD, names_in_record
from ds4convert.checkpoint.types import JSON
from ds4convert.errors import EnvironmentFault, InputError, OutputError
from ds4convert.execution.locking import Lock
from ds4convert.execution.threads import each
from ds4convert.files import PARTIAL, Disk, disk_errors, free_bytes
from ds4convert.hub.byte_ranges import read_range
from ds4convert.hub.errors import AGAIN
from ds4convert.hub.pulling.part import JOURNAL_NAME, RANGE_BYTES, has_file_digest
from ds4convert.hub.records import RemoteFile, Repo
from ds4convert.storage import strict_json
from ds4convert.storage.safe_open import read_own
from ds4convert.storage.state_folder import STATE_FOLDER
from ds4convert.words.terminal import show

DOWNLOADS = 2
"""How often a whole file whose bytes came wrong is fetched."""

Say = Callable[[str], None]
Progress = Callable[[int], None]


@dataclass
class _Fetch:
    """What the threads of one download share."""

    repo: Repo
    dest: Path
    disk: Disk
    log: int
    stop: threading.Event
    progress: Progress

    def range(self, item: tuple[RemoteFile, int, int]) -> int:
        """Write one range of a file to its partial file, sync it, note it; return its bytes."""
        file, start, size = item
        path = self.dest / (file.name + PARTIAL)
        with disk_errors("writing", path):
            fd = self.disk.open_partial(path, file.size)
        try:
            at = start
            for piece in read_range(self.repo, file, start, size):
                if self.stop.is_set():
                    return 0
                with disk_errors("writing", path):
                    self.disk.write_at(fd, piece, at)
                at += len(piece)
                self.progress(len(piece))
            with disk_errors("writing", path):
                self.disk.sync_data(fd)
                self.disk.append(self.log, _line(file, start))
        finally:
            os.close(fd)
        return size


def files_of(repo: Repo, with_shards: bool) -> list[RemoteFile]:
    """Return the files of a repo that are downloaded. Raises `InputError` for a repo that is refused."""
    # A repo that was uploaded from a pulled folder has that folder's record; ours takes its place.
    offered = [f for f in repo.files if f.name != PULL_RECORD]
    wanted = [f for f in offered if with_shards or not f.name.endswith(".safetensors")]
    if not wanted:
        raise InputError(f"{repo.name}: holds no file to download")
    names = {f.name for f in wanted}
    if both := sorted(n for n in names if n + PARTIAL in names):
        raise InputError(
            f"{repo.name}: holds {show(both[0])} and {show(both[0] + PARTIAL)}, the name under which the former is "
            "written while it is not whole; refused. Nothing was written"
        )
    return wanted


def pull_files(
    repo: Repo, dest: Path, with_shards: bool, jobs: int, progress: Progress, say: Say = lambda text: None
) -> JSON:
    """Download whole files and check every digest; `progress` is told of bytes, `say` of each file that is done.

    Return the facts for the report. Raises `OutputError` for a folder that is not usable, `EnvironmentFault` where the
    Hub fails for good or a file's bytes come wrong twice.
    """
    wanted = files_of(repo, with_shards)
    for path in (dest, dest / STATE_FOLDER, *_places(dest, wanted)):
        if path.is_symlink():
            raise OutputError(f"{path}: is a link", hint="remove it, or choose another folder")
    _check_in_the_way(dest, wanted)
    disk, state = Disk(), dest / STATE_FOLDER
    with disk_errors("writing", dest):
        disk.make_folder(dest)
        disk.make_folder(state)
        lock = Lock(state)
    try:
        received = _bring(repo, dest, wanted, jobs, progress, say, disk)
        table = {"repo": repo.name, "revision": repo.commit, "only": "all" if with_shards else "meta", "files": [
            {"name": f.name, "bytes": f.size, "etag": f.etag} for f in wanted
        ]}  # fmt: skip
        with disk_errors("writing", dest / PULL_RECORD):
            disk.write_file(dest / PULL_RECORD, strict_json.pretty(table))
    finally:
        lock.release()
    with disk_errors("writing", dest):
        disk.remove(state)
    names = sorted([*(f.name for f in wanted), PULL_RECORD])
    size = sum((dest / n).stat().st_size for n in names)
    return {
        "repo": repo.name, "revision": repo.commit, "folder": str(dest), "files": names, "bytes": size,
        "bytes_received": received,
    }  # fmt: skip


def _places(dest: Path, wanted: list[RemoteFile]) -> Iterator[Path]:
    """Yield every path below `dest` that will be written, and the folders on the way to it."""
    for f in wanted:
        path = dest / f.name
        yield path
        yield path.with_name(path.name + PARTIAL)
        yield from (p for p in path.parents if p != dest and p.is_relative_to(dest))


def _check_in_the_way(dest: Path, wanted: list[RemoteFile]) -> None:
    """Raise `OutputError` where a file that no download wrote has the name of one that is to come.

    Downloads are told by our record of an earlier pull, or by the notes of the Hub's own client under
    `.cache/huggingface/download/`.
    """
    if dest.exists() and not dest.is_dir():
        raise OutputError(f"{dest}: is a file, expected a folder or nothing")
    notes = dest / ".cache" / "huggingface" / "download"
    there = [f for f in wanted if (dest / f.name).exists() and not (notes / f"{f.name}.metadata").is_file()]
    pulled = names_in_record(dest) if there else set()
    if strange := [f.name for f in there if f.name not in pulled and not has_file_digest(dest / f.name, f)]:
        raise OutputError(
            f"{dest}: holds {', '.join(strange[:5])}{(', ...' if len(strange) > 5 else '')}, which no download wrote",
            hint="choose another folder, or move that away",
        )


def _bring(
    repo: Repo, dest: Path, wanted: list[RemoteFile], jobs: int, progress: Progress, say: Say, disk: Disk
) -> int:
    """Fetch what is not there with its digest, wrong bytes once more. Return the bytes received."""
    left = [f for f in wanted if not has_file_digest(dest / f.name, f)]
    progress(sum(f.size for f in wanted) - sum(f.size for f in left))
    room = sum(f.size for f in left) - sum(
        p.stat().st_blocks * 512 for f in left if (p := dest / (f.name + PARTIAL)).exists()
    )
    if room > free_bytes(dest):
        raise EnvironmentFault(f"{dest}: {room:,} bytes are needed, {free_bytes(dest):,} are free")
    received = 0
    for _ in range(DOWNLOADS):
        received += _round(repo, dest, left, jobs, progress, disk)
        left = [f for f in left if not _settle(dest, f, len(wanted), say, disk)]
        if not left:
            return received
    names = ", ".join(f.name for f in left)
    raise EnvironmentFault(
        f"{repo.name}: {names}: the bytes that came do not have the digest that was listed, {DOWNLOADS} times; "
        f"removed. {AGAIN}"
    )


def _round(repo: Repo, dest: Path, left: list[RemoteFile], jobs: int, progress: Progress, disk: Disk) -> int:
    """Fetch every range of the files that the journal does not have."""
    path = dest / STATE_FOLDER / JOURNAL_NAME
    known = {(f.name, f.etag) for f in left if (dest / (f.name + PARTIAL)).is_file()}
    done = {(n, at) for n, etag, at in _journal(path) if (n, etag) in known}
    etags = {f.name: f for f in left}
    with disk_errors("writing", dest):
        disk.write_file(path, b"".join(_line(etags[n], at) for n, at in sorted(done)))
        log = disk.open_log(path)
        for folder in {(dest / f.name).parent for f in left}:
            disk.make_folder(folder)
        for f in left:
            if not f.size:
                disk.write_file(dest / (f.name + PARTIAL), b"")
    ranges = [(f, at, min(RANGE_BYTES, f.size - at)) for f in left for at in range(0, f.size, RANGE_BYTES)]
    todo = [r for r in ranges if (r[0].name, r[1]) not in done]
    progress(sum(r[2] for r in ranges) - sum(r[2] for r in todo))
    stop = threading.Event()
    received = sum(each(_Fetch(repo, dest, disk, log, stop, progress).range, todo, jobs, stop))
    os.close(log)
    return received


def _settle(dest: Path, file: RemoteFile, count: int, say: Say, disk: Disk) -> bool:
    """Give a whole file its name; remove one without its digest, and what the journal says of it. Return which."""
    partial, path = dest / (file.name + PARTIAL), dest / STATE_FOLDER / JOURNAL_NAME
    if has_file_digest(partial, file):
        with disk_errors("writing", partial):
            disk.rename(partial, dest / file.name)
        say(f"{file.name}: {file.size:,} bytes, its digest is right ({count} files in all)")
        return True
    kept = [(n, etag, at) for n, etag, at in _journal(path) if n != file.name]
    with disk_errors("removing", partial):
        disk.write_file(
            path, b"".join(strict_json.dumps({"file": n, "etag": e, "offset": at}) + b"\n" for n, e, at in kept)
        )
        disk.remove(partial)
    return False


def _line(file: RemoteFile, offset: int) -> bytes:
    return strict_json.dumps({"file": file.name, "etag": file.etag, "offset": offset}) + b"\n"


def _journal(path: Path) -> list[tuple[str, str, int]]:
    """Return (name, etag, offset) of each finished range; lines of another kind, or torn ones, count for nothing."""
    out = []
    for line in read_own(path.parent, path.name).split(b"\n")[:-1]:
        try:
            row = strict_json.plain(line)
            out.append((str(row["file"]), str(row["etag"]), int(row["offset"])))
        except (ValueError, KeyError, TypeError):
            continue
    return out
