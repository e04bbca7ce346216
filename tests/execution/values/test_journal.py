"""The journal of a run: what is written is read, a line that is not ours ends it, and a source that changed undoes its steps."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds4convert.errors import OutputError
from ds4convert.execution import journal
from ds4convert.execution.journal import PIECE, Begun, Finished, Journal, Prints, begin
from ds4convert.files import Disk
from ds4convert.planning.parts import Part
from ds4convert.planning.types import Done, Loss
from tests.execution.values.plans import plan

PLAN = plan()
DIGEST, SHA = "d" * 32, "e" * 64
DONE = Done((DIGEST,), None)
PRINTS = Prints({"a": (100, 1), "b": (200, 2)}, "here", lambda name: f"sample of {name}")
STEPS = st.dictionaries(st.integers(0, 3), st.sampled_from([DONE, Done((DIGEST,), Loss(1.5, 2.0, 0.25))]))


def begun(state: Path, prints: Prints = PRINTS, made: Any = PLAN, **more: Any) -> Finished:
    return begin(Disk(), state, made, prints, {}, **more)


def written(state: Path, write: Callable[[Journal], None]) -> Finished:
    """Return what a run finds of what one before it has recorded."""
    begun(state)
    log = Journal(Disk(), state)
    write(log)
    log.close()
    return begun(state)


@given(STEPS, st.dictionaries(st.integers(0, 1), st.just(SHA)))
@settings(max_examples=15)
def test_what_a_run_records_the_next_one_finds(steps: dict[int, Done], files: dict[int, str | None]) -> None:
    with tempfile.TemporaryDirectory() as place:

        def write(log: Journal) -> None:
            for n, done in steps.items():
                log.steps({n: done})
            log.steps({})
            for n, sha256 in files.items():
                log.file(n, sha256)

        found = written(Path(place), write)
        assert (found.steps, found.files, found.begun) == (steps, files, {})
        assert begun(Path(place)).steps == steps, "and so does the one after that"


def test_a_step_that_is_partly_there_is_told_until_it_is_finished(tmp_path: Path) -> None:
    half = Begun(3, (7,), Done((DIGEST,), Loss(1.0, 2.0, 3.0)))
    assert written(tmp_path, lambda log: log.begun(1, half)).begun == {1: half}
    log = Journal(Disk(), tmp_path)
    log.steps({1: DONE})
    log.close()
    assert begun(tmp_path).steps == {1: DONE}
    assert begun(tmp_path).begun == {}, "the journal is written anew without it"


def lines(state: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (state / "journal.jsonl").read_text().splitlines()]


def test_every_line_has_the_checksum_of_what_it_says(tmp_path: Path) -> None:
    written(tmp_path, lambda log: log.steps({0: DONE}))
    found = lines(tmp_path)
    assert len(found) == 2 and found[0]["plan"] == PLAN.id
    for line in found:
        check = line.pop("check")
        assert check == hashlib.sha256(json.dumps(line, sort_keys=True).encode()).hexdigest()[:16]


def test_an_altered_or_torn_line_ends_the_journal_and_what_stands_before_it_counts(tmp_path: Path) -> None:
    def write(log: Journal) -> None:
        log.steps({0: DONE})
        log.steps({1: DONE})
        log.steps({2: DONE})

    written(tmp_path, write)
    path = tmp_path / "journal.jsonl"
    first, *rest = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + rest[0] + rest[1].replace(b"dd", b"dc", 1) + rest[2])
    assert begun(tmp_path).steps == {0: DONE}
    path.write_bytes(first + rest[0] + rest[1][:-1])
    assert begun(tmp_path).steps == {0: DONE}, "a line without its end is not whole"
    path.write_bytes(rest[0] + first)
    assert begun(tmp_path).steps == {}, "the first line has to name the plan"


WRONG: list[dict[str, Any]] = [
    {"steps": [[4, [DIGEST], None]]}, {"steps": [[-1, [DIGEST], None]]}, {"steps": [[True, [DIGEST], None]]},
    {"steps": [["0", [DIGEST], None]]}, {"steps": [[0, [], None]]}, {"steps": [[0, [DIGEST, DIGEST], None]]},
    {"steps": [[0, [None], None]]}, {"steps": [[0, ["d" * 31], None]]}, {"steps": [[0, ["D" * 32], None]]},
    {"steps": [[0, ["d" * 33], None]]}, {"steps": [[0, [7], None]]},
    {"steps": [[0, [DIGEST], [1.0, 2.0]]]}, {"steps": [[0, [DIGEST], [1, 2.0, 3.0]]]},
    {"steps": [[0, [DIGEST], [-1.0, 2.0, 3.0]]]}, {"steps": [[0, [DIGEST], [float("nan"), 2.0, 3.0]]]},
    {"steps": [[0, [DIGEST]]]}, {"steps": 3}, {"steps": [3]},
    {"file": 2, "sha256": SHA}, {"file": -1, "sha256": SHA}, {"file": True, "sha256": SHA}, {"file": "0", "sha256": SHA},
    {"file": 0, "sha256": None}, {"file": 0, "sha256": SHA[1:]}, {"file": 0},
    {"begun": [1, [5], [1, [DIGEST], None], [1, 2]]}, {"begun": [0, [5], [1, [DIGEST], None], PIECE]},
    {"begun": [True, [5], [1, [DIGEST], None], PIECE]}, {"begun": [1, [0], [1, [DIGEST], None], PIECE]},
    {"begun": [1, [21], [1, [DIGEST], None], PIECE]}, {"begun": [1, [5, 5], [1, [DIGEST], None], PIECE]},
    {"begun": [1, [5.0], [1, [DIGEST], None], PIECE]}, {"begun": [1, [5], [1, [DIGEST], None]]}, {"begun": None},
]  # fmt: skip


@pytest.mark.parametrize("line", WRONG, ids=str)
def test_a_line_that_this_program_does_not_write_ends_the_journal_though_its_checksum_is_right(
    tmp_path: Path, line: dict[str, Any]
) -> None:
    written(tmp_path, lambda log: log.steps({3: DONE}))
    with (tmp_path / "journal.jsonl").open("ab") as f:
        f.write(journal._sealed(line))
        f.write(journal._sealed({"steps": [[2, [DIGEST], None]]}))
    found = begun(tmp_path)
    assert (found.steps, found.files, found.begun) == ({3: DONE}, {}, {})


def test_the_largest_of_what_is_right_is_right(tmp_path: Path) -> None:
    whole = Begun(1, (20,), Done((DIGEST,), Loss(0.0, 0.0, 0.0)))
    assert written(tmp_path, lambda log: log.begun(1, whole)).begun == {1: whole}


def test_without_hashing_nothing_has_a_digest_and_one_is_not_of_this_run(tmp_path: Path) -> None:
    made = replace(PLAN, hashing=False)
    begun(tmp_path, made=made)
    log = Journal(Disk(), tmp_path)
    log.steps({0: Done((None,))})
    log.file(0, None)
    log.steps({1: DONE})
    log.close()
    found = begun(tmp_path, made=made)
    assert (found.steps, found.files) == ({0: Done((None,))}, {0: None})


def test_a_journal_of_another_plan_tells_nothing(tmp_path: Path) -> None:
    written(tmp_path, lambda log: log.steps({0: DONE}))
    assert begun(tmp_path, made=replace(PLAN, id="2" * 64)).steps == {}


def changed(**prints: tuple[int, int]) -> Prints:
    return replace(PRINTS, files={**PRINTS.files, **prints})


def everything(log: Journal) -> None:
    log.steps(dict.fromkeys(range(4), DONE))
    log.file(0, SHA)
    log.file(1, SHA)


@pytest.mark.parametrize(
    ("prints", "steps", "files"),
    [
        (PRINTS, {0, 1, 2, 3}, {0, 1}),
        (changed(a=(100, 9)), {1}, set()),  # steps 0, 2 and 3 read of `a`, and they lie in both files
        (changed(b=(200, 9)), {0, 3}, set()),
        (changed(a=(101, 1)), {1}, set()),
        (changed(a=(100, 9), b=(200, 9)), set(), set()),
    ],
)
def test_steps_and_files_made_of_a_source_that_was_replaced_do_not_count(
    tmp_path: Path, prints: Prints, steps: set[int], files: set[int]
) -> None:
    written(tmp_path, everything)
    found = begun(tmp_path, prints)
    assert (set(found.steps), set(found.files)) == (steps, files)


def test_a_source_that_changed_during_a_run_is_told_by_a_line_and_undoes_what_came_before(tmp_path: Path) -> None:
    def write(log: Journal) -> None:
        everything(log)
        log.changed("b")

    assert set(written(tmp_path, write).steps) == {0, 3}


@pytest.mark.parametrize(
    ("before", "place", "other"),
    [
        ([100, 1], "here", False),
        ([100, 2], "here", True),
        ([101, 1], "here", True),
        (None, "here", True),
        ("100", "here", True),
        ([100, 1], "there", False),  # the same size and time on another machine
        ([100, 2], "there", True),  # without a sample nothing tells that it is the same file
        ([100, 2, "sample of a"], "there", False),
        ([100, 2, "another"], "there", True),
        ([101, 2, "sample of a"], "there", True),
        ([100, 2, "sample of a"], "here", True),  # on this machine its time tells
        ([100, 1, "another"], "here", False),
    ],
)
def test_a_source_is_another_by_time_on_one_machine_and_by_samples_on_two(
    before: object, place: str, other: bool
) -> None:
    assert PRINTS.changed("a", before, place) is other


def test_samples_are_told_where_another_machine_may_compare_them() -> None:
    assert PRINTS.told(False) == {"a": [100, 1], "b": [200, 2]}
    assert PRINTS.told(True) == {"a": [100, 1, "sample of a"], "b": [200, 2, "sample of b"]}
    assert replace(PRINTS, sample=lambda name: None).told(True) == PRINTS.told(False)


# --- parts ---


def test_a_part_has_a_journal_of_its_own_files_and_the_run_after_takes_in_all_and_removes_them(tmp_path: Path) -> None:
    for number in (1, 2):
        begun(tmp_path, part=Part(number, 2), files=[number - 1])
        log = Journal(Disk(), tmp_path, Part(number, 2))
        log.steps(dict.fromkeys(range(4), DONE))
        log.close()
    assert {p.name for p in tmp_path.glob("journal*")} == {"journal-1-of-2.jsonl", "journal-2-of-2.jsonl"}
    assert set(begun(tmp_path, part=Part(1, 2), files=[0]).steps) == {0, 1}, "of its own file alone"
    assert set(begun(tmp_path).steps) == {0, 1, 2, 3}
    assert [p.name for p in tmp_path.glob("journal*")] == ["journal.jsonl"]


# --- other settings ---

OTHERS = [
    ({"recipe": "q4"}, "recipe was q4, now native"),
    ({"layout": "vlm", "output_bytes": 7}, "layout was vlm, now inline"),
    ({"head": "none"}, "head was none, now classic"),
    ({"hashing": False}, "hashing was off, now on"),
    ({"recipe": None}, "recipe was not set, now native"),
    ({"files": 12345}, "number of files was 12,345, now 2"),
    ({"output_bytes": 1, "source_bytes": 2}, "bytes of the result was 1, now 80, bytes of the source was 2, now 300"),
    ({"formats": {"backbone": "bf16"}}, "format of backbone was bf16, now native, format of mtp was not set, now native"),
    ({"formats": 3, "files": 5}, "format of backbone was not set, now native, format of mtp was not set, now native"),
    ({"sources": []}, "the source's headers changed"),
    ({"recipe": "q4", "sources": []}, "recipe was q4, now native, the source's headers changed"),
    ({"recipe": "a\x1b[2Jb"}, "recipe was a\\x1b[2Jb, now native"),
    ({}, "the version of ds4convert, or the source's small files"),
]  # fmt: skip


@pytest.mark.parametrize(("other", "told"), OTHERS, ids=lambda x: x[:20] if isinstance(x, str) else "")
def test_an_unfinished_run_of_other_settings_is_refused_with_what_differs(
    tmp_path: Path, other: dict[str, Any], told: str
) -> None:
    state = tmp_path / ".ds4convert"
    state.mkdir()
    (state / "plan.json").write_text(json.dumps(journal.summary(PLAN) | {"plan": "2" * 64} | other))
    with pytest.raises(OutputError) as found:
        journal.check_same_plan(state, PLAN)
    assert str(found.value).startswith(f"{tmp_path}: holds an unfinished conversion with other settings ({told}); ")
    assert not journal.is_of(state, PLAN)


def test_an_unfinished_run_of_this_plan_is_gone_on_with_whatever_else_its_summary_says(tmp_path: Path) -> None:
    state = tmp_path / ".ds4convert"
    state.mkdir()
    (state / "plan.json").write_text(json.dumps({"plan": PLAN.id, "recipe": "another"}))
    journal.check_same_plan(state, PLAN)
    assert journal.is_of(state, PLAN)
    (tmp_path / "link").symlink_to(state)
    assert not journal.is_of(tmp_path / "link", PLAN)


@pytest.mark.parametrize("text", ["", "[]", "no json", "3"])
def test_a_plan_that_cannot_be_read_is_no_hindrance_in_a_folder_without_files_and_one_beside_files(
    tmp_path: Path, text: str
) -> None:
    state = tmp_path / ".ds4convert"
    state.mkdir()
    (state / "plan.json").write_text(text)
    journal.check_same_plan(state, PLAN)
    for n in range(6):
        (tmp_path / f"f{n}").touch()
    with pytest.raises(OutputError) as found:
        journal.check_same_plan(state, PLAN)
    assert str(found.value) == (
        f"{tmp_path}: .ds4convert/plan.json cannot be read, so what is here (f0, f1, f2, f3, f4) may be of other "
        "settings, or of another program; choose another folder"
    )
