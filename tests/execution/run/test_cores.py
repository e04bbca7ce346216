"""The cores of a machine: one is one, many have processes that write files, and no number of them changes a byte."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

import ds4convert as ds4
from ds4convert.errors import EnvironmentFault, ValueFault
from ds4convert.execution import workers
from ds4convert.execution.feeders import child, parent
from ds4convert.execution.feeders.division import divided
from ds4convert.execution.file_writer import FileWriter
from ds4convert.execution.locking import Lock
from ds4convert.files import Disk
from ds4convert.fit.forecast import peak_memory
from ds4convert.storage.local_files import SourceChanged
from ds4convert.storage.state_folder import STATE_FOLDER
from tests import support_run as s

OPTIONS = {"recipe": "q4", "max_shard_bytes": 500_000}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return s.tiny(tmp_path_factory.mktemp("cores") / "source", experts=8)


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("whole") / "out"
    s.run(source, out, **OPTIONS)
    return s.contents(out)


@pytest.fixture
def divisible(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a process for each core, and for little work, too: as there is for every eight cores of a large machine."""
    monkeypatch.setattr(workers, "FED", 1)
    monkeypatch.setattr(workers, "ENOUGH_WEIGHTS", 0)


class Seen(Disk):
    """A disk that notes which threads write."""

    def __init__(self) -> None:
        super().__init__()
        self.threads: set[int] = set()

    def write_at(self, fd: int, data: bytes | memoryview, at: int) -> None:
        self.threads.add(threading.get_ident())
        super().write_at(fd, data, at)


