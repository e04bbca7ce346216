"""What a machine of the cluster does: it proves itself, and writes a part of the plan.

What goes over the wire is bytes and plain values, so that a machine with another version, or none, can be told by
name: only who has proven itself unpacks the work.
"""

from __future__ import annotations

import pickle
import platform
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ds4convert.errors import Ds4Error, EnvironmentFault, HeaderError
from ds4convert.execution import journal, run
from ds4convert.execution.cluster.proof import Proof, difference, here
from ds4convert.execution.locking import patiently
from ds4convert.execution.ownership import Marks
from ds4convert.execution.rounding_steps import Importance
from ds4convert.execution.run import Way
from ds4convert.files import Disk
from ds4convert.planning.parts import Part
from ds4convert.planning.types import Plan
from ds4convert.storage.byte_source import ByteSource
from ds4convert.storage.state_folder import STATE_FOLDER

Answer = tuple[str, bytes]
"""`proof` with a proof, `refused` with why this machine may not take part, `done`, `stopped`, or `failed` with an
exception, pickled."""

SHARED_S = 30.0
"""How long a folder that another machine has just made may take to be seen here: NFS keeps a look at a folder so long
(acdirmax is 60 s, acdirmin 30 s; nfs(5))."""

HELD_S = 180.0
"""How long the lock of a machine that has died may outlive it: a lease of NFSv4 is 90 s, and a machine that has lost
the head goes on for 60 s before Ray ends it."""


@dataclass(frozen=True)
class Work:
    """What all parts of a plan need; `count` is their number, `source` reads the files wherever it is unpacked."""

    plan: Plan
    out: Path
    source: ByteSource
    marks: Marks
    importance: Importance
    window_bytes: int
    cores: int
    count: int
    disk: Disk


def prove(expected: bytes) -> Answer:
    """Return the proof of this machine for the kinds of rounding that the run's proof has."""
    return "proof", here(Proof.parse(expected).kinds).as_json()


def write(expected: bytes, packed: bytes, number: int) -> Answer:
    """Write part `number`, counted from 1, once this very process has proven itself."""
    try:
        wanted = Proof.parse(expected)
        if told := difference(wanted, here(wanted.kinds)):
            return "refused", told.encode()
        work = _unpacked(packed)
        if told := _elsewhere(work):
            return "refused", told.encode()
        way = Way(
            1, disk=work.disk, importance=work.importance, window_bytes=work.window_bytes,
            part=Part(number, work.count), cores=work.cores,
        )  # fmt: skip
        patiently(lambda: run.write_part(work.source, work.plan, work.out, way, work.marks), HELD_S)
    except KeyboardInterrupt:
        return "stopped", b""
    except HeaderError as e:  # the run has read these files, so it is this machine that has others
        return "refused", f"its copy of the source is not the run's: {e}".encode()
    except Exception as e:
        return "failed", _packed(e)
    return "done", b""


@lru_cache(maxsize=1)
def _unpacked(packed: bytes) -> Work:
    work = pickle.loads(packed)
    assert isinstance(work, Work)
    return work


def _elsewhere(work: Work) -> str | None:
    """Return what is said where the output folder is not the run's: one folder that all machines share."""
    until = time.monotonic() + SHARED_S
    while not journal.is_of(work.out / STATE_FOLDER, work.plan):
        if time.monotonic() > until:
            return (
                f"{work.out} is not the run's folder there; it has to be one folder that all machines share, under "
                "the same path"
            )
        time.sleep(0.5)
    return None


def _packed(error: Exception) -> bytes:
    """Return an exception as bytes; what cannot be packed, or is not meant for users, by its text.

    What the machine itself lacks is told with its name, as only one of several may have a full disk.
    """
    if isinstance(error, EnvironmentFault | OSError) or not isinstance(error, Ds4Error):
        told = str(error) if isinstance(error, EnvironmentFault | OSError) else f"{type(error).__name__}: {error}"
        error = EnvironmentFault(f"{platform.node()}: {told}")
    return pickle.dumps(error)
