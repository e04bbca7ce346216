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
