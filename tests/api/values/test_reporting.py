"""How a function tells its caller how far it is, and the shape of every document."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds4convert import errors
from ds4convert.api import reporting
from ds4convert.api.reporting import NEXT, Failure, Listener, Message, Progress, document, linear


def test_a_document_begins_with_its_version_and_is_a_copy() -> None:
    facts = {"b": [{"c": [1]}], "a": {"d": {}}}
    made = document(facts)
    assert list(made) == ["schema", "b", "a"] and made["schema"] == 2
    made["b"][0]["c"].append(2)
    made["a"]["d"]["x"] = 1
    assert facts == {"b": [{"c": [1]}], "a": {"d": {}}}


KINDS = sorted({e.kind for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.Ds4Error)})


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_error_has_a_way_on(kind: str) -> None:
    told = Failure(3, kind, "m").as_json()
    assert told == {
        "schema": 2,
        "error": {"code": 3, "kind": kind, "message": "m", "file": None, "tensor": None, "hint": NEXT[kind]},
    }
    assert Failure(3, kind, "m", hint="my own").as_json()["error"]["hint"] == "my own"


def test_what_an_error_knows_is_told() -> None:
    error = errors.ValueFault("bad", file="f", tensor="t", hint="mend it")
    assert Failure.of(error) == Failure(3, "value", "bad; mend it", "f", "t", "mend it")
    assert Failure.of(errors.EnvironmentFault("x")).code == 4 and Failure.of(errors.UsageError("x")).code == 2


def test_messages_have_their_kind_and_a_warning_says_that_it_is_one() -> None:
    heard: list[Message] = []
    listener = Listener(say=heard.append)
    listener.detail("a")
    listener.note("b")
    listener.warn("c")
    assert heard == [Message("detail", "a"), Message("note", "b"), Message("warning", "c")]
    assert [str(m) for m in heard] == ["a", "b", "Warning: c"]
    Listener().warn("to nobody")


def test_progress_begins_at_nothing_sums_what_is_counted_and_ends_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(reporting.time, "monotonic", lambda: now[0])
    heard: list[Progress] = []
    with Listener(heard.append).counting("copying", 1000) as count:
        now[0] = 100.5
        count(100)
        now[0] = 102.0
        count(100)
    assert heard == [
        Progress("copying", 0, 1000),
        Progress("copying", 100, 1000),  # after half a second nothing is foretold
        Progress("copying", 200, 1000, 8.0),  # 200 in 2 s, so 800 in 8
        Progress("copying", 1000, 1000, 0.0, True),
    ]


def test_more_than_was_foretold_is_told_and_who_does_not_listen_is_not_told() -> None:
    heard: list[Progress] = []
    with Listener(heard.append).counting("x", 10) as count:
        count(15)
    assert (heard[-1].done, heard[-1].total) == (15, 10)
    with Listener().counting("x", 10) as count:
        count(3)


def test_who_knows_the_time_left_is_asked_and_an_error_leaves_the_last_report_out() -> None:
    heard: list[Progress] = []
    with pytest.raises(ValueError), Listener(heard.append).counting("x", 10, lambda done, seconds: done + 0.5) as count:
        count(4)
        raise ValueError
    assert [(p.done, p.seconds_left, p.finished) for p in heard] == [(0, 0.5, False), (4, 4.5, False)]


@given(st.integers(1, 10**12), st.integers(0, 10**12), st.floats(0, 10**6))
def test_the_rest_is_taken_to_go_as_fast_as_what_is_done(total: int, done: int, seconds: float) -> None:
    found = linear(total)(done, seconds)
    if not done or seconds < 1:
        assert found is None
    elif done >= total:
        assert found == 0.0
    else:
        assert found == pytest.approx(seconds / done * (total - done))
