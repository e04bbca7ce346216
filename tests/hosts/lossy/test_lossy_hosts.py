"""Folders of every recipe and number format, on the demo checkpoint: they load and decode in our runtime, in stock
mlx-lm with the model file, and in mlx-vlm, and hold the values that their bytes mean.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ds4convert.planning.recipes import recipes
from tests import support_run as s
from tests.hosts.test_hosts import seen, vlm_drafter, vlm_model
from tests.support import nightly, run

mx = pytest.importorskip("mlx.core")
nn = pytest.importorskip("mlx.nn")
mlx_lm = pytest.importorskip("mlx_lm")

DEMO = s.ROOT / "manifests" / "demo"
PROMPT = "And the king of Israel said unto the servants"
MIXES: dict[str, dict[str, Any]] = {
    "q8": {"recipe": "q8"},
    "q6": {"recipe": "q6"},
    "q4": {"recipe": "q4"},
    "q3": {"recipe": "q3"},
    "q2": {"recipe": "q2"},
    "nvfp4": {"formats": ("nvfp4", None, "mxfp8")},
    "mxfp8": {"formats": ("mxfp8", None, "nvfp4")},
    "mxfp4": {"formats": ("mxfp4", None, "affine-5-g32")},
    "affine": {"formats": ("affine-4-g32", "affine-3-g128", "affine-6-g64")},
    "low head": {"recipe": "q4", "formats": (None, None, "affine-2-g64")},
}
"""What is tried, by a name; `formats` are those of backbone, experts and head where they are not the recipe's."""

LOGIT_TOLERANCE = 2e-4
"""Largest difference of logits of two programs in float32, which order their sums differently."""


@dataclass(frozen=True)
class Case:
    """A conversion of the demo checkpoint, in layout mlx-lm, and what made it."""

    made_by: dict[str, Any]
    folder: Path

    def in_layout(self, layout: str) -> Path:
        """Return the same conversion in another layout, made once."""
        out = self.folder.parent / layout
        if not out.exists():
            s.run(DEMO, out, layout=layout, **self.made_by)
        return out

    @property
    def has_native_head(self) -> bool:
        return "formats" not in self.made_by


REPETITIONS = {"q8", "q6", "q3", "q2", "nvfp4", "mxfp8"}
"""Their kinds of numbers are in the others, too."""


CASES = pytest.mark.parametrize("case", nightly(MIXES, lambda name: name in REPETITIONS), indirect=True)


@pytest.fixture(scope="module", params=MIXES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    out = tmp_path_factory.mktemp("lossy") / "mlx-lm"
    s.run(DEMO, out, layout="mlx-lm", **MIXES[request.param])
    return Case(MIXES[request.param], out)


def table_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text()).get("quantization") or {}


def stored_values(folder: Path) -> dict[str, np.ndarray]:
    """Return what the bytes of a folder mean by its own quantization table, by tensor name, in float32."""
    arrays: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        arrays |= mx.load(str(path))
    table, out = table_of(folder), {}
    for name, array in arrays.items():
        stem, _, last = name.rpartition(".")
        if last in ("scales", "biases"):
            continue
        if f"{stem}.scales" in arrays and last == "weight":
            entry = {k: table.get(stem, table).get(k, "affine") for k in ("group_size", "bits", "mode")}
            array = mx.dequantize(
                array, arrays[f"{stem}.scales"], arrays.get(f"{stem}.biases"), **entry, dtype=mx.float32
            )
        out[name] = np.array(array.astype(mx.float32) if array.dtype == mx.bfloat16 else array)
    return out


def test_every_recipe_that_ships_is_tried() -> None:
    tried = {made["recipe"] for made in MIXES.values() if "recipe" in made}
    assert tried == set(recipes()) - {"native", "bf16", "fit"}  # the first two: tests/hosts; fit: tests/fit


@pytest.mark.sampled(2)
@CASES
def test_our_runtime_writes_the_same_text_with_the_head_as_without(case: Case) -> None:
    words = ("generate", case.folder, "--raw", "--prompt", PROMPT, "--max-tokens", 40, "--dtype", "float32", "--json")
    plain, drafted = (run(*words, *more).json for more in ((), ("--mtp",)))
    assert plain["text"] == drafted["text"] and len(plain["text"]) > 40


