"""What a model takes beside its weights, counted by hand from the config; rooms; and how progress is told in seconds."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from ds4convert.checkpoint.config import named_config, parse_config
from ds4convert.checkpoint.inventory import BACKBONE, Inventory, expected
from ds4convert.fit import forecast, format_errors, memory, size_budget
from ds4convert.fit.format_errors import units
from ds4convert.fit.optimiser import Choice, Option
from ds4convert.fit.size_budget import Room
from ds4convert.planning.encodings import ENCODERS
from ds4convert.planning.recipes import Floor, recipe_of

GIB = 1 << 30


def model(name: str) -> Inventory:
    return expected(parse_config(named_config(name) or b""))


@pytest.fixture(scope="module")
def v41() -> Inventory:
    return model("flash-v41")


@pytest.fixture(scope="module")
def tiny() -> Inventory:
    return model("tiny")


@pytest.mark.parametrize("context", [0, 1, 1023, 100_000])
def test_the_state_of_v41_is_windows_in_all_blocks_and_entries_where_keys_are_made(
    v41: Inventory, context: int
) -> None:
    """v41.md, cache: (window + 16) keys of BF16 a block; per entry a key and an index key; ratio 1, 2 tokens an entry."""
    c = json.loads(named_config("flash-v41") or b"")["text_config"]
    blocks = c["num_hidden_layers"] + v41.stages
    wanted = blocks * (c["sliding_window"] + 16) * c["head_dim"] * 2
    for layer in c["kv_source_layer_ids"]:
        entries = context // max(v41.config.ratios[layer], 1)
        wanted += entries * (c["head_dim"] + c["index_head_dim"]) * 2
    assert memory.state_bytes(v41, context) == wanted


def test_a_family_that_leaves_its_state_to_the_forward_pass_has_none_here(tiny: Inventory) -> None:
    assert memory.state_bytes(tiny, 1000) == 0 == memory.working_bytes(tiny.config)


def test_the_working_set_of_v41_is_a_step_of_2048_tokens_in_f32(v41: Inventory) -> None:
    d = v41.config.dims
    wanted = 2048 * 4 * (4 * d["M"] * d["D"] + (d["K"] + 1) * (2 * d["I"] + d["D"]) + d["V"])
    assert memory.working_bytes(v41.config) == wanted


def test_tables_of_engrams_stay_on_the_disk_and_nothing_else_does(v41: Inventory, tiny: Inventory) -> None:
    assert {m.role for m in v41.modules if memory.is_mapped(v41, m)} == {"engram_table"}
    assert not any(memory.is_mapped(tiny, m) for m in tiny.modules)


def test_a_choice_is_made_for_matrices_of_the_backbone_that_are_held_in_memory(v41: Inventory) -> None:
    chosen = {m.role for m in v41.modules if format_errors.is_chosen(m, v41)}
    assert {"experts", "attention", "embedding", "output"} <= chosen and not chosen & {"engram_table", "norm", "router"}
    assert all(m.part == BACKBONE and not m.apart for m in v41.modules if format_errors.is_chosen(m, v41))
    said = {m.role for m in v41.modules if format_errors.is_chosen(m, v41, {"experts", "attention.wq_a"})}
    assert "experts" not in said and "attention" in said


def test_units_are_roles_in_layers_or_kinds_of_matrix(tiny: Inventory) -> None:
    by_role, by_kind = units(tiny), units(tiny, by_kind=True)
    assert {m.name.rpartition(".")[2] for m in by_role["experts", 0]} == {"w1", "w2", "w3"}
    assert [m.name.rpartition(".")[2] for m in by_kind["experts.w2", 0]] == ["w2"]
    assert (
        sum(map(len, by_role.values()))
        == sum(map(len, by_kind.values()))
        == len([m for m in tiny.modules if format_errors.is_chosen(m, tiny)])
    )
    assert ("embedding", None) in by_role and ("head", None) in by_role


def errors_of(found: dict[str, float]) -> Any:
    return lambda module, name, encoding: found.get(name, 0.0)


def test_options_weigh_errors_by_the_weights_that_a_token_meets(tiny: Inventory) -> None:
    """Every matrix at the same error of 1: a unit's error is its part of all weights, experts by active over all."""
    found = format_errors.options(tiny, errors_of({"affine-2-g32": 1.0}))
    d = tiny.config.dims
    met = {u: sum(m.weights * (d["K"] / d["E"] if m.experts else 1) for m in ms) for u, ms in units(tiny).items()}
    for unit, options in found.items():
        low = next((x for x in options if x.format == "affine-2-g32"), None)
        assert low is not None and low.error == pytest.approx(met[unit] / sum(met.values()))
    assert sum(x.error for options in found.values() for x in options) == pytest.approx(1)


def test_no_option_is_larger_than_native_or_below_a_floor(v41: Inventory) -> None:
    floor = Floor(4, "mxfp4", "")
    found = format_errors.options(v41, errors_of({}), floor=floor)
    for (role, layer), options in found.items():
        native = next(x.size for x in options if x.format == "native")
        assert all(x.size < native for x in options if x.format != "native")
        low = any(floor.is_below(x.format) for x in options)
        assert low == (layer not in v41.config.carriers), (role, layer)


