"""Started without standard input, output or error (`>&-`), or with one that is full: no bug, no wrong file, a right code.

A closed number is taken by the next file that is opened (POSIX: the lowest that is free), here a shard being written.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import support

PROGRAM = f"{sys.executable} -m ds4convert"


def shell(command: str, folder: Path) -> subprocess.CompletedProcess[bytes]:
    """Run a line of a shell in a folder; PROGRAM in it is the program."""
    env = os.environ | {"PYTHONPATH": str(support.ROOT)}
    return subprocess.run(["bash", "-c", command], cwd=folder, env=env, capture_output=True, timeout=120)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_a_stream_that_is_closed_changes_no_bytes_and_no_code(mini_source: Path, tmp_path: Path, closed: str) -> None:
    assert shell(f"{PROGRAM} quantize {mini_source} right", tmp_path).returncode == 0
    assert shell(f"{PROGRAM} quantize {mini_source} out -v {closed}", tmp_path).returncode == 0
    assert support.tree(tmp_path / "out") == support.tree(tmp_path / "right")
    for words in (f"verify out --source {mini_source}", "inspect out --json", "--help"):
        done = shell(f"{PROGRAM} {words} {closed}", tmp_path)
        assert done.returncode == 0 and b"bug" not in done.stderr, done
    assert shell(f"{PROGRAM} verify {tmp_path} {closed}", tmp_path).returncode == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_standard_output_is_named(mini_source: Path, tmp_path: Path) -> None:
    done = shell(f"{PROGRAM} inspect {mini_source} > /dev/full", tmp_path)
    assert done.returncode == 4 and b"standard output" in done.stderr


def test_a_current_folder_that_is_gone_is_named(mini_source: Path, tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    done = shell(f"cd gone && rmdir ../gone && {PROGRAM} inspect x", tmp_path)
    assert done.returncode in {3, 4} and b"bug" not in done.stderr and b"the system" not in done.stderr
