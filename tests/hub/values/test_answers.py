"""One answer of the Hub: whether it is the range that was asked for, of the file that was listed (reference/hub.md, 1 to 4)."""

from __future__ import annotations

import gzip
import itertools
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds4convert.errors import EnvironmentFault
from ds4convert.hub import http
from ds4convert.hub.byte_ranges import _check_answer
from ds4convert.hub.http import Again, Told, bounded, normal_etag, pieces
from ds4convert.hub.records import RemoteFile, Repo
from ds4convert.hub.repo import NO_HUB

GIT, SHA, COMMIT = "a" * 40, "b" * 64, "c" * 40
FILE, REPO = RemoteFile("model.safetensors", 100, SHA, SHA), Repo("me/model", COMMIT, ())


@dataclass
class Answer:
    """What the code reads of an answer of the HTTP client."""

    body: list[bytes] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    status_code: int = 206

    def iter_raw(self) -> Iterator[bytes]:
        yield from self.body


def checked(start: int, size: int, told: Told | None = None, status: int = 206, **headers: str) -> None:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    _check_answer(REPO, FILE, Answer(headers=named, status_code=status), told or Told(), start, size)


@pytest.mark.parametrize(
    ("text", "meant"),
    [('"abc"', "abc"), ('W/"abc"', "abc"), ("abc", "abc"), (' "abc" ', "abc"), ("", ""), (None, ""), ('""', "")],
)
def test_an_etag_is_compared_without_quotes_and_the_mark_of_a_weak_one(text: str | None, meant: str) -> None:
    assert normal_etag(text) == meant


def test_the_range_that_was_asked_for_is_taken_whether_its_total_is_told_or_not() -> None:
    checked(10, 20, content_range="bytes 10-29/100")
    checked(10, 20, content_range="bytes 10-29/*")
    checked(0, 100, content_range="bytes 0-99/100")


@pytest.mark.parametrize(
    "found",
    ["bytes 10-28/100", "bytes 11-30/100", "bytes 10-29/101", "bytes 10-30/100", "bytes */100", "10-29/100", ""],
)
def test_another_range_or_a_file_of_another_size_is_asked_for_again(found: str) -> None:
    with pytest.raises(Again) as again:
        checked(10, 20, content_range=found)
    assert str(again.value) == f"the Hub sent {found}, expected bytes 10-29/100"


def test_a_whole_file_may_come_without_a_range_and_with_or_without_its_length() -> None:
    checked(0, 100, status=200)
    checked(0, 100, status=200, content_length="100")
    with pytest.raises(Again, match=r"^the Hub announced 99 bytes, expected 100$"):
        checked(0, 100, status=200, content_length="99")


@pytest.mark.parametrize(("start", "size", "status"), [(0, 99, 200), (1, 99, 200), (10, 20, 200), (0, 100, 203)])
def test_a_whole_file_in_place_of_a_part_is_an_ignored_range(start: int, size: int, status: int) -> None:
    with pytest.raises(Again) as again:
        checked(start, size, status=status, content_range=f"bytes {start}-{start + size - 1}/100")
    assert str(again.value) == f"the Hub ignored the byte range (HTTP {status})"


def test_an_answer_that_does_not_say_which_bytes_it_has_is_of_no_use() -> None:
    with pytest.raises(EnvironmentFault) as found:
        checked(10, 20)
    assert str(found.value) == (
        "me/model: model.safetensors: the answer lacks the header Content-Range, so which bytes came cannot be known. "
        + NO_HUB
    )


@pytest.mark.parametrize(
    "told",
    [Told(linked=SHA), Told(etag=SHA), Told(linked=SHA, etag="d" * 64), Told(etag="a-mirrors-own"), Told(etag="d" * 40),
     Told(commit=COMMIT)],
    ids=str,
)  # fmt: skip
def test_the_linked_etag_decides_and_one_of_another_length_tells_nothing(told: Told) -> None:
    checked(10, 20, told, content_range="bytes 10-29/100")


@pytest.mark.parametrize("told", [Told(linked="d" * 64, etag=SHA), Told(linked="d" * 40), Told(etag="d" * 64)], ids=str)
def test_another_file_than_the_one_listed_ends_the_run_at_once(told: Told) -> None:
    with pytest.raises(EnvironmentFault) as found:
        checked(10, 20, told, content_range="bytes 10-29/100")
    assert str(found.value) == (
        f"me/model: model.safetensors: the Hub serves another file than it listed (etag {told.linked or told.etag}, "
        f"expected {SHA}); it is being changed. Nothing of it was used. Run the command again, or name a revision"
    )


def test_another_commit_than_the_one_asked_for_ends_the_run_at_once() -> None:
    with pytest.raises(EnvironmentFault) as found:
        checked(10, 20, Told(commit="d" * 40), content_range="bytes 10-29/100")
    assert str(found.value) == (
        f"me/model: model.safetensors: the Hub serves commit {'d' * 40}, {COMMIT} was asked for. Nothing of it was "
        f"used. {NO_HUB}"
    )


