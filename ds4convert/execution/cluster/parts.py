"""The run's side of a cluster: it has the parts of a plan written there, and knows how far they are from the journals.

Everything that Ray does happens in a process that this one starts (`scheduler`). Whatever becomes of that, the user
gets our words and our exit code, and what is finished stays.
"""

from __future__ import annotations

import contextlib
import pickle
import queue
import re
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ds4convert.checkpoint.source import Source
from ds4convert.errors import EnvironmentFault, UsageError
from ds4convert.execution import journal, run
from ds4convert.execution.cluster import proof
from ds4convert.execution.cluster.scheduler import PROVE_S, Job, Machine, Setup
from ds4convert.execution.cluster.task import HELD_S, Work
from ds4convert.execution.completion import Completion
from ds4convert.execution.feeders.child import Child, Message
from ds4convert.execution.locking import Lock, patiently
from ds4convert.execution.prefetch import LEAST_WINDOW
from ds4convert.execution.run import Looked, Outcome, Way
from ds4convert.execution.sources import Sources
from ds4convert.execution.workers import FED, MOST_FED
from ds4convert.planning import parts as division
from ds4convert.planning.parts import Part
from ds4convert.planning.types import Plan
from ds4convert.storage.state_folder import STATE_FOLDER
from ds4convert.words.terminal import show

SERVE = "from ds4convert.execution.cluster.scheduler import serve; serve()"
LOOK_S, JOURNALS_S = 0.2, 2.0
REACH_S = 5.0
"""How long the head may take to accept a connection."""

CONNECT_S = 90.0
"""How long Ray may take to connect, and this process to round its samples."""

STOP_S = 7.0
"""How long the process that talks to Ray may take to end once it is told to."""

SAFE = "What is finished is safe: run the same command again, with --cluster or without"


@dataclass(frozen=True)
class Voice:
    """How a run tells the user, in a sentence each, what happens on the cluster."""

    detail: Callable[[str], None]
    note: Callable[[str], None]
    warn: Callable[[str], None]


def check_address(address: str) -> tuple[str, int] | None:
    """Return host and port of a cluster's head, None for `auto`. Raises `UsageError` for all else."""
    if address == "auto":
        return None
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9._-]+):(\d{1,5})", address, re.ASCII)
    if match is None or not 0 < int(match[2]) < 65536:
        raise UsageError(
            f"--cluster {show(address)}: expected HOST:PORT of the head, as `ray start --head` printed it, or auto on "
            "a machine of the cluster"
        )
    return match[1].strip("[]"), int(match[2])


def check_installed() -> None:
    """Raise `EnvironmentFault` where Ray is not installed."""
    found = find_spec("ray")
    if found is None or found.origin is None:
        raise EnvironmentFault(
            "--cluster needs the library Ray: install ds4convert with its extra, pip install 'ds4convert[ray]', on all "
            "machines of the cluster"
        )


def _check_reached(address: str) -> None:
    if (place := check_address(address)) is None:
        return
    try:
        socket.create_connection(place, timeout=REACH_S).close()
    except OSError as e:
        raise EnvironmentFault(
            f"--cluster {address}: nothing answers there ({e.strerror or e})",
            hint="start the head with `ray start --head`, name the address that it printed, or leave out --cluster",
        ) from None


class Link:
    """The process that talks to Ray."""

    def __init__(self, address: str, voice: Voice) -> None:
        self._address, self._voice = address, voice
        self._heard: queue.SimpleQueue[tuple[Child, Message]] = queue.SimpleQueue()
        self._child = Child(SERVE, self._heard)

    def machines(self, plan: Plan) -> list[Machine]:
        """Return the machines that have proven themselves for the plan."""
        self._child.order(Setup(self._address, proof.kinds_of(plan)))
        until = time.monotonic() + CONNECT_S
        found: list[Machine] = []

        def act(kind: str, values: tuple[Any, ...]) -> bool:
            nonlocal until
            until += PROVE_S + CONNECT_S if kind == "connected" else 0
            found.extend(values[0] if kind == "machines" else ())
            return kind == "machines"

        while not self.hear(act):
            if time.monotonic() > until:
                raise EnvironmentFault(
                    f"--cluster {self._address}: something listens there, but it does not answer as a Ray head",
                    hint="name the address that `ray start --head` printed",
                )
        if not found:
            raise EnvironmentFault(
                f"--cluster {self._address}: no machine there can take part, for the reasons told above; nothing was "
                "written",
                hint="mend them, or leave out --cluster",
            )
        return found

    def work(self, job: Job, look: Callable[[], None]) -> float:
        """Have parts written; `look` is called now and then. Raises what a part, or the cluster, failed with.

        Returns the seconds of processor time that the process which talks to Ray took for it.
        """
        self._child.order(job)
        took: list[float] = []

        def act(kind: str, values: tuple[Any, ...]) -> bool:
            took.extend(values if kind == "took" else ())
            return kind == "ended"

        while not self.hear(act):
            look()
        look()
        return sum(took)

    def hear(self, act: Callable[[str, tuple[Any, ...]], bool]) -> bool:
        """Take in a message if there is one; return what `act` does."""
        try:
            _, (kind, *values) = self._heard.get(timeout=LOOK_S)  # looks up, so that a signal arrives
        except queue.Empty:
            return False
        if kind == "refused":
            self._voice.warn(f"{show(values[0])} takes no part: {show(values[1], 4096)}")
        elif kind == "note":
            self._voice.note(show(values[0], 4096))
        elif kind == "unreachable":
            raise EnvironmentFault(
                f"--cluster {self._address}: Ray cannot join: {show(values[0], 1000)}",
                hint="This machine has to be one of the cluster's: `ray start --address=HOST:PORT --num-cpus=0` makes "
                "it one that only hands out work",
            )
        elif kind == "failed":
            raise values[0]
        elif kind == "gone":
            self._child.over = True
            raise EnvironmentFault(
                f"--cluster {self._address}: the connection to the cluster was lost; its head, or Ray on this machine, "
                "has ended",
                hint=SAFE,
            )
        return act(kind, tuple(values))

    def close(self) -> None:
        """End the process: at once where it has ended its work, else when it has stopped what it had begun."""
        self._child.order("stop")
        with contextlib.suppress(Exception):
            self._child.process.wait(STOP_S)
        self._child.close()


