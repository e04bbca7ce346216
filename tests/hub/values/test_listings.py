"""A listing of the Hub, as /api/models/NAME/revision/REV?blobs=true gives it (reference/hub.md, 6), checked field by field."""

from __future__ import annotations

from typing import Any

import pytest

from ds4convert.checkpoint.folder import MAX_FILES
from ds4convert.errors import EnvironmentFault, InputError
from ds4convert.hub.records import RemoteFile, Repo
from ds4convert.hub.repo import NO_HUB, _listed

COMMIT, GIT, SHA = "c0ffee" + "0" * 34, "a" * 40, "b" * 64
SMALL: dict[str, Any] = {"rfilename": "config.json", "size": 12, "blobId": GIT}
LARGE: dict[str, Any] = {
    "rfilename": "model.safetensors",
    "size": 99,
    "blobId": GIT,
    "lfs": {"sha256": SHA, "size": 99},
}


def listed(*rows: object, **more: object) -> Repo:
    return _listed("me/model", {"sha": COMMIT, "siblings": list(rows)} | more, "http://hub", "token")


def test_a_small_file_has_gits_id_and_a_large_one_its_sha256() -> None:
    repo = listed(SMALL, LARGE)
    assert repo.files == (RemoteFile("config.json", 12, GIT, None), RemoteFile("model.safetensors", 99, SHA, SHA))
    assert (repo.name, repo.commit, repo.endpoint, repo.token) == ("me/model", COMMIT, "http://hub", "token")


def test_a_digest_of_64_digits_under_blob_id_is_one_and_an_empty_file_is_a_file() -> None:
    assert listed(SMALL | {"blobId": SHA, "size": 0, "lfs": None}).files == (RemoteFile("config.json", 0, SHA, None),)


@pytest.mark.parametrize(
    ("commit", "told"),
    [(None, "None"), ("", ""), ("main", "main"), (COMMIT[:39], COMMIT[:39]), (COMMIT.upper(), COMMIT.upper()),
     (COMMIT + "\n", COMMIT + "\\n"), (7, "7"), ("../../x", "../../x")],
)  # fmt: skip
def test_a_commit_that_is_none_is_told_as_it_came(commit: object, told: str) -> None:
    with pytest.raises(EnvironmentFault) as found:
        listed(SMALL, sha=commit)
    assert str(found.value) == f"me/model: the Hub tells the commit {told}, expected 40 hex digits. {NO_HUB}"


@pytest.mark.parametrize("rows", [None, {}, "config.json", 3])
def test_a_listing_without_rows_says_so(rows: object) -> None:
    with pytest.raises(EnvironmentFault) as found:
        _listed("me/model", {"sha": COMMIT, "siblings": rows}, None, None)
    assert str(found.value) == f"me/model: the Hub's listing has no files (`siblings`). {NO_HUB}"


@pytest.mark.parametrize("row", [None, [], "config.json", {}, {"rfilename": None}, {"rfilename": 3, "size": 1}])
def test_a_row_without_a_name_says_so(row: object) -> None:
    with pytest.raises(EnvironmentFault) as found:
        listed(row)
    assert str(found.value) == f"me/model: the Hub's listing has a row without `rfilename`. {NO_HUB}"


@pytest.mark.parametrize(
    "change",
    [{"size": None}, {"size": -1}, {"size": True}, {"size": 1.0}, {"size": "12"}, {"size": 1 << 50}, {"blobId": None}],
    ids=str,
)
def test_a_size_or_digest_that_is_missing_or_absurd_names_the_file(change: dict[str, Any]) -> None:
    with pytest.raises(EnvironmentFault) as found:
        listed(SMALL | change)
    assert str(found.value) == f"me/model: the Hub does not tell size and digest of config.json. {NO_HUB}"


def test_the_largest_size_that_is_believed_is_a_byte_below_a_pebibyte() -> None:
    assert listed(SMALL | {"size": (1 << 50) - 1}).files[0].size == (1 << 50) - 1


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (SMALL | {"blobId": "xyz"}, "xyz"),
        (SMALL | {"blobId": GIT.upper()}, GIT.upper()),
        (SMALL | {"blobId": GIT + "a"}, GIT + "a"),
        (SMALL | {"blobId": 5}, "5"),
        (LARGE | {"lfs": {"sha256": GIT}}, GIT),  # a large file has a sha256 and nothing shorter
        (LARGE | {"lfs": {"sha256": ""}}, ""),
        (LARGE | {"lfs": {"sha256": "W/" + SHA}}, "W/" + SHA),
    ],
)
def test_a_digest_of_another_form_is_told_with_its_file(row: dict[str, Any], told: str) -> None:
    with pytest.raises(EnvironmentFault) as found:
        listed(row)
    name = row["rfilename"]
    assert str(found.value) == (
        f"me/model: {name}: the Hub lists {told} as its digest, expected 40 or 64 hex digits. {NO_HUB}"
    )


@pytest.mark.parametrize(
    ("one", "other"), [("Config.json", "config.JSON"), ("a/x", "A/x"), ("caf\u00e9", "cafe\u0301"), ("x", "x")]
)
def test_two_names_that_a_mac_or_windows_takes_for_one_are_refused(one: str, other: str) -> None:
    with pytest.raises(InputError) as found:
        listed(SMALL | {"rfilename": one}, SMALL | {"rfilename": other})
    assert str(found.value) == "me/model: holds two names that some systems take for one; refused"


@pytest.mark.parametrize(("file", "below"), [("a", "a/b"), ("a/b", "a/b/c"), ("A", "a/b"), ("x/Y", "X/y/z/w")])
def test_a_name_that_is_a_file_and_a_folder_is_refused(file: str, below: str) -> None:
    with pytest.raises(InputError) as found:
        listed(SMALL | {"rfilename": below}, SMALL | {"rfilename": file})
    assert str(found.value) == (
        f"me/model: {file} is a file and a folder in the Hub's listing; refused. Nothing was written"
    )


def test_a_name_that_begins_like_a_folder_is_none() -> None:
    names = ["a", "ab/c", "b/a", "b/ab"]
    assert [f.name for f in listed(*(SMALL | {"rfilename": n} for n in names)).files] == names


def test_more_files_than_a_checkpoint_may_have_are_refused_before_any_is_looked_at() -> None:
    with pytest.raises(InputError, match=rf"me/model: {MAX_FILES + 1} files, expected at most {MAX_FILES}; refused"):
        listed(*[None] * (MAX_FILES + 1))
