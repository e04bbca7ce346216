"""Files elsewhere as a byte source: what is at hand costs no request, what is not is fetched, and nothing beyond the end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds4convert.errors import Ds4Error, HeaderError, InputError
from ds4convert.hub.records import ListedFiles, RemoteFile

DATA = bytes(range(100))


class Elsewhere(ListedFiles):
    """A file of 100 bytes, of which the first ones are at hand."""

    def __init__(self, known: int) -> None:
        super().__init__([RemoteFile("a", 100, "e" * 64, "e" * 64), RemoteFile("b", 3, "f" * 40, None)])
        self.known = known
        self.asked: list[tuple[int, int]] = []

    def _missing(self, name: str) -> Ds4Error:
        return InputError(f"no {name}")

    def _at_hand(self, file: RemoteFile, end: int) -> bytes | None:
        return DATA[: self.known] if end <= self.known else None

    def _fetched(self, file: RemoteFile, start: int, n: int) -> Iterator[bytes]:
        self.asked.append((start, n))
        yield from (DATA[at : at + 1] for at in range(start, start + n))


@given(st.integers(0, 100), st.integers(0, 110), st.integers(0, 110))
def test_any_range_within_the_file_is_read_and_any_other_is_refused_with_where_it_would_end(
    known: int, start: int, n: int
) -> None:
    files = Elsewhere(known)
    if start + n > 100:
        with pytest.raises(HeaderError, match=f"^a: ends before byte {start + n};"):
            files.read("a", start, n)
        assert not files.asked
        return
    assert files.read("a", start, n) == DATA[start : start + n]
    assert files.asked == ([] if n == 0 or start + n <= known else [(start, n)])
    view = bytearray(n)
    files.read_into("a", start, memoryview(view))
    assert bytes(view) == DATA[start : start + n]


def test_size_and_digest_are_those_of_the_list_and_a_file_that_it_lacks_is_told_by_the_kind() -> None:
    files = Elsewhere(0)
    assert (files.size("a"), files.size("b")) == (100, 3)
    assert (files.digest("a"), files.digest("b")) == ("e" * 64, None)
    for ask in (files.size, files.digest, files.fingerprint, lambda name: files.read(name, 0, 1)):
        with pytest.raises(InputError, match=r"^no c$"):
            ask("c")


def test_a_fingerprint_changes_with_the_size_and_with_the_etag_alone() -> None:
    def of(size: int, etag: str) -> tuple[int, int]:
        files = Elsewhere(0)
        files._files = {"a": RemoteFile("a", size, etag, None)}
        return files.fingerprint("a")

    assert of(1, "x") == of(1, "x") and of(1, "x")[0] == 1
    assert len({of(1, "x"), of(2, "x"), of(1, "y"), of(1, "X")}) == 4
    assert 0 <= of(1, "x")[1] < 16**12, "a number that JSON holds exactly"
