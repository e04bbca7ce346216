"""DeepSeek-V4 Vision-Exp: the published counts, a lossless conversion, and text that is decoded as without a tower."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ds4convert.checkpoint.config import check_config
from ds4convert.checkpoint.headers import DTYPE_BYTES
from ds4convert.checkpoint.inventory import expected
from ds4convert.inference.deepseek_v4.images import is_of_images, without_images
from ds4convert.planning.layouts import layout_for
from tests import support
from tests.checkpoint.families import vision
from tests.support import ROOT, Tensor, assert_refused, edit_json, run

TEXT = ROOT / "tests" / "golden" / "dspark-b" / "checkpoint"
FLASH_0731 = {
    "num_nextn_predict_layers": 1, "dspark_block_size": 5, "dspark_markov_rank": 256, "dspark_noise_token_id": 128799,
    "dspark_target_layer_ids": [40, 41, 42],
}  # fmt: skip


def flash(**changes: Any) -> list[tuple[str, str, int]]:
    """(name, dtype, bytes) of every tensor that a config implies: Flash with the keys of 0731, and changes."""
    table = json.loads((ROOT / "manifests" / "configs" / "flash.json").read_text())
    table |= FLASH_0731 | {"compress_ratios": [*table["compress_ratios"][:43], 0, 0, 0]} | changes
    specs = expected(check_config(table)).tensors()
    return [(s.name, s.dtypes[0], math.prod(s.shape) * DTYPE_BYTES[s.dtypes[0]]) for s in specs]


def digests(folder: Path) -> dict[str, tuple[str, list[int], str]]:
    """What a folder's tensors are, short enough for a message."""
    found = support.read_folder(folder).items()
    return {n: (t.dtype, list(t.shape), hashlib.sha256(t.data).hexdigest()[:16]) for n, t in found}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    top = tmp_path_factory.mktemp("vision")
    yield vision.with_tower(TEXT, top / "source")
    shutil.rmtree(top)


@pytest.fixture(scope="module")
def converted(source: Path) -> dict[str, Path]:
    out = {layout: source.parent / layout for layout in ("inline", "vlm")}
    for layout, folder in out.items():
        result = run("quantize", source, folder, "--layout", layout)
        assert result.code == 0, result.err
    return out


def test_the_tensors_of_the_release_come_to_the_published_counts_and_bytes() -> None:
    """72,633 tensors and 167,811,372,792 bytes: `metadata.total_size` of its index, as several public notes have it;
    72,317 and 166,878,536,440 of Flash-0731. What is more by name and dtype: see the family file."""
    text, whole = flash(), flash(num_nextn_predict_layers=3, rms_norm_eps=1e-20, **vision.FLASH_KEYS)
    assert (len(text), sum(size for _, _, size in text)) == (72_317, 166_878_536_440)
    assert (len(whole), sum(size for _, _, size in whole)) == (72_633, 167_811_372_792)
    had = {name for name, _, _ in text}
    more = {name: dtype for name, dtype, _ in whole if name not in had}
    kinds = Counter((n.split(".")[0] if "gate" not in n else n.rpartition(".")[2], t) for n, t in more.items())
    assert kinds == {
        ("vision", "BF16"): 259, ("aligner", "BF16"): 4, ("bias_vl", "F32"): 46, ("bias", "F32"): 3,
        ("image_start", "BF16"): 1, ("image_end", "BF16"): 1, ("image_newline", "BF16"): 1, ("image_pad", "BF16"): 1,
    }  # fmt: skip
    assert {n for n in more if n.endswith("gate.bias")} == {f"layers.{n}.ffn.gate.bias" for n in range(3)}
    shapes = vision.tower_shapes(vision.FLASH_KEYS | {"hidden_size": 4096})
    assert {n for n in more if "gate" not in n} == set(shapes)
    assert sum(1 for _, dtype, _ in whole if dtype == "F8_E4M3") == 390


