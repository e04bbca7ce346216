"""Folders of every layout, loaded strictly by the programs that read them: mlx-vlm, its drafters, and MTPLX's classes.

What a host holds after loading is compared with the source's values (decoded by `support_run`), so a parameter left at
its random start shows. `HOSTS` says what loads; a layout file that names another host or layout fails the first test.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ds4convert.planning.layouts import layouts
from tests import support_run as s

mx = pytest.importorskip("mlx.core")
utils = pytest.importorskip("mlx.utils")

# layout -> host -> how its head is loaded: "" (backbone only), "own" (by the folder itself), a drafter folder
HOSTS: dict[str, dict[str, str]] = {
    "inline": {"mlx-vlm": "."},
    "universal": {"mlx-vlm": "mtp", "MTPLX": "own"},
    "mtplx": {"mlx-vlm": "", "MTPLX": "own"},
    "vlm": {"mlx-vlm": "mtp"},
    "mlx-lm": {},
    "omlx": {},
}
INSTALLABLE = {"mlx-vlm", "MTPLX"}
TINY_CONFIGS: dict[str, dict[str, Any]] = {
    "one-hash-layer": {},
    "ratio-128-first": {"compress_ratios": [128, 4, 0, 4, 0], "num_hash_layers": 2},
}


def sources() -> list[str]:
    return [*(p.parent.name for p in s.CHECKPOINTS), *TINY_CONFIGS]


@pytest.fixture(scope="module", params=sources())
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param in TINY_CONFIGS:
        return s.tiny(tmp_path_factory.mktemp("source") / request.param, **TINY_CONFIGS[request.param])
    return s.GOLDEN / request.param / "checkpoint"


@pytest.fixture(scope="module")
def wanted(source: Path) -> dict[str, np.ndarray]:
    return s.expected_values(source)


@pytest.fixture(scope="module")
def dspark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return s.tiny(tmp_path_factory.mktemp("dspark") / "source", head="dspark")


def seen(model: Any) -> dict[str, np.ndarray]:
    """Return the values of all parameters of a loaded model by path, quantized modules dequantized as they are set."""
    out = {}
    modules = dict(model.named_modules())
    flat = dict(utils.tree_flatten(model.parameters()))
    for path, array in flat.items():
        if path.endswith((".scales", ".biases")):
            continue
        stem, _, last = path.rpartition(".")
        if last == "weight" and f"{stem}.scales" in flat:
            m = modules[stem]
            biases = flat.get(f"{stem}.biases")
            array = mx.dequantize(array, flat[f"{stem}.scales"], biases, m.group_size, m.bits, m.mode, dtype=mx.float32)
        if array.dtype == mx.bfloat16:
            array = array.astype(mx.float32)
        out[path] = np.array(array)
    return out


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], unused: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    """Assert that a host holds exactly `expected`; `wo_a`, which some hosts keep in three dimensions, in any shape."""
    assert set(found) == set(expected) - unused
    for path, value in found.items():
        want = expected[path].reshape(value.shape) if ".wo_a." in path else expected[path]
        assert value.shape == want.shape and np.array_equal(value, want), path


def backbone(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {k: v for k, v in values.items() if not k.startswith("mtp.")}


def drafter(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return a classic head's values under the names of mlx-vlm's drafter class."""
    out = {}
    for path, value in values.items():
        if path.startswith("mtp.0."):
            tail = path.removeprefix("mtp.0.")
            block = tail.startswith(("attn", "ffn"))
            out[f"decoder.{tail}" if block else tail] = value
    return out


