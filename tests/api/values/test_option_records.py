"""Option records: each value is checked when the record is made, and what is wrong is told by the option's name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from ds4convert.api import values
from ds4convert.api.conversion import RunOptions
from ds4convert.api.conversion_options import ConversionOptions
from ds4convert.api.values import OptionRecord, apart, combined
from ds4convert.api.verifying import VerifyOptions
from ds4convert.errors import UsageError
from ds4convert.planning.parts import Part

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Options(OptionRecord):
    """One field of each kind."""

    some_flag: bool = values.flag(False)
    name: str | None = values.text(None)
    place: Path | None = values.path(None)
    places: tuple[Path, ...] = values.paths()
    kind: str = values.one_of(["a", "b"], "a")
    whole: int = values.number(3, 1, 5)
    share: float = values.number(0.5, 0.0, 1.0)
    depth: int | None = values.number(None, 2)
    least: int = values.number(-4, None, 9)
    limit: int | None = values.bytes_of(values.size, None)
    part: Part | None = values.part_field()


def test_paths_sizes_and_parts_are_made_of_what_people_write() -> None:
    made = Options(place="x", places="y", limit="5GB", part="2/8", name=Path("z"))  # type: ignore[arg-type]
    assert (made.place, made.places, made.limit, made.part, made.name) == (
        Path("x"), (Path("y"),), 5 * 10**9, Part(2, 8), "z",
    )  # fmt: skip
    assert Options(part=Part(1, 2)).part == Part(1, 2)
    assert Options(share=1, whole=1).share == 1 and Options(whole=5, share=0).whole == 5, "bounds are within"


WRONG = [
    ({"some_flag": 1}, "--some-flag 1: expected bool"),
    ({"some_flag": None}, "--some-flag None: expected bool"),
    ({"name": 7}, "--name 7: is not a value of this option"),
    ({"place": 7}, "--place 7: is not a value of this option"),
    ({"places": 7}, "--places 7: is not a value of this option"),
    ({"kind": "c"}, "--kind 'c': expected a or b"),
    ({"whole": 0}, "--whole 0: expected 1 to 5"),
    ({"whole": 6}, "--whole 6: expected 1 to 5"),
    ({"whole": True}, "--whole True: expected int"),
    ({"whole": 1.0}, "--whole 1.0: expected int"),
    ({"whole": "2"}, "--whole '2': expected int"),
    ({"share": 1.5}, "--share 1.5: expected 0.0 to 1.0"),
    ({"share": False}, "--share False: expected int or float"),
    ({"depth": 1}, "--depth 1: expected 2 or more"),
    ({"least": 10}, "--least 10: expected at most 9"),
    ({"limit": -1}, "--limit -1: expected 0 or more"),
    ({"limit": "x"}, "--limit: 'x' is not a size such as 5GB (5 x 10^9 bytes) or 5GiB (5 x 2^30)"),
    ({"part": "9/8"}, "--part 9/8: parts are counted from 1/8 to 8/8"),
    ({"part": "x"}, "--part 'x': expected I/N, such as 2/8 for the second of eight parts"),
]


@pytest.mark.parametrize(("choice", "why"), WRONG)
def test_a_value_that_an_option_cannot_have_is_told_by_its_name(choice: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError) as found:
        Options(**choice)
    assert str(found.value) == why


def test_an_option_that_is_none_is_told_with_the_nearest_name_and_another_record_with_its_own() -> None:
    with pytest.raises(UsageError, match=r"^shere: is no option here; did you mean share\?$"):
        combined(Options, None, {"shere": 1})
    with pytest.raises(UsageError, match=r"^options: expected Options, found RunOptions$"):
        combined(Options, RunOptions(), {})  # type: ignore[type-var]
    assert combined(Options, Options(whole=2), {"kind": "b"}) == Options(whole=2, kind="b")
    assert combined(Options, None, {}) == Options()


def test_choices_go_to_the_record_that_has_them_and_the_rest_stays() -> None:
    assert apart(Options, {"whole": 2, "other": 5}) == (Options(whole=2), {"other": 5})


# --- conversions (cli.md) ---

CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"mtp": "bf16", "keep_mtp": False}, "--mtp FORMAT and --drop-mtp contradict each other"),
    ({"mac": 128 * GIB, "fit": "100GB"}, "--mac and --fit both say what to fit into; give one of them"),
    ({"recipe": "fit"}, "the recipe `fit` needs to know what to fit into; say --mac SIZE, such as --mac 128GB"),
    *[
        ({"fit": "100GB", **more},
         "--fit or --mac chooses the formats of the backbone; it goes with no recipe, --backbone or --experts (--mtp can)")
        for more in ({"recipe": "q4"}, {"backbone": "bf16"}, {"experts": "bf16"})
    ],
    ({"calibration": "x", "rounding": "nearest"},
     "--calibration weighs the search of --rounding optimal; nearest has no use for it"),
    ({"context": 0}, "--context 0: expected 1 or more"),
    ({"calibration_tokens": 63}, "--calibration-tokens 63: expected 64 or more"),
    ({"jobs": 65}, "--jobs 65: expected 1 to 64"),
    ({"cores": 1025}, "--cores 1025: expected 1 to 1024"),
    ({"rounding": "best"}, "--rounding 'best': expected optimal, nearest, or compensated"),
]  # fmt: skip


@pytest.mark.parametrize(("choices", "why"), CONTRADICTIONS, ids=lambda x: x[:30] if isinstance(x, str) else "")
def test_options_of_a_conversion_that_contradict_each_other_say_so(choices: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError) as found:
        ConversionOptions(**choices)
    assert str(found.value) == why


@pytest.mark.parametrize(
    "choices",
    [{"recipe": "fit", "mac": "128"}, {"fit": "9GB", "mtp": "bf16"}, {"calibration": "x"}, {"keep_mtp": False}],
)
def test_what_goes_together_is_taken(choices: dict[str, Any]) -> None:
    ConversionOptions(**choices)


@pytest.mark.parametrize(
    ("choices", "target"),
    [({}, None), ({"fit": "100GB"}, 10**11), ({"mac": 128 * GIB}, 96 * GIB), ({"mac": "32GB"}, 32 * GIB * 2 // 3),
     ({"mac": 33 * GIB}, 33 * GIB * 3 // 4)],
)  # fmt: skip
def test_what_a_model_has_to_fit_into_is_said_or_metals_share_of_a_mac(
    choices: dict[str, Any], target: int | None
) -> None:
    """Two thirds of up to 32 GiB and three quarters of more: reference/machines.md."""
    assert ConversionOptions(**choices).target == target


def test_options_without_effect_are_told_with_what_they_are_for() -> None:
    assert ConversionOptions().without_effect() == {
        "context": "--mac and --fit", "calibration_tokens": "--rounding compensated",
    }  # fmt: skip
    assert ConversionOptions(fit="9GB", rounding="compensated").without_effect() == {}  # type: ignore[arg-type]


def test_the_memory_of_a_mac_given_as_free_memory_is_advised_against() -> None:
    told = ConversionOptions(fit="128GB").advice()  # type: ignore[arg-type]
    assert told == (
        "--fit takes bytes that are free for the model, and no Mac with 128 GB has them: a Mac with 128 GB has 128 GiB; "
        "Metal may use 96.0 GiB = 103.1 GB of it by default (newer systems about 107.5 GiB), more with sysctl "
        "iogpu.wired_limit_mb. For such a Mac say --mac 128GB"
    )
    assert ConversionOptions(fit=f"{128 * GIB}").advice() == told  # type: ignore[arg-type]
    assert ConversionOptions(fit="100GB").advice() is None and ConversionOptions().advice() is None  # type: ignore[arg-type]


def test_a_window_holds_a_megabyte_at_least() -> None:
    assert RunOptions(window="1MB").window == 10**6  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"^--window 999999: expected at least 1,000,000 bytes$"):
        RunOptions(window=999_999)


# --- verify ---


@pytest.mark.parametrize(
    ("choices", "level"),
    [({}, "structure"), ({"source": "x"}, "source"), ({"mtp": True}, "decode"), ({"report": "x"}, "decode"),
     ({"level": "numerics"}, "numerics"), ({"report": "x", "layerwise": True}, "structure"),
     ({"source": "x", "report": "y"}, "decode"), ({"source": "x", "level": "numerics"}, "numerics")],
)  # fmt: skip
def test_how_far_verify_looks_follows_from_its_options(choices: dict[str, Any], level: str) -> None:
    assert VerifyOptions(**choices).reached == level


@pytest.mark.parametrize(
    "choices", [{}, {"source": "x", "mtp": True}, {"source": "x", "layerwise": True}, {"level": "structure"}]
)
def test_a_part_divides_the_comparison_with_a_source_alone(choices: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as found:
        VerifyOptions(part="1/2", **choices)  # type: ignore[arg-type]
    assert str(found.value) == ("--part divides the comparison with --source SRC; leave out what decodes, or --part")
    VerifyOptions(part="1/2", source="x")  # type: ignore[arg-type]


def test_a_source_is_a_path_a_repo_or_what_was_opened() -> None:
    with pytest.raises(UsageError, match=r"^--source 7: expected a path, a repo, or what `open` returned$"):
        VerifyOptions(source=7)  # type: ignore[arg-type]


EVERY = {"calibration", "atol", "rtol", "draft_depth", "confidence", "max_tokens", "drafter", "prompts", "dtype"}


@pytest.mark.parametrize(
    ("choices", "used"),
    [
        ({}, set()),
        ({"source": "x"}, {"calibration"}),
        ({"reference": "x"}, {"atol", "rtol"}),
        ({"mtp": True}, {"draft_depth", "confidence", "max_tokens", "drafter", "prompts", "dtype"}),
        ({"level": "decode"}, {"draft_depth", "confidence", "max_tokens", "drafter", "prompts", "dtype"}),
        ({"level": "numerics"}, {"prompts", "dtype"}),
        ({"layerwise": True}, {"prompts", "dtype"}),
        ({"layerwise": True, "report": "x"}, {"prompts", "dtype"}),
        ({"mtp": True, "reference": "x"},
         {"atol", "rtol", "draft_depth", "confidence", "max_tokens", "drafter", "prompts"}),  # a reference is in float32
    ],
)  # fmt: skip
def test_options_of_verify_that_have_no_use_are_known(choices: dict[str, Any], used: set[str]) -> None:
    assert set(VerifyOptions(**choices).without_effect()) == EVERY - used
