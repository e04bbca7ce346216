"""Where on the Hub a local checkpoint came from: what `pull` recorded, or the client's cache shows by its paths.

Nothing here is trusted beyond what the folder's own files confirm: names and sizes have to agree, else it is unknown.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from ds4convert.checkpoint.folder import Checkpoint
from ds4convert.checkpoint.types import JSON, Provenance
from ds4convert.errors import Ds4Error
from ds4convert.storage import strict_json
from ds4convert.storage.records import SourceFile
from ds4convert.storage.safe_open import read_small

PULL_RECORD = "ds4convert_pull.json"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REPO = re.compile(r"[\w.-]+/[\w.-]+")


def of(checkpoint: Checkpoint) -> Provenance | None:
    """Return the repo, commit and digests of a checkpoint's shards; None where they are not known."""
    record = _record(checkpoint.path)
    if record is not None:
        rows = {str(r.get("source", r["name"])): str(r["etag"]) for r in record["files"]}
        names = {f.name for f in originals(checkpoint)}
        known = {n: e for n, e in rows.items() if n in names}
        return Provenance(record["repo"], record["revision"], known) if _agrees(checkpoint, record) else None
    return _in_cache(checkpoint)


def originals(checkpoint: Checkpoint) -> tuple[SourceFile, ...]:
    """Return the shards of the repo that a checkpoint's files are parts of: the files themselves, but for `--only`."""
    record = _record(checkpoint.path)
    if record is None or record["only"] not in {"mtp", "backbone"} or not _agrees(checkpoint, record):
        return checkpoint.files
    return tuple(
        SourceFile(r["source"], r["source_bytes"], r["source_header_sha256"])
        for r in sorted(record["files"], key=lambda r: str(r["source"]))
    )


def names_in_record(folder: Path) -> set[str]:
    """Return the names of the files that `pull` wrote to a folder, by its record; none without one."""
    record = _record(folder)
    return set() if record is None else {str(r["name"]) for r in record["files"]}


def _agrees(checkpoint: Checkpoint, record: JSON) -> bool:
    """Return whether the record names every shard of the folder, with its size."""
    sizes = {r["name"]: _size(r) for r in record["files"]}
    return all(sizes.get(f.name) == f.size for f in checkpoint.files)


def _size(row: JSON) -> int:
    if "ranges" not in row:
        return int(row["bytes"])
    return int(row["header_bytes"]) + sum(int(r["bytes"]) for r in row["ranges"])


def _record(folder: Path) -> JSON | None:
    """Return the record of `pull`, None without one that has the right types."""
    if not (folder / PULL_RECORD).is_file():
        return None
    with suppress(Ds4Error):
        table = strict_json.loads(read_small(folder, PULL_RECORD), PULL_RECORD)
        if isinstance(table, dict) and _well_formed(table):
            return table
    return None


def _well_formed(table: JSON) -> bool:
    repo, revision, files = (table.get(k) for k in ("repo", "revision", "files"))
    named = (
        isinstance(repo, str) and _REPO.fullmatch(repo) and isinstance(revision, str) and _COMMIT.fullmatch(revision)
    )
    if not named or table.get("only") not in {"all", "meta", "mtp", "backbone"} or not isinstance(files, list):
        return False
    part = table["only"] in {"mtp", "backbone"}
    return all(isinstance(r, dict) and _typed(r, _PART if part else _WHOLE) and _ranges(r) for r in files)


_WHOLE: dict[str, type] = {"name": str, "bytes": int, "etag": str}
_PART: dict[str, type] = {
    "name": str, "header_bytes": int, "source": str, "etag": str, "source_bytes": int, "source_header_sha256": str,
    "ranges": list,
}  # fmt: skip


def _typed(row: dict[str, Any], kinds: dict[str, type]) -> bool:
    return all(type(row.get(k)) is kind for k, kind in kinds.items())


def _ranges(row: dict[str, Any]) -> bool:
    return all(isinstance(r, dict) and _typed(r, {"start": int, "bytes": int}) for r in row.get("ranges", []))


def _in_cache(checkpoint: Checkpoint) -> Provenance | None:
    """Return what the paths of the client's cache tell: models--owner--name/snapshots/COMMIT, links to blobs/ETAG."""
    folder = Path(os.path.realpath(checkpoint.path))
    owner, _, name = folder.parent.parent.name.removeprefix("models--").partition("--")
    if folder.parent.name != "snapshots" or not folder.parent.parent.name.startswith("models--") or not name:
        return None
    repo = f"{owner}/{name}"
    if not _COMMIT.fullmatch(folder.name) or not _REPO.fullmatch(repo):
        return None
    links = {f.name: folder / f.name for f in checkpoint.files}
    return Provenance(repo, folder.name, {n: p.readlink().name for n, p in links.items() if p.is_symlink()})
