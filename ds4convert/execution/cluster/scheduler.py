"""The process that talks to Ray for a run: it has machines prove themselves, hands out parts, and tells what comes of
them.

Ray's own retries are off: a part whose worker or machine died is handed out again here, where it can be told to the
user, and counted. Nothing that the run needs to know lies in the cluster; how far it is stands in the journals.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any

from ds4convert.errors import EnvironmentFault
from ds4convert.execution.cluster.proof import Kind, Proof, difference, here
from ds4convert.execution.workers import receive, send

LOOK_S, MACHINES_S = 0.2, 2.0
PROVE_S = 120.0
"""How long a machine may take to prove itself: starting Python and numpy from a network drive is slow."""

ALONE_S = 60.0
"""How long a run waits for a machine when none is left: one that restarts, or that an autoscaler brings."""

MOST_TRIES = 8
"""How often the worker of one part may end without a word: somewhere memory is too small for it."""

STOP_S = 4.0
"""How long parts may take to stop between two pieces, and to record what they have."""


@dataclass(frozen=True)
class Setup:
    """The cluster's address, and the kinds of rounding that its machines have to prove."""

    address: str
    kinds: tuple[Kind, ...]


@dataclass(frozen=True)
class Machine:
    """A machine that has proven itself. `name` is what people know it by."""

    node: str
    name: str
    cpus: int


@dataclass(frozen=True)
class Job:
    """Numbers of parts to be written, those that take longest first; `packed` is the `Work`, `cores` are for each."""

    packed: bytes
    parts: tuple[int, ...]
    cores: int


def bootstrap() -> Callable[..., tuple[str, bytes, str]]:
    """Return the function that runs on a machine: sent whole, as there may be no ds4convert there that knows it."""

    def at_machine(name: str, *given: Any) -> tuple[str, bytes, str]:
        import ray

        node = ray.get_runtime_context().get_node_id()
        try:
            from ds4convert.execution.cluster import task
        except Exception as e:
            told = f"the same version of ds4convert cannot be loaded there ({type(e).__name__}: {e})"
            return "refused", told.encode(), node
        kind, value = getattr(task, name)(*given)
        return kind, value, node

    return at_machine


