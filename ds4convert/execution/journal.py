"""What a running conversion has safely finished, so that a later run goes on from there.

State lies in `OUT/.ds4convert/`: `plan.json` (id and a summary of the plan), `journal.jsonl`, `lock`. Every line of the
journal is appended only after the data that it speaks of has been synced, and carries its own checksum: a torn or
altered line ends the journal on reading.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ds4convert.checkpoint import advice
from ds4convert.errors import Ds4Error, OutputError
from ds4convert.execution.ownership import NAMES, Marks, as_table, ours
from ds4convert.execution.rounding_steps import CHUNK_VALUES
from ds4convert.execution.transforms import CHUNK_BYTES
from ds4convert.files import Disk, disk_errors
from ds4convert.planning.parts import Part
from ds4convert.planning.types import Done, Loss, Plan
from ds4convert.storage import strict_json
from ds4convert.storage.records import Fingerprint
from ds4convert.storage.safe_open import names_in, open_file, read_own, resolve_inside
from ds4convert.storage.state_folder import PLAN_NAME
from ds4convert.words.terminal import show

JOURNAL_NAME = "journal.jsonl"


def journal_name(part: Part | None) -> str:
    """Return the name of the journal of a whole run, or of one part of a divided plan."""
    return JOURNAL_NAME if part is None else f"journal-{part.name}.jsonl"


@dataclass(frozen=True)
class Prints:
    """The fingerprints of the source files by name, and the `place` of the files: a machine and its folders.

    Another machine has its own copy of the source, with times of its own, which say nothing of this one's: there
    `sample` decides, a digest of blocks all over a file. It is None for files that have no time but a mark of their
    version.
    """

    files: Mapping[str, Fingerprint]
    place: str
    sample: Callable[[str], str | None]

    def told(self, sampled: bool) -> dict[str, list[int | str]]:
        """Return them as JSON; with samples, so that another place can compare them with its own files."""
        return {n: [*p, s] if sampled and (s := self.sample(n)) else list(p) for n, p in self.files.items()}

    def changed(self, name: str, before: object, place: object) -> bool:
        """Return whether a source file is another than the one that had the fingerprint `before` at `place`."""
        now = list(self.files[name])
        if not isinstance(before, list):
            return True
        if place == self.place or before[:2] == now:
            return before[:2] != now
        return before[:1] != now[:1] or len(before) < 3 or before[2] != self.sample(name)


@dataclass(frozen=True)
class Begun:
    """A large step of which a run has written the first `pieces`: bytes and xxh3-128 of its outputs so far."""

    pieces: int
    sizes: tuple[int, ...]
    so_far: Done

    def line(self, n: int) -> list[Any]:
        """Return the entry of the journal; a version that cuts pieces otherwise has no use for it."""
        return [self.pieces, list(self.sizes), _step_line(n, self.so_far), PIECE]


PIECE = [CHUNK_BYTES, CHUNK_VALUES]
"""Bytes of a piece that is copied, and weights of one that is rounded."""


@dataclass
class Finished:
    """What earlier runs finished: by step number, and sha256 per file number (None where hashing is off).

    `begun` are steps that are partly there.
    """

    steps: dict[int, Done] = field(default_factory=dict)
    files: dict[int, str | None] = field(default_factory=dict)
    begun: dict[int, Begun] = field(default_factory=dict)


def summary(plan: Plan) -> dict[str, Any]:
    """Return what tells two plans apart for a user: the id and the choices behind it."""
    return {
        "plan": plan.id,
        "recipe": plan.recipe,
        "formats": dict(plan.formats),
        "layout": plan.layout,
        "head": plan.head_kind,
        "hashing": plan.hashing,
        "files": len(plan.files),
        "output_bytes": sum(f.size for f in plan.files),
        "source_bytes": sum(s.size for s in plan.sources),
        "sources": [[s.name, s.header_sha256] for s in plan.sources],
        "command": re.sub(r" --part[ =]\S+", "", advice.COMMAND.get()),  # what ends it, not what began a part
    }


def other_plan(state: Path) -> dict[str, Any] | None:
    """Return the summary of the plan whose unfinished run left `state`, or None when it cannot be read."""
    with contextlib.suppress(ValueError):
        found = strict_json.plain(read_own(state, PLAN_NAME))
        return found if isinstance(found, dict) else None
    return None


def is_of(state: Path, plan: Plan) -> bool:
    """Return whether `state` is what an unfinished run of this very plan left."""
    found = None if state.is_symlink() else other_plan(state)
    return found is not None and found.get("plan") == plan.id


def check_same_plan(state: Path, plan: Plan) -> None:
    """Raise `OutputError` when the unfinished run in this folder followed another plan, saying what differs."""
    found, wanted = other_plan(state), summary(plan)
    if found is None:
        _check_untouched(state)
        return
    if found.get("plan") == plan.id:
        return
    command = found.get("command")
    told = differences(found, wanted)
    raise OutputError(
        f"{state.parent}: holds an unfinished conversion with other settings ({told}); "
        f"{advice.for_unfinished(show(command, 4096) if isinstance(command, str) else '', ours(state.parent))}"
    )


_TOLD = {
    "recipe": "recipe", "layout": "layout", "head": "head", "hashing": "hashing", "files": "number of files",
    "output_bytes": "bytes of the result", "source_bytes": "bytes of the source",
}  # fmt: skip
_CHOICES = ("recipe", "layout", "head", "hashing")
"""What a user chose; the sizes are told only where none of these, and no format, differs."""


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """Return what tells the plan of the summary `found`, as it was read, from that of `wanted`."""
    return ", ".join(_differences(found, wanted)) or "the version of ds4convert, or the source's small files"


def _differences(found: dict[str, Any], ours: dict[str, Any]) -> Iterable[str]:
    """Yield what differs between two summaries, in words."""
    changed = [key for key in _TOLD if found.get(key) != ours[key]]
    before, now = found.get("formats"), ours["formats"]
    before = before if isinstance(before, dict) else {}
    formats = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
    chosen = [key for key in changed if key in _CHOICES]
    for key in chosen or ([] if formats else changed):
        yield f"{_TOLD[key]} was {_word(found.get(key))}, now {_word(ours[key])}"
    for key in formats:
        yield f"format of {show(key)} was {_word(before.get(key))}, now {_word(now.get(key))}"
    if found.get("sources") != ours["sources"]:
        yield "the source's headers changed"


def _word(value: object) -> str:
    """Return a plain value as people say it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, int):
        return f"{value:,}"
    return show(value) if isinstance(value, str) else "not set"