def test_of_a_chain_of_answers_the_first_that_says_something_is_believed_and_a_plain_etag_of_the_deciding_one_alone() -> (
    None
):
    told = Told()
    http._note(told, {"etag": '"ignored"', "x-repo-commit": "one"}, decides=False)
    http._note(told, {"etag": '"first"', "x-linked-etag": '"linked"', "x-repo-commit": "two"}, decides=True)
    http._note(told, {"etag": '"second"', "x-linked-etag": '"other"'}, decides=True)
    assert (told.commit, told.linked, told.etag, len(told.headers)) == ("one", "linked", "first", 3)


@pytest.mark.parametrize(
    ("place", "leads_to"),
    [
        ("/api/x", "https://hub.example/api/x"),
        ("y", "https://hub.example/me/y"),
        ("https://cdn.example/z?sig=1", "https://cdn.example/z?sig=1"),
        ("//cdn.example/z", "https://cdn.example/z"),
        ("http://hub.example:8080/z", "http://hub.example:8080/z"),
    ],
)
def test_a_redirect_leads_where_rfc_3986_says(place: str, leads_to: str) -> None:
    assert http._joined("https://hub.example/me/model", place, "r") == leads_to


@pytest.mark.parametrize(
    "place", ["file:///etc/passwd", "ftp://x/y", "http://", "https://[", "http://x:0/", "http://x:99999/", "data:,x"]
)
def test_a_redirect_to_what_is_no_address_of_http_is_not_followed(place: str) -> None:
    with pytest.raises(EnvironmentFault) as found:
        http._joined("https://hub.example/me/model", place, "me/model")
    assert str(found.value) == (
        f"me/model: the Hub redirects to {place}, expected an address of http or https; is HF_ENDPOINT a Hub?"
    )


def test_another_host_gets_neither_token_nor_cookie_and_all_else() -> None:
    head = {"Authorization": "Bearer x", "COOKIE": "y", "User-Agent": "z", "range": "bytes=0-1"}
    assert http._without_token(head) == {"User-Agent": "z", "range": "bytes=0-1"}


# --- bodies ---


@given(st.lists(st.binary(max_size=20), max_size=6), st.integers(0, 60))
def test_a_body_is_taken_up_to_its_bound_and_refused_or_cut_beyond(parts: list[bytes], most: int) -> None:
    whole = b"".join(parts)
    assert bounded(Answer(parts), most, cut=True) == whole[:most]
    if len(whole) <= most:
        assert bounded(Answer(parts), most) == whole
    else:
        with pytest.raises(
            EnvironmentFault, match=f"the Hub's answer is longer than {most} bytes; is HF_ENDPOINT a Hub"
        ):
            bounded(Answer(parts), most)


@pytest.mark.parametrize("kind", ["gzip", "x-gzip", "deflate", " GZip "])
def test_a_body_that_a_proxy_packed_is_unpacked_and_the_bound_holds_for_what_comes_out(kind: str) -> None:
    text = b"0123456789" * 1000
    packed = zlib.compress(text) if "deflate" in kind else gzip.compress(text)
    answer = Answer([packed[:20], packed[20:]], {"content-encoding": kind})
    assert bounded(answer, len(text)) == text
    with pytest.raises(EnvironmentFault, match="longer than 9,999 bytes"):
        bounded(answer, len(text) - 1)


def test_a_small_answer_that_unpacks_to_a_flood_is_not_unpacked_whole() -> None:
    bomb = gzip.compress(bytes(50_000_000))
    assert len(bounded(Answer([bomb], {"content-encoding": "gzip"}), 1000, cut=True)) == 1000


def test_a_body_in_a_coding_that_is_not_unpacked_is_taken_as_it_is_and_a_broken_one_is_asked_for_again() -> None:
    assert bounded(Answer([b"raw"], {"content-encoding": "identity"}), 10) == b"raw"
    with pytest.raises(Again, match=r"^the bytes came packed, and broken$"):
        bounded(Answer([b"no gzip"], {"content-encoding": "gzip"}), 10)


class Clock:
    """Time that goes on when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_bytes_below_the_floor_for_half_a_minute_end_the_connection_and_a_faster_one_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock()
    monkeypatch.setattr(http.time, "monotonic", clock)

    def body(size: int, each_s: float, count: int) -> Iterator[bytes]:
        for _ in range(count):
            clock.now += each_s
            yield bytes(size)

    steady = Answer()
    steady.iter_raw = lambda: body(20_000, 10.0, 9)  # type: ignore[method-assign]  # the floor itself: 2,000 a second
    assert sum(map(len, pieces(steady))) == 180_000
    slow = Answer()
    slow.iter_raw = lambda: body(19_999, 10.0, 9)  # type: ignore[method-assign]
    came = []
    with pytest.raises(Again, match=r"^the bytes came at 2,000 a second$"):
        came.extend(map(len, pieces(slow)))
    assert came == [19_999] * 3, "given up after 30 s, not before"
    late = Answer()
    late.iter_raw = lambda: itertools.chain(body(100_000, 15.0, 2), body(1, 15.0, 2))  # type: ignore[method-assign]
    with pytest.raises(Again, match=r"^the bytes came at 0 a second$"):  # each half minute is looked at by itself
        list(pieces(late))
