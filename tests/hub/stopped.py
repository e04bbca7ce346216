"""Processes that are stopped where the local Hub keeps one of their requests: at a known place, whatever the clock says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.local_hub import LocalHub
from tests.support import ROOT, die_with_parent

PATIENCE = 120
"""Seconds after which a test gives up: far more than any of this takes."""


def started(hub: LocalHub, folder: Path, *words: object) -> subprocess.Popen[str]:
    """Start the program as a client of the Hub, in `folder`."""
    env = os.environ | {"PYTHONPATH": str(ROOT)} | hub.environment()
    command = [sys.executable, "-m", "ds4convert", *map(str, words)]
    return subprocess.Popen(
        command, env=env, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        preexec_fn=die_with_parent,
    )  # fmt: skip


def let_go(hub: LocalHub) -> None:
    """Take the faults back and wait until the Hub is done with all requests, those of killed processes too."""
    hub.faults.clear()
    hub.counters()


def killed(hub: LocalHub, folder: Path, *words: object) -> bool:
    """Run the program until the fault `hold` keeps a request of it, and kill -9 it; return whether it came to that."""
    process = started(hub, folder, *words)
    was_held = hub.faults.held(process)
    process.kill()
    process.communicate(timeout=PATIENCE)
    let_go(hub)
    return was_held
