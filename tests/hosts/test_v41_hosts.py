"""mlx-vlm (0.7.10, models/deepseek_v41) loads DeepSeek-V4.1 as it was converted: strictly, packed, with equal logits.

Its engram rows are read through `OffloadedEngramEmbedding` (engram.py), which looks for a packed table under its own
path in the index; `mtp.*` is dropped by `Model.sanitize`. It rounds inputs of matrices to FP8, as the official kernels
do: where such a rounding falls on another side, a whole position differs, in the official folder just the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import support_run as s

mx = pytest.importorskip("mlx.core")
tree = pytest.importorskip("mlx.utils")
vlm = pytest.importorskip("mlx_vlm.utils")

pytestmark = pytest.mark.slow
GOLDEN = s.GOLDEN / "tiny-v41-a"
SOURCE = GOLDEN / "checkpoint"
TOLERANCE = 1e-4
LAYOUTS = ("inline", "vlm")


@pytest.fixture(autouse=True)
def processor() -> Iterator[None]:
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


def loaded(folder: Path) -> Any:
    """The model in float32, as the CPU has no other product of gathered matrices."""
    model = vlm.load_model(folder)
    model.set_dtype(mx.float32)
    return model


def logits(model: Any, prompt: int) -> np.ndarray:
    ids = mx.load(str(GOLDEN / "golden.safetensors"))
    whole = mx.concatenate([ids[f"p{prompt}.input_ids"], ids[f"p{prompt}.greedy_ids"][:24]])
    return np.array(model(whole[None], cache=model.make_cache()).logits.astype(mx.float32))[0]


def flipped(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The positions that differ by more than the tolerance."""
    return np.nonzero(np.abs(found - wanted).max(-1) > TOLERANCE)[0]


@pytest.fixture(scope="module")
def official() -> list[np.ndarray]:
    model = loaded(SOURCE)
    return [logits(model, n) for n in range(3)]


@pytest.mark.sampled(1)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_converted_folder_stays_packed_and_gives_the_official_folder_s_logits(
    layout: str, official: list[np.ndarray], tmp_path: Path
) -> None:
    s.run(SOURCE, tmp_path / "mlx", layout=layout)
    model = loaded(tmp_path / "mlx")
    packed = {n for n, v in tree.tree_flatten(model.parameters()) if n.endswith(".weight") and v.dtype == mx.uint32}
    assert len(packed) == 11 * 8 + 3 + 2 + 2  # per layer; index sources; engram projections; engram tables
    for n, wanted in enumerate(official):
        found = logits(model, n)
        assert np.median(np.abs(found - wanted)) < 1e-6
        # In p2 an input rounds to the other side at position 73; those that read it differ, too.
        assert len(flipped(found, wanted)) <= (0 if n < 2 else len(found) // 2), n
        assert (found.argmax(-1) == wanted.argmax(-1)).mean() > 0.99


def test_the_logits_are_the_golden_ones_of_rounded_inputs_but_for_roundings_that_flip(
    official: list[np.ndarray],
) -> None:
    golden = mx.load(str(GOLDEN / "golden_act.safetensors"))
    for n, found in enumerate(official):
        wanted = np.array(golden[f"p{n}.all.logits_tail"]).astype(np.float32)  # stored in half precision
        assert np.median(np.abs(found[-len(wanted) :] - wanted)) < 3e-3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lossy_folders_load_strictly_with_packed_tables_and_a_dense_output_matrix(layout: str, tmp_path: Path) -> None:
    recipe = tmp_path / "q2.toml"  # as q2, and the tower, too
    recipe.write_text((s.ROOT / "manifests/recipes/q2.toml").read_text() + "\n", "utf-8")
    recipe.write_text(recipe.read_text().replace("[formats]\n", '[formats]\nvision = "affine-8-g32"\n'), "utf-8")
    s.run(SOURCE, tmp_path / "mlx", layout=layout, recipe=str(recipe), rounding="nearest")
    model = loaded(tmp_path / "mlx")
    assert np.isfinite(logits(model, 0)).all()
    shapes = {n: v.dtype for n, v in tree.tree_flatten(model.parameters()) if n.endswith(".weight")}
    assert shapes["language_model.embed_tokens.weight"] == shapes["vision.blocks.0.attn.wqkv.weight"] == mx.uint32
    assert shapes["language_model.head.weight"] == mx.float32  # ParallelHead (language.py) cannot be packed


def test_a_changed_byte_of_a_mapped_table_shows_in_the_logits(official: list[np.ndarray], tmp_path: Path) -> None:
    """The comparison above can fail: what the host maps is what we wrote."""
    s.run(SOURCE, tmp_path / "mlx", layout="vlm")
    t = s.stored(tmp_path / "mlx")["language_model.layers.1.engram.embed.weight"]
    data = bytearray(t.path.read_bytes())
    data[t.start : t.start + t.shape[0] * t.shape[1] * 4] = bytes(t.shape[0] * t.shape[1] * 4)
    t.path.write_bytes(data)
    assert len(flipped(logits(loaded(tmp_path / "mlx"), 0), official[0]))