def _check_untouched(state: Path) -> None:
    """Raise `OutputError` when there is more than the state of a run that ended before it recorded its plan."""
    if names := names_in(state.parent):
        way = ", or add --overwrite to start over" if ours(state.parent) else ""
        raise OutputError(
            f"{state.parent}: {state.name}/{PLAN_NAME} cannot be read, so what is here ("
            f"{', '.join(names[:5])}) may be of other settings, or of another program",
            hint=f"choose another folder{way}",
        )


class Log(Protocol):
    """What is told of finished work: a journal, or in a process that writes files for a run, the way to that run's."""

    def steps(self, done: Mapping[int, Done]) -> None:
        """Record steps whose bytes have been synced."""

    def begun(self, n: int, so_far: Begun) -> None:
        """Record how far a large step has come, whose bytes up to there have been synced."""

    def file(self, number: int, sha256: str | None) -> None:
        """Record that a file has its final name."""


class Journal(Log):
    """The append side. Safe to use from several threads."""

    def __init__(self, disk: Disk, state: Path, part: Part | None = None) -> None:
        self._disk, self._path, self._lock = disk, state / journal_name(part), threading.Lock()
        self._fd = disk.open_log(self._path)

    def steps(self, done: Mapping[int, Done]) -> None:
        """Record steps whose bytes have been synced."""
        if done:
            self._append({"steps": [_step_line(n, d) for n, d in done.items()]})

    def begun(self, n: int, so_far: Begun) -> None:
        """Record how far a large step has come, whose bytes up to there have been synced."""
        self._append({"begun": so_far.line(n)})

    def file(self, number: int, sha256: str | None) -> None:
        """Record that a file has its final name."""
        self._append({"file": number, "sha256": sha256})

    def changed(self, source: str) -> None:
        """Record that a source file was changed during the run: what came from it is not finished."""
        self._append({"changed": source})

    def _append(self, line: dict[str, Any]) -> None:
        with self._lock, disk_errors("writing", self._path):
            self._disk.append(self._fd, _sealed(line))

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


