"""Which format a module gets: defaults, roles, rules, floors and options in their order; every refusal in its words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds4convert.checkpoint.config import named_config, parse_config
from ds4convert.checkpoint.inventory import BACKBONE, HEAD, Inventory, Module, expected
from ds4convert.errors import InputError, UsageError
from ds4convert.planning import recipes
from ds4convert.planning.recipes import Floor, Recipe, Rule, kind_of, recipe_of, role_of, runs, shown

KNOWN = ", ".join(recipes.FORMATS)


@pytest.fixture(scope="module")
def tiny() -> Inventory:
    return expected(parse_config(named_config("tiny") or b""))


def module(
    role: str = "experts", block: int | None = 0, part: str = BACKBONE, name: str = "layers.0.ffn.w1", **how: Any
) -> Module:
    return Module(name, "m", role, part, block, (8, 64), "fp8", 0, (128, 128), **{"is_module": True} | how)


def recipe(*rules: Rule, floor: Floor | None = None, **formats: str) -> Recipe:
    return Recipe("r", "", {"backbone": "native", HEAD: "native"} | formats, rules, floor)


def rule(format: str, *roles: str, layers: tuple[int, ...] | None = None) -> Rule:
    return Rule(frozenset(roles), None if layers is None else frozenset(layers), format)


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([], ""), ([5], "5"), ([0, 1], "0-1"), ([3, 1, 2, 7], "1-3,7"), ([0, 2, 4], "0,2,4"), ([9, 10, 11, 13, 14], "9-11,13-14")],
)  # fmt: skip
def test_numbers_are_told_in_runs(numbers: list[int], text: str) -> None:
    assert runs(numbers) == text


@given(st.sets(st.integers(0, 60)))
def test_runs_tell_exactly_the_numbers(numbers: set[int]) -> None:
    parts = [p.split("-") for p in runs(numbers).split(",") if p]
    assert sorted(n for p in parts for n in range(int(p[0]), int(p[-1]) + 1)) == sorted(numbers)


@pytest.mark.parametrize(
    ("given_", "role", "kind"),
    [
        (module(), "experts", "experts.w1"), (module("output", None, name="head"), "head", "head.head"),
        (module("experts", 0, HEAD), "mtp_experts", "mtp_experts.w1"), (module("mtp_projection", 0, HEAD), "mtp_projection", "mtp_projection.w1"),
    ],
)  # fmt: skip
def test_roles_of_recipes(given_: Module, role: str, kind: str) -> None:
    assert role_of(given_) == role and kind_of(given_) == kind
    assert recipes.said("head") == "output" and recipes.said("experts") == "experts"


def test_defaults_give_way_to_roles_and_these_to_rules_of_which_the_last_counts() -> None:
    made = recipe(
        rule("affine-4-g64", "experts", layers=(0, 1)), rule("affine-6-g64", "experts.w1", layers=(1,)), rule("affine-8-g64", "attention"),
        backbone="mxfp8", experts="affine-2-g64", mtp_experts="bf16",
    )  # fmt: skip
    assert made.format_of(module(block=2)) == "affine-2-g64" and made.format_of(module(block=0)) == "affine-4-g64"
    assert (
        made.format_of(module(block=1)) == "affine-6-g64"
        and made.format_of(module(block=1, name="x.w2")) == "affine-4-g64"
    )
    assert made.format_of(module("attention")) == "affine-8-g64" and made.format_of(module("indexer")) == "mxfp8"
    assert made.format_of(module(part=HEAD)) == "bf16" and made.format_of(module("attention", part=HEAD)) == "native"
    assert (
        made.format_of(module("output", None)) == "mxfp8"
        and recipe(head="bf16").format_of(module("output", None)) == "bf16"
    )


def test_plain_tensors_and_towers_stay_native_unless_a_tower_is_named() -> None:
    made = recipe(rule("mxfp4", "norm"), backbone="affine-4-g64")
    assert made.format_of(module("norm", is_module=False)) == "native"
    assert made.format_of(module("vision", apart=True)) == "native"
    assert recipe(vision="bf16", backbone="mxfp4").format_of(module("vision", apart=True)) == "bf16"


def test_what_a_layouts_hosts_demand_comes_after_all_rules() -> None:
    made = recipe(rule("affine-4-g64", "experts")).bound({"experts": "mxfp4"})
    assert made.format_of(module()) == "mxfp4" and made.format_of(module("attention")) == "native"


def test_options_replace_formats_and_the_roles_of_rules() -> None:
    base = recipe(
        rule("affine-2-g64", "experts", "attention", layers=(0,)),
        experts="affine-3-g64",
        attention="bf16",
        mtp_experts="bf16",
    )
    found = base.overridden("affine-8-g64", None, None)
    assert found.formats == {"backbone": "affine-8-g64", HEAD: "native", "mtp_experts": "bf16"} and found.rules == ()
    found = base.overridden(None, "mxfp4", None)
    assert found.formats["experts"] == "mxfp4" and found.formats["attention"] == "bf16"
    assert found.rules == (rule("affine-2-g64", "attention", layers=(0,)),)
    found = base.overridden("bf16", "mxfp4", "mxfp8")
    assert found.formats == {"backbone": "bf16", "experts": "mxfp4", HEAD: "mxfp8"}
    assert base.overridden(None, None, None) == base
    with pytest.raises(UsageError, match=r"^format 'q4' is not one that this version writes"):
        base.overridden("q4", None, None)


def test_a_floor_lifts_the_layers_that_others_lean_on_and_no_format_that_was_chosen() -> None:
    v41 = expected(parse_config(named_config("flash-v41") or b""))
    carriers = v41.config.carriers
    floor = Floor(4, "mxfp4", "why")
    low = recipe(floor=floor, experts="affine-2-g64", attention="affine-6-g64").of(v41)
    assert carriers and low.floor is None
    found = {m.block: low.format_of(m) for m in v41.modules if m.part == BACKBONE and m.role == "experts"}
    assert {n for n, f in found.items() if f == "mxfp4"} == carriers & found.keys() and set(found.values()) == {
        "mxfp4",
        "affine-2-g64",
    }
    assert all(
        low.format_of(m) == "affine-6-g64"
        for m in v41.modules
        if m.role == "attention" and m.part == BACKBONE and m.may_quantize
    )
    chosen = recipe(floor=floor).overridden(None, "affine-2-g64", None).of(v41)
    assert all(chosen.format_of(m) == "affine-2-g64" for m in v41.modules if m.role == "experts" and m.part == BACKBONE)


@pytest.mark.parametrize(
    ("name", "below"),
    [("affine-3-g64", True), ("mxfp4", False), ("affine-8-g64", False), ("native", False), ("bf16", False)],
)
def test_a_floor_is_above_formats_of_fewer_bits(name: str, below: bool) -> None:
    assert Floor(4, "mxfp4", "").is_below(name) == below


def test_a_rule_for_layers_that_are_not_there_names_those_that_are(tiny: Inventory) -> None:
    layers = tiny.config.layers
    with pytest.raises(InputError) as caught:
        recipe(rule("bf16", "head", "experts", layers=(0, layers, layers + 1))).of(tiny)
    assert str(caught.value) == (
        f"recipe r: the rule for experts+output names layer {layers}-{layers + 1}; this model has these in layers 0-{layers - 1}"
    )
    with pytest.raises(InputError, match=r"this model has these in layers \(none\)"):
        recipe(rule("bf16", "embedding", layers=(0,))).of(tiny)
    assert recipe(rule("bf16", "experts.w1", layers=(0,))).of(tiny).rules


def test_the_option_for_engrams_is_of_no_use_without_any(tiny: Inventory) -> None:
    with pytest.raises(UsageError, match=r"^--engram: DeepSeek-V4 has no engrams; leave it out$"):
        recipe().overridden(None, None, None, "bf16").of(tiny)


def test_roles_of_other_families_are_left_out_of_a_models_recipe(tiny: Inventory) -> None:
    found = recipe(engram_table="bf16", experts="mxfp4").of(tiny)
    assert "engram_table" not in found.formats and found.formats["experts"] == "mxfp4"


def test_formats_are_told_by_part_role_and_layers() -> None:
    made = recipe(rule("bf16", "b", "a", layers=(1, 2)), rule("mxfp4", "c"), backbone="mxfp8", embedding="bf16")
    assert made.as_formats() == {
        "backbone": "mxfp8", "experts": "mxfp8", HEAD: "native", "embedding": "bf16", "a+b 1-2": "bf16", "c": "mxfp4",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("x", "'x'"), (True, "true"), (1.5, "1.5"), ({"a": 1}, "a table"), ([], "[]"), (["a", 1, [2]], "['a', 1, [2]]"),
        (list(range(9)), "[0, 1, 2, 3, 4, 5, 6, 7, ...]"), (list(range(8)), "[0, 1, 2, 3, 4, 5, 6, 7]"), ("\x1b", "'\\x1b'"),
    ],
)  # fmt: skip
def test_values_as_people_write_them(value: Any, text: str) -> None:
    assert shown(value) == text


REFUSED = {
    "formats = 1": "m.toml: a recipe has name, description, a table [formats] by role, tables [[rule]] and a table [floor]; check: formats",
    "rule = 1\n[formats]": "m.toml: a recipe has name, description, a table [formats] by role, tables [[rule]] and a table [floor]; check: rule",
    "zz = 1\nab = 2\n[formats]": "m.toml: a recipe has name, description, a table [formats] by role, tables [[rule]] and a table [floor]; check: ab, zz",
    '[formats]\nexperts = "mxfp5"': f"m.toml: experts = 'mxfp5'; this version writes: {KNOWN}; did you mean mxfp8 or mxfp4?",
    '[formats]\nnorm = "bf16"': "m.toml: norm is never quantized; take it out of the recipe, it stays native",
    '[formats]\n[[rule]]\nroles=["backbone"]\nformat="bf16"': "m.toml, rule 1: no role is called 'backbone'; known: ",
    '[formats]\n[[rule]]\nroles="experts"\nformat="bf16"': "m.toml, rule 1: roles is 'experts', expected a list of roles",
    '[formats]\n[[rule]]\nroles=["experts"]\nformat="bf16"\n[[rule]]\nroles=["experts"]\nlayers=[]\nformat="bf16"': "m.toml, rule 2: layers is [], expected a list of whole numbers such as [0, 1, 2]",
    '[formats]\n[[rule]]\nroles=["experts"]\nformat="bf16"\nx=1': "m.toml, rule 1: a rule has roles (a list), format, and may have layers (a list of whole numbers)",
    '[formats]\n[[rule]]\nroles=["experts"]\nformat=3': f"m.toml, rule 1: format = 3; this version writes: {KNOWN}",
    "[formats]\n[floor]\nbits=4": "m.toml, floor: a floor has bits (a whole number), format, and why (a reason)",
    '[formats]\n[floor]\nbits="4"\nformat="mxfp4"\nwhy=""': "m.toml, floor: a floor has bits (a whole number), format, and why (a reason)",
    '[formats]\n[floor]\nbits=4\nformat="affine-3-g64"\nwhy=""': "m.toml, floor: format is affine-3-g64, which has fewer than 4 bits itself",
    "floor = 3\n[formats]": "m.toml, floor: a floor has bits (a whole number), format, and why (a reason)",
}  # fmt: skip


@pytest.mark.parametrize("text", REFUSED)
def test_a_recipe_that_is_refused_names_its_place(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.toml").write_text(text)
    with pytest.raises(InputError) as caught:
        recipe_of("m.toml")
    assert str(caught.value).startswith(REFUSED[text])


def test_a_recipe_of_ones_own_is_called_by_its_name_else_by_its_file(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('[formats]\noutput = "bf16"\n[[rule]]\nroles=["output"]\nformat="mxfp8"')
    found = recipe_of(str(tmp_path / "mine.toml"))
    assert found.name == "mine" and found.formats == {"backbone": "native", HEAD: "native", "head": "bf16"}
    assert found.rules == (rule("mxfp8", "head"),)
    (tmp_path / "mine.toml").write_text('name = "other"\n[formats]')
    assert recipe_of(str(tmp_path / "mine.toml")).name == "other"


def test_a_recipe_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_bytes(b"\xff")
    for name, why in (("none.toml", "No such file or directory"), ("bad.toml", "it is not UTF-8 text")):
        with pytest.raises(InputError, match=f"{name}: cannot be read as a recipe: {why}$"):
            recipe_of(str(tmp_path / name))


def test_a_name_that_is_none_tells_the_near_and_all() -> None:
    with pytest.raises(UsageError) as caught:
        recipe_of("q44")
    assert str(caught.value) == (
        f"no recipe is called q44; did you mean q4?; known: {', '.join(recipes.recipes())}, or a FILE.toml"
    )


def test_a_recipe_stays_the_value_that_it_was() -> None:
    base = recipe(rule("bf16", "experts"))
    before = replace(base)
    base.bound({"experts": "mxfp4"})
    base.overridden("bf16", "bf16", "bf16", "bf16")
    assert base == before
