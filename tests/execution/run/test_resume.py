"""What a second run makes of what a first one left: finished, unfinished, damaged, of other settings, or not ours."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ds4convert.checkpoint.source import open_source
from ds4convert.errors import EnvironmentFault, HeaderError, OutputError
from ds4convert.execution import run
from ds4convert.files import Disk
from ds4convert.planning import build
from ds4convert.planning.build import make_plan
from ds4convert.planning.layouts import layout_of
from ds4convert.planning.recipes import recipe_of
from tests import support_run as s
from tests.support import nightly

MANIFEST = "ds4convert_manifest.json"
SHARD = 1_500_000


class Died(BaseException):
    """The end of the process, as far as the disk can tell."""


class DiesInSecondFile(Disk):
    """Ends the run when one file is finished, and two batches of steps of the next one are recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[dict[str, Any]] = []

    def append(self, fd: int, data: bytes) -> None:
        at = next((i for i, line in enumerate(self.lines) if "file" in line), len(self.lines))
        if len(self.lines) - at > 2:
            raise Died
        super().append(fd, data)
        self.lines.append(json.loads(data))


class Counts(Disk):
    """Counts the bytes that are written into files of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.written = 0

    def write_at(self, fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
        self.written += len(data)
        super().write_at(fd, data, offset)

    def copy_range(self, source: int, start: int, target: int, offset: int, size: int) -> bool:
        moved = super().copy_range(source, start, target, offset, size)
        self.written += size if moved else 0
        return moved


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return s.tiny(tmp_path_factory.mktemp("resume") / "source")


@pytest.fixture(scope="module", params=[True, False], ids=["hash", "no-hash"])
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {"hashing": request.param, "max_shard_bytes": SHARD}


@pytest.fixture(scope="module")
def wanted(source: Path, options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("whole") / "mlx"
    s.run(source, out, **options)
    return s.contents(out)


@pytest.fixture
def unfinished(source: Path, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder in which one file is finished, and a second one half."""
    monkeypatch.setattr("ds4convert.execution.file_writer.BATCH_BYTES", 100_000)
    out = tmp_path / "mlx"
    with pytest.raises(Died):
        s.run(source, out, disk=DiesInSecondFile(), jobs=1, **options)
    lines = [json.loads(x) for x in (out / ".ds4convert" / "journal.jsonl").read_text().splitlines()]
    recorded = {n for x in lines for n, *_ in x.get("steps", [])}
    made = make_plan(open_source(source), build.Options(recipe_of("native"), layout_of("inline"), **options))
    half = {f"{made.files[made.steps[n].outputs[0].file].name}.partial" for n in recorded}
    assert any("file" in x for x in lines) and half & {p.name for p in out.glob("*.partial")}
    assert not (out / MANIFEST).exists()
    return out


@pytest.mark.sampled(1)
def test_an_unfinished_folder_fails_verify_which_says_so(unfinished: Path, source: Path) -> None:
    done = s.cli("verify", unfinished, exit_code=1)
    assert "unfinished" in done.stdout and "repeat the command that wrote it" in done.stdout
    assert "finished" in s.failed_checks(unfinished, "--source", source)


def test_resuming_writes_only_what_was_not_finished(
    unfinished: Path, source: Path, options: dict[str, Any], wanted: dict[str, str], tmp_path: Path
) -> None:
    whole, rest, told = Counts(), Counts(), []
    s.run(source, tmp_path / "again", disk=whole, **options)
    outcome = s.run(source, unfinished, disk=rest, progress=told.append, **options)
    assert outcome.resumed and not outcome.already_done
    assert rest.written < 0.8 * whole.written
    assert sum(told) >= 0.95 * sum(p.stat().st_size for p in unfinished.glob("*.safetensors"))
    assert s.contents(unfinished) == wanted


