"""Where a checkpoint came from: what `pull` recorded, what the cache's paths show, and what neither is believed in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ds4convert.checkpoint import provenance
from ds4convert.checkpoint.folder import Checkpoint
from ds4convert.checkpoint.types import Provenance
from ds4convert.storage.local_files import LocalFiles
from ds4convert.storage.records import SourceFile

COMMIT = "c0" * 20
FILES = (SourceFile("a.safetensors", 10, "h1"), SourceFile("b.safetensors", 20, "h2"))


def whole(**changes: Any) -> dict[str, Any]:
    rows = [{"name": f.name, "bytes": f.size, "etag": f"e{n}"} for n, f in enumerate(FILES)]
    rows.append({"name": "config.json", "bytes": 5, "etag": "e9"})
    return {"repo": "owner/name", "revision": COMMIT, "only": "all", "files": rows} | changes


def part(**changes: Any) -> dict[str, Any]:
    """A record of `pull --only mtp`: b came from the larger shard y, as header and two ranges; a from x."""
    rows = [
        {"name": "b.safetensors", "source": "y.safetensors", "source_bytes": 900, "source_header_sha256": "hy", "etag": "ey",
         "header_bytes": 8, "ranges": [{"start": 0, "bytes": 5}, {"start": 50, "bytes": 7}]},
        {"name": "a.safetensors", "source": "x.safetensors", "source_bytes": 800, "source_header_sha256": "hx", "etag": "ex",
         "header_bytes": 10, "ranges": []},
    ]  # fmt: skip
    return {"repo": "owner/name", "revision": COMMIT, "only": "mtp", "files": rows} | changes


def checkpoint(folder: Path, record: Any = None) -> Checkpoint:
    if record is not None:
        raw = record if isinstance(record, bytes) else json.dumps(record).encode()
        (folder / "ds4convert_pull.json").write_bytes(raw)
    return Checkpoint(folder, FILES, (), None, False, LocalFiles({}))


def test_a_record_tells_repo_commit_and_digests_of_the_shards_alone(tmp_path: Path) -> None:
    found = provenance.of(checkpoint(tmp_path, whole()))
    assert found == Provenance("owner/name", COMMIT, {"a.safetensors": "e0", "b.safetensors": "e1"})
    assert provenance.names_in_record(tmp_path) == {"a.safetensors", "b.safetensors", "config.json"}
    assert provenance.originals(checkpoint(tmp_path)) == FILES


def test_parts_of_shards_are_told_by_the_shards_that_they_are_parts_of(tmp_path: Path) -> None:
    made = checkpoint(tmp_path, part())
    originals = (SourceFile("x.safetensors", 800, "hx"), SourceFile("y.safetensors", 900, "hy"))
    assert provenance.originals(made) == originals
    assert provenance.of(made) == Provenance("owner/name", COMMIT, {"x.safetensors": "ex", "y.safetensors": "ey"})


@pytest.mark.parametrize(
    "rows",
    [
        [{"name": "a.safetensors", "bytes": 10, "etag": "e"}],  # b is not in it
        [{"name": "a.safetensors", "bytes": 10, "etag": "e"}, {"name": "b.safetensors", "bytes": 21, "etag": "e"}],
    ],
)
def test_a_record_that_does_not_agree_with_the_folder_tells_nothing(rows: list[Any], tmp_path: Path) -> None:
    assert provenance.of(checkpoint(tmp_path, whole(files=rows))) is None
    found = part()
    found["files"][0]["ranges"][1]["bytes"] += 1
    assert provenance.of(checkpoint(tmp_path, found)) is None and provenance.originals(checkpoint(tmp_path)) == FILES


@pytest.mark.parametrize(
    "record",
    [
        b"{", b"[]", b"null", whole(repo="name"), whole(repo="a/b/c"), whole(repo="a b/c"), whole(repo=3), whole(revision="main"),
        whole(revision=COMMIT.upper()), whole(revision=COMMIT + "0"), whole(only="some"), whole(only=None), whole(files={}),
        whole(files=[3]), whole(files=[{"name": "a", "bytes": "1", "etag": "e"}]), whole(files=[{"name": "a", "bytes": True, "etag": "e"}]),
        whole(files=[{"name": "a", "bytes": 1}]), whole(only="mtp"), part(only="backbone", files=[{"name": "a"}]),
        part(files=[part()["files"][0] | {"ranges": [{"start": 0}]}]), part(files=[part()["files"][0] | {"ranges": [3]}]),
        part(files=[part()["files"][0] | {"ranges": [{"start": 0.5, "bytes": 1}]}]),
    ],
    ids=lambda r: str(r)[-60:],
)  # fmt: skip
def test_a_record_of_another_form_counts_as_none(record: Any, tmp_path: Path) -> None:
    made = checkpoint(tmp_path, record)
    assert (
        provenance.of(made) is None
        and provenance.originals(made) == FILES
        and provenance.names_in_record(tmp_path) == set()
    )


@pytest.mark.parametrize("only", ["all", "meta"])
def test_a_whole_file_may_be_told_by_any_kind_of_pull_that_fetches_whole_files(only: str, tmp_path: Path) -> None:
    assert provenance.of(checkpoint(tmp_path, whole(only=only))) is not None


def cached(
    tmp_path: Path, repo: str = "models--owner--name", commit: str = COMMIT, between: str = "snapshots"
) -> Checkpoint:
    """A snapshot as huggingface_hub lays it out: guides/manage-cache."""
    folder = tmp_path / "hub" / repo / between / commit
    folder.mkdir(parents=True)
    (tmp_path / "hub" / repo / "blobs").mkdir()
    (tmp_path / "hub" / repo / "blobs" / "e0").write_bytes(b"x" * 10)
    (folder / "a.safetensors").symlink_to("../../blobs/e0")
    (folder / "b.safetensors").write_bytes(b"x" * 20)
    return checkpoint(folder)


def test_the_cache_tells_by_its_paths_and_digests_by_its_links(tmp_path: Path) -> None:
    assert provenance.of(cached(tmp_path)) == Provenance("owner/name", COMMIT, {"a.safetensors": "e0"})
    (tmp_path / "link").symlink_to(tmp_path / "hub" / "models--owner--name" / "snapshots" / COMMIT)
    assert provenance.of(checkpoint(tmp_path / "link")) is not None, "reached by a link as well"


@pytest.mark.parametrize(
    ("repo", "commit", "between"),
    [
        ("models--owner--name", "main", "snapshots"), ("models--owner--name", COMMIT, "refs"), ("models--name", COMMIT, "snapshots"),
        ("datasets--owner--name", COMMIT, "snapshots"), ("models--o wner--name", COMMIT, "snapshots"), ("models--owner--", COMMIT, "snapshots"),
    ],
)  # fmt: skip
def test_other_paths_tell_nothing(repo: str, commit: str, between: str, tmp_path: Path) -> None:
    assert provenance.of(cached(tmp_path, repo, commit, between)) is None


def test_a_name_with_two_hyphens_belongs_to_the_repo(tmp_path: Path) -> None:
    found = provenance.of(cached(tmp_path, "models--owner--a--b"))
    assert found is not None and found.repo == "owner/a--b"
