"""Loading of the golden checkpoints and of the tolerances that golden/README.md states."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import mlx.core as mx

from ds4convert.inference.deepseek_v4.config import ModelArgs
from ds4convert.inference.deepseek_v4.model import Model

GOLDEN = Path(__file__).parents[1] / "golden"
ALL = sorted(p.parent.parent.name for p in GOLDEN.glob("*/checkpoint/config.json") if '"deepseek_v4"' in p.read_text())
BLOCK = [name for name in ALL if "dspark_block_size" in (GOLDEN / name / "checkpoint/config.json").read_text()]
"""Checkpoints with a DSpark head; the others' is classic."""
NAMES = [name for name in ALL if name not in BLOCK]
PROMPTS = (0, 1, 2)
LOGIT_TOLERANCE = 2e-4
HIDDEN_TOLERANCE = 3e-4


def config(name: str) -> dict:
    return json.loads((GOLDEN / name / "checkpoint" / "config.json").read_text())


def tensors(name: str) -> dict[str, mx.array]:
    weights: dict[str, mx.array] = {}
    for file in sorted((GOLDEN / name / "checkpoint").glob("*.safetensors")):
        weights |= mx.load(str(file))
    return weights


def build(name: str, dtype: mx.Dtype = mx.float32, dense: bool = True, **changes: object) -> Model:
    """A model from the official files, by sanitize alone."""
    model = Model(ModelArgs.from_dict(config(name) | changes))
    model.load_weights(list(model.sanitize(tensors(name)).items()), strict=True)
    model.set_compute_dtype(dtype)
    if dense:
        model.dequantize()
    mx.eval(model.parameters())
    return model


@functools.cache
def model(name: str) -> Model:
    """The float32 dense model, shared by tests that do not change it."""
    return build(name)


@functools.cache
def golden(name: str) -> dict[str, mx.array]:
    return mx.load(str(GOLDEN / name / "golden.safetensors"))


def max_diff(a: mx.array, b: mx.array) -> float:
    assert a.shape == b.shape, (a.shape, b.shape)
    return mx.abs(a.astype(mx.float32) - b.astype(mx.float32)).max().item()


def kl(reference: mx.array, other: mx.array) -> mx.array:
    """KL(reference || other) per row of logits, in nats."""
    p = reference - mx.logsumexp(reference, axis=-1, keepdims=True)
    q = other - mx.logsumexp(other, axis=-1, keepdims=True)
    return (mx.exp(p) * (p - q)).sum(axis=-1)
