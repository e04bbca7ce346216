"""Folders of DeepSeek-V4.1: engram tables that stay on disk, configs that are refused, and the commands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from ds4convert.checkpoint.config import named_config
from ds4convert.errors import ConfigError, InputError, InventoryError
from ds4convert.inference.arguments import read_args
from ds4convert.inference.deepseek_v41.table import MXFP8, MappedLeaf, Table
from ds4convert.inference.load import cache_size_bytes, load_model, memory_estimate
from ds4convert.inference.tensor_files import Stored, stored_tensors
from tests.inference.golden_v41 import FOLDER, SOURCE, config, golden, ids, model
from tests.support import assert_refused, edit_json, run

CODES = {"weight": ("F8_E4M3", 64), "scales": ("F8_E8M0", 2)}


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("v41") / "out"
    assert run("quantize", SOURCE, out, "-q").code == 0
    return out


def resident() -> int:
    """Bytes of this process that are in memory and its own: mapped pages that were read are counted too."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the memory of a process is read from /proc")
def test_a_table_larger_than_the_memory_is_read_by_rows(tmp_path: Path) -> None:
    """60 GB that take no room on the disk: a file with a hole, and rows written at its end."""
    count, path = 900_000_000, tmp_path / "table.bin"
    rows = np.array([count - 1, 5, count - 1])
    at, leaves = 3, {}
    with path.open("wb") as file:
        for name, (dtype, width) in CODES.items():
            leaves[name] = Stored(name, path, dtype, (count, width), at, count * width)
            file.seek(at + (count - 1) * width)
            file.write(bytes([0x38 if name == "weight" else 127] * width))
            at += count * width
    before = resident()
    table = Table({name: MappedLeaf(stored) for name, stored in leaves.items()}, MXFP8, (count, 64))
    found = table.rows(rows, mx.float32)
    mx.eval(found)
    assert found[:, 0].tolist() == [1.0, 0.0, 1.0] and found.shape == (3, 64)
    assert resident() - before < 100_000_000


