"""A full disk and a small memory: what is free is checked first, what runs out is told, and the next run goes on."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ds4convert.errors import EnvironmentFault
from ds4convert.files import Disk, free_bytes
from tests import support
from tests import support_run as s

MB = 1_000_000
LARGE = {"hidden_size": 512, "moe_intermediate_size": 256, "vocab_size": 2048}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 60 MB."""
    return s.tiny(tmp_path_factory.mktemp("room") / "source", experts=32, **LARGE)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source of 200 MB, whose largest stacked tensors have 21 MB."""
    out = tmp_path_factory.mktemp("large") / "source"
    return s.tiny(out, layers=2, experts=80, hidden_size=1024, moe_intermediate_size=512, vocab_size=2048)


@contextlib.contextmanager
def small_disk(at: Path, size: int) -> Iterator[Path]:
    """Mount a disk of `size` bytes in memory; skip the test where that is not allowed."""
    at.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(at)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        yield at
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)


def test_too_little_room_is_told_before_anything_is_written(source: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 40 * MB) as disk:
        done = s.cli("quantize", source, disk / "mlx", exit_code=4)
        assert "Nothing was written" in done.stderr and "40,0" in done.stderr.replace("39,9", "40,0")
        assert list(disk.iterdir()) == []


def test_the_room_that_is_missing_is_what_would_do(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 10 * MB
    monkeypatch.setattr("ds4convert.execution.run.free_bytes", lambda path: free)
    with pytest.raises(EnvironmentFault, match="Nothing was written") as caught:
        s.run(source, tmp_path / "mlx")
    assert not (tmp_path / "mlx").exists()
    words = str(caught.value).split()
    missing = next(int(b.replace(",", "")) for a, b in itertools.pairwise(words) if a == "free")
    free += missing - 1
    with pytest.raises(EnvironmentFault):
        s.run(source, tmp_path / "mlx")
    free += 1
    s.run(source, tmp_path / "mlx")


def fill(path: Path, size: int) -> None:
    """Write a file of `size` bytes, or as much of it as the disk takes."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as f:
        for _ in range(size // MB):
            f.write(b"x" * MB)
    if not path.exists() or path.stat().st_size == 0:
        path.write_bytes(b"")


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--hash", "--no-hash"])
def test_a_disk_that_another_writer_fills_in_the_midst_ends_the_run_and_the_next_one_goes_on(
    source: Path, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [option, "--max-shard-size", "6MB"]
    whole = tmp_path / "whole"
    s.cli("quantize", source, whole, *words)
    size = sum(p.stat().st_size for p in whole.rglob("*") if p.is_file())
    with small_disk(tmp_path / "disk", size + 20 * MB) as disk:
        out, other = disk / "mlx", disk / "other"
        real = Disk.rename

        def rename(self: Disk, one: Path, target: Path) -> None:
            """The other writer comes when the first file of tensors is finished."""
            real(self, one, target)
            if target.suffix == ".safetensors" and not other.exists():
                fill(other, size)

        with monkeypatch.context() as patched:
            patched.setattr(Disk, "rename", rename)
            stopped = support.run("quantize", source, out, *words)
        err = stopped.err
        assert stopped.code == 4 and "Traceback" not in err
        assert "the disk is full" in err and "free space on this disk" in err and "same command again" in err
        assert not (out / "ds4convert_manifest.json").exists()
        other.unlink()
        facts = json.loads(s.cli("quantize", source, out, *words, "--json").stdout)
        assert facts["resumed"]
        assert s.contents(out) == s.contents(whole)


def test_a_disk_smaller_than_it_said_ends_the_run_and_a_larger_one_completes_it(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "whole"
    s.run(source, whole, max_shard_bytes=6 * MB)
    with small_disk(tmp_path / "disk", 30 * MB) as disk:
        with monkeypatch.context() as lying:
            lying.setattr("ds4convert.execution.run.free_bytes", lambda path: 1 << 60)
            with pytest.raises(EnvironmentFault, match="the disk is full"):
                s.run(source, disk / "mlx", max_shard_bytes=6 * MB)
        assert list((disk / "mlx").glob("*.safetensors"))
        subprocess.run(["mount", "-o", f"remount,size={200 * MB}", str(disk)], check=True)
        assert s.run(source, disk / "mlx", max_shard_bytes=6 * MB).resumed
        assert s.contents(disk / "mlx") == s.contents(whole)


def test_what_an_unfinished_run_has_reserved_counts_as_there(source: Path, tmp_path: Path) -> None:
    """A disk that holds the result, but not twice: resuming may not ask for the room of finished files again."""

    class Died(BaseException):
        pass

    class DiesWhenReserved(Disk):
        """Ends the run when it has reserved room for `left` bytes: how much is written by then does not matter."""

        def __init__(self, left: int) -> None:
            super().__init__()
            self.left = left

        def open_partial(self, path: Path, size: int) -> int:
            if self.left <= 0:
                raise Died
            self.left -= size
            return super().open_partial(path, size)

    s.run(source, tmp_path / "whole", max_shard_bytes=6 * MB)
    size = sum(p.stat().st_size for p in (tmp_path / "whole").iterdir())
    with small_disk(tmp_path / "disk", size + 20 * MB) as disk:
        with pytest.raises(Died):
            s.run(source, disk / "mlx", disk=DiesWhenReserved(30 * MB), max_shard_bytes=6 * MB, jobs=1)
        assert free_bytes(disk) < size
        s.run(source, disk / "mlx", max_shard_bytes=6 * MB)
        assert s.contents(disk / "mlx") == s.contents(tmp_path / "whole")


# --- memory ----------------------------------------------------------------------------------------------------


LAUNCHER = """
import os, subprocess, sys
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(child.pid, 0)
print(usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))
sys.exit(os.waitstatus_to_exitcode(status))
"""


def peak_bytes(*words: str | Path) -> int:
    """Return the largest resident size of the command line's process.

    A child counts what its parent had at the fork, so it is started by a small program, not by this one.
    """
    command = [sys.executable, "-c", LAUNCHER, sys.executable, "-m", "ds4convert", *map(str, words)]
    return int(subprocess.run(command, env=s.environment(), check=True, text=True, stdout=subprocess.PIPE).stdout)


@pytest.mark.sampled(1)
@pytest.mark.slow
@pytest.mark.parametrize("words", [["--hash"], ["--no-hash"], ["--recipe", "bf16"]])
def test_a_conversion_takes_little_memory(large: Path, words: list[str], tmp_path: Path) -> None:
    source = large
    assert peak_bytes("quantize", source, tmp_path / "mlx", *words) < 200 * MB


@pytest.mark.slow
def test_verifying_takes_little_memory(large: Path, tmp_path: Path) -> None:
    s.run(large, tmp_path / "mlx")
    assert peak_bytes("verify", tmp_path / "mlx", "--source", large) < 250 * MB


@pytest.mark.slow
@pytest.mark.nightly
def test_memory_stays_the_same_at_real_layer_sizes(tmp_path: Path) -> None:
    """One and two layers of Flash with fewer experts, and the head: under 300 MB, and no more for twice the size."""
    peaks = []
    for layers in (1, 2):
        source = tmp_path / f"source-{layers}"
        s.cli("synth", source, "--config", "flash", "--layers", layers, "--experts", 32)
        assert sum(p.stat().st_size for p in source.iterdir()) > 1_500 * MB
        peaks.append(peak_bytes("quantize", source, tmp_path / f"mlx-{layers}"))
        shutil.rmtree(source)
        shutil.rmtree(tmp_path / f"mlx-{layers}")
    assert max(peaks) < 300 * MB and peaks[1] < peaks[0] + 40 * MB
