"""huggingface_hub's own client and its `hf` program, unmodified, against the local Hub."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.local_hub import LocalHub

NAME = "owner/model"


def noise(size: int, seed: int = 0) -> bytes:
    return hashlib.shake_128(bytes([seed])).digest(size)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "given"
    (made / "sub/deep").mkdir(parents=True)
    (made / "config.json").write_text('{"a": 1}')
    (made / "empty.txt").write_bytes(b"")
    (made / "sub/größe 1+1.txt").write_text("text")
    (made / "one.safetensors").write_bytes(noise(300_000, 1))
    (made / "sub/deep/two.safetensors").write_bytes(noise(70_000, 2))
    return made


@pytest.fixture
def small_parts(tmp_path: Path) -> Iterator[LocalHub]:
    made = LocalHub(tmp_path / "small_parts", part_size=100_000, page_size=3)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def without_xet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set what HF_HUB_DISABLE_XET sets, for clients in this process."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


def api_of(hub: LocalHub, token: str | bool | None = None) -> HfApi:
    return HfApi(endpoint=hub.url, token=hub.token if token is None else token)


def contents(folder: Path) -> dict[str, bytes]:
    files = (p for p in folder.rglob("*") if p.is_file() and ".cache" not in p.parts)
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def stored(hub: LocalHub, revision: str = "main") -> dict[str, bytes]:
    files = {k: p.read_bytes() for k, p in hub.files(NAME, revision).items()}
    return {k: v for k, v in files.items() if k != ".gitattributes"}


def hf(hub: LocalHub, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "hf"), *map(str, arguments)]
    return subprocess.run(command, env=os.environ | hub.environment(), capture_output=True, text=True, timeout=60)


def test_hf_upload_and_hf_download_give_the_same_folder(hub: LocalHub, folder: Path, tmp_path: Path) -> None:
    up = hf(hub, "upload", NAME, folder, ".")
    assert up.returncode == 0, up.stderr
    assert stored(hub) == contents(folder)
    down = hf(hub, "download", NAME, "--local-dir", tmp_path / "down")
    assert down.returncode == 0, down.stderr
    got = contents(tmp_path / "down")
    assert got.pop(".gitattributes") and got == contents(folder)


def test_a_folder_goes_up_in_parts_and_a_snapshot_of_it_comes_down(
    small_parts: LocalHub, folder: Path, tmp_path: Path
) -> None:
    api = api_of(small_parts)
    assert api.create_repo(NAME).repo_id == NAME
    made = api.upload_folder(repo_id=NAME, folder_path=folder)
    count = small_parts.counters()
    assert (count["requests"]["part"], count["requests"]["complete"], count["requests"]["upload"]) == (3, 1, 1)
    big = hashlib.sha256(noise(300_000, 1)).hexdigest()
    assert 300_000 < count["received"][f"lfs/{big}"] < 301_000, "the parts once, and the completion"
    assert stored(small_parts) == contents(folder) and api.model_info(NAME).sha == made.oid
    down = api.snapshot_download(NAME, cache_dir=tmp_path / "cache")
    got = contents(Path(down))
    assert got.pop(".gitattributes") and got == contents(folder)


def test_what_is_there_already_is_not_sent_again(hub: LocalHub, folder: Path) -> None:
    api = api_of(hub)
    api.create_repo(NAME)
    first = api.upload_folder(repo_id=NAME, folder_path=folder)
    hub.reset_counters()
    again = api.upload_folder(repo_id=NAME, folder_path=folder)
    count = hub.counters()
    assert again.oid == first.oid and "upload" not in count["requests"] and "commit" not in count["requests"]
    (folder / "copy.safetensors").write_bytes(noise(300_000, 1))
    api.upload_folder(repo_id=NAME, folder_path=folder)
    assert "upload" not in hub.counters()["requests"] and stored(hub) == contents(folder)


def test_info_tree_and_paths_tell_sizes_and_hashes(small_parts: LocalHub, folder: Path) -> None:
    hub = small_parts
    commit, api = hub.add_repo(NAME, folder), api_of(hub)
    info = api.model_info(NAME, files_metadata=True)
    assert (info.sha, info.private, info.gated) == (commit, False, False)
    sizes = {k: len(v) for k, v in contents(folder).items()}
    assert info.siblings and {s.rfilename: s.size for s in info.siblings} == sizes
    rows = list(api.list_repo_tree(NAME, recursive=True, expand=True))
    assert hub.counters()["requests"]["tree"] == 3, "7 rows on pages of 3"
    files = {r.path: r for r in rows if hasattr(r, "size")}
    assert {k: r.size for k, r in files.items()} == sizes
    assert {r.path for r in rows} - set(files) == {"sub", "sub/deep"}
    sha256 = hashlib.sha256(noise(300_000, 1)).hexdigest()
    assert files["one.safetensors"].lfs and files["one.safetensors"].lfs.sha256 == sha256
    plain = b'{"a": 1}'
    assert files["config.json"].blob_id == hashlib.sha1(b"blob %d\0" % len(plain) + plain).hexdigest()
    assert files["config.json"].last_commit and files["config.json"].last_commit.oid == commit
    assert [r.path for r in api.list_repo_tree(NAME, "sub")] == ["sub/deep", "sub/größe 1+1.txt"]
    found = api.get_paths_info(NAME, ["sub", "config.json", "absent"])
    assert [r.path for r in found] == ["config.json", "sub"]
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(NAME, "absent"))


def test_commits_need_their_parent_and_old_revisions_stay(hub: LocalHub, folder: Path, tmp_path: Path) -> None:
    first, api = hub.add_repo(NAME, folder), api_of(hub)

    def change(data: bytes, parent: str) -> str:
        add = CommitOperationAdd("config.json", data)
        return str(api.create_commit(NAME, [add], commit_message="change", parent_commit=parent).oid)

    second = change(b"{}", first)
    with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
        change(b"[]", first)
    assert stored(hub)["config.json"] == b"{}" and stored(hub, first)["config.json"] == b'{"a": 1}'
    old = api.hf_hub_download(NAME, "config.json", revision=first, cache_dir=tmp_path / "cache")
    assert Path(old).read_bytes() == b'{"a": 1}'
    api.delete_file("config.json", NAME)
    assert "config.json" not in stored(hub)
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download(NAME, "config.json", cache_dir=tmp_path / "cache")
    gone = [CommitOperationDelete("sub/", is_folder=True)]
    api.create_commit(NAME, gone, commit_message="without sub")
    assert set(stored(hub)) == {"empty.txt", "one.safetensors"}
    commits = api.list_repo_commits(NAME)
    assert len(commits) == 4 and [c.commit_id for c in commits][2:] == [second, first]


def test_branches_and_tags_name_revisions(hub: LocalHub, folder: Path) -> None:
    first, api = hub.add_repo(NAME, folder), api_of(hub)
    api.create_branch(NAME, branch="try/one")
    api.create_tag(NAME, tag="v1")
    api.upload_file(path_or_fileobj=b"new", path_in_repo="new.txt", repo_id=NAME, revision="try/one")
    assert "new.txt" in stored(hub, "try/one") and "new.txt" not in stored(hub)
    assert api.model_info(NAME, revision="v1").sha == first
    refs = api.list_repo_refs(NAME)
    assert {b.name for b in refs.branches} == {"main", "try/one"} and [t.name for t in refs.tags] == ["v1"]
    api.delete_tag(NAME, tag="v1")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(NAME, revision="v1")


def test_tokens_decide_what_may_be_seen_and_written(hub: LocalHub, folder: Path, tmp_path: Path) -> None:
    owner, reader, nobody = api_of(hub), api_of(hub, hub.reader_token), api_of(hub, False)
    assert owner.whoami()["name"] == "owner" and reader.whoami()["name"] == "reader"
    hub.add_repo("owner/private", folder, private=True)
    hub.add_repo("owner/gated", folder, gated=True)
    assert owner.model_info("owner/private").private and owner.model_info("owner/gated").gated == "auto"
    for other in (reader, nobody):
        with pytest.raises(RepositoryNotFoundError):
            other.model_info("owner/private")
        assert other.model_info("owner/gated").id == "owner/gated"
        with pytest.raises(GatedRepoError):
            other.hf_hub_download("owner/gated", "one.safetensors", cache_dir=tmp_path / "cache")
        with pytest.raises(HfHubHTTPError):
            other.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="owner/gated")
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        api_of(hub, "hf_wrong").model_info("owner/gated")
    assert owner.hf_hub_download("owner/gated", "one.safetensors", cache_dir=tmp_path / "cache")


def test_repos_are_made_once_and_deleted(hub: LocalHub) -> None:
    api = api_of(hub)
    api.create_repo(NAME, private=True)
    assert api.model_info(NAME).private
    api.update_repo_settings(NAME, private=False)
    assert not api.model_info(NAME).private
    api.create_repo(NAME, exist_ok=True)
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo(NAME)
    api.delete_repo(NAME)
    assert not hub.has_repo(NAME)
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo(NAME)