@pytest.mark.sampled(1)
def test_a_finished_conversion_is_not_done_again_and_says_so(
    source: Path, options: dict[str, Any], wanted: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "mlx"
    words = ["quantize", source, out, "--max-shard-size", SHARD, "--hash" if options["hashing"] else "--no-hash"]
    assert not json.loads(s.cli(*words, "--json").stdout)["resumed"]
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    said = s.cli(*words).stdout
    facts = json.loads(s.cli(*words, "--json").stdout)
    assert facts["already_done"] and "already" in said
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before and s.contents(out) == wanted


@pytest.mark.parametrize("cut", [1, 30])
def test_a_torn_last_line_of_the_journal_is_dropped(
    unfinished: Path, source: Path, options: dict[str, Any], wanted: dict[str, str], cut: int
) -> None:
    journal = unfinished / ".ds4convert" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-cut])
    assert s.run(source, unfinished, **options).resumed
    assert s.contents(unfinished) == wanted


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "line", ["[]", '{"steps": 5}', '{"steps": [[1]]}', '{"steps": [[[], 2]]}', '{"file": 0}',
             '{"file": [], "sha256": 1}',
             '"x"', "\x00\x00", '{"steps": [[99999, "x"]]}', '{"file": 999, "sha256": null}', "\xff"]
)  # fmt: skip
def test_a_journal_line_that_is_not_ours_does_no_harm(
    unfinished: Path, source: Path, options: dict[str, Any], wanted: dict[str, str], line: str
) -> None:
    with (unfinished / ".ds4convert" / "journal.jsonl").open("ab") as f:
        f.write(line.encode("latin-1") + b"\n")
    s.run(source, unfinished, **options)
    assert s.contents(unfinished) == wanted


@pytest.mark.sampled(3)
@pytest.mark.parametrize("first", ["", "{}\n", '{"plan": 1}\n', "\x00" * 100, '{"plan": "SAME", "sources": []}\n'])
def test_a_journal_that_cannot_be_used_means_starting_over(
    unfinished: Path, source: Path, options: dict[str, Any], wanted: dict[str, str], first: str
) -> None:
    state = unfinished / ".ds4convert"
    plan = json.loads((state / "plan.json").read_text())["plan"]
    (state / "journal.jsonl").write_text(first.replace("SAME", plan))
    assert not s.run(source, unfinished, **options).resumed
    assert s.contents(unfinished) == wanted


@pytest.mark.sampled(1)
def test_other_settings_are_refused_and_the_message_says_which(
    unfinished: Path, source: Path, options: dict[str, Any], wanted: dict[str, str]
) -> None:
    before = s.contents(unfinished)
    for words, told in (
        (["--layout", "universal"], "layout was inline, now universal"),
        (["--recipe", "bf16"], "recipe was native, now bf16"),
        (["--drop-mtp"], "head was classic, now none"),
        (["--max-shard-size", "1GB"], "files was"),
    ):
        base = ["--max-shard-size", SHARD, "--hash" if options["hashing"] else "--no-hash"]
        done = s.cli("quantize", source, unfinished, *base, *words, exit_code=3)
        assert told in done.stderr and "--overwrite" in done.stderr
        assert s.contents(unfinished) == before
    s.run(source, unfinished, **options)
    assert s.contents(unfinished) == wanted


def test_another_hashing_option_is_refused(unfinished: Path, source: Path, options: dict[str, Any]) -> None:
    with pytest.raises(OutputError, match="hashing was"):
        s.run(source, unfinished, **{**options, "hashing": not options["hashing"]})


def test_a_folder_with_an_unreadable_plan_and_files_in_it_is_refused(
    unfinished: Path, source: Path, options: dict[str, Any], wanted: dict[str, str]
) -> None:
    """Files of another plan, with other names, would stay beside the new ones and be loaded by hosts."""
    (unfinished / ".ds4convert" / "plan.json").write_bytes(b"{")
    before = s.contents(unfinished)
    with pytest.raises(OutputError, match="cannot be read") as caught:
        s.run(source, unfinished, **options)
    assert "--overwrite" not in str(caught.value)
    with pytest.raises(OutputError, match="did not write"):  # nothing tells whose these files are
        s.run(source, unfinished, overwrite=True, **options)
    assert s.contents(unfinished) == before


