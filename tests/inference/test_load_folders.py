"""Folders in every layout load to the same numbers; broken ones are refused by name before anything is
computed.
"""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest

from ds4convert.errors import ConfigError, InputError, InventoryError
from ds4convert.inference.deepseek_v4.config import ModelArgs, head_size_bytes
from ds4convert.inference.deepseek_v4.model import Model
from ds4convert.inference.deepseek_v4.weights import canonical_name
from ds4convert.inference.load import cache_size_bytes, free_memory_bytes, load_model, memory_estimate
from tests.inference.folders import edit_config, write
from tests.inference.golden_data import GOLDEN, LOGIT_TOLERANCE, NAMES, config, golden, max_diff, tensors

NAME = NAMES[0]


def check_golden(model: Model, name: str = NAME) -> None:
    g = golden(name)
    logits, hidden = model(g["p1.input_ids"][None], return_hidden=True)
    assert max_diff(logits[0], g["p1.logits"]) <= LOGIT_TOLERANCE
    head = model.mtp_forward(hidden, g["p1.mtp_input_ids"][None], model.make_mtp_cache())
    assert max_diff(head[0], g["p1.mtp_logits"]) <= LOGIT_TOLERANCE


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_official_folder_loads_exactly(name: str, dense: bool) -> None:
    model, _ = load_model(GOLDEN / name / "checkpoint", dtype="float32", dense=dense, require_manifest=False)
    check_golden(model, name)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("layout", ["inline", "mtplx", "block", "drafter"])
def test_converted_folder_of_each_layout_loads_exactly(tmp_path: Path, layout: str) -> None:
    model, settings = load_model(write(tmp_path / "out", NAME, layout), dtype="float32")
    assert model.head.kind == "classic"
    assert settings["model_type"] == "deepseek_v4"
    check_golden(model)


def test_a_head_from_elsewhere_is_taken_only_where_it_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "out", NAME, "drafter")
    (folder / "mtp").rename(tmp_path / "out-mtp")
    edit_config(folder, num_nextn_predict_layers=0)
    assert load_model(folder)[0].head.kind == "none", "a folder beside it is somebody else's head"
    check_golden(load_model(folder, dtype="float32", drafter=tmp_path / "out-mtp")[0])
    with pytest.raises(InputError, match=r"nowhere: no config\.json"):
        load_model(folder, drafter=tmp_path / "nowhere")
    with pytest.raises(InputError, match="without a head"):
        load_model(folder, drafter=folder)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("layout", ["inline", "mtplx", "block", "official"])
def test_the_head_of_a_whole_model_can_be_named_too(tmp_path: Path, layout: str) -> None:
    """Also over a head of the folder's own, which is damaged here."""
    folder = write(tmp_path / "out", NAME)
    other = GOLDEN / NAME / "checkpoint" if layout == "official" else write(tmp_path / "other", NAME, layout)
    path = folder / "model-mtp.safetensors"
    zeros = {name: mx.zeros_like(x) for name, x in dict(mx.load(str(path))).items()}
    mx.save_safetensors(str(path), zeros)
    check_golden(load_model(folder, dtype="float32", drafter=other)[0])


def test_a_drafter_folder_that_is_a_link_out_of_the_model_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "out", NAME, "drafter")
    (folder / "mtp").rename(tmp_path / "elsewhere")
    (folder / "mtp").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="leads out of the folder"):
        load_model(folder)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "recipe",
    [
        {"group_size": 64, "bits": 8, "mode": "affine"},
        {"group_size": 32, "bits": 4, "mode": "affine"},
        {"group_size": 16, "bits": 4, "mode": "nvfp4"},
        {"group_size": 32, "bits": 8, "mode": "mxfp8"},
        {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    ],
    ids=lambda recipe: f"{recipe['mode']}-{recipe['bits']}",
)
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.nightly)])
def test_every_quantization_runs_and_equals_its_dense_values(tmp_path: Path, recipe: dict, dtype: str) -> None:
    """Everything quantized, embedding and output matrix included; packed products equal dense ones."""
    folder = write(tmp_path / "out", NAME, recipe=recipe)
    ids = golden(NAME)["p1.input_ids"][None, :40]
    packed, dense = (load_model(folder, dtype=dtype, dense=dense)[0] for dense in (False, True))
    results = []
    for model in (packed, dense):
        logits, hidden = model(ids, return_hidden=True)
        results.append((logits, model.mtp_forward(hidden, ids, model.make_mtp_cache())))
    for a, b in zip(*results, strict=True):
        if dtype == "float32":
            assert max_diff(a, b) < 1e-3
        else:
            assert mx.median(mx.abs(a - b)).item() < 0.1
    assert packed.compute_dtype == dense.compute_dtype == (mx.float32 if dtype == "float32" else mx.bfloat16)


