"""Where each layout keeps the head and how it spells tensors, against the paths of layouts.md; refusals with ways on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ds4convert.checkpoint import advice
from ds4convert.checkpoint.family import families
from ds4convert.checkpoint.inventory import BACKBONE, HEAD, Module
from ds4convert.errors import InputError, UsageError
from ds4convert.planning import host_block
from ds4convert.planning.encodings import ENCODERS
from ds4convert.planning.layouts import (
    HeadPlace,
    Host,
    Spelling,
    all_places,
    layout_for,
    layout_of,
    layouts,
    spellings_of,
)
from ds4convert.planning.types import Output, OutputFile, Step

V4, V41 = families()["deepseek_v4"], families()["deepseek_v41"]


def head(mlx: str, own: bool = False, block: int = 0) -> Module:
    return Module(f"mtp.{block}.{mlx}", mlx, "attention", HEAD, block, (32, 64), "fp8", 0, (128, 128), True, own)


def place(layout: str, kind: str = "classic", folder: str = "") -> HeadPlace:
    return next(p for p in layouts()[layout].heads if kind in p.kinds and p.folder == folder)


@pytest.mark.parametrize(
    ("at", "module", "name", "listed"),
    [
        # layouts.md, section 3: official hyper-connection names for mlx-vlm and oMLX, entries as mtp.0.X and mtp.0.block.X
        (place("inline"), head("attn.wq_a"), "mtp.0.attn.wq_a", ["mtp.0.attn.wq_a", "mtp.0.block.attn.wq_a"]),
        (place("inline"), head("attn_hc.fn"), "mtp.0.hc_attn_fn", ["mtp.0.hc_attn_fn", "mtp.0.block.hc_attn_fn"]),
        (place("inline"), head("hc_head.base", True), "mtp.0.hc_head_base", ["mtp.0.hc_head_base", "mtp.0.block.hc_head_base"]),
        (place("inline"), head("e_proj", True, 2), "mtp.2.e_proj", ["mtp.2.e_proj", "mtp.2.block.e_proj"]),
        # MTPLX: module names, no renaming at all
        (place("mtplx"), head("attn_hc.fn"), "mtp.0.attn_hc.fn", ["mtp.0.attn_hc.fn", "mtp.0.block.attn_hc.fn"]),
        (place("universal"), head("hc_head.fn", True), "mtp.0.hc_head.fn", ["mtp.0.hc_head.fn", "mtp.0.block.hc_head.fn"]),
        # mlx-vlm's drafter folder: decoder.* and e_proj, h_proj, norms of the head's own at its top
        (place("vlm", folder="mtp"), head("attn.wq_a"), "decoder.attn.wq_a", ["decoder.attn.wq_a"]),
        (place("universal", folder="mtp"), head("e_proj", True), "e_proj", ["e_proj"]),
        (place("vlm", "dspark", "mtp"), head("attn.wq_a", block=2), "mtp.2.attn.wq_a", ["stages.2.attn.wq_a"]),
    ],
)  # fmt: skip
def test_names_of_the_head_in_each_place(at: HeadPlace, module: Module, name: str, listed: list[str]) -> None:
    assert at.name(module) == name and at.table_names(module) == listed


BACK = Module("layers.3.ffn.experts.{expert}.w1", "ffn.switch_mlp.gate_proj", "experts", BACKBONE, 3, (8, 64), "fp4", 4, (128, 128), True, at="model.layers.3.")  # fmt: skip


@pytest.mark.parametrize(
    ("spelling", "name", "listed"),
    [
        (Spelling(), "model.layers.3.ffn.switch_mlp.gate_proj", ["model.layers.3.ffn.switch_mlp.gate_proj"]),
        (Spelling(official=True), "layers.3.ffn.experts.w1", ["layers.3.ffn.experts.w1"]),
        (Spelling(official=True, first={"layers": "blocks"}), "blocks.3.ffn.experts.w1", ["blocks.3.ffn.experts.w1"]),
        (Spelling(official=True, rename={"ffn.experts.{expert}": "moe", "w1": "gate"}), "layers.3.moe.gate", ["layers.3.moe.gate"]),
        (Spelling(official=True, rename={"ff": "x"}), "layers.3.ffn.experts.w1", ["layers.3.ffn.experts.w1"]),
        (Spelling(official=True, but=("ffn.switch_mlp.gate_proj",)), "model.layers.3.ffn.switch_mlp.gate_proj", ["model.layers.3.ffn.switch_mlp.gate_proj"]),
        (Spelling(official=True, listed_twice=True), "layers.3.ffn.experts.w1", ["layers.3.ffn.experts.w1", "model.layers.3.ffn.switch_mlp.gate_proj"]),
        (Spelling(listed_twice=True), "model.layers.3.ffn.switch_mlp.gate_proj", ["model.layers.3.ffn.switch_mlp.gate_proj"]),
    ],
)  # fmt: skip
def test_the_backbone_is_spelled_as_a_layout_says(spelling: Spelling, name: str, listed: list[str]) -> None:
    assert spelling.name(BACK) == name and spelling.table_names(BACK) == listed


def test_a_lone_name_at_the_root_may_be_replaced_whole() -> None:
    root = Module("norm", "norm", "norm", BACKBONE, None, (8,), "BF16", 0, (1, 1), False, at="model.")
    assert Spelling(official=True, first={"norm": "final"}).name(root) == "final"
    assert Spelling(official=True).name(root) == "norm" and Spelling().name(root) == "model.norm"


@pytest.mark.parametrize(
    ("kinds", "kind", "runs"),
    [(None, "classic", True), (None, "dspark", True), (["classic"], "classic", True), (["classic"], "dspark", False), (["classic"], "none", True), ([], "classic", False)],
)  # fmt: skip
def test_a_host_runs_the_heads_that_it_names(kinds: list[str] | None, kind: str, runs: bool) -> None:
    assert Host("h", "1", True, "", kinds=kinds).runs(kind) == runs


@pytest.mark.parametrize(
    ("name", "family", "words"),
    [
        ("mtplx", V41, "layout mtplx: its hosts load no DeepSeek-V4.1; choose --layout inline, omlx, or vlm"),
        ("omlx", V4, "layout omlx: its hosts load no DeepSeek-V4 in it; choose --layout inline, mlx-lm, mtplx, universal, or vlm"),
    ],
)  # fmt: skip
def test_a_layout_that_no_host_loads_so_names_those_that_one_does(name: str, family: Any, words: str) -> None:
    with pytest.raises(InputError) as caught:
        layouts()[name].wanted_of(family)
    assert str(caught.value) == words
    assert layouts()[name].of(family) is None and layout_for(name, family.name) is layouts()[name]


def test_a_head_that_a_layouts_hosts_cannot_load_is_refused_with_ways_on() -> None:
    with pytest.raises(InputError) as caught:
        layouts()["mtplx"].places(V4, "dspark", 3)
    assert str(caught.value) == (
        "layout mtplx: its hosts load no dspark head of 3 stage(s); choose --layout inline, mlx-lm, or vlm or --drop-mtp"
    )
    token = advice.OPTIONS.set(frozenset())
    try:
        with pytest.raises(InputError, match=r"2 stage\(s\); no layout that this command writes holds it$"):
            layouts()["vlm"].places(V4, "classic", 2)
    finally:
        advice.OPTIONS.reset(token)
    assert len(layouts()["universal"].places(V4, "classic", 1)) == 2
    assert [p.folder for p in layouts()["universal"].places(V4, "classic", 2)] == [""], "the drafter takes one stage"


def test_a_layout_is_found_by_name_or_the_near_ones_are_told() -> None:
    assert layout_of("vlm").name == "vlm" and list(layouts()) == sorted(layouts())
    with pytest.raises(UsageError) as caught:
        layout_of("inlien")
    assert str(caught.value) == f"no layout is called inlien; did you mean inline?; known: {', '.join(layouts())}"


def test_what_a_family_says_of_a_layout_counts_for_it_alone() -> None:
    own = layouts()["omlx"].of(V41)
    assert own is not None and own.block and own.official and not layouts()["omlx"].block
    assert layout_for("omlx", "deepseek_v41") == own and layout_for("inline", "unknown") is layouts()["inline"]
    assert layouts()["inline"].of(V4) is layouts()["inline"]


def test_ways_to_spell_a_backbone_begin_with_the_familys_own_and_come_once() -> None:
    assert spellings_of(V4) == [Spelling()]
    found = spellings_of(V41)
    assert found[0] == Spelling() and len({str(x) for x in found}) == len(found) > 1
    assert {p.folder for p in all_places(V4)} == {"", "mtp"}


TABLE = Module(
    "layers.0.engram.embed",
    "engram.embed",
    "engram_table",
    BACKBONE,
    0,
    (64, 64),
    "fp8",
    0,
    (1, 32),
    True,
    at="model.layers.0.",
)
MATRIX = replace(TABLE, name="layers.0.attn.wq_a", mlx="attn.wq_a", role="attention")


def block_of(table_format: str, matrix_format: str, with_head: bool = False) -> Any:
    """Return the block of a layout that spells tensors by their MLX names, of a table and a matrix in these formats."""
    layout = replace(
        layouts()["omlx"],
        official=("engram_table",),
        block={"key": "host", "values": {"version": 1}, "head": "has_mtp"},
    )
    chosen = [(TABLE, table_format), (MATRIX, matrix_format)] + ([(head("attn.wq_a"), "bf16")] if with_head else [])
    encoded = [(m, f, ENCODERS[f](m)) for m, f in chosen]
    names = ["weight", "scales", "biases"]
    outputs = tuple(Output(f"model.layers.0.engram.embed.{n}", "U32", (1,), int(n != "weight"), 0, 1) for n in names)
    step = Step(outputs, "copy", (), {}, (), (), "", "", BACKBONE, "", 0, 0)
    files = [OutputFile("a.safetensors", 0, b""), OutputFile("b.safetensors", 0, b"")]
    return host_block.written(layout, [place("inline")], encoded, files, [step])


def test_a_hosts_block_tells_tables_by_their_tensors_and_modules_by_bits() -> None:
    """Source: oMLX, omlx/patches/deepseek_v41/storage.py and loading.py (read and not run)."""
    path = "model.layers.0.engram.embed"
    assert block_of("affine-4-g32", "mxfp8") == {"host": {
        "version": 1, "has_mtp": False,
        "quantized_modules": {"model.layers.0.attn.wq_a": {"bits": 8, "mode": "mxfp8"}},
        "engram_tables": {path: {
            "weight_key": f"{path}.weight", "weight_file": "a.safetensors", "scale_key": f"{path}.scales",
            "scale_file": "b.safetensors", "bias_key": f"{path}.biases", "bits": 4, "group_size": 32, "mode": "affine",
        }},
    }}  # fmt: skip
    other = block_of("bf16", "affine-4-g64", with_head=True)["host"]
    assert other["has_mtp"] and other["quantized_modules"] == {
        "model.layers.0.attn.wq_a": {"bits": 4, "group_size": 64, "mode": "affine"}
    }
    assert "bits" not in other["engram_tables"][path], "no codec: the table is dense"
    assert host_block.written(layouts()["inline"], [], [], [], []) == {}


def test_a_hosts_block_is_read_back_as_a_quantization_table() -> None:
    key = next(iter(host_block.block_keys(V41)))
    config = {
        key: {
            "quantized_modules": {"a": {"bits": 8, "mode": "mxfp8"}, "b": 3, "d": {}},
            "engram_tables": {"c": {"bits": 4, "group_size": 64}},
        }
    }
    assert host_block.table_in(V41, config) == {
        "a": {"group_size": 32, "bits": 8, "mode": "mxfp8"},
        "c": {"group_size": 64, "bits": 4},
    }
    assert host_block.table_in(V41, {key: {}}) == {} and host_block.table_in(V41, {key: 1}) is None
    assert host_block.table_in(V41, {}) is None and host_block.block_keys(V4) == set()