def test_steps_of_a_source_file_that_was_replaced_are_done_again(
    unfinished: Path, source: Path, options: dict[str, Any], tmp_path: Path
) -> None:
    """Same header, other values, other modification time: each tensor has to be that of the new file."""
    other = s.copied(source, tmp_path / "other")
    for path in other.glob("*.safetensors"):
        for t in (t for t in s.stored(other).values() if t.file == path.name and t.dtype in {"I8", "BF16"}):
            s.flip(path, t.start, 0)
        stamp = path.stat().st_mtime_ns + 10**9
        os.utime(path, ns=(stamp, stamp))
    s.run(other, unfinished, **options)
    s.run(other, tmp_path / "unbroken", **options)
    assert s.contents(unfinished) == s.contents(tmp_path / "unbroken")
    assert s.wrong(unfinished, other) == []


def test_one_replaced_source_file_leaves_the_steps_of_the_others_finished(
    unfinished: Path, source: Path, options: dict[str, Any], wanted: dict[str, str], tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)  # keeps the modification times
    os.utime(copy / "model-00001-of-00007.safetensors")
    assert s.run(copy, unfinished, **options).resumed
    assert s.contents(unfinished) == wanted


def test_a_truncated_partial_file_is_written_anew(
    unfinished: Path, source: Path, options: dict[str, Any], wanted: dict[str, str]
) -> None:
    for path in unfinished.glob("*.partial"):
        path.write_bytes(path.read_bytes()[:1000])
    s.run(source, unfinished, **options)
    assert s.contents(unfinished) == wanted


def test_a_partial_file_of_the_right_size_but_other_bytes_is_found_by_its_digests(
    unfinished: Path, source: Path, options: dict[str, Any], wanted: dict[str, str]
) -> None:
    if not options["hashing"]:
        pytest.skip("digests are what --no-hash gives up")
    for path in unfinished.glob("*.partial"):
        path.write_bytes(b"\x55" * path.stat().st_size)
    s.run(source, unfinished, **options)
    assert s.contents(unfinished) == wanted


def test_a_damaged_header_of_a_partial_file_is_written_anew(
    unfinished: Path, source: Path, options: dict[str, Any], wanted: dict[str, str]
) -> None:
    for path in unfinished.glob("*.partial"):
        s.flip(path, 20)
    s.run(source, unfinished, **options)
    assert s.contents(unfinished) == wanted


@pytest.mark.parametrize("damage", ["deleted", "shortened", "lengthened"])
def test_a_finished_file_of_an_unfinished_folder_that_was_damaged_is_written_anew(
    unfinished: Path, source: Path, options: dict[str, Any], wanted: dict[str, str], damage: str
) -> None:
    (first,) = unfinished.glob("*.safetensors")
    raw = first.read_bytes()
    first.write_bytes(raw[:-1] if damage == "shortened" else raw + b"x")
    if damage == "deleted":
        first.unlink()
    s.run(source, unfinished, **options)
    assert s.contents(unfinished) == wanted


