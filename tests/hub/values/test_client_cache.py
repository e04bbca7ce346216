"""The Hub client's own cache, laid out as its documentation says, and when what lies in it is believed.

Layout (huggingface_hub, "Understand caching"): models--OWNER--NAME/{blobs/ETAG, snapshots/COMMIT/FILE -> blob, refs/REF};
without links on the disk the snapshot holds the files themselves.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from huggingface_hub import constants

from ds4convert.errors import EnvironmentFault, InputError
from ds4convert.hub import cache
from ds4convert.hub.records import RemoteFile

COMMIT, REPO = "0123456789" * 4, "me/model"
LARGE, SMALL = b"large bytes", b'{"a": 1}\n'
SHA = hashlib.sha256(LARGE).hexdigest()
GIT = hashlib.sha1(b"blob 9\0" + SMALL).hexdigest()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of the repo in a cache that holds a large file, and a small one in a folder below."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    made = tmp_path / "hub" / "models--me--model"
    for name in ("blobs", f"snapshots/{COMMIT}/sub", "refs/pr"):
        (made / name).mkdir(parents=True)
    (made / "blobs" / SHA).write_bytes(LARGE)
    (made / "blobs" / GIT).write_bytes(SMALL)
    (made / "snapshots" / COMMIT / "model.safetensors").symlink_to(f"../../blobs/{SHA}")
    (made / "snapshots" / COMMIT / "sub" / "config.json").symlink_to(f"../../../blobs/{GIT}")
    (made / "refs" / "main").write_text(f"{COMMIT}\n")
    (made / "refs" / "pr" / "1").write_text(COMMIT)
    return made


def whole(name: str = "model.safetensors", size: int = len(LARGE), etag: str = SHA) -> Path | None:
    return cache.whole_in_cache(REPO, COMMIT, name, size, etag)


def test_a_file_is_read_where_its_link_its_size_and_its_etag_agree(folder: Path) -> None:
    assert whole() == folder / "blobs" / SHA
    assert whole("sub/config.json", len(SMALL), GIT) == folder / "blobs" / GIT
    assert whole(size=len(LARGE) - 1) is None and whole(etag=GIT) is None
    assert whole("other") is None and whole("mod\0el") is None


def test_a_download_that_is_not_whole_has_another_name_and_counts_as_none(folder: Path) -> None:
    link = folder / "snapshots" / COMMIT / "model.safetensors"
    link.unlink()
    (folder / "blobs" / f"{SHA}.incomplete").write_bytes(LARGE)
    link.symlink_to(f"../../blobs/{SHA}.incomplete")
    assert whole() is None
    link.unlink()
    link.symlink_to("../../blobs/gone")
    assert whole() is None


def test_a_link_out_of_the_repos_folder_is_not_followed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / SHA).write_bytes(LARGE)
    link = folder / "snapshots" / COMMIT / "model.safetensors"
    link.unlink()
    link.symlink_to(tmp_path / SHA)
    assert whole() is None


def test_without_links_the_file_itself_lies_there(folder: Path) -> None:
    path = folder / "snapshots" / COMMIT / "model.safetensors"
    path.unlink()
    path.write_bytes(LARGE)
    assert whole() == path and whole(size=3) is None


def test_a_file_whose_bytes_were_wrong_is_fetched_from_then_on_and_others_are_not(folder: Path) -> None:
    cache.distrust(REPO, COMMIT, "model.safetensors")
    assert whole() is None and whole("sub/config.json", len(SMALL), GIT) is not None
    cache.distrust(REPO, COMMIT, "not-there")
    assert len(list((Path(constants.HF_HOME) / "ds4convert" / "distrusted").iterdir())) == 1


def test_offline_wrong_bytes_cannot_be_fetched_so_the_file_to_remove_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "is_offline_mode", lambda: True)
    with pytest.raises(EnvironmentFault) as found:
        cache.distrust(REPO, COMMIT, "model.safetensors")
    assert str(found.value) == (
        "me/model: model.safetensors: the Hub client's cache holds other bytes than the Hub listed, and offline mode is "
        f"on (HF_HUB_OFFLINE): remove {folder / 'blobs' / SHA}, and fetch it again with the network"
    )
    cache.distrust(REPO, COMMIT, "not-there")  # nothing to remove
    assert whole() is not None


@pytest.mark.parametrize("revision", ["main", "pr/1", COMMIT])
def test_a_repo_is_read_from_the_cache_by_branch_or_commit(folder: Path, revision: str) -> None:
    repo = cache.repo_in_cache(REPO, revision)
    assert (repo.name, repo.commit, repo.cached_in) == (REPO, COMMIT, folder / "snapshots" / COMMIT)
    assert repo.files == (
        RemoteFile("model.safetensors", len(LARGE), SHA, SHA),
        RemoteFile("sub/config.json", len(SMALL), GIT, None),
    )


@pytest.mark.parametrize("revision", ["other", "f" * 40, COMMIT[:39], "../blobs", "."])
def test_a_revision_that_the_cache_does_not_hold_is_told_with_the_folder(folder: Path, revision: str) -> None:
    with pytest.raises(EnvironmentFault) as found:
        cache.repo_in_cache(REPO, revision)
    assert str(found.value) == (
        "me/model: offline mode is on (HF_HUB_OFFLINE), and the Hub client's cache "
        f"({folder.parent}) does not hold revision {revision}; unset it, or name a local folder"
    )


@pytest.mark.parametrize("text", [b"", b"main", b"\xff\xfe", b"../../../etc", COMMIT.encode() + b"0"])
def test_a_ref_that_holds_no_commit_is_no_revision(folder: Path, text: bytes) -> None:
    (folder / "refs" / "main").write_bytes(text)
    with pytest.raises(EnvironmentFault, match="does not hold revision main"):
        cache.repo_in_cache(REPO, "main")


def test_a_file_that_is_no_link_gets_gits_id_of_its_own_bytes(folder: Path) -> None:
    path = folder / "snapshots" / COMMIT / "config.json"
    path.write_bytes(SMALL)
    files = {f.name: f for f in cache.repo_in_cache(REPO, "main").files}
    assert files["config.json"] == RemoteFile("config.json", len(SMALL), GIT, None)


def test_a_large_file_that_is_no_link_is_known_by_name_and_size_not_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "MAX_SMALL_BYTES", 5)
    path = folder / "snapshots" / COMMIT / "big.bin"
    path.write_bytes(b"123456")
    first = {f.name: f.etag for f in cache.repo_in_cache(REPO, "main").files}["big.bin"]
    assert first == hashlib.sha1(b"blob 9\0big.bin 6").hexdigest()
    path.write_bytes(b"12345")
    small = {f.name: f.etag for f in cache.repo_in_cache(REPO, "main").files}["big.bin"]
    assert small == hashlib.sha1(b"blob 5\x0012345").hexdigest(), "five bytes are read"


def test_a_name_in_the_cache_is_as_untrusted_as_one_in_a_listing(folder: Path) -> None:
    (folder / "snapshots" / COMMIT / "con").write_bytes(b"")
    with pytest.raises(InputError, match="me/model: holds a file named 'con', which is not a safe file name"):
        cache.repo_in_cache(REPO, "main")


def test_a_range_of_a_cached_file_is_read_and_one_beyond_its_end_says_to_clear_it(tmp_path: Path) -> None:
    path = tmp_path / "blob"
    path.write_bytes(LARGE)
    assert b"".join(cache.read_local(path, 2, 5)) == LARGE[2:7]
    with pytest.raises(EnvironmentFault) as found:
        list(cache.read_local(path, 8, 5))
    assert str(found.value) == (
        f"{tmp_path}: blob: ends before byte 13; the file is being changed, or is truncated; clear it from the Hub "
        "client's cache"
    )
