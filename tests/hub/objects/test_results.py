"""A conversion into an object store: equal to the local one, never replacing anything, going on wherever it was cut off.

How S3 answers a create-only put (`If-None-Match: *`), by AWS's own pages, read in 2026-11:
https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-writes.html and
https://docs.aws.amazon.com/AmazonS3/latest/API/API_PutObject.html: 412 Precondition Failed where an object has the name
already, and 409 ConditionalRequestConflict where a conflicting operation came between; after 409 the upload is to be
tried again. object_store, which obstore is made of, says AlreadyExists of both
(https://github.com/apache/arrow-rs-object-store/pull/852), so a program has to look itself. moto answers 412 by itself;
409 is put in front of it here.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import random
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import ds4convert as ds4
from ds4convert.execution import workers
from ds4convert.storage import drives
from tests import support_run as s
from tests.hub.objects.conftest import DENIED, S3, Answer

NUMBERS = itertools.count()
OPTIONS = {"max_shard_size": 1_000_000}
WORDS = ("--max-shard-size", "1MB")
MANIFEST = "ds4convert_manifest.json"
CONFLICT = ("409 Conflict", "ConditionalRequestConflict")


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Have what is said once in a run be said in every test; return what moves on to a machine with a disk of its own.

    A machine is the folder of the Hub client's settings: nothing else of an earlier run lies on it.
    """
    monkeypatch.setattr(drives, "_said", set())

    def move(name: str) -> None:
        monkeypatch.setenv("HF_HOME", str(tmp_path / name))
        monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / name))

    move("first machine")
    return move


@pytest.fixture
def where(s3: S3) -> str:
    """Return a folder of the store that nothing is in."""
    return f"result-{next(NUMBERS)}"


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return local(source, tmp_path_factory.mktemp("whole") / "out")


def local(source: Path, out: Path, **options: object) -> dict[str, str]:
    """Return the files of a conversion into a folder here, by name."""
    ds4.convert(source, out, **(OPTIONS | options))
    return {n: digest for n, digest in s.contents(out).items() if not n.endswith("/")}


def results() -> list[Path]:
    """Return what runs have left in the folder of this machine that they write in."""
    folder = Path(os.environ["HF_HOME"]) / "ds4convert" / "results"
    return sorted(folder.iterdir()) if folder.is_dir() else []


def shard_puts(s3: S3, status: str = "200") -> list[str]:
    """Return the names of the tensor files that were taken, in their order; with `status` "" all that were tried."""
    return [p.rpartition("/")[2] for p, _, told in s3.puts if p.endswith(".safetensors") and told.startswith(status)]