def work_threads(source: Path, out: Path, cores: int, monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Return the threads of this process that write and hash in a run."""
    disk = Seen()
    real = FileWriter._absorb

    def noted(self: FileWriter, data: bytes | memoryview, at: int) -> None:
        disk.threads.add(threading.get_ident())
        real(self, data, at)

    monkeypatch.setattr(FileWriter, "_absorb", noted)
    s.run(source, out, cores=cores, jobs=4, disk=disk, **OPTIONS)
    monkeypatch.undo()
    return disk.threads - {threading.get_ident()}  # this one writes small files in the end


def test_on_one_core_one_thread_writes_and_hashes_and_one_process_rounds(
    source: Path, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []
    real = workers.started

    def counted(code: str, kept_open: Sequence[int] = ()) -> subprocess.Popen[bytes]:
        process = real(code, kept_open)
        begun.append(process.pid)
        return process

    monkeypatch.setattr(workers, "started", counted)
    assert len(work_threads(source, tmp_path / "one", 1, monkeypatch)) == 1
    assert len(begun) == 1 and s.contents(tmp_path / "one") == whole


def test_more_cores_write_and_hash_on_more_threads(
    source: Path, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(work_threads(source, tmp_path / "more", 4, monkeypatch)) > 1
    assert s.contents(tmp_path / "more") == whole


@pytest.mark.parametrize("cores", [2, pytest.param(5, marks=pytest.mark.nightly)])
def test_files_in_processes_of_their_own_have_the_same_bytes(
    source: Path, whole: dict[str, str], cores: int, tmp_path: Path, divisible: None
) -> None:
    written: list[int] = []
    done = s.run(source, tmp_path / "out", cores=cores, progress=written.append, **OPTIONS)
    assert divided(done.plan, cores).workers == (1,) * cores
    assert s.contents(tmp_path / "out") == whole
    headers = sum(len(f.header) for f in done.plan.files)
    assert sum(written) == sum(f.size for f in done.plan.files) - headers


def test_a_process_that_is_killed_ends_the_run_and_the_next_goes_on(
    source: Path, whole: dict[str, str], tmp_path: Path, divisible: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, killed = parent.Feeders._act, []

    def act(self: parent.Feeders, process: child.Child, kind: str, values: tuple[object, ...]) -> None:
        real(self, process, kind, values)
        if kind == "done" and not killed:
            killed.append(process.process.pid)
            os.kill(process.process.pid, signal.SIGKILL)

    monkeypatch.setattr(parent.Feeders, "_act", act)
    with pytest.raises(EnvironmentFault, match="worker process ended"):
        s.run(source, tmp_path / "out", cores=2, **OPTIONS)
    assert killed
    monkeypatch.setattr(parent.Feeders, "_act", real)
    done = s.run(source, tmp_path / "out", cores=1, **OPTIONS)
    assert done.resumed and s.contents(tmp_path / "out") == whole


def test_what_a_process_finds_wrong_is_told_as_if_there_were_none(
    source: Path, tmp_path: Path, divisible: None
) -> None:
    bad = s.copied(source, tmp_path / "bad")
    name, stored = next((n, t) for n, t in s.stored(bad).items() if "experts" in n and t.dtype == "F8_E8M0")
    with stored.path.open("r+b") as file:
        file.seek(stored.start)
        file.write(b"\xff")
    told = []
    for cores in (1, 2):
        with pytest.raises(ValueFault) as caught:
            s.run(bad, tmp_path / f"out-{cores}", cores=cores, **OPTIONS)
        told.append((str(caught.value), caught.value.tensor))
    assert told[0] == told[1] and "NaN" in told[0][0] and name in told[0][0]


def test_a_run_that_is_stopped_leaves_no_process_and_keeps_what_is_finished(
    source: Path, whole: dict[str, str], tmp_path: Path, divisible: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids: list[int] = []
    real = child.Child.__init__

    def noted(self: child.Child, *args: object) -> None:
        real(self, *args)  # type: ignore[arg-type]
        pids.append(self.process.pid)

    def progress(n: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(child.Child, "__init__", noted)
    with pytest.raises(KeyboardInterrupt):
        s.run(source, tmp_path / "out", cores=2, progress=progress, **OPTIONS)
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert s.run(source, tmp_path / "out", cores=1, **OPTIONS).complete
    assert s.contents(tmp_path / "out") == whole


def test_a_run_waits_for_the_processes_of_one_that_was_killed(tmp_path: Path) -> None:
    state = tmp_path / "out" / STATE_FOLDER
    state.mkdir(parents=True)
    before = Lock(state)
    process = workers.started("import sys; sys.stdin.read()", [before.for_writers()])
    before.release()
    assert process.stdin is not None
    threading.Timer(0.3, process.stdin.close).start()
    Lock(state).release()
    assert process.wait(timeout=60) == 0  # it had ended, or the lock would not have been free


def test_a_source_that_changes_is_an_error_that_travels_between_processes() -> None:
    import pickle

    found = pickle.loads(pickle.dumps(SourceChanged("a.safetensors", "it has other bytes")))
    assert isinstance(found, SourceChanged) and found.name == "a.safetensors" and "other bytes" in str(found)


def test_cores_are_divided_over_processes_of_eight_and_memory_is_told_of_each_worker(source: Path) -> None:
    plan = ds4.plan(config="pro", recipe="q2", cores=64)
    made = plan.prepared.plan
    assert divided(made, 64).workers == (8,) * 8
    assert divided(made, 20).workers == (7, 7, 6)
    assert divided(made, 8).workers == (8,)
    assert divided(made, 64, files=1).workers == (24,)  # one interpreter keeps no more at work
    assert divided(made, 64, here=False).workers == (24,)
    told = plan.facts
    assert (told["cores"], told["workers"]) == (64, 64) and told["worker_bytes"] >= workers.WORKER_BYTES
    assert told["peak_memory_bytes"] > peak_memory(made, 2, 8) + 56 * told["worker_bytes"]
    native = ds4.plan(source, cores=64).facts
    assert (native["workers"], native["worker_bytes"]) == (0, 0)


def test_the_number_of_cores_is_said_by_an_option_and_checked(source: Path) -> None:
    done = s.cli("plan", source, "--recipe", "q4", "--cores", "3")
    assert "3 workers (--cores)" in done.stdout
    with pytest.raises(ds4.UsageError, match="--cores 0: expected 1 to 1024"):
        ds4.plan(source, cores=0)


def test_cores_are_those_that_this_process_may_use() -> None:
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system does not bind processes to cores")
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert workers.all_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert workers.all_cores() == len(allowed)