def test_float32_parameters_and_ids_keep_their_types() -> None:
    model, _ = load_model(GOLDEN / NAME / "checkpoint", require_manifest=False)
    block, head = model.layers[1], model.mtp[0]
    for value in (
        block.attn.attn_sink,
        block.attn.compressor.ape,
        block.attn.indexer.compressor.ape,
        block.attn_hc.fn,
        block.ffn_hc.base,
        model.model.hc_head.scale,
        head.hc_head.fn,
        head.ffn.gate.e_score_correction_bias,
    ):
        assert value.dtype == mx.float32
    assert block.ffn.gate.tid2eid.dtype == mx.int32
    assert block.attn.q_norm.weight.dtype == mx.bfloat16


def test_stripped_head_is_no_error_and_says_how_much_is_gone(tmp_path: Path) -> None:
    model, _ = load_model(write(tmp_path / "out", NAME, "none"))
    assert model.head.kind == "none" and "stripped" in model.head.reason and "MB" in model.head.reason
    assert model.make_mtp_cache() == [] and "mtp" not in model
    assert model(mx.array([[1, 2]])).shape == (1, 2, 384)


def test_head_that_the_config_denies_is_not_used(tmp_path: Path) -> None:
    folder = write(tmp_path / "out", NAME)
    edit_config(folder, num_nextn_predict_layers=0)
    model, _ = load_model(folder)
    assert not model.head.present and "num_nextn_predict_layers 0" in model.head.reason


def test_model_that_never_had_a_head_says_so(tmp_path: Path) -> None:
    folder = write(tmp_path / "out", NAME, "none")
    edit_config(folder, num_nextn_predict_layers=0)
    assert "never had one" in load_model(folder)[0].head.reason


def test_flash_head_is_about_3_6_gigabytes() -> None:
    flash = json.loads((Path(__file__).parents[2] / "manifests" / "configs" / "flash.json").read_text())
    assert head_size_bytes(ModelArgs.from_dict(flash)) / 1e9 == pytest.approx(3.6, abs=0.05)


def test_dspark_tensors_without_the_keys_of_such_a_head_are_refused_by_the_key(tmp_path: Path) -> None:
    weights = tensors(NAME)
    weights["mtp.0.main_proj.weight"] = mx.zeros((256, 768))
    weights["mtp.2.markov_head.markov_w1.weight"] = mx.zeros((384, 8))
    with pytest.raises(ValueError, match="dspark_block_size: expected 1 or more, found 0"):
        Model(ModelArgs.from_dict(config(NAME))).sanitize(weights)


def test_second_classic_stage_is_refused() -> None:
    weights = tensors(NAME) | {"mtp.1.enorm.weight": mx.zeros((256,))}
    with pytest.raises(ValueError, match=r"mtp\.1"):
        Model(ModelArgs.from_dict(config(NAME))).sanitize(weights)


def test_copies_of_the_backbone_below_the_head_are_ignored() -> None:
    weights = tensors(NAME)
    weights |= {"mtp.0.emb.tok_emb.weight": mx.zeros((2, 2)), "mtp.0.head.weight": mx.zeros((2, 2))}
    model = Model(ModelArgs.from_dict(config(NAME)))
    model.load_weights(list(model.sanitize(weights).items()), strict=True)


@pytest.mark.parametrize(
    ("stored", "ours"),
    [
        ("embed.weight", "model.embed_tokens.weight"),
        ("model.embed_tokens.scales", "model.embed_tokens.scales"),
        ("language_model.model.norm.weight", "model.norm.weight"),
        ("head.weight", "lm_head.weight"),
        ("hc_head_fn", "model.hc_head.fn"),
        ("model.hc_head.scale", "model.hc_head.scale"),
        ("layers.3.hc_attn_fn", "model.layers.3.attn_hc.fn"),
        ("model.layers.3.ffn.gate.bias", "model.layers.3.ffn.gate.e_score_correction_bias"),
        ("model.layers.3.self_attn.wq_a.weight_scale_inv", "model.layers.3.attn.wq_a.scale"),
        ("layers.3.mlp.shared_experts.w2.weight", "model.layers.3.ffn.shared_experts.down_proj.weight"),
        ("layers.3.ffn.experts.7.w1.scale", "model.layers.3.ffn.experts.7.gate_proj.scale"),
        ("mtp.0.block.attn.wq_a.weight", "mtp.0.attn.wq_a.weight"),
        ("mtp.0.decoder.attn_hc.fn", "mtp.0.attn_hc.fn"),
        ("mtp.0.hc_head_base", "mtp.0.hc_head.base"),
        ("mtp.0.e_proj.scale", "mtp.0.e_proj.scale"),
        ("vision.patch.weight", "vision.patch.weight"),
    ],
)
def test_known_spellings_mean_our_names(stored: str, ours: str) -> None:
    assert canonical_name(stored) == ours
    assert canonical_name(ours) == ours


