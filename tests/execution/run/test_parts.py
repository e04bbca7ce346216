"""Parts of one plan, on one machine or several: in any order, killed, missing, the folder is that of a single run."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ds4convert.errors import EnvironmentFault, OutputError, UsageError
from ds4convert.execution.locking import Lock
from ds4convert.files import Disk
from ds4convert.planning.parts import Part
from ds4convert.storage.state_folder import STATE_FOLDER
from tests import support_run as s

OPTIONS = {"recipe": "q4", "max_shard_bytes": 1_000_000}
WORDS = ("--recipe", "q4", "--max-shard-size", "1MB")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return s.tiny(tmp_path_factory.mktemp("parts") / "source", experts=24)


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("whole") / "out"
    s.run(source, out, **OPTIONS)
    found = s.contents(out)
    assert sum(name.endswith(".safetensors") for name in found) >= 7
    return found


def part(source: Path, out: Path, number: int, count: int, **more: object) -> None:
    done = s.run(source, out, part=Part(number, count), **OPTIONS, **more)
    assert not done.complete or done.already_done


@pytest.mark.sampled(2)
@pytest.mark.parametrize("count", [1, 2, 3, 7, 19])
def test_any_order_and_any_parts_missing_give_the_folder_of_a_single_run(
    source: Path, whole: dict[str, str], count: int, tmp_path: Path
) -> None:
    dice = random.Random(count)
    for number in dice.sample(range(1, count + 1), dice.randint(1, count)):
        part(source, tmp_path / "out", number, count)
        assert not (tmp_path / "out" / "ds4convert_manifest.json").exists()
    done = s.run(source, tmp_path / "out", **OPTIONS)
    assert done.resumed and done.complete and s.contents(tmp_path / "out") == whole


def test_all_parts_done_the_ending_run_writes_no_tensor_again(source: Path, tmp_path: Path) -> None:
    for number in (3, 1, 2):
        part(source, tmp_path / "out", number, 3)
    before = {p.name: p.stat().st_ino for p in (tmp_path / "out").glob("*.safetensors")}
    s.run(source, tmp_path / "out", **OPTIONS)
    assert before == {p.name: p.stat().st_ino for p in (tmp_path / "out").glob("*.safetensors")}


@pytest.mark.parametrize("most", [4, pytest.param(60, marks=pytest.mark.nightly)])
def test_a_disk_that_fails_at_any_call_of_a_part_costs_no_more_than_that_part_again(
    source: Path, whole: dict[str, str], most: int, tmp_path: Path
) -> None:
    def failing(n: int) -> s.FailingDisk:
        return s.FailingDisk(n, lambda: OSError(errno.EIO, "the disk is broken"))

    counting = failing(1 << 60)
    part(source, tmp_path / "counted", 2, 3, disk=counting)
    told = 0
    for n in s.sampled(counting.calls, most):
        disk = failing(n)
        try:
            part(source, tmp_path / "out", 2, 3, disk=disk)
            assert not disk.failed  # what earlier runs have finished is not written again, so this one had less to do
        except EnvironmentFault as e:
            assert "the disk is broken" in str(e)
            told += 1
    assert told > 1
    part(source, tmp_path / "out", 1, 3)
    s.run(source, tmp_path / "out", **OPTIONS)
    assert s.contents(tmp_path / "out") == whole


def test_a_part_writes_its_own_files_alone(source: Path, tmp_path: Path) -> None:
    part(source, tmp_path / "out", 2, 3)
    first = {p.name for p in (tmp_path / "out").glob("*.safetensors")}
    part(source, tmp_path / "out", 1, 3)
    second = {p.name for p in (tmp_path / "out").glob("*.safetensors")}
    assert first and first < second


def test_other_divisions_may_follow_one_another(source: Path, whole: dict[str, str], tmp_path: Path) -> None:
    part(source, tmp_path / "out", 1, 2)
    part(source, tmp_path / "out", 3, 3)
    s.run(source, tmp_path / "out", **OPTIONS)
    assert s.contents(tmp_path / "out") == whole


def copy_with_other_times(source: Path, to: Path) -> Path:
    shutil.copytree(source, to)
    for path in to.iterdir():
        os.utime(path, (1_000_000_000, 1_000_000_000))
    return to


def retrained(folder: Path) -> Path:
    """Change one bit of every FP4 code, and no header."""
    for path in folder.glob("*.safetensors"):
        data = bytearray(path.read_bytes())
        begin = 8 + int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8:begin]).items():
            if name != "__metadata__" and entry["dtype"] == "I8":
                first, last = (begin + at for at in entry["data_offsets"])
                data[first:last] = bytes(b ^ 1 for b in data[first:last])
        path.write_bytes(data)
    return folder


def test_parts_from_copies_of_the_source_with_other_times_redo_nothing(
    source: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    other = copy_with_other_times(source, tmp_path / "copy")
    part(source, tmp_path / "out", 1, 2)
    part(other, tmp_path / "out", 2, 2)
    before = {p.name: p.stat().st_ino for p in (tmp_path / "out").glob("*.safetensors")}
    s.run(source, tmp_path / "out", **OPTIONS)
    assert before == {p.name: p.stat().st_ino for p in (tmp_path / "out").glob("*.safetensors")}
    assert s.contents(tmp_path / "out") == whole


def test_a_part_from_another_model_of_the_same_shape_is_made_again(
    source: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    """Two models of one training have equal headers, and so equal plans: only their values tell them apart."""
    other = retrained(copy_with_other_times(source, tmp_path / "other"))
    part(other, tmp_path / "out", 1, 2)
    s.run(source, tmp_path / "out", **OPTIONS)
    assert s.contents(tmp_path / "out") == whole


def test_a_part_of_the_same_number_and_a_whole_run_wait_for_a_part_at_work(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    part(source, out, 1, 3)
    lock = Lock(out / STATE_FOLDER, Part(2, 3))
    lock.share()
    try:
        with pytest.raises(EnvironmentFault, match="another ds4convert is writing part 2/3"):
            part(source, out, 2, 3)
        with pytest.raises(EnvironmentFault, match="another ds4convert is writing to this folder"):
            s.run(source, out, **OPTIONS)
        with pytest.raises(EnvironmentFault, match="another number of parts is being written"):
            part(source, out, 1, 2)
        part(source, out, 3, 3)  # another part of the same division is no hindrance
    finally:
        lock.release()
    part(source, out, 2, 3)


@pytest.mark.parametrize("put", [os.mkfifo, lambda p: p.symlink_to("nothing")], ids=["pipe", "link"])
def test_what_is_no_file_under_the_name_of_another_divisions_lock_stops_no_part(
    tmp_path: Path, put: Callable[[Path], object]
) -> None:
    put(tmp_path / "lock-3-of-9")
    (tmp_path / "lock-4-of-9").touch()
    lock = Lock(tmp_path, Part(1, 2))
    assert lock.first
    lock.release()
    other = Lock(tmp_path, Part(4, 9))
    with pytest.raises(EnvironmentFault, match="another number of parts"):
        other.share()
        Lock(tmp_path, Part(1, 2))
    other.release()


def test_a_part_waits_for_a_whole_run(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ds4convert.execution.locking._PATIENCE", 0)
    state = tmp_path / "out" / STATE_FOLDER
    state.mkdir(parents=True)
    lock = Lock(state)
    try:
        with pytest.raises(EnvironmentFault, match="another ds4convert is writing to this folder"):
            part(source, tmp_path / "out", 1, 2)
    finally:
        lock.release()


def test_a_part_with_other_options_is_refused_with_what_differs(source: Path, tmp_path: Path) -> None:
    part(source, tmp_path / "out", 1, 2)
    with pytest.raises(OutputError, match="recipe was q4, now q3"):
        s.run(source, tmp_path / "out", part=Part(2, 2), recipe="q3", max_shard_bytes=1_000_000)


def test_a_part_does_not_overwrite(source: Path, tmp_path: Path) -> None:
    s.run(source, tmp_path / "out")
    before = s.contents(tmp_path / "out")
    with pytest.raises(UsageError, match="--part and --overwrite"):
        part(source, tmp_path / "out", 1, 2, overwrite=True)
    with pytest.raises(OutputError, match="is not empty"):
        part(source, tmp_path / "out", 1, 2)
    assert s.contents(tmp_path / "out") == before


def test_a_part_of_a_finished_folder_has_nothing_to_do(source: Path, whole: dict[str, str], tmp_path: Path) -> None:
    s.run(source, tmp_path / "out", **OPTIONS)
    part(source, tmp_path / "out", 2, 3)
    assert s.contents(tmp_path / "out") == whole


@pytest.mark.parametrize(
    ("name", "put"),
    [("journal-1-of-2.jsonl", lambda p: p.write_text("[" * 200_000 + "\n")), ("journal-2-of-2.jsonl", os.mkfifo)],
    ids=["deep", "pipe"],
)
def test_what_is_no_journal_in_place_of_one_is_never_waited_for_and_costs_the_work_it_told_of(
    source: Path, whole: dict[str, str], tmp_path: Path, name: str, put: Callable[[Path], object]
) -> None:
    out = tmp_path / "out"
    part(source, out, 1, 2)
    path = out / STATE_FOLDER / name
    path.unlink(missing_ok=True)
    put(path)
    s.cli("quantize", source, out, *WORDS, "-q", timeout=60)
    assert s.contents(out) == whole


@pytest.mark.parametrize("put", [lambda p: p.write_text("[" * 200_000), os.mkfifo], ids=["deep", "pipe"])
def test_what_is_no_plan_in_place_of_one_is_refused(
    source: Path, tmp_path: Path, put: Callable[[Path], object]
) -> None:
    out = tmp_path / "out"
    part(source, out, 1, 2)
    path = out / STATE_FOLDER / "plan.json"
    path.unlink()
    put(path)
    done = s.cli("quantize", source, out, *WORDS, "--part", "2/2", exit_code=3, timeout=60)
    assert "plan.json cannot be read" in done.stderr


class FinishedMeanwhile(Disk):
    """A disk on which another run ends the conversion just before this one makes its state folder."""

    def __init__(self, end: Callable[[], object]) -> None:
        super().__init__()
        self.end: Callable[[], object] | None = end

    def make_folder(self, path: Path) -> None:
        end, self.end = (self.end, None) if path.name == STATE_FOLDER else (None, self.end)
        if end is not None:
            end()
        super().make_folder(path)


@pytest.mark.parametrize("asked", [None, Part(2, 3)], ids=["whole", "part"])
def test_a_run_that_another_run_was_faster_than_leaves_the_finished_folder_alone(
    source: Path, whole: dict[str, str], asked: Part | None, tmp_path: Path
) -> None:
    out, inodes = tmp_path / "out", {}

    def end() -> None:
        s.run(source, out, **OPTIONS)
        inodes.update({p.name: p.stat().st_ino for p in out.iterdir()})

    done = s.run(source, out, disk=FinishedMeanwhile(end), part=asked, **OPTIONS)
    assert done.already_done and s.contents(out) == whole
    assert inodes and inodes == {p.name: p.stat().st_ino for p in out.iterdir()}


def test_more_parts_than_files_leave_some_without_work(source: Path, whole: dict[str, str], tmp_path: Path) -> None:
    for number in range(1, 41, 3):
        part(source, tmp_path / "out", number, 40)
    s.run(source, tmp_path / "out", **OPTIONS)
    assert s.contents(tmp_path / "out") == whole


def test_a_flipped_bit_in_a_file_of_a_part_is_found_when_the_parts_are_joined(
    source: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    part(source, tmp_path / "out", 1, 2)
    path = sorted((tmp_path / "out").glob("*.safetensors"))[0]
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    s.run(source, tmp_path / "out", **OPTIONS)
    assert s.contents(tmp_path / "out") == whole


@pytest.mark.slow
@pytest.mark.parametrize(
    "seed", [1, pytest.param(2, marks=pytest.mark.nightly), pytest.param(3, marks=pytest.mark.nightly)]
)
def test_parts_at_once_killed_and_repeated_give_the_folder_of_a_single_run(
    source: Path, whole: dict[str, str], seed: int, tmp_path: Path
) -> None:
    dice, out = random.Random(seed), tmp_path / "out"
    for _ in range(3):
        children = [s.start("quantize", source, out, *WORDS, "--part", f"{n}/3", "-q") for n in (1, 2, 3)]
        state = out / STATE_FOLDER
        while not list(state.glob("journal-*.jsonl")) and any(c.poll() is None for c in children):
            time.sleep(0.01)
        victim = dice.choice(children)
        victim.send_signal(signal.SIGKILL)
        for child in children:
            child.communicate(timeout=120)
            assert child.returncode in ({-signal.SIGKILL, 0} if child is victim else {0}), child.returncode
    s.cli("quantize", source, out, *WORDS, "-q")
    assert s.contents(out) == whole


def test_the_command_line_tells_what_a_part_did_and_what_comes_then(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    told = json.loads(s.cli("quantize", source, out, *WORDS, "--part", "1/2", "--json").stdout)
    assert told["manifest"] is None and not told["resumed"]
    (mine,) = told["parts"]
    written = sum(p.stat().st_size for p in out.glob("*.safetensors"))
    assert (
        mine["part"] == "1/2"
        and mine["bytes_written"] == written
        and mine["files"] == len(list(out.glob("*.safetensors")))
    )
    text = s.cli("quantize", source, out, *WORDS, "--part", "2/2").stdout
    assert "part 2/2" in text and "without --part" in text
    plan = json.loads(s.cli("plan", source, *WORDS, "--parts", "2", "--json").stdout)
    assert plan["parts"][0] == mine and len(plan["commands"]) == 3
    assert "--part 2/2" in s.cli("plan", source, *WORDS, "--parts", "2").stdout


@pytest.mark.parametrize("text", ["0/3", "4/3", "x"])
def test_a_part_that_is_none_is_wrong_usage(source: Path, text: str, tmp_path: Path) -> None:
    done = s.cli("quantize", source, tmp_path / "out", "--part", text, exit_code=2)
    assert "--part" in done.stderr and not (tmp_path / "out").exists()


def test_an_unfinished_folder_of_parts_names_the_command_that_ends_it(source: Path, tmp_path: Path) -> None:
    s.cli("quantize", source, tmp_path / "out", *WORDS, "--part", "1/2", "-q")
    told = s.cli("quantize", source, tmp_path / "out", "--recipe", "q3", exit_code=3).stderr
    assert "--max-shard-size 1MB" in told and "--part" not in told
