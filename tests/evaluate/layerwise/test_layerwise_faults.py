"""What is wrong with a folder shows where it is: the damaged layer, the missing head, the tensor's name."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from ds4convert.errors import ConfigError, InputError, InventoryError
from ds4convert.evaluate.layerwise import run_layerwise
from tests import support, support_run
from tests.evaluate.layerwise import whole
from tests.evaluate.layerwise.whole import checkpoint, edit_tensors

SOURCE = checkpoint("tiny-a")
PROMPTS = [list(range(5, 60)), [9, 8, 7, 6]]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("layerwise") / "out"
    support_run.run(SOURCE, out)
    return out


@pytest.fixture
def folder(converted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(converted, tmp_path / "copy"))


def change(folder: Path, name: str, how: Any) -> None:
    edit_tensors(support.shard_with(folder, name), lambda tensors: tensors.update({name: how(tensors[name])}))


def remove(folder: Path, prefix: str) -> None:
    for path in folder.glob("*.safetensors"):
        edit_tensors(path, lambda tensors: [tensors.pop(n) for n in list(tensors) if n.startswith(prefix)])


DAMAGE = [
    ("model.embed_tokens.weight", 0),
    ("model.layers.0.attn.wo_b.scales", 1),
    ("model.layers.2.ffn.switch_mlp.down_proj.scales", 3),
    ("model.layers.3.attn_hc.scale", 4),
    ("mtp.0.ffn.switch_mlp.up_proj.scales", 5),
    ("mtp.0.e_proj.scales", 5),
]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("name", "first"), [pytest.param(*d, marks=[pytest.mark.nightly] * (n % 3 != 1)) for n, d in enumerate(DAMAGE)]
)
def test_damaged_tensor_shows_first_at_its_own_stage(folder: Path, name: str, first: int) -> None:
    """Scales of E8M0 moved up by one double a matrix."""
    change(folder, name, lambda x: x + 1 if x.dtype == mx.uint8 else (x * 1.5).astype(x.dtype))
    result = run_layerwise(folder, PROMPTS, source=SOURCE)
    errors = [stage.relative_rms for stage in result.stages]
    assert all(error < 1e-6 for error in errors[:first])
    assert all(error > 1e-3 for error in errors[first:])
    assert result.divergence is not None and result.head_divergence is not None
    assert (result.divergence.kl_mean > 1e-4) == (first < 5)
    assert result.head_divergence.kl_mean > 1e-5


def test_swapped_experts_show(folder: Path) -> None:
    change(folder, "model.layers.1.ffn.switch_mlp.gate_proj.weight", lambda x: mx.roll(x, 1, axis=0))
    errors = [stage.relative_rms for stage in run_layerwise(folder, PROMPTS, source=SOURCE).stages]
    assert max(errors[:2]) < 1e-6 < 1e-2 < errors[2]


def test_stripped_head_gives_no_head_figures_and_the_reason(folder: Path) -> None:
    remove(folder, "mtp.")
    (folder / support.INDEX).unlink()
    result = run_layerwise(folder, PROMPTS, source=SOURCE)
    assert "stripped" in result.head_reason and result.source_head_reason == ""
    assert result.converted.acceptance is None and result.converted.head_nll is None and result.converted.drafts == 0
    assert result.source is not None and result.source.acceptance is not None
    assert result.head_divergence is None and result.stages[-1].stage == "layer 3"
    assert result.as_json()["converted"]["acceptance"] is None
    other = run_layerwise(SOURCE, PROMPTS, source=folder)
    assert other.converted.acceptance == result.source.acceptance and "stripped" in other.source_head_reason


def test_head_that_the_config_denies_is_not_run(folder: Path) -> None:
    support.edit_json(folder / "config.json", lambda table: table.update(num_nextn_predict_layers=0))
    result = run_layerwise(folder, PROMPTS)
    assert "num_nextn_predict_layers 0" in result.head_reason and result.converted.acceptance is None


def test_dspark_head_is_run_with_the_backbone_and_every_byte_is_counted(tmp_path: Path) -> None:
    from ds4convert.demo import synth

    raw = synth.shrink(support.mini_config(qk_rope_head_dim=32), None, None, "dspark")
    source = support.write_synth(tmp_path / "source", raw)
    seen: list[int] = []
    result = run_layerwise(source, [[1, 2, 3]], progress=seen.append)
    assert result.head_reason == "" and (result.converted.tokens, result.converted.drafts) == (2, 2)
    assert sum(seen) == result.memory.weights


def test_missing_and_misshapen_tensors_are_named_before_anything_is_computed(folder: Path) -> None:
    seen: list[int] = []
    remove(folder, "model.layers.3.ffn.switch_mlp.down_proj.scales")
    (folder / support.INDEX).unlink()
    change_norm = {"model.norm.weight": mx.zeros((5,))}
    edit_tensors(
        next(p for p in folder.glob("*.safetensors") if _holds(p, "model.norm")), lambda t: t.update(change_norm)
    )
    with pytest.raises(InputError) as caught:
        run_layerwise(folder, PROMPTS, progress=seen.append)
    assert "model.layers.3.ffn.switch_mlp.down_proj" in str(caught.value) and not seen


def _holds(path: Path, prefix: str) -> bool:
    return any(name.startswith(prefix) for name in mx.load(str(path)))


def test_missing_expert_of_an_official_folder_is_named(tmp_path: Path) -> None:
    source = Path(shutil.copytree(SOURCE, tmp_path / "source"))
    remove(source, "layers.2.ffn.experts.1.w1.")
    with pytest.raises(InventoryError, match=r"layers\.2\.ffn\.switch_mlp\.gate_proj\.weight: missing"):
        run_layerwise(source, PROMPTS)


def test_truncated_file_is_refused_by_the_tensor_that_is_cut(folder: Path) -> None:
    path = support.shard_with(folder, "model.layers.0.attn.wkv.weight")
    last = max(support.header_of(path).items(), key=lambda item: item[1].get("data_offsets", [0])[0])[0]
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(InputError, match=f"{last}|{path.name}"):
        run_layerwise(folder, PROMPTS)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("name", "blame"),
    [
        ("model.layers.1.attn.kv_norm.weight", r"after model\.layers\.1: model\.layers\.1\.attn\.kv_norm\.weight"),
        (
            "model.layers.2.ffn.switch_mlp.up_proj.scales",
            r"after model\.layers\.2: .*look at scales and routed experts",
        ),
        ("mtp.0.norm.weight", r"after mtp\.0\.norm: mtp\.0\.norm\.weight"),
        ("model.norm.weight", r"after model\.norm: model\.norm\.weight"),
        ("lm_head.weight", r"after lm_head: lm_head\.weight"),
        ("model.embed_tokens.weight", r"after model\.embed_tokens: model\.embed_tokens\.weight"),
    ],
)
def test_stage_that_is_not_finite_is_named(folder: Path, name: str, blame: str) -> None:
    change(folder, name, lambda x: mx.full(x.shape, 255 if x.dtype == mx.uint8 else mx.nan, dtype=x.dtype))
    with pytest.raises(InputError, match=blame):
        run_layerwise(folder, PROMPTS)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "no prompts"),
        ([[1, 2], []], "prompt 2: expected 2 to 2048 tokens, found 0"),
        ([[1]], "prompt 1: expected 2 to 2048 tokens, found 1"),
        ([[1, 384]], "prompt 1: token id 384 is not in the vocabulary of 384"),
        ([[1, -1]], "token id -1"),
    ],
)
def test_prompts_that_give_no_figure_are_refused_by_number(prompts: list[list[int]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run_layerwise(SOURCE, prompts)


def test_prompt_longer_than_the_model_takes_is_refused(folder: Path) -> None:
    support.edit_json(folder / "config.json", lambda table: table.update(max_position_embeddings=50))
    with pytest.raises(InputError, match="prompt 1: expected 2 to 50 tokens, found 55"):
        run_layerwise(folder, PROMPTS)


def test_source_of_another_shape_is_refused_by_key(converted: Path) -> None:
    with pytest.raises(InputError, match=r"vocab_size is 384, but .* in the source"):
        run_layerwise(converted, PROMPTS, source=whole.DEMO)


def test_folder_without_manifest_is_refused_where_one_is_required(converted: Path, tmp_path: Path) -> None:
    run_layerwise(converted, PROMPTS[1:], require_manifest=True)
    with pytest.raises(InputError, match="no ds4convert_manifest"):
        run_layerwise(SOURCE, PROMPTS, require_manifest=True)
    with pytest.raises(ConfigError, match="not found"):
        run_layerwise(tmp_path, PROMPTS)