def test_stacked_official_experts_and_three_dimensional_output_matrix_are_taken() -> None:
    weights, args = tensors(NAME), ModelArgs.from_dict(config(NAME))
    for prefix in [f"layers.{n}" for n in range(4)] + ["mtp.0"]:
        for leaf in ("w1.weight", "w1.scale", "w2.weight", "w2.scale", "w3.weight", "w3.scale"):
            parts = [weights.pop(f"{prefix}.ffn.experts.{e}.{leaf}") for e in range(args.n_routed_experts)]
            weights[f"{prefix}.ffn.experts.{leaf}"] = mx.stack(parts)
    model = Model(args)
    loaded = model.sanitize(weights)
    name = "model.layers.0.attn.wo_a.weight"
    loaded[name] = loaded[name].reshape(args.o_groups, -1, loaded[name].shape[-1])
    again = Model(args)
    again.sanitize(dict(weights))
    again.load_weights(list(again.sanitize(loaded).items()), strict=True)
    again.set_compute_dtype(mx.float32)
    check_golden(again)


def test_partial_fp8_tile_becomes_exact_bfloat16() -> None:
    from ds4convert.inference.deepseek_v4.weights import sanitize

    codes = mx.random.randint(0, 120, (130, 256)).astype(mx.uint8)
    scale = mx.array([[120, 127], [130, 125]], dtype=mx.uint8)
    args = ModelArgs.from_dict(config(NAME) | {"num_nextn_predict_layers": 0})
    loaded = sanitize({"layers.0.attn.wkv.weight": codes, "layers.0.attn.wkv.scale": scale}, args)
    dense = loaded.weights["model.layers.0.attn.wkv.weight"]
    factors = mx.repeat(mx.repeat(mx.power(2.0, scale.astype(mx.float32) - 127), 128, 0), 128, 1)[:130]
    assert loaded.repacked == {} and dense.dtype == mx.bfloat16
    assert max_diff(dense, mx.from_fp8(codes, mx.float32) * factors) == 0


def test_scale_grid_that_fits_no_format_is_refused_by_name() -> None:
    weights = tensors(NAME)
    weights["layers.0.attn.wkv.scale"] = weights["layers.0.attn.wkv.scale"][:, :1]
    with pytest.raises(ValueError, match=r"model\.layers\.0\.attn\.wkv\.scale: expected"):
        Model(ModelArgs.from_dict(config(NAME))).sanitize(weights)


def break_shard(folder: Path, change) -> None:
    path = folder / "model-00001-of-00001.safetensors"
    weights = dict(mx.load(str(path)))
    mx.eval(weights)
    change(weights)
    mx.save_safetensors(str(path), weights)


def test_missing_and_misshapen_and_extra_tensors_are_all_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "out", NAME)

    def change(weights: dict[str, mx.array]) -> None:
        del weights["model.layers.2.ffn.gate.weight"]
        weights["model.norm.weight"] = mx.zeros((5,), dtype=mx.bfloat16)
        weights["model.layers.9.attn_norm.weight"] = mx.zeros((5,))
        weights["model.layers.0.ffn.gate.tid2eid"] = mx.zeros((384, 2))

    break_shard(folder, change)
    with pytest.raises(InventoryError) as caught:
        load_model(folder)
    message = str(caught.value)
    assert caught.value.exit_code == 3 and "3 tensors do not fit" in message
    assert "model.layers.2.ffn.gate.weight: missing, expected" in message
    assert "model.norm.weight: expected float32 [256], found bfloat16 [5]" in message
    assert "model.layers.9.attn_norm.weight: not part of the model" in message


def test_head_with_one_tensor_missing_is_an_error_not_a_stripped_head(tmp_path: Path) -> None:
    folder = write(tmp_path / "out", NAME)
    path = folder / "model-mtp.safetensors"
    weights = dict(mx.load(str(path)))
    mx.eval(weights)
    del weights["mtp.0.enorm.weight"]
    mx.save_safetensors(str(path), weights)
    with pytest.raises(InventoryError, match=r"mtp\.0\.enorm\.weight: missing"):
        load_model(folder)


