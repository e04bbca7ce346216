"""Worker processes: the same results as without them, errors that arrive, and none that outlives a run."""

from __future__ import annotations

import functools
import operator
import os
import signal
import subprocess
import sys
import time

import pytest

from ds4convert.errors import EnvironmentFault
from ds4convert.execution.workers import Pool
from ds4convert.fit import forecast
from ds4convert.formats.rounding import Encoded
from tests import support_run as s


@pytest.mark.parametrize("processes", [False, True])
def test_results_and_errors_of_work_arrive(processes: bool) -> None:
    with Pool(processes) as pool:
        futures = [pool.submit(functools.partial(operator.mul, n, n)) for n in range(20)]
        assert [f.result() for f in futures] == [n * n for n in range(20)]
        with pytest.raises(ZeroDivisionError):
            pool.submit(functools.partial(operator.truediv, 1, 0)).result()
        assert pool.submit(os.getpid).result() == os.getpid() or processes


def test_rounding_gives_the_same_bytes_in_another_process() -> None:
    chunk = forecast._chunk("fp4", "affine-3-g64", "optimal", 64)
    with Pool(True) as pool:
        there, here = pool.submit(chunk.encoded).result(), chunk.encoded()
    assert isinstance(there, Encoded) and isinstance(here, Encoded)
    assert (there.weight == here.weight).all() and (there.scales == here.scales).all()
    assert there.squared == here.squared


def test_a_worker_that_was_killed_is_told_of_as_a_fault_of_the_machine() -> None:
    with Pool(True) as pool:
        pid = pool.submit(os.getpid).result()
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(EnvironmentFault, match="worker process ended"):
            for _ in range(2 * pool.cores):  # one of them is the one that died
                pool.submit(os.getpid).result()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_workers_end_with_a_run_that_was_killed() -> None:
    script = (
        "import os, sys, time\nfrom ds4convert.execution.workers import Pool\n"
        "pool = Pool(True)\nprint(pool.submit(os.getpid).result(), flush=True)\ntime.sleep(60)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=s.environment())
    assert child.stdout is not None
    worker = int(child.stdout.readline())
    assert _alive(worker)
    child.kill()
    child.wait()
    deadline = time.monotonic() + 60
    while _alive(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(worker)
