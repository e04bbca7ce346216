"""DeepSeek-V4.1: the published inventory row by row, and a lossless conversion value by value."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ds4convert.checkpoint.config import ModelConfig, check_config, named_config, parse_config
from ds4convert.checkpoint.headers import DTYPE_BYTES
from ds4convert.checkpoint.inventory import HEAD, expected
from ds4convert.checkpoint.source import imagined
from ds4convert.converted import manifest
from ds4convert.demo import synth
from ds4convert.errors import UsageError
from ds4convert.fit import format_errors, memory, size_budget
from ds4convert.planning import build
from ds4convert.planning.layouts import layout_for, layout_of
from ds4convert.planning.recipes import recipe_of
from ds4convert.planning.side_files import SideFiles
from ds4convert.publishing import model_card
from tests.support import ROOT, assert_refused, edit_json, run, tree
from tests.support_run import Stored, bf16, e4m3, e8m0, fp4, stored

FLASH = json.loads((ROOT / "tests" / "data" / "flash_v41_inventory.json").read_text())
GOLDEN = ROOT / "tests" / "golden" / "tiny-v41-a"
SOURCE = GOLDEN / "checkpoint"
VALUES: dict[str, dict[str, Any]] = json.loads((GOLDEN / "golden_values.json").read_text())
MATRICES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def flash() -> ModelConfig:
    return parse_config(named_config("flash-v41") or b"")


LAYOUTS = ("inline", "omlx", "vlm")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """The checkpoint converted into every layout that has hosts for it, nothing rounded."""
    top = tmp_path_factory.mktemp("v41")
    for layout in LAYOUTS:
        result = run("quantize", SOURCE, top / layout, "--layout", layout)
        assert result.code == 0, result.err
    yield {layout: top / layout for layout in LAYOUTS}
    shutil.rmtree(top)


@pytest.fixture(scope="module")
def converted(folders: dict[str, Path]) -> Path:
    return folders["inline"]


# --- the inventory ---------------------------------------------------------------------------------------------------


def numbers(row: dict[str, Any], key: str) -> list[Any]:
    found = row.get(key, [None])
    return list(range(found)) if isinstance(found, int) else found


def published() -> dict[str, tuple[str, tuple[int, ...]]]:
    """Expand the published patterns: {layer}, {block} and {expert} run over the listed numbers."""
    out: dict[str, tuple[str, tuple[int, ...]]] = {}
    for row in FLASH["rows"]:
        for layer in numbers(row, "layers"):
            for block in numbers(row, "blocks"):
                name = row["name"].replace("{layer}", str(layer)).replace("{block}", str(block))
                for expert in numbers(row, "experts"):
                    out[name.replace("{expert}", str(expert))] = (row["dtype"], tuple(row["shape"]))
    return out


def test_the_inventory_of_flash_is_exactly_the_published_one() -> None:
    specs = list(expected(flash()).tensors())
    assert {s.name: (s.dtypes[0], s.shape) for s in specs} == published()
    sizes = {s.name: math.prod(s.shape) * DTYPE_BYTES[s.dtypes[0]] for s in specs}
    assert len(specs) == len(sizes) == FLASH["tensors"] == 96_085
    assert sum(sizes.values()) == FLASH["total_size"] == 510_286_023_000
    head = [s.name for s in specs if s.part == HEAD]
    assert len(head) == FLASH["mtp_tensors"] and sum(sizes[n] for n in head) == FLASH["mtp_bytes"]


def test_inspect_tells_what_flash_holds_from_its_config_alone() -> None:
    facts = run("inspect", "--config", "flash-v41", "--json").json
    assert facts["family"] == "deepseek_v41" and facts["mtp"]["kind"] == "dspark"
    assert (facts["tensors"], facts["bytes"]) == (96_085, 510_286_023_000)
    assert {"engram_table", "vision", "aligner", "mtp.markov"} <= {g["name"] for g in facts["groups"]}


def test_a_plan_for_flash_comes_to_the_bytes_of_the_reference() -> None:
    facts = run("plan", "--config", "flash-v41", "--json").json
    assert sum(g["bytes"] for g in facts["groups"]) == 510_510_088_024  # the reference on V4.1, section 4


def test_a_shard_size_that_a_table_exceeds_is_told_with_the_table() -> None:
    facts = run("plan", "--config", "flash-v41", "--json").json
    over = {o["tensor"]: o["bytes"] for o in facts["over_shard_size"]}
    assert over["language_model.layers.14.engram.embed.weight"] == 384_016_682 * 256
    assert facts["mapped_bytes"] == 202_758_032_400
    assert [o for o in over.values() if o < 5_000_000_000] == []


def test_engram_tables_are_copied_as_they_are_not_spread_over_tiles() -> None:
    modules = {m.name: m for m in expected(flash()).modules}
    table = modules["layers.14.engram.embed"]
    assert table.shape == (384_016_682, 256) and table.tile == (1, 32) and table.scale_shape() == (384_016_682, 8)
    assert modules["layers.14.engram.wkv"].tile == (32, 32)
    assert modules["mtp.0.ffn.experts.{expert}.w1"].experts == 128
    assert modules["layers.0.ffn.experts.{expert}.w1"].experts == 384


# --- the conversion --------------------------------------------------------------------------------------------------


def mlx_name(name: str, layout: str) -> tuple[str, int | None]:
    """Return the name in the converted folder of an official tensor, and its expert."""
    parts = name.split(".")
    expert = None
    if parts[2:4] == ["ffn", "experts"]:
        expert, stacked = (
            int(parts[4]),
            ["experts", parts[5]] if layout == "omlx" else ["switch_mlp", MATRICES[parts[5]]],
        )
        parts = [*parts[:3], *stacked, *parts[6:]]
    if layout == "omlx":
        own = parts[0] in {"vision", "aligner", "image_start", "image_end", "image_newline"}
        return ".".join("ffn" if own and p == "mlp" else p for p in (*["language_model"] * (not own), *parts)), expert
    if parts[0] not in {"layers", "mtp"}:
        if layout == "vlm" and parts[0] in (top := {"embed": "embed_tokens", "norm": "norm", "head": "head"}):
            return ".".join(["language_model", top[parts[0]], *parts[1:]]), None
        return name, None
    vlm = layout == "vlm" or parts[2:4] == ["engram", "embed"]  # mlx-vlm looks for packed tables under its own names
    if parts[2:4] == ["ffn", "shared_experts"] and layout == "vlm":
        parts[4] = MATRICES[parts[4]]
    return ".".join([*["language_model"] * (vlm and parts[0] == "layers"), *parts]), expert


def sha256(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


def one(t: Stored, expert: int | None) -> np.ndarray:
    return t.raw() if expert is None else t.raw()[expert]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_converted_value_is_the_golden_one(folders: dict[str, Path], layout: str) -> None:
    tensors = stored(folders[layout])
    told: set[str] = set()
    for name, golden in VALUES.items():
        path, expert = mlx_name(name, layout)
        t = tensors[path]
        raw, told = one(t, expert), told | {path}
        if "mx" not in golden or (layout == "omlx" and ".wo_a." in name):
            values = bf16(raw) if t.dtype == "BF16" else raw
            assert t.dtype == golden["dtype"] if "mx" not in golden else "BF16", name
        else:
            table = layout == "omlx" and ".engram.embed." in name  # as the official checkpoint has it
            scales_name = path.removesuffix("weight") + ("scale" if table else "scales")
            scales, told = one(tensors[scales_name], expert), told | {scales_name}
            words = [raw.shape[0], raw.shape[1] // 4] if table else list(raw.shape)
            assert (words, list(scales.shape)) == (golden["mx_weight_u32"], golden["mx_scales_u8"]), name
            assert (t.dtype, tensors[scales_name].dtype) == (("F8_E4M3", "F8_E8M0") if table else ("U32", "U8"))
            assert (sha256(raw), sha256(scales)) == (golden["mx_weight"], golden["mx_scales"]), name
            codes = np.ascontiguousarray(raw).view(np.uint8)
            values = (e4m3(codes) if golden["mx"] == "mxfp8" else fp4(codes)) * e8m0(scales).repeat(32, axis=-1)
        assert list(values.shape) == golden["shape"] and sha256(values.astype("<f4")) == golden["f32"], name
    assert told == set(tensors)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_result_verifies_and_its_config_is_the_source_s_with_a_table_under_the_host_s_names(
    folders: dict[str, Path], layout: str
) -> None:
    folder = folders[layout]
    result = run("verify", folder, "--source", SOURCE)
    assert result.code == 0, result.out
    config, source = (json.loads((p / "config.json").read_text()) for p in (folder, SOURCE))
    assert config["text_config"] == source["text_config"] and config["vision_config"] == source["vision_config"]
    if layout != "omlx":
        table = config["quantization"]
        assert table["language_model.layers.1.engram.embed"]["mode"] == "mxfp8"
        assert table["mtp.0.ffn.switch_mlp.up_proj"]["mode"] == "mxfp4"
        assert ("layers.1.attn.wo_a" in table) == (layout == "inline")
    assert (folder / "tokenizer.json").is_file()  # without it mlx-vlm passes over the engrams, and says nothing


def test_layouts_of_hosts_that_load_no_v41_are_refused() -> None:
    for layout in ("mtplx", "universal", "mlx-lm"):
        refused = run("plan", SOURCE, "--layout", layout)
        assert_refused(refused, f"layout {layout}: its hosts load no DeepSeek-V4.1", "--layout inline, omlx, or vlm")


def test_the_table_of_omlx_says_what_its_loader_asks_for(folders: dict[str, Path]) -> None:
    """The rules of omlx/patches/deepseek_v41/loading.py (1c65e858, 181cfcec), as read there: it was never run."""
    config = json.loads((folders["omlx"] / "config.json").read_text())
    index = json.loads((folders["omlx"] / "model.safetensors.index.json").read_text())["weight_map"]
    block, tensors = config["omlx_deepseek_v41"], stored(folders["omlx"])
    assert block["version"] == 1 and block["preserve_mtp"] is True and block["engram_in_index"] is True
    assert not config.keys() & {"quantization", "quantization_config"}
    packed = {n.removesuffix(".scales") for n in tensors if n.endswith(".scales")}
    assert set(block["quantized_modules"]) == packed and not any(n.endswith("wo_a") for n in packed)
    for name, entry in block["quantized_modules"].items():
        bits, weight, scales = entry["bits"], tensors[f"{name}.weight"], tensors[f"{name}.scales"]
        assert entry == {"bits": bits, "mode": f"mxfp{bits}"} and weight.file == scales.file, name
        assert weight.shape[-1] * 32 // bits == scales.shape[-1] * 32
    assert set(block["engram_tables"]) == {f"language_model.layers.{n}.engram.embed" for n in (1, 3)}
    for name, table in block["engram_tables"].items():
        assert (table["weight_key"], table["scale_key"]) == (f"{name}.weight", f"{name}.scale")
        assert index[table["weight_key"]] == table["weight_file"] and index[table["scale_key"]] == table["scale_file"]
        assert not table.keys() & {"bits", "bias_key"}


def test_omlx_takes_tables_affine_and_dense_but_not_in_formats_that_its_loader_does_not_read(tmp_path: Path) -> None:
    result = run("quantize", SOURCE, tmp_path / "mlx", "--layout", "omlx", "--engram", "affine-4-g32")
    assert result.code == 0, result.err
    block = json.loads((tmp_path / "mlx" / "config.json").read_text())["omlx_deepseek_v41"]
    table, name = block["engram_tables"]["language_model.layers.3.engram.embed"], "language_model.layers.3.engram.embed"
    assert (table["bits"], table["group_size"], table["bias_key"]) == (4, 32, f"{name}.biases")
    assert name not in block["quantized_modules"] and "language_model.layers.3.engram.wkv" in block["quantized_modules"]
    assert run("verify", tmp_path / "mlx", "--source", SOURCE).code == 0
    refused = run("plan", SOURCE, "--layout", "omlx", "--engram", "mxfp4")
    assert_refused(refused, "layers.1.engram.embed.weight", "FP8, bf16 or affine, and not as mxfp4", "--engram")
    v4 = run("plan", GOLDEN.parent / "tiny-a" / "checkpoint", "--layout", "omlx")
    assert_refused(v4, "layout omlx: its hosts load no DeepSeek-V4 in it", "--layout inline")


def test_what_was_rounded_is_not_decoded_by_a_change_of_layout(tmp_path: Path) -> None:
    assert run("quantize", SOURCE, tmp_path / "q4", "--recipe", "q4").code == 0
    refused = run("relayout", tmp_path / "q4", tmp_path / "out", "--layout", "omlx")
    assert_refused(refused, "rounded to affine-4-g64", "--from-mlx --layout omlx")
    assert run("quantize", tmp_path / "q4", tmp_path / "again", "--from-mlx", "--layout", "omlx").code == 0
    assert run("verify", tmp_path / "again").code == 0


@pytest.mark.parametrize(("first", "second"), [(a, b) for a in LAYOUTS for b in LAYOUTS if a != b])
def test_a_folder_in_another_layout_is_what_a_conversion_in_that_layout_is(
    folders: dict[str, Path], first: str, second: str, tmp_path: Path
) -> None:
    result = run("relayout", folders[first], tmp_path / "moved", "--layout", second)
    assert result.code == 0, result.err
    found, wanted = stored(tmp_path / "moved"), stored(folders[second])
    if first != "omlx":  # of what it has dense nothing tells how it was packed
        assert {n: t.raw().tobytes() for n, t in found.items()} == {n: t.raw().tobytes() for n, t in wanted.items()}
        config = [(d / "config.json").read_bytes() for d in (tmp_path / "moved", folders[second])]
        assert config[0] == config[1]
    if "omlx" not in (first, second):
        assert tree(tmp_path / "moved") == tree(folders[second])
    assert run("verify", tmp_path / "moved", "--source", SOURCE).code == 0
    facts = run("diff", folders[first], tmp_path / "moved", "--json").json
    assert (facts["changed"], facts["only_a"], facts["only_b"]) == (0, 0, 0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_head_left_out_and_grafted_again_gives_the_same_folder(
    folders: dict[str, Path], layout: str, tmp_path: Path
) -> None:
    assert run("quantize", SOURCE, tmp_path / "bare", "--drop-mtp", "--layout", layout).code == 0
    text = json.loads((tmp_path / "bare" / "config.json").read_text())["text_config"]
    assert text["num_nextn_predict_layers"] == 0 and not any(k.startswith("dspark_") for k in text)
    for head in (SOURCE, folders["inline" if layout == "vlm" else "vlm"]):
        result = run("graft", tmp_path / "bare", "--from", head, "--out", tmp_path / f"whole-{head.name}")
        assert result.code == 0, result.err
        theirs = {n: t.raw().tobytes() for n, t in stored(folders[layout]).items()}
        assert {n: t.raw().tobytes() for n, t in stored(tmp_path / f"whole-{head.name}").items()} == theirs
    assert tree(tmp_path / "whole-checkpoint") == tree(folders[layout])
    assert run("graft", "--remove", tmp_path / "whole-checkpoint").code == 0
    assert set(stored(tmp_path / "whole-checkpoint")) == {n for n in theirs if "mtp." not in n}


def test_a_head_goes_into_the_folder_itself_where_its_layout_is_the_folder_s(tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    assert run("quantize", SOURCE, bare, "--drop-mtp").code == 0
    refused = run("graft", bare, "--from", SOURCE, "--in-place", "--layout", "vlm")
    assert refused.code == 3 and "--out DIR writes the folder anew" in refused.err
    assert run("graft", bare, "--from", SOURCE, "--in-place").code == 0
    assert run("verify", bare, "--source", SOURCE).code == 0


def test_a_recipe_rounds_the_experts_of_both_parts_and_leaves_the_tower_alone(tmp_path: Path) -> None:
    assert run("quantize", SOURCE, tmp_path / "q4", "--recipe", "q4").code == 0
    checks = run("verify", tmp_path / "q4", "--source", SOURCE)
    assert checks.code == 0, checks.out
    table = json.loads((tmp_path / "q4" / "config.json").read_text())["quantization"]
    assert not any(n.startswith(("vision", "aligner", "image")) for n in table)


CARRIERS = {1, 2, 3, 4, 5, 6, 7}
"""Layers of tiny-v41-a that its config lists: of keys 2 4, of picks 2 4 6 and 4, of engrams 1 3, of the head's 5 6 7."""