def test_a_file_deleted_from_a_finished_folder_is_made_again(
    source: Path, options: dict[str, Any], wanted: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "mlx"
    s.run(source, out, **options)
    next(out.glob("model-00001*")).unlink()
    with pytest.raises(OutputError, match="--overwrite"):
        s.run(source, out, **options)
    s.run(source, out, overwrite=True, **options)
    assert s.contents(out) == wanted


def test_a_source_that_shrank_since_the_plan_is_refused(source: Path, tmp_path: Path) -> None:
    copy = s.copied(source, tmp_path / "copy")
    opened = open_source(copy)
    made = make_plan(opened, build.Options(recipe_of("native"), layout_of("inline")))
    path = copy / "model-00003-of-00007.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(HeaderError, match="model-00003-of-00007"):
        run.run(opened, made, tmp_path / "mlx")
    assert not (tmp_path / "mlx" / MANIFEST).exists()


# --- the lock --------------------------------------------------------------------------------------------------

HOLDER = """
import fcntl, os, sys
os.makedirs(sys.argv[1], exist_ok=True)
f = open(os.path.join(sys.argv[1], "lock"), "a")
fcntl.flock(f, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.sampled(1)
@pytest.mark.parametrize("words", [[], ["--overwrite"]])
def test_a_folder_that_another_process_writes_to_is_left_alone(source: Path, words: list[str], tmp_path: Path) -> None:
    out = tmp_path / "mlx"
    s.run(source, out)
    if not words:
        (out / MANIFEST).unlink()
        shutil.rmtree(out)
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(out / ".ds4convert")], **pipes) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        before = s.contents(out)
        done = s.cli("quantize", source, out, *words, exit_code=4)
        assert "another ds4convert is writing" in done.stderr
        assert s.contents(out) == before
        holder.communicate(b"")
    s.cli("quantize", source, out, *words)
    assert s.wrong(out, source) == []


# --- interrupts ------------------------------------------------------------------------------------------------


@pytest.mark.sampled(1)
@pytest.mark.parametrize("words", [[], ["--overwrite"]])
def test_ctrl_c_ends_with_130_says_how_to_go_on_and_the_same_command_does(
    source: Path, words: list[str], tmp_path: Path
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "mlx"
    command = ["quantize", source, out, "--max-shard-size", "1MB", "--jobs", "1", *words]
    calls = s.disk_calls("quantize", source, whole, *command[3:])
    ended = s.interrupted_at(2 * calls // 3, *command)
    assert ended.returncode == 130 and "same command" in ended.stderr and not (out / MANIFEST).exists()
    finished = {p.name: p.stat().st_mtime_ns for p in out.glob("*.safetensors")}
    assert finished
    assert json.loads(s.cli(*command, "--json").stdout)["resumed"]
    assert {n: (out / n).stat().st_mtime_ns for n in finished} == finished, "finished files were written again"
    assert s.contents(out) == s.contents(whole)


# --- --overwrite -----------------------------------------------------------------------------------------------


def test_overwrite_replaces_a_conversion_and_keeps_what_is_not_one(source: Path, tmp_path: Path) -> None:
    out, plain = tmp_path / "mlx", tmp_path / "plain"
    s.run(source, out, layout="universal", max_shard_bytes=1_000_000)
    kept = {
        "README.md": "mine",
        "notes.txt": "mine",
        "pictures/a.png": "mine",
        ".hidden": "mine",
        "data.safetensors": "x",
    }
    for name, text in kept.items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text(text)
    with pytest.raises(OutputError, match="--overwrite"):
        s.run(source, out)
    s.run(source, out, overwrite=True)
    s.run(source, plain)
    found = s.contents(out)
    for name, text in kept.items():
        assert (out / name).read_text() == text
        found.pop(name)
    found.pop("pictures/")
    assert found == s.contents(plain)


def test_overwrite_of_a_folder_without_room_removes_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "mlx"
    s.run(source, out, layout="mtplx")
    before = s.contents(out)
    monkeypatch.setattr("ds4convert.execution.run.free_bytes", lambda path: 1_000_000)
    with pytest.raises(EnvironmentFault, match="Nothing was written"):
        s.run(source, out, recipe="bf16", overwrite=True)
    assert s.contents(out) == before


def test_overwrite_counts_the_room_of_what_it_replaces(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "mlx"
    s.run(source, out, layout="mtplx")
    monkeypatch.setattr("ds4convert.execution.run.free_bytes", lambda path: 17_000_000)
    s.run(source, out, overwrite=True)
    assert s.wrong(out, source) == []


def test_an_interrupted_overwrite_is_refused_without_overwrite_and_completed_with_it(
    source: Path, tmp_path: Path
) -> None:
    plain = tmp_path / "plain"
    s.run(source, plain)
    for n in range(1, 30, 3):
        out = tmp_path / str(n)
        s.run(source, out, layout="universal")
        with pytest.raises(Died):
            s.run(source, out, disk=s.FailingDisk(n, Died), overwrite=True)
        try:
            s.run(source, out)
        except OutputError:
            s.run(source, out, overwrite=True)
        assert s.contents(out) == s.contents(plain), n


# --- links -----------------------------------------------------------------------------------------------------


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "victim").write_text("precious")
    return folder


LINKS = [
    ("model-00001-of-00001.safetensors", "victim"), ("model-00001-of-00001.safetensors.partial", "victim"),
    ("config.json", "victim"), ("config.json.partial", "victim"), (MANIFEST, "victim"),
    (f"{MANIFEST}.partial", "victim"),
    ("model.safetensors.index.json", "victim"), (".ds4convert", ""), ("mtp", ""), (".ds4convert", "nothing-there"),
    ("mtp", "nothing-there"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "target"), LINKS)
@pytest.mark.parametrize("overwrite", nightly([False, True], lambda overwrite: not overwrite))
def test_a_planted_link_is_never_followed(
    source: Path, outside: Path, name: str, target: str, overwrite: bool, tmp_path: Path
) -> None:
    out = tmp_path / "mlx"
    out.mkdir()
    (out / name).symlink_to(outside / target)
    try:
        s.run(source, out, layout="universal", overwrite=overwrite)
    except (OutputError, EnvironmentFault):
        assert (out / name).is_symlink()
    else:
        pytest.fail("a link that nothing names as ours was replaced")
    assert s.contents(outside) == {"victim": s.contents(outside)["victim"]}
    assert (outside / "victim").read_text() == "precious"


@pytest.mark.parametrize("name", ["plan.json", "journal.jsonl", "lock", "plan.json.partial", "journal.jsonl.partial"])
def test_a_link_planted_in_the_state_of_a_run_is_never_written_through(
    unfinished: Path, source: Path, options: dict[str, Any], outside: Path, name: str
) -> None:
    path = unfinished / ".ds4convert" / name
    path.unlink(missing_ok=True)
    path.symlink_to(outside / "victim")
    try:
        s.run(source, unfinished, **options)
    except (OutputError, EnvironmentFault):
        pass
    assert (outside / "victim").read_text() == "precious"


def test_links_planted_for_partial_and_finished_files_between_two_runs_are_never_written_through(
    unfinished: Path, source: Path, options: dict[str, Any], outside: Path
) -> None:
    size = next(iter(unfinished.glob("*.partial"))).stat().st_size
    (outside / "victim").write_bytes(b"x" * size)
    for path in [*unfinished.glob("*.partial")]:
        path.unlink()
        path.symlink_to(outside / "victim")
    with pytest.raises(EnvironmentFault):
        s.run(source, unfinished, **options)
    assert (outside / "victim").read_bytes() == b"x" * size


def test_a_drafter_folder_replaced_by_a_link_between_two_runs_is_not_written_through(
    source: Path, outside: Path, tmp_path: Path
) -> None:
    out = tmp_path / "mlx"
    counter = s.FailingDisk(1 << 60, Died)
    s.run(source, tmp_path / "count", disk=counter, layout="universal", jobs=1)
    for back in range(8, 30, 4):  # ends while the small files are written: all files of tensors are finished
        shutil.rmtree(out, ignore_errors=True)
        with pytest.raises(Died):
            s.run(source, out, disk=s.FailingDisk(counter.calls - back, Died), layout="universal", jobs=1)
        if not (out / "mtp" / "model.safetensors").exists() or (out / MANIFEST).exists():
            continue
        (out / "mtp").rename(outside / "moved")
        (out / "mtp").symlink_to(outside / "moved")
        before = s.contents(outside)
        with pytest.raises(EnvironmentFault, match="is a link"):
            s.run(source, out, layout="universal")
        assert s.contents(outside) == before
        return
    pytest.fail("no call was found at which the files of tensors are finished and the small ones are not")
