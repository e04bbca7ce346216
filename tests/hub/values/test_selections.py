"""A part of a repo as byte ranges: every byte of the chosen tensors once, in order; and what a pulled shard is checked for."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds4convert.checkpoint.types import TensorInfo
from ds4convert.errors import OutputError, ValueFault
from ds4convert.hub.pulling import part as pull_part
from ds4convert.hub.pulling import whole as pull_whole
from ds4convert.hub.pulling.part import Selection, Target, has_file_digest, merged, scan
from ds4convert.hub.records import RemoteFile, Repo

FILE = RemoteFile("model-1.safetensors", 1000, "e" * 64, "e" * 64)


def tensors(*places: tuple[int, int], dtype: str = "U8") -> tuple[TensorInfo, ...]:
    return tuple(TensorInfo(f"t{n}", dtype, (size,), 0, start, size) for n, (start, size) in enumerate(places))


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12))
def test_ranges_have_every_byte_once_in_order_and_no_two_of_them_touch(gaps: list[tuple[int, int]]) -> None:
    at, places, wanted = 0, [], []
    for gap, size in gaps:
        at += gap
        places.append((at, size))
        wanted += range(at, at + size)
        at += size
    found = merged(tensors(*places))
    assert [b for start, size in found for b in range(start, start + size)] == wanted
    assert all(size > 0 for _, size in found)
    assert all(a + n < b for (a, n), (b, _) in itertools.pairwise(found) if (b, 0) not in places)


@given(
    st.lists(st.tuples(st.integers(0, 500), st.integers(1, 40)), max_size=6), st.binary(max_size=9), st.integers(1, 7)
)
def test_pieces_tile_a_target_behind_its_header_and_none_is_larger_than_a_request(
    ranges: list[tuple[int, int]], header: bytes, most: int
) -> None:
    target = Target("t", FILE, "", header, (), tuple(ranges))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pull_part, "RANGE_BYTES", most)
        pieces = list(target.pieces())
    at, read = len(header), []
    for offset, start, size in pieces:
        assert offset == at and 1 <= size <= most
        at += size
        read += range(start, start + size)
    assert at == target.size == len(header) + sum(n for _, n in ranges)
    assert read == [b for start, n in ranges for b in range(start, start + n)]


def test_an_unfinished_folder_goes_on_with_the_same_bytes_of_the_same_commit_alone() -> None:
    target = Target("t", FILE, "", b"header", tensors((10, 5)), ((10, 5),))
    repo = Repo("me/m", "0" * 40, (FILE,))
    first = Selection(repo, "mtp", (target,))
    assert first.id == Selection(replace(repo, token="t", endpoint="e"), "mtp", (target,)).id, (
        "who fetches is no matter"
    )
    others = [
        Selection(replace(repo, name="me/n"), "mtp", (target,)),
        Selection(replace(repo, commit="1" * 40), "mtp", (target,)),
        Selection(repo, "backbone", (target,)),
        Selection(repo, "mtp", ()),
        Selection(repo, "mtp", (replace(target, name="u"),)),
        Selection(repo, "mtp", (replace(target, ranges=((10, 4), (14, 1))),)),
        Selection(repo, "mtp", (replace(target, header=b"headerr"),)),
        Selection(repo, "mtp", (replace(target, source=replace(FILE, etag="f" * 64)),)),
    ]
    assert len({first.id, *(o.id for o in others)}) == len(others) + 1
    assert first.size == 11


# --- values that are none: IEEE 754 for F16 and F32, BF16 as the upper half of F32, OCP 8-bit and microscaling formats ---

BAD = [
    ("F32", "0000807f"), ("F32", "000080ff"), ("F32", "0100c07f"), ("F16", "007c"), ("F16", "00fc"), ("F16", "017e"),
    ("BF16", "807f"), ("BF16", "80ff"), ("BF16", "c17f"), ("F8_E4M3", "7f"), ("F8_E4M3", "ff"), ("F8_E8M0", "ff"),
]  # fmt: skip
"""Infinities and NaNs, little endian; E4M3 has no infinities and one NaN of each sign, E8M0 one NaN and no sign."""
GOOD = [
    ("F32", "ffff7f7f"), ("F32", "ffff7fff"), ("F32", "01000000"), ("F16", "ff7b"), ("BF16", "7f7f"), ("BF16", "7fff"),
    ("F8_E4M3", "7e"), ("F8_E4M3", "fe"), ("F8_E4M3", "80"), ("F8_E8M0", "fe"), ("F8_E8M0", "7f"), ("F8_E8M0", "00"),
    ("U8", "ff"), ("I64", "ffffffffffffffff"), ("U32", "0000807f"),
]  # fmt: skip
"""The largest and the smallest values of each dtype, and dtypes of which every code is a number."""


def shard(path: Path, dtype: str, value: bytes, header: bytes = b"12345678{}") -> Target:
    data = bytes(4 * len(value)) + value + bytes(len(value))
    first = TensorInfo("first", "U8", (3,), 0, 500, 3)
    second = TensorInfo("second", dtype, (6,), 0, 503, len(data))
    path.write_bytes(header + b"\xff\xff\xff" + data)
    return Target(path.name, FILE, "", header, (first, second), ((500, 3 + len(data)),))


@pytest.mark.parametrize(("dtype", "code"), BAD)
def test_a_value_that_is_no_number_is_told_with_tensor_and_place_in_the_repos_file(
    tmp_path: Path, dtype: str, code: str
) -> None:
    value = bytes.fromhex(code)
    target = shard(tmp_path / "s", dtype, value)
    with pytest.raises(ValueFault) as found:
        scan(tmp_path / "s", target)
    assert str(found.value) == (
        f"model-1.safetensors: second: holds a value that is NaN or infinite, in bytes 503..{503 + 6 * len(value)}; "
        "the repo's file is damaged"
    )
    assert (found.value.file, found.value.tensor) == ("model-1.safetensors", "second")


@pytest.mark.parametrize(("dtype", "code"), GOOD)
def test_every_finite_value_passes(tmp_path: Path, dtype: str, code: str) -> None:
    scan(tmp_path / "s", shard(tmp_path / "s", dtype, bytes.fromhex(code)))


def test_a_large_tensor_is_looked_at_in_pieces_and_the_piece_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pull_part, "SCAN_BYTES", 8)
    target = shard(tmp_path / "s", "F32", bytes.fromhex("0000807f"))
    with pytest.raises(ValueFault, match=r"in bytes 519\.\.527;"):  # the fifth of six values, two in a piece
        scan(tmp_path / "s", target)


def test_a_shard_that_was_copied_whole_is_looked_at_where_its_own_header_ends(tmp_path: Path) -> None:
    path, nan = tmp_path / "s", bytes.fromhex("0000807f")
    path.write_bytes(b"h" * 12 + nan + bytes(4))
    info = TensorInfo("t", "F32", (2,), 0, 12, 8)
    with pytest.raises(ValueFault, match=r"t: holds a value that is NaN or infinite, in bytes 12\.\.20"):
        scan(path, Target("s", FILE, "", b"", (info,), ((0, 20),), whole=True))
    path.write_bytes(nan * 3 + bytes(8))  # such bytes in a header are none
    scan(path, Target("s", FILE, "", b"", (info,), ((0, 20),), whole=True))


# --- digests and journals ---


def test_a_file_has_its_digest_by_size_and_sha256_or_by_gits_id(tmp_path: Path) -> None:
    path, data = tmp_path / "f", b"some bytes"
    path.write_bytes(data)
    sha, git = hashlib.sha256(data).hexdigest(), hashlib.sha1(b"blob 10\0" + data).hexdigest()
    assert has_file_digest(path, RemoteFile("f", 10, sha, sha)) and has_file_digest(
        path, RemoteFile("f", 10, git, None)
    )
    assert not has_file_digest(path, RemoteFile("f", 11, sha, sha))
    assert not has_file_digest(path, RemoteFile("f", 10, sha, None)), "a sha256 is no id of git"
    assert not has_file_digest(path, RemoteFile("f", 10, git, git))
    path.write_bytes(b"Some bytes")
    assert not has_file_digest(path, RemoteFile("f", 10, sha, sha))
    assert not has_file_digest(tmp_path / "gone", RemoteFile("f", 10, sha, sha))
    (tmp_path / "link").symlink_to(path)
    path.write_bytes(data)
    assert not has_file_digest(tmp_path / "link", RemoteFile("f", 10, sha, sha))


GOOD_LINE = b'{"file": "a", "offset": 3}\n'


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        (b"", 0),
        (b'{"selection": "x"}\n', 1),
        (b'{"selection": "x"}\n' + GOOD_LINE, 2),
        (b'{"selection": "x"}\n' + GOOD_LINE + b'{"file": "a", "off', 2),  # torn by a crash
        (b'{"selection": "x"}', 0),
    ],
)
def test_the_journal_of_a_part_has_its_whole_lines(tmp_path: Path, text: bytes, lines: int) -> None:
    (tmp_path / "pull.jsonl").write_bytes(text)
    assert len(pull_part._journal(tmp_path)) == lines


@pytest.mark.parametrize(
    "line", [b"no json", b"[]", b"3", b'{"file": 3, "offset": 3}', b'{"file": "a", "offset": "3"}', b'{"file": "a"}']
)
def test_a_whole_line_of_another_kind_is_no_journal_of_this_program(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "pull.jsonl").write_bytes(b'{"selection": "x"}\n' + line + b"\n")
    with pytest.raises(OutputError) as found:
        pull_part._journal(tmp_path)
    assert str(found.value) == f"{tmp_path / 'pull.jsonl'}: is not a journal of this program; remove the folder"


def test_the_journal_of_whole_files_passes_over_what_is_not_its_own(tmp_path: Path) -> None:
    path = tmp_path / "pull.jsonl"
    path.write_bytes(
        b'{"file": "a", "etag": "e", "offset": 0}\nno json\n{"file": "a"}\n[]\n{"file": "b", "etag": "f", "offset": "x"}\n'
        b'{"file": "b", "etag": "f", "offset": 7}\n{"file": "c", "etag": "g", "offset": 1}'
    )
    assert pull_whole._journal(path) == [("a", "e", 0), ("b", "f", 7)]
    line = pull_whole._line(replace(FILE, name="ü"), 5)
    path.write_bytes(line)
    assert pull_whole._journal(path) == [("ü", "e" * 64, 5)], "what is written is read"
