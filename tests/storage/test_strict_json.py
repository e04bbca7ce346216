"""JSON of strangers: what is refused and in which words, where bounds lie to the byte, and what canonical JSON is."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds4convert.errors import ConfigError, InputError
from ds4convert.storage import strict_json

FETCH = "fetch the file itself: `git lfs pull` in a clone, or `ds4convert pull REPO DEST`"
values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


def refusal(raw: bytes, where: str = "x.json", **how: Any) -> str:
    with pytest.raises(InputError) as caught:
        strict_json.loads(raw, where, **how)
    return str(caught.value)


@given(values)
def test_whatever_is_written_in_either_form_is_read_back(value: Any) -> None:
    assert strict_json.loads(strict_json.dumps({"v": value}), "x") == {"v": value}
    assert strict_json.loads(strict_json.pretty({"v": value}), "x") == {"v": value}


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), values, min_size=2, max_size=5))
def test_canonical_json_does_not_depend_on_the_order_of_keys_and_pretty_json_keeps_it(table: dict[str, Any]) -> None:
    turned = dict(reversed(table.items()))
    assert strict_json.dumps(table) == strict_json.dumps(turned)
    assert list(json.loads(strict_json.pretty(turned))) == list(turned)
    assert strict_json.digest(table) == hashlib.sha256(strict_json.dumps(turned)).hexdigest()


def test_canonical_and_pretty_json_to_the_byte() -> None:
    table = {"b": [1, 2.5, None], "a": "é"}
    assert strict_json.dumps(table) == '{"a":"é","b":[1,2.5,null]}'.encode()
    assert strict_json.pretty(table) == '{\n  "b": [\n    1,\n    2.5,\n    null\n  ],\n  "a": "é"\n}\n'.encode()
    assert strict_json.digest({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"


REFUSED = {
    b'{"a": 1, "b": 2, "a": 1}': "the key a occurs twice; a reader could take either",
    b'[{"x\\n": 1, "x\\n": 2}]': "the key x\\n occurs twice; a reader could take either",
    b'{"a": {"b": [0, NaN]}}': "NaN is not JSON (key a.b[1]); write a finite number, or take the key out",
    b'{"a": -Infinity}': "-Infinity is not JSON (key a); write a finite number, or take the key out",
    b"NaN": "NaN is not JSON; write a finite number, or take the key out",
    b'{"k": [{"z": 1e400}]}': "the number 1e400 is too large (key k[0].z)",
    b'{"k": -2e308, "k2": [}': "the number -2e308 is too large",
    b'{"a": "\\ud83d"}': "the text \\ud83d holds half of a surrogate pair",
    b'{"a": [["\\udc00x"]]}': "the text \\udc00x holds half of a surrogate pair",
    b'{"\\ud800": 1}': "the text \\ud800 holds half of a surrogate pair",
    b'{"a": "\xc3\x28"}': "not valid UTF-8 at byte 7",
    b'{"a": 1': "not valid JSON: Expecting ',' delimiter at character 7; the file ends there: it is cut off, download it again",
    b'{"a": 1]': "not valid JSON: Expecting ',' delimiter at character 7",
    b'{"a": 1} x': "not valid JSON: Extra data at character 9",
    b"hello there\nmore": f"not valid JSON: is text that begins with 'hello there'; {FETCH}",
    b"\x01\x02": "not valid JSON: Expecting value at character 0",
    b"": "is empty; download it again",
    bytes(3): "holds 3 zero bytes and nothing else, as an interrupted download leaves; download it again",
    b"\xef\xbb\xbf{}": "begins with a byte order mark (BOM, EF BB BF), which is not JSON; save it as UTF-8 without one",
    b"[" * 100_000: "not valid JSON: nested too deeply",
}  # fmt: skip


@pytest.mark.parametrize("raw", REFUSED)
def test_what_is_refused_and_in_which_words(raw: bytes) -> None:
    assert refusal(raw) == f"x.json: {REFUSED[raw]}"


def test_an_integer_of_more_digits_than_python_takes_is_refused_as_such() -> None:
    assert refusal(b"9" * 5000).startswith("x.json: not acceptable JSON: Exceeds the limit (4300 digits)")


def test_whole_surrogate_pairs_and_escapes_of_other_characters_are_read() -> None:
    assert strict_json.loads(b'["\\ud83d\\ude00", "\\u00e9"]', "x") == ["\U0001f600", "é"]


def test_the_error_is_of_the_kind_that_was_asked_for_and_names_the_file() -> None:
    with pytest.raises(ConfigError, match="m: is empty") as caught:
        strict_json.loads(b"", "m (header)".removesuffix(" (header)"), ConfigError)
    assert caught.value.file == "m"
    with pytest.raises(InputError) as caught_header:
        strict_json.loads(b"[", "m.safetensors (header)")
    assert caught_header.value.file == "m.safetensors"


def test_what_is_no_file_is_not_called_one() -> None:
    """An answer of a server, say: neither its name nor advice to download it again."""
    with pytest.raises(InputError) as caught:
        strict_json.loads(b"hello there", "the answer", is_file=False)
    assert (
        caught.value.file is None and str(caught.value) == "the answer: not valid JSON: Expecting value at character 0"
    )
    assert refusal(b"", is_file=False).endswith(
        "Expecting value at character 0; the file ends there: it is cut off, download it again"
    )


def test_a_byte_order_mark_is_read_over_only_where_it_may_be() -> None:
    assert strict_json.loads(b"\xef\xbb\xbf[1]", "x", may_have_bom=True) == [1]
    assert "byte order mark" in refusal(b"\xef\xbb\xbf\xef\xbb\xbf[1]", may_have_bom=True)


def test_the_bound_on_keys_holds_to_the_key() -> None:
    made = json.dumps({str(n): n for n in range(50)}).encode()
    assert len(strict_json.loads(made, "x", max_keys=50)) == 50
    assert refusal(made, max_keys=49) == (
        f"x.json: {len(made)} bytes of JSON with about 50 values and 50 keys is more than any known model needs"
    )


def test_the_bound_on_memory_counts_bytes_values_and_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three copies of the text, 58 bytes a value (commas and brackets), 180 a key."""
    raw = b'{"a":[1,2],"b":3}'
    need = 3 * len(raw) + 58 * (2 + 1 + 1) + 180 * 2
    monkeypatch.setattr(strict_json, "MAX_PARSED_BYTES", need)
    assert strict_json.loads(raw, "x") == {"a": [1, 2], "b": 3}
    monkeypatch.setattr(strict_json, "MAX_PARSED_BYTES", need - 1)
    assert "with about 4 values and 2 keys is more than any known model needs" in refusal(raw)


def test_a_large_document_has_to_be_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = '["é"]'.encode()
    monkeypatch.setattr(strict_json, "ASCII_ABOVE_BYTES", len(raw))
    assert strict_json.loads(raw, "x") == ["é"]
    monkeypatch.setattr(strict_json, "ASCII_ABOVE_BYTES", len(raw) - 1)
    assert refusal(raw) == "x.json: 6 bytes of JSON with non-ASCII text; this large, only ASCII is accepted"
    assert strict_json.loads(b'["abcd"]', "x") == ["abcd"]


def test_json_of_our_own_is_refused_only_where_it_is_none() -> None:
    assert strict_json.plain('{"a": 1, "a": 2}') == {"a": 2} and strict_json.plain(b"[NaN]")[0] != 0
    for bad in ("{", "[" * 100_000):
        with pytest.raises(ValueError, match=r"Expecting|nested too deeply"):
            strict_json.plain(bad)
