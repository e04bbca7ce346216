"""Recipes: formats by role and layer, what flags override, and what is refused, through the installed program."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ds4convert.errors import InputError
from ds4convert.planning.recipes import PROTECTED, recipe_of, recipes, runs
from tests import support_run as s
from tests.support import nightly


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return s.tiny(tmp_path_factory.mktemp("recipes") / "source")


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return path


def planned(*words: str | Path) -> dict[str, Any]:
    return json.loads(s.cli("plan", *words, "--json").stdout)


def formats(plan: dict[str, Any]) -> dict[str, set[str]]:
    """Return the quantized formats and bf16 by group; small plain tensors aside."""
    return {g["name"]: set(g["formats"]) - {"f32", "i32"} for g in plan["groups"]}


def test_the_promised_recipes_ship() -> None:
    assert {"native", "q8", "q6", "q4", "q3", "q2", "bf16"} <= set(recipes())


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", nightly(sorted(recipes()), lambda name: name in ("q8", "q6", "q3", "bf16")))
def test_every_recipe_keeps_the_head_at_its_own_precision_and_plans_flash(name: str) -> None:
    plan = planned("--config", "flash", *(("--fit", "200GB") if name == "fit" else ("--recipe", name)))
    head = formats(plan)["mtp.experts"]
    assert head == ({"bf16"} if name == "bf16" else {"mxfp4"})
    assert formats(plan)["router"] == {"bf16"} and formats(plan)["norm"] == {"bf16"}


@pytest.mark.nightly
def test_recipes_get_smaller_with_their_number() -> None:
    sizes = [
        planned("--config", "flash", "--recipe", r)["output_bytes"] for r in ("native", "q8", "q6", "q4", "q3", "q2")
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 0.65 * sizes[0]


def test_rules_choose_by_role_and_layer_and_the_last_one_counts(source: Path, tmp_path: Path) -> None:
    path = written(
        tmp_path,
        """
        [formats]
        backbone = "affine-8-g64"
        experts = "affine-4-g32"
        [[rule]]
        roles = ["experts", "attention"]
        layers = [0, 1]
        format = "affine-6-g64"
        [[rule]]
        roles = ["experts"]
        layers = [1]
        format = "affine-2-g32"
        """,
    )
    steps = planned(source, "--recipe", path, "--full")["steps"]["steps"]
    found = {(role, layer): fmt for _, _, _, _, _, fmt, part, role, layer in steps if part == "backbone"}
    assert found["experts", 0] == "affine-6-g64" and found["experts", 1] == "affine-2-g32"
    assert found["experts", 2] == "affine-4-g32" and found["shared_experts", 1] == "affine-8-g64"


def test_flags_override_recipes_part_by_part(source: Path) -> None:
    plan = planned(source, "--recipe", "q3", "--experts", "nvfp4", "--mtp", "affine-6-g64")
    assert formats(plan)["experts"] == {"nvfp4"} and formats(plan)["shared_experts"] == {"affine-6-g64"}
    assert formats(plan)["mtp.experts"] == {"affine-6-g64"}
    plan = planned(source, "--recipe", "q3", "--backbone", "affine-5-g32")
    assert formats(plan)["experts"] == formats(plan)["shared_experts"] == {"affine-5-g32"}
    assert formats(plan)["output"] == {"affine-5-g32"} and formats(plan)["mtp.experts"] == {"mxfp4"}


def test_a_head_below_its_own_precision_is_warned_of_and_a_native_one_is_not(source: Path) -> None:
    told = s.cli("plan", source, "--mtp", "affine-4-g64").stderr
    assert "59 % to 4 %" in told and "verify OUT --mtp" in told
    assert s.cli("plan", source, "--recipe", "q2").stderr == ""


@pytest.mark.sampled(5)
@pytest.mark.parametrize("role", PROTECTED)
@pytest.mark.parametrize("where", ["formats", "rule"])
def test_what_must_not_be_quantized_is_refused_by_name(role: str, where: str, source: Path, tmp_path: Path) -> None:
    text = f'[formats]\n{role} = "affine-4-g64"\n'
    if where == "rule":
        text = f'[formats]\n[[rule]]\nroles = ["experts", "{role}"]\nformat = "affine-4-g64"\n'
    told = s.cli("plan", source, "--recipe", written(tmp_path, text), exit_code=3).stderr
    assert f"{role} is never quantized" in told and "mine.toml" in told


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[formats]\nbackbone = "affine-7-g64"', "affine-7-g64"),
        ('[formats]\nattentoin = "native"', "no role is called 'attentoin'"),
        ("[formats]\nexperts = 4", "experts = 4"),
        ("formats = 3", "a table [formats]"),
        ('[formats]\n[[rule]]\nroles = ["experts"]', "a rule has roles"),
        ('[formats]\n[[rule]]\nroles = []\nformat = "bf16"', "expected a list of roles"),
        ('[formats]\n[[rule]]\nroles = ["experts"]\nlayers = [true]\nformat = "bf16"', "expected a list of whole numbers"),
        ('[formats]\n[[rule]]\nroles = ["experts"]\nlayers = [0, 99]\nformat = "bf16"', "names layer 99"),
        ('[formats]\n[[rule]]\nroles = ["embedding"]\nlayers = [0]\nformat = "bf16"', "names layer 0"),
        ("[formats]\n[extra]", "check: extra"),
        ("[formats", "not valid TOML"),
    ],
)  # fmt: skip
def test_a_faulty_recipe_is_refused_with_its_place(text: str, says: str, source: Path, tmp_path: Path) -> None:
    told = s.cli("plan", source, "--recipe", written(tmp_path, text), exit_code=3).stderr
    assert says in told


def test_an_unknown_format_on_the_command_line_is_wrong_usage_and_the_known_ones_are_told(source: Path) -> None:
    told = s.cli("plan", source, "--experts", "affine-4-g16", exit_code=2).stderr
    assert "affine-4-g16" in told and "affine-4-g64" in told and "nvfp4" in told


def test_a_group_size_that_does_not_divide_a_dimension_names_tensor_and_what_fits(tmp_path: Path) -> None:
    source = s.tiny(tmp_path / "source", moe_intermediate_size=96)
    told = s.cli("quantize", source, tmp_path / "out", "--experts", "affine-4-g64", exit_code=3).stderr
    assert "w2.weight" in told and "96 columns" in told and "affine-4-g32" in told
    assert not (tmp_path / "out").exists()


def test_layers_are_told_in_runs() -> None:
    assert runs([3, 1, 2, 7]) == "1-3,7" and runs([5]) == "5"


def test_a_recipe_that_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        recipe_of(str(tmp_path / "none.toml"))
