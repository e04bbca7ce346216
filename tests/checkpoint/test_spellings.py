"""Every storage and spelling of a checkpoint converts, verifies, and gives the same values, head included."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from ds4convert.checkpoint.config import check_config
from ds4convert.checkpoint.names import Speller
from ds4convert.formats import blocks
from tests import support
from tests.support import Tensor, assert_refused, mini_config, run, tree

mx.set_default_device(mx.cpu)
Rename = Callable[[str], str]


def converted(source: Path, out: Path, *options: str) -> dict[str, Any]:
    """Convert, verify against the source, and return what quantize reported."""
    done = run("quantize", source, out, "--json", *options)
    assert done.code == 0, done.err
    proof = run("verify", out, "--source", source, "--json")
    assert proof.code == 0 and proof.json["ok"], proof.out
    clean = run("inspect", source, "--json")
    assert clean.code == 0 and clean.json["problems"] == [] and clean.json["format"] == "official", clean.out
    return dict(done.json)


def weights(folder: Path) -> dict[str, np.ndarray]:
    """Return every weight of a converted folder as float32, dequantized by MLX."""
    arrays: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        arrays |= mx.load(str(path))
    out = {}
    for name, array in arrays.items():
        if name.endswith(".scales"):
            continue
        scales = arrays.get(name.removesuffix("weight") + "scales") if name.endswith(".weight") else None
        if scales is not None:
            bits = array.shape[-1] * 32 // (scales.shape[-1] * 32)
            array = mx.dequantize(array, scales, group_size=32, bits=bits, mode=f"mxfp{bits}", dtype=mx.float32)
        out[name] = np.array(array.astype(mx.float32))
    return out


def assert_same_weights(a: Path, b: Path) -> None:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys() and len(first) > 100
    for name, array in first.items():
        assert np.array_equal(array, second[name]), name


# --- spellings: the same bytes under other names give the same folder ---

HYBRID = [("attn.", "self_attn."), ("ffn.", "mlp."), ("gate.bias", "gate.e_score_correction_bias")]
TO_TRANSFORMERS = [
    ("attn.indexer.compressor.wkv.", "attn.compressor.indexer.kv_proj."),
    ("attn.indexer.compressor.wgate.", "attn.compressor.indexer.gate_proj."),
    ("attn.indexer.compressor.ape", "attn.compressor.indexer.position_bias"),
    ("attn.indexer.compressor.norm.", "attn.compressor.indexer.kv_norm."),
    ("attn.indexer.wq_b.", "attn.compressor.indexer.q_b_proj."),
    ("attn.indexer.weights_proj.", "attn.compressor.indexer.scorer.weights_proj."),
    ("attn.compressor.wkv.", "attn.compressor.kv_proj."),
    ("attn.compressor.wgate.", "attn.compressor.gate_proj."),
    ("attn.compressor.ape", "attn.compressor.position_bias"),
    ("attn.compressor.norm.", "attn.compressor.kv_norm."),
    ("attn.attn_sink", "attn.sinks"),
    ("attn.wq_a.", "attn.q_a_proj."), ("attn.q_norm.", "attn.q_a_norm."), ("attn.wq_b.", "attn.q_b_proj."),
    ("attn.wkv.", "attn.kv_proj."), ("attn.wo_a.", "attn.o_a_proj."), ("attn.wo_b.", "attn.o_b_proj."),
    ("hc_attn_", "attn_hc."), ("hc_ffn_", "ffn_hc."),
    (".attn_norm.", ".input_layernorm."), (".ffn_norm.", ".post_attention_layernorm."),
    (".w1.", ".gate_proj."), (".w2.", ".down_proj."), (".w3.", ".up_proj."),
]  # fmt: skip
ROOT_NAMES = {
    "embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight", "head.weight": "lm_head.weight",
    "hc_head_fn": "model.hc_head.hc_fn", "hc_head_base": "model.hc_head.hc_base",
    "hc_head_scale": "model.hc_head.hc_scale",
}  # fmt: skip


def prefixed(name: str) -> str:
    return f"model.{name}"


def hybrid(name: str) -> str:
    for old, new in HYBRID:
        name = name.replace(f".{old}", f".{new}")
    return f"model.{name.removesuffix('.scale')}.weight_scale_inv" if name.endswith(".scale") else f"model.{name}"


def transformers(name: str) -> str:
    """The Transformers name of an official one, by the table of architecture.md; the head's own tensors keep theirs."""
    if name in ROOT_NAMES:
        return ROOT_NAMES[name]
    if ".".join(name.split(".")[2:]).startswith(("e_proj", "h_proj", "enorm", "hnorm", "norm", "hc_head")):
        return name.removesuffix("scale") + "weight_scale_inv" if name.endswith(".scale") else name
    for old, new in TO_TRANSFORMERS:
        name = name.replace(old, new, 1)
    name = name.replace(".attn.", ".self_attn.").replace(".ffn.", ".mlp.")
    name = name.replace("gate.bias", "gate.e_score_correction_bias")
    if name.endswith(".scale") and "_hc." not in name:
        name = name.removesuffix("scale") + "weight_scale_inv"
    return name if name.startswith("mtp.") else f"model.{name}"


