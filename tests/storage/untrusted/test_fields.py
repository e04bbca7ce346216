"""Typed fields of a document: what each getter takes and refuses, and the sentence with which it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds4convert.errors import InputError
from ds4convert.storage.untrusted.fields import Fields, is_count, is_number

DOCUMENT: dict[str, Any] = {
    "text": "t", "empty": "", "zero": 0, "one": 1, "half": 0.5, "minus": -1, "yes": True, "no": False, "null": None,
    "object": {"a": {"b": "x"}, "n": 2}, "list": ["a", "b"], "numbers": [0, 1.5, -2], "counts": [0, 7],
    "objects": [{"n": 1}, {"n": "x"}], "none": [],
}  # fmt: skip
FIELDS = Fields.of(DOCUMENT, "d.json", "convert again")
Getter = Callable[[Fields, str], Any]
GETTERS: dict[str, tuple[Getter, str, set[str]]] = {
    "text": (Fields.text, "a text", {"text", "empty"}),
    "count": (Fields.count, "an integer >= 0", {"zero", "one"}),
    "number": (Fields.number, "a number", {"zero", "one", "half", "minus"}),
    "flag": (Fields.flag, "true or false", {"yes", "no"}),
    "object": (Fields.object, "an object", {"object"}),
    "list": (Fields.objects, "a list", {"list", "numbers", "counts", "objects", "none"}),
}
"""By getter: what it is called in messages, and the keys of the document that it takes (lists: as lists)."""


def refusal(get: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        get()
    return str(caught.value)


@pytest.mark.parametrize("key", [*DOCUMENT, "absent"])
@pytest.mark.parametrize("name", GETTERS)
def test_a_getter_takes_values_of_its_own_kind_alone(name: str, key: str) -> None:
    get, expected, takes = GETTERS[name]
    if key in takes:
        if name not in {"object", "list"}:
            found = get(FIELDS, key)
            assert found == DOCUMENT[key] and type(found) is type(DOCUMENT[key])
        return
    told = refusal(lambda: get(FIELDS, key))
    assert told.startswith(f"d.json: {key}: expected {expected}, found ") and told.endswith("; convert again")


@pytest.mark.parametrize(
    ("get", "told"),
    [
        (lambda f: f.text("absent"), "d.json: absent: expected a text, found nothing; convert again"),
        (lambda f: f.text("null"), "d.json: null: expected a text, found null; convert again"),
        (lambda f: f.count("yes"), "d.json: yes: expected an integer >= 0, found true; convert again"),
        (lambda f: f.count("minus"), "d.json: minus: expected an integer >= 0, found -1; convert again"),
        (lambda f: f.object("object").object("a").count("b"),
         'd.json: object.a.b: expected an integer >= 0, found "x"; convert again'),
        (lambda f: f.objects("list"), 'd.json: list[0]: expected an object, found "a"; convert again'),
        (lambda f: [x.count("n") for x in f.objects("objects")],
         'd.json: objects[1].n: expected an integer >= 0, found "x"; convert again'),
        (lambda f: f.texts("counts"), "d.json: counts[0]: expected a text, found 0; convert again"),
        (lambda f: f.counts("numbers"), "d.json: numbers[1]: expected an integer >= 0, found 1.5; convert again"),
        (lambda f: f.numbers("list"), 'd.json: list[0]: expected a number, found "a"; convert again'),
        (lambda f: f.text_by_name("object"), 'd.json: object.a: expected a text, found {"b": "x"}; convert again'),
        (lambda f: f.scalar_by_name("object"),
         'd.json: object.a: expected a text or an integer, found {"b": "x"}; convert again'),
        (lambda f: Fields.of([1], "d.json"), "d.json: expected an object, found [1]"),
        (lambda f: Fields.of(None, "d.json", "do that"), "d.json: expected an object, found null; do that"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named_by_its_path(get: Callable[[Fields], object], told: str) -> None:
    assert refusal(lambda: get(FIELDS)) == told


def test_lists_and_tables_are_returned_as_they_stand() -> None:
    assert FIELDS.texts("list") == ("a", "b") and FIELDS.counts("counts") == (0, 7)
    assert FIELDS.numbers("numbers") == (0, 1.5, -2) and FIELDS.texts("none") == () == FIELDS.counts("none")
    assert FIELDS.objects("none") == [] and [f.values for f in FIELDS.objects("objects")] == DOCUMENT["objects"]
    inner = Fields.of({"t": {"a": "x"}, "s": {"a": "x", "n": -3}}, "d")
    assert inner.text_by_name("t") == {"a": "x"} and inner.scalar_by_name("s") == {"a": "x", "n": -3}


@pytest.mark.parametrize("value", [True, False, 1.5, None, []])
def test_a_scalar_is_a_text_or_an_integer_and_no_truth_value(value: object) -> None:
    assert "t.a: expected a text or an integer" in refusal(
        lambda: Fields.of({"t": {"a": value}}, "d").scalar_by_name("t")
    )


def test_null_and_absence_are_allowed_apart() -> None:
    assert FIELDS.null_or("null", FIELDS.text) is None and FIELDS.null_or("text", FIELDS.text) == "t"
    assert FIELDS.absent_or("absent", FIELDS.text) is None and FIELDS.absent_or("zero", FIELDS.count) == 0
    assert "absent: expected a text, found nothing" in refusal(lambda: FIELDS.null_or("absent", FIELDS.text))
    assert "null: expected a text, found null" in refusal(lambda: FIELDS.absent_or("null", FIELDS.text))
    assert FIELDS.has("null") and not FIELDS.has("absent")


def test_a_number_stays_an_integer_so_that_it_is_written_back_as_it_was() -> None:
    assert type(FIELDS.number("one")) is int and type(FIELDS.number("half")) is float


def test_what_was_found_is_cut_and_harmless() -> None:
    """60 characters of JSON, quote included."""
    bad = Fields.of({"long": "x" * 200, "even": "y" * 58, "evil": "\x1b[2J\u202e", "a\nb": 1}, "d")
    assert refusal(lambda: bad.count("long")) == f'd: long: expected an integer >= 0, found "{"x" * 59}...'
    assert refusal(lambda: bad.count("even")) == f'd: even: expected an integer >= 0, found "{"y" * 58}"'
    assert refusal(lambda: bad.count("evil")).endswith('found "\\u001b[2J\\u202e"')
    assert refusal(lambda: bad.text("a\nb")) == "d: a\\nb: expected a text, found 1"


@given(st.none() | st.booleans() | st.integers() | st.floats() | st.text())
def test_counts_and_numbers_are_no_truth_values(value: object) -> None:
    kind = type(value).__name__
    assert is_number(value) == (kind in {"int", "float"})
    assert is_count(value) == (kind == "int" and not str(value).startswith("-"))