def begin(
    disk: Disk, state: Path, plan: Plan, prints: Prints, marks: Marks, part: Part | None = None,
    files: Collection[int] | None = None,
) -> Finished:  # fmt: skip
    """Return what earlier runs of this plan finished, parts included, and write a journal anew with just that.

    Steps that read a source file whose fingerprint has changed since do not count as finished. `marks` are the files
    of the result, which plan.json names as ours. A part keeps its own journal, of its own `files`; a whole run
    takes in those of all parts.
    """
    found = finished(state, plan, prints)
    if files is not None:
        found.steps = {n: d for n, d in found.steps.items() if plan.steps[n].outputs[0].file in files}
        found.files = {n: sha256 for n, sha256 in found.files.items() if n in files}
        found.begun = {n: b for n, b in found.begun.items() if plan.steps[n].outputs[0].file in files}
    lines: list[dict[str, Any]] = [first_line(plan, prints, part is not None)]
    lines += [{"steps": [_step_line(n, d)]} for n, d in found.steps.items()]
    lines += [{"begun": b.line(n)} for n, b in found.begun.items() if n not in found.steps]
    lines += [{"file": n, "sha256": s} for n, s in found.files.items()]
    disk.write_file(state / journal_name(part), b"".join(map(_sealed, lines)))
    if part is None or not is_of(state, plan):
        record_plan(disk, state, plan, marks, part)
    if part is None:
        for path in _of_parts(state):
            disk.remove(path)
    return found


def record_plan(disk: Disk, state: Path, plan: Plan, marks: Marks, part: Part | None = None) -> None:
    """Write down which plan is being carried out, and the files of its result, which are ours."""
    table = summary(plan) | {NAMES: as_table(marks)}
    writer = "" if part is None else f".{part.name}"
    disk.write_file(state / PLAN_NAME, json.dumps(table, indent=1).encode(), writer)


def first_line(plan: Plan, prints: Prints, sampled: bool) -> dict[str, Any]:
    """Return the line that begins a journal: which plan, of which state of the source; `sampled`: for all machines."""
    return {"plan": plan.id, "place": prints.place, "sources": prints.told(sampled)}


def of_file(first: dict[str, Any], number: int, done: Mapping[int, Done], sha256: str | None, mark: str) -> bytes:
    """Return a journal that tells of one file alone, by its steps; `mark` is what it is known by where it lies."""
    steps = {"steps": [_step_line(n, d) for n, d in done.items()]}
    return b"".join(map(_sealed, [first, steps, {"file": number, "sha256": sha256, MARK: mark}]))


MARK = "mark"


def read_of_file(raw: bytes, plan: Plan, prints: Prints) -> tuple[Finished, str]:
    """Return what such a journal tells of the source as it is now, and the mark: nothing, "" where it is none."""
    lines = list(_whole_lines(raw))
    mark = next((m for line in lines if isinstance(m := line.get(MARK), str)), "")
    return _told(lines, plan, prints), mark


def _of_parts(state: Path) -> list[Path]:
    """Return the journals of parts."""
    return sorted(p for p in state.glob("journal-*.jsonl") if p.is_file() and not p.is_symlink())


def finished(state: Path, plan: Plan, prints: Prints) -> Finished:
    """Return what all journals tell. Two tell of one step only where a division was given up for another: both hold."""
    out = Finished()
    for path in (state / JOURNAL_NAME, *_of_parts(state)):
        found = _read(path, plan, prints)
        out.steps |= found.steps
        out.files |= found.files
        out.begun |= found.begun
    return out


_SEAL = "check"


def _sealed(line: dict[str, Any]) -> bytes:
    """Return a line of the journal with its checksum."""
    return json.dumps(line | {_SEAL: _checksum(line)}).encode() + b"\n"


def _checksum(line: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(line, sort_keys=True).encode()).hexdigest()[:16]


def _step_line(n: int, done: Done) -> list[Any]:
    loss = done.loss
    return [n, list(done.digests), None if loss is None else [loss.squared, loss.norm, loss.max_abs]]


def _step_of(line: list[Any], plan: Plan) -> tuple[int, Done]:
    """Return (step number, what is known of it). Raises `ValueError` or the like for a line that is not ours."""
    n, digests, loss = line
    if type(n) is not int or n < 0 or len(digests) != len(plan.steps[n].outputs):
        raise ValueError(f"step {n} has {len(plan.steps[n].outputs)} outputs")
    if not all(_is_digest(d, 32) if plan.hashing else d is None for d in digests):
        raise ValueError(f"step {n}: no digests of this run")
    if loss is not None and not all(type(x) is float and math.isfinite(x) and x >= 0 for x in loss):
        raise ValueError(f"step {n}: no account of what was lost")
    return n, Done(tuple(digests), None if loss is None else Loss(*loss))


