"""Values that the forward pass computes with: each refused by key and bounds; memory of layers and of a head by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ds4convert.checkpoint.config import named_config
from ds4convert.errors import ConfigError
from ds4convert.inference import arguments
from ds4convert.inference.arguments import flat_config, implementation, read_args, with_usual_table
from ds4convert.inference.deepseek_v4.config import ModelArgs, head_size_bytes
from ds4convert.inference.deepseek_v41.config import ModelArgs as ModelArgsV41
from ds4convert.planning.host_block import block_keys
from tests.support import tiny_config

V41 = json.loads(named_config("flash-v41") or b"")
DSPARK = {"dspark_block_size": 5, "dspark_markov_rank": 8, "dspark_noise_token_id": 1, "dspark_target_layer_ids": [1]}


def config(**changes: Any) -> dict[str, Any]:
    return tiny_config() | {"scoring_func": "sqrtsoftplus"} | changes


def refusal(**changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        read_args(config(**changes), "dir")
    text = str(caught.value)
    assert text.startswith("dir/config.json: ")
    return text.removeprefix("dir/config.json: ")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("vocab_size", 0, "a whole number from 1 to 16777216"), ("vocab_size", 1 << 25, "a whole number from 1 to 16777216"),
        ("vocab_size", 8.0, "a whole number from 1 to 16777216"), ("vocab_size", True, "a whole number from 1 to 16777216"),
        ("num_hash_layers", -1, "a whole number from 0 to 16777216"), ("head_dim", 65537, "a whole number from 1 to 65536"),
        ("sliding_window", 65537, "a whole number from 1 to 65536"), ("hc_sinkhorn_iters", 1001, "a whole number from 0 to 1000"),
        ("hc_mult", 257, "a whole number from 1 to 256"), ("max_position_embeddings", (1 << 40) + 1, f"a whole number from 1 to {1 << 40}"),
        ("rope_theta", 1.0, "a number above 1.0"), ("rope_theta", "1e4", "a number above 1.0"), ("rms_norm_eps", 0, "a number above 0.0"),
        ("hc_eps", -1e-6, "a number above 0.0"), ("rms_norm_eps", True, "a number above 0.0"), ("rope_theta", 1e31, "a number above 1.0"),
        ("routed_scaling_factor", None, "a number"), ("tie_word_embeddings", 0, "true or false"), ("scoring_func", 3, "a text"),
        ("compress_ratios", [0, -1], "a list of whole numbers"), ("compress_ratios", [True], "a list of whole numbers"), ("compress_ratios", 4, "a list of whole numbers"),
        ("rope_scaling", 3, "a table"), ("rope_scaling", {"factor": 0}, "factor to be a number above 0"),
        ("rope_scaling", {"beta_fast": "x", "factor": 1}, "beta_fast to be a number above 0"),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_computed_with_is_named_with_its_bounds(key: str, value: Any, words: str) -> None:
    assert refusal(**{key: value}) == f"{key}: expected {words}, found {value!r}"


@pytest.mark.parametrize("changes", [{"rope_scaling": None}, {"rope_scaling": {}}, {"hc_sinkhorn_iters": 0}, {"rms_norm_eps": 1}, {"swiglu_limit": -1}, {"unknown": object()}])  # fmt: skip
def test_values_at_the_bounds_and_keys_that_nothing_reads_are_taken(changes: dict[str, Any]) -> None:
    assert isinstance(read_args(config(**changes), "dir"), ModelArgs)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"o_groups": 3}, "o_groups 3 does not divide 4 heads of 128"), ({"qk_rope_head_dim": 7}, "qk_rope_head_dim is 7, expected an even number"),
        ({"num_experts_per_tok": 99}, "num_experts_per_tok is 99, more than the "), ({"qk_rope_head_dim": 1 << 10}, "qk_rope_head_dim: expected at most "),
        ({"num_hidden_layers": 250_000, "compress_ratios": [0] * 250_000}, "250000 layers of "), ({"scoring_func": "x"}, "scoring_func: expected sqrtsoftplus, found x"),
        ({"compress_ratios": [0]}, "compress_ratios: expected at least 4 items (one per layer), found 1"),
        ({"n_shared_experts": 2}, "n_shared_experts: expected 1, found 2"), ({"tie_word_embeddings": True}, "tie_word_embeddings: expected false, found true"),
    ],
)  # fmt: skip
def test_values_that_do_not_go_together_are_named(changes: dict[str, Any], words: str) -> None:
    assert refusal(**changes).startswith(words)


def test_missing_keys_are_all_named_and_defaults_are_not() -> None:
    table = {k: v for k, v in config().items() if k not in {"head_dim", "vocab_size", "hc_mult"}}
    with pytest.raises(ConfigError, match=r"^dir/config\.json: missing vocab_size, head_dim$"):
        read_args(table, "dir")


def test_an_unknown_model_type_is_told_as_the_first_family_expects_it() -> None:
    assert refusal(model_type="llama") == "model_type: expected deepseek_v4, found llama"
    assert refusal(model_type=3).startswith("model_type: expected a text")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dspark_block_size": 0}, "dspark_block_size: expected 1 or more, found 0"), ({"dspark_markov_rank": 0}, "dspark_markov_rank: expected 1 or more, found 0"),
        ({"dspark_noise_token_id": -1}, "dspark_noise_token_id: expected an id below "), ({"dspark_noise_token_id": 1 << 20}, "dspark_noise_token_id: expected an id below "),
        ({"dspark_target_layer_ids": []}, "dspark_target_layer_ids: expected a list of backbone layers, 0 to 3, found []"),
        ({"dspark_target_layer_ids": [4]}, "dspark_target_layer_ids: expected a list of backbone layers, 0 to 3, found [4]"),
        ({"dspark_target_layer_ids": 1}, "dspark_target_layer_ids: expected a list of backbone layers, 0 to 3, found 1"),
    ],
)  # fmt: skip
def test_keys_of_a_dspark_head_are_checked_where_there_is_one(changes: dict[str, Any], words: str) -> None:
    ModelArgs.from_dict(config(**DSPARK)).check_dspark()
    args = ModelArgs.from_dict(config(**(DSPARK | changes)))
    with pytest.raises(ValueError) as caught:
        args.check_dspark()
    assert str(caught.value).startswith(words) and str(caught.value).endswith("; take it from the source's config.json")


def test_layers_know_their_ratio_and_their_routing() -> None:
    args = read_args(config(compress_ratios=[0, 4, 128, 4, 0], num_hash_layers=1), "dir")
    assert [args.ratio(n) for n in range(7)] == [0, 4, 128, 4, 0, 0, 0] and [args.uses_hash(n) for n in (0, 1)] == [
        True,
        False,
    ]


@pytest.mark.parametrize(("layer", "context"), [(0, 1000), (1, 1003), (2, 1000)])
def test_the_state_of_a_layer_of_v4_beside_its_window(layer: int, context: int) -> None:
    """Entries in the model's dtype; the inputs of the last windows in float32, values and gates, with 16 to spare.

    architecture.md, section 6: windows of ratio 4 overlap, and have an indexer's entries beside their own.
    """
    args = read_args(config(compress_ratios=[0, 4, 128, 4, 0]), "dir")
    d, c = args.head_dim, args.index_head_dim
    wanted = {
        0: 0,
        1: context // 4 * (d + c) * 2 + (8 + 16) * 2 * 2 * (d + c) * 4,
        2: context // 128 * d * 2 + (128 + 16) * 2 * d * 4,
    }
    assert implementation(args).layer_bytes(args, layer, context, 2) == wanted[layer]


def test_the_state_of_a_layer_of_v41_beside_its_window() -> None:
    args = read_args(V41, "dir")
    assert isinstance(args, ModelArgsV41)
    of = implementation(args).layer_bytes
    for layer in range(args.num_hidden_layers):
        made, wanted = args.made_ratio(layer), 0
        if made:
            wanted += 1001 // made * (args.head_dim + args.index_head_dim) * 2
        if made == 2:
            wanted += (2 + 16) * 2 * args.head_dim * 4
        if layer in args.engram_layer_ids:
            wanted += (args.engram_max_ngram_size + 16) * 4
        assert of(args, layer, 1001, 2) == wanted, layer


def test_layers_of_v41_read_what_the_nearest_listed_layer_before_them_made() -> None:
    args = read_args(V41, "dir")
    assert isinstance(args, ModelArgsV41)
    for layer in range(args.num_hidden_layers):
        before = [n for n in args.kv_source_layer_ids if n <= layer]
        assert args.kv_source(layer) == (before[-1] if before else -1)
        assert args.made_ratio(layer) == (args.ratio(layer) if layer in args.kv_source_layer_ids else 0)
        assert args.uses_candidates(layer) == (layer > args.candidate_source_layer_id >= 0)
    head = args.of_head()
    assert (head.n_routed_experts, head.num_experts_per_tok) == (
        args.dspark_n_routed_experts or args.n_routed_experts,
        args.dspark_num_experts_per_tok or args.num_experts_per_tok,
    )


@pytest.mark.parametrize("size", [[32], "x", [0, 32], [32, 32.0], [1, 2, 3]])
def test_the_tile_of_v41_is_two_sizes(size: Any) -> None:
    args = read_args(V41 | {"quantization_config": {"weight_block_size": size}}, "dir")
    assert isinstance(args, ModelArgsV41)
    with pytest.raises(ValueError, match=r"^quantization_config\.weight_block_size: expected two sizes, found "):
        _ = args.tile
    usual = read_args({k: v for k, v in V41.items() if k != "quantization_config"}, "dir")
    assert isinstance(usual, ModelArgsV41) and usual.tile == (32, 32)


def test_nested_keys_come_to_one_table_the_models_first() -> None:
    table = {"model_type": "deepseek_v41", "a": 1, "text_config": {"a": 2, "model_type": "x"}}
    assert flat_config(table) == {"model_type": "deepseek_v41", "a": 2, "text_config": table["text_config"]}
    assert flat_config({"model_type": "deepseek_v4", "text_config": {"a": 2}}).get("a") is None
    assert flat_config({"model_type": "deepseek_v41", "text_config": 3})["text_config"] == 3


def test_a_hosts_own_table_stands_in_for_a_usual_one() -> None:
    v41 = next(f for f in arguments.families().values() if f.name == "deepseek_v41")
    key = next(iter(block_keys(v41)))
    block = {"quantized_modules": {"a": {"bits": 8, "mode": "mxfp8"}}, "engram_tables": {}}
    table = {"model_type": "deepseek_v41", key: block}
    assert with_usual_table(table)["quantization"] == {"a": {"group_size": 32, "bits": 8, "mode": "mxfp8"}}
    assert with_usual_table(table | {"quantization": {"x": 1}})["quantization"] == {"x": 1}
    assert "quantization" not in with_usual_table({"model_type": "deepseek_v41"})


def test_the_bytes_of_a_head_are_those_of_its_inventory() -> None:
    """architecture.md, section 11: the inventory of Flash's head, added up from the config by its own rows."""
    from ds4convert.checkpoint.config import parse_config
    from ds4convert.checkpoint.headers import DTYPE_BYTES
    from ds4convert.checkpoint.inventory import HEAD, expected

    raw = json.loads(named_config("flash") or b"")
    specs = [s for s in expected(parse_config(named_config("flash") or b"")).tensors() if s.part == HEAD]
    total = 0
    for spec in specs:
        size = DTYPE_BYTES[spec.dtypes[0]]
        for n in spec.shape:
            size *= n
        total += size
    assert head_size_bytes(read_args(raw, "dir")) == pytest.approx(total, rel=2e-4)
