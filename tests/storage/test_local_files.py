"""Files here that are read for hours: how many stay open, which changes are noticed, and what is said of each."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds4convert.errors import EnvironmentFault, HeaderError
from ds4convert.storage import local_files
from ds4convert.storage.byte_source import ByteSource, Cached, Joined, Wrapped, are_here, fill
from ds4convert.storage.local_files import LocalFiles, Look, SourceChanged, joined

NAMES = tuple(f"f{n}" for n in range(6))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in NAMES:
        (tmp_path / name).write_bytes(name.encode() * 100)
    return tmp_path


@pytest.fixture
def files(folder: Path) -> Iterator[LocalFiles]:
    made = LocalFiles({n: (folder, n) for n in NAMES}, most=2)
    yield made
    made.close()


def test_files_stay_open_up_to_a_number_and_those_used_last_are_kept(files: LocalFiles) -> None:
    for name in ("f0", "f1", "f0", "f2"):
        files.read(name, 0, 1)
    assert list(files._fds) == ["f0", "f2"], "f1 was used longest ago"
    files.size("f0")
    files.read("f3", 0, 1)
    assert list(files._fds) == ["f0", "f3"]


def test_files_that_are_being_read_do_not_count_as_idle(files: LocalFiles) -> None:
    with files.fileno("f0") as a, files.fileno("f1") as b, files.fileno("f2") as c:
        assert len({a, b, c}) == 3 and set(files._fds) == {"f0", "f1", "f2"}
        assert os.pread(a, 2, 0) == b"f0" and os.pread(c, 2, 0) == b"f2"
    files.read("f3", 0, 1)
    assert list(files._fds) == ["f2", "f3"]


def test_a_file_that_is_closed_while_it_is_read_stays_open_for_its_readers(files: LocalFiles) -> None:
    with files.fileno("f0") as first:
        with files.fileno("f0") as again:
            assert again == first
            files.close()
        assert os.pread(first, 2, 0) == b"f0", "one reader is left"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(first)


def looked(path: Path, ns: int) -> None:
    os.utime(path, ns=(ns, ns))


SECOND = 10**9
TIMES = [
    (1_000_000_123, 1_000_000_123, True),
    (1_000_000_123, 1_000_000_100, True),  # NTFS and SMB: 100 ns
    (1_000_000_123, 1_000_000_200, True),
    (1_000_000_100, 1_000_000_200, False),  # the first was rounded already
    (1_000_012_345, 1_000_012_000, True),  # NFS: a microsecond
    (7 * SECOND + 123_456_789, 7 * SECOND + 120_000_000, True),  # exFAT: 10 ms
    (7 * SECOND + 123_456_789, 7 * SECOND, True),  # HFS+: a second
    (7 * SECOND + 123_456_789, 6 * SECOND, True),  # FAT32: two seconds
    (7 * SECOND + 123_456_789, 8 * SECOND, True),
    (7 * SECOND + 123_456_789, 4 * SECOND, False),
    (7 * SECOND + 123_456_789, 5 * SECOND, False),
    (7 * SECOND + 123_456_789, 9 * SECOND, False),
    (7 * SECOND, 8 * SECOND, True),  # to two seconds
    (8 * SECOND, 6 * SECOND, False),
    (7 * SECOND + 123_456_789, 7 * SECOND + 123_456_788, False),
]  # fmt: skip


@pytest.mark.parametrize(("first", "now", "same"), TIMES)
def test_a_time_that_a_drive_has_rounded_is_the_same_and_any_other_is_a_change(
    first: int, now: int, same: bool
) -> None:
    assert local_files._same_time(first, now) == same


@given(st.integers(0, 2**61), st.sampled_from([100, 1000, 10**6, 10**7, 10**9, 2 * 10**9]))
def test_any_time_rounded_down_or_up_to_a_drives_grain_is_the_same(ns: int, grain: int) -> None:
    down = ns - ns % grain
    assert local_files._same_time(ns, down) and (ns == down or local_files._same_time(ns, down + grain))


@pytest.mark.parametrize(
    ("change", "how"),
    [
        (lambda p: p.write_bytes(b"x" * 201), "201 bytes, 200 before"),
        (lambda p: looked(p, 123_456_789), "it has another modification time"),
        (lambda p: p.unlink(), "No such file or directory"),
    ],
)
def test_a_change_under_a_reader_is_told_with_what_was_seen(
    files: LocalFiles, folder: Path, change: object, how: str
) -> None:
    files.read("f0", 0, 1)
    files.check("f0")
    change(folder / "f0")  # type: ignore[operator]
    with pytest.raises(SourceChanged, match=re.escape(how)):
        files.check("f0")


def test_another_file_under_the_same_name_size_and_time_is_noticed(files: LocalFiles, folder: Path) -> None:
    stat = (folder / "f0").stat()
    files.read("f0", 0, 1)
    (folder / "new").write_bytes(b"zz" * 100)
    looked(folder / "new", stat.st_mtime_ns)
    (folder / "new").replace(folder / "f0")
    with pytest.raises(SourceChanged, match="another file has its name"):
        files.check("f0")


def test_a_file_that_was_never_read_or_is_read_anew_has_not_changed(files: LocalFiles, folder: Path) -> None:
    (folder / "f0").write_bytes(b"other")
    files.check("f0")
    assert files.size("f0") == 5
    (folder / "f0").write_bytes(b"once more")
    files.close()
    files.check("f0")
    assert files.read("f0", 0, 9) == b"once more"


def test_a_file_that_was_closed_for_others_and_changed_meanwhile_is_not_read_on(
    files: LocalFiles, folder: Path
) -> None:
    files.read("f0", 0, 1)
    files.read("f1", 0, 1)
    files.read("f2", 0, 1)
    (folder / "f0").write_bytes(b"x")
    opened = len([*Path("/dev/fd").iterdir()])
    with pytest.raises(SourceChanged, match=r"\(1 bytes, 200 before\)"):
        files.read("f0", 0, 1)
    assert len([*Path("/dev/fd").iterdir()]) < opened, "the changed file is closed again, and one was closed for it"


def test_the_change_says_what_to_do_and_passes_between_processes() -> None:
    error = SourceChanged("a", "how")
    error.concerns("a", None)
    again = pickle.loads(pickle.dumps(error))
    assert (
        str(again)
        == str(error)
        == (
            "a: was changed while it was read (how), so the run stopped. When nothing writes to it any more, run the same "
            "command again: what came from this file is made anew, all else that is finished stays"
        )
    )
    assert (again.name, again.how, again.file, again.exit_code) == ("a", "how", "a", 4)


@pytest.mark.parametrize("way", ["read", "into"])
@pytest.mark.parametrize(("number", "advice"), [(5, "; the disk itself failed: check its cable"), (4, "")])
def test_a_read_that_fails_names_file_and_range(
    files: LocalFiles, monkeypatch: pytest.MonkeyPatch, way: str, number: int, advice: str
) -> None:
    def failing(*_: object) -> bytes:
        raise OSError(number, "broken")

    monkeypatch.setattr(os, "pread", failing)
    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(EnvironmentFault) as caught:
        files.read("f0", 7, 3) if way == "read" else files.read_into("f0", 7, memoryview(bytearray(3)))
    told = str(caught.value)
    assert told.startswith(f"f0: bytes 7..10 cannot be read: broken{advice}") and (advice or told.endswith("broken"))


def test_a_name_that_is_not_listed_is_missing_even_if_there_is_such_a_file(folder: Path) -> None:
    files = LocalFiles.of(folder, ["f0"])
    for ask in (files.size, files.folder, files.fingerprint):
        with pytest.raises(HeaderError, match=r"^f1: the file is missing; download it again$"):
            ask("f1")
    files.close()


def test_a_look_is_what_the_system_says(folder: Path) -> None:
    status = (folder / "f0").stat()
    files = LocalFiles.at(folder / "f0")
    assert files.look("f0") == Look(200, status.st_mtime_ns, status.st_dev, status.st_ino)
    assert files.fingerprint("f0") == (200, status.st_mtime_ns) and files.folder("f0") == folder
    files.close()


class Elsewhere(ByteSource):
    """A file that is not on this machine, all of what is usual left as it is."""

    def size(self, name: str) -> int:
        return 3_000_000

    def read_into(self, name: str, start: int, view: memoryview) -> None:
        view[:] = bytes((start + n) % 251 for n in range(len(view)))

    def fingerprint(self, name: str) -> tuple[int, int]:
        return 3_000_000, 1


def test_a_source_needs_no_more_than_to_fill_a_view() -> None:
    far = Elsewhere()
    pieces = list(far.pieces("x", 5, (1 << 20) + 7))
    assert [len(p) for p in pieces] == [1 << 20, 7] and b"".join(pieces)[-1] == (5 + (1 << 20) + 6) % 251
    assert far.read("x", 5, (1 << 20) + 7) == b"".join(pieces)
    assert far.read("x", 9, 4) == bytes([9, 10, 11, 12]) and list(far.pieces("x", 5, 0)) == []
    assert (far.digest("x"), far.fileno("x"), far.folder("x")) == (None, None, None)
    assert [far.check("x"), far.distrust("x"), far.close()] == [None] * 3


def test_files_are_here_where_all_of_them_have_descriptors(files: LocalFiles) -> None:
    both = Joined({"f0": files, "x": Elsewhere()})
    assert are_here(both, ["f0"]) and not are_here(both, ["f0", "x"]) and are_here(both, [])


def test_wrappers_hand_on_what_they_do_not_do_themselves(files: LocalFiles, folder: Path) -> None:
    for outer in (Wrapped(files), Cached(files), Joined({"f0": files})):
        assert outer.size("f0") == 200 and outer.fingerprint("f0") == files.fingerprint("f0")
        assert outer.folder("f0") == folder and outer.digest("f0") is None
        descriptor = outer.fileno("f0")
        assert descriptor is not None
        with descriptor as fd:
            assert os.fstat(fd).st_size == 200
        view = bytearray(4)
        outer.read_into("f0", 1, memoryview(view))
        assert bytes(view) == b"0f0f" and b"".join(outer.pieces("f0", 0, 3)) == b"f0f"
    (folder / "f0").write_bytes(b"x")
    for outer in (Wrapped(files), Cached(files), Joined({"f0": files})):
        with pytest.raises(SourceChanged):
            outer.check("f0")


def test_parts_that_are_elsewhere_keep_their_names_beside_files_here(files: LocalFiles) -> None:
    far = Elsewhere()
    both = joined((files, {"new": "f1"}), (far, {"x": "x"}))
    assert both.read("new", 0, 4) == b"f1f1" and both.read("x", 3, 1) == b"\x03"
    with pytest.raises(HeaderError, match="f1: the file is missing"):
        both.size("f1")
    both.close()


def test_a_view_is_filled_by_pieces_of_any_size_or_the_end_is_told() -> None:
    view = bytearray(5)
    fill(memoryview(view), "a", 10, [b"ab", b"", b"cde"])
    assert view == b"abcde"
    with pytest.raises(HeaderError, match=r"^a: ends before byte 15; the file is being changed, or is truncated$"):
        fill(memoryview(view), "a", 10, [b"abcd"])