class Journals:
    """How far parts are, by the steps that their journals tell."""

    def __init__(self, plan: Plan, state: Path, parts: list[Part], progress: Callable[[int], None]) -> None:
        self._state, self._progress = state, progress
        self._sizes = [sum(o.size for o in s.outputs) for s in plan.steps]
        self._at = dict.fromkeys(parts, 0)
        self._seen: set[int] = set()
        self._looked = 0.0

    def look(self) -> None:
        """Count what was finished since the last look, if that was a while ago."""
        if time.monotonic() - self._looked < JOURNALS_S:
            return
        for part, at in self._at.items():
            steps, self._at[part] = journal.steps_told(self._state, part, at)
            self.count(steps)
        self._looked = time.monotonic()

    def count(self, steps: set[int]) -> None:
        """Count finished steps, each once."""
        new = {n for n in steps - self._seen if n < len(self._sizes)}
        self._seen |= new
        if new:
            self._progress(sum(self._sizes[n] for n in new))


def write(
    source: Source, plan: Plan, out: Path, way: Way, address: str, voice: Voice, ending: Completion | None = None
) -> Outcome:  # fmt: skip
    """Have the files of a plan written by the machines of a cluster into `out`, which they all share.

    The ordinary run of the plan then ends the conversion. Returns its outcome where it has ended already. Raises what
    that run raises, and `EnvironmentFault` for a cluster that cannot be reached, or is lost.
    """
    check_address(address)
    check_installed()
    found = run.look(source, plan, out, way, ending)
    if isinstance(found, Outcome):
        return found
    _check_reached(address)
    link = Link(address, voice)
    try:
        machines = link.machines(plan)
        if done := run.begin_parts(plan, out, found):
            return done
        return _written(source, plan, out, found, link, machines, voice)
    finally:
        link.close()


def _written(
    source: Source, plan: Plan, out: Path, found: Looked, link: Link, machines: list[Machine], voice: Voice
) -> Outcome:  # fmt: skip
    way, state = found.way, out / STATE_FOLDER
    count, cores, at_once = _divided(plan, machines, way)
    lock = Lock(state, Part(0, count))  # no part's own, but beside all of them: no whole run begins meanwhile
    try:
        lock.share()
        sources = Sources(source.bytes, plan)
        try:
            earlier = journal.finished(state, plan, sources.prints)
        finally:
            sources.close()
        todo = [s for s in division.shares(plan, count) if not earlier.files.keys() >= set(s.files)]
        todo.sort(key=lambda s: -s.cost)
        window = max(LEAST_WINDOW, way.window_bytes // at_once) if way.window_bytes else 0
        work = Work(
            plan, _absolute(out), source.bytes, found.ending.marks, way.importance, window, cores, count, way.disk
        )
        all_cores = sum(m.cpus for m in machines)
        voice.note(
            f"cluster: {_number(len(machines), 'machine')} with {_number(all_cores, 'core')}, "
            f"{_number(len(todo), 'part')} to write, {_number(cores, 'core')} each"
        )
        journals = Journals(plan, state, [s.part for s in todo], way.progress)
        journals.count(set(earlier.steps))
        if todo:
            before, packed = time.process_time(), pickle.dumps(work, pickle.HIGHEST_PROTOCOL)
            there = link.work(Job(packed, tuple(s.part.number for s in todo), cores), journals.look)
            took = time.process_time() - before + there
            voice.detail(
                f"handing out {len(todo)} parts took {took:.2f} s of processor time here, {took / len(todo):.3f} s each"
            )
    finally:
        lock.release()
    return Outcome(plan, out, bool(earlier.steps or earlier.files), False, complete=False)


def _number(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def _absolute(out: Path) -> Path:
    return Path.cwd() / out


def _divided(plan: Plan, machines: list[Machine], way: Way) -> tuple[int, int, int]:
    """Return the number of parts, the cores for each, and how many are written at once.

    A part of files that lie on the machines is about one file: one that is lost costs little, and none waits long for
    the last. Where the source is fetched, neighbouring files share most of what they read: as many parts as can run.
    """
    here = not way.window_bytes
    all_cores, least = sum(m.cpus for m in machines), min(m.cpus for m in machines)
    if here:
        files = len(plan.files)
        used = len(set(division.divided(division.costs(plan), files)))
        cores = max(1, min(FED, least, all_cores // used))
        return min(files, division.MOST_PARTS), cores, all_cores // cores
    cores = min(MOST_FED, least)
    at_once = max(1, min(len(plan.files), sum(m.cpus // cores for m in machines)))
    return at_once, cores, at_once


def finish(
    source: Source, plan: Plan, out: Path, way: Way, begun: Outcome, ending: Completion | None = None
) -> Outcome:  # fmt: skip
    """End the conversion whose parts were written: the ordinary run, once machines that were lost have let go."""
    ended = patiently(lambda: run.run(source, plan, out, replace(way, overwrite=False), ending), HELD_S)
    return replace(ended, resumed=begun.resumed)