@pytest.mark.parametrize("layout", ["inline", "vlm"])
def test_every_tensor_of_the_tower_arrives_byte_for_byte(layout: str, source: Path, converted: dict[str, Path]) -> None:
    theirs, ours = digests(source), digests(converted[layout])
    config = json.loads((source / "config.json").read_text())
    for name in vision.tower_shapes(config):
        assert ours[name.replace(".mlp.", ".ffn.")] == theirs[name], name
    for name in vision.biases(theirs):
        folder = converted[layout] / "mtp" if layout == "vlm" and name.startswith("mtp.") else converted[layout]
        place = name if name.startswith("mtp.") else f"model.{name}"
        if name.endswith("gate.bias"):
            place = f"{place.removesuffix('bias')}e_score_correction_bias"
        assert digests(folder)[place] == theirs[name], name
    written = json.loads((converted[layout] / "config.json").read_text())
    assert {k: written[k] for k in vision.KEYS} == vision.KEYS
    result = run("verify", converted[layout], "--source", source)
    assert result.code == 0, result.out


def test_all_that_is_not_of_images_has_the_bytes_of_the_text_model(converted: dict[str, Path], tmp_path: Path) -> None:
    assert run("quantize", TEXT, tmp_path / "text").code == 0
    assert without_images(digests(converted["inline"])) == digests(tmp_path / "text")


def decoded(folder: Path, *options: str) -> Any:
    result = run("generate", folder, "--prompt-ids", "7,30,22,100,5", "--max-tokens", "12", "--json", *options)
    assert result.code == 0, result.err
    return result.json


def test_text_is_decoded_and_drafted_as_without_the_tower(converted: dict[str, Path], tmp_path: Path) -> None:
    assert run("quantize", TEXT, tmp_path / "text").code == 0
    wanted = decoded(tmp_path / "text", "--mtp")
    for folder in converted.values():
        found = decoded(folder, "--mtp")
        assert found["tokens"] == wanted["tokens"] == decoded(folder, "--no-mtp")["tokens"]
        assert found["accepted"] == wanted["accepted"] and found["drafted"] == wanted["drafted"] > 0


def test_graft_and_relayout_come_to_the_plan_of_a_conversion(
    source: Path, converted: dict[str, Path], tmp_path: Path
) -> None:
    assert run("quantize", source, tmp_path / "bare", "--drop-mtp").code == 0
    assert run("graft", tmp_path / "bare", "--from", source, "--out", tmp_path / "grafted").code == 0
    assert run("relayout", converted["vlm"], tmp_path / "moved", "--layout", "inline").code == 0
    wanted = json.loads((converted["inline"] / "ds4convert_manifest.json").read_text())["plan"]
    for name in ("grafted", "moved"):
        assert json.loads((tmp_path / name / "ds4convert_manifest.json").read_text())["plan"] == wanted
        assert digests(tmp_path / name) == digests(converted["inline"])


def test_inspect_plan_and_synth_know_the_tower(source: Path, tmp_path: Path) -> None:
    facts = run("inspect", source, "--json").json
    groups = {g["name"]: g for g in facts["groups"]}
    assert groups["aligner"]["tensors"] == 4 and groups["vision"]["tensors"] == 4 + 3 + 2 * 8
    assert {"vision", "aligner"} <= {g["name"] for g in run("plan", source, "--json").json["groups"]}
    assert run("synth", tmp_path / "made", "--config", source / "config.json").code == 0
    made, given = digests(tmp_path / "made"), digests(source)
    stages = ("mtp.1.", "mtp.2.")  # `synth` makes three of them, this checkpoint has two
    backbone = {n: t[:2] for n, t in given.items() if not n.startswith(stages)}
    assert {n: t[:2] for n, t in made.items() if not n.startswith(stages)} == backbone