@pytest.mark.sampled(4)
@pytest.mark.parametrize("rename", [prefixed, hybrid, transformers])
@pytest.mark.parametrize("expert_dtype", ["fp4", None, "bf16"])
def test_every_spelling_gives_the_same_values_as_the_official_one(
    rename: Rename, expert_dtype: str | None, tmp_path: Path
) -> None:
    config = mini_config(expert_dtype=expert_dtype)
    official = support.write_synth(tmp_path / "official", config)
    tensors = {rename(n): t for n, t in support.read_folder(official).items()}
    other = support.write_folder(tmp_path / "other", tensors, config, shards=3)
    converted(official, tmp_path / "a")
    converted(other, tmp_path / "b")
    assert_same_weights(tmp_path / "a", tmp_path / "b")
    found = run("diff", official, other, "--json")
    assert found.code == 0, found.out[-500:]


@pytest.mark.parametrize("rename", [prefixed, hybrid, transformers])
def test_the_speller_undoes_every_spelling_of_every_tensor_of_flash(rename: Rename) -> None:
    from ds4convert.checkpoint.config import named_config, parse_config
    from ds4convert.checkpoint.inventory import expected

    config = parse_config(named_config("flash") or b"")
    official = Speller(config.family).official
    for spec in expected(config).tensors():
        assert official(rename(spec.name)) == spec.name


def test_each_row_of_the_transformers_table_is_really_renamed() -> None:
    assert transformers("layers.3.attn.indexer.compressor.ape") == (
        "model.layers.3.self_attn.compressor.indexer.position_bias"
    )
    assert transformers("layers.3.attn.wq_a.scale") == "model.layers.3.self_attn.q_a_proj.weight_scale_inv"
    assert transformers("layers.3.hc_attn_scale") == "model.layers.3.attn_hc.scale"
    assert transformers("layers.3.ffn.experts.7.w2.weight") == "model.layers.3.mlp.experts.7.down_proj.weight"


# --- fused experts ---


def fuse(tensors: dict[str, Tensor], experts: int) -> dict[str, Tensor]:
    """Return the Transformers namespace with gate_up_proj [E, 2I, D] (w1 rows first) and down_proj [E, D, I]."""
    out = {transformers(n): t for n, t in tensors.items() if ".experts." not in n}
    blocks_ = {n[: n.index("ffn.experts.")] for n in tensors if ".ffn.experts." in n}
    for block in sorted(blocks_):
        for fused, parts in (("gate_up_proj", ("w1", "w3")), ("down_proj", ("w2",))):
            for kind, suffix in (("weight", ""), ("scale", "_scale_inv")):
                names = [[f"{block}ffn.experts.{e}.{p}.{kind}" for p in parts] for e in range(experts)]
                if names[0][0] not in tensors:
                    continue
                first = tensors[names[0][0]]
                rows, cols = first.shape
                data = b"".join(tensors[n].data for group in names for n in group)
                prefix = block if block.startswith("mtp.") else f"model.{block}"
                shape = [experts, len(parts) * rows, cols]
                out[f"{prefix}mlp.experts.{fused}{suffix}"] = Tensor(first.dtype, shape, data)
    return out


@pytest.mark.parametrize("expert_dtype", ["bf16", None, "fp4"])
@pytest.mark.parametrize("options", [(), ("--backbone", "bf16", "--mtp", "bf16")], ids=["native", "bf16"])
def test_fused_experts_give_the_same_values_as_separate_ones(
    expert_dtype: str | None, options: tuple[str, ...], tmp_path: Path
) -> None:
    config = mini_config(expert_dtype=expert_dtype, moe_intermediate_size=128)
    official = support.write_synth(tmp_path / "official", config)
    tensors = fuse(support.read_folder(official), config["n_routed_experts"])
    other = support.write_folder(tmp_path / "other", tensors, config)
    converted(official, tmp_path / "a", *options)
    facts = converted(other, tmp_path / "b", *options)
    assert facts["head"] == "classic"
    assert_same_weights(tmp_path / "a", tmp_path / "b")


