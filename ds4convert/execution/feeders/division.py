"""How the cores of a machine are divided over the processes of a run.

One interpreter takes and hands on all bytes that its workers round. So a run on many cores has a process for every
eight of them (`workers.FED`), which writes whole files: it reads, hashes and writes them, and feeds its own workers.
"""

from __future__ import annotations

from dataclasses import dataclass

from ds4convert.execution import workers
from ds4convert.execution.rounding_steps import STORES
from ds4convert.formats.second_moments import COMPENSATED
from ds4convert.planning.types import Plan


@dataclass(frozen=True)
class Division:
    """The workers of each process that writes files; `apart`: there are several such processes beside the run's own."""

    workers: tuple[int, ...]
    in_processes: bool

    @property
    def apart(self) -> bool:
        """Return whether files are written by processes of their own."""
        return len(self.workers) > 1

    @property
    def all_workers(self) -> int:
        """Return the number of workers in all."""
        return sum(self.workers)


def divided(plan: Plan, cores: int, files: int | None = None, here: bool = True) -> Division:
    """Return how the cores are divided for so many files of a plan: all of them if not said.

    Where nothing is rounded, copying is all there is, which threads do. Compensated rounding goes layer by layer, and a
    source elsewhere (`here` false) is read through one window: there one process feeds all workers that it can.
    """
    rounded = [s for s in plan.steps if s.transform in STORES]
    if not rounded:
        return Division((0,), False)
    compensated = any(s.params.get("rounding") == COMPENSATED for s in rounded)
    if not (compensated or workers.uses_processes(sum(s.weights for s in rounded), cores)):
        return Division((min(cores, workers.FED),), False)
    several = here and not compensated
    count = max(1, min(-(-cores // workers.FED), len(plan.files) if files is None else files)) if several else 1
    shares = [cores // count + (n < cores % count) for n in range(count)]
    return Division(tuple(min(share, workers.MOST_FED) for share in shares), True)
