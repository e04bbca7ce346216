"""The disk fails, or the process dies, at each call that changes the disk: the next run ends in the same folder."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from ds4convert.errors import EnvironmentFault
from ds4convert.files import Disk
from tests import support_run as s

MANIFEST = "ds4convert_manifest.json"
SHARDS = {"layout": "universal", "max_shard_bytes": 1_500_000}
POINTS = 20


class Died(BaseException):
    """What stands for the end of the process: no `except Exception` may swallow it."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = s.tiny(tmp_path_factory.mktemp("faults") / "source", experts=2, layers=2)
    (out / "tokenizer.json").write_text("{}")
    return out


@pytest.fixture(scope="module", params=[True, False], ids=["hash", "no-hash"])
def hashing(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture(scope="module")
def wanted(source: Path, hashing: bool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("whole") / "mlx"
    s.run(source, out, hashing=hashing, **SHARDS)
    return s.contents(out)


@pytest.fixture(scope="module")
def calls(source: Path, hashing: bool, tmp_path_factory: pytest.TempPathFactory) -> int:
    counter = s.FailingDisk(1 << 60, OSError)
    s.run(source, tmp_path_factory.mktemp("count") / "mlx", disk=counter, hashing=hashing, jobs=1, **SHARDS)
    return counter.calls


@pytest.mark.sampled(2)
@pytest.mark.slow
@pytest.mark.parametrize(("code", "once"), [(errno.ENOSPC, False), (errno.EIO, True)], ids=["full", "error once"])
def test_an_error_at_any_call_ends_in_a_message_and_the_next_run_in_the_same_folder(
    source: Path, wanted: dict[str, str], calls: int, hashing: bool, code: int, once: bool, tmp_path: Path
) -> None:
    assert calls > 100
    for n in s.sampled(calls, POINTS):
        out = tmp_path / str(n)
        disk = s.FailingDisk(n, lambda: OSError(code, os.strerror(code)), once)
        with pytest.raises(EnvironmentFault) as caught:
            s.run(source, out, disk=disk, hashing=hashing, jobs=1, **SHARDS)
        where = f"call {n} ({disk.failed})"
        assert ("the disk is full" if code == errno.ENOSPC else os.strerror(code)) in str(caught.value), where
        assert "run the same command again" in str(caught.value), where
        # Only the tidying up after the manifest may fail with the manifest there; the folder is whole then.
        assert not (out / MANIFEST).exists() or s.wrong(out, source) == [], where
        s.run(source, out, hashing=hashing, **SHARDS)
        assert s.contents(out) == wanted, where


@pytest.mark.sampled(1)
@pytest.mark.slow
def test_the_end_of_the_process_at_any_call_leaves_what_the_next_run_completes(
    source: Path, wanted: dict[str, str], calls: int, hashing: bool, tmp_path: Path
) -> None:
    for n in s.sampled(calls, POINTS):
        out = tmp_path / str(n)
        disk = s.FailingDisk(n, Died)
        with pytest.raises(Died):
            s.run(source, out, disk=disk, hashing=hashing, jobs=1, **SHARDS)
        s.run(source, out, hashing=hashing, **SHARDS)
        assert s.contents(out) == wanted, f"call {n} ({disk.failed})"


@pytest.mark.sampled(1)
@pytest.mark.slow
def test_failing_again_and_again_a_little_later_still_ends_in_the_same_folder(
    source: Path, wanted: dict[str, str], calls: int, hashing: bool, tmp_path: Path
) -> None:
    out, n = tmp_path / "mlx", 1
    for _ in range(200):
        try:
            s.run(source, out, disk=s.FailingDisk(n, Died), hashing=hashing, jobs=2, **SHARDS)
            break
        except Died:
            n += 7
    else:
        pytest.fail("no run came to its end")
    assert n > 20
    s.run(source, out, hashing=hashing, **SHARDS)
    assert s.contents(out) == wanted


class Recorder(Disk):
    """Fails the n-th sync of a file's data, and only that one; keeps what was appended to the journal after it."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.left, self.after, self.failed = n, [], False

    def sync_data(self, fd: int) -> None:
        if Path(f"/proc/self/fd/{fd}").readlink().name.endswith("safetensors.partial"):
            self.left -= 1
            if self.left == 0:
                self.failed = True
                raise OSError(errno.EIO, "injected")
        super().sync_data(fd)

    def append(self, fd: int, data: bytes) -> None:
        if self.failed:
            self.after.append(data)
        super().append(fd, data)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_after_a_failed_sync_of_a_file_nothing_of_that_file_is_recorded_as_safe(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel reports a lost write once; a later sync of the same file succeeds, though the bytes are gone."""
    monkeypatch.setattr("ds4convert.execution.file_writer.BATCH_BYTES", 1)  # a sync for each step
    disk = Recorder(4)
    with pytest.raises(EnvironmentFault, match="injected"):
        s.run(source, tmp_path / "mlx", disk=disk, jobs=1, keep_mtp=False)  # one file, so that no other is recorded
    assert disk.failed and disk.after == []


class ForgetfulDisk(s.FailingDisk):
    """Loses, when the power fails at the n-th call, every byte that was written and not yet synced."""

    def __init__(self, n: int) -> None:
        super().__init__(n, Died)
        self.paths: dict[int, Path] = {}
        self.unsynced: dict[Path, list[tuple[int, int]]] = {}

    def open_partial(self, path: Path, size: int) -> int:
        fd = super().open_partial(path, size)
        self.paths[fd] = path
        return fd

    def write_at(self, fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
        if fd in self.paths:
            self.unsynced.setdefault(self.paths[fd], []).append((offset, len(data)))
        super().write_at(fd, data, offset)

    def copy_range(self, source: int, start: int, target: int, offset: int, size: int) -> bool:
        self.unsynced.setdefault(self.paths[target], []).append((offset, size))
        return super().copy_range(source, start, target, offset, size)

    def sync_data(self, fd: int) -> None:
        held = self.unsynced.setdefault(self.paths.get(fd, Path()), [])
        count = len(held)  # what is written while the sync runs is not part of it
        super().sync_data(fd)
        del held[:count]

    def lose_power(self) -> int:
        """Put noise in the place of what was not synced, under either name of its file; return how much."""
        lost = 0
        for partial, ranges in self.unsynced.items():
            path = partial if partial.exists() else partial.with_name(partial.name.removesuffix(".partial"))
            if path.is_file():
                with path.open("r+b") as f:
                    for offset, size in ranges:
                        f.seek(offset)
                        f.write(b"\xee" * size)
                        lost += size
        return lost


@pytest.mark.sampled(1)
@pytest.mark.slow
def test_power_that_fails_at_any_call_loses_nothing_that_was_recorded_as_safe(
    source: Path, wanted: dict[str, str], hashing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ds4convert.execution.file_writer.BATCH_BYTES", 60_000)
    counter = ForgetfulDisk(1 << 60)
    s.run(source, tmp_path / "count", disk=counter, hashing=hashing, jobs=1, **SHARDS)
    assert counter.lose_power() == 0, "a file got its final name before its last sync"
    lost = resumed = 0
    for n in s.sampled(counter.calls, 2 * POINTS):
        out, disk = tmp_path / str(n), ForgetfulDisk(n)
        with pytest.raises(Died):
            s.run(source, out, disk=disk, hashing=hashing, jobs=1, **SHARDS)
        lost += disk.lose_power() > 0
        resumed += s.run(source, out, hashing=hashing, **SHARDS).resumed
        assert s.contents(out) == wanted, f"call {n} ({disk.failed})"
    assert lost >= 3 and resumed >= 3  # how often depends on when the syncing thread has its turn