def test_a_tile_that_would_span_two_fused_matrices_is_refused(tmp_path: Path) -> None:
    config = mini_config(expert_dtype=None, moe_intermediate_size=96)  # gate and up would share the tile of rows 0..127
    official = support.write_synth(tmp_path / "official", config)
    other = support.write_folder(tmp_path / "other", fuse(support.read_folder(official), 3), config)
    assert_refused(run("quantize", other, tmp_path / "out"), "gate_up_proj", "a tile of 128 rows spans two matrices")
    assert not (tmp_path / "out").exists()


def test_a_nan_code_in_a_fused_tensor_is_named_with_the_index_in_the_users_tensor(tmp_path: Path) -> None:
    config = mini_config(expert_dtype=None, moe_intermediate_size=128)
    official = support.write_synth(tmp_path / "official", config)
    tensors = fuse(support.read_folder(official), 3)
    name = "model.layers.2.mlp.experts.gate_up_proj"
    data = bytearray(tensors[name].data)
    data[(2 * 256 + 200) * 160 + 33] = 0x7F  # expert 2, row 200 (of up), column 33
    tensors[name] = Tensor(tensors[name].dtype, tensors[name].shape, bytes(data))
    other = support.write_folder(tmp_path / "other", tensors, config)
    for options in ((), ("--backbone", "bf16")):
        done = run("quantize", other, tmp_path / "out", "--overwrite", *options)
        assert_refused(done, f"{name}: element [2, 200, 33] is NaN in FP8 E4M3 (byte 0x7F)")
        assert not (tmp_path / "out" / "ds4convert_manifest.json").exists()


# --- storage ---


