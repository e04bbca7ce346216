"""Typed fields of a JSON document: one that is not what it has to be is named by its path, with what was found there.

A document is read through `Fields`, one for each object in it. Every getter takes a key and returns a value of one
type, or raises `InputError`: `ds4convert_manifest.json: tensors[12].bytes: expected an integer >= 0, found "x"`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from ds4convert.errors import InputError
from ds4convert.words.terminal import show

T = TypeVar("T")

SHOWN = 60
"""Characters of a found value that a message shows, at most."""

TEXT, COUNT, NUMBER, FLAG, OBJECT, LIST = (
    "a text", "an integer >= 0", "a number", "true or false", "an object", "a list",
)  # fmt: skip


def is_count(value: object) -> bool:
    """Return whether a JSON value is an integer of at least 0; true and false are none."""
    return type(value) is int and value >= 0


def is_number(value: object) -> bool:
    """Return whether a JSON value is a number; true and false are none."""
    return type(value) in {int, float}


@dataclass(frozen=True, slots=True)
class Fields:
    """One object of a document: `where` names the document, `path` the object in it, `advice` what to do next."""

    where: str
    path: str
    values: Mapping[str, Any]
    advice: str = ""

    @classmethod
    def of(cls, value: object, where: str, advice: str = "") -> Fields:
        """Return the document itself. Raises `InputError` where it is no object."""
        if not isinstance(value, dict):
            raise InputError(_sentence(where, "", OBJECT, _found(value), advice))
        return cls(where, "", value, advice)

    def fail(self, key: str, expected: str) -> NoReturn:
        """Raise the error of a field that is not as expected."""
        found = _found(self.values[key]) if key in self.values else "nothing"
        raise InputError(_sentence(self.where, self._at(key), expected, found, self.advice))

    def _at(self, key: str) -> str:
        return f"{self.path}.{show(key)}" if self.path else show(key)

    def _value(self, key: str, expected: str, good: Callable[[Any], bool]) -> Any:
        if key not in self.values or not good(self.values[key]):
            self.fail(key, expected)
        return self.values[key]

    def has(self, key: str) -> bool:
        """Return whether the field is there."""
        return key in self.values

    def text(self, key: str) -> str:
        """Return a text."""
        return str(self._value(key, TEXT, lambda v: isinstance(v, str)))

    def count(self, key: str) -> int:
        """Return an integer of at least 0."""
        return int(self._value(key, COUNT, is_count))

    def number(self, key: str) -> float:
        """Return a number, an integer as one: so that it is written back as it was."""
        found: float = self._value(key, NUMBER, is_number)
        return found

    def flag(self, key: str) -> bool:
        """Return true or false."""
        return bool(self._value(key, FLAG, lambda v: isinstance(v, bool)))

    def null_or(self, key: str, get: Callable[[str], T]) -> T | None:
        """Return what `get` (a getter of these fields) returns; None where the field is null."""
        return None if key in self.values and self.values[key] is None else get(key)

    def absent_or(self, key: str, get: Callable[[str], T]) -> T | None:
        """Return what `get` (a getter of these fields) returns; None where there is no such field."""
        return get(key) if key in self.values else None

    def object(self, key: str) -> Fields:
        """Return an object."""
        return Fields(self.where, self._at(key), self._value(key, OBJECT, lambda v: isinstance(v, dict)), self.advice)

    def objects(self, key: str) -> list[Fields]:
        """Return a list of objects."""
        return [self._entry(key, n, OBJECT, lambda v: isinstance(v, dict)) for n in range(len(self._list(key)))]

    def _list(self, key: str) -> list[Any]:
        found: list[Any] = self._value(key, LIST, lambda v: isinstance(v, list))
        return found

    def _entry(self, key: str, n: int, expected: str, good: Callable[[Any], bool]) -> Fields:
        path, value = f"{self._at(key)}[{n}]", self.values[key][n]
        if not good(value):
            raise InputError(_sentence(self.where, path, expected, _found(value), self.advice))
        return Fields(self.where, path, value, self.advice)

    def texts(self, key: str) -> tuple[str, ...]:
        """Return a list of texts."""
        return self._all(key, TEXT, lambda v: isinstance(v, str))

    def counts(self, key: str) -> tuple[int, ...]:
        """Return a list of integers of at least 0."""
        return self._all(key, COUNT, is_count)

    def numbers(self, key: str) -> tuple[float, ...]:
        """Return a list of numbers."""
        return self._all(key, NUMBER, is_number)

    def _all(self, key: str, expected: str, good: Callable[[Any], bool]) -> tuple[Any, ...]:
        found = self._list(key)
        if not all(map(good, found)):
            n = next(n for n, v in enumerate(found) if not good(v))
            self._entry(key, n, expected, good)
        return tuple(found)

    def text_by_name(self, key: str) -> dict[str, str]:
        """Return an object whose values are texts."""
        inner = self.object(key)
        return {k: inner.text(k) for k in inner.values}

    def scalar_by_name(self, key: str) -> dict[str, int | str]:
        """Return an object whose values are texts or integers."""
        inner = self.object(key)
        for k, v in inner.values.items():
            if not isinstance(v, str) and type(v) is not int:
                inner.fail(k, "a text or an integer")
        return dict(inner.values)


def _sentence(where: str, path: str, expected: str, found: str, advice: str) -> str:
    place = f"{where}: {path}" if path else where
    return f"{place}: expected {expected}, found {found}{f'; {advice}' if advice else ''}"


def _found(value: object) -> str:
    """Return a value as JSON, cut where it is long, with nothing that a terminal would act upon."""
    told = json.dumps(value, ensure_ascii=True)
    return told if len(told) <= SHOWN else f"{told[:SHOWN]}..."