def _begun_of(line: list[Any], plan: Plan) -> tuple[int, Begun]:
    """Return (step number, how far it has come). Raises `ValueError` or the like for a line that is not ours."""
    pieces, sizes, entry, cut = line
    if cut != PIECE:
        raise ValueError("of another version")
    n, done = _step_of(entry, plan)
    outputs = plan.steps[n].outputs
    if type(pieces) is not int or pieces < 1 or len(sizes) != len(outputs):
        raise ValueError(f"step {n}: no account of what is there")
    if not all(type(size) is int and 0 < size <= o.size for size, o in zip(sizes, outputs, strict=True)):
        raise ValueError(f"step {n}: more bytes than it has")
    return n, Begun(pieces, tuple(sizes), done)


def _is_digest(value: object, digits: int) -> bool:
    return isinstance(value, str) and len(value) == digits and set(value) <= set("0123456789abcdef")


def _file_of(line: dict[str, Any], plan: Plan) -> int:
    """Return the number of the file that a line calls finished. Raises `ValueError` for a line that is not ours."""
    n, sha256 = line["file"], line["sha256"]
    if type(n) is not int or not 0 <= n < len(plan.files):
        raise ValueError(f"no file {n}")
    if not (_is_digest(sha256, 64) if plan.hashing else sha256 is None):
        raise ValueError(f"file {n}: no sha256 of this run")
    return n


def _whole_lines(journal: bytes) -> Iterable[dict[str, Any]]:
    """Yield the whole lines of a journal; stops at the first that is torn or not ours."""
    with contextlib.suppress(ValueError):
        for raw in journal.splitlines(keepends=True):
            if (line := line_of(raw)) is None:
                return
            yield line


def line_of(raw: bytes) -> dict[str, Any] | None:
    """Return what a line of a journal says; None where it is torn or not ours. Raises `ValueError` as JSON does."""
    line = strict_json.plain(raw) if raw.endswith(b"\n") else None
    if not isinstance(line, dict) or line.pop(_SEAL, None) != _checksum(line):
        return None
    return line


def steps_told(state: Path, part: Part, after: int) -> tuple[set[int], int]:
    """Return numbers of finished steps in a part's journal, from byte `after` on, and the byte to read from next.

    For who looks on while others write: nothing is decided by it.
    """
    steps: set[int] = set()
    name = journal_name(part)
    with contextlib.suppress(OSError, ValueError, TypeError, LookupError, Ds4Error):
        with os.fdopen(open_file(resolve_inside(state, name), name), "rb") as file:
            file.seek(after)
            for raw in file:
                if not raw.endswith(b"\n"):
                    break
                line = line_of(raw)
                if line is None:
                    return steps, 0  # a part that was begun again has written its journal anew
                steps |= {entry[0] for entry in line.get("steps", []) if type(entry[0]) is int}
                after += len(raw)
        return steps, after
    return steps, 0


def _read(path: Path, plan: Plan, prints: Prints) -> Finished:
    with contextlib.suppress(ValueError):
        return _told(_whole_lines(read_own(path.parent, path.name)), plan, prints)
    return Finished()


def _told(journal: Iterable[dict[str, Any]], plan: Plan, prints: Prints) -> Finished:
    """Return what the lines of a journal tell, less what is of source files that have changed since."""
    lines = iter(journal)
    first = next(lines, None)
    if first is None or first.get("plan") != plan.id:
        return Finished()
    before = first.get("sources")
    before = before if isinstance(before, dict) else {}
    place = first.get("place")
    changed = {i for i, s in enumerate(plan.sources) if prints.changed(s.name, before.get(s.name), place)}
    out = Finished()
    with contextlib.suppress(TypeError, ValueError, LookupError):  # a line that is not ours ends the journal
        for line in lines:
            out.steps |= dict(_step_of(entry, plan) for entry in line.get("steps", []))
            if "begun" in line:
                n, begun = _begun_of(line["begun"], plan)
                out.begun[n] = begun
            if "file" in line:
                out.files[_file_of(line, plan)] = line["sha256"]
            changed |= {i for i, s in enumerate(plan.sources) if s.name == line.get("changed")}
    stale = {n for n, s in enumerate(plan.steps) if changed and any(r.file in changed for o in s.operands for r in o)}
    stale_files = {o.file for n in stale for o in plan.steps[n].outputs}
    out.steps = {n: done for n, done in out.steps.items() if n not in stale}
    out.begun = {n: b for n, b in out.begun.items() if n not in stale}
    out.files = {n: sha256 for n, sha256 in out.files.items() if n not in stale_files}
    return out
