"""What lies in a file's place: every kind by its first bytes, as its specification has them, with the way on; small files."""

from __future__ import annotations

import gzip
import io
import lzma
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds4convert.storage import small_files
from ds4convert.storage.untrusted.lookalikes import as_text, other_format, told, told_text

FETCH = "fetch the file itself: `git lfs pull` in a clone, or `ds4convert pull REPO DEST`"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 12345\n"
"""The example of git-lfs, docs/spec.md."""


def zipped() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        z.writestr("a", "b")
    return out.getvalue()


def saved() -> bytes:
    out = io.BytesIO()
    np.save(out, np.zeros(3))
    return out.getvalue()


REAL = {
    "pointer": (POINTER, "is a Git LFS pointer, not the file itself"),
    "annex": (b"/annex/objects/SHA256E-s1--abc.bin\n", "is a pointer of git-annex, not the file itself; fetch the file: `git annex get` in that clone"),
    "zip": (zipped(), "is a zip archive, such as a PyTorch checkpoint (.bin, .pt)"),
    "pickle 2": (pickle.dumps({"a": [1] * 50}, 2), "is a Python pickle, such as an old PyTorch checkpoint"),
    "pickle 3": (pickle.dumps({"a": [1] * 50}, 3), "is a Python pickle"),
    "pickle 4": (pickle.dumps({"a": [1] * 50}, 4), "is a Python pickle"),
    "gzip": (gzip.compress(b"x"), "is compressed with gzip; unpack it: rename it to NAME.gz and run `gunzip NAME.gz`"),
    "xz": (lzma.compress(b"x"), "is compressed with xz; unpack it: `xz -d`"),
    "zstd": (bytes.fromhex("28b52ffd2400"), "is compressed with zstd; unpack it: `zstd -d`"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(8), "is an HDF5 file; take the release in safetensors"),
    "npy": (saved(), "is an array of NumPy; take the release in safetensors"),
    "gguf": (b"GGUF\x03\x00\x00\x00", "is a GGUF file of llama.cpp, whose weights are rounded already; take the release in safetensors"),
    "page": (b"<!DOCTYPE html>\n<html>", "is a web page (HTML: an error or a login), not the file itself"),
    "page after blanks": (b"\n  <html lang=en>", "is a web page"), "head": (b"<HEAD><title>", "is a web page"),
    "xml": (b"<?xml version='1.0'?><Error>", "is a web page"), "page with a mark": (b"\xef\xbb\xbf<!doctype html>", "is a web page"),
}  # fmt: skip
"""By kind: a file as the program of that format writes it, and what it is called."""


@pytest.mark.parametrize("kind", REAL)
def test_a_file_of_another_kind_is_called_that_from_eight_bytes_on(kind: str) -> None:
    raw, what = REAL[kind]
    begins = raw.lstrip() if "blanks" in kind else raw
    for part in (raw, begins[:16], begins[: 8 if "mark" not in kind else 11]):
        found = told(part)
        assert found is not None and found.startswith(what), (part, found)


@pytest.mark.parametrize("raw", [b"version ", b"/annex/o"])
def test_eight_bytes_of_a_pointer_are_enough_and_seven_are_not(raw: bytes) -> None:
    assert told(raw) is not None and told(raw[:7]) is None


@pytest.mark.parametrize(
    "raw", [b"", b"versions of this file", b"version http://x", b"<", b"<htm", b"<body>x", b"PK\x03", b"\x80\x04X", b"{", b"GGU", bytes(8)]
)  # fmt: skip
def test_what_is_none_of_these_is_told_as_nothing(raw: bytes) -> None:
    assert told(raw) is None


def test_pickles_are_not_opened_and_the_reason_is_said() -> None:
    assert str(told(REAL["pickle 4"][0])) == (
        "is a Python pickle: opening it would run code of whoever made it, so it is not read; take the release in "
        "safetensors, or save it as safetensors with the program that made it"
    )
    assert str(told(POINTER)).endswith(f"; {FETCH}") and str(told(b"<html><body>")).endswith(f"; {FETCH}")


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        (b"", "is empty; download it again"),
        (bytes(5), "holds 5 zero bytes and nothing else, as an interrupted download leaves; download it again"),
        ("\ufeff{}".encode("utf-16-le"), "is UTF-16 text; save it as UTF-8"),
        ("\ufeff{}".encode("utf-16-be"), "is UTF-16 text; save it as UTF-8"),
        (b"{}", None), (b"\0{}\0", None), (b"\xff\xff", None),
    ],
)  # fmt: skip
def test_a_text_file_as_a_whole(raw: bytes, what: str | None) -> None:
    assert told_text(raw) == what


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"Not Found", "is text that begins with 'Not Found'"),
        (b"  \n one line\nanother", "is text that begins with 'one line'"),
        (b"it's", 'is text that begins with "it\'s"'),
        (b"x" * 50, f"is text that begins with '{'x' * 40}'"),
        ("über".encode()[:1] + b"", None),
        ("caf\u00e9".encode()[:-1], "is text that begins with 'caf'"),
        ("漢字".encode()[:5], "is text that begins with '漢'"),
        (b"caf\xe9 and more", None), (b"", None), (b" \n\t", None), (b"a\x00b", None), (b"\x80abc", None),
        (b"a\tb\r\n", "is text that begins with 'a\\tb'"),
    ],
)  # fmt: skip
def test_the_beginning_of_a_text_is_told_in_words_and_of_anything_else_not(raw: bytes, words: str | None) -> None:
    assert as_text(raw) == words