@pytest.mark.sampled(2)
@CASES
@pytest.mark.slow
def test_stock_mlx_lm_gives_our_logits_and_our_text(case: Case) -> None:
    from ds4convert.inference.load import load_model

    model, tokenizer = mlx_lm.load(str(case.folder), trust_remote_code=True)
    assert type(model).__module__ == "custom_model" and model.head.present
    ids = mx.array([tokenizer.encode(PROMPT * 20)])
    ours, _ = load_model(case.folder, dtype="bfloat16")
    assert ids.shape[1] > 128 and mx.array_equal(model(ids), ours(ids)).item()
    text = mlx_lm.generate(model, tokenizer, tokenizer.encode(PROMPT), max_tokens=30)
    words = ("generate", case.folder, "--raw", "--prompt", PROMPT, "--max-tokens", 30, "--json")
    assert run(*words).json["text"] == text and len(text) > 20


@pytest.mark.sampled(3)
@pytest.mark.parametrize("layout", ["inline", "vlm"])
def test_mlx_vlm_holds_the_values_of_the_bytes(case: Case, layout: str) -> None:
    pytest.importorskip("mlx_vlm")
    folder = case.in_layout(layout)
    wanted = {k: v for k, v in stored_values(folder).items() if not k.startswith(("mtp.", "language_model.mtp."))}
    found = {k.removeprefix("language_model."): v for k, v in seen(vlm_model(folder)).items()}
    assert set(found) == {k.removeprefix("language_model.") for k in wanted}
    for name, value in found.items():
        want = wanted.get(name, wanted.get(f"language_model.{name}"))
        assert want is not None and np.array_equal(value, want.reshape(value.shape)), name


@CASES
def test_mlx_vlms_drafter_holds_the_head_in_its_own_format(case: Case) -> None:
    pytest.importorskip("mlx_vlm")
    folder = case.in_layout("vlm") / "mtp"
    model, kind = vlm_drafter(folder)
    found, wanted = seen(model), stored_values(folder)
    assert kind == "mtp" and set(found) == set(wanted)
    assert all(np.array_equal(value, wanted[name].reshape(value.shape)) for name, value in found.items())


@CASES
def test_mlx_vlm_takes_a_head_out_of_an_inline_folder_in_its_native_format_only(case: Case) -> None:
    """It reads no table there: it takes experts for mxfp4 and the rest for mxfp8. Another head fails, and loudly."""
    pytest.importorskip("mlx_vlm")
    folder = case.in_layout("inline")
    if case.has_native_head:
        assert vlm_drafter(folder)[1] == "mtp"
        return
    with pytest.raises(ValueError, match=r"parameters not in model|Expected shape"):
        vlm_drafter(folder)


def wide(embedding: Any) -> Any:
    """Return an embedding as a dense one in float32: MLX looks FP4 and FP8 ones up in bf16, and mlx-vlm goes on so."""
    if type(embedding).__name__ != "QuantizedEmbedding":
        return embedding
    rows = embedding(mx.arange(embedding.weight.shape[0])).astype(mx.float32)
    plain = nn.Embedding(1, 1)
    plain.weight = rows
    return plain


@pytest.mark.sampled(2)
@CASES
def test_mlx_vlm_gives_our_logits(case: Case) -> None:
    pytest.importorskip("mlx_vlm")
    from ds4convert.inference.load import load_model

    folder = case.in_layout("inline")
    ids = mx.array([[3 + 7 * n % 1000 for n in range(160)]])
    ours, _ = load_model(folder, dtype="float32")
    language = vlm_model(folder).language_model
    language.set_dtype(mx.float32)
    language.model.embed_tokens = wide(language.model.embed_tokens)
    mine, theirs = np.array(ours(ids)), np.array(language(ids, cache=language.make_cache()).logits)
    assert np.isfinite(mine).all() and not math.isclose(float(mine.std()), 0)
    assert np.abs(mine - theirs).max() < LOGIT_TOLERANCE