def test_every_file_is_put_where_none_is_the_manifest_last_and_a_few_lie_here_at_once(
    s3: S3, where: str, source: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    most = [0]

    def look(method: str, path: str) -> None:
        here = [p for folder in results() for p in folder.rglob("*.safetensors*")]
        most[0] = max(most[0], len(here))

    s3.after = look
    done = ds4.convert(source, f"s3://models/{where}", jobs=2, **OPTIONS)
    assert done.manifest == f"s3://models/{where}/{MANIFEST}" and done.folder == f"s3://models/{where}"
    assert s3.contents(where) == whole
    assert s3.puts and all(wanted == "*" for _, wanted, _ in s3.puts)
    assert s3.puts[-1][0].endswith(MANIFEST)
    assert len(shard_puts(s3)) > 3 >= most[0] > 0  # two are written, and one more may just have lost its copy here
    assert not results()
    assert all(c.ok for c in ds4.verify(s3.get(where, tmp_path / "copy"), source=source).checks)
    s3.puts.clear()
    assert ds4.convert(source, f"s3://models/{where}", **OPTIONS).already_done and not s3.puts


@pytest.mark.parametrize("options", [{"layout": "universal"}, {"recipe": "q4", "hashing": False}], ids=str)
def test_other_layouts_and_formats_are_equal_too(
    s3: S3, where: str, source: Path, options: dict[str, object], tmp_path: Path
) -> None:
    ds4.convert(source, f"s3://models/{where}", **(OPTIONS | options))
    assert s3.contents(where) == local(source, tmp_path / "out", **options)


def test_processes_that_write_files_put_them_too(
    s3: S3, where: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "FED", 1)
    monkeypatch.setattr(workers, "ENOUGH_WEIGHTS", 0)
    ds4.convert(source, f"s3://models/{where}", recipe="q4", cores=2, **OPTIONS)
    assert s3.contents(where) == local(source, tmp_path / "out", recipe="q4")


def test_parts_on_machines_that_share_nothing_but_the_store_make_the_same_folder(
    s3: S3, where: str, source: Path, whole: dict[str, str], tmp_path: Path, machine: Callable[[str], None]
) -> None:
    for number in (3, 1):  # the second never runs
        machine(f"machine {number}")
        copy = s.copied(source, tmp_path / f"source-{number}")
        for path in copy.iterdir():
            os.utime(path, (number, number))
        done = s.cli("quantize", copy, f"s3://models/{where}", *WORDS, "--part", f"{number}/3")
        assert "without --part" in done.stdout and not results()
    assert MANIFEST not in s3.contents(where)
    before = set(shard_puts(s3))
    s3.puts.clear()
    machine("the last")
    ended = ds4.convert(source, f"s3://models/{where}", **OPTIONS)
    assert ended.resumed and s3.contents(where) == whole
    assert before and set(shard_puts(s3, "")).isdisjoint(before)


# --- cut off ---------------------------------------------------------------------------------------------------


def killed_run(s3: S3, source: Path, where: str, at: int, before: bool) -> bool:
    """Run the command line and kill it at its `at`-th request, before or after that is done; return whether it was."""
    count, killed = itertools.count(1), threading.Event()
    child = s.start("quantize", source, f"s3://models/{where}", *WORDS, "-q")

    def kill() -> None:
        if next(count) == at:
            killed.set()  # first: the run is waited for elsewhere, and is gone as soon as it is killed
            child.send_signal(signal.SIGKILL)
            child.wait(60)  # nothing is answered before it has gone

    def fault(method: str, path: str) -> Answer:
        if before:
            kill()
        return None

    s3.fault, s3.after = fault, lambda method, path: None if before else kill()
    child.communicate(timeout=120)
    s3.fault, s3.after = (lambda method, path: None), (lambda method, path: None)
    assert killed.is_set() == (child.returncode == -signal.SIGKILL), child.returncode
    return killed.is_set()


@pytest.mark.slow
@pytest.mark.parametrize(
    "seed", [1, pytest.param(2, marks=pytest.mark.nightly), pytest.param(3, marks=pytest.mark.nightly)]
)
def test_a_run_that_is_killed_at_any_request_goes_on_and_puts_no_file_twice(
    s3: S3, where: str, source: Path, whole: dict[str, str], seed: int
) -> None:
    dice, kills = random.Random(seed), 0
    for _ in range(4):
        kills += killed_run(s3, source, where, dice.randint(2, 22), dice.random() < 0.5)
        assert MANIFEST not in s3.contents(where)
    s.cli("quantize", source, f"s3://models/{where}", *WORDS, "-q")
    assert kills >= 3 and s3.contents(where) == whole
    assert sorted(shard_puts(s3)) == sorted(n for n in whole if n.endswith(".safetensors"))
    assert not results()


def test_what_is_there_is_neither_made_nor_put_again(
    s3: S3, where: str, source: Path, whole: dict[str, str], machine: Callable[[str], None]
) -> None:
    left = [3]

    def fault(method: str, path: str) -> Answer:
        left[0] -= method == "PUT" and path.endswith(".safetensors")
        return DENIED if left[0] < 0 and method == "PUT" else None

    s3.fault = fault
    with pytest.raises(ds4.EnvironmentFault, match="refuses to let this be written") as caught:
        ds4.convert(source, f"s3://models/{where}", jobs=1, **OPTIONS)
    assert "AWS_ACCESS_KEY_ID" in str(caught.value) and "\n" not in str(caught.value)
    assert len(before := shard_puts(s3)) == 3
    s3.reset()
    machine("another")
    done = ds4.convert(source, f"s3://models/{where}", **OPTIONS)
    assert done.resumed and s3.contents(where) == whole
    assert set(shard_puts(s3, "")).isdisjoint(before)


def test_ctrl_c_does_not_wait_for_a_put_that_hangs(s3: S3, where: str, source: Path, whole: dict[str, str]) -> None:
    child = s.start("quantize", source, f"s3://models/{where}", *WORDS, "-q")
    let_go = threading.Event()

    def fault(method: str, path: str) -> Answer:
        if method == "PUT" and path.endswith(".safetensors"):
            child.send_signal(signal.SIGINT)
            let_go.wait(600)
            return ("503 Slow Down", "SlowDown")
        return None

    s3.fault = fault
    try:
        _, err = child.communicate(timeout=300)
    finally:
        let_go.set()
    assert child.returncode == 130 and "Traceback" not in err
    s3.reset()
    ds4.convert(source, f"s3://models/{where}", **OPTIONS)
    assert s3.contents(where) == whole


def test_files_here_of_another_plan_for_the_same_place_are_cleared(s3: S3, where: str, source: Path) -> None:
    s3.fault = lambda method, path: DENIED if method == "PUT" and path.endswith(".safetensors") else None
    with pytest.raises(ds4.EnvironmentFault):
        ds4.convert(source, f"s3://models/{where}", **OPTIONS)
    assert len(results()) == 1
    s3.reset()
    assert s3.request("DELETE", f"/models/{where}/.ds4convert/plan.json") == 204
    ds4.convert(source, f"s3://models/{where}", recipe="q4", **OPTIONS)
    assert not results()


# --- others at the same place ----------------------------------------------------------------------------------


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], str]]:
    with caplog.at_level(logging.WARNING, "ds4convert"):
        yield lambda: "\n".join(r.getMessage() for r in caplog.records if r.name == "ds4convert")


