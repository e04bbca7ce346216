"""What a running conversion has safely finished, so that a later run goes on from there.

State lies in `OUT/.ds4convert/`: `plan.json` (id and a summary of the plan), `journal.jsonl`, `lock`. Every line of the
journal is appended only after the data that it speaks of has been synced. A torn last line is dropped on reading.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ds4convert.errors import EnvironmentFault, OutputError
from ds4convert.files import Disk, disk_errors
from ds4convert.types import Done, Loss, Plan

STATE_FOLDER = ".ds4convert"
PLAN_NAME, JOURNAL_NAME, LOCK_NAME = "plan.json", "journal.jsonl", "lock"

Fingerprint = tuple[int, int]
"""Size and modification time (ns) of a source file: enough to notice that it was replaced between two runs."""


@dataclass
class Finished:
    """What earlier runs finished: by step number, and sha256 per file number (None where hashing is off)."""

    steps: dict[int, Done] = field(default_factory=dict)
    files: dict[int, str | None] = field(default_factory=dict)


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
    }


def other_plan(state: Path) -> dict[str, Any] | None:
    """Return the summary of the plan whose unfinished run left `state`, or None when it cannot be read."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((state / PLAN_NAME).read_bytes())
        return found if isinstance(found, dict) else None
    return None


def is_of(state: Path, plan: Plan) -> bool:
    """Return whether `state` is what an unfinished run of this very plan left."""
    found = None if state.is_symlink() else other_plan(state)
    return found is not None and found.get("plan") == plan.id


def check_same_plan(state: Path, plan: Plan) -> None:
    """Raise `OutputError` when the unfinished run in this folder followed another plan, saying what differs."""
    found, ours = other_plan(state), summary(plan)
    if found is None:
        _check_untouched(state)
        return
    if found.get("plan") == plan.id:
        return
    differs = [
        f"{k} was {found.get(k)}, now {v}"
        for k, v in ours.items()
        if k not in {"plan", "sources"} and found.get(k) != v
    ]
    if found.get("sources") != ours["sources"]:
        differs.append("the source's headers changed")
    raise OutputError(
        f"{state.parent}: holds an unfinished conversion with other settings ({'; '.join(differs) or 'tool version'}); "
        "repeat the earlier command to finish it, or add --overwrite to start over"
    )


def _check_untouched(state: Path) -> None:
    """Raise `OutputError` when there is more than the state of a run that ended before it recorded its plan."""
    names = sorted(p.name for p in state.parent.iterdir() if not p.name.startswith("."))
    if names:
        raise OutputError(
            f"{state.parent}: {state.name}/{PLAN_NAME} cannot be read, so what is here ({', '.join(names[:5])}) may be "
            "of other settings; choose another folder, or add --overwrite to start over"
        )


class Lock:
    """Holds the output folder for one process."""

    def __init__(self, state: Path) -> None:
        self._fd = os.open(state / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._fd)
            raise EnvironmentFault(
                f"{state.parent}: another ds4convert is writing to this folder; wait for it, or end it"
            ) from None

    def release(self) -> None:
        """Let other processes in."""
        os.close(self._fd)


class Journal:
    """The append side. Safe to use from several threads."""

    def __init__(self, disk: Disk, state: Path) -> None:
        self._disk, self._path, self._lock = disk, state / JOURNAL_NAME, threading.Lock()
        self._fd = disk.open_log(self._path)

    def steps(self, done: Mapping[int, Done]) -> None:
        """Record steps whose bytes have been synced."""
        if done:
            self._append({"steps": [_step_line(n, d) for n, d in done.items()]})

    def file(self, number: int, sha256: str | None) -> None:
        """Record that a file has its final name."""
        self._append({"file": number, "sha256": sha256})

    def _append(self, line: dict[str, Any]) -> None:
        with self._lock, disk_errors("writing", self._path):
            self._disk.append(self._fd, json.dumps(line).encode() + b"\n")

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


def begin(disk: Disk, state: Path, plan: Plan, prints: Mapping[str, Fingerprint]) -> Finished:
    """Return what earlier runs of this plan finished, and write the journal anew with just that.

    Steps that read a source file whose fingerprint has changed since do not count as finished.
    """
    finished = _read(state / JOURNAL_NAME, plan, prints)
    first = {"plan": plan.id, "sources": {name: list(print_) for name, print_ in prints.items()}}
    lines: list[dict[str, Any]] = [first]
    lines += [{"steps": [_step_line(n, d)]} for n, d in finished.steps.items()]
    lines += [{"file": n, "sha256": s} for n, s in finished.files.items()]
    disk.write_file(state / JOURNAL_NAME, b"".join(json.dumps(x).encode() + b"\n" for x in lines))
    disk.write_file(state / PLAN_NAME, json.dumps(summary(plan), indent=1).encode())
    return finished


def _step_line(n: int, done: Done) -> list[Any]:
    loss = done.loss
    return [n, list(done.digests), None if loss is None else [loss.squared, loss.norm, loss.max_abs]]


def _step_of(line: list[Any], plan: Plan) -> tuple[int, Done]:
    """Return (step number, what is known of it). Raises `ValueError` or the like for a line that is not ours."""
    n, digests, loss = line
    if len(digests) != len(plan.steps[n].outputs):
        raise ValueError(f"step {n} has {len(plan.steps[n].outputs)} outputs")
    return n, Done(tuple(digests), None if loss is None else Loss(*map(float, loss)))


def _lines(path: Path) -> Iterable[dict[str, Any]]:
    """Yield the whole lines of a journal; stops at the first that is torn or not ours."""
    with contextlib.suppress(OSError, ValueError):
        for raw in path.read_bytes().splitlines(keepends=True):
            if not raw.endswith(b"\n"):
                return
            line = json.loads(raw)
            if not isinstance(line, dict):
                return
            yield line


def _read(path: Path, plan: Plan, prints: Mapping[str, Fingerprint]) -> Finished:
    lines = iter(_lines(path))
    first = next(lines, None)
    if first is None or first.get("plan") != plan.id:
        return Finished()
    before = first.get("sources")
    before = before if isinstance(before, dict) else {}
    changed = {i for i, s in enumerate(plan.sources) if before.get(s.name) != list(prints[s.name])}
    stale = {n for n, s in enumerate(plan.steps) if changed and any(r.file in changed for o in s.operands for r in o)}
    stale_files = {o.file for n in stale for o in plan.steps[n].outputs}
    out = Finished()
    with contextlib.suppress(TypeError, ValueError, LookupError):  # a line that is not ours ends the journal
        for line in lines:
            found = (_step_of(entry, plan) for entry in line.get("steps", []))
            out.steps |= {n: done for n, done in found if n not in stale}
            if "file" in line and line["file"] not in stale_files:
                out.files[line["file"]] = line["sha256"]
    return out