@pytest.mark.parametrize("recipe", ["q2", "q3"])
def test_layers_that_others_lean_on_have_four_bits_in_every_recipe(recipe: str, tmp_path: Path) -> None:
    facts = run("plan", SOURCE, "--recipe", recipe, "--json").json
    assert facts["formats"]["experts 1-7"] == "mxfp4" and facts["formats"]["engram_table"] == "affine-4-g64"
    run("quantize", SOURCE, tmp_path / "mlx", "--recipe", recipe)
    table = json.loads((tmp_path / "mlx" / "config.json").read_text())["quantization"]
    low = {int(n.split(".")[1]) for n, e in table.items() if isinstance(e, dict) and n[0] == "l" and e["bits"] < 4
           and n.startswith("layers.")}  # fmt: skip
    assert low == {0} == set(range(8)) - CARRIERS
    chosen = run("plan", SOURCE, "--recipe", recipe, "--experts", "affine-2-g64", "--json").json["formats"]
    assert not any(k.startswith("experts ") for k in chosen)  # who names a format himself gets it


def test_the_formats_of_engrams_towers_and_head_are_chosen_apart(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text(
        '[formats]\nvision = "affine-8-g32"\naligner = "bf16"\nengram = "affine-6-g64"\n'
    )
    words = ["--recipe", tmp_path / "own.toml", "--engram", "affine-4-g32", "--mtp", "bf16"]
    assert run("quantize", SOURCE, tmp_path / "mlx", *words, "--layout", "vlm").code == 0
    table = json.loads((tmp_path / "mlx" / "config.json").read_text())["quantization"]
    assert table["language_model.layers.1.engram.embed"] == {"group_size": 32, "bits": 4, "mode": "affine"}
    assert table["language_model.layers.1.engram.wkv"]["bits"] == 4  # the option covers both, and comes before recipes
    assert table["vision.blocks.0.attn.wqkv"]["bits"] == 8 and "vision.patch_embed.proj" not in table
    assert not any(n.startswith(("mtp.", "aligner.")) for n in table)
    assert run("verify", tmp_path / "mlx", "--source", SOURCE).code == 0
    v4 = run("plan", GOLDEN.parent / "tiny-a" / "checkpoint", "--engram", "mxfp4")
    assert v4.code == 2 and "DeepSeek-V4 has no engrams" in v4.err


def test_the_backbone_s_format_covers_engrams_and_no_tower() -> None:
    groups = {
        g["name"]: g["formats"] for g in run("plan", SOURCE, "--backbone", "affine-8-g64", "--json").json["groups"]
    }
    assert groups["engram_table"] == ["affine-8-g64"] and groups["vision"] == groups["aligner"] == ["bf16"]


ERRORS = format_errors.imagined("nearest")


def held_of(config: ModelConfig, target: int, layout: str = "inline") -> tuple[int, size_budget.Fitted]:
    """Return what a model fitted into so many bytes takes in memory, by its plan, and what was chosen."""
    inventory = expected(config)
    state, working = memory.state_bytes(inventory, 64), memory.working_bytes(config)
    options = build.Options(recipe_of("fit"), layout_of(layout))
    room = size_budget.Room(target, 64, state, working)
    fitted = size_budget.fit(inventory, options, ERRORS, room)
    named, files = imagined(inventory)
    made = build.build(inventory, named, files, replace(options, recipe=fitted.recipe), SideFiles({}, (), {}))
    tables = sum(o.size for s in made.steps for o in s.outputs if s.role == "engram_table")
    assert tables == fitted.facts["mapped_bytes"] and fitted.facts["planned_bytes"] <= target
    return build.output_bytes(made) - tables + state + working, fitted


def test_what_fit_plans_never_takes_more_than_it_was_given_tables_on_the_disk_apart() -> None:
    """Twenty sizes, from the least that does; the bytes are those of the plans, not of the account."""
    config = parse_config((SOURCE / "config.json").read_bytes())
    least = held_of(config, 1 << 30)[1].facts["smallest_bytes"]
    with pytest.raises(UsageError, match="is too small"):
        held_of(config, least - 1)
    sizes = set()
    for n in range(20):
        target = least + n * 100_000
        held, _ = held_of(config, target, LAYOUTS[n % 3] if n > 9 else "inline")
        assert held <= target, n
        sizes.add(held)
    assert len(sizes) > 9
    low = [r for r in held_of(config, least)[1].facts["table"] if r["role"] == "experts"]
    assert {(r["layers"], r["bits_per_weight"] >= 4) for r in low} == {("0", False), ("1-7", True)}


def test_fit_takes_the_format_of_engrams_as_it_is_said_and_what_a_layout_demands(tmp_path: Path) -> None:
    words = ["--fit", "64MB", "--engram", "affine-4-g32", "--layout", "omlx", "--json"]
    facts = run("quantize", SOURCE, tmp_path / "mlx", *words).json
    assert facts["mapped_bytes"] < run("plan", SOURCE, "--json").json["mapped_bytes"]
    roles = {r["role"] for r in facts["fit"]["table"]}
    assert roles.isdisjoint({"engram", "engram_table", "vision", "aligner", "embedding", "compressor"})
    assert stored(tmp_path / "mlx")["language_model.layers.1.attn.wo_a.weight"].dtype == "BF16"
    assert run("verify", tmp_path / "mlx", "--source", SOURCE).code == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_without_our_manifest_is_read_under_the_host_s_names(
    folders: dict[str, Path], layout: str, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders[layout], tmp_path / "other"))
    (folder / "ds4convert_manifest.json").unlink()
    facts = run("inspect", folder, "--json").json
    assert facts["family"] == "deepseek_v41" and not facts["problems"] and facts["mtp"]["kind"] == "dspark"
    assert run("relayout", folder, tmp_path / "moved", "--layout", layout).code == 0
    moved, whole = stored(tmp_path / "moved"), stored(folders[layout])
    assert {n: t.raw().tobytes() for n, t in moved.items()} == {n: t.raw().tobytes() for n, t in whole.items()}


