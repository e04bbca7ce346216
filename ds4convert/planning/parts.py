"""A plan divided over several machines: which of its files each part writes, and what that costs.

The unit is an output file: it has one writer, one digest and one final name. Parts are contiguous, since neighbouring
files read neighbouring shards: dealt out in turn, four parts of a model would fetch almost every shard four times.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ds4convert.checkpoint.types import JSON
from ds4convert.errors import UsageError
from ds4convert.planning.types import Plan, Step

ROUNDED_PER_SECOND = 17.3e6
"""Weights that one core rounds in a second (benchmarks/RESULTS.md, `optimal` to 2 bits)."""

COPIED_PER_SECOND = 200e6
"""Bytes that one core copies and hashes in a second."""

MOST_PARTS = 100_000


@dataclass(frozen=True, slots=True)
class Part:
    """Part `number`, from 1, of `count` parts."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """Return the part that `I/N` names. Raises `UsageError` for all else, with the range that I may have."""
        match = re.fullmatch(r"\s*(\d{1,6})\s*/\s*(\d{1,6})\s*", text, re.ASCII)
        if match is None:
            raise UsageError(f"--part {text!r}: expected I/N, such as 2/8 for the second of eight parts")
        number, count = int(match[1]), int(match[2])
        if not 1 <= count <= MOST_PARTS:
            raise UsageError(f"--part {number}/{count}: expected 1 to {MOST_PARTS:,} parts")
        if not 1 <= number <= count:
            raise UsageError(f"--part {number}/{count}: parts are counted from 1/{count} to {count}/{count}")
        return cls(number, count)

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @property
    def name(self) -> str:
        """Return the part as it stands in names of files."""
        return f"{self.number}-of-{self.count}"


@dataclass(frozen=True, slots=True)
class Share:
    """What one part has to do. `files` are numbers of output files; `cost` is in seconds of one core, as estimated."""

    part: Part
    files: tuple[int, ...]
    bytes_read: int
    bytes_written: int
    cost: float

    def as_json(self) -> JSON:
        """Return the record of the contract: `files` is their number."""
        return {
            "part": str(self.part),
            "files": len(self.files),
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "cost": round(self.cost, 3),
        }


def costs(plan: Plan) -> list[float]:
    """Return the estimated seconds of one core for each output file: bytes copied and hashed, weights rounded."""
    out = [f.size / COPIED_PER_SECOND for f in plan.files]
    for step in plan.steps:
        if step.transform.startswith("quantize_"):
            out[step.outputs[0].file] += step.weights / ROUNDED_PER_SECOND
    return out


def divided(each: Sequence[float], count: int) -> list[int]:
    """Return for each piece of work, by its cost, the number from 1 of the part in whose share its middle lies."""
    total, before, out = sum(each) or 1.0, 0.0, []
    for cost in each:
        middle = (before + cost / 2) / total
        before += cost
        out.append(min(int(middle * count), count - 1) + 1)
    return out


def names_of(sizes: Mapping[str, int], part: Part) -> frozenset[str]:
    """Return the files, of those in `sizes`, that a part looks at: neighbours, about as many bytes as others."""
    names = sorted(sizes)
    numbers = divided([sizes[n] for n in names], part.count)
    return frozenset(n for n, number in zip(names, numbers, strict=True) if number == part.number)


def part_of_each(plan: Plan, count: int) -> list[int]:
    """Return for each output file the number, from 1, of the part that writes it.

    A file belongs to the part in whose share of the whole cost its middle lies. So each belongs to exactly one part of
    a division, and every machine that has the plan comes to the same one.
    """
    return divided(costs(plan), count)


def files_of(plan: Plan, part: Part) -> tuple[int, ...]:
    """Return the numbers of the output files that a part writes; none where there are more parts than files."""
    return tuple(n for n, of in enumerate(part_of_each(plan, part.count)) if of == part.number)


def shares(plan: Plan, count: int) -> list[Share]:
    """Return what each part of a division into `count` parts reads, writes and costs."""
    of, each = part_of_each(plan, count), costs(plan)
    steps: list[list[Step]] = [[] for _ in range(count)]
    for step in plan.steps:
        steps[of[step.outputs[0].file] - 1].append(step)
    out = []
    for number in range(1, count + 1):
        files = tuple(n for n, found in enumerate(of) if found == number)
        written = sum(plan.files[n].size for n in files)
        cost = sum(each[n] for n in files)
        out.append(Share(Part(number, count), files, _bytes_read(steps[number - 1]), written, cost))
    return out


def share(plan: Plan, part: Part) -> Share:
    """Return what one part reads, writes and costs."""
    return shares(plan, part.count)[part.number - 1]


def commands(command: str, count: int, out: str) -> list[str]:
    """Return the command lines of a division, from that of `plan` with the same options: the parts, then the end."""
    words, kept = shlex.split(command), []
    valued, flags = {"--parts", "--out"}, {"--full", "--json", "-q", "--quiet"}
    skip = False
    for word in words[2:]:
        if skip or word in flags or word.partition("=")[0] in valued:
            skip = not skip and word in valued
            continue
        kept.append(word)
    at = next((n for n, word in enumerate(kept) if not word.startswith("-")), 0)
    line = shlex.join(["ds4convert", "quantize", *kept[: at + 1], out, *kept[at + 1 :]])
    return [*(f"{line} --part {n}/{count}" for n in range(1, count + 1)), line]


def _bytes_read(steps: Iterable[Step]) -> int:
    """Return the distinct source bytes that steps read: what a machine without a copy of the source has to fetch."""
    ranges = sorted({(r.file, r.offset, r.size) for s in steps for operand in s.operands for r in operand if r.size})
    total, at = 0, (-1, 0)
    for file, offset, size in ranges:
        start = max(offset, at[1]) if file == at[0] else offset
        end = max(offset + size, start)
        total += end - start
        at = (file, end)
    return total
