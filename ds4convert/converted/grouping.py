"""Many as few: tensors of one role as one group, and differences of one kind as one line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from ds4convert.checkpoint.inventory import HEAD_GROUPS
from ds4convert.checkpoint.types import JSON, Finding, LeftOut

_NUMBER = re.compile(r"\d+")


def findings(found: Iterable[Finding]) -> Iterator[str]:
    """Yield a line for all findings that differ in nothing but numbers in the tensor's name, in first order."""
    groups: dict[tuple[str, ...], list[Finding]] = {}
    for f in found:
        groups.setdefault((f.kind, _NUMBER.sub("*", f.tensor), f.expected, f.found), []).append(f)
    for (_, pattern, *_), same in groups.items():
        yield f"{same[0]}" + (f" ({len(same):,} such, {pattern})" if len(same) > 1 else "")


def left_out(found: Iterable[LeftOut]) -> Iterator[str]:
    """Yield a line for all tensors left out for one reason, in first order."""
    groups: dict[str, list[str]] = {}
    for x in found:
        groups.setdefault(x.why, []).append(x.tensor)
    for why, names in groups.items():
        yield f"{names[0]}: {why}" if len(names) == 1 else f"{len(names):,} tensors ({names[0]} and others): {why}"


@dataclass(frozen=True, slots=True)
class Item:
    """One tensor as groups count it; `format` is "" where it is not known."""

    group: str
    dtype: str
    format: str
    size: int


@dataclass(slots=True)
class Group:
    """All tensors of one role: how many, their bytes in all, by dtype and by format (in order of first appearance)."""

    name: str
    tensors: int = 0
    size: int = 0
    dtypes: dict[str, int] = field(default_factory=dict)
    formats: dict[str, int] = field(default_factory=dict)

    @property
    def is_of_head(self) -> bool:
        """Return whether these are tensors of the head."""
        return self.name.startswith(HEAD_GROUPS)

    def add(self, item: Item) -> None:
        """Count one tensor more."""
        self.tensors += 1
        self.size += item.size
        self.dtypes[item.dtype] = self.dtypes.get(item.dtype, 0) + item.size
        self.formats[item.format] = self.formats.get(item.format, 0) + item.size

    def as_json(self, *told: str) -> JSON:
        """Return the group under the keys of the command line contract; `told`: of dtypes and formats, which."""
        known = {"dtypes": most_bytes_first(self.dtypes), "formats": tuple(self.formats)}
        return {"name": self.name, "tensors": self.tensors, "bytes": self.size} | {k: list(known[k]) for k in told}


def by_role(items: Iterable[Item]) -> tuple[Group, ...]:
    """Return the groups of tensors, in the order of first appearance."""
    out: dict[str, Group] = {}
    for item in items:
        out.setdefault(item.group, Group(item.group)).add(item)
    return tuple(out.values())


def head_last(groups: Iterable[Group]) -> tuple[Group, ...]:
    """Return groups with the head's behind the backbone's."""
    return tuple(sorted(groups, key=lambda g: g.is_of_head))


def most_bytes_first(sizes: dict[str, int]) -> tuple[str, ...]:
    """Return names (dtypes, formats) by their bytes, the most first."""
    return tuple(sorted(sizes, key=lambda name: -sizes[name]))


def by_reason(found: Iterable[LeftOut]) -> list[tuple[str, str]]:
    """Return (which tensors, why) for each reason, in the order of first appearance; one tensor is named."""
    reasons: dict[str, list[str]] = {}
    for x in found:
        reasons.setdefault(x.why, []).append(x.tensor)
    return [(_named(names), why) for why, names in reasons.items()]


def _named(names: Sequence[str]) -> str:
    """Return one name, or how many tensors and what their names begin with."""
    if len(names) == 1:
        return names[0]
    parts = [name.split(".") for name in names]
    same = [p[0] for p in takewhile(lambda p: len(set(p)) == 1, zip(*parts, strict=False))]
    return f"{len(names):,} tensors ({'.'.join([*same, '*'])})" if same else f"{len(names):,} tensors"
