"""Checkpoints that look like ours: zeros where a download ended, other formats by config and by names, each with a way on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ds4convert.checkpoint.config import named_config, parse_config
from ds4convert.checkpoint.family import families
from ds4convert.checkpoint.folder import Checkpoint
from ds4convert.checkpoint.published import foreign, heads, placement, zeros
from ds4convert.checkpoint.types import Header, TensorInfo
from ds4convert.errors import ConfigError, HeaderError, InventoryError
from ds4convert.storage.records import SourceFile
from tests.checkpoint.memory import Memory
from tests.support import tiny_config

FAMILY = families()["deepseek_v4"]
DSPARK = FAMILY.heads["dspark"]


def tensor(name: str, start: int = 0, shape: tuple[int, ...] = (4, 64), file: int = 0) -> TensorInfo:
    size = 1
    for n in shape:
        size *= n
    return TensorInfo(name, "I8", shape, file, start, size)


def folder(path: Path, *files: tuple[bytes, list[TensorInfo]]) -> Checkpoint:
    names = [f"{n}.safetensors" for n in range(len(files))]
    sources = tuple(SourceFile(n, len(f[0]), "") for n, f in zip(names, files, strict=True))
    headers = tuple(Header(tuple(f[1]), {}, 0) for f in files)
    return Checkpoint(path, sources, headers, None, False, Memory({n: f[0] for n, f in zip(names, files, strict=True)}))


END = "zeros throughout, as no trained matrix is. Its download was not finished, or the disk lost it: fetch the file again and compare its sha256"


def test_matrices_of_zeros_are_named_and_counted(tmp_path: Path) -> None:
    raw = bytes(256 * 5)
    found = folder(tmp_path, (raw, [tensor(f"m{n}.weight", 256 * n) for n in range(5)]))
    assert zeros.warnings(found) == [f"0.safetensors: m0.weight, m1.weight, m2.weight and 2 more matrices: {END}"]
    assert zeros.warnings(found, 3) == [f"0.safetensors: m0.weight, m1.weight, m2.weight and more: {END}"]


@pytest.mark.parametrize("at", [0, 100, 128, 255])
def test_one_byte_anywhere_makes_a_matrix_that_was_written(at: int, tmp_path: Path) -> None:
    raw = bytearray(256)
    raw[at] = 1
    assert zeros.warnings(folder(tmp_path, (bytes(raw), [tensor("m.weight")]))) == []


def test_a_few_bytes_from_the_middle_are_enough_to_see_a_matrix_that_was_written(tmp_path: Path) -> None:
    found = folder(tmp_path, (b"\1" * 256, [tensor("m.weight")]))
    zeros.warnings(found)
    assert isinstance(found.bytes, Memory) and found.bytes.asked == {"0.safetensors": 64}


@pytest.mark.parametrize(
    ("name", "shape", "looked"),
    [
        ("m.weight", (4, 64), True), ("gate_proj", (4, 64), True), ("m.bias_proj", (4, 64), False), ("embed.weight", (4, 64), False),
        ("norm.weight", (4, 64), False), ("mtp.markov.weight", (4, 64), False), ("m.scale", (4, 64), False), ("m.weight", (256,), False),
        ("m.weight", (2, 2, 2, 32), False), ("m.weight", (0, 64), False),
    ],
)  # fmt: skip
def test_what_a_training_may_leave_at_zero_is_not_looked_at(
    name: str, shape: tuple[int, ...], looked: bool, tmp_path: Path
) -> None:
    assert bool(zeros.warnings(folder(tmp_path, (bytes(256), [tensor(name, 0, shape)])))) == looked


def test_experts_of_one_tensor_are_told_by_their_number(tmp_path: Path) -> None:
    raw = b"\1" * 128 + bytes(64) + b"\1" * 64
    found = folder(tmp_path, (raw, [tensor("w1_proj", 0, (4, 2, 32))]))
    assert zeros.warnings(found) == [f"0.safetensors: w1_proj[2]: {END}"]


def test_with_few_looks_matrices_from_all_over_are_looked_at(tmp_path: Path) -> None:
    """Ten matrices and five looks: every second one."""
    raw = b"".join(bytes(256) if n in {3, 4} else b"\1" * 256 for n in range(10))
    found = folder(tmp_path, (raw, [tensor(f"m{n}.weight", 256 * n) for n in range(10)]))
    assert zeros.warnings(found, 5) == [f"0.safetensors: m4.weight: {END}"]
    assert zeros.warnings(found, zeros.LOOKS) == [f"0.safetensors: m3.weight, m4.weight: {END}"]


@pytest.mark.parametrize("end", [".aria2", ".incomplete", ".part", ".crdownload"])
def test_a_downloaders_file_beside_a_shard_is_told(end: str, tmp_path: Path) -> None:
    (tmp_path / f"0.safetensors{end}").touch()
    (tmp_path / f"other{end}").touch()
    found = folder(tmp_path, (b"\1" * 256, [tensor("m.weight")]))
    assert zeros.warnings(found) == [
        f"0.safetensors: 0.safetensors{end} lies beside it, so its download was not finished: let the downloader finish, or fetch the file again"
    ]


STRANGE = {
    "base_model.model.layers.0.w.weight": "a LoRA adapter that was not merged", "layers.0.w.lora_A.weight": "a LoRA adapter that was not merged",
    "layers.0.w.weight_packed": "weights of compressed-tensors (NVFP4)", "layers.0.w.weight_scale_2": "NVFP4 of NVIDIA ModelOpt",
    "layers.0.w.input_scale": "static scales of activations", "layers.0.w.qweight": "weights of GPTQ or AWQ",
    "layers.0.mlp.down_proj_blocks": "MXFP4 as gpt-oss and Transformers store it", "layers.0.w.weight.absmax": "weights of bitsandbytes",
    "vision_tower.x.weight": "a vision tower in another spelling than DeepSeek's", "layers.0.engram.embed.weight": "engrams of DeepSeek-V4.1",
}  # fmt: skip


@pytest.mark.parametrize("name", STRANGE)
def test_names_of_other_formats_are_called_that_with_the_file_and_a_way_on(name: str) -> None:
    with pytest.raises(InventoryError) as caught:
        foreign.check_names(
            [tensor("a.weight"), tensor(name, file=1), tensor(name, file=1)], ("f", "g"), lambda n: False
        )
    told = str(caught.value)
    assert told.startswith(f"g: {name} (and 1 more): {STRANGE[name]}") and "; this is not supported. To go on: " in told
    foreign.check_names([tensor(name)], ("f",), lambda n: True)


@pytest.mark.parametrize(
    "name", ["layers.0.attn.wq_a.weight", "layers.0.attn.wq_a.scale", "norm.weight", "x.bias", "layers.0.hc_attn_scale"]
)
def test_names_of_ours_tell_of_no_other_format(name: str) -> None:
    foreign.check_names([tensor(name)], ("f",), lambda n: False)


def test_the_most_telling_of_several_marks_is_named() -> None:
    with pytest.raises(InventoryError, match=r"^f: b\.lora_A\.weight: a LoRA adapter"):
        foreign.check_names(
            [tensor("a.qweight"), tensor("b.lora_A.weight"), tensor("c.qweight")], ("f",), lambda n: False
        )


@pytest.mark.parametrize(
    ("q", "words"),
    [
        ({"quant_method": "gptq"}, "quantization_config.quant_method is 'gptq': GPTQ; quantization_config is not the official FP8 one"),
        ({"quant_method": "GPTQ", "format": "x\n"}, "quantization_config.quant_method is 'GPTQ', format x\\n: GPTQ;"),
        ({"quant_method": "new"}, "quantization_config.quant_method is 'new': no format that this version reads;"),
        ({"quant_method": "fp8", "quant_algo": "NVFP4"}, "quantization_config has quant_algo 'NVFP4': NVFP4 or another format of NVIDIA ModelOpt"),
        ({"moe_quant_algo": "W4A8", "quant_algo": "FP8"}, "quantization_config has quant_algo 'W4A8'"),
    ],
)  # fmt: skip
def test_other_quantization_configs_are_named(q: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        foreign.check_method(q, "c.json")
    assert str(caught.value).startswith(f"c.json: {words}")
    assert str(caught.value).endswith(
        "take the official release (such as deepseek-ai/DeepSeek-V4-Flash), or a BF16 export of this one"
    )


@pytest.mark.parametrize(
    "q",
    [
        {},
        {"quant_method": "fp8"},
        {"quant_method": "fp8", "quant_algo": "fp8"},
        {"quant_algo": "none"},
        {"quant_method": 3},
    ],
)
def test_the_official_quantization_config_is_not_taken_for_another(q: dict[str, Any]) -> None:
    foreign.check_method(q, "c.json")


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"model_type": "deepseek_v3"}, "c: model_type is 'deepseek_v3', expected one of: deepseek_v4, deepseek_v41. This is DeepSeek-V3, another model than V4; this version of ds4convert does not convert it"),
        ({"model_type": "deepseek_v41"}, "c: text_config: missing, or no table; model_type 'deepseek_v41' is DeepSeek-V4.1, whose keys (hidden_size and so on) are in it. Take the config.json of the official release"),
        ({"model_type": "x", "vision_config": {}, "text_config": {"model_type": "y", "hidden_size": 1}}, "c: text_config: the keys of the text model (hidden_size and so on) are nested in it and a vision tower (vision_config), model_type 'y'; ds4convert reads them at the top. Move the keys of text_config to the top level, or take the config.json of the official release"),
        ({"model_type": "deepseek_v41", "architectures": ["DeepseekV4ForCausalLM"], "text_config": {}}, "c: model_type is 'deepseek_v41', expected 'deepseek_v4': architectures says 'DeepseekV4ForCausalLM', which is DeepSeek-V4. Set model_type to 'deepseek_v4', or take the config.json of the official release"),
    ],
)  # fmt: skip
def test_configs_of_other_models_are_named(table: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        foreign.check_model(table, "c")
    assert str(caught.value) == words


@pytest.mark.parametrize("table", [{"model_type": "deepseek_v4"}, {"model_type": "deepseek_v4", "architectures": [3, "Other"]}, {"model_type": "x", "hidden_size": 1, "text_config": {"hidden_size": 1}}, {"model_type": 3}])  # fmt: skip
def test_configs_that_tell_of_no_other_model_pass(table: dict[str, Any]) -> None:
    foreign.check_model(table, "c")


GOOD = {"dspark_block_size": 5, "dspark_markov_rank": 8, "dspark_noise_token_id": 1, "dspark_target_layer_ids": [1, 2]}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dspark_target_layer_ids": [1, 4]}, "c: dspark_target_layer_ids names 4, but there are only 4 layers, from 0"),
        ({"dspark_target_layer_ids": [1, 1]}, "c: dspark_target_layer_ids names 1 twice, expected different numbers"),
        ({"dspark_target_layer_ids": []}, "c: dspark_target_layer_ids is [], expected a list of whole numbers from 0"),
        ({"dspark_target_layer_ids": [-1]}, "c: dspark_target_layer_ids is [-1], expected a list of whole numbers from 0"),
        ({"dspark_noise_token_id": 512}, "c: dspark_noise_token_id names 512, but there are only 512 tokens of the vocabulary, from 0"),
        ({"dspark_noise_token_id": True}, "c: dspark_noise_token_id is true, expected a whole number from 0"),
        ({"dspark_block_size": (1 << 24) + 1}, "c: dspark_block_size names 16777217, but at most 16777216 is possible"),
    ],
)  # fmt: skip
def test_values_that_no_head_can_have_are_named(changes: dict[str, Any], words: str) -> None:
    limits = {"layers": 4, "V": 512}
    heads.check_values(DSPARK, GOOD, limits, "c")
    with pytest.raises(ConfigError) as caught:
        heads.check_values(DSPARK, GOOD | changes, limits, "c")
    assert str(caught.value) == words


def test_keys_that_a_head_needs_are_named_with_what_tells_of_it() -> None:
    with pytest.raises(ConfigError) as caught:
        heads.check_present(DSPARK, {"dspark_block_size": 5}, "c")
    missing = [k for k in DSPARK.config_keys if k != "dspark_block_size"]
    assert str(caught.value).startswith(
        f"c: {', '.join(missing)}: missing; this is a {DSPARK.title} (so say dspark_block_size), which needs them"
    )
    assert "Copy the dspark_* keys from the config.json of the release" in str(caught.value)
    with pytest.raises(ConfigError, match=r"\(so say the tensors under mtp\.\*\)"):
        heads.check_present(DSPARK, {}, "c", "mtp.*")
    config = parse_config(json.dumps(tiny_config()).encode())
    found = {"mtp.0." + s for s in DSPARK.signature}
    heads.check_config_of(FAMILY, config.raw, set(list(found)[1:]), "c")
    with pytest.raises(ConfigError, match="which needs them"):
        heads.check_config_of(FAMILY, config.raw, found, "c")


INDEX = {"layers.0.w": "a", "layers.1.w": "b", "mtp.0.e_proj.weight": "c"}


def test_an_index_whose_files_are_all_here_stays_and_a_head_may_be_fetched_alone() -> None:
    assert placement.reachable(dict(INDEX), ["c", "b", "a"]) == INDEX
    assert placement.reachable(dict(INDEX), ["c"], head_alone=True) == {"mtp.0.e_proj.weight": "c"}
    assert placement.reachable(dict(INDEX), ["a", "b"], head_alone=True) == INDEX, "reading tells that c is missing"
    with pytest.raises(HeaderError) as caught:
        placement.reachable(dict(INDEX), ["c"])
    assert str(caught.value).startswith(
        "a: the file is missing (2 of the 3 in the index); the head's are here, and `ds4convert graft MLX_DIR --from` this folder"
    )
    with pytest.raises(HeaderError) as caught:
        placement.reachable(dict(INDEX), ["z"])
    assert str(caught.value) == (
        "model.safetensors.index.json: is stale: of the 3 files that it names none is here (such as a), but z is. If that holds the whole model, delete the index"
    )
    assert placement.reachable(dict(INDEX), ["z", "a"]) == INDEX == placement.reachable(dict(INDEX), [])


@pytest.mark.parametrize(
    ("names", "lacks"),
    [(["layers.0.w"], True), (["layers.0.w", "mtp.0.x"], False), (["model.mtp.0.x"], False), (["model.layers.0.ffn.switch_mlp.w"], False), ([], True)],
)  # fmt: skip
def test_an_index_of_a_source_may_lack_its_head(names: list[str], lacks: bool) -> None:
    assert placement.may_lack_a_head(dict.fromkeys(names, "f")) == lacks


def test_a_file_of_a_head_holds_nothing_else() -> None:
    head, other = tensor("mtp.0.x"), tensor("layers.0.x")
    assert [placement.is_head_alone(Header(t, {}, 0)) for t in ((head,), (head, other), (other,), ())] == [
        True,
        False,
        False,
        False,
    ]


def test_the_config_of_flash_has_every_key_of_a_dspark_head_or_none() -> None:
    assert parse_config(named_config("flash") or b"").head_hint == "classic"
