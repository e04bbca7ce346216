"""Names in a repo are untrusted: which ones are safe on every system that a repo may be downloaded to."""

from __future__ import annotations

import posixpath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds4convert.errors import InputError
from ds4convert.hub.records import MAX_NAME_BYTES, RemoteFile, Repo, check_name

SAFE = [
    "config.json", "mtp/model.safetensors", "a/b/c/d.txt", "model-00001-of-00002.safetensors", ".gitattributes",
    "a b.txt", "größe.txt", "模型.json", "...", "a..b", "console.txt", "com10.txt", "lpt0", "x.con", "git", "a/.gitx",
    "cache/x", ".cached/x", "a/.cache/x", "gitmodules", "~tilde", "a@b", "a=b", "a'b",
]  # fmt: skip
HOSTILE = [
    # leads out of the folder, or to its root
    "", "/", "/etc/passwd", "../x", "a/../b", "a/..", "./a", "a/./b", "a//b", "a/", "..", ".",
    # means something else on Windows: another separator, a drive, a stream, a pattern, a name that is cut
    "a\\b", "c:x", "a:b", "a*", "a?", 'a"b', "a<b", "a>b", "a|b", " a", "a ", "a/ b", "a /b", "a\t",
    # devices of Windows, whatever the suffix, the case and the folder
    "con", "CON", "aux.txt", "a/nul.json", "com1", "LPT9.tar.gz", "prn", "nul.",
    # obeyed by git, by this program, and by the Hub's client
    ".git/config", "a/.GIT/hooks/x", ".git", "git~1/config", "GIT~2", ".git./x", ".git /x", ".ds4convert/plan.json",
    "a/.ds4convert", "DS4CON~1/x", ".cache/huggingface/x", ".CACHE/x", ".gitmodules", "a/.gitmodules", ".GitConfig",
    # no text, or shown as another one
    "a\nb", "a\0b", "a\x1bb", "a\u202eb", "a\u2028b",
]  # fmt: skip


@pytest.mark.parametrize("name", SAFE)
def test_a_name_that_stays_in_its_folder_everywhere_is_taken(name: str) -> None:
    check_name(name, "me/model")


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_that_some_system_takes_for_something_else_refuses_the_repo(name: str) -> None:
    with pytest.raises(InputError) as found:
        check_name(name, "me/model")
    message = str(found.value)
    assert message.startswith("me/model: holds a file named '") and message.isprintable()
    assert message.endswith(", which is not a safe file name; the repo is refused. Nothing was written")


@pytest.mark.parametrize(
    ("longest", "longer"),
    [
        ("a" * 255, "a" * 256),
        ("é" * 127 + "a", "é" * 128),  # bytes, as file systems count them
        ("x/" + "a" * 255, "x/" + "a" * 256),
        ("a/" * 349 + "bc", "a/" * 349 + "bcd"),  # 700 bytes
    ],
)
def test_a_part_has_at_most_255_bytes_and_a_path_at_most_700(longest: str, longer: str) -> None:
    check_name(longest, "r")
    with pytest.raises(InputError):
        check_name(longer, "r")
    assert MAX_NAME_BYTES == 700


@given(st.text(st.sampled_from("ab./\\: ~\0C\u202e"), max_size=12))
def test_whatever_is_taken_names_a_place_below_its_folder(name: str) -> None:
    try:
        check_name(name, "r")
    except InputError:
        return
    assert posixpath.normpath(posixpath.join("/folder", name)) == f"/folder/{name}"
    assert not set(name) & set('\\:*?"<>|') and name.isprintable() and name == name.strip()


def test_shards_are_the_safetensors_at_the_top_that_are_not_hidden() -> None:
    names = [
        "model.safetensors", "mtp/model.safetensors", "._model.safetensors", "model.safetensors.index.json", "x.bin",
        "b.safetensors",
    ]  # fmt: skip
    repo = Repo("me/model", "0" * 40, tuple(RemoteFile(n, 1, "e", None) for n in names))
    assert [f.name for f in repo.shards()] == ["model.safetensors", "b.safetensors"]
