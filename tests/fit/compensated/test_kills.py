"""A compensated run that is killed again and again ends with the bytes of one that was left alone."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import support_run as s
from tests.fit.compensated.test_compensated_runs import TINY, converted, tensors

RUN = (
    "import sys; from pathlib import Path; from tests.fit.compensated.test_compensated_runs import TINY, converted;"
    "converted(TINY, Path(sys.argv[1]))"
)


def looks(out: Path) -> list[tuple[str, int]]:
    """Return names and sizes of all files of a run."""
    found = []
    for path in sorted(out.rglob("*")):
        try:
            found.append((str(path), path.stat().st_size))
        except OSError:  # it went just now
            pass
    return found


def killed(out: Path, after: int) -> bool:
    """Run until the folder has changed so many times, then kill; return whether the run was still at it."""
    child = subprocess.Popen([sys.executable, "-c", RUN, str(out)], cwd=s.ROOT)
    try:
        last, changes = looks(out), 0
        while changes < after and child.poll() is None:
            now = looks(out)
            changes, last = changes + (now != last), now
            time.sleep(0.002)
    finally:
        child.kill()
        child.wait()
    return child.returncode < 0


@pytest.mark.slow
@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.nightly)])
def test_a_run_killed_at_random_points_ends_with_the_same_bytes(kills: int, tmp_path: Path) -> None:
    rng, out = random.Random(kills), tmp_path / "mlx"
    hits = [killed(out, rng.randint(3, 30)) for _ in range(kills)]
    assert any(hits)
    assert tensors(converted(TINY, out)) == tensors(converted(TINY, tmp_path / "whole"))