def test_a_recipe_may_round_the_tower_and_leaves_it_alone_unasked(source: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('name = "r"\ndescription = "x"\n[formats]\nvision = "affine-8-g32"\n')
    assert run("quantize", source, tmp_path / "asked", "--recipe", recipe).code == 0
    assert support.read_folder(tmp_path / "asked")["vision.blocks.1.ffn.w1.weight"].dtype == "U32"
    table = json.loads((tmp_path / "asked" / "config.json").read_text())["quantization"]
    assert table["vision.blocks.1.ffn.w1"]["bits"] == 8 and "vision.patch_embed.proj" not in table
    assert run("quantize", source, tmp_path / "unasked", "--recipe", "q8").code == 0
    tower = {
        n: t for n, t in support.read_folder(tmp_path / "unasked").items() if n.startswith(("vision.", "aligner."))
    }
    assert {t.dtype for t in tower.values()} == {"BF16"}


@pytest.mark.parametrize("layout", ["mlx-lm", "universal"])
def test_layouts_whose_hosts_stop_at_a_tower_are_refused(layout: str, source: Path, tmp_path: Path) -> None:
    """mlx-lm 0.32.2 with our model file: `Received ... parameters not in model`; MTPLX renames and drops nothing."""
    result = run("quantize", source, tmp_path / "out", "--layout", layout)
    assert_refused(result, f"layout {layout}: its hosts load", "--layout inline or vlm")
    assert not (tmp_path / "out").exists()


def test_without_a_head_a_layout_names_the_hosts_that_load_a_tower() -> None:
    roles = {"norm", "vision"}
    assert [h.name for h in layout_for("universal", "deepseek_v4", roles).hosts] == ["mlx-vlm"]
    assert [h.name for h in layout_for("universal", "deepseek_v4", {"norm"}).hosts] == ["MTPLX", "mlx-vlm"]
    assert [h.name for h in layout_for("inline", "deepseek_v41", roles).hosts] == ["mlx-vlm"]


def test_a_tower_that_the_config_does_not_describe_is_told_with_its_keys(source: Path, tmp_path: Path) -> None:
    copy = support.copy_folder(source, tmp_path / "s")
    edit_json(copy / "config.json", lambda t: [t.pop(k) for k in vision.KEYS] and None)
    told = ("vision tower", "vision_n_layers, vision_dim, vision_inter_dim", "text release")
    assert_refused(run("quantize", copy, tmp_path / "out"), *told)
    for name, tensor in (("vision.norm.weight", "BF16"), ("layers.1.ffn.gate.bias_vl", "F32")):
        text = support.read_folder(TEXT) | {name: Tensor(tensor, [1], bytes({"BF16": 2, "F32": 4}[tensor]))}
        config = json.loads((TEXT / "config.json").read_text())
        alone = support.write_folder(tmp_path / name, text, config)
        assert_refused(run("quantize", alone, tmp_path / "out"), name, *told)


def test_keys_of_a_tower_that_is_not_there_are_told(source: Path, tmp_path: Path) -> None:
    copy = support.copy_folder(TEXT, tmp_path / "s")
    edit_json(copy / "config.json", lambda t: t.update(vision.KEYS))
    result = run("quantize", copy, tmp_path / "out")
    assert_refused(result, "describes a vision tower (vision_n_layers)", "take vision_n_layers out of config.json")
    edit_json(copy / "config.json", lambda t: t.update(vision_n_layers=0))
    assert run("quantize", copy, tmp_path / "out").code == 0, "0 blocks are no tower"


@pytest.mark.parametrize("prefix", ["", "model.", "language_model.", "language_model.model."])
def test_only_what_text_does_not_read_is_left_out(prefix: str) -> None:
    names = [
        "layers.0.ffn.gate.tid2eid",
        "layers.0.ffn.gate.bias",
        "layers.0.ffn.gate.bias_vl",
        "layers.1.ffn.gate.bias",
    ]
    weights = dict.fromkeys(f"{prefix}{n}" for n in (*names, "layers.1.ffn.gate.bias_vl", "layers.0.ffn.gate.weight"))
    left = [f"{prefix}{n}" for n in ("layers.0.ffn.gate.tid2eid", "layers.1.ffn.gate.bias", "layers.0.ffn.gate.weight")]
    assert sorted(without_images(weights)) == sorted(left)
    by_text_alone = dict.fromkeys(f"{prefix}layers.0.ffn.gate.{x}" for x in ("tid2eid", "bias"))
    assert without_images(by_text_alone) == by_text_alone, "a stray bias of a text model is a fault, and shown as one"
    assert is_of_images("image_pad") and not is_of_images("images.weight")
