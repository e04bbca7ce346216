"""Which files of a folder are ours: by what marks they are known, what a conversion may write, and what keeps it from it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from ds4convert.errors import OutputError
from ds4convert.execution import ownership
from ds4convert.execution.locking import is_lock
from ds4convert.execution.ownership import Mark, as_table, marks_of
from ds4convert.files import Disk
from tests.execution.values.plans import HEADER, plan

PLAN = plan()


def folder(tmp_path: Path, *names: str) -> Path:
    """Return an output folder with the state of an unfinished run of the plan, and these files of it as it wrote them."""
    out = tmp_path / "out"
    (out / ".ds4convert").mkdir(parents=True)
    (out / ".ds4convert" / "plan.json").write_text(json.dumps({"names": as_table(marks_of(PLAN))}))
    for name in names:
        (out / name).write_bytes(b"{}" if name.endswith("json") else HEADER + bytes(30))
    return out


def refused(out: Path, *written: str) -> str:
    with pytest.raises(OutputError) as found:
        ownership.check(out, written or marks_of(PLAN))
    return str(found.value)


def test_a_file_of_tensors_is_known_by_size_and_header_and_a_small_one_by_its_bytes() -> None:
    assert marks_of(PLAN) == {
        "model-1.safetensors": Mark(40, hashlib.sha256(b"{}").hexdigest()),
        "model-2.safetensors": Mark(40, hashlib.sha256(b"{}").hexdigest()),
        "config.json": Mark(sha256=hashlib.sha256(b"{}").hexdigest()),
        "tokenizer.json": Mark(sha256="c" * 64),
    }


def test_marks_that_are_written_down_are_read_again() -> None:
    marks = {**marks_of(PLAN), "x": Mark()}
    assert ownership._from_table(json.loads(json.dumps(as_table(marks)))) == marks


@pytest.mark.parametrize(
    "table",
    [None, [], 3, {"a": None}, {"a": [1, "b"]}, {"a": [1, "b", "c", "d"]}, {"a": [True, "b", "c"]},
     {"a": ["1", "b", "c"]}, {"a": [1.0, "b", "c"]}, {"a": [1, 2, "c"]}, {"a": [1, "b", 3]},
     {"good": [1, "b", "c"], "a": [1, "b", []]}],
    ids=str,
)  # fmt: skip
def test_a_table_that_is_not_ours_marks_nothing(table: object) -> None:
    assert ownership._from_table(table) == {}


@pytest.mark.parametrize(
    ("name", "may"),
    [
        ("model.safetensors", True), ("model-00001-of-00002.safetensors", True), ("model-mtp.safetensors", True),
        ("config.json", True), ("model.safetensors.index.json", True), ("ds4convert_manifest.json", True),
        ("tokenizer.json", True), ("chat_template.jinja", True), ("mtp/model.safetensors", True),
        ("mtp/config.json", True), ("mtp/model.safetensors.index.json", True),
        ("my.safetensors", False), ("model.bin", False), ("mtp/tokenizer.json", False), ("other/model.safetensors", False),
        ("mtp/sub/model.safetensors", False), ("../model.safetensors", False), ("thesis.txt", False), ("", False),
        ("/etc/passwd", False), ("mtp/../config.json", False), ("README.md", False), ("model.safetensors.partial", False),
    ],
)  # fmt: skip
def test_only_names_that_a_conversion_writes_are_believed(name: str, may: bool) -> None:
    assert ownership._may_write(name) is may


def test_a_plan_that_names_what_no_conversion_writes_makes_nothing_ours(tmp_path: Path) -> None:
    out = folder(tmp_path, "model-1.safetensors")
    assert ownership.read(out) is not None and ownership.ours(out)
    (out / ".ds4convert" / "plan.json").write_text(json.dumps({"names": {"thesis.txt": [None, None, None]}}))
    assert ownership.read(out) is None and not ownership.ours(out)


@pytest.mark.parametrize("name", ["plan.json", "clearing.json"])
def test_a_clearing_that_was_broken_off_tells_as_well_as_a_plan(tmp_path: Path, name: str) -> None:
    out = folder(tmp_path)
    (out / ".ds4convert" / "plan.json").rename(out / ".ds4convert" / name)
    assert ownership.read(out) == marks_of(PLAN)


def test_a_folder_of_ours_with_files_gone_or_cut_off_may_be_replaced(tmp_path: Path) -> None:
    out = folder(tmp_path, "model-1.safetensors", "model-2.safetensors", "config.json")
    ownership.check(out, marks_of(PLAN))
    (out / "model-2.safetensors").write_bytes(HEADER + bytes(3))  # its data was cut off
    ownership.check(out, marks_of(PLAN))
    (out / "model-2.safetensors").write_bytes(b"")
    ownership.check(out, marks_of(PLAN))
    (out / "model-2.safetensors").write_bytes(b"\xff" * 40)  # damaged, of its very size
    ownership.check(out, marks_of(PLAN))
    (out / "model-2.safetensors").unlink()
    (out / "model-2.safetensors.partial").write_bytes(b"half")
    ownership.check(out, marks_of(PLAN))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("model-1.safetensors", b"\x02" + bytes(7) + b"[]" + bytes(31)),  # no header of ours, and another size
        ("model-1.safetensors", b"\xff" * 41),  # no header, and another size
        ("model-1.safetensors", b"\x02" + bytes(6)),
        ("model-1.safetensors", b"\x02" + bytes(7) + b"[]"),
        ("config.json", b"{ }"),
        ("config.json", b""),
    ],
)
def test_a_file_that_was_altered_since_is_told_and_nothing_is_removed(tmp_path: Path, name: str, data: bytes) -> None:
    out = folder(tmp_path, "model-1.safetensors", "config.json")
    (out / name).write_bytes(data)
    assert refused(out) == (
        f"{out}: holds something that ds4convert did not write ({name}, altered since), so nothing there is replaced; "
        "choose another folder, or move that away"
    )
    assert not ownership.ours(out, marks_of(PLAN))


def test_files_of_the_user_stay_unless_they_are_in_the_way(tmp_path: Path) -> None:
    out = folder(tmp_path, "model-1.safetensors")
    (out / "notes.txt").touch()
    ownership.check(out, ["model-1.safetensors"])
    assert "(notes.txt)" in refused(out, "notes.txt")
    assert "(notes.txt)" in refused(out, "NOTES.txt"), "one name on APFS and exFAT"
    (out / "model-9.safetensors").touch()
    assert "(model-9.safetensors)" in refused(out, "config.json"), "hosts would load it with the rest"


def test_the_first_five_things_in_the_way_are_named(tmp_path: Path) -> None:
    out = folder(tmp_path)
    for n in range(7):
        (out / f"model-x{n}.safetensors").touch()
    shown = "; ".join(f"model-x{n}.safetensors" for n in range(5))
    assert f"({shown}; ...)" in refused(out)


def test_a_folder_that_tells_nothing_is_refused_unless_it_is_empty(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    ownership.check(out, ["config.json"])
    assert not ownership.ours(out), "empty, so there is nothing of ours"
    (out / "a\nb").touch()
    assert "(a\\nb)" in refused(out)


@pytest.mark.parametrize("kind", ["link", "file"])
def test_a_state_folder_that_is_none_is_not_gone_into(tmp_path: Path, kind: str) -> None:
    out, state = tmp_path / "out", tmp_path / "out" / ".ds4convert"
    out.mkdir()
    state.symlink_to(tmp_path) if kind == "link" else state.touch()
    assert refused(out) == f"{state}: is a link or a file, expected a folder; remove it"


def test_a_drafter_folder_that_is_a_link_is_not_gone_into(tmp_path: Path) -> None:
    out = folder(tmp_path)
    (out / "mtp").symlink_to(tmp_path)
    assert refused(out) == f"{out / 'mtp'}: is a link, expected a folder; remove it"


def test_clearing_removes_ours_and_partial_files_alone_and_writes_down_first_what_is_ours(tmp_path: Path) -> None:
    out = folder(tmp_path, "model-1.safetensors", "config.json")
    for name in ("notes.txt", "model-2.safetensors.partial", ".ds4convert/lock", ".ds4convert/journal.jsonl"):
        (out / name).touch()
    (out / "mtp").mkdir()
    assert {p.name for p in ownership.removable(out)} == {
        "model-1.safetensors",
        "config.json",
        "model-2.safetensors.partial",
    }
    ownership.clear(out, Disk())
    assert {p.name for p in out.iterdir()} == {".ds4convert", "notes.txt"}
    assert {p.name for p in (out / ".ds4convert").iterdir()} == {"lock", "clearing.json"}
    assert ownership.read(out) == marks_of(PLAN), "a clearing that is broken off here can be finished"


@pytest.mark.parametrize(
    ("name", "lock"),
    [("lock", True), ("holder", True), ("writers", True), ("lock-1-of-2", True), ("writers-10-of-12", True),
     ("lock-1", False), ("lock-a-of-2", False), ("locks", False), ("lock\n", False), ("lock-1-of-2.x", False),
     ("journal.jsonl", False), ("lock-١-of-٢", False)],
)  # fmt: skip
def test_files_of_locks_are_known_by_name(name: str, lock: bool) -> None:
    assert is_lock(name) is lock
