"""Calibration: the moments are those of the model's own inputs, and rounding heeds them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ds4convert.checkpoint.source import open_source
from ds4convert.errors import InputError
from ds4convert.evaluate.calibration import facts_of, read
from ds4convert.evaluate.input_moments import collect
from ds4convert.inference.load import load_model
from tests import support_run as s

DEMO = s.ROOT / "manifests" / "demo"


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("calibration") / "mlx"
    s.run(DEMO, out)
    return out


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("It is a truth universally acknowledged, that a single man must be in want of a wife. " * 40)
    return path


@pytest.fixture(scope="module")
def calibration(native: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("file") / "demo.safetensors"
    facts = json.loads(
        s.cli("calibrate", native, text, out, "--max-tokens", "512", "--sequence", "128", "--json").stdout
    )
    assert facts["tokens"] == 512 and facts["matrices"] > 30
    return out


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "ds4convert_manifest.json").read_text())


def test_moments_of_the_first_projection_are_those_of_the_model(native: Path) -> None:
    """The input of wq_a in layer 0 is the normed, collapsed embedding: computed here from the model's own modules."""
    prompt = list(range(5, 69))
    found = collect(native, [prompt])["model.layers.0.attn.wq_a"]
    model, _ = load_model(native, dtype="float32", dense=True)
    block = model.layers[0]
    embedded = model.model.embed_tokens(mx.array([prompt]))
    streams = mx.repeat(embedded[:, :, None], model.args.hc_mult, axis=2)
    x, _, _ = block.attn_hc(streams)
    wanted = np.square(np.asarray(block.attn_norm(x).astype(mx.float32), np.float64)).sum(axis=(0, 1))
    assert int(found.rows) == len(prompt)
    assert np.allclose(found.squares, wanted, rtol=1e-3)


def test_experts_are_counted_by_the_rows_that_were_routed_to_them(native: Path) -> None:
    prompt = list(range(5, 69))
    found = collect(native, [prompt])
    config = json.loads((native / "config.json").read_text())
    for layer in range(config["num_hidden_layers"]):
        gate, down = (found[f"model.layers.{layer}.ffn.switch_mlp.{m}"] for m in ("gate_proj", "down_proj"))
        assert gate.rows.sum() == len(prompt) * config["num_experts_per_tok"]
        assert (gate.rows == down.rows).all() and gate.squares.shape[1] == config["hidden_size"]
        assert (gate.squares[gate.rows == 0] == 0).all()
    assert found["mtp.0.e_proj"].rows == len(prompt) - 1
    assert found["lm_head"].rows == len(prompt)


def test_rounding_heeds_the_file_and_the_manifest_names_it(calibration: Path, tmp_path: Path) -> None:
    plain, weighed = tmp_path / "plain", tmp_path / "weighed"
    s.cli("quantize", DEMO, plain, "--backbone", "affine-3-g64")
    s.cli("quantize", DEMO, weighed, "--backbone", "affine-3-g64", "--calibration", calibration)
    assert s.failed_checks(weighed, "--source", DEMO) == []
    ours = {r["name"]: r for r in manifest(weighed)["tensors"]}
    params = [r["params"] for r in ours.values() if r.get("transform", "").startswith("quantize")]
    assert sum("calibration" in p for p in params) > 20
    moments = load_file(calibration)
    key = "model.layers.0.ffn.shared_experts.gate_proj"
    cost = {}
    for name, folder in (("plain", plain), ("weighed", weighed)):
        arrays: dict[str, mx.array] = {}
        for path in folder.glob("*.safetensors"):
            arrays |= mx.load(str(path))
        parts = [arrays[f"{key}.{k}"] for k in ("weight", "scales", "biases")]
        value = np.array(mx.dequantize(*[p.astype(mx.float32) if p.dtype == mx.bfloat16 else p for p in parts],
                                       group_size=64, bits=3, dtype=mx.float32))  # fmt: skip
        truth = s.expected_values(DEMO)[key + ".weight"]
        cost[name] = float(((value - truth) ** 2 * moments[key]).sum())
    assert cost["weighed"] < cost["plain"]
    assert manifest(plain)["plan"] != manifest(weighed)["plan"]