def first_shard(whole: dict[str, str]) -> str:
    return min(n for n in whole if n.endswith(".safetensors"))


@pytest.mark.parametrize("hides_digests", [False, True])
def test_a_put_that_comes_second_counts_where_the_bytes_are_the_same_and_is_told(
    s3: S3, where: str, source: Path, whole: dict[str, str], hides_digests: bool, tmp_path: Path,
    warned: Callable[[], str],
) -> None:  # fmt: skip
    name = first_shard(whole)
    local(source, tmp_path / "out")
    theirs = (tmp_path / "out" / name).read_bytes()
    raced = threading.Event()

    def fault(method: str, path: str) -> Answer:
        if method == "PUT" and path.endswith(name) and not raced.is_set():
            raced.set()
            assert s3.request("PUT", path, theirs) == 200
        return None

    s3.fault, s3.hides_digests = fault, hides_digests
    ds4.convert(source, f"s3://models/{where}", **OPTIONS)
    assert raced.is_set() and s3.contents(where) == whole
    assert [status[:3] for path, _, status in s3.puts if path.endswith(name)] == ["200", "412"]
    assert f"{name} was there already, with just the bytes that this run made" in warned()
    assert ("tells no digest of what it holds" in warned()) == hides_digests
    read_back = any(path.endswith(name) and tag for path, _, tag in s3.seen)
    assert read_back == hides_digests  # the ETag is taken for the digest that it is, else the bytes are compared


