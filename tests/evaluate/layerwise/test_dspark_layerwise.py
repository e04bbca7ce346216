"""A DSpark head one stage at a time: the numbers of the whole model."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest

from ds4convert.evaluate import input_moments
from ds4convert.evaluate.decode_runs import Prompt
from ds4convert.evaluate.forced import backbone_passes, teacher_forced
from ds4convert.evaluate.layerwise import run_layerwise
from ds4convert.inference.load import load_model
from tests.support import ROOT, run

GOLDEN = ROOT / "tests" / "golden"
NAMES = ("dspark-a", "dspark-b")


def prompts(name: str) -> list[list[int]]:
    data = mx.load(str(GOLDEN / name / "golden.safetensors"))
    return [data[f"p{i}.input_ids"].tolist()[:70] for i in range(3)]  # type: ignore[union-attr]


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", NAMES)
def test_layerwise_figures_of_the_head_are_those_of_the_whole_model(name: str) -> None:
    folder = GOLDEN / name / "checkpoint"
    found = run_layerwise(folder, prompts(name))
    model, _ = load_model(folder, dtype="float32", dense=True, require_manifest=False)
    passes = backbone_passes(model, [Prompt(str(n), tuple(ids)) for n, ids in enumerate(prompts(name))])
    forced = teacher_forced(model, passes)
    assert found.converted.acceptance == pytest.approx(forced.agreement)
    assert found.converted.drafts == forced.positions and found.converted.acceptance > 0.3


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", NAMES)
def test_the_head_of_a_lossless_folder_is_at_no_distance_from_its_source(name: str, tmp_path: Path) -> None:
    source, out = GOLDEN / name / "checkpoint", tmp_path / "out"
    assert run("quantize", source, out, "-q").code == 0
    (tmp_path / "prompts.txt").write_text("\n".join(json.dumps(ids) for ids in prompts(name)))
    words = ("verify", out, "--source", source, "--layerwise", "--prompts", tmp_path / "prompts.txt", "--json")
    figures = run(*words).json["layerwise"]
    assert figures["stages"][-1]["stage"] == "head" and figures["stages"][-1]["relative_rms"] < 1e-5
    assert figures["head_divergence"]["kl_max"] < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_calibration_collects_what_goes_into_every_matrix_of_the_head(name: str) -> None:
    found = input_moments.collect(GOLDEN / name / "checkpoint", prompts(name)[1:2])
    own = {path for path in found if path.startswith("mtp.")}
    stages = json.loads((GOLDEN / name / "checkpoint/config.json").read_text())
    count = len(stages["compress_ratios"]) - stages["num_hidden_layers"]
    assert "mtp.0.main_proj" in own
    for stage in range(count):
        for part in ("attn.wq_a", "attn.wkv", "ffn.switch_mlp.gate_proj", "ffn.shared_experts.down_proj"):
            assert found[f"mtp.{stage}.{part}"].rows.sum() > 0
    rows = found["mtp.0.attn.wkv"].rows
    length, slots = len(prompts(name)[1]), stages["dspark_block_size"]
    assert rows == length + (length - 1) * slots, "context keys and slots"