def test_the_same_text_gives_the_same_file(native: Path, text: Path, calibration: Path, tmp_path: Path) -> None:
    s.cli("calibrate", native, text, tmp_path / "again", "--max-tokens", "512", "--sequence", "128")
    assert (tmp_path / "again").read_bytes() == calibration.read_bytes()


def test_the_official_checkpoint_may_be_calibrated_itself(text: Path, calibration: Path, tmp_path: Path) -> None:
    s.cli("calibrate", DEMO, text, tmp_path / "source", "--max-tokens", "512", "--sequence", "128")
    ours, theirs = load_file(tmp_path / "source"), load_file(calibration)
    assert set(ours) == set(theirs)
    key = "model.layers.0.attn.wq_a"
    assert np.allclose(ours[key], theirs[key], rtol=1e-3)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", ["other model", "no calibration", "not safetensors", "wrong shape", "negative"])
def test_a_file_that_does_not_fit_is_refused_with_the_fix(kind: str, calibration: Path, tmp_path: Path) -> None:
    path, source = tmp_path / "bad.safetensors", DEMO
    tensors = load_file(calibration)
    metadata = json_metadata(calibration)
    if kind == "other model":
        path, source = calibration, s.tiny(tmp_path / "tiny")
    elif kind == "not safetensors":
        path.write_bytes(b"hello, world, this is text")
    elif kind == "no calibration":
        save_file(tensors, path)
    else:
        key = "model.layers.0.attn.wq_a"
        tensors[key] = tensors[key][:-1].copy() if kind == "wrong shape" else -tensors[key]
        save_file(tensors, path, metadata)
    told = s.cli("plan", source, "--backbone", "affine-4-g64", "--calibration", path, exit_code=3).stderr
    assert "calibrate" in told or "make the file again" in told


def json_metadata(path: Path) -> dict[str, str]:
    with path.open("rb") as f:
        return json.loads(f.read(int.from_bytes(f.read(8), "little")))["__metadata__"]


def test_a_calibration_is_of_no_use_for_plain_rounding(calibration: Path) -> None:
    words = ["--backbone", "affine-4-g64", "--rounding", "nearest", "--calibration", calibration]
    assert "optimal" in s.cli("plan", DEMO, *words, exit_code=2).stderr


def test_too_little_text_is_refused(native: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    told = s.cli("calibrate", native, tmp_path / "empty.txt", tmp_path / "out", exit_code=3).stderr
    assert "expected at least 2" in told and not (tmp_path / "out").exists()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("folder", [DEMO, *s.CHECKPOINTS], ids=lambda p: p.parent.name)
def test_every_matrix_that_a_recipe_can_round_is_observed(folder: Path) -> None:
    """All but the embedding, whose rows are looked up: no values go into it."""
    from ds4convert.checkpoint.inventory import key_of
    from ds4convert.converted.open import inventory_of

    inventory = inventory_of(folder)
    wanted = {key_of(m): m for m in inventory.modules if m.may_quantize and m.role != "embedding"}
    found = collect(folder, [[n % 250 + 2 for n in range(140)]])
    assert any(key.endswith(".wo_a") for key in wanted)
    assert wanted.keys() - found.keys() == set()
    for key, module in wanted.items():
        assert found[key].squares.shape[-1] == module.shape[1], key


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": "many"}, 'metadata ds4convert: tokens: expected an integer >= 0, found "many"'),
        ({"model": 3}, "metadata ds4convert: model: expected a text, found 3"),
    ],
)
def test_a_wrong_field_of_what_a_file_tells_is_named(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    inventory = open_source(DEMO).inventory
    told = {"kind": "calibration", "model": facts_of(inventory), "tokens": 5} | change
    path = tmp_path / "c.safetensors"
    save_file({}, path, {"ds4convert": json.dumps(told)})
    with pytest.raises(InputError) as e:
        read(path, inventory)
    assert f"{path}: {words}; make the file again" in str(e.value)
