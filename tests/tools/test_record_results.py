"""The tool that compares two versions: what it leaves out, what it digests, and that a difference is told by its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tools.loaded import load

results = load("tools/record_results.py")


def test_keys_that_differ_from_run_to_run_are_left_out_wherever_they_stand() -> None:
    value = {"seconds": 1, "a": [{"speedup": 2, "b": 3}, 4], "c": {"path": "x", "d": {"manifest": "y"}}, "e": "seconds"}
    assert results.steady(value) == {"a": [{"b": 3}, 4], "c": {"d": {}}, "e": "seconds"}


def test_every_file_below_a_folder_is_digested_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(b"")
    (tmp_path / ".hidden").write_bytes(b"abc")
    assert results.digests(tmp_path) == {
        "a/b": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",  # sha256 of nothing and of "abc":
        ".hidden": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",  # FIPS 180-2, appendix B.1
    }


@pytest.mark.parametrize(
    ("a", "b", "told"),
    [
        ({"x": {"y": 1}}, {"x": {"y": 2}}, ".x.y: 1 | 2"),
        ({"x": [1, 2]}, {"x": [1, 3]}, ".x[1]: 2 | 3"),
        ({"x": [1]}, {"x": [1, 2]}, ".x: [1] | [1, 2]"),
        ({"x": 1}, {"x": 1, "z": 2}, ".z: None | 2"),
        ({"x": 1, "y": 5}, {"x": 1}, ".y: 5 | None"),
        ({"x": {"a": [{"b": "c"}]}}, {"x": {"a": [{"b": "d"}]}}, ".x.a[0].b: c | d"),
        (None, {"x": 1}, ": None | {'x': 1}"),
    ],
)
def test_the_first_difference_is_told_by_its_place(a: Any, b: Any, told: str) -> None:
    assert results._first_difference(a, b) == told


def test_two_records_are_compared_command_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text(json.dumps({"tiny": {"plan": {"exit": 0}, "verify": {"exit": 0}}, "only": {"x": 1}}))
    two.write_text(json.dumps({"tiny": {"plan": {"exit": 0}, "verify": {"exit": 3}, "new": {"exit": 0}}}))
    assert results.compare(one, one) == 0
    assert capsys.readouterr().out == "0 of 3 records differ\n"
    assert results.compare(one, two) == 3
    assert capsys.readouterr().out.splitlines() == [
        "only: x: : 1 | None", "tiny: new: : None | {'exit': 0}", "tiny: verify: .exit: 0 | 3", "3 of 3 records differ",
    ]  # fmt: skip


def test_a_command_is_run_in_this_process_with_its_exit_code_and_document(tmp_path: Path) -> None:
    good = results.command("list", "formats", "--json")
    assert good["exit"] == 0 and good["json"]["kind"] == "formats"
    bad = results.command("inspect", str(tmp_path / "nothing"), "--json")
    assert bad["exit"] == 3 and bad["json"]["error"]["kind"] == "input"
    assert results.command("completion", "bash")["text"].startswith("_ds4convert_completion() {")