class Known:
    """Sensitivities of one matrix, probed with 2 bits."""

    def __init__(self) -> None:
        self.losses = {"model.layers.0.attn.wq_a": 0.3, "model.layers.0.attn.wkv": 0.4}
        self.probes = {"model.layers.0.attn.wq_a": "affine-2-g32"}


def test_with_sensitivities_an_error_is_a_loss_over_the_error_of_its_probe(tiny: Inventory) -> None:
    found = format_errors.options(tiny, errors_of({"affine-2-g32": 0.6, "affine-4-g32": 0.2}), Known())
    by_format = {x.format: x.error for x in found["attention.wq_a", 0]}
    assert by_format["affine-2-g32"] == pytest.approx(0.3) and by_format["affine-4-g32"] == pytest.approx(0.1)
    assert all(x.error == 0 for x in found["attention.wkv", 0]), "what was not probed says nothing"
    assert all(x.error == 0 for x in found["attention.wq_a", 1])


@pytest.mark.parametrize("name", ["fp4", "fp8", "BF16", "other"])
def test_errors_that_are_imagined_fall_with_bits_and_vanish_where_nothing_is_rounded(
    tiny: Inventory, name: str
) -> None:
    module = next(m for m in tiny.modules if m.role == "attention" and m.may_quantize)
    module = replace(module, store=name if name != "other" else "BF16", shape=(128, 128))
    errors = format_errors.imagined("nearest")
    found = [
        errors(module, n, ENCODERS[n](module)) for n in ("affine-2-g64", "affine-3-g64", "affine-4-g64", "affine-8-g64")
    ]
    assert found == sorted(found, reverse=True) and 0 < found[-1] < 1e-3 < found[0] < 1
    assert errors(module, "native", ENCODERS["native"](module)) == 0.0


ROOM = Room(target=100 * 10**9, context=1000, cache=3 * 10**9, working=2 * 10**9)


def test_a_room_is_what_is_left_for_weights_and_says_its_option() -> None:
    assert ROOM.weights == 95 * 10**9 and size_budget._said(ROOM) == "--fit 100GB"
    mac = Room(96 * GIB, 0, 0, 0, 128 * GIB)
    assert size_budget._said(mac) == "--mac 128GB (103.1 GB for Metal)"


@pytest.mark.parametrize(
    ("least", "mac", "words"),
    [
        (81_234_000_000, None, "--fit 81.3GB is the smallest size"),
        (96 * GIB, 64 * GIB, "--mac 128GB is the smallest that does"),
        (96 * GIB + 1, 64 * GIB, "--mac 192GB is the smallest that does"),
        (1000 * GIB, 64 * GIB, "no Mac holds it"),
    ],
)
def test_the_smallest_size_that_would_do(least: int, mac: int | None, words: str) -> None:
    assert size_budget._smallest(least, Room(1, 0, 0, 0, mac)) == words


def test_a_choice_becomes_a_recipe_with_a_rule_for_each_role_and_format() -> None:
    options = {("experts", 2): "a", ("experts", 0): "a", ("experts", 1): "b", ("head", None): "b"}
    choice = Choice({u: Option(f, 1, 0.0) for u, f in options.items()}, 4, 0.0, 0.0)
    made = size_budget._recipe(recipe_of("q4"), choice)
    assert made.name == "fit" and made.formats["backbone"] == "native" and made.formats["mtp"] == "native"
    assert made.as_formats() | {} == {
        "backbone": "native", "experts": "native", "mtp": "native",
        "experts 0,2": "a", "experts 1": "b", "head": "b",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("place", "value"),
    [(0, 0.0), (5, 1.0), (10, 2.0), (15, 6.0), (20, 10.0), (25, 10.0), (-5, -1.0)],
)
def test_a_place_between_two_known_ones_has_a_value_in_proportion(place: int, value: float) -> None:
    assert forecast._between([0, 10, 20], [0.0, 2.0, 10.0], place) == value


def test_steps_without_bytes_are_passed_at_once() -> None:
    assert forecast._between([0, 10, 10, 20], [0.0, 2.0, 3.0, 4.0], 10) == 3.0
    assert forecast._between([0, 0], [0.0, 5.0], 0) == 5.0


@pytest.mark.parametrize(
    ("kind", "compiled"),
    [
        (("", "affine-4-g64", "optimal"), True),
        (("", "affine-4-g64", "nearest"), False),
        (("", "mxfp4", "optimal"), False),
    ],
)
def test_loops_are_compiled_for_the_search_of_affine_formats(kind: tuple[str, str, str], compiled: bool) -> None:
    assert forecast._is_compiled(kind) == compiled


@pytest.mark.parametrize(
    ("store", "data", "scales"), [("fp4", 8 * 512, 8 * 32), ("fp8", 8 * 1024, 8), ("bf16", 8 * 2048, 0)]
)
def test_a_trial_is_made_of_as_many_bytes_as_its_storage_takes(store: str, data: int, scales: int) -> None:
    chunk = forecast._chunk(store, "affine-4-g64", "nearest", 8)
    assert (len(chunk.data), len(chunk.scales), chunk.rows, chunk.cols) == (data, scales, 8, 1024)
