"""How tensor names of the official checkpoints are spelled by others: rules of the family file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ds4convert.checkpoint.families.rows import EXPERT, NUMBER
from ds4convert.checkpoint.family import Family
from ds4convert.checkpoint.types import TensorInfo


class Speller:
    """Translates names as found on disk into official names; a name that means nothing known stays as it is."""

    def __init__(self, family: Family) -> None:
        self._family = family
        self._tails: dict[str, str] = {}

    def official(self, name: str) -> str:
        """Return the official name that `name` means: prefix dropped, components and tails looked up."""
        for prefix in self._family.prefixes:
            name = name.removeprefix(prefix)
        if block := self._family.block_of(name):
            return name[: block.start("tail")] + self._tail(block["tail"])
        return name if is_known(self._family, name) else self._tail(name)

    def _tail(self, tail: str) -> str:
        known = self._tails.get(tail)
        if known is None:
            known = self._tails[tail] = self._translate(tail)
        return known

    def _translate(self, tail: str) -> str:
        parts = [self._family.components.get(p, p) for p in tail.split(".")]
        expert = ""
        for at, part in enumerate(parts[1:], 1):
            if parts[at - 1] in self._family.expert_components and part.isdigit():
                expert, parts[at] = part, EXPERT
        generic = ".".join(parts)
        return self._family.spellings.get(generic, generic).replace(EXPERT, expert)


@dataclass(frozen=True)
class Named:
    """Found tensors under official names, and those whose official name two tensors claim.

    `outside`: official names of tensors that lie in the files but not in the index, with the index of their file.
    """

    tensors: Mapping[str, TensorInfo]
    doubled: tuple[tuple[str, str], ...]
    outside: Mapping[str, int] = field(default_factory=dict)


def name_tensors(family: Family, found: Iterable[TensorInfo], outside: Iterable[TensorInfo] = ()) -> Named:
    """Return the tensors by official name, whichever known spelling the checkpoint uses."""
    spell = Speller(family).official
    out: dict[str, TensorInfo] = {}
    doubled: list[tuple[str, str]] = []
    for tensor in found:
        name = spell(tensor.name)
        if name in out:
            doubled.append((out[name].name, tensor.name))
        out[name] = tensor
    return Named(out, tuple(doubled), {spell(t.name): t.file for t in outside})


def ignored_reason(family: Family, name: str) -> str | None:
    """Return why the official name `name` may be left out, or None: only copies of shared tensors may."""
    block = family.block_of(name)
    return family.ignored.get(block["tail"]) if block and block["head"] else None


def is_known(family: Family, name: str) -> bool:
    """Return whether the family has a row for the official name `name`, in whichever blocks."""
    return general(family, name) in family.tails


def general(family: Family, name: str) -> str:
    """Return an official name without the prefix of a block, and with `{n}` and `{expert}` for the numbers in it."""
    block = family.block_of(name)
    parts = (block["tail"] if block else name).split(".")
    for at, part in enumerate(parts):
        if part.isdigit():
            parts[at] = EXPERT if at and parts[at - 1] in family.expert_components else NUMBER
    return ".".join(parts)
