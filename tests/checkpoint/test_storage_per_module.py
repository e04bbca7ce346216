"""Checkpoints whose modules lie in other dtypes than the config (or layer 0) says: each module's own headers decide.

What people publish, by example: a BF16 head beside an FP8 backbone (vllm #43893), small F32 parameters saved in BF16
(transformers #46129), block scales in F32 (DeepSeek-V3 and the V4 Base releases) or U8, experts as F4 (safetensors
0.6), quantization_config left over on BF16 weights (sglang #23841).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ds4convert.checkpoint.config import check_config
from ds4convert.checkpoint.headers import parse_header
from ds4convert.formats import blocks, small_floats
from tests import support
from tests.checkpoint.test_spellings import assert_same_weights, converted
from tests.support import Tensor, assert_refused, mini_config, run, tree

Tensors = dict[str, Tensor]
Change = Callable[[Tensors], Tensors]


def values_f32(t: Tensor) -> np.ndarray:
    """Return E8M0 bytes as float32 numbers, from the definition (2^(byte-127)) in float64."""
    return np.exp2(np.frombuffer(t.data, np.uint8).astype(np.float64) - 127).astype(np.float32)


def bf16(values: np.ndarray) -> Tensor:
    return Tensor("BF16", list(values.shape), small_floats.bf16_bits(values).tobytes())


def as_bf16(tensors: Tensors, prefix: str, only: str = "") -> Tensors:
    """Return the tensors with every matrix under `prefix` (whose name holds `only`) dequantized to BF16."""
    out = dict(tensors)
    for name in [n for n in tensors if n.startswith(prefix) and n.endswith(".weight") and only in n]:
        scale = tensors.get(name.removesuffix("weight") + "scale")
        if scale is None:
            continue
        t = tensors[name]
        codes = np.frombuffer(t.data, np.uint8).reshape(t.shape)
        grid = np.frombuffer(scale.data, np.uint8).reshape(scale.shape)
        fp4 = t.dtype in {"I8", "U8"}
        out[name] = bf16(blocks.decode_fp4(codes, grid) if fp4 else blocks.decode_fp8(codes, grid, 0, (128, 128)))
        del out[name.removesuffix("weight") + "scale"]
    return out


def small_in_bf16(tensors: Tensors) -> Tensors:
    return {
        n: bf16(np.frombuffer(t.data, "<f4").reshape(t.shape)) if t.dtype == "F32" else t for n, t in tensors.items()
    }


def small_rounded(tensors: Tensors) -> Tensors:
    """Return the tensors with F32 ones holding values of BF16, still in F32."""
    out = dict(tensors)
    for n, t in tensors.items():
        if t.dtype == "F32":
            bits = small_floats.bf16_bits(np.frombuffer(t.data, "<f4"))
            out[n] = Tensor("F32", t.shape, small_floats.bf16_values(bits).tobytes())
    return out


def norms_in_f32(tensors: Tensors) -> Tensors:
    return {
        n: Tensor("F32", t.shape, small_floats.bf16_values(np.frombuffer(t.data, "<u2")).tobytes())
        if t.dtype == "BF16" and ("norm" in n or n.endswith("ffn.gate.weight"))
        else t
        for n, t in tensors.items()
    }


def floats(values: np.ndarray, dtype: str) -> Tensor:
    """Return float32 values in another dtype; the test fails where it cannot hold them."""
    if dtype == "BF16":
        made = bf16(values)
        assert np.array_equal(small_floats.bf16_values(np.frombuffer(made.data, "<u2")), values.reshape(-1))
        return made
    same = values.astype({"F32": "<f4", "F16": "<f2"}[dtype])
    assert np.array_equal(same.astype(np.float32), values)
    return Tensor(dtype, list(values.shape), same.tobytes())


def scales_as(dtype: str, part: str = "") -> Change:
    def change(tensors: Tensors) -> Tensors:
        return {
            n: (floats(values_f32(t).reshape(t.shape), dtype) if dtype != "U8" else Tensor("U8", t.shape, t.data))
            if t.dtype == "F8_E8M0" and part in n
            else t
            for n, t in tensors.items()
        }

    return change


def plain_as(dtype: str, *parts: str) -> Change:
    """Return what stores the BF16 tensors (of names with one of `parts`) in a wider dtype."""

    def change(tensors: Tensors) -> Tensors:
        return {
            n: floats(bf16_values(t).reshape(t.shape), dtype) if t.dtype == "BF16" and any(p in n for p in parts) else t
            for n, t in tensors.items()
        }

    return change


def tables_as(dtype: str) -> Change:
    numpy = {"I32": "<i4", "I16": "<i2", "U16": "<u2", "U8": "u1"}[dtype]

    def change(tensors: Tensors) -> Tensors:
        return {
            n: Tensor(dtype, t.shape, np.frombuffer(t.data, "<i8").astype(numpy).tobytes()) if t.dtype == "I64" else t
            for n, t in tensors.items()
        }

    return change


SAME: dict[str, tuple[dict[str, Any], Change]] = {
    "block scales in F32": ({}, scales_as("F32")),
    "block scales in U8": ({}, scales_as("U8")),
    "scales in F32 of the experts alone": ({}, scales_as("F32", ".experts.")),
    "scales in F32 of the head alone": ({}, scales_as("F32", "mtp.")),
    "FP8 experts with F32 scales, as in the Base releases": ({"expert_dtype": None}, scales_as("F32", ".experts.")),
    "block scales in BF16": ({}, scales_as("BF16")),
    "block scales in F16": ({}, scales_as("F16")),
    "norms and router in F32": ({}, norms_in_f32),
    "embedding and output in F32": ({}, plain_as("F32", "embed", "head.weight")),
    "the compressors in F32": ({}, plain_as("F32", ".compressor.")),
    "tables of experts in I32": ({}, tables_as("I32")),
    "tables of experts in U16": ({}, tables_as("U16")),
}
"""Changes of storage that change no value and no format of the result."""


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("recipe", ["native", "q4"])
def test_other_dtypes_of_the_same_values_give_the_same_weights(name: str, recipe: str, tmp_path: Path) -> None:
    changes, change = SAME[name]
    config = mini_config(**changes)
    source = support.write_synth(tmp_path / "s", config)
    other = support.write_folder(tmp_path / "t", change(support.read_folder(source)), config)
    if recipe == "native":
        converted(source, tmp_path / "a")
        converted(other, tmp_path / "b")
        assert_same_weights(tmp_path / "a", tmp_path / "b")
    else:
        options = ("--experts", "affine-4-g32", "--mtp", "bf16")
        for folder, out in ((source, "a"), (other, "b")):
            assert run("quantize", folder, tmp_path / out, "-q", *options).code == 0
        assert support.read_folder(tmp_path / "a") == support.read_folder(tmp_path / "b")
        assert run("verify", tmp_path / "b", "--source", other).code == 0


MIXED: dict[str, Change] = {
    "a BF16 head beside FP8 layers": lambda t: as_bf16(t, "mtp."),
    "BF16 layers beside an FP8 head": lambda t: as_bf16(t, "layers."),
    "attention in BF16": lambda t: as_bf16(t, "", ".attn."),
    "one layer in BF16": lambda t: as_bf16(t, "layers.2."),
    "only layer 0 in BF16": lambda t: as_bf16(t, "layers.0."),
    "one projection of the experts in BF16": lambda t: (
        as_bf16(t, "layers.1.", "experts.0.w2")
        | {n: x for e in (1, 2) for n, x in as_bf16(t, "layers.1.", f"experts.{e}.w2").items() if f".{e}.w2." in n}
    ),
    "small parameters in BF16": small_in_bf16,
    "all in BF16, with left-over keys": lambda t: as_bf16(t, ""),
}


@pytest.mark.parametrize("name", MIXED)
def test_modules_of_several_dtypes_convert_verify_and_run(name: str, tmp_path: Path) -> None:
    config = mini_config(qk_rope_head_dim=16)
    source = support.write_synth(tmp_path / "s", config)
    tensors = MIXED[name](small_rounded(support.read_folder(source)))
    for module in ("layers.1.ffn.experts.1.w2", "layers.1.ffn.experts.2.w2"):
        if f"{module}.weight" in tensors and tensors[f"{module}.weight"].dtype == "BF16":
            tensors.pop(f"{module}.scale", None)
    mixed = support.write_folder(tmp_path / "t", tensors, config)
    converted(mixed, tmp_path / "b")
    assert run("plan", mixed, "--json").code == 0
    told = run("generate", tmp_path / "b", "--prompt-ids", "1,2,3", "--max-tokens", "2", "--mtp", "--json")
    assert told.code == 0, told.err
    same_values = run("diff", source, mixed, "--json").json
    assert same_values["only_a"] == same_values["only_b"] == 0 or not same_values["only_a"], same_values


def test_tiles_of_another_size_than_the_config_says_are_told_by_the_scales(tmp_path: Path) -> None:
    config = mini_config(expert_dtype=None)
    tensors = support.read_folder(support.write_synth(tmp_path / "s", config))
    name = "layers.1.attn.wq_a"
    rows, cols = tensors[f"{name}.weight"].shape
    tensors[f"{name}.scale"] = Tensor(
        "F8_E8M0", [rows, -(-cols // 32)], bytes([120, 121] * 4096)[: rows * -(-cols // 32)]
    )
    converted(support.write_folder(tmp_path / "t", tensors, config), tmp_path / "out")
    made = support.read_folder(tmp_path / "out")[f"model.{name}.scales"]
    assert made.data == tensors[f"{name}.scale"].data


def test_f4_is_read_as_the_bytes_that_it_lies_in() -> None:
    raw = b'{"a":{"dtype":"F4","shape":[2,64],"data_offsets":[0,64]}}'
    (info,) = parse_header(raw, 8 + len(raw) + 64, "x").tensors
    assert (info.dtype, info.shape, info.size) == ("I8", (2, 32), 64)


def test_a_scale_in_f32_that_is_no_power_of_two_stops_before_the_first_byte(tmp_path: Path) -> None:
    config = mini_config(expert_dtype=None)
    tensors = scales_as("F32")(support.read_folder(support.write_synth(tmp_path / "s", config)))
    name = "layers.2.ffn.experts.1.w3.scale"
    wrong = values_f32(Tensor("", [], b"\x78" * (len(tensors[name].data) // 4)))
    wrong[-1] = 0.0123
    tensors[name] = Tensor("F32", tensors[name].shape, wrong.tobytes())
    source = support.write_folder(tmp_path / "t", tensors, config)
    before = tree(tmp_path)
    result = run("quantize", source, tmp_path / "out")
    assert_refused(result, name, "0.0122999996", "no power of two", "take the release")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("dtype", ["F8_E8M0", "F32"])
def test_a_base_release_converts_grafts_and_decodes_whatever_its_scales_are_stored_in(
    dtype: str, tmp_path: Path
) -> None:
    """Base: no expert_dtype in the config, experts in FP8 with a scale per 128x128 (architecture.md, section 11)."""
    config = mini_config(expert_dtype=None, qk_rope_head_dim=16)
    e8m0 = support.write_synth(tmp_path / "e8m0", config)
    source = e8m0
    if dtype == "F32":
        source = support.write_folder(
            tmp_path / "f32", scales_as("F32", ".experts.")(support.read_folder(e8m0)), config
        )
    stored = support.read_folder(source)["layers.1.ffn.experts.0.w2.scale"]
    assert (stored.dtype, list(stored.shape)) == (dtype, [2, 1])
    assert run("quantize", e8m0, tmp_path / "wanted").code == 0
    assert run("quantize", source, tmp_path / "out", "--drop-mtp").code == 0
    assert run("graft", tmp_path / "out", "--from", source, "--in-place").code == 0
    assert run("verify", tmp_path / "out", "--source", source).code == 0
    table = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert table["model.layers.1.ffn.switch_mlp.down_proj"]["mode"] == "mxfp8"
    texts = []
    for folder in ("wanted", "out"):
        told = run("generate", tmp_path / folder, "--prompt-ids", "1,2,3", "--max-tokens", "3", "--mtp", "--json")
        assert told.code == 0, told.err
        texts.append((told.json["tokens"], told.json["drafted"]))
    assert texts[0] == texts[1]


@pytest.mark.parametrize("recipe", ["native", "bf16"])
def test_scales_that_are_no_powers_of_two_are_refused_whatever_the_recipe(recipe: str, tmp_path: Path) -> None:
    """A code of E4M3 has 4 significant bits and an F32 scale up to 24; BF16 has 8, so the product is rounded: at no
    format of MLX is it the value of the source, and nothing rounds that was not asked to."""
    config = mini_config(expert_dtype=None)
    tensors = scales_as("F32")(support.read_folder(support.write_synth(tmp_path / "s", config)))
    name = "mtp.0.ffn.experts.2.w1.scale"
    odd = np.frombuffer(tensors[name].data, "<f4") * np.float32(1 / 3)
    tensors[name] = Tensor("F32", tensors[name].shape, odd.astype("<f4").tobytes())
    source = support.write_folder(tmp_path / "t", tensors, config)
    result = run("quantize", source, tmp_path / "out", "--recipe", recipe)
    assert_refused(result, name, f"{odd[0]:.9g}", "no power of two", "scale_fmt ue8m0", "dequantize it to BF16")
    assert not (tmp_path / "out").exists()
    assert run("quantize", source, tmp_path / "out", "--drop-mtp").code == 0, "the head alone is concerned"


def for_f16(tensors: Tensors) -> Tensors:
    """Return a checkpoint without block scales whose every value both BF16 and F16 hold (0 for what F16 has not)."""
    out = {}
    for name, t in as_bf16(tensors, "").items():
        if t.dtype in {"F32", "BF16"}:
            values = np.frombuffer(t.data, "<f4") if t.dtype == "F32" else bf16_values(t)
            kept = np.where((np.abs(values) >= 2.0**-14) & (np.abs(values) < 2.0**15), values, np.float32(0))
            kept = small_floats.bf16_values(small_floats.bf16_bits(kept.astype(np.float32)))
            t = floats(kept.reshape(t.shape), t.dtype)
        out[name] = t
    return out


def bf16_values(t: Tensor) -> np.ndarray:
    return small_floats.bf16_values(np.frombuffer(t.data, "<u2"))


def any_as(dtype: str, *parts: str) -> Change:
    """Return what stores float tensors (of names with one of `parts`) in another dtype."""

    def change(tensors: Tensors) -> Tensors:
        out = dict(tensors)
        for name, t in tensors.items():
            if t.dtype in {"F32", "BF16"} and any(p in name for p in parts):
                values = np.frombuffer(t.data, "<f4") if t.dtype == "F32" else bf16_values(t)
                out[name] = floats(values.reshape(t.shape), dtype)
        return out

    return change


WIDE: dict[str, Change] = {
    "some dense matrices and experts in F32": any_as("F32", "layers.1.attn.wq_a.", "layers.1.ffn.experts.", "mtp."),
    "all in F32": any_as("F32", ""),
    "sinks in F16": any_as("F16", "attn_sink"),
    "all in F16": any_as("F16", ""),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("options", [(), ("--experts", "affine-4-g32", "--backbone", "affine-8-g32")])
def test_wider_dtypes_of_the_same_values_give_the_same_bytes(
    name: str, options: tuple[str, ...], tmp_path: Path
) -> None:
    config = mini_config(quantization_config=None, expert_dtype=None)
    tensors = for_f16(support.read_folder(support.write_synth(tmp_path / "s", mini_config())))
    plain = support.write_folder(tmp_path / "p", tensors, config)
    wide = support.write_folder(tmp_path / "w", WIDE[name](tensors), config)
    assert run("quantize", plain, tmp_path / "a", "-q", *options).code == 0
    done = run("quantize", wide, tmp_path / "b", "-q", *options)
    assert done.code == 0, done.err
    assert support.read_folder(tmp_path / "a") == support.read_folder(tmp_path / "b")
    proof = run("verify", tmp_path / "b", "--source", wide)
    assert proof.code == 0, proof.err
    assert run("diff", plain, wide, "--json").json["only_a"] == 0


@pytest.mark.parametrize("name", ["embed.weight", "layers.1.attn.wq_a.weight", "layers.1.attn_norm.weight"])
@pytest.mark.parametrize("options", [(), ("--backbone", "affine-8-g32")])
def test_a_weight_that_bf16_cannot_hold_stops_before_the_first_byte(
    name: str, options: tuple[str, ...], tmp_path: Path
) -> None:
    config = mini_config(quantization_config=None, expert_dtype=None)
    tensors = as_bf16(support.read_folder(support.write_synth(tmp_path / "s", mini_config())), "")
    values = bf16_values(tensors[name]).copy()
    values[-1] = 0.1
    tensors[name] = floats(values.reshape(tensors[name].shape), "F32")
    source = support.write_folder(tmp_path / "t", tensors, config)
    before = tree(tmp_path)
    result = run("quantize", source, tmp_path / "out", *options)
    assert_refused(result, name, "0.100000001 in F32", "without rounding", "save this tensor in BF16")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_a_scale_in_half_precision_that_is_no_power_of_two_is_refused(dtype: str, tmp_path: Path) -> None:
    tensors = scales_as(dtype)(support.read_folder(support.write_synth(tmp_path / "s", mini_config())))
    name = "layers.2.attn.wq_a.scale"
    tensors[name] = floats(np.full(tensors[name].shape, 0.75, np.float32), dtype)
    source = support.write_folder(tmp_path / "t", tensors, mini_config())
    assert_refused(run("quantize", source, tmp_path / "out"), name, "0.75", "no power of two", "take the release")


def test_an_index_out_of_range_is_refused_in_any_dtype(tmp_path: Path) -> None:
    tensors = tables_as("I16")(support.read_folder(support.write_synth(tmp_path / "s", mini_config())))
    name = next(n for n in tensors if n.endswith("tid2eid"))
    tensors[name].data = b"\xff\xff" + tensors[name].data[2:]
    source = support.write_folder(tmp_path / "t", tensors, mini_config())
    assert_refused(run("quantize", source, tmp_path / "out"), name, "element [0, 0] is -1, expected 0 to 2")


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan"), 3.0, 2.0**-127, 2.0**-126, 2.0**127, 1.0])
def test_only_powers_of_two_have_a_code(value: float) -> None:
    codes, wrong = small_floats.e8m0_codes(np.array([1.0, value], np.float32))
    good = value > 0 and np.isfinite(value) and np.log2(value) == int(np.log2(value))
    assert (wrong is None) == good
    if good:
        assert 2.0 ** (int(codes[1]) - 127) == value


@pytest.mark.parametrize("ratios", [4, 5])
@pytest.mark.parametrize("stages", [0, None])
def test_a_head_that_the_config_forgot_is_kept(stages: int | None, ratios: int, tmp_path: Path) -> None:
    config = mini_config()
    source = support.write_synth(tmp_path / "s", config)
    bare = {k: v for k, v in config.items() if k != "num_nextn_predict_layers"}
    bare |= {} if stages is None else {"num_nextn_predict_layers": stages}
    bare["compress_ratios"] = config["compress_ratios"][:ratios]
    other = support.write_folder(tmp_path / "t", support.read_folder(source), bare)
    assert check_config(bare).head_hint == "none"
    converted(source, tmp_path / "a")
    converted(other, tmp_path / "b")
    assert_same_weights(tmp_path / "a", tmp_path / "b")
    made = json.loads((tmp_path / "b" / "config.json").read_text())
    assert made["compress_ratios"] == config["compress_ratios"] and made["num_nextn_predict_layers"] == 1
    again = run("quantize", other, tmp_path / "c")
    assert ("0 (no compression) is taken for the last 1" in again.err) == (ratios == 4)
    assert run("inspect", tmp_path / "b", "--json").json["mtp"]["kind"] == "classic"
