"""What wrappers of byte sources do beside reading rightly: how often they ask, how much they keep, whom they close."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from ds4convert.errors import EnvironmentFault, HeaderError
from ds4convert.execution.prefetch import PrefetchWindow, Reads
from ds4convert.files import Disk
from ds4convert.storage.byte_source import Cached, Joined, Numbered, extents
from ds4convert.storage.digests import feed, git_id, sha256_file
from ds4convert.storage.local_files import LocalFiles, SourceChanged, joined
from ds4convert.storage.records import ByteRange

DATA = bytes(range(256)) * 40


class Watched(LocalFiles):
    """Files whose reads are counted; `sha256` is what somebody tells of them."""

    def __init__(self, folder: Path, sha256: str | None = None) -> None:
        super().__init__({"a": (folder, "a"), "b": (folder, "b")})
        self.asked: list[tuple[str, int, int]] = []
        self.sha256, self.closed = sha256, 0
        self.distrusted: list[str] = []

    def read(self, name: str, start: int, n: int) -> bytes:
        self.asked.append((name, start, n))
        return super().read(name, start, n)

    def digest(self, name: str) -> str | None:
        return self.sha256

    def fileno(self, name: str) -> None:  # type: ignore[override]
        return None

    def distrust(self, name: str) -> None:
        self.distrusted.append(name)

    def close(self) -> None:
        self.closed += 1
        super().close()


class FromElsewhere(Watched):
    """The same, read without descriptors, as a repo is."""

    def read_into(self, name: str, start: int, view: memoryview) -> None:
        self.asked.append((name, start, len(view)))
        view[:] = (self.places[name][0] / name).read_bytes()[start : start + len(view)]

    def read(self, name: str, start: int, n: int) -> bytes:
        whole = bytearray(n)
        self.read_into(name, start, memoryview(whole))
        return bytes(whole)

    def size(self, name: str) -> int:
        return (self.places[name][0] / name).stat().st_size


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(DATA)
    return tmp_path


def test_a_cache_asks_for_blocks_within_what_it_knows_and_never_beyond(folder: Path) -> None:
    source = FromElsewhere(folder)
    cached = Cached(source, {"a": [(100, 350), (350, 400)]}, block=100)
    for start in range(100, 350, 10):
        assert cached.read("a", start, 10) == DATA[start : start + 10]
    assert source.asked == [("a", 100, 100), ("a", 200, 100), ("a", 300, 50)]
    assert cached.read("a", 360, 40) == DATA[360:400] and source.asked[3:] == [("a", 350, 50)]
    assert cached.read("a", 340, 20) == DATA[340:360], "a read over the border of two is one of its own"
    assert source.asked[4:] == [("a", 340, 20)]


def test_a_cache_keeps_the_last_reads_and_no_more_than_it_may(folder: Path) -> None:
    source = FromElsewhere(folder)
    cached = Cached(source, most=100)
    for start in (0, 40, 0, 80, 0, 40):
        assert cached.read("a", start, 40) == DATA[start : start + 40]
    assert source.asked == [("a", 0, 40), ("a", 40, 40), ("a", 80, 40), ("a", 40, 40)], "the first was used all along"
    assert cached.read("b", 0, 500) == DATA[:500] and cached.read("b", 0, 500) == DATA[:500]
    assert source.asked[4:] == [("b", 0, 500)] * 2, "what is larger than all that may be kept is not"


def test_distrusted_bytes_are_asked_for_again(folder: Path) -> None:
    source = FromElsewhere(folder)
    cached = Cached(source)
    cached.read("a", 0, 10)
    cached.read("b", 0, 10)
    cached.distrust("a")
    cached.read("a", 0, 10)
    cached.read("b", 0, 10)
    assert source.asked == [("a", 0, 10), ("b", 0, 10), ("a", 0, 10)] and source.distrusted == ["a"]


def test_joined_sources_are_each_asked_for_their_files_and_closed_once(folder: Path) -> None:
    first, second = FromElsewhere(folder), FromElsewhere(folder)
    both = Joined({"a": first, "b": second})
    assert both.read("a", 1, 3) == both.read("b", 1, 3) == DATA[1:4]
    assert first.asked == [("a", 1, 3)] and second.asked == [("b", 1, 3)]
    with pytest.raises(HeaderError, match="c: the file is missing"):
        both.read("c", 0, 1)
    Joined({"a": first, "b": first}).close()
    assert (first.closed, second.closed) == (1, 0)


def test_local_files_joined_under_other_names_are_told_by_these(folder: Path) -> None:
    files = LocalFiles.of(folder, ["a", "b"])
    made = joined((files, {"mtp/x": "a"}), (files, {"b": "b"}))
    assert isinstance(made, LocalFiles) and made.read("mtp/x", 0, 5) == DATA[:5]
    (folder / "a").write_bytes(DATA[:100])
    with pytest.raises(SourceChanged, match="mtp/x: was changed") as caught:
        made.check("mtp/x")
    assert caught.value.name == "mtp/x"
    with pytest.raises(HeaderError, match="mtp/x: ends before byte 200"):
        made.read("mtp/x", 0, 200)


def test_numbered_reads_are_of_the_files_in_their_order(folder: Path) -> None:
    source = FromElsewhere(folder)
    reads = Numbered(source, ["b", "a"])
    assert reads.read(ByteRange(1, 5, 7)) == DATA[5:12] and reads.get(ByteRange(0, 5, 7), 2, 3) == DATA[7:10]
    assert source.asked == [("a", 5, 7), ("b", 7, 3)]
    found = extents([ByteRange(0, 5, 7), ByteRange(0, 0, 5), ByteRange(1, 1, 1), ByteRange(0, 5, 7)], ["b", "a"])
    assert found == {"b": [(0, 5), (5, 12)], "a": [(1, 2)]}


def test_a_window_reads_what_it_was_told_of_once_and_checks_whole_files(folder: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    source = FromElsewhere(folder, hashlib.sha256(DATA).hexdigest())
    window = PrefetchWindow(source, state, 1 << 20, 2, Disk())
    window.begin({"a": Reads(8, [(8, 4000, 0), (4000, len(DATA), 1)])})
    assert window.read("a", 8, 1000) == DATA[8:1008] and window.read("a", 5000, 10) == DATA[5000:5010]
    window.done(0)
    window.done(1)
    window.finish()
    assert not list((state / "window").iterdir()), "what no step will read again is gone"
    assert sum(n for name, start, n in source.asked if start >= 8) == len(DATA) - 8
    window.close()
    assert source.closed == 1 and not (state / "window").exists()
    size, mark = source.fingerprint("a")
    assert window.fingerprint("a") == (size, mark * 1000)


def test_a_window_refuses_a_whole_file_with_another_digest_and_its_fingerprint_changes(
    folder: Path, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    state.mkdir()
    source = FromElsewhere(folder, hashlib.sha256(b"another").hexdigest())
    window = PrefetchWindow(source, state, 1 << 20, 1, Disk())
    before = window.fingerprint("a")
    window.begin({"a": Reads(0, [(0, len(DATA), 0)])})
    with pytest.raises(Exception, match=r"a: the bytes that came have not the sha256"):
        window.finish()
    assert source.distrusted == ["a"]
    window.close()
    assert PrefetchWindow(source, state, 1 << 20, 1, Disk()).fingerprint("a") != before


@pytest.mark.parametrize("came", ["the same", "others"])
def test_bytes_fetched_by_themselves_while_their_piece_was_taken_into_the_digest_are_compared(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, came: str
) -> None:
    state = tmp_path / "state"
    state.mkdir()
    source = FromElsewhere(folder, hashlib.sha256(DATA).hexdigest())
    window = PrefetchWindow(source, state, 1 << 20, 1, Disk())
    window.begin({"a": Reads(0, [(0, len(DATA), 0)])})
    window.finish()  # the whole file has passed, and its digest is right
    monkeypatch.setattr(window, "_from", lambda *_: False)  # as it is for a reader that looked before the piece came
    if came == "the same":
        assert window.read("a", 10, 100) == DATA[10:110]
    else:
        (folder / "a").write_bytes(bytes(len(DATA)))
        with pytest.raises(EnvironmentFault, match="have not the sha256"):
            window.read("a", 10, 100)
    window.close()
    assert ("a" in json.loads((state / "shards.json").read_bytes())["checked"]) == (came == "the same")


def test_steps_that_are_done_are_not_fetched(folder: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    source = FromElsewhere(folder)
    window = PrefetchWindow(source, state, 1 << 20, 1, Disk())
    window.begin({"a": Reads(0, [(0, 100, 0)]), "b": Reads(0, [(0, 100, 1)])}, done=[0])
    assert window.read("b", 0, 100) == DATA[:100]
    window.close()
    assert {name for name, _, _ in source.asked} == {"b"}


def test_digests_are_fed_any_range_once_and_told_how_far_they_are(folder: Path) -> None:
    whole, part, counted = hashlib.sha256(), hashlib.sha1(), [0]
    files = LocalFiles.of(folder, ["a"])
    feed(files, "a", whole, progress=lambda n: counted.append(n))
    feed(files, "a", part, start=100, size=50)
    feed(files, "a", part, start=150, size=0)
    files.close()
    assert whole.hexdigest() == hashlib.sha256(DATA).hexdigest() == sha256_file(folder, "a")
    assert part.hexdigest() == hashlib.sha1(DATA[100:150]).hexdigest() and sum(counted) == len(DATA)
    with pytest.raises(HeaderError, match="a: ends before byte"):
        feed(files, "a", hashlib.sha256(), start=len(DATA), size=1)
    files.close()


def test_the_id_of_git_is_that_of_git() -> None:
    """Source: Pro Git, "Git Internals - Git Objects": the id of `what is up, doc?`."""
    assert git_id(b"what is up, doc?") == "bd9dbf5aae1a3862dd1526723246b20206e5fc37"
