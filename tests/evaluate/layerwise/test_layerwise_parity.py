"""One layer at a time gives the numbers of the whole model, and of the official code's golden data."""

from __future__ import annotations

import json
import math
from pathlib import Path

import mlx.core as mx
import pytest

from ds4convert.evaluate import layerwise, walk
from ds4convert.evaluate.layerwise import run_layerwise
from ds4convert.evaluate.stages import attending
from ds4convert.evaluate.walk import Walk
from ds4convert.inference.deepseek_v4.attention import Keys, attend
from tests import support, support_run
from tests.evaluate.layerwise import whole
from tests.evaluate.layerwise.whole import DEMO, checkpoint, max_diff, run_whole

NAMES = ("tiny-a", "tiny-b")
TOLERANCE = 2e-4


def through(folder: Path, prompts: list[list[int]]) -> tuple[Walk, list[list[mx.array]], list[mx.array]]:
    """A finished walk in float32, the streams after embedding and each layer, and those of the head."""
    run = Walk(folder, mx.float32)
    run.embed([mx.array(prompt)[None] for prompt in prompts])
    stages = [list(run.streams)]
    for number in range(run.args.num_hidden_layers):
        run.pass_layer(number)
        stages.append(list(run.streams))
    if run.head.present:
        run.pass_head()
    return run, stages, run.head_streams


def check_against_whole(folder: Path, prompts: list[list[int]], tolerance: float = TOLERANCE) -> None:
    run, stages, head = through(folder, prompts)
    for n, prompt in enumerate(prompts):
        expected = run_whole(folder, prompt)
        for found, wanted in zip([stage[n] for stage in stages], expected.hidden, strict=True):
            assert max_diff(found, wanted) <= tolerance
        assert max_diff(run.logits(run.collapsed[n]), expected.logits) <= tolerance
        assert max_diff(head[n], expected.head_hidden) <= tolerance
        assert max_diff(run.logits(run.head_collapsed[n]), expected.head_logits) <= tolerance


@pytest.mark.parametrize("name", support.nightly(NAMES, lambda name: name == "tiny-a"))
def test_every_stage_equals_the_whole_model(name: str) -> None:
    check_against_whole(checkpoint(name), whole.golden_prompts(name, 3))


@pytest.mark.nightly
def test_small_chunks_of_positions_experts_and_vocabulary_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk, "PASS_TOKENS", 37)
    monkeypatch.setattr(walk, "CHUNK_WEIGHTS", 1)
    monkeypatch.setattr(walk, "OUTPUT_WEIGHTS", 256 * 100)
    check_against_whole(checkpoint("tiny-a"), whole.golden_prompts("tiny-a"))
    with monkeypatch.context() as patch:
        patch.setattr(layerwise, "LOGIT_FLOATS", 384 * 7)
        small = run_layerwise(checkpoint("tiny-a"), whole.golden_prompts("tiny-a"))
    large = run_layerwise(checkpoint("tiny-a"), whole.golden_prompts("tiny-a"))
    assert small.converted.nll == pytest.approx(large.converted.nll, abs=1e-5)
    assert small.converted.accepted == large.converted.accepted


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", NAMES)
def test_every_stage_equals_the_official_code(name: str) -> None:
    data, prompts = whole.golden(name), whole.golden_prompts(name, 3)
    run, stages, _ = through(checkpoint(name), prompts)
    for n in range(len(prompts)):
        last = mx.stack([stage[n][0, -1] for stage in stages])
        assert max_diff(last, data[f"p{n}.layer_hidden_last"]) <= 3e-4
        assert max_diff(run.logits(run.collapsed[n]), data[f"p{n}.logits"]) <= TOLERANCE
        drafts = data[f"p{n}.mtp_logits"][: len(prompts[n]) - 1]
        assert max_diff(run.logits(run.head_collapsed[n]), drafts) <= TOLERANCE