def test_an_fp8_checkpoint_is_written_as_mxfp8_and_a_bf16_one_dense(tmp_path: Path) -> None:
    for value, dtypes in ((None, {"U32", "U8"}), ("bf16", {"BF16"}), ("fp8", {"U32", "U8"})):
        source = support.write_synth(tmp_path / f"s{value}", mini_config(expert_dtype=value))
        converted(source, tmp_path / f"o{value}")
        stored = support.read_folder(tmp_path / f"o{value}")
        found = {t.dtype for n, t in stored.items() if ".switch_mlp." in n}
        assert found == dtypes
        if "U8" in dtypes:
            assert stored["model.layers.1.ffn.switch_mlp.gate_proj.weight"].shape == [3, 64, 160 // 4]


def test_values_of_every_format_equal_an_independent_decoding_of_the_source(tmp_path: Path) -> None:
    config = mini_config()
    source = support.write_synth(tmp_path / "s", config)
    converted(source, tmp_path / "o")
    tensors, out = support.read_folder(source), weights(tmp_path / "o")
    fp8 = [n.removesuffix(".weight") for n, t in tensors.items() if t.dtype == "F8_E4M3"]
    assert len(fp8) > 30
    for name in fp8:
        tail = name.rpartition("mtp.0." if name.startswith("mtp") else "layers.")[2]
        weight, scale = tensors[f"{name}.weight"], tensors[f"{name}.scale"]
        values = np.frombuffer(weight.data, np.uint8).reshape(weight.shape)
        grid = np.frombuffer(scale.data, np.uint8).reshape(scale.shape).repeat(128, 0).repeat(128, 1)
        table = np.array(mx.from_fp8(mx.array(np.arange(256, dtype=np.uint8)), dtype=mx.float32))
        exact = table[values] * np.exp2(grid[: weight.shape[0], : weight.shape[1]].astype(np.float32) - 127)
        mlx = f"mtp.0.{tail}" if name.startswith("mtp") else f"model.layers.{tail}"
        for old, new in ((".w1", ".gate_proj"), (".w2", ".down_proj"), (".w3", ".up_proj")):
            mlx = mlx.replace(f"shared_experts{old}", f"shared_experts{new}")
        assert np.array_equal(out[f"{mlx}.weight"], exact), name


def test_headers_decide_how_experts_are_stored_where_the_config_is_silent(tmp_path: Path) -> None:
    """A config without expert_dtype over FP4 tensors: the dtypes of the tensors say what they are."""
    source = support.write_synth(tmp_path / "s", mini_config())
    silent = support.write_folder(tmp_path / "t", support.read_folder(source), mini_config(expert_dtype=None))
    converted(source, tmp_path / "a")
    converted(silent, tmp_path / "b")
    assert_same_weights(tmp_path / "a", tmp_path / "b")


def test_the_headers_decide_where_the_config_says_fp4_over_fp8_tensors(tmp_path: Path) -> None:
    source = support.write_synth(tmp_path / "s", mini_config(expert_dtype=None))
    wrong = support.write_folder(tmp_path / "t", support.read_folder(source), mini_config(expert_dtype="fp4"))
    converted(source, tmp_path / "a")
    converted(wrong, tmp_path / "b")
    assert_same_weights(tmp_path / "a", tmp_path / "b")


def test_fp4_codes_stored_as_unsigned_bytes_are_the_same_codes(tmp_path: Path) -> None:
    source = support.write_synth(tmp_path / "s", mini_config())
    tensors = support.read_folder(source)
    unsigned = {n: Tensor("U8", t.shape, t.data) if t.dtype == "I8" else t for n, t in tensors.items()}
    other = support.write_folder(tmp_path / "t", unsigned, mini_config())
    converted(source, tmp_path / "a")
    converted(other, tmp_path / "b")
    assert_same_weights(tmp_path / "a", tmp_path / "b")


def test_columns_without_whole_groups_of_32_stop_before_the_first_byte(tmp_path: Path) -> None:
    config = mini_config(moe_intermediate_size=48)
    names = {"fp4": "layers.0.ffn.experts.0.w2.weight", None: "layers.0.ffn.experts.0.w2.weight"}
    for value, name in names.items():
        source = support.write_synth(tmp_path / f"s{value}", config | {"expert_dtype": value})
        before = tree(tmp_path)
        assert_refused(run("quantize", source, tmp_path / "out"), name, "groups of 32")
        if value == "fp4":
            assert_refused(run("quantize", source, tmp_path / "out", "--recipe", "bf16"), name, "groups of 32")
        assert tree(tmp_path) == before


# --- heads ---


def dspark_config() -> dict[str, Any]:
    from tests.checkpoint.test_inventory import dspark_config as config

    return config()


@pytest.mark.parametrize("confidence", ["BF16", "F32"])
def test_a_dspark_head_is_carried_over_whole_and_called_by_its_name(confidence: str, tmp_path: Path) -> None:
    config = dspark_config()
    source = support.write_synth(tmp_path / "s", config)
    tensors = support.read_folder(source)
    name = "mtp.2.confidence_head.proj.weight"
    if confidence == "F32":
        t = tensors[name]
        tensors[name] = Tensor("F32", t.shape, np.ones(t.shape, "<f4").tobytes())
    source = support.write_folder(tmp_path / "t", tensors, config)
    facts = converted(source, tmp_path / "o")
    assert facts["head"] == "dspark" and facts["left_out"] == []
    stored = support.read_folder(tmp_path / "o")
    assert stored[name].dtype == confidence and stored[name].data == tensors[name].data
    seen = run("inspect", tmp_path / "o", "--json").json
    assert seen["mtp"]["kind"] == "dspark" and seen["problems"] == []
    assert seen["mtp"]["tensors"] == len(support.names(stored, "mtp."))
    assert config_of(tmp_path / "o")["num_nextn_predict_layers"] == config["num_nextn_predict_layers"]


def config_of(folder: Path) -> dict[str, Any]:
    import json

    return dict(json.loads((folder / "config.json").read_text()))


@pytest.mark.parametrize("layout", ["inline", "vlm", "mlx-lm"])
def test_a_dspark_head_verifies_in_every_layout_that_takes_it(layout: str, tmp_path: Path) -> None:
    source = support.write_synth(tmp_path / "s", dspark_config())
    assert converted(source, tmp_path / "o", "--layout", layout)["head"] == "dspark"


@pytest.mark.parametrize("layout", ["mtplx", "universal"])
def test_a_layout_whose_hosts_load_no_dspark_says_so_before_the_first_byte(layout: str, tmp_path: Path) -> None:
    source = support.write_synth(tmp_path / "s", dspark_config())
    before = tree(tmp_path)
    result = run("quantize", source, tmp_path / "o", "--layout", layout)
    assert_refused(result, f"layout {layout}: its hosts load no dspark head", "--layout inline")
    assert tree(tmp_path) == before


COPIES = {
    "mtp.0.emb.tok_emb.weight": "embedding",
    "mtp.0.head.weight": "output matrix",
    "mtp.0.embed.weight": "embedding",
}


def test_copies_of_embedding_and_output_under_the_head_are_left_out_with_the_reason(tmp_path: Path) -> None:
    config = mini_config()
    plain = support.write_synth(tmp_path / "s", config)
    tensors = support.read_folder(plain)
    extra = dict.fromkeys(COPIES, tensors["embed.weight"])
    source = support.write_folder(tmp_path / "t", tensors | extra, config)
    facts = converted(source, tmp_path / "b")
    told = {x["tensor"]: x["why"] for x in facts["left_out"]}
    assert told.keys() == COPIES.keys() and all(COPIES[n] in why for n, why in told.items())
    converted(plain, tmp_path / "a")
    assert_same_weights(tmp_path / "a", tmp_path / "b")


def test_any_other_tensor_under_the_head_is_refused(tmp_path: Path) -> None:
    config = mini_config()
    tensors = support.read_folder(support.write_synth(tmp_path / "s", config))
    source = support.write_folder(tmp_path / "t", tensors | {"mtp.0.gamma.weight": tensors["norm.weight"]}, config)
    assert_refused(run("quantize", source, tmp_path / "o"), "mtp.0.gamma.weight: not expected by the config")


def test_a_dropped_head_is_left_out_tensor_by_tensor_with_the_reason(mini_source: Path, tmp_path: Path) -> None:
    facts = converted(mini_source, tmp_path / "o", "--drop-mtp")
    head = support.names(support.read_folder(mini_source), "mtp.")
    assert sorted(x["tensor"] for x in facts["left_out"]) == sorted(head)
    assert all("--drop-mtp" in x["why"] for x in facts["left_out"])
    assert config_of(tmp_path / "o")["num_nextn_predict_layers"] == 0


def test_a_head_of_two_stages_is_carried_over(tmp_path: Path) -> None:
    config = mini_config(num_nextn_predict_layers=2, compress_ratios=[0, 4, 128, 4, 0, 0])
    source = support.write_synth(tmp_path / "s", config)
    converted(source, tmp_path / "o")
    stored = support.read_folder(tmp_path / "o")
    assert support.names(stored, "mtp.1.e_proj.") and not support.names(stored, "mtp.2.")


def test_a_checkpoint_without_a_head_converts_when_the_config_promises_none(tmp_path: Path) -> None:
    source = support.write_synth(
        tmp_path / "s", mini_config(num_nextn_predict_layers=0, compress_ratios=[0, 4, 128, 4])
    )
    facts = converted(source, tmp_path / "o")
    assert facts["head"] == "none" and facts["left_out"] == []
    assert check_config(config_of(tmp_path / "o"), is_mlx=True).stages == 0


def test_mlx_scales_of_partial_tiles_decode_to_the_source(mini_source: Path) -> None:
    """The mini model has partial tiles in rows and columns; this keeps it so."""
    shapes = [t.shape for t in support.read_folder(mini_source).values() if t.dtype == "F8_E4M3"]
    assert any(s[0] % 128 and s[0] > 128 for s in shapes) and any(s[1] % 128 and s[1] > 128 for s in shapes)
    assert blocks.MX_GROUP == 32


FORMATS = [
    ((), set()),
    (("--mtp", "bf16"), {"head", "head experts"}),
    (("--experts", "bf16"), {"experts"}),
    (("--backbone", "bf16"), {"backbone", "experts"}),
    (("--backbone", "bf16", "--experts", "native"), {"backbone"}),
    (("--recipe", "bf16"), {"backbone", "experts", "head", "head experts"}),
    (("--recipe", "bf16", "--mtp", "native"), {"backbone", "experts"}),
]


@pytest.mark.parametrize(("options", "dense"), FORMATS, ids=lambda v: " ".join(v) if isinstance(v, tuple) else "")
def test_each_format_option_reaches_exactly_the_part_that_it_names(
    options: tuple[str, ...], dense: set[str], mini_source: Path, tmp_path: Path
) -> None:
    converted(mini_source, tmp_path / "o", *options)
    stored = support.read_folder(tmp_path / "o")
    probes = {
        "backbone": "model.layers.1.attn.wkv.weight",
        "experts": "model.layers.1.ffn.switch_mlp.up_proj.weight",
        "head": "mtp.0.e_proj.weight",
        "head experts": "mtp.0.ffn.switch_mlp.up_proj.weight",
    }
    assert {part for part, name in probes.items() if stored[name].dtype == "BF16"} == dense
    assert {stored[name].dtype for name in probes.values()} <= {"BF16", "U32"}
    plain = "model.layers.1.attn.compressor.wkv.weight"
    assert stored[plain].dtype == "BF16" and f"{plain.removesuffix('weight')}scales" not in stored