@given(st.text(st.characters(categories=["L", "N"]), min_size=3, max_size=60), st.integers(1, 60))
def test_a_text_that_is_cut_anywhere_is_still_one(text: str, at: int) -> None:
    raw = text.encode()[: at + 3]
    whole = raw.decode("utf-8", "ignore")
    assert as_text(raw) == f"is text that begins with '{whole[:40]}'"


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], ""), (["a.safetensors", "readme.md"], ""), (["bin"], ""),
        (["Q4.GGUF"], "; it holds GGUF files of llama.cpp, whose weights are rounded already (such as Q4.GGUF): take the release in safetensors"),
        (["x.txt", "pytorch_model.bin", "y.gguf"], "; it holds PyTorch's .bin files, which are not read because opening one can run code (such as pytorch_model.bin): take the release in safetensors"),
        (["a.pth"], "; it holds PyTorch's .pth files, which are not read because opening one can run code (such as a.pth): take the release in safetensors"),
        (["a\n.npz"], "; it holds NumPy's .npz files (such as a\\n.npz): take the release in safetensors"),
    ],
)  # fmt: skip
def test_a_folder_of_another_format_is_told_by_its_names(names: list[str], said: str) -> None:
    assert other_format(names) == said


SMALL = {
    ("config.json", b'{"a": 1}'): None, ("list.json", b"[1]"): None, ("bom.json", b"\xef\xbb\xbf{}"): None,
    ("LICENSE", b""): None, ("a.txt", b" \n"): None, ("README.md", b""): None, (".gitattributes", b""): None,
    ("merges.txt", POINTER): "is a Git LFS pointer, not the file itself; fetch it with `git lfs pull` or `ds4convert pull`",
    ("LICENSE", b"<html>x"): "is a web page (HTML), not the file itself; download it again",
    ("a.json", b"\n\n<!DOCTYPE HTML>"): "is a web page (HTML), not the file itself; download it again",
    ("a.xml", b"<?xml x"): "is a web page (HTML), not the file itself; download it again",
    ("tokenizer.model", b""): "is empty; download it again", ("a.json", b"\xef\xbb\xbf \n"): "is empty; download it again",
    ("a.json", b'{"a": "\xff"}'): "is not UTF-8 text, expected JSON",
    ("a.json", b'{"a": 1'): "is not whole JSON (it ends too early); download it again",
    ("b.json", b'{"a": [1, 2'): "is not whole JSON (it ends too early); download it again",
    ("a.json", b'{"a" 1, "b": 2, "c": 3}'): "is not whole JSON; download it again",
    ("a.json", b'"text"'): "is JSON, but neither a table nor a list", ("b.json", b"null"): "is JSON, but neither a table nor a list",
    ("a.bin", b'{"a" 1}'): None,
}  # fmt: skip


@pytest.mark.parametrize("case", SMALL, ids=lambda c: f"{c[0]} {c[1][:12]!r}")
def test_what_is_wrong_with_a_small_file(case: tuple[str, bytes]) -> None:
    assert small_files.fault(*case) == SMALL[case]


def test_faults_of_a_folder_are_told_by_name_each_once(tmp_path: Path) -> None:
    (tmp_path / "good.json").write_bytes(b"{}")
    (tmp_path / "bad.json").write_bytes(b"{")
    (tmp_path / "m.safetensors").write_bytes(b"")
    (tmp_path / "out").symlink_to("/etc/hostname")
    names = ["good.json", "bad.json", "m.safetensors", "none.json", "out"]
    assert small_files.faults(tmp_path, names) == [
        "bad.json: is not whole JSON (it ends too early); download it again",
        "none.json: the file is missing; download it again",
        f"out: is a link that leads out of the folder, to {Path('/etc/hostname').resolve()}; it is not followed",
    ]
