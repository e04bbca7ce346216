"""mlx-vlm (0.7.10, models/deepseek_v4) loads a converted DeepSeek-V4 Vision-Exp strictly: its tower, image marks and
router biases with the source's values, its text as without a tower, and its DSpark head, which has no image bias there.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import support_run as s
from tests.checkpoint.families import vision
from tests.support import run

mx = pytest.importorskip("mlx.core")
tree = pytest.importorskip("mlx.utils")
utils = pytest.importorskip("mlx_vlm.utils")
drafters = pytest.importorskip("mlx_vlm.speculative.drafters")

TEXT = s.GOLDEN / "dspark-b" / "checkpoint"


@pytest.fixture(autouse=True)
def processor() -> Iterator[None]:
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    top = tmp_path_factory.mktemp("vision")
    source = vision.with_tower(TEXT, top / "source")
    s.run(source, top / "inline")
    s.run(source, top / "vlm", layout="vlm")
    s.run(TEXT, top / "text")
    return {name: top / name for name in ("source", "inline", "vlm", "text")}


def loaded(folder: Path) -> Any:
    model = utils.load_model(folder)
    model.set_dtype(mx.float32)
    return model


def logits(model: Any, ids: list[int]) -> np.ndarray:
    return np.array(model(mx.array([ids]), cache=model.make_cache()).logits.astype(mx.float32))


def test_the_tower_is_loaded_with_the_source_s_values(folders: dict[str, Path]) -> None:
    model = utils.load_model(folders["inline"])
    held = {
        name: np.array(x.astype(mx.float32))
        for name, x in tree.tree_flatten(model.parameters())
        if "scales" not in name
    }
    source = s.stored(folders["source"])
    for name in vision.tower_shapes(model.config.__dict__):
        assert np.array_equal(held[name.replace(".mlp.", ".ffn.")], s.source_value(source, name)), name
    for name in vision.biases(source):
        if not name.startswith("mtp."):
            own = name.removesuffix(".bias") + (".e_score_correction_bias" if name.endswith(".bias") else "")
            assert np.array_equal(held[f"language_model.model.{own}"], s.source_value(source, name)), name
    features = model.encode_image(mx.ones((6 * 4, 3 * 2 * 2)), 6, 4)
    assert features.shape == (3 * 2, 256) and bool(mx.isfinite(features).all())


def test_mlx_vlm_s_own_converter_writes_the_same_values_under_the_same_names(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """models/deepseek_v4/convert.py, which drops the head: its folder is read here, and holds the source's values."""
    converter = pytest.importorskip("mlx_vlm.models.deepseek_v4.convert")
    source = s.copied(folders["source"], tmp_path / "source")  # it rewrites headers of E8M0 in place
    converter.convert_deepseek_v4_vision(source, tmp_path / "theirs")
    checks = run("verify", tmp_path / "theirs", "--source", folders["source"], "--json").json["checks"]
    wrong = [c["name"] for c in checks if not c["ok"]]
    assert wrong == ["finished", "head"], "no manifest, no head; all values are equal"
    assert "values" in {c["name"] for c in checks}
    theirs = {n.removeprefix("language_model."): v for n, v in s.stored(tmp_path / "theirs").items()}
    ours = {n: v for n, v in s.stored(folders["inline"]).items() if not n.startswith("mtp.")}
    assert theirs.keys() == ours.keys()


@pytest.mark.nightly
def test_text_has_the_logits_of_the_text_model(folders: dict[str, Path]) -> None:
    ids = np.random.default_rng(0).integers(0, 256, 12).tolist()
    wanted = logits(loaded(folders["text"]), ids)
    assert np.array_equal(logits(loaded(folders["inline"]), ids), wanted)  # the backbone of `vlm` has the same bytes


@pytest.mark.parametrize("layout", ["inline", "vlm"])
def test_the_head_is_loaded_as_that_of_the_text_model(layout: str, folders: dict[str, Path]) -> None:
    heads = []
    for folder in (folders[layout] / "mtp" if layout == "vlm" else folders[layout], folders["text"]):
        head, kind = drafters.load_drafter(str(folder))
        assert kind == "dflash"
        heads.append({name: np.array(x.astype(mx.float32)) for name, x in tree.tree_flatten(head.parameters())})
    ours, text = heads
    assert ours.keys() == text.keys() and all(np.array_equal(ours[name], text[name]) for name in ours)