def test_another_object_of_the_name_is_told_and_stays(
    s3: S3, where: str, source: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    name = first_shard(whole)
    local(source, tmp_path / "out")
    theirs = bytearray((tmp_path / "out" / name).read_bytes())
    theirs[-1] ^= 1

    def fault(method: str, path: str) -> Answer:
        if method == "PUT" and path.endswith(name):
            s3.reset()
            assert s3.request("PUT", path, bytes(theirs)) == 200
        return None

    s3.fault = fault
    done = s.cli("quantize", source, f"s3://models/{where}", *WORDS, exit_code=3)
    assert f"{name}: another object has that name ({len(theirs):,} bytes" in done.stderr
    assert "was not replaced" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    found = s3.contents(where)
    assert found[name] == hashlib.sha256(theirs).hexdigest() and MANIFEST not in found


def test_a_conflict_that_left_nothing_is_no_object_of_another(
    s3: S3, where: str, source: Path, whole: dict[str, str], warned: Callable[[], str]
) -> None:
    conflicts = [2]

    def fault(method: str, path: str) -> Answer:
        if method == "PUT" and path.endswith(first_shard(whole)) and conflicts[0]:
            conflicts[0] -= 1
            return CONFLICT
        return None

    s3.fault = fault
    ds4.convert(source, f"s3://models/{where}", **OPTIONS)
    assert conflicts == [0] and s3.contents(where) == whole and not warned()


def test_an_answer_that_was_lost_is_no_object_of_another(
    s3: S3, where: str, source: Path, whole: dict[str, str]
) -> None:
    """The store took the bytes and its answer never came: the second try finds the run's own object."""
    name, lost = first_shard(whole), threading.Event()

    def after(method: str, path: str) -> Answer:
        if method == "PUT" and path.endswith(name) and not lost.is_set():
            lost.set()
            return ("500 Internal Server Error", "InternalError")
        return None

    s3.after = after
    ds4.convert(source, f"s3://models/{where}", **OPTIONS)
    assert lost.is_set() and s3.contents(where) == whole


def test_a_store_that_replaces_although_asked_not_to_is_refused(s3: S3, where: str, source: Path) -> None:
    s3.ignores_conditions = True
    with pytest.raises(ds4.EnvironmentFault, match=r"replaces objects although it is asked not to \(If-None-Match\)"):
        ds4.convert(source, f"s3://models/{where}", **OPTIONS)
    assert list(s3.contents(where)) == [".ds4convert/plan.json"]


def test_a_folder_that_holds_something_else_is_refused_and_left_alone(
    s3: S3, where: str, source: Path, tmp_path: Path
) -> None:
    assert s3.request("PUT", f"/models/{where}/sub/notes.txt", b"mine") == 200
    done = s.cli("quantize", source, f"s3://models/{where}", *WORDS, exit_code=3)
    assert "is not empty (it holds sub/notes.txt)" in done.stderr
    assert list(s3.contents(where)) == ["sub/notes.txt"]
    ds4.convert(source, f"s3://models/{where}/free", **OPTIONS)
    before = s3.contents(f"{where}/free")
    with pytest.raises(ds4.OutputError, match="holds another conversion"):
        ds4.convert(source, f"s3://models/{where}/free", recipe="q4", **OPTIONS)
    with pytest.raises(ds4.UsageError, match=r"nothing in a store is replaced"):
        ds4.convert(source, f"s3://models/{where}/free", recipe="q4", overwrite=True, **OPTIONS)
    assert s3.contents(f"{where}/free") == before


def test_other_options_than_an_unfinished_run_had_are_refused_with_what_differs(
    s3: S3, where: str, source: Path, whole: dict[str, str]
) -> None:
    s.cli("quantize", source, f"s3://models/{where}", *WORDS, "--part", "1/2", "-q")
    before = s3.contents(where)
    with pytest.raises(ds4.OutputError, match=r"unfinished conversion with other settings .recipe was native, now q4"):
        ds4.convert(source, f"s3://models/{where}", recipe="q4", **OPTIONS)
    assert s3.contents(where) == before
    told = s.cli("quantize", source, f"s3://models/{where}", *WORDS, "--recipe", "q4", exit_code=3).stderr
    assert "--max-shard-size 1MB" in told and "--part" not in told


def test_what_was_made_of_another_state_of_the_source_is_not_taken_over(
    s3: S3, where: str, source: Path, tmp_path: Path
) -> None:
    """Equal headers, other values: the file that lies there is not that of this source, and cannot be replaced."""
    other = s.copied(source, tmp_path / "other")
    ds4.convert(other, f"s3://models/{where}", part="1/2", **OPTIONS)
    for path in other.glob("*.safetensors"):
        s.flip(path, path.stat().st_size - 5)
    with pytest.raises(ds4.OutputError, match="another object has that name"):
        ds4.convert(other, f"s3://models/{where}", **OPTIONS)
    assert MANIFEST not in s3.contents(where)


def in_one_shard(source: Path, to: Path) -> Path:
    """Return a copy of a checkpoint whose tensors lie in one file."""
    shutil.copytree(source, to, ignore=shutil.ignore_patterns("*.safetensors*"))
    table, data = {}, b""
    for name, found in s.stored(source).items():
        raw = found.path.read_bytes()[found.start : found.start + found.size]
        table[name] = {"dtype": found.dtype, "shape": found.shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    header = json.dumps(table).encode()
    (to / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    return to


def test_no_file_is_put_before_the_digests_of_its_sources_are_known(
    s3: S3, where: str, source: Path, tmp_path: Path
) -> None:
    """Nothing there can be made anew: of a shard of which one byte came wrong no file may be left."""
    one = in_one_shard(source, tmp_path / "one")
    s3.put(one, f"{where}-source")
    right = hashlib.sha256((one / "model.safetensors").read_bytes()).hexdigest()

    def tell(digest: str) -> None:
        assert s3.request("PUT", f"/models/{where}-source/SHA256SUMS", f"{digest}  model.safetensors\n".encode()) == 200

    tell("0" * 64)
    with pytest.raises(ds4.EnvironmentFault, match="have not the sha256 that is listed"):
        ds4.convert(f"s3://models/{where}-source", f"s3://models/{where}", window="1MB", **OPTIONS)
    assert not [n for n in s3.contents(where) if n.endswith(".safetensors")]
    tell(right)
    done = ds4.convert(f"s3://models/{where}-source", f"s3://models/{where}", window="1MB", **OPTIONS)
    assert s3.contents(where) == local(one, tmp_path / "out")
    assert done.plan.as_json()["output_shards"] > 3


# --- what goes wrong -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("out", "code", "told"),
    [
        ("s3://no-such-bucket/x", 4, "there is no such bucket or folder"),
        ("s3://", 2, "names no bucket"),
        ("s4://bucket/x", 2, "a result is written to a folder of this machine or of an object store"),
        ("hf://me/model", 2, "`ds4convert publish` sends a finished folder to the Hub"),
    ],
)
def test_an_address_that_leads_nowhere_is_one_line_and_its_exit_code(
    s3: S3, source: Path, out: str, code: int, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    done = s.cli("quantize", source, out, *WORDS, exit_code=code)
    line = done.stderr.strip().splitlines()[-1]
    assert told in line and line.startswith("Error: ")
    assert not list((tmp_path / "here").iterdir()) and not results()


def test_rights_that_lack_are_told_with_where_they_come_from(s3: S3, where: str, source: Path) -> None:
    s3.fault = lambda method, path: DENIED
    done = s.cli("quantize", source, f"s3://models/{where}", *WORDS, exit_code=4)
    assert "refuses to let this be read" in done.stderr and "AWS_ACCESS_KEY_ID" in done.stderr
    s3.fault = lambda method, path: DENIED if method == "PUT" else None
    done = s.cli("quantize", source, f"s3://models/{where}", *WORDS, exit_code=4)
    assert "refuses to let this be written" in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_a_state_that_may_not_be_removed_leaves_a_whole_result(
    s3: S3, where: str, source: Path, whole: dict[str, str]
) -> None:
    s3.fault = lambda method, path: DENIED if method in {"POST", "DELETE"} else None
    told = s.cli("quantize", source, f"s3://models/{where}", *WORDS, "-q").stderr
    assert told.startswith("Warning: ") and len(told.splitlines()) == 1
    assert "The result is whole; what is left under .ds4convert/ may be removed" in told
    s3.reset()
    assert ds4.convert(source, f"s3://models/{where}", **OPTIONS).already_done
    assert s3.contents(where) == whole


def test_a_file_that_no_request_holds_is_refused_before_anything_is_put(
    s3: S3, where: str, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules["ds4convert.hub.objects.writing"].MOST_BYTES, "s3", 500_000)
    with pytest.raises(ds4.UsageError, match="takes at most 500,000 in a request that replaces nothing"):
        ds4.convert(source, f"s3://models/{where}", **OPTIONS)
    assert not s3.contents(where)


def test_a_file_that_is_gone_from_the_store_is_made_again(
    s3: S3, where: str, source: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    ds4.convert(source, f"s3://models/{where}", part="1/2", **OPTIONS)
    gone = shard_puts(s3)[0]
    assert s3.request("DELETE", f"/models/{where}/{gone}") == 204
    ds4.convert(source, f"s3://models/{where}", **OPTIONS)
    assert s3.contents(where) == whole
    assert s3.request("DELETE", f"/models/{where}/{gone}") == 204
    with pytest.raises(ds4.OutputError, match=f"has the manifest of this conversion, but {gone} is missing"):
        ds4.convert(source, f"s3://models/{where}", **OPTIONS)


def test_without_the_extra_it_is_said_what_to_install(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(ds4.EnvironmentFault, match=r"pip install 'ds4convert\[objects\]'"):
        ds4.convert(source, "s3://models/out")


def test_a_disk_needs_room_for_the_files_that_are_written_at_once(
    s3: S3, where: str, source: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, str]
) -> None:
    sizes = sum(f.size for f in ds4.plan(source, **OPTIONS).prepared.plan.files)
    monkeypatch.setattr("ds4convert.execution.run.free_bytes", lambda path: (16 << 20) + sizes // 2)
    with pytest.raises(ds4.EnvironmentFault, match="more bytes, but this disk has"):
        ds4.convert(source, Path(os.environ["HF_HOME"]) / "out", **OPTIONS)
    ds4.convert(source, f"s3://models/{where}", **OPTIONS)
    assert s3.contents(where) == whole
