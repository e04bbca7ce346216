"""How differences and ways on are said: each kind of finding, near names, ways of a command that it really has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds4convert.checkpoint import advice
from ds4convert.checkpoint.types import Finding


@pytest.mark.parametrize(
    ("finding", "words"),
    [
        (Finding("missing", "t", "BF16 [2]", "nothing"), "t: missing; expected BF16 [2]"),
        (Finding("missing", "t", "BF16 [2]", "nothing", "f"), "t: missing; expected BF16 [2] (f holds it, but the index does not name it)"),
        (Finding("extra", "t", "nothing", "BF16 [2]", "f"), "t: not expected by the config; found BF16 [2] (f)"),
        (Finding("extra", "t", "nothing", "BF16 [2]"), "t: not expected by the config; found BF16 [2]"),
        (Finding("shape", "t", "[2]", "[3]", "f"), "t: expected shape [2], found [3] (f)"),
        (Finding("dtype", "t", "BF16", "F32"), "t: expected dtype BF16, found F32"),
    ],
)  # fmt: skip
def test_a_finding_in_words(finding: Finding, words: str) -> None:
    assert str(finding) == words


def test_a_finding_has_the_keys_of_the_contract() -> None:
    told = {"kind": "shape", "tensor": "t", "expected": "[2]", "found": "[3]"}
    assert Finding("shape", "t", "[2]", "[3]").as_json() == told
    assert Finding("shape", "t", "[2]", "[3]", "f").as_json() == told | {"file": "f"}


FORMATS = ("native", "bf16", "affine-4-g32", "affine-4-g64", "affine-4-g128", "affine-8-g64", "mxfp4", "mxfp8", "nvfp4")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("nativ", {"native"}), ("NATIVE", {"native"}), ("mxfp", {"mxfp8", "mxfp4"}), ("xyz", set()), ("", set()),
        ("affine-4", {"affine-4-g64", "affine-4-g32", "affine-4-g128"}), ("mxfp4", {"mxfp4", "nvfp4", "mxfp8"}),
    ],
)  # fmt: skip
def test_names_that_are_near_are_told_and_three_at_most(name: str, near: set[str]) -> None:
    """There are seven formats that begin with affine; those that go on with -4 come first."""
    found = advice.near(name, FORMATS)
    assert set(found) == near and len(found) == len(near) <= 3
    assert name not in FORMATS or found[0] == name


def test_names_that_go_on_where_one_ends_come_before_likelier_ones() -> None:
    assert advice.near("abc", ["abd", "abcdef"]) == ["abcdef", "abd"]
    assert advice.near("ABC", ["Abcd"]) == ["Abcd"] and advice.near("a", []) == []


@given(st.sampled_from(FORMATS))
def test_a_known_name_is_nearest_to_itself(name: str) -> None:
    assert name in advice.near(name.upper(), FORMATS)


def test_what_was_meant_is_asked_in_one_sentence() -> None:
    assert advice.did_you_mean("abd", ["abc", "abe"]) in ("; did you mean abc or abe?", "; did you mean abe or abc?")
    assert advice.did_you_mean("q", ["zzz"]) == ""


@pytest.mark.parametrize(
    ("ways", "words"), [([], ""), (["a"], "a"), (["a", "b"], "a or b"), (["a", "b", "c"], "a, b, or c"), (["a", "b", "c", "d"], "a, b, c, or d")]
)  # fmt: skip
def test_ways_are_listed(ways: list[str], words: str) -> None:
    assert advice.either(ways) == words


@pytest.fixture
def options() -> Iterator[None]:
    """A command that has --overwrite alone."""
    token = advice.OPTIONS.set(frozenset({"--overwrite"}))
    yield
    advice.OPTIONS.reset(token)


def test_outside_of_commands_every_option_is_offered(request: pytest.FixtureRequest) -> None:
    assert advice.offers("--any")
    request.getfixturevalue("options")
    assert advice.offers("--overwrite") and not advice.offers("--any")


def test_a_head_without_a_place_is_told_the_layouts_that_have_one_and_to_be_dropped() -> None:
    assert advice.for_head_place("vlm", ["vlm", "inline"]) == "choose --layout inline or --drop-mtp"
    assert advice.for_head_place("vlm", ["a", "b", "c"], without=False) == "choose --layout a, b, or c"
    assert advice.for_head_place("vlm", ["vlm"]) == "choose --drop-mtp"
    assert advice.for_head_place("vlm", ["vlm"], without=False) == "no layout that this command writes holds it"


@pytest.mark.usefixtures("options")
def test_what_a_command_does_not_have_is_not_offered() -> None:
    assert advice.for_head_place("vlm", ["inline"]) == "no layout that this command writes holds it"
    assert advice.for_converted_source() == "name the official checkpoint"


@pytest.mark.parametrize(
    ("command", "removable", "words"),
    [
        ("", True, "add --overwrite to start over, or repeat the earlier command to finish it"),
        ("ds4convert x", True, "add --overwrite to start over, or run the command that began it again to finish it: ds4convert x"),
        ("", False, "choose another folder, or repeat the earlier command to finish it"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("options")
def test_an_unfinished_folder_is_finished_or_cleared(command: str, removable: bool, words: str) -> None:
    assert advice.for_unfinished(command, removable) == words


def test_a_command_that_cannot_clear_a_folder_tells_how_to_finish_it() -> None:
    token = advice.OPTIONS.set(frozenset())
    assert advice.for_unfinished("ds4convert x") == "run the command that began it again to finish it: ds4convert x"
    advice.OPTIONS.reset(token)
    assert (
        advice.for_converted_source() == "convert the official checkpoint, or say --from-mlx to convert this one again"
    )