def test_a_smaller_model_of_the_family_keeps_its_lists_of_layers_whole() -> None:
    small = synth.shrink(json.loads(named_config("flash-v41") or b""), 9, 4)
    text = small["text_config"]
    assert text["kv_source_layer_ids"] == text["index_source_layer_ids"] == [2, 8]
    assert (text["engram_layer_ids"], text["engram_num_embeddings"]) == ([1], [384_006_168])
    assert text["candidate_source_layer_id"] == 8
    assert text["dspark_target_layer_ids"] == [6, 7, 8] and len(text["compress_ratios"]) == 12
    names = {s.name for s in expected(check_config(small)).tensors()}
    assert "layers.8.attn.indexer.wk.weight" in names and "layers.9.attn.wkv.weight" not in names
    bare = synth.shrink(small, None, None, "none")["text_config"]
    assert bare["num_nextn_predict_layers"] == 0 and len(bare["compress_ratios"]) == 9
    assert not any(k.startswith("dspark_") for k in bare)
    with pytest.raises(UsageError, match=r"DeepSeek-V4\.1 has no such head; expected one of: dspark"):
        synth.shrink(small, None, None, "classic")


def test_the_model_card_names_the_programs_that_load_it_and_no_command_that_is_refused(converted: Path) -> None:
    record = manifest.read(converted)
    assert record is not None
    layout = layout_for(record.layout, record.family)
    text = model_card.write(model_card.Facts("me/x", record, layout, (), (), None, {}, 9))
    shell = text.split("```sh\n")[1].split("```")[0]
    assert "mlx_vlm.generate --model x" in shell and "--draft-model" not in shell
    assert "ds4convert generate x --prompt Hello --mtp" in shell and "ds4convert serve x --mtp" in shell


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("kv_source_layer_ids", [3], "text_config.kv_source_layer_ids names layer 3, which text_config.index_source"),
        (
            "engram_num_embeddings",
            [434],
            "expected a number from 1 for each of the 2 layers of text_config.engram_layer",
        ),
        ("compress_ratios", [0] * 8 + [4, 0, 0], "text_config.compress_ratios[8] is 4, expected one of [0, 1, 2]"),
        ("dspark_n_routed_experts", 5, "shape"),
        ("engram_max_ngram_size", 1, "is implied; check its sizes"),
        ("tie_word_embeddings", True, "text_config.tie_word_embeddings is true, expected false for DeepSeek-V4.1"),
        ("dspark_markov_rank", None, "text_config.dspark_markov_rank"),
        ("candidate_source_layer_id", 8, "text_config.candidate_source_layer_id names 8, but there are only 8 layers"),
        ("candidate_source_layer_id", -1, "text_config.candidate_source_layer_id must be a whole number from 0"),
        ("candidate_source_layer_id", [4, {}], "text_config.candidate_source_layer_id must be a list of whole numbers"),
        ("engram_num_embeddings", [434, (1 << 40) + 1], "text_config.engram_num_embeddings must be a list of whole"),
        ("engram_num_embeddings", {"a": [[[1]]]}, "text_config.engram_num_embeddings must be a list of whole numbers"),
        ("engram_layer_ids", [1, 1], "text_config.engram_layer_ids names a layer twice"),
        ("index_source_layer_ids", [[2]], "text_config.index_source_layer_ids must be a list of whole numbers"),
    ],
)
def test_a_wrong_key_is_refused_by_its_path(tmp_path: Path, key: str, value: Any, message: str) -> None:
    folder = Path(shutil.copytree(SOURCE, tmp_path / "copy"))
    edit_json(folder / "config.json", lambda table: table["text_config"].update({key: value}))
    assert_refused(run("plan", folder), message)


def test_v4_s_config_with_the_name_of_v41_is_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(SOURCE, tmp_path / "copy"))
    edit_json(
        folder / "config.json", lambda table: table.update(table.pop("text_config")) or table.pop("quantization_config")
    )
    edit_json(folder / "config.json", lambda table: table.update(model_type="deepseek_v41"))
    assert_refused(run("inspect", folder), "text_config: missing", "DeepSeek-V4.1")
