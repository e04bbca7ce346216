"""config.json: every refusal names the key, what was expected and what was found."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds4convert.checkpoint.config import named_config, parse_config
from ds4convert.checkpoint.family import evaluate, families
from ds4convert.errors import ConfigError
from tests.support import mini_config, tiny_config


def refusal(raw: bytes) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(raw)
    text = str(caught.value)
    assert text.startswith("config.json: ") and "\n" not in text and text.isprintable() and len(text) < 500, text
    return text


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "is empty; download it again"),
        (b"[]", "expected a JSON object"),
        (b"null", "expected a JSON object"),
        (b"{}", "has no model_type"),
        (b'{"model_type": "deepseek_v4", "model_type": "deepseek_v4"}', "occurs twice"),
        (b"\xff", "not valid UTF-8"),
        (b'{"a": ' + b"[" * 5000, "nested too deeply"),
        (b" " * 16_000_001, "16000001 bytes, expected at most 16000000"),
    ],
)
def test_a_config_that_is_no_json_object_is_refused(raw: bytes, message: str) -> None:
    assert message in refusal(raw)


@pytest.mark.parametrize(
    "value", ["deepseek_v3", "DEEPSEEK_V4", "", None, 4, ["deepseek_v4"], {"a": 1}, "deepseek_v4\n"]
)
def test_a_wrong_model_type_is_refused_naming_the_known_ones(value: Any) -> None:
    text = refusal(json.dumps(tiny_config() | {"model_type": value}).encode())
    assert "model_type is" in text and "expected one of: deepseek_v4" in text


DSPARK = {
    "dspark_target_layer_ids": [1], "dspark_markov_rank": 8, "dspark_block_size": 5, "dspark_noise_token_id": 1,
}  # fmt: skip
NUMBERS = sorted(
    set(families()["deepseek_v4"].dims.values()) | {"num_hidden_layers", "num_hash_layers", "num_nextn_predict_layers"}
)


@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize("value", [-1, 1.0, True, "4", [4], {}, 1 << 25, 10**30])
def test_a_size_that_is_no_sensible_whole_number_is_refused_by_key(key: str, value: Any) -> None:
    text = refusal(json.dumps(tiny_config() | {key: value}).encode())
    said = repr(value) if isinstance(value, str) else json.dumps(value)  # as it stands in the file
    assert f"{key} must be a whole number from " in text and f"found {said}" in text


@pytest.mark.parametrize("key", sorted(set(NUMBERS) - {"num_hash_layers", "num_nextn_predict_layers"}))
def test_a_missing_size_is_refused_by_key(key: str) -> None:
    null = refusal(json.dumps(tiny_config() | {key: None}).encode())
    assert f"{key} must be a whole number from 1 to 16777216, found null" in null
    missing = refusal(json.dumps(tiny_config(**{key: None})).encode())
    assert f"{key} must be a whole number from 1 to 16777216, found nothing" in missing
    assert "models of model_type 'deepseek_v4' have it" in missing, "the model_type may be what is wrong"
    assert f"{key} must be a whole number from 1" in refusal(json.dumps(tiny_config() | {key: 0}).encode())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compress_ratios": [0, 4, 128, 4]}, "compress_ratios has 4 items, expected 5 (4 layers and 1 head stages)"),
        ({"compress_ratios": [0, 4, 128, 4, 0, 0]}, "compress_ratios has 6 items, expected 5"),
        ({"compress_ratios": []}, "compress_ratios has 0 items, expected 5"),
        ({"compress_ratios": [0, 4, 128, 5, 0]}, "compress_ratios[3] is 5, expected one of [0, 4, 128]"),
        ({"compress_ratios": [0, 4, 128, 4, -1]}, "compress_ratios must be a list of whole numbers"),
        ({"compress_ratios": [0, 4, 128, 4, True]}, "compress_ratios must be a list of whole numbers"),
        ({"compress_ratios": "04"}, "compress_ratios must be a list of whole numbers, found '04'"),
        ({"compress_ratios": {}}, "compress_ratios must be a list of whole numbers"),
        ({"num_hidden_layers": 5}, "compress_ratios has 5 items, expected 6 (5 layers and 1 head stages)"),
        ({"num_hash_layers": 5}, "num_hash_layers is 5, more than the 4 layers"),
        ({"n_shared_experts": 2}, "n_shared_experts is 2, expected 1"),
        ({"num_key_value_heads": 4}, "num_key_value_heads is 4, expected 1"),
        ({"num_key_value_heads": []}, "num_key_value_heads is [], expected 1"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is true, expected false for DeepSeek-V4"),
        ({"o_groups": 3}, "o_groups 3 does not divide 4 heads of 128"),
        ({"expert_dtype": "int8"}, "expert_dtype is 'int8', expected fp4, fp8, bf16 or nothing"),
        ({"expert_dtype": []}, "expert_dtype is [], expected fp4"),
        ({"expert_dtype": {}}, "expert_dtype is {}, expected fp4"),
        ({"expert_dtype": 4}, "expert_dtype is 4, expected fp4"),
        ({"quantization_config": []}, "quantization_config is not the official FP8 one"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is not the official FP8 one"),
        ({"quantization_config": {"quant_method": "fp8", "fmt": "e5m2"}}, "fmt/scale_fmt other than e4m3/ue8m0"),
        ({"quantization_config": {"quant_method": "fp8", "scale_fmt": "f32"}}, "fmt/scale_fmt other than e4m3/ue8m0"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128]}}, "weight_block_size is [128]"),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [0, 128]}},
            "weight_block_size is [0, 128]",
        ),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 1.5]}}, "weight_block_size is"),
        (DSPARK | {"dspark_markov_rank": "x"}, "dspark_markov_rank must be a whole number"),
        (DSPARK | {"dspark_target_layer_ids": 3}, "dspark_target_layer_ids must be a list"),
    ],
)
def test_a_contradiction_is_refused_by_key(changes: dict[str, Any], message: str) -> None:
    assert message in refusal(json.dumps(tiny_config() | changes).encode())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compress_ratios": None}, "compress_ratios must be a list of whole numbers, found null"),
        ({"compress_ratios": {"a": None}}, 'compress_ratios must be a list of whole numbers, found {"a": null}'),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is true, expected false"),
        ({"model_type": None}, "model_type is null, expected one of"),
        ({"model_type": "\x1b[2J"}, "model_type is '\\x1b[2J'"),
        ({"quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": False}}, "'e4m3' and false"),
    ],
)
def test_messages_say_values_as_they_stand_in_the_file(changes: dict[str, Any], message: str) -> None:
    text = refusal(json.dumps(tiny_config() | changes).encode())
    assert message in text
    assert not re.search(r"\b(None|True|False)\b", text)


@pytest.mark.parametrize("key", ["num_hash_layers", "num_nextn_predict_layers"])
def test_a_null_count_is_none_at_all(key: str) -> None:
    null, absent = (
        parse_config(json.dumps(table).encode()) for table in (tiny_config() | {key: None}, tiny_config(**{key: None}))
    )
    assert null == absent


def test_an_mlx_quantization_table_in_the_source_config_is_refused_with_the_reason() -> None:
    table = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    assert "An MLX folder is read as a result" in refusal(json.dumps(tiny_config(quantization_config=table)).encode())


def test_a_checkpoint_whose_head_was_taken_out_may_keep_the_ratio_of_the_head() -> None:
    for ratios in ([0, 4, 128, 4], [0, 4, 128, 4, 0]):
        config = parse_config(json.dumps(tiny_config(num_nextn_predict_layers=0, compress_ratios=ratios)).encode())
        assert config.layers == 4 and config.stages == 0 and config.head_hint == "none"


@pytest.mark.parametrize("name", ["flash", "pro", "tiny"])
def test_the_shipped_configs_are_accepted(name: str) -> None:
    config = parse_config(named_config(name) or b"")
    assert config.family.name == "deepseek_v4" and config.head_hint == "classic" and config.stages == 1


@pytest.mark.parametrize("name", ["", "../configs/tiny", "Tiny.json", "nothing", "__init__", "a/b"])
def test_named_config_gives_nothing_for_other_names(name: str) -> None:
    assert named_config(name) is None


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from(sorted(mini_config())), JUNK, min_size=1, max_size=3))
@settings(max_examples=300)
def test_junk_in_any_key_gives_a_config_or_a_config_error(changes: dict[str, Any]) -> None:
    raw = json.dumps(mini_config() | changes, ensure_ascii=True).encode()
    try:
        parse_config(raw)
    except ConfigError as e:
        assert str(e).startswith("config.json: ") and len(str(e)) < 1000


@pytest.mark.parametrize("expression", ["-D", "D**2", "D/2", "X", "f(D)", "D if D else 1", "'a'", "1.5", "D.x", "D[0]"])
def test_a_shape_expression_knows_only_dims_and_four_operations(expression: str) -> None:
    with pytest.raises(ConfigError, match="not a declared dim"):
        evaluate(expression, {"D": 4})


def test_shape_expressions_are_whole_number_arithmetic() -> None:
    assert evaluate("(2+M)*M", {"M": 4}) == 24
    assert evaluate("H*d//G", {"H": 6, "d": 5, "G": 4}) == 7
    assert evaluate("(n-1)*D", {"n": 4, "D": 8}) == 24