def test_figures_equal_a_direct_computation() -> None:
    prompts = whole.demo_prompts()
    result = run_layerwise(DEMO, prompts)
    nll, head_nll, accepted, drafts = [], [], 0, 0
    for prompt, figures in zip(prompts, result.prompts, strict=True):
        expected = run_whole(DEMO, prompt)
        rows = expected.logits - mx.logsumexp(expected.logits, axis=-1, keepdims=True)
        mine = [-float(rows[t, prompt[t + 1]]) for t in range(len(prompt) - 1)]
        predicted, drafted = expected.logits.argmax(axis=-1).tolist(), expected.head_logits.argmax(axis=-1).tolist()
        rows = expected.head_logits - mx.logsumexp(expected.head_logits, axis=-1, keepdims=True)
        head_nll += [-float(rows[t, prompt[t + 2]]) for t in range(len(prompt) - 2)]
        own = sum(drafted[t] == predicted[t + 1] for t in range(len(prompt) - 1))
        assert figures.tokens == len(mine) and figures.accepted == own and figures.drafts == len(prompt) - 1
        assert figures.perplexity == pytest.approx(math.exp(sum(mine) / len(mine)), rel=1e-4)
        nll, accepted, drafts = nll + mine, accepted + own, drafts + len(prompt) - 1
    assert result.converted.perplexity == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-4)
    assert result.converted.head_nll == pytest.approx(sum(head_nll) / len(head_nll), abs=1e-4)
    assert result.converted.acceptance == accepted / drafts > 0.5
    assert result.converted.perplexity < 30, "the demo's text is no riddle to the demo"
    assert result.source is None and result.stages == () and result.divergence is None


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "layout",
    support.nightly(["inline", "mlx-lm", "mtplx", "universal", "vlm"], lambda layout: layout != "universal"),
)
def test_native_conversion_of_each_layout_equals_its_source(tmp_path: Path, layout: str) -> None:
    support_run.run(checkpoint("tiny-a"), tmp_path / "out", layout=layout)
    result = run_layerwise(tmp_path / "out", whole.golden_prompts("tiny-a"), source=checkpoint("tiny-a"))
    names = ["embedding", "layer 0", "layer 1", "layer 2", "layer 3", "head"]
    assert [stage.stage for stage in result.stages] == names
    assert all(stage.relative_rms < 1e-6 for stage in result.stages)
    for found in (result.divergence, result.head_divergence):
        assert found is not None and found.same_argmax == found.positions
        assert abs(found.kl_mean) < 1e-9 and abs(found.kl_median) < 1e-9
    assert result.source == result.converted


@pytest.mark.sampled(1)
@pytest.mark.parametrize("recipe", ["native", "bf16"])
def test_demo_in_each_recipe_equals_its_source(tmp_path: Path, recipe: str) -> None:
    support_run.run(DEMO, tmp_path / "out", recipe=recipe)
    result = run_layerwise(tmp_path / "out", whole.demo_prompts(), source=DEMO)
    assert max(stage.relative_rms for stage in result.stages) < 1e-6
    assert result.divergence is not None and abs(result.divergence.kl_mean) < 1e-9


def test_partial_tiles_and_every_kind_of_layer_are_read(tmp_path: Path) -> None:
    source = support.write_synth(tmp_path / "source", support.mini_config(qk_rope_head_dim=32))
    prompt = [(7 * n) % 48 for n in range(150)]
    support_run.run(source, tmp_path / "out")
    result = run_layerwise(tmp_path / "out", [prompt], source=source)
    assert max(stage.relative_rms for stage in result.stages) < 1e-6
    assert result.head_divergence is not None


RECIPES = [
    {"group_size": 32, "bits": 8, "mode": "affine"},
    {"group_size": 16, "bits": 4, "mode": "nvfp4"},
    {"group_size": 32, "bits": 8, "mode": "mxfp8"},
]