def dspark_drafter(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return a DSpark head's values under the names of mlx-vlm's drafter class, which has no confidence head."""
    out = {}
    for path, value in values.items():
        if path.startswith("mtp.") and "confidence_head" not in path:
            stage, _, tail = path.removeprefix("mtp.").partition(".")
            out[tail if tail.startswith("markov_head.") else f"stages.{stage}.{tail}"] = value
    return out


def mtplx_model(folder: Path) -> Any:
    classes = pytest.importorskip("mtplx.models.deepseek_v4")
    from mlx_lm.utils import load_model

    return load_model(folder, get_model_classes=lambda config: (classes.Model, classes.ModelArgs))[0]


def vlm_model(folder: Path) -> Any:
    return pytest.importorskip("mlx_vlm.utils").load_model(folder)


def vlm_drafter(folder: Path) -> tuple[Any, str]:
    return pytest.importorskip("mlx_vlm.speculative.drafters").load_drafter(str(folder))


def test_the_layout_files_name_the_hosts_that_are_tried_here() -> None:
    assert set(layouts()) == set(HOSTS)
    for name, layout in layouts().items():
        stated = {h.name: h.mtp for h in layout.hosts if h.name in INSTALLABLE}
        assert set(stated) == set(HOSTS[name]), name
        for host, head in HOSTS[name].items():
            assert bool(stated[host]) == bool(head), (name, host)
            if head == "mtp":
                assert stated[host].endswith("DIR/mtp")


@pytest.mark.sampled(3)
@pytest.mark.parametrize("recipe", ["native", "bf16"])
@pytest.mark.parametrize("layout", [n for n, h in HOSTS.items() if "mlx-vlm" in h])
def test_mlx_vlm_loads_backbone_and_drafter_with_the_source_values(
    source: Path, wanted: dict[str, np.ndarray], layout: str, recipe: str, tmp_path: Path
) -> None:
    out = tmp_path / "mlx"
    s.run(source, out, layout=layout, recipe=recipe)
    found = {k.removeprefix("language_model."): v for k, v in seen(vlm_model(out)).items()}
    assert_same(found, backbone(wanted))
    head = HOSTS[layout]["mlx-vlm"]
    if head:
        model, kind = vlm_drafter(out / head)
        assert kind == "mtp" and model.config.block_size == 2 and model.config.runtime_block_size == 2
        assert_same(seen(model), drafter(wanted))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("recipe", ["native", "bf16"])
@pytest.mark.parametrize("layout", [n for n, h in HOSTS.items() if "MTPLX" in h])
def test_mtplx_loads_backbone_and_head_with_the_source_values(
    source: Path, wanted: dict[str, np.ndarray], layout: str, recipe: str, tmp_path: Path
) -> None:
    out = tmp_path / "mlx"
    s.run(source, out, layout=layout, recipe=recipe)
    model = mtplx_model(out)
    assert model.has_mtp
    assert_same(seen(model), wanted)


def test_a_wrong_byte_in_the_head_shows_in_what_the_host_holds(tmp_path: Path) -> None:
    """The comparison above can fail: a change of one weight of the head is seen."""
    source = s.CHECKPOINTS[0]
    out = tmp_path / "mlx"
    s.run(source, out)
    t = s.stored(out)["mtp.0.enorm.weight"]
    s.flip(t.path, t.start, 6)
    with pytest.raises(AssertionError, match="enorm"):
        assert_same(seen(vlm_drafter(out)[0]), drafter(s.expected_values(source)))


@pytest.mark.parametrize("layout", ["inline", "vlm"])
@pytest.mark.parametrize("recipe", ["native", "bf16"])
def test_mlx_vlm_loads_a_dspark_drafter_with_the_source_values(
    dspark: Path, layout: str, recipe: str, tmp_path: Path
) -> None:
    out = tmp_path / "mlx"
    s.run(dspark, out, layout=layout, recipe=recipe)
    values = s.expected_values(dspark)
    found = {k.removeprefix("language_model."): v for k, v in seen(vlm_model(out)).items()}
    assert_same(found, backbone(values))
    model, kind = vlm_drafter(out / "mtp" if layout == "vlm" else out)
    raw = json.loads((dspark / "config.json").read_text())
    assert kind == "dflash" and model.config.target_layer_ids == raw["dspark_target_layer_ids"]
    assert model.config.mask_token_id == raw["dspark_noise_token_id"]
    assert model.config.markov_rank == raw["dspark_markov_rank"]
    assert model.config.block_size == raw["dspark_block_size"] + 1
    assert_same(seen(model), dspark_drafter(values))


def test_the_confidence_head_of_a_dspark_drafter_is_kept(dspark: Path, tmp_path: Path) -> None:
    for layout in ("inline", "vlm"):
        out = tmp_path / layout
        s.run(dspark, out, layout=layout)
        below = out / "mtp" if layout == "vlm" else out
        name = next(n for n in s.stored(below) if n.endswith("confidence_head.proj.weight"))
        want = s.source_value(s.stored(dspark), "mtp.2.confidence_head.proj.weight")
        assert np.array_equal(s.source_value(s.stored(below), name), want)


@pytest.mark.parametrize("layout", sorted(n for n in HOSTS if not layouts()[n].named_only))
def test_a_folder_without_its_head_loads_and_promises_none(layout: str, tmp_path: Path) -> None:
    source, out = s.CHECKPOINTS[0], tmp_path / "mlx"
    s.run(source, out, layout=layout, keep_mtp=False)
    assert json.loads((out / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert not (out / "mtp").exists() and not any(n.startswith("mtp.") for n in s.stored(out))
    values = backbone(s.expected_values(source))
    if "MTPLX" in HOSTS[layout]:
        model = mtplx_model(out)
        assert not model.has_mtp
        assert_same(seen(model), values)
    if "mlx-vlm" in HOSTS[layout]:
        assert_same({k.removeprefix("language_model."): v for k, v in seen(vlm_model(out)).items()}, values)


def test_several_shards_load_like_one(tmp_path: Path) -> None:
    source, out = s.tiny(tmp_path / "source"), tmp_path / "mlx"
    s.run(source, out, layout="universal", max_shard_bytes=1_000_000)
    assert len(list(out.glob("model-0*.safetensors"))) > 3
    values = s.expected_values(source)
    assert_same(seen(mtplx_model(out)), values)
    assert_same({k.removeprefix("language_model."): v for k, v in seen(vlm_model(out)).items()}, backbone(values))
    assert_same(seen(vlm_drafter(out / "mtp")[0]), drafter(values))


def test_mtplx_counts_the_stored_head_of_its_layouts_as_present(tmp_path: Path) -> None:
    artifacts = pytest.importorskip("mtplx.artifacts")
    for layout in ("universal", "mtplx"):
        out = tmp_path / layout
        s.run(s.CHECKPOINTS[0], out, layout=layout)
        assert artifacts.mtp_weights_present_on_disk(out)


TOLERANCE = 2e-4
"""Largest difference of logits in fp32 (golden/README.md, "Tolerances"); typical mistakes change them by 0.4."""


def logits_agree(found: Any, reference: np.ndarray) -> None:
    values = np.array(found)[0]
    assert found.dtype == mx.float32 and values.shape == reference.shape
    assert np.abs(values - reference).max() < TOLERANCE
    assert np.array_equal(values.argmax(-1), reference.argmax(-1))


@pytest.fixture(scope="module", params=s.CHECKPOINTS, ids=lambda p: p.parent.name)
def golden(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, np.ndarray]]:
    out = tmp_path_factory.mktemp("golden") / "mlx"
    s.run(request.param, out, layout="universal")
    table = {t.name: t.raw() for t in s.stored(request.param.parent, "golden.safetensors").values()}
    return out, table


@pytest.mark.sampled(1)
@pytest.mark.slow
def test_hosts_give_the_reference_logits_of_backbone_and_head(golden: tuple[Path, dict[str, np.ndarray]]) -> None:
    """One-shot prefill with a cache; weights as stored, activations in fp32, as the reference has it."""
    folder, table = golden
    ids, after = mx.array(table["p1.input_ids"])[None], mx.array(table["p1.mtp_input_ids"])[None]
    model = mtplx_model(folder)
    model.set_dtype(mx.float32)
    logits, hidden = model(ids, cache=model.make_cache(), return_hidden=True)
    logits_agree(logits, table["p1.logits"])
    logits_agree(model.mtp_forward(hidden, after, mtp_cache=model.make_mtp_cache()), table["p1.mtp_logits"])
    draft = vlm_drafter(folder / "mtp")[0]
    draft.set_dtype(mx.float32)
    normed, _ = draft._forward_hidden(model.model.embed_tokens(after), hidden, after, draft.make_cache())
    logits_agree(model.lm_head(normed), table["p1.mtp_logits"])
    language = vlm_model(folder).language_model
    language.set_dtype(mx.float32)
    logits_agree(language(ids, cache=language.make_cache()).logits, table["p1.logits"])