def test_many_problems_are_counted_after_ten(tmp_path: Path) -> None:
    folder = write(tmp_path / "out", NAME)
    break_shard(folder, lambda weights: [weights.pop(name) for name in sorted(weights)[:25]])
    with pytest.raises(InventoryError, match=r"20 tensors do not fit(.|\n)*and 10 more"):
        load_model(folder)


def test_folder_without_manifest_is_refused_unless_allowed(tmp_path: Path) -> None:
    folder = write(tmp_path / "out", NAME, manifest=False)
    with pytest.raises(InputError, match="no ds4convert_manifest"):
        load_model(folder)
    load_model(folder, require_manifest=False)


def test_packed_weights_without_a_table_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "out", NAME)
    edit_config(folder, quantization=None, quantization_config=None)
    with pytest.raises(ConfigError, match=r"no `quantization` table.*\.scales"):
        load_model(folder)


def test_table_that_does_not_fit_the_stored_codes_is_refused_by_name(tmp_path: Path) -> None:
    folder = write(tmp_path / "out", NAME)
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization"]["model.layers.0.attn.wq_a"] = {"group_size": 64, "bits": 4, "mode": "affine"}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(InventoryError, match=r"model\.layers\.0\.attn\.wq_a\.biases: missing"):
        load_model(folder)
    settings["quantization"]["model.layers.0.attn.wq_a"] = False
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=r"says nothing of model\.layers\.0\.attn\.wq_a"):
        load_model(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "not found"),
        ("{", "not valid JSON"),
        ('{"a": 1, "a": 2}', "occurs twice"),
        ("[" * 200000, "nested too deeply"),
        ("[1]", "expected a JSON object"),
        ('{"model_type": "deepseek_v4"}', "missing vocab_size, hidden_size"),
    ],
)
def test_bad_config_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    folder = write(tmp_path / "out", NAME)
    (folder / "config.json").unlink()
    if text is not None:
        (folder / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_model(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "llama"),
        ("compress_ratios", [0]),
        ("n_shared_experts", 2),
        ("scoring_func", "softmax"),
        ("tie_word_embeddings", True),
    ],
)
def test_config_that_the_forward_pass_does_not_compute_is_refused_by_key(
    tmp_path: Path, key: str, value: object
) -> None:
    folder = write(tmp_path / "out", NAME)
    edit_config(folder, **{key: value})
    with pytest.raises(ConfigError, match=key):
        load_model(folder)


def test_broken_files_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "out", NAME)
    (folder / "model-mtp.safetensors").write_bytes(b"junk")
    with pytest.raises(InputError, match=r"model-mtp\.safetensors: 4 bytes is too short"):
        load_model(folder)
    (folder / "model-mtp.safetensors").unlink()
    assert "stripped" in load_model(folder)[0].head.reason
    (folder / "model-00001-of-00001.safetensors").rename(folder / "model-1.safetensors")
    with pytest.raises(InputError, match="named by the index, but not found"):
        load_model(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}')
    with pytest.raises(InputError, match="in the same folder"):
        load_model(folder)
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(InputError, match="no weight_map"):
        load_model(folder)


def test_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "out", NAME)
    mx.save_safetensors(str(folder / "model-extra.safetensors"), {"model.norm.weight": mx.zeros((256,))})
    with pytest.raises(InputError, match=r"model\.norm\.weight is also in another file"):
        load_model(folder)


def test_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config(NAME)))
    with pytest.raises(InputError, match="no safetensors"):
        load_model(tmp_path, require_manifest=False)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_estimate_covers_what_is_held(tmp_path: Path, dtype: str) -> None:
    folder = write(tmp_path / "out", NAME)
    estimate = memory_estimate(folder, 500, dtype)
    model, _ = load_model(folder, dtype=dtype)
    from mlx.utils import tree_flatten

    held = sum(value.nbytes for _, value in tree_flatten(model.parameters()))
    assert estimate.weight_bytes == pytest.approx(held, rel=0.02)
    cache = model.make_cache()
    mx.eval(model(golden(NAME)["p2.input_ids"][None], cache=cache))
    used = sum(layer.nbytes for layer in cache)
    assert used / 4 < estimate.cache_bytes < used * 2
    assert estimate.total_bytes > estimate.weight_bytes + estimate.cache_bytes
    assert cache_size_bytes(model.args, 10**6, 2) > 50 * estimate.cache_bytes
    free = free_memory_bytes()
    assert free is None or free > 0
