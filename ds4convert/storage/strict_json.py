"""JSON from strangers: parsed with every ambiguity refused.

Owns the bounds under which untrusted JSON is parsed (memory, no duplicate keys, valid UTF-8, no NaN or infinite
numbers, no lone surrogates, bounded nesting). Refuses rather than repairs. Does no I/O.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any, NoReturn

from ds4convert.errors import InputError
from ds4convert.storage.untrusted.lookalikes import BOM, FETCH, as_text, told_text
from ds4convert.words.terminal import show

MAX_PARSED_BYTES = 240_000_000
"""Bound on the memory that parsing may take. The header of Pro in one file, the largest known, needs 220 million."""

MAX_KEYS = 640_000
"""Four for each tensor of a header; Pro's has 590 thousand."""

TEXT_COPIES, VALUE_BYTES, KEY_BYTES = 3, 58, 180
"""What parsing holds: the text as bytes, as characters and as values; then per value and per key (measured)."""

ASCII_ABOVE_BYTES = 16_000_000
"""A text with one wide character takes four bytes for each; larger documents have to be plain ASCII."""


def loads(
    raw: bytes,
    where: str,
    error: type[InputError] = InputError,
    max_keys: int = MAX_KEYS,
    may_have_bom: bool = False,
    is_file: bool = True,
) -> Any:
    """Return the value of the JSON text `raw`; `where` names its origin in messages, `max_keys` bounds its keys.

    `may_have_bom`: a byte order mark before it is read over (RFC 8259, section 8.1, allows that); for files that are
    never carried over, as other programs refuse it. `is_file`: what people take for a file (a pointer, a page, nothing)
    is named as such, with how to get the file.

    Raises `error` on invalid UTF-8, invalid JSON, duplicate keys, NaN or infinite numbers, lone surrogates, more
    values than the memory bound allows, or too deep nesting.
    """

    def fail(why: str) -> NoReturn:
        raise error(f"{where}: {why}", file=where.removesuffix(" (header)") if is_file else None)

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(items)
        if len(out) != len(items):
            seen: set[str] = set()
            for key, _ in items:
                if key in seen:
                    fail(f"the key {show(key)} occurs twice; a reader could take either")
                seen.add(key)
        return out

    def constant(literal: str) -> NoReturn:
        fail(f"{literal} is not JSON{_place_of(raw, literal)}; write a finite number, or take the key out")

    def number(literal: str) -> float:
        value = float(literal)
        if not math.isfinite(value):
            fail(f"the number {show(literal)} is too large{_place_of(raw, literal)}")
        return value

    if may_have_bom:
        raw = raw.removeprefix(BOM)
    if why := _unfit(raw, max_keys, is_file):
        fail(why)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as e:
        fail(f"not valid UTF-8 at byte {e.start}")
    try:
        value = json.loads(text, object_pairs_hook=pairs, parse_constant=constant, parse_float=number)
    except json.JSONDecodeError as e:
        fail(f"not valid JSON: {_what_stands_there(e, text, raw, is_file)}")
    except RecursionError:
        fail("not valid JSON: nested too deeply")
    except ValueError as e:  # an integer of more digits than Python converts
        fail(f"not acceptable JSON: {e}")
    if b"\\u" in raw and (lone := _lone_surrogate(value)):
        fail(f"the text {show(lone)} holds half of a surrogate pair")
    return value


def plain(text: bytes | str) -> Any:
    """Return the value of JSON that this program or its user wrote, in which nothing is refused but what is no JSON.

    Raises `ValueError` alone, also for lists in lists that are too deep to be parsed.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _what_stands_there(e: json.JSONDecodeError, text: str, raw: bytes, is_file: bool) -> str:
    """Return what is where JSON should go on: something else from the beginning, the end of the file, or an error."""
    if is_file and not text[: e.pos].strip() and (begin := as_text(raw[:200])):
        return f"{begin}; {FETCH}"
    cut = "; the file ends there: it is cut off, download it again" if not text[e.pos :].strip() else ""
    return f"{e.msg} at character {e.pos}{cut}"


def _unfit(raw: bytes, max_keys: int, is_file: bool) -> str:
    """Return why a text is not even parsed: something else under the name of JSON, or too much of it; "" if it is."""
    if is_file and (other := told_text(raw)):
        return other
    if raw.startswith(BOM):
        return "begins with a byte order mark (BOM, EF BB BF), which is not JSON; save it as UTF-8 without one"
    if len(raw) > ASCII_ABOVE_BYTES and not raw.isascii():
        return f"{len(raw)} bytes of JSON with non-ASCII text; this large, only ASCII is accepted"
    values, keys = raw.count(b",") + raw.count(b"[") + raw.count(b"{"), raw.count(b":")
    if keys > max_keys or TEXT_COPIES * len(raw) + VALUE_BYTES * values + KEY_BYTES * keys > MAX_PARSED_BYTES:
        return f"{len(raw)} bytes of JSON with about {values} values and {keys} keys is more than any known model needs"
    return ""


def _place_of(raw: bytes, literal: str) -> str:
    """Return the key that has the number `literal`, as ` (key a.b[2])`; "" where it has none.

    The text is parsed a second time for it, under the bounds that it has passed already.
    """
    wrong = object()

    def number(text: str) -> object:
        return wrong if text == literal else 0

    try:
        value = json.loads(raw, parse_constant=number, parse_float=number)
    except (ValueError, RecursionError):  # more is wrong further on
        return ""
    left: list[tuple[str, Any]] = [("", value)]
    while left:
        path, item = left.pop()
        if item is wrong:
            return f" (key {show(path)})" if path else ""
        if isinstance(item, dict):
            left += [(f"{path}.{k}" if path else k, v) for k, v in item.items()]
        elif isinstance(item, list):
            left += [(f"{path}[{n}]", v) for n, v in enumerate(item)]
    return ""


def _lone_surrogate(value: Any) -> str | None:
    """Return a text anywhere in `value` that UTF-8 cannot encode, or None."""
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, str) and any("\ud800" <= c <= "\udfff" for c in item):
            return item
        if isinstance(item, dict):
            left += [*item, *item.values()]
        elif isinstance(item, list):
            left += item
    return None


def dumps(value: Any) -> bytes:
    """Return canonical JSON of `value`: keys sorted, no spaces, UTF-8. Equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def pretty(value: Any) -> bytes:
    """Return indented JSON of `value` in its own key order, with a final newline, for files that people read."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def digest(value: Any) -> str:
    """Return the sha256 hex digest of the canonical JSON of `value`."""
    return hashlib.sha256(dumps(value)).hexdigest()
