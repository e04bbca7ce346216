"""Opening files of a stranger's folder: links, what is no file, sizes; and which links into the Hub's cache may lead out."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from ds4convert.errors import EnvironmentFault, HeaderError
from ds4convert.storage import safe_open
from ds4convert.storage.belonging import belongs
from ds4convert.storage.safe_open import names_in, open_file, read_own, read_small, resolve_inside, safetensors_in
from ds4convert.storage.state_folder import is_begun
from ds4convert.storage.untrusted import links

GIT, SHA = "a1" * 20, "b2" * 32


def refusal(folder: Path, name: str) -> str:
    with pytest.raises(HeaderError) as caught:
        read_small(folder, name)
    assert caught.value.file == name
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "is_part"),
    [
        ("a", True), ("a/b", True), ("a.b", True), ("a/.b", False), (".a/b", False), (".DS_Store", False),
        ("._model.safetensors", False), ("..", False), ("a..b", True), ("", True), ("a/b/.git", False),
    ],
)  # fmt: skip
def test_names_that_begin_with_a_dot_are_no_part_of_a_folder(name: str, is_part: bool) -> None:
    assert belongs(name) == is_part


def test_names_are_listed_in_order_without_hidden_ones(tmp_path: Path) -> None:
    for name in ("b.safetensors", "a.safetensors", "._a.safetensors", "c.safetensors.part", "d.json", "A.safetensors"):
        (tmp_path / name).touch()
    assert names_in(tmp_path) == ["A.safetensors", "a.safetensors", "b.safetensors", "c.safetensors.part", "d.json"]
    assert safetensors_in(tmp_path) == ["A.safetensors", "a.safetensors", "b.safetensors"]


def test_a_folder_that_is_not_there_has_no_names_and_one_that_cannot_be_listed_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    assert names_in(tmp_path / "none") == [] and names_in(tmp_path / "file") == []

    def refused(path: object) -> object:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(EnvironmentFault, match=r"/x: cannot be listed: Permission denied"):
        names_in(Path("/x"))


def test_a_link_within_the_folder_is_followed_and_one_out_of_it_is_not(tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "below").mkdir(parents=True)
    (home / "below" / "real").write_bytes(b"data")
    (tmp_path / "secret").write_bytes(b"secret")
    (home / "in").symlink_to("below/real")
    (home / "out").symlink_to("../secret")
    (home / "beside").symlink_to(tmp_path / "homeless")  # begins with the folder's name, and is not in it
    assert read_small(home, "in") == b"data"
    assert refusal(home, "out") == (
        f"out: is a link that leads out of the folder, to {tmp_path.resolve() / 'secret'}; it is not followed"
    )
    assert "leads out of the folder" in refusal(home, "beside")
    assert "leads out of the folder" in refusal(home, "../secret")


@pytest.mark.parametrize("name", ["a\0b", "\0"])
def test_a_name_with_a_nul_is_refused_before_the_system_sees_it(name: str, tmp_path: Path) -> None:
    told = name.replace("\0", "\\x00")
    assert refusal(tmp_path, name) == f"{told}: has a NUL in its name, which no file can have"


def test_what_is_missing_or_no_plain_file_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as server:
        before = Path.cwd()
        os.chdir(tmp_path)  # names of sockets are short
        server.bind("sock")
        os.chdir(before)
        assert refusal(tmp_path, "none") == "none: the file is missing; download it again"
        assert refusal(tmp_path, "folder") == "folder: is not a regular file"
        assert refusal(tmp_path, "pipe") == "pipe: is not a regular file"
        assert refusal(tmp_path, "sock") == "sock: is not a regular file: No such device or address"
        assert refusal(tmp_path, "loop").startswith("loop: is not a regular file: Too many levels of symbolic links")
        assert refusal(tmp_path, "x" * 300).endswith("is not a regular file: File name too long")


@pytest.mark.parametrize(
    ("to", "how"),
    [
        ("gone", "put the file there, or download it again"),
        (".git/annex/objects/x", "git-annex has not fetched it: `git annex get` in that clone"),
        (
            "blobs/x",
            "a file of the Hub client's cache that was removed, or not downloaded to its end; download it again",
        ),
    ],
)
def test_a_link_to_nothing_says_what_was_to_be_there(to: str, how: str, tmp_path: Path) -> None:
    (tmp_path / "m").symlink_to(to)
    assert refusal(tmp_path, "m") == f"m: is a link to {tmp_path.resolve() / to}, which is not there; {how}"


def test_the_size_of_a_small_file_is_bounded_to_the_byte(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    assert read_small(tmp_path, "a", 5) == b"12345"
    with pytest.raises(HeaderError, match=r"^a: 5 bytes, expected at most 4$"):
        read_small(tmp_path, "a", 4)
    assert safe_open.MAX_SMALL_BYTES == 100_000_000


def test_what_this_program_remembers_counts_as_nothing_where_it_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(b"12345")
    os.mkfifo(tmp_path / "pipe")
    assert read_own(tmp_path, "state") == b"12345"
    assert [read_own(tmp_path, n) for n in ("none", "pipe")] == [b"", b""] and read_own(tmp_path, "state", 4) == b""


def test_a_file_that_may_not_be_opened_is_a_fault_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(EnvironmentFault, match=r"^m: cannot be opened: Permission denied$"):
        open_file(tmp_path / "m", "m")


def test_an_open_file_is_not_handed_on_to_programs(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    fd = open_file(tmp_path / "a", "a")
    assert not os.get_inheritable(fd)
    os.close(fd)


@pytest.mark.parametrize(
    ("path", "is_one"),
    [
        (f"/c/models--o--n/blobs/{GIT}", True), (f"/c/models--o--n/blobs/{SHA}", True),
        (f"/c/models--o--n/blobs/{GIT[:-1]}", False), (f"/c/models--o--n/blobs/{SHA}a", False),
        (f"/c/models--o--n/blobs/{GIT.upper()}", False), (f"/c/models--o--n/blobs/{GIT}.incomplete", False),
        (f"/c/datasets--o--n/blobs/{GIT}", False), (f"/c/models--o--n/snapshots/{GIT}", False),
    ],
)  # fmt: skip
def test_a_blob_of_the_hubs_cache_is_known_by_its_place_and_name(path: str, is_one: bool) -> None:
    """Source: huggingface_hub, guides/manage-cache: models--OWNER--NAME/blobs, named by sha256 or git's hash."""
    assert links.is_blob(Path(path)) == is_one


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A repo in the cache whose snapshot has config.json."""
    repo = tmp_path.resolve() / "hub" / "models--o--n"
    (repo / "blobs").mkdir(parents=True)
    snapshot = repo / "snapshots" / GIT
    snapshot.mkdir(parents=True)
    for blob in (GIT, SHA):
        (repo / "blobs" / blob).write_bytes(blob[:2].encode())
    (snapshot / "config.json").symlink_to(f"../../blobs/{GIT}")
    return repo


def test_a_snapshot_is_read_through_its_own_links_and_no_others(cache: Path, tmp_path: Path) -> None:
    snapshot = cache / "snapshots" / GIT
    assert read_small(snapshot, "config.json") == b"a1"
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / GIT).write_bytes(b"other")
    (cache / "blobs" / "by-another-name").write_bytes(b"etag")
    (snapshot / "old").symlink_to("../../blobs/by-another-name")
    assert read_small(snapshot, "old") == b"etag", "any file of its own blobs"
    (snapshot / "evil").symlink_to(tmp_path / "blobs" / GIT)
    assert "leads out of the folder" in refusal(snapshot, "evil")


def test_another_folder_may_link_to_a_blob_under_the_name_that_a_snapshot_has_for_it(
    cache: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "config.json").symlink_to(cache / "blobs" / GIT)
    (mine / "other.json").symlink_to(cache / "blobs" / GIT)  # a file passed off as another
    (mine / "stray").symlink_to(cache / "blobs" / SHA)  # a blob that no snapshot has
    assert read_small(mine, "config.json") == b"a1"
    assert "leads out of the folder" in refusal(mine, "other.json")
    assert "leads out of the folder" in refusal(mine, "stray")
    assert resolve_inside(mine, "config.json") == cache / "blobs" / GIT
    with pytest.raises(HeaderError) as caught:
        resolve_inside(mine, "stray")
    assert caught.value.file == "stray"


def test_a_cache_without_snapshots_lends_nothing(tmp_path: Path) -> None:
    blob = tmp_path.resolve() / "models--o--n" / "blobs" / GIT
    blob.parent.mkdir(parents=True)
    blob.write_bytes(b"x")
    assert not links.may_leave(tmp_path / "mine", "config.json", blob)


def test_a_run_has_begun_where_it_left_its_plan(tmp_path: Path) -> None:
    assert not is_begun(tmp_path)
    (tmp_path / ".ds4convert" / "plan.json").mkdir(parents=True)
    assert not is_begun(tmp_path), "a folder of that name is no plan"
    (tmp_path / ".ds4convert" / "plan.json").rmdir()
    (tmp_path / ".ds4convert" / "plan.json").touch()
    assert is_begun(tmp_path)
