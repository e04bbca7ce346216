"""How long servers are waited for: the headers that ask for it, and how waits grow until an operation is given up."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds4convert.storage import patience
from ds4convert.storage.patience import Patience, asked_wait


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, 0), ({"retry-after": ""}, 0), ({"retry-after": "7"}, 7), ({"retry-after": " 7 "}, 7),
        ({"retry-after": "0"}, 0), ({"retry-after": "-5"}, 0), ({"retry-after": "1.5"}, 0), ({"retry-after": "soon"}, 0),
        ({"retry-after": "1234567"}, 123_456),  # six digits are more than anyone is waited for
        ({"retry-after": "\u0664"}, 4), ({"retry-after": "\u00b2"}, 0),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),  # RFC 9110, 10.2.3: the example; long past
        ({"ratelimit": '"api";r=0;t=55'}, 56), ({"ratelimit": '"api";r=0; t=1'}, 2), ({"ratelimit": '"api"; r=0 ;t=9'}, 10),
        ({"ratelimit": '"api";r=3;t=55'}, 0), ({"ratelimit": '"api";r=10;t=55'}, 0), ({"ratelimit": '"api";ar=0x;t=55'}, 0),
        ({"ratelimit": '"api";r=0;t=55', "retry-after": "7"}, 56), ({"ratelimit": '"api";r=3;t=5', "retry-after": "7"}, 7),
    ],
)  # fmt: skip
def test_an_answer_asks_to_wait_by_its_rate_limit_or_else_by_a_number_or_a_date(
    headers: dict[str, str], seconds: float
) -> None:
    """Sources: RFC 9110, 10.2.3 (Retry-After); draft-ietf-httpapi-ratelimit-headers (`r` left, `t` until reset)."""
    assert asked_wait(headers) == seconds


def test_a_date_is_waited_for_from_now_on_and_one_without_a_zone_is_in_utc() -> None:
    moment = datetime.now(UTC) + timedelta(seconds=100)
    assert 95 < asked_wait({"retry-after": format_datetime(moment, usegmt=True)}) <= 100
    told = format_datetime(moment).replace("+0000", "-0000")  # RFC 5322, 3.3: no information about the zone
    assert 95 < asked_wait({"retry-after": told}) <= 100
    later = moment.strftime("%a, %d %b %Y %H:%M:%S +0100")
    assert asked_wait({"retry-after": later}) == 0, "an hour ago in UTC"


def test_waits_double_up_to_a_limit_and_the_last_failure_ends_it() -> None:
    own = Patience(tries=12, first_s=0.1)
    assert [own.wait() for _ in range(12)] == pytest.approx(
        [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30, 30, 30, None], nan_ok=True
    )
    assert own.failed == 12 and own.wait() is None


def test_six_failures_in_a_row_are_the_usual_end() -> None:
    own = Patience()
    assert [own.wait() is None for _ in range(6)] == [False] * 5 + [True]


def test_progress_forgets_earlier_failures() -> None:
    own = Patience(tries=2)
    for _ in range(5):
        assert own.wait() == pytest.approx(0.2)
        own.progress()
    assert own.failed == 0


@pytest.mark.parametrize(("asked", "waited"), [(0.1, 0.2), (7.0, 7.0), (330.0, 330.0), (330.1, None)])
def test_a_server_is_waited_for_as_it_asks_unless_it_asks_for_too_long(asked: float, waited: float | None) -> None:
    assert Patience().wait(asked) == (None if waited is None else pytest.approx(waited))


@given(st.integers(1, 20), st.floats(0, 330))
def test_no_operation_goes_on_for_ever_and_no_wait_is_shorter_than_asked(tries: int, asked: float) -> None:
    own, waits = Patience(tries), []
    while (seconds := own.wait(asked)) is not None:
        waits.append(seconds)
    assert len(waits) == tries - 1 and all(max(asked, 0.2) <= w <= max(asked, 30.0) for w in waits)


def test_trying_again_sleeps_as_long_and_says_whether_to(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(patience.time, "sleep", slept.append)
    own = Patience(tries=3)
    assert [own.again(), own.again(5.0), own.again()] == [True, True, False]
    assert slept == pytest.approx([0.2, 5.0])


@pytest.mark.parametrize("code", [408, 409, 412, 425, 429, 500, 502, 503, 504])
def test_answers_that_may_be_better_next_time_are_known(code: int) -> None:
    assert code in patience.TRANSIENT


@pytest.mark.parametrize("code", [200, 206, 301, 400, 401, 403, 404, 410, 416, 501])
def test_answers_that_stay_as_they_are_are_not_asked_for_again(code: int) -> None:
    assert code not in patience.TRANSIENT