class Scheduler:
    """The run's side of one cluster. `say` tells the run."""

    def __init__(self, ray: Any, say: Callable[..., None], mine: Proof) -> None:
        self._ray, self._say, self._mine = ray, say, mine
        self._remote = ray.remote(bootstrap())
        self._refused: set[str] = set()
        self.stop = threading.Event()
        self._pending: dict[Any, int] = {}
        self._tries: Counter[int] = Counter()
        self._looked = self._had = time.monotonic()

    def machines(self, cores: int = 1) -> list[Machine]:
        """Return the machines that are there, have so many cores for tasks, and are not refused."""
        found = []
        for node in self._ray.nodes():
            cpus = int(node["Resources"].get("CPU", 0))
            if node["Alive"] and cpus >= cores and node["NodeID"] not in self._refused:
                host, address = node["NodeManagerHostname"], node["NodeManagerAddress"]
                name = f"{host} ({address}, Ray node {node['NodeID'][:8]})"
                found.append(Machine(node["NodeID"], name, cpus))
        return found

    def prove(self) -> list[Machine]:
        """Have every machine prove itself; return those that may take part, and tell of the others."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        asked = {}
        for machine in self.machines():
            there = NodeAffinitySchedulingStrategy(machine.node, soft=False)
            asked[self._submit("prove", num_cpus=0, scheduling_strategy=there)] = machine
        good, until = [], time.monotonic() + PROVE_S
        while asked and not self.stop.is_set() and (left := until - time.monotonic()) > 0:
            done, _ = self._ray.wait(list(asked), timeout=min(left, LOOK_S))
            for ref in done:
                machine = asked.pop(ref)
                if told := self._told(ref):
                    self._refuse(machine.node, machine.name, told)
                else:
                    good.append(machine)
        for ref, machine in asked.items():
            self._refuse(machine.node, machine.name, f"it did not answer in {PROVE_S:.0f} s")
            self._ray.cancel(ref, force=True)
        return good

    def _submit(self, name: str, *given: Any, **options: Any) -> Any:
        return self._remote.options(max_retries=0, **options).remote(name, self._mine.as_json(), *given)

    def _told(self, ref: Any) -> str | None:
        """Return why a machine that was asked for its proof is refused, None where it is not."""
        try:
            kind, value, _ = self._ray.get(ref)
            return difference(self._mine, Proof.parse(value)) if kind == "proof" else value.decode()
        except self._ray.exceptions.RayError as e:
            return f"asked for its proof, it failed: {_first_line(e)}"
        except (ValueError, TypeError, KeyError):
            return "it answers as another version of ds4convert does"

    def _refuse(self, node: str, name: str, why: str) -> None:
        if node not in self._refused:
            self._refused.add(node)
            self._say("refused", name, why)

    def run(self, job: Job) -> None:
        """Have all parts written. Raises what one of them failed with, all others stopped."""
        todo, packed = deque(job.parts), self._ray.put(job.packed)
        most = max(64, 4 * sum(m.cpus // job.cores for m in self.machines(job.cores)))
        try:
            while (todo or self._pending) and not self.stop.is_set():
                while todo and len(self._pending) < most:
                    number = todo.popleft()
                    self._pending[self._begin(job, packed, number)] = number
                done, _ = self._ray.wait(list(self._pending), num_returns=1, timeout=LOOK_S)
                for ref in done:
                    if again := self._ended(ref):
                        todo.append(again)
                self._look_around(job.cores)
        finally:
            self._cancel()

    def _begin(self, job: Job, packed: Any, number: int) -> Any:
        where = {"ray.io/node-id": f"!in({','.join(sorted(self._refused))})"} if self._refused else None
        options: dict[str, Any] = {"label_selector": where} if where else {}
        return self._submit("write", packed, number, num_cpus=job.cores, scheduling_strategy="SPREAD", **options)

    def _ended(self, ref: Any) -> int | None:
        """Take in what became of a part; return its number where it has to be written again."""
        number = self._pending.pop(ref)
        try:
            kind, value, node = self._ray.get(ref)
        except self._ray.exceptions.RayError as e:
            return self._died(number, e)
        if kind == "refused":
            name = next((m.name for m in self.machines(0) if m.node == node), node[:8])
            self._refuse(node, name, value.decode())
            return number
        if kind == "failed":
            raise pickle.loads(value)
        if kind == "done":
            self._say("part", number)
            return None
        return number

    def _died(self, number: int, error: Exception) -> int:
        self._tries[number] += 1
        if self._tries[number] >= MOST_TRIES:
            raise EnvironmentFault(
                f"part {number}: its worker ended {MOST_TRIES} times ({_first_line(error)}); out of memory?",
                hint="give tasks fewer cores or machines more memory, and run the same command: what is finished stays",
            )
        self._say("note", f"a worker or a machine of the cluster ended; part {number} is begun again elsewhere")
        return number

    def _look_around(self, cores: int) -> None:
        """Now and then, see whether there is any machine left."""
        now = time.monotonic()
        if now - self._looked < MACHINES_S:
            return
        self._looked = now
        if self.machines(cores):
            self._had = now
        elif now - self._had > ALONE_S:
            raise EnvironmentFault(
                "no machine of the cluster is left that can take part",
                hint="mend them, or leave out --cluster; what is finished stays",
            )

    def _cancel(self) -> None:
        """Have parts that run stop between two pieces, as Ctrl-C does it."""
        for ref in self._pending:
            self._ray.cancel(ref, force=False)
        if self._pending:
            self._ray.wait(list(self._pending), num_returns=len(self._pending), timeout=STOP_S)
        self._pending.clear()


def _first_line(error: Exception) -> str:
    """Return what Ray says of an error in one line; what follows is where its log files lie."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def serve() -> None:
    """Be the process that talks to Ray."""
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Ray's library prints, too
    lock = threading.Lock()

    def say(kind: str, *values: Any) -> None:
        with lock:
            send(sink, (kind, *values))

    try:
        _serve(source, say)
    except EOFError:
        pass
    except Exception as e:
        try:
            say("failed", e)
        except Exception:
            say("failed", EnvironmentFault(f"the cluster failed: {type(e).__name__}: {_first_line(e)}"))
    else:
        say("ended")
    os._exit(0)  # a thread still waits for orders


def _serve(source: IO[bytes], say: Callable[..., None]) -> None:
    setup: Setup = receive(source)
    import ray

    os.chdir(
        "/"
    )  # Ray has all workers import from the folder that it is started in, which may be a stranger's checkpoint
    try:
        ray.init(address=setup.address, log_to_driver=False, configure_logging=False)
    except Exception as e:  # of many kinds: a cluster of another version, a machine that is not of the cluster, ...
        say("unreachable", " ".join(str(e).split()))
        return
    say("connected")
    try:
        scheduler = Scheduler(ray, say, here(setup.kinds))
        orders = _Orders(source, scheduler.stop)
        say("machines", tuple(scheduler.prove()))
        if (job := orders.job()) is not None:
            before = time.process_time()
            scheduler.run(job)
            say("took", time.process_time() - before)
    finally:
        with contextlib.suppress(Exception):
            ray.shutdown()  # which ends the workers that this run has on all machines


class _Orders:
    """What the run says: a job, or to stop. When it is gone, so is this process, and Ray ends what it had begun."""

    def __init__(self, source: IO[bytes], stop: threading.Event) -> None:
        self._source, self._stop = source, stop
        self._came = threading.Event()
        self._job: Job | None = None
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                order = receive(self._source)
            except (EOFError, OSError):
                os._exit(1)
            if isinstance(order, Job):
                self._job = order
            else:
                self._stop.set()
            self._came.set()

    def job(self) -> Job | None:
        """Return the job, waiting for it; None where the run stops before it has one."""
        self._came.wait()
        return None if self._stop.is_set() else self._job