@pytest.mark.nightly
@pytest.mark.parametrize(
    "recipe",
    support.nightly(RECIPES, lambda recipe: recipe["mode"] != "affine"),
    ids=lambda recipe: f"{recipe['mode']}-{recipe['bits']}",
)
def test_requantized_folder_equals_its_whole_model_and_differs_from_the_source(tmp_path: Path, recipe: dict) -> None:
    folder = whole.requantized(checkpoint("tiny-a"), tmp_path / "out", **recipe)
    prompts = [prompt[:90] for prompt in whole.golden_prompts("tiny-a")]
    check_against_whole(folder, prompts, 5e-4)
    result = run_layerwise(folder, prompts, source=checkpoint("tiny-a"))
    errors = [stage.relative_rms for stage in result.stages]
    assert 0 < errors[0] < errors[-2] < 1.5 and result.divergence is not None
    ours, theirs = (mx.concatenate([run_whole(f, p).logits for p in prompts]) for f in (folder, checkpoint("tiny-a")))
    p, q = (x - mx.logsumexp(x, axis=-1, keepdims=True) for x in (theirs, ours))
    kl = (mx.exp(p) * (p - q)).sum(axis=-1)
    assert result.divergence.kl_mean == pytest.approx(float(kl.mean()), rel=1e-2)
    assert result.divergence.kl_max == pytest.approx(float(kl.max()), rel=1e-2)
    assert result.divergence.same_argmax == int((p.argmax(axis=-1) == q.argmax(axis=-1)).sum())


def test_dense_folder_can_be_the_source(tmp_path: Path) -> None:
    dense = whole.requantized(checkpoint("tiny-b"), tmp_path / "dense", dense=True)
    result = run_layerwise(checkpoint("tiny-b"), whole.golden_prompts("tiny-b"), source=dense)
    assert max(stage.relative_rms for stage in result.stages) < 1e-6


def test_bfloat16_stays_near_float32() -> None:
    prompts = whole.demo_prompts()
    wide, narrow = (run_layerwise(DEMO, prompts, dtype=dtype).converted for dtype in ("float32", "bfloat16"))
    assert narrow.nll == pytest.approx(wide.nll, abs=0.05) and narrow.nll != wide.nll
    assert abs(narrow.accepted - wide.accepted) <= 5


def test_result_is_json_and_progress_adds_up() -> None:
    seen: list[int] = []
    result = run_layerwise(DEMO, whole.demo_prompts(), source=DEMO, progress=seen.append)
    assert sum(seen) == layerwise.work_bytes(DEMO, DEMO) == 2 * result.memory.weights
    table = json.loads(json.dumps(result.as_json(), allow_nan=False))
    assert table["converted"]["acceptance"] == result.converted.acceptance
    assert table["prompts"][2]["perplexity"] == result.prompts[2].perplexity
    assert table["stages"][0] == {"stage": "embedding", "relative_rms": 0.0}
    assert table["divergence"]["kl_mean"] == 0 and table["memory"]["peak_rss"] > 10**7
    assert 0 < result.memory.largest_layer < result.memory.weights < result.memory.peak_rss
    small = run_layerwise(DEMO, [[1, 2]])
    assert small.prompts[0].head_nll is None and small.converted.drafts == 1


@pytest.mark.parametrize("own", [False, True], ids=["shared keys", "keys of each row"])
def test_attention_multiplied_by_numpy_is_that_of_the_model(own: bool) -> None:
    """With a window, compressed entries, masks, and sinks large enough to matter."""
    mx.random.seed(3)
    queries, sink = mx.random.normal((2, 7, 3, 16)), mx.array([0.5, -1.0, 2.0])
    near = Keys(mx.random.normal((2, 9, 16)), mx.arange(9) <= mx.arange(7)[:, None] + 1)
    shape = (2, 7, 5, 16) if own else (2, 5, 16)
    far = Keys(mx.random.normal(shape), mx.arange(5) < mx.arange(7)[:, None])  # the first row sees none of these
    found, wanted = (how(queries, [near, far], sink) for how in (attending.attend, attend))
    assert found.shape == wanted.shape and max_diff(found, wanted) <= 1e-6
    assert max_diff(attending.attend(queries, [near], sink), wanted) > 1e-2
