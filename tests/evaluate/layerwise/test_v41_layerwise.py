"""DeepSeek-V4.1 one layer at a time: the numbers of the whole model, its head's too."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

from ds4convert.errors import InputError
from ds4convert.evaluate import input_moments
from ds4convert.evaluate.decode_runs import Prompt
from ds4convert.evaluate.forced import backbone_passes, teacher_forced
from ds4convert.evaluate.layerwise import run_layerwise
from ds4convert.evaluate.walk import Walk
from tests.inference.golden_v41 import SOURCE, ids, model

TEXTS = [ids("p0"), ids("p1")]


def test_figures_are_those_of_the_whole_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """In passes of 16 positions, so that what layers hand on is handed on for each."""
    monkeypatch.setattr("ds4convert.evaluate.walk.PASS_TOKENS", 16)
    found = run_layerwise(SOURCE, TEXTS)
    passes = backbone_passes(model(), [Prompt(str(n), tuple(text)) for n, text in enumerate(TEXTS)])
    forced = teacher_forced(model(), passes)
    assert found.converted.acceptance == pytest.approx(forced.agreement)
    assert found.converted.drafts == forced.positions and found.converted.acceptance > 0.1
    total = 0.0
    for passed in passes:
        rows = passed.logits[:-1] - mx.logsumexp(passed.logits[:-1], axis=-1, keepdims=True)
        total -= mx.take_along_axis(rows, mx.array(passed.prompt.ids[1:])[:, None], axis=-1).sum().item()
    assert found.converted.nll == pytest.approx(total / sum(len(text) - 1 for text in TEXTS), abs=1e-5)


def test_streams_after_each_layer_are_those_of_the_whole_model() -> None:
    states: dict[int, mx.array] = {}
    model()(mx.array([TEXTS[1]]), trace=lambda kind, n, x: states.update({n: x}) if kind == "hidden" else None)
    walk = Walk(SOURCE, mx.float32)
    walk.embed([mx.array([TEXTS[1]])])
    for number in range(walk.args.num_hidden_layers):
        walk.pass_layer(number)
        assert mx.abs(walk.streams[0] - states[number + 1]).max().item() < 1e-4


def test_calibration_collects_what_goes_into_every_matrix_of_both_parts() -> None:
    text = TEXTS[1][:20]
    found, m = input_moments.collect(SOURCE, [text]), model().args
    for layer in m.engram_layer_ids:
        assert found[f"model.layers.{layer}.engram.wkv"].rows == len(text)
    for layer in m.index_source_layer_ids:
        assert found[f"model.layers.{layer}.attn.indexer.wq_b"].rows == len(text)
    assert found["model.layers.0.ffn.switch_mlp.up_proj"].rows.shape == (m.n_routed_experts,)
    assert found["mtp.0.ffn.switch_mlp.up_proj"].rows.shape == (m.dspark_n_routed_experts,)


def test_trials_of_single_matrices_are_refused(tmp_path: Path) -> None:
    walk = Walk(SOURCE, mx.float32)
    with pytest.raises(InputError, match="layers hand on"):
        walk.trial(0, "model.layers.0.attn.wq_a", lambda x: x, [])
