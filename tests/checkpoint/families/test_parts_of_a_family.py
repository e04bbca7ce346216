"""What a family file is made of: nested keys, names with numbers, shapes on disk, conditions, and what is no family."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds4convert.checkpoint.config import Mark, named_config, parse_config
from ds4convert.checkpoint.families import keys, rows
from ds4convert.checkpoint.families.expansion import Block, holds
from ds4convert.checkpoint.families.modules import BACKBONE, HEAD, Module, backbone_name, group_of, key_of
from ds4convert.checkpoint.families.rows import Condition, Prefixes
from ds4convert.checkpoint.family import evaluate, expert_stems, families, head_stems, mlx_marks
from ds4convert.checkpoint.inventory import compare, expected, ratios_taken, recognise
from ds4convert.checkpoint.names import Speller, is_known
from ds4convert.checkpoint.source import imagined
from ds4convert.errors import ConfigError

V4 = families()["deepseek_v4"]
NESTED: dict[str, Any] = {"a": 1, "t": {"x": 2, "u": {"y": 3}}, "n": None, "l": [1]}


@pytest.mark.parametrize(
    ("key", "value"),
    [("a", 1), ("t.x", 2), ("t.u.y", 3), ("t.u", {"y": 3}), ("n", None), ("b", "?"), ("t.z", "?"), ("a.x", "?"), ("l.0", "?"), ("t.x.y", "?"), ("", "?")],
)  # fmt: skip
def test_a_dotted_key_reaches_into_tables(key: str, value: Any) -> None:
    assert keys.get(NESTED, key, "?") == value


tables = st.dictionaries(st.text("abt", min_size=1, max_size=2), st.integers() | st.dictionaries(st.text("xy", min_size=1, max_size=2), st.integers(), min_size=1, max_size=3), max_size=4)  # fmt: skip


@given(tables)
def test_a_flat_config_goes_back_to_the_one_that_it_was_made_of(table: dict[str, Any]) -> None:
    for container in ("", "t"):
        again = keys.unflat(keys.flat(table, container), container)
        assert again == table and list(again) == list(table)


def test_keys_of_the_container_stand_in_its_place() -> None:
    table = {"a": 1, "text_config": {"x": 2, "y": 3}, "b": 4}
    assert list(keys.flat(table, "text_config").items()) == [
        ("a", 1),
        ("text_config.x", 2),
        ("text_config.y", 3),
        ("b", 4),
    ]
    assert keys.flat({"text_config": 5}, "text_config") == {"text_config": 5} and keys.flat(table, "") == table
    assert keys.parent("a.b.c") == "a.b" and keys.parent("a") == ""


@pytest.mark.parametrize("prefix", ["layers.", "layers.{n}", "{n}.{n}.", "layers.{n}.x", ""])
def test_prefixes_hold_one_number_at_their_end(prefix: str) -> None:
    with pytest.raises(ValueError, match="expected one that ends with"):
        Prefixes(prefix, "mtp.{n}.", "m.{n}.")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("layers.0.attn.wq_a.weight", ("layers.", None, "0", "attn.wq_a.weight")), ("mtp.12.norm.weight", (None, "mtp.", "12", "norm.weight")),
        ("layers.0.a\nb", ("layers.", None, "0", "a\nb")), ("layers.x.attn", None), ("layers.0", None), ("layers.0.", None),
        ("xlayers.0.a", None), ("model.layers.0.a", None), ("norm.weight", None), ("layers.-1.a", None),
    ],
)  # fmt: skip
def test_a_blocks_name_is_taken_apart(name: str, parts: Any) -> None:
    found = V4.block_of(name)
    assert (found and (found["block"], found["head"], found["number"], found["tail"])) == parts


@pytest.mark.parametrize(
    ("name", "official"),
    [
        ("layers.0.attn.wq_a.weight", "layers.0.attn.wq_a.weight"), ("model.layers.0.self_attn.wq_a.weight_scale_inv", "layers.0.attn.wq_a.scale"),
        ("model.layers.3.mlp.experts.17.w1.weight", "layers.3.ffn.experts.17.w1.weight"), ("strange.name", "strange.name"),
        ("model.strange", "strange"), ("layers.0.mlp.experts.x.w1", "layers.0.ffn.experts.x.w1"),
    ],
)  # fmt: skip
def test_other_spellings_come_to_official_names(name: str, official: str) -> None:
    speller = Speller(V4)
    assert speller.official(name) == official == speller.official(name), "the second time from what was kept"


@pytest.mark.parametrize(
    ("name", "known"),
    [("layers.7.ffn.experts.99.w2.weight", True), ("layers.7.ffn.experts.99.w4.weight", False), ("embed.weight", True), ("mtp.0.e_proj.scale", True), ("layers.0.9.w1", False)],
)  # fmt: skip
def test_a_name_is_known_with_any_number_in_it(name: str, known: bool) -> None:
    assert is_known(V4, name) == known


def module(**changes: Any) -> Module:
    base = Module(
        "layers.0.ffn.w1",
        "ffn.gate",
        "experts",
        BACKBONE,
        0,
        (100, 200),
        "fp8",
        0,
        (128, 64),
        True,
        at="model.layers.0.",
    )
    return replace(base, **changes)


@pytest.mark.parametrize(
    ("made", "weight", "scale", "group"),
    [
        (module(), ((100, 200), ("F8_E4M3",)), (1, 4), 64), (module(shape=(129, 64)), ((129, 64), ("F8_E4M3",)), (2, 1), 64),
        (module(store="fp4", shape=(8, 64)), ((8, 32), ("I8", "U8")), (8, 2), 32),
        (module(store="BF16"), ((100, 200), ("BF16",)), None, None), (module(store="F32 or BF16"), ((100, 200), ("F32", "BF16")), None, None),
        (module(store="BF16", found_dtype="F16"), ((100, 200), ("F16",)), None, None),
    ],
)  # fmt: skip
def test_weights_and_scales_on_disk(made: Module, weight: Any, scale: Any, group: Any) -> None:
    """architecture.md, section 10: FP4 two to a byte with a scale per 32 columns; FP8 with ceil-sized grids of tiles."""
    assert made.weight_spec() == weight and made.has_scale == (scale is not None)
    if scale is not None:
        assert (made.scale_shape(), made.scale_group) == (scale, group)


def test_names_of_experts_have_their_number_and_scales_stand_beside_weights() -> None:
    expert = module(name="layers.0.e.{expert}.w1", experts=3)
    assert (expert.weight_name(2), expert.scale_name(2)) == ("layers.0.e.2.w1.weight", "layers.0.e.2.w1.scale")
    assert module(is_module=False).weight_name() == "layers.0.ffn.w1" and expert.weights == 3 * 100 * 200
    assert module().weights == 100 * 200 and module(is_module=False, shape=(5,)).weights == 5


def test_keys_and_groups_of_modules() -> None:
    assert backbone_name(module()) == key_of(module()) == "model.layers.0.ffn.gate"
    assert key_of(module(part=HEAD, block=2)) == "mtp.2.ffn.gate"
    assert [group_of(*x) for x in ((BACKBONE, "norm"), (HEAD, "norm"), (HEAD, "mtp_markov"))] == [
        "norm",
        "mtp.norm",
        "mtp.markov",
    ]


TINY = parse_config(named_config("tiny") or b"")
CONDITIONS = {
    "any": Condition(None, (), ()), "four": Condition((4,), (), ()), "marked": Condition(None, ("hash",), ()),
    "unmarked": Condition(None, (), ("hash",)), "both": Condition((0, 4), ("hash",), ()),
}  # fmt: skip


@pytest.mark.parametrize(
    ("block", "true"),
    [
        (Block(BACKBONE, 0, 0), {"any", "marked", "both"}), (Block(BACKBONE, 0, 4), {"any", "four", "marked", "both"}),
        (Block(BACKBONE, 3, 4), {"any", "four", "unmarked"}), (Block(HEAD, 0, 0), {"any", "unmarked"}), (Block(BACKBONE, None), {"any", "unmarked"}),
        (Block(BACKBONE, 0, 128), {"any", "marked"}),
    ],
)  # fmt: skip
def test_rows_are_in_the_blocks_for_which_their_conditions_hold(block: Block, true: set[str]) -> None:
    """Layer 0 is one of the first layers, which route by a hash."""
    config = replace(TINY, family=replace(V4, when=CONDITIONS), marks={"hash": Mark(1, frozenset({0}))})
    assert {name for name in CONDITIONS if holds(config, (name,), block)} == true
    assert holds(config, (), block) and not holds(config, ("any", "marked", "unmarked"), block)


def test_a_mark_that_is_everywhere_is_on_heads_as_well() -> None:
    assert Mark(None, frozenset(), True).is_on(None) and not Mark(None, frozenset({1})).is_on(None)


@given(st.integers(0, 99), st.integers(1, 9), st.integers(0, 99))
def test_shapes_follow_the_precedence_of_python(a: int, b: int, c: int) -> None:
    dims = {"a": a, "b": b, "c": c}
    for text in ("a+b*c", "(a+b)*c", "a*c//b", "a-b-c", "a-(b-c)", "2*a//b*c+1"):
        assert evaluate(text, dims) == eval(text, {}, dict(dims))


def test_rows_have_defaults_and_a_lone_condition_is_a_list_of_one() -> None:
    made = rows.row({"name": "a.{expert}", "role": "r", "store": "expert", "shape": ["A", "2"], "when": "w"})
    assert (made.mlx, made.hf, made.when, made.shape) == (
        "a.{expert}",
        "a.{expert}",
        ("w",),
        ("A", "2"),
    ) and made.is_matrix
    assert made.tails() == [("a.{expert}.weight",) * 2, ("a.{expert}.scale",) * 2]
    assert not replace(made, store="F32").is_matrix and replace(made, store="F32", hf="h").tails() == [
        ("h", "a.{expert}")
    ]
    assert rows.state({"when": ["a", "b"], "per_entry": "d"}) == rows.State(("a", "b"), "", "d")
    assert rows.condition({}) == Condition(None, (), ()) and rows.condition({"ratios": []}).ratios == ()


def test_a_fused_tensor_is_of_rows_of_experts_that_are_there() -> None:
    block = [rows.row({"name": f"e.{{expert}}.{n}", "role": "r", "store": "expert", "shape": []}) for n in ("w1", "w3")]
    assert rows.fused({"name": "e.all", "parts": ["w1", "w3"]}, block) == rows.Fused("e.all", ("w1", "w3"), "e.")
    with pytest.raises(ValueError, match=r"^the parts of the fused tensor e\.all are no rows of experts$"):
        rows.fused({"name": "e.all", "parts": ["w9"]}, block)


def test_what_tells_heads_experts_and_converted_folders_of_any_family() -> None:
    assert {"mtp.", "model.mtp."} <= set(head_stems()) and ".ffn.experts." in expert_stems()
    parts, whole = mlx_marks()
    assert ".ffn.switch_mlp." in parts and not whole & {"norm.weight", "embed.weight", "model.norm.weight"}


def test_an_imagined_checkpoint_is_as_its_inventory_says_without_gaps() -> None:
    inventory = expected(TINY)
    named, files = imagined(inventory)
    assert compare(inventory, named, ("f",)) == [] and files[0].size == sum(t.size for t in named.tensors.values())
    at = 0
    for tensor in named.tensors.values():
        assert tensor.start == at
        at += tensor.size


def test_compress_ratios_that_a_config_does_not_give_are_taken_as_none_and_told() -> None:
    inventory = expected(TINY)
    short = replace(inventory, config=replace(TINY, ratios=TINY.ratios[:-1]))
    assert ratios_taken(inventory) == "" == ratios_taken(replace(short, head_kind="none"))
    assert ratios_taken(short) == (
        "config.json: compress_ratios has 4 items for 4 layers and 1 head stages; 0 (no compression) is taken for the last 1"
    )


def test_a_config_that_lost_its_head_gets_the_stages_that_its_tensors_show() -> None:
    named, _ = imagined(expected(TINY))
    stripped = replace(TINY, stages=0, ratios=TINY.ratios[:-1])
    found = recognise(stripped, named.tensors)
    assert (found.head_kind, found.stages, found.config.stages) == ("classic", 1, 1)
    assert found.config.flat["num_nextn_predict_layers"] == 1 and found.config.flat["compress_ratios"] == [
        *TINY.ratios[:-1],
        0,
    ]


def test_sizes_that_come_to_nothing_are_refused() -> None:
    none = replace(TINY, dims=TINY.dims | {"I": 0})
    with pytest.raises(
        ConfigError, match=r"^config\.json: a tensor of I = 0 rows or columns is implied; check its sizes$"
    ):
        expected(none)
