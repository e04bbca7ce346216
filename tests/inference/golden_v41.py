"""The golden checkpoint of DeepSeek-V4.1 as a model, and its recordings by prompt."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import mlx.core as mx

from ds4convert.inference.load import load_model

FOLDER = Path(__file__).parents[1] / "golden" / "tiny-v41-a"
SOURCE = FOLDER / "checkpoint"
PROMPTS = ("p0", "p1", "p2")


def build(dtype: str = "float32", dense: bool = True) -> Any:
    """The model of the official files."""
    return load_model(SOURCE, dtype=dtype, dense=dense, require_manifest=False)[0]


@functools.cache
def model() -> Any:
    """The float32 dense model, shared by tests that do not change it."""
    return build()


@functools.cache
def golden() -> dict[str, mx.array]:
    return mx.load(str(FOLDER / "golden.safetensors"))  # type: ignore[return-value]


def config() -> dict[str, Any]:
    return dict(json.loads((SOURCE / "config.json").read_text()))


def recording(prompt: str, steps: int | None = None) -> dict[str, dict[str, mx.array]]:
    """What was recorded of a prompt, of the greedy steps the first `steps`."""
    found = {k.split(".", 1)[1]: v for k, v in golden().items() if k.startswith(f"{prompt}.")}
    if steps is not None:
        found["greedy_ids"] = found["greedy_ids"][: steps + 1]
        for key in ("decode_logits", "draft_ids", "draft_logits", "draft_confidence"):
            found[key] = found[key][:steps]
        del found["draft_match"]  # it looks further ahead than the steps
    return {prompt: found}


def ids(prompt: str) -> list[int]:
    return golden()[f"{prompt}.input_ids"].tolist()  # type: ignore[return-value]


def whole(m: Any) -> list[Any]:
    return list(m.make_cache() + m.make_mtp_cache())
