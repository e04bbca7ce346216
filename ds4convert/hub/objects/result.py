"""A folder of an object store as the place of a result: written here file by file, put there, and dropped here.

State lies in the store, so that any machine goes on from it: under `.ds4convert/` there is `plan.json`, and for each
file that was put a journal of it alone (`00003.jsonl`), which says of which state of the source it was made, its
digests, and the ETag that the store gave it. The order: the file, its journal, and only then is the copy here dropped.
Small files come after all tensors, the manifest last; then the state is removed. Every object is put only where there
is none of its name (`writing`), so what another program, or another run, put there is never replaced.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ds4convert.checkpoint.source import Source
from ds4convert.converted import manifest
from ds4convert.converted.manifest import MANIFEST_NAME
from ds4convert.errors import Ds4Error, EnvironmentFault, InputError, OutputError, UsageError
from ds4convert.execution import journal, run
from ds4convert.execution.completion import Completion
from ds4convert.execution.elsewhere.deposit import Deposit
from ds4convert.execution.journal import Finished, Prints
from ds4convert.execution.locking import Lock
from ds4convert.execution.run import Outcome, Way
from ds4convert.files import Disk, disk_errors
from ds4convert.hub.objects.address import Address
from ds4convert.hub.objects.store import AGAIN
from ds4convert.hub.objects.writing import MOST_BYTES, Stored, Writer, is_md5, mapped, too_large, while_looking
from ds4convert.planning.parts import Part
from ds4convert.planning.types import Done, Plan
from ds4convert.storage import drives, strict_json
from ds4convert.storage.safe_open import MAX_SMALL_BYTES, read_small
from ds4convert.storage.state_folder import PLAN_NAME, STATE_FOLDER
from ds4convert.words.terminal import show

_STATE = re.compile(rf"{re.escape(STATE_FOLDER)}/({re.escape(PLAN_NAME)}|\d{{5,}}\.jsonl)")
OURS = f"{STATE_FOLDER}/{PLAN_NAME}"


def _journal_name(number: int) -> str:
    return f"{STATE_FOLDER}/{number:05}.jsonl"


def folder_here(address: Address, plan: Plan, part: Part | None) -> Path:
    """Return the folder of this machine that a run writes in: one for each place, plan and part."""
    from huggingface_hub import constants

    place = hashlib.sha256(str(address).encode()).hexdigest()[:16]
    name = f"{place}-{plan.id[:16]}{'' if part is None else f'-{part.name}'}"
    return Path(constants.HF_HOME) / "ds4convert" / "results" / name


class StoredResult(Deposit):
    """The files of one plan in a store."""

    keeps = False

    def __init__(self, address: Address, plan: Plan) -> None:
        self.store, self._plan = Writer(address), plan
        self._first: dict[str, Any] = {}
        self._held: set[int] = set()

    # --- before anything is written --------------------------------------------------------------------------------

    def look(self) -> bool:
        """Return whether the whole result is there already. Raises `OutputError` for what is not of this plan."""
        there = self.store.listed()
        if MANIFEST_NAME in there:
            return self._is_done(there)
        if OURS in there:
            self._check_plan()
        elif there:
            raise OutputError(
                f"{self.store.address}: is not empty (it holds {_some(there)}), and no unfinished conversion",
                hint="choose another folder; nothing in a store is replaced",
            )
        sizes = {f.name: f.size for f in self._plan.files}
        if (name := too_large(sizes, self.store.address.scheme)) is not None:
            raise UsageError(
                f"{self.store.address}: {name} will have {sizes[name]:,} bytes, and this kind of store takes at most "
                f"{MOST_BYTES[self.store.address.scheme]:,} in a request that replaces nothing",
                hint="choose a smaller --max-shard-size; where one tensor alone is larger, write to a folder here",
            )
        return False

    def _is_done(self, there: Mapping[str, Stored]) -> bool:
        raw = self.store.read(MANIFEST_NAME, manifest.MAX_BYTES)
        found = None
        with suppress(InputError):
            found = manifest.parsed(raw or b"")
        if found is None or found.plan != self._plan.id:
            raise OutputError(
                f"{self.store.address}: holds another conversion",
                hint="choose another folder, or remove that one with the store's own program",
            )
        if lacking := self._lacking(there):
            raise OutputError(
                f"{self.store.address}: has the manifest of this conversion, but {_some(lacking)} is missing or of "
                "another size",
                hint="remove the manifest with the store's own program, and run the same command again: it makes what "
                "is missing",
            )
        return True

    def _lacking(self, there: Mapping[str, Stored]) -> list[str]:
        """Return the files of the result that are not there with their size."""
        sizes = {f.name: f.size for f in self._plan.files}
        small = [n for n in (*self._plan.texts, *self._plan.copies) if MANIFEST_NAME in there and n not in there]
        return [n for n, size in sizes.items() if n not in there or there[n].size != size] + small

    def _check_plan(self) -> None:
        """Raise `OutputError` where the unfinished conversion there is of another plan."""
        table = None
        with suppress(ValueError):
            table = strict_json.plain(self.store.read(OURS, MAX_SMALL_BYTES) or b"")
        if not isinstance(table, dict):
            raise OutputError(f"{self.store.address}: {OURS} cannot be read", hint="choose another folder")
        if table.get("plan") == self._plan.id:
            return
        told = journal.differences(table, journal.summary(self._plan))
        command = table.get("command")
        again = f" ({show(command, 4096)})" if isinstance(command, str) and command else ""
        raise OutputError(
            f"{self.store.address}: holds an unfinished conversion with other settings ({told})",
            hint=f"choose another folder, or run the command that began it again to finish it{again}",
        )

    # --- what a run asks -------------------------------------------------------------------------------------------

    def begin(self, plan: Plan, prints: Prints) -> Finished:
        """Return what was put there before, as it was recorded and as it still lies there; leave the plan there."""
        self._first = journal.first_line(plan, prints, True)
        text = json.dumps(journal.summary(plan), indent=1).encode()
        if not self.store.put_new(OURS, text):
            self._check_plan()
        if self.store.put_new(OURS, text):
            raise EnvironmentFault(
                f"{self.store.address}: this store replaces objects although it is asked not to (If-None-Match), so "
                "what lies there would not be safe; write to a folder here, and copy it"
            )
        there, out = self.store.listed(), Finished()
        for number, file in enumerate(plan.files):
            if (stored := there.get(file.name)) is None or _journal_name(number) not in there:
                continue
            found, etag = journal.read_of_file(
                self.store.read(_journal_name(number), MAX_SMALL_BYTES) or b"", plan, prints
            )
            if number in found.files and stored == Stored(file.size, etag) and self._tells_all(found, number):
                self._held.add(number)
                out = Finished(out.steps | found.steps, out.files | found.files)
        return out

    def _tells_all(self, found: Finished, number: int) -> bool:
        return {n for n, s in enumerate(self._plan.steps) if s.outputs[0].file == number} <= found.steps.keys()

    def holds(self, number: int) -> bool:
        """Return whether a file of the plan was there when the run began, as it was recorded."""
        return number in self._held

    def put(
        self, number: int, path: Path, done: Mapping[int, Done], sha256: str | None, look: Callable[[], None]
    ) -> None:
        """Put a whole file there and record it. Raises `OutputError` where another object has its name."""
        with mapped(path) as data:
            stored = while_looking(lambda: self._put(self._plan.files[number].name, data), look)
        record = journal.of_file(self._first, number, done, sha256, stored.etag)
        while_looking(lambda: self.store.put_new(_journal_name(number), record), look)

    def _put(self, name: str, data: Any) -> Stored:
        """Put bytes there and return what the store tells of them, also where it has just these already."""
        new = self.store.put_new(name, data)
        stored = self.store.look(name)
        if stored is None or (new and stored.size != len(data)):
            raise EnvironmentFault(
                f"{self.store.address}: {name}: was put there with {len(data):,} bytes and is not there as such: "
                f"something else changes this folder. {AGAIN}"
            )
        if not new:
            self._check_same(name, stored, data)
        elif not is_md5(stored.etag, data):
            drives.note(
                f"{self.store.address}: the store tells no digest of what it holds (its ETag is not the MD5): sizes "
                "were compared, and `ds4convert verify` on a copy compares the sha256 of every file"
            )
        return stored

    def _check_same(self, name: str, stored: Stored, data: Any) -> None:
        """Raise `OutputError` unless what has the name there has these bytes; tell that another was first."""
        if not self.store.is_same(name, stored, data):
            raise OutputError(
                f"{self.store.address}: {name}: another object has that name ({stored.size:,} bytes, ETag "
                f"{show(stored.etag)}), and other bytes than this run made; it was not replaced",
                hint="where another run of this command put it, run the command again: it takes over what that one "
                "recorded. Else choose another folder, or remove it with the store's own program",
            )
        drives.note(
            f"{self.store.address}: {name} was there already, with just the bytes that this run made: it counts"
        )

    def end(self, out: Path, small: Sequence[str], manifest: str) -> None:
        """Put the small files and, when all is there, the manifest; then remove the state."""
        for name in small:
            self._put(name, read_small(out, name))
        if lacking := self._lacking(self.store.listed()):
            raise EnvironmentFault(
                f"{self.store.address}: {_some(lacking)} was put there and is gone or of another size: something else "
                f"changes this folder. {AGAIN}"
            )
        self._put(manifest, read_small(out, manifest, MAX_SMALL_BYTES))
        self.clean()

    def clean(self) -> None:
        """Remove the state of a conversion that has ended."""
        try:
            if state := [n for n in self.store.listed() if _STATE.fullmatch(n)]:
                self.store.delete(state)
        except Ds4Error as e:
            drives.note(f"{e}. The result is whole; what is left under {STATE_FOLDER}/ may be removed")


def _some(names: Sequence[str] | Mapping[str, Stored]) -> str:
    shown = [show(n) for n in sorted(names)]
    return ", ".join(shown[:5]) + (", ..." if len(shown) > 5 else "")


def carry_out(source: Source, plan: Plan, address: Address, way: Way, ending: Completion | None) -> Outcome:
    """Carry out `plan` into a folder of a store, going on from what earlier runs put there.

    Raises `InputError`, `EnvironmentFault` or `UsageError`; what was put there stays, and the same call goes on.
    """
    if way.overwrite:
        raise UsageError(
            f"--overwrite and {address}: nothing in a store is replaced",
            hint="remove what is there with the store's own program, or choose another folder",
        )
    result, here = StoredResult(address, plan), folder_here(address, plan, way.part)
    _clear_others(here)
    if done := result.look():
        result.clean()
        outcome = Outcome(plan, here / MANIFEST_NAME, True, True)
    else:
        outcome = run.run(source, plan, here, replace(way, deposit=result), ending)
    if done or outcome.complete or way.part is not None:
        with disk_errors("removing", here):
            Disk().remove(here)
    return outcome


def _clear_others(here: Path) -> None:
    """Remove what runs of other plans for the same place left on this machine, unless one is at work."""
    place, plan = here.name.split("-")[:2]
    for other in here.parent.glob(f"{place}-*") if here.parent.is_dir() else ():
        state = other / STATE_FOLDER
        if other.name.split("-")[1] == plan or not state.is_dir():
            continue
        with suppress(Ds4Error, OSError):
            lock = Lock(state)
            try:
                Disk().remove(other)
            finally:
                lock.release()
