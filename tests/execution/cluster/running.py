"""A Ray cluster for tests (`nodes.py` in a process of its own), and what its processes are doing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests import support
from tests import support_run as s
from tests.execution.cluster import nodes

LIMIT_S = 240
"""How long anything here is waited for: on a busy machine Ray alone takes a minute to start."""

SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_raylet_start_wait_time_s": str(LIMIT_S),
    # A machine that refuses connections is given up after 5 s in place of 15 (ray_config_def.h); one that is merely
    # slow, on a busy computer, is not: that timeout stays as it is.
    "RAY_health_check_period_ms": "1000",
}


class Cluster:
    """The machines of a cluster; the first is its head, which has no cores for tasks."""

    def __init__(self, folder: Path) -> None:
        self._log = (folder / "nodes.log").open("w")
        self.process = subprocess.Popen(
            [sys.executable, nodes.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
            env=s.environment() | SETTINGS, preexec_fn=support.die_with_parent,
        )  # fmt: skip
        self.address = str(self._answer()["address"])
        self.raylets: list[int] = []
        """The process of each machine but the head's."""

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the cluster did not start: " + Path(self._log.name).read_text()[-2000:]
        return dict(json.loads(line))

    def order(self, **what: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def add(self, cpus: int = 1, env: dict[str, str] | None = None) -> int:
        """Add a machine and return its number."""
        self.raylets.append(int(self.order(cpus=cpus, env=env or {})["raylet"]))
        return len(self.raylets)

    def writing(self, machine: int | None = None) -> list[int]:
        """Return the workers that are at work for a run, of one machine or of all: Ray names them by their task."""
        raylets = self.raylets if machine is None else [self.raylets[machine - 1]]
        return [p for r in raylets for p in nodes.descendants(r) if command(p).startswith("ray::at_machine")]

    def rounding(self) -> list[int]:
        """Return the processes of ours below the machines: those that round for a worker."""
        below = (p for r in self.raylets for p in nodes.descendants(r))
        return [p for p in below if "ds4convert.execution.workers" in command(p)]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(60)
        finally:
            self.process.kill()
            self._log.close()


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


@contextmanager
def cluster(folder: Path, *machines: dict[str, str]) -> Iterator[Cluster]:
    """Yield a cluster of machines with one core each, with these variables in their environments."""
    found = Cluster(folder)
    try:
        for env in machines:
            found.add(env=env)
        yield found
    finally:
        found.close()


def until(true: Callable[[], object], process: subprocess.Popen[str] | None = None, what: str = "") -> None:
    """Wait for something to be so, while a process runs."""
    end = time.monotonic() + LIMIT_S
    while not true():
        if process is not None and process.poll() is not None:
            raise AssertionError(f"it ended before {what}: {process.communicate()}")
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.02)


def begun(out: Path) -> list[str]:
    """Return the files of a folder that are being written."""
    return sorted(p.name for p in out.glob("*.partial"))


def ended(process: subprocess.Popen[str], code: int) -> str:
    """Wait for a run to end with an exit code; return what it said on standard error."""
    out, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == code, (process.returncode, out, err)
    assert "Traceback" not in err, err
    return err


def changed_package(to: Path) -> dict[str, str]:
    """Return the environment of a machine with another state of our code, of the same version: one comment differs."""
    shutil.copytree(
        s.ROOT / "ds4convert", to / "ds4convert", symlinks=False, ignore=shutil.ignore_patterns("__pycache__")
    )
    with (to / "ds4convert" / "formats" / "affine.py").open("a") as file:
        file.write("# changed\n")
    return {"PYTHONPATH": str(to)}


SHADOW = """
import sys

here = {here!r}
path, sys.path[:] = sys.path[:], [p for p in sys.path if p != here]
del sys.modules["numpy"]
import numpy

sys.path[:] = path
plain = numpy.rint
numpy.rint = lambda x, *given, **more: plain(numpy.add(x, numpy.float32(0.0625)), *given, **more)
sys.modules["numpy"] = numpy
"""


def other_arithmetic(to: Path) -> dict[str, str]:
    """Return the environment of a machine whose numpy, of the same version, rounds upwards from 0.4375 on."""
    (to / "numpy").mkdir(parents=True)
    (to / "numpy" / "__init__.py").write_text(SHADOW.format(here=str(to)))
    return {"PYTHONPATH": os.pathsep.join([str(to), str(s.ROOT)])}


def interrupt(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGINT)
