"""Ctrl-C, `kill`, a lost terminal: the run stops within seconds, says how to go on, and the same command goes on.

The signal comes when a file that the run writes is there, not after a time: at the beginning, in the midst, at the end.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ds4convert import interrupts
from tests import support
from tests import support_run as s

MOMENTS = ("lock", "journal.jsonl", "*.partial", "*.safetensors")
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
SECONDS = 60  # how long a loaded machine may take; a run that never stops is what is looked for


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("signals") / "source"
    return s.tiny(out, layers=2, experts=80, hidden_size=1024, moe_intermediate_size=512, vocab_size=2048)


@pytest.fixture(scope="module")
def wanted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("wanted") / "mlx"
    s.run(source, out, max_shard_bytes=30_000_000)
    return s.contents(out)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("number", "when"),
    support.combined(
        CODES, MOMENTS, is_repetition=lambda n, when: MOMENTS.index(when) % len(CODES) != list(CODES).index(n)
    ),
)
def test_a_signal_stops_a_run_that_the_same_command_finishes(
    source: Path, wanted: dict[str, str], number: signal.Signals, when: str, tmp_path: Path
) -> None:
    out = tmp_path / "mlx"
    command = ["quantize", source, out, "--max-shard-size", "30MB"]
    child = s.start(*command)
    folder = out if "*" in when else out / ".ds4convert"
    while child.poll() is None and not (folder.is_dir() and any(folder.glob(when))):
        time.sleep(0.001)
    child.send_signal(number)
    _, err = child.communicate(timeout=SECONDS)
    assert "Traceback" not in err and "Exception ignored" not in err, err
    # It may have been at its end already: then it says nothing of an interruption, and all is there.
    if child.returncode not in {0, -number}:
        assert child.returncode == CODES[number] and "same command" in err, err
    s.cli(*command)
    assert s.contents(out) == wanted


LOADING = """
import os, signal, sys
sys.argv = [{program!r}, "--help"]
class Ends:
    def find_spec(self, name, path=None, target=None):
        if name == "click":
            os.kill(os.getpid(), {number})
sys.meta_path.insert(0, Ends())
import ds4convert.__main__
print("loaded")
"""


@pytest.mark.parametrize("number", list(CODES), ids=lambda n: n.name)
def test_a_signal_while_the_program_is_loaded_gives_no_traceback(number: signal.Signals) -> None:
    code = LOADING.format(program="/usr/local/bin/ds4convert", number=int(number))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=s.environment(), check=False
    )
    assert done.returncode == CODES[number] and "loaded" not in done.stdout
    assert done.stderr == interrupts.SAID.decode()


def test_a_program_that_imports_ours_keeps_its_own_handlers() -> None:
    code = (
        "import signal, sys; sys.argv = ['pytest/__main__.py']; import ds4convert.__main__; print(signal.getsignal(2))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=s.environment(), check=True)
    assert "default_int_handler" in done.stdout


TWICE = """
import os, signal, sys, time
from ds4convert import interrupts
interrupts.heed()
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
except KeyboardInterrupt:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)  # tidying up that takes its time
"""


def test_a_second_signal_ends_the_process_at_once() -> None:
    done = subprocess.run(
        [sys.executable, "-c", TWICE], capture_output=True, text=True, env=s.environment(), check=False
    )
    assert done.returncode == 130 and "Traceback" not in done.stderr


def test_what_nohup_ignores_stays_ignored(source: Path, wanted: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "mlx"
    child = s.start(
        "quantize", source, out, "--max-shard-size", "30MB",
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )  # fmt: skip
    while child.poll() is None and not any(out.glob("*.partial")):
        time.sleep(0.001)
    os.kill(child.pid, signal.SIGHUP)
    assert child.wait(SECONDS) == 0
    assert s.contents(out) == wanted
