"""The expected tensors of a config: exactly the published ones of Flash, counted for Pro, and what headers settle."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from ds4convert.checkpoint.config import ModelConfig, check_config, named_config, parse_config
from ds4convert.checkpoint.headers import DTYPE_BYTES
from ds4convert.checkpoint.inventory import Inventory, compare, expected, recognise
from ds4convert.checkpoint.names import Named, ignored_reason, name_tensors
from ds4convert.checkpoint.types import TensorInfo
from ds4convert.errors import ConfigError, InventoryError
from tests.support import ROOT, mini_config

FLASH = json.loads((ROOT / "tests" / "data" / "flash_inventory.json").read_text())


def shipped(name: str) -> ModelConfig:
    return parse_config(named_config(name) or b"")


def published_flash() -> dict[str, tuple[str, tuple[int, ...]]]:
    """Expand the published patterns: {layer} and {expert} run over the listed numbers."""
    out: dict[str, tuple[str, tuple[int, ...]]] = {}
    for row in FLASH["rows"]:
        for layer in row.get("layers", [None]):
            for expert in range(row["experts"]) if isinstance(row.get("experts"), int) else row.get("experts", [None]):
                name = row["name"].replace("{layer}", str(layer)).replace("{expert}", str(expert))
                out[name] = (row["dtype"], tuple(row["shape"]))
    return out


def test_the_inventory_of_flash_is_exactly_the_published_one() -> None:
    specs = list(expected(shipped("flash")).tensors())
    ours = {s.name: (s.dtypes[0], s.shape) for s in specs}
    assert len(specs) == len(ours) == FLASH["tensors"] == 69_187
    assert ours == published_flash()
    sizes = {s.name: math.prod(s.shape) * DTYPE_BYTES[s.dtypes[0]] for s in specs}
    assert sum(sizes.values()) == FLASH["total_size"] == 159_609_485_896
    head = [s.name for s in specs if s.part == "mtp"]
    assert len(head) == FLASH["mtp_tensors"] == 1575 and all(n.startswith("mtp.0.") for n in head)
    assert sum(sizes[n] for n in head) == FLASH["mtp_bytes"] == 3_593_787_756


def counted(config: dict[str, Any], stages: int) -> tuple[int, int]:
    """Count (all tensors, those of the head) by the table of architecture.md section 11."""
    per_block = 2 + 6 + 1 + 5 * 2 + 2 + 1 + 1 + 6 * config["n_routed_experts"] + 6
    extra = {0: 0, 4: 4 + 7, 128: 4}
    layers = config["num_hidden_layers"]
    backbone = 6 + sum(per_block + extra[r] for r in config["compress_ratios"][:layers])
    head = stages * (per_block + 4 + 3 + 3)
    return backbone + head, head


@pytest.mark.parametrize("name", ["flash", "pro", "tiny"])
def test_the_counts_follow_the_table_of_the_architecture(name: str) -> None:
    raw = json.loads(named_config(name) or b"")
    specs = list(expected(shipped(name)).tensors())
    head = sum(s.part == "mtp" for s in specs)
    assert (len(specs), head) == counted(raw, raw["num_nextn_predict_layers"])
    assert len({s.name for s in specs}) == len(specs)


def test_pro_has_its_own_sizes() -> None:
    raw = json.loads(named_config("pro") or b"")
    by_name = {s.name: s for s in expected(shipped("pro")).tensors()}
    assert raw["num_hidden_layers"] == 61 and raw["n_routed_experts"] == 384
    assert by_name["layers.60.ffn.experts.383.w1.weight"].shape == (raw["moe_intermediate_size"], 7168 // 2)
    assert by_name["mtp.0.e_proj.weight"].shape == (7168, 7168)
    assert by_name["layers.0.attn.wo_a.weight"].shape[0] == 16 * raw["o_lora_rank"]
    assert "layers.61.attn_norm.weight" not in by_name


def test_hash_routed_layers_have_tid2eid_and_the_others_a_bias() -> None:
    config = shipped("flash")
    names = {s.name for s in expected(config).tensors()}
    for layer in range(config.layers):
        is_hash = config.marks["hash"].is_on(layer)
        assert (f"layers.{layer}.ffn.gate.tid2eid" in names) == is_hash
        assert (f"layers.{layer}.ffn.gate.bias" in names) != is_hash
    assert config.marks["hash"].value == 3 and "mtp.0.ffn.gate.bias" in names


def test_roles_say_what_each_tensor_is() -> None:
    roles = {s.name: s.role for s in expected(shipped("tiny")).tensors()}
    assert roles["embed.weight"] == "embedding" and roles["head.weight"] == "output"
    assert roles["layers.1.ffn.experts.0.w1.weight"] == roles["layers.1.ffn.experts.0.w1.scale"] == "experts"
    assert roles["layers.1.attn.indexer.wq_b.weight"] == "indexer"
    assert roles["layers.2.attn.compressor.ape"] == "compressor"
    assert roles["layers.0.hc_attn_fn"] == "hyper_connection"
    assert roles["layers.0.ffn.gate.tid2eid"] == "router"
    assert roles["layers.0.ffn.shared_experts.w2.weight"] == "shared_experts"
    assert roles["mtp.0.e_proj.weight"].startswith("mtp") and roles["layers.0.attn_norm.weight"] == "norm"


# --- storage ---


def expert_specs(config: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    specs = expected(check_config(config)).tensors()
    return {s.name: (s.dtypes[0], s.shape) for s in specs if s.name.startswith("layers.1.ffn.experts.0.w1.")}


def test_expert_dtype_fp4_means_packed_codes_with_a_scale_per_32_columns() -> None:
    assert expert_specs(mini_config()) == {
        "layers.1.ffn.experts.0.w1.weight": ("I8", (64, 80)),
        "layers.1.ffn.experts.0.w1.scale": ("F8_E8M0", (64, 5)),
    }


@pytest.mark.parametrize("value", [None, "fp8"])
def test_expert_dtype_absent_or_fp8_means_fp8_with_a_scale_per_tile(value: str | None) -> None:
    assert expert_specs(mini_config(expert_dtype=value)) == {
        "layers.1.ffn.experts.0.w1.weight": ("F8_E4M3", (64, 160)),
        "layers.1.ffn.experts.0.w1.scale": ("F8_E8M0", (1, 2)),
    }


def test_expert_dtype_bf16_means_bf16_without_scales() -> None:
    assert expert_specs(mini_config(expert_dtype="bf16")) == {"layers.1.ffn.experts.0.w1.weight": ("BF16", (64, 160))}


def test_a_config_without_fp8_means_bf16_everywhere() -> None:
    specs = list(expected(check_config(mini_config(expert_dtype=None, quantization_config=None))).tensors())
    assert {s.dtypes[0] for s in specs} == {"BF16", "F32", "I64"} and not [
        s for s in specs if s.name.endswith(".scale")
    ]


# --- recognition ---


def infos(inventory: Inventory, skip: tuple[str, ...] = ()) -> dict[str, TensorInfo]:
    out, at = {}, 0
    for s in inventory.tensors():
        if not s.name.startswith(skip or ("-",)):
            size = math.prod(s.shape) * DTYPE_BYTES[s.dtypes[0]]
            out[s.name] = TensorInfo(s.name, s.dtypes[0], s.shape, 0, at, size)
            at += size
    return out


def dspark_config(**changes: Any) -> dict[str, Any]:
    return mini_config(
        **{
            "dspark_block_size": 5,
            "dspark_markov_rank": 32,
            "dspark_noise_token_id": 47,
            "dspark_target_layer_ids": [1, 2, 3],
            "compress_ratios": [*mini_config()["compress_ratios"][:4], *[0] * 9],
            **changes,
        }
    )


def test_a_checkpoint_as_the_config_says_has_no_findings() -> None:
    for raw in (mini_config(), dspark_config(), mini_config(expert_dtype=None), mini_config(expert_dtype="bf16")):
        config = check_config(raw)
        found = infos(expected(config))
        inventory = recognise(config, found)
        assert compare(inventory, Named(found, ()), ("f",)) == []


def test_dspark_is_recognised_by_its_names_and_never_taken_for_classic() -> None:
    config = check_config(dspark_config())
    inventory = recognise(config, infos(expected(config)))
    assert (inventory.head_kind, inventory.stages) == ("dspark", 3)
    names = {s.name for s in inventory.tensors() if s.part == "mtp"}
    assert "mtp.0.main_proj.weight" in names and "mtp.2.markov_head.markov_w1.weight" in names
    assert not [n for n in names if "e_proj" in n or "enorm" in n]
    assert "mtp.1.main_proj.weight" not in names and "mtp.0.norm.weight" not in names


@pytest.mark.parametrize("stages", [1, 2, 5])
def test_the_number_of_dspark_stages_comes_from_the_names_whatever_the_config_counts(stages: int) -> None:
    config = check_config(dspark_config(num_nextn_predict_layers=1))
    base = expected(config)
    from ds4convert.checkpoint.inventory import expand

    found = infos(expand(config, "dspark", stages, base.storage))
    inventory = recognise(config, found)
    assert (inventory.head_kind, inventory.stages) == ("dspark", stages)
    assert compare(inventory, Named(found, ()), ("f",)) == []


def test_a_classic_head_under_a_dspark_config_is_refused() -> None:
    found = infos(expected(check_config(mini_config())))
    with pytest.raises(InventoryError, match=r"are a classic MTP block, but config\.json describes a DSpark drafter"):
        recognise(check_config(dspark_config()), found)


def test_a_dspark_head_under_a_classic_config_is_refused() -> None:
    found = infos(expected(check_config(dspark_config())))
    with pytest.raises(InventoryError, match="DSpark drafter, but config"):
        recognise(check_config(mini_config()), found)


def test_a_dspark_head_under_a_config_without_its_keys_is_refused_naming_them() -> None:
    found = infos(expected(check_config(dspark_config())))
    config = check_config(mini_config(num_nextn_predict_layers=0, compress_ratios=[0, 4, 128, 4]))
    with pytest.raises(InventoryError, match="lacks dspark_target_layer_ids, dspark_markov_rank"):
        recognise(config, found)


def test_a_head_of_no_known_kind_and_one_of_two_kinds_are_refused() -> None:
    config = check_config(mini_config())
    found = infos(expected(config), skip=("mtp.0.e_proj",))
    with pytest.raises(InventoryError, match=r"exactly one kind of head: classic .* found none of them"):
        recognise(config, found)
    both = infos(expected(config)) | infos(expected(check_config(dspark_config())))
    with pytest.raises(InventoryError, match="found classic and dspark"):
        recognise(config, both)


@pytest.mark.parametrize("number", ["\u00b2", "\u0663", "x", "", "999", "9999", "00"])
def test_odd_stage_numbers_never_end_in_anything_but_findings(number: str) -> None:
    for raw in (mini_config(), dspark_config()):
        config = check_config(raw)
        found = infos(expected(config))
        odd = TensorInfo(f"mtp.{number}.x", "I8", (1,), 0, 0, 1)
        found[odd.name] = odd
        inventory = recognise(config, found)
        assert any(f.tensor == odd.name and f.kind == "extra" for f in compare(inventory, Named(found, ()), ("f",)))


def test_a_stage_number_that_would_imply_a_million_tensors_is_refused_before_they_are_listed() -> None:
    config = check_config(dspark_config(n_routed_experts=256))
    found = infos(expected(config))
    found["mtp.999.x"] = TensorInfo("mtp.999.x", "I8", (1,), 0, 0, 1)
    with pytest.raises(InventoryError, match="1000 head stages"):
        recognise(config, found)


def test_every_kind_of_difference_is_found_and_described() -> None:
    config = check_config(mini_config())
    found = infos(expected(config))
    del found["layers.1.ffn.experts.2.w3.scale"]
    found["norm.weight"] = TensorInfo("norm.weight", "F64", (160,), 0, 0, 1280)
    found["layers.0.attn.wkv.scale"] = TensorInfo("layers.0.attn.wkv.scale", "F8_E8M0", (2, 1), 0, 0, 2)
    found["layers.9.attn_norm.weight"] = TensorInfo("layers.9.attn_norm.weight", "BF16", (160,), 0, 0, 320)
    texts = [str(f) for f in compare(recognise(config, found), Named(found, ()), ("f.safetensors",))]
    assert texts == [
        "layers.0.attn.wkv.scale: expected shape [1, 2], found [2, 1] (f.safetensors)",
        "layers.1.ffn.experts.2.w3.scale: missing; expected F8_E8M0 [64, 5]",
        "norm.weight: expected dtype BF16, found F64 (f.safetensors)",
        "layers.9.attn_norm.weight: not expected by the config; found BF16 [160] (f.safetensors)",
    ]


def test_a_tensor_under_two_spellings_is_a_finding() -> None:
    config = check_config(mini_config())
    found = list(infos(expected(config)).values())
    found.append(TensorInfo("model.layers.0.input_layernorm.weight", "BF16", (160,), 0, 0, 320))
    named = name_tensors(config.family, found)
    assert named.doubled == (("layers.0.attn_norm.weight", "model.layers.0.input_layernorm.weight"),)
    findings = compare(recognise(config, named.tensors), named, ("f",))
    assert [(f.kind, f.tensor) for f in findings] == [("extra", "model.layers.0.input_layernorm.weight")]


def test_only_copies_of_shared_tensors_under_the_head_may_be_left_out() -> None:
    family = shipped("tiny").family
    assert "backbone's embedding" in (ignored_reason(family, "mtp.0.emb.tok_emb.weight") or "")
    assert "backbone's output matrix" in (ignored_reason(family, "mtp.0.head.weight") or "")
    for name in (
        "mtp.0.e_proj.weight",
        "layers.0.head.weight",
        "head.weight",
        "mtp.x.head.weight",
        "mtp.0.tail.weight",
    ):
        assert ignored_reason(family, name) is None


def test_every_module_goes_into_a_plan_for_pro_within_the_bound_on_tensors() -> None:
    from ds4convert.checkpoint.config import MAX_TENSORS, count_bound

    for name in ("flash", "pro"):
        config = shipped(name)
        specs = sum(1 for _ in expected(config).tensors())
        assert specs <= count_bound(config.layers + config.stages, config.dims["E"]) + 6 <= MAX_TENSORS


def test_a_config_of_too_many_layers_or_experts_is_refused() -> None:
    with pytest.raises(ConfigError, match="more than this tool handles"):
        check_config(mini_config(n_routed_experts=20_000))
    with pytest.raises(ConfigError, match="more than this tool handles"):
        check_config(mini_config(num_hidden_layers=5000, compress_ratios=[0] * 5001, n_routed_experts=1))
