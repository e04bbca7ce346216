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

MAX_PARSED_BYTES = 240_000_000
"""Bound on the memory that parsing may take. The header of Pro in one file, the largest known, needs 220 million."""

MAX_KEYS = 640_000
"""Four for each tensor of a header; Pro's has 590 thousand."""

TEXT_COPIES, VALUE_BYTES, KEY_BYTES = 3, 58, 180
"""What parsing holds: the text as bytes, as characters and as values; then per value and per key (measured)."""

ASCII_ABOVE_BYTES = 16_000_000
"""A text with one wide character takes four bytes for each; larger documents have to be plain ASCII."""


def loads(raw: bytes, where: str, error: type[InputError] = InputError, max_keys: int = MAX_KEYS) -> Any:
    """Return the value of the JSON text `raw`; `where` names its origin in messages, `max_keys` bounds its keys.

    Raises `error` on invalid UTF-8, invalid JSON, duplicate keys, NaN or infinite numbers, lone surrogates, more
    values than the memory bound allows, or too deep nesting.
    """

    def fail(why: str) -> NoReturn:
        raise error(f"{where}: {why}")

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
        fail(f"{literal} is not JSON")

    def number(literal: str) -> float:
        value = float(literal)
        if not math.isfinite(value):
            fail(f"the number {show(literal)} is too large")
        return value

    if len(raw) > ASCII_ABOVE_BYTES and not raw.isascii():
        fail(f"{len(raw)} bytes of JSON with non-ASCII text; this large, only ASCII is accepted")
    values, keys = raw.count(b",") + raw.count(b"[") + raw.count(b"{"), raw.count(b":")
    if keys > max_keys or TEXT_COPIES * len(raw) + VALUE_BYTES * values + KEY_BYTES * keys > MAX_PARSED_BYTES:
        fail(f"{len(raw)} bytes of JSON with about {values} values and {keys} keys is more than any known model needs")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as e:
        fail(f"not valid UTF-8 at byte {e.start}")
    try:
        value = json.loads(text, object_pairs_hook=pairs, parse_constant=constant, parse_float=number)
    except json.JSONDecodeError as e:
        fail(f"not valid JSON: {e.msg} at character {e.pos}")
    except RecursionError:
        fail("not valid JSON: nested too deeply")
    except ValueError as e:  # an integer of more digits than Python converts
        fail(f"not acceptable JSON: {e}")
    if b"\\u" in raw and (lone := _lone_surrogate(value)):
        fail(f"the text {show(lone)} holds half of a surrogate pair")
    return value


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


def show(text: str, limit: int = 120) -> str:
    """Return `text` safe for a terminal: control and unencodable characters escaped, long ones shortened."""
    cut = text if len(text) <= limit else text[: limit - 20] + "..." + text[-17:]
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)