def test_rows_that_nobody_asks_for_are_not_looked_at(converted: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(converted, tmp_path / "out"))
    text = ids("p0")
    rows: dict[int, set[int]] = {}

    def trace(kind: str, layer: int, value: mx.array) -> None:
        if kind == "engram":
            rows[layer] = set(value.flatten().tolist())  # type: ignore[arg-type]

    expected = model()(mx.array([text]), trace=trace)
    for name, stored in stored_tensors(folder).items():
        if name.endswith("engram.embed.weight"):
            used = rows[int(name.split(".")[2])]
            with stored.path.open("r+b") as file:
                for row in set(range(stored.shape[0])) - used:
                    file.seek(stored.start + row * stored.size_bytes // stored.shape[0])
                    file.write(b"\x7f" * (stored.size_bytes // stored.shape[0]))  # NaN, all of them
    found, _ = load_model(folder, dtype="float32", dense=True)
    assert mx.abs(found(mx.array([text])) - expected).max().item() < 1e-5


def test_tables_are_no_part_of_the_memory_that_is_counted(converted: Path) -> None:
    tables = [s.size_bytes for n, s in stored_tensors(converted).items() if ".engram.embed." in n]
    total = sum(s.size_bytes for s in stored_tensors(converted).values())
    counted = memory_estimate(converted, 8, "bfloat16").weight_bytes
    assert sum(tables) > 60_000 and counted <= total - sum(tables)


def test_bfloat16_has_finite_logits(converted: Path) -> None:
    m, _ = load_model(converted)
    logits = m(mx.array([ids("p1")]))
    assert mx.isfinite(logits).all().item() and m.mtp[-1].confidence_head.proj.weight.dtype == mx.float32
    same = logits[0].argmax(axis=-1) == golden()["p1.logits"].argmax(axis=-1)
    assert same.mean().item() > 0.8


def test_the_released_config_is_read_and_its_tables_have_the_sizes_that_follow_from_it() -> None:
    args = read_args(json.loads(named_config("flash-v41") or b""), "flash")
    assert args.num_hidden_layers == 40 and [args.kv_source(n) for n in (1, 2, 13, 14, 39)] == [-1, 2, 8, 14, 20]  # type: ignore[attr-defined]
    context = 32_768
    entries = (3 * context // 2 + context) * (512 + 128) * 2
    assert entries < cache_size_bytes(args, context, 2) < 1.1 * entries + 43 * 144 * 512 * 2


@pytest.mark.parametrize("words", [("--layout", "vlm"), ("--layout", "omlx"), ("--layout", "omlx", "--recipe", "q4")])
def test_every_layout_runs_whatever_names_and_tables_its_host_has(words: tuple[str, ...], tmp_path: Path) -> None:
    assert run("quantize", SOURCE, tmp_path / "out", *words, "-q").code == 0
    m, _ = load_model(tmp_path / "out", dtype="float32", dense=True)
    difference = mx.abs(m(mx.array([ids("p0")]))[0] - golden()["p0.logits"]).max().item()
    assert m.head.present and (difference < 1e-4 if "--recipe" not in words else 1e-3 < difference < 10)


# ------------------------------------------------------------------ refusals

REFUSED: list[tuple[str, Any, str]] = [
    ("kv_source_layer_ids", [4], "kv_source_layer_ids: layer 2 has compress ratio 2, and no layer up to it"),
    ("kv_source_layer_ids", [2, 3, 4], "layer 3 is not in index_source_layer_ids"),
    ("kv_source_layer_ids", [2], "compress_ratios: layer 4 has 1, but layer 2"),
    ("kv_source_layer_ids", "all", "kv_source_layer_ids: expected a list of whole numbers"),
    ("index_source_layer_ids", [0, 2, 4, 6], "index_source_layer_ids: layer 0 has compress ratio 0"),
    ("index_source_layer_ids", [2, 4, 60], "index_source_layer_ids: expected layers 0 to 7"),
    ("compress_ratios", [0, 0, 3, 3, 1, 1, 1, 1, 0, 0, 0], "compress_ratios: expected 0, 1 or 2, found 3"),
    ("compress_ratios", [0, 0, 2, 2, 1, 1, 1, 1, 0, 2, 0], "compress_ratios: expected 0 for the head's stages"),
    ("candidate_source_layer_id", 5, "candidate_source_layer_id: 5 is not in index_source_layer_ids"),
    ("candidate_source_layer_id", 2, "candidate_source_layer_id: layer 4 chooses among the entries of layer 4"),
    ("candidate_block_size", 0, "candidate_block_size: expected 1 or more"),
    ("engram_num_embeddings", [434, 605], "engram_num_embeddings: expected [434, 606]"),
    ("engram_vocab_size", 1 << 40, "engram_vocab_size"),
    ("engram_n_heads", 0, "engram_n_heads: expected a whole number from 1"),
    ("engram_max_ngram_size", 1, "engram_max_ngram_size: expected 2 or more"),
    ("engram_pad_token_id", 384, "engram_pad_token_id: expected an id below 384"),
    ("engram_layer_ids", [3, 1], "engram_layer_ids: expected layers 0 to 7, each once and ascending"),
    ("dspark_num_experts_per_tok", 5, "dspark_num_experts_per_tok is 5, more than the head's 4"),
    ("scoring_func", "softmax", "scoring_func: expected sqrtsoftplus"),
    ("qk_rope_head_dim", 64, "qk_rope_head_dim: expected at most 32"),
    ("sliding_window", -1, "sliding_window: expected a whole number"),
]


@pytest.mark.parametrize(
    ("key", "value", "words"), REFUSED, ids=[f"{key}-{n}" for n, (key, _, _) in enumerate(REFUSED)]
)
def test_values_that_cannot_be_run_are_refused_by_name(key: str, value: Any, words: str) -> None:
    settings = config()
    settings["text_config"][key] = value
    with pytest.raises(ConfigError) as raised:
        read_args(settings, "folder")
    assert words in str(raised.value)


def copied(source: Path, place: Path) -> Path:
    return Path(shutil.copytree(source, place, copy_function=shutil.copyfile))


def test_a_folder_whose_config_cannot_be_run_ends_with_3(converted: Path, tmp_path: Path) -> None:
    folder = copied(converted, tmp_path / "out")
    settings = json.loads((folder / "config.json").read_text())
    settings["text_config"]["index_source_layer_ids"] = [2, 4, 60]
    (folder / "config.json").write_text(json.dumps(settings))
    result = run("generate", folder, "--prompt-ids", "3,4")
    assert_refused(result, "index_source_layer_ids")
    assert result.code == 3


def test_without_its_tokenizer_a_model_with_engrams_is_refused(converted: Path, tmp_path: Path) -> None:
    """A host that passes over the engrams then computes something else, and says nothing."""
    folder = copied(converted, tmp_path / "out")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        load_model(folder)


def test_the_tokenizer_of_another_model_is_refused(converted: Path, tmp_path: Path) -> None:
    folder = copied(converted, tmp_path / "out")
    table = json.loads((folder / "tokenizer.json").read_text())
    table["model"]["vocab"] = {word.lower() + "x": n for n, word in enumerate(table["model"]["vocab"])}
    table["model"]["unk_token"] = "<pad>x"
    (folder / "tokenizer.json").write_text(json.dumps(table))
    with pytest.raises(InventoryError, match=r"engram_compressed_vocab_size: config\.json says 253"):
        load_model(folder)


def test_a_table_of_another_shape_is_refused() -> None:
    leaf = next(MappedLeaf(s) for n, s in stored_tensors(SOURCE).items() if n == "layers.1.engram.embed.weight")
    with pytest.raises(ValueError, match=r"scales: expected \[434, 2\], found none"):
        Table({"weight": leaf}, MXFP8, (434, 64))
    with pytest.raises(ValueError, match=r"weight: expected \[433, 64\]"):
        Table({"weight": leaf}, None, (433, 64))


# ------------------------------------------------------------------ commands


def test_generate_says_what_was_recorded_with_and_without_the_head(converted: Path) -> None:
    expected = golden()["p0.greedy_ids"].tolist()[:8]  # type: ignore[index]
    prompt = ",".join(map(str, ids("p0")))
    for how in ("--mtp", "--no-mtp"):
        words = ("generate", converted, "--prompt-ids", prompt, "--max-tokens", 8, how, "--dtype", "float32", "--json")
        facts = run(*words).json
        assert facts["tokens"] == expected and facts["mtp_active"] is (how == "--mtp")
        assert facts["head_kind"] == "dspark"


@pytest.mark.slow
def test_verify_compares_with_the_recording(converted: Path) -> None:
    result = run("verify", converted, "--reference", FOLDER / "golden.safetensors", "--atol", "1e-4")
    assert result.code == 0 and "48 keys within tolerance" in result.out


@pytest.mark.slow
def test_verify_judges_the_head_and_layers_without_a_text_that_the_tokenizer_knows(
    converted: Path, tmp_path: Path
) -> None:
    result = run("verify", converted, "--mtp", "--max-tokens", 12, "--draft-depth", 2)
    assert "knows none of our texts" in result.err and "ok    greedy equality" in result.out
    assert "ok    numerics" in result.out
    (tmp_path / "prompts.txt").write_text(json.dumps(ids("p1")))
    words = ("verify", converted, "--source", SOURCE, "--layerwise", "--prompts", tmp_path / "prompts.txt", "--json")
    figures = run(*words).json["layerwise"]
    assert figures["stages"][-1]["stage"] == "head" and figures["stages"][-1]["relative_rms"] < 1e-5
    assert figures["divergence"]["kl_max"] < 1e-5 and figures["head_divergence"]["kl_max"] < 1e-5


def test_calibrate_writes_the_keys_that_quantize_weighs_by_and_refuses_sensitivities(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("bab Bel cin cor bic cab cel bor buma besto " * 3)
    made = tmp_path / "made.safetensors"
    refused = run("calibrate", SOURCE, tmp_path / "text.txt", made, "--sensitivity")
    assert_refused(refused, "single matrices are not tried", "--sensitivity")
    assert not made.exists()
    assert run("calibrate", SOURCE, tmp_path / "text.txt", made).code == 0
    assert {k for k in mx.load(str(made)) if "layers.1.engram" in k} == {
        f"language_model.layers.1.engram.wkv{end}" for end in ("", ".rows")
    }
    assert run("quantize", SOURCE, tmp_path / "q3", "--recipe", "q3", "--calibration", made, "-q").code == 0
    weighed = json.loads((tmp_path / "q3" / "ds4convert_manifest.json").read_text())
    assert '"importance": "language_model.layers.' in json.dumps(weighed)


def test_a_head_that_lies_elsewhere_is_run_by_name_and_that_of_another_model_is_refused(
    converted: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    assert run("quantize", SOURCE, bare, "--drop-mtp", "-q").code == 0
    words = ("--prompt-ids", "5,6,7,8", "--max-tokens", 8, "--dtype", "float32", "--json")
    alone, with_head = run("generate", bare, *words).json, run("generate", bare, *words, "--drafter", converted).json
    assert (alone["mtp_active"], with_head["mtp_active"]) == (False, True) and alone["tokens"] == with_head["tokens"]
    other = Path(shutil.copytree(converted, tmp_path / "other"))
    edit_json(other / "config.json", lambda c: c["text_config"].update(hidden_size=80))
    assert_refused(run("generate", bare, *words, "--drafter", other), "another model", "hidden_size")
