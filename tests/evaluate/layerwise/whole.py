"""What the layer-wise tests compare with: the whole model in memory, and folders made for them."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ds4convert.inference.load import load_model

ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "tests" / "golden"
DEMO = ROOT / "manifests" / "demo"
TEXTS = (
    "And God said, Let there be light: and there was light. And God saw the light, that it was good.",
    "And it came to pass in those days, that there went out a decree from Caesar Augustus",
    "In the beginning",
)


def checkpoint(name: str) -> Path:
    return GOLDEN / name / "checkpoint"


@functools.cache
def golden(name: str) -> dict[str, mx.array]:
    return dict(mx.load(str(GOLDEN / name / "golden.safetensors")))


def golden_prompts(name: str, count: int = 2) -> list[list[int]]:
    """Prompts of the golden data: short, beyond one window, and as third beyond index_topk and 128."""
    return [golden(name)[f"p{i}.input_ids"].tolist() for i in range(count)]


def demo_prompts() -> list[list[int]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    return [tokenizer.encode(text).ids for text in TEXTS]


@dataclass
class Whole:
    """One prompt through the whole model: streams [1, L, M, D] after embedding and each layer, both logits [L, V]."""

    hidden: list[mx.array]
    head_hidden: mx.array | None
    logits: mx.array
    head_logits: mx.array | None


def run_whole(folder: Path, prompt: list[int]) -> Whole:
    model, _ = load_model(folder, dtype="float32", dense=True, require_manifest=False)
    hidden: dict[int, mx.array] = {}
    ids = mx.array(prompt)[None]

    def trace(kind: str, layer: int, value: mx.array) -> None:
        if kind == "hidden":
            hidden[layer] = value

    logits, last = model(ids, return_hidden=True, trace=trace)
    head = head_hidden = None
    if model.head.present:
        head, head_hidden = model.mtp_forward(last[:, :-1], ids[:, 1:], model.make_mtp_cache(), return_hidden=True)
        head = head[0]
    return Whole([hidden[n] for n in sorted(hidden)], head_hidden, logits[0], head)


def max_diff(a: mx.array, b: mx.array) -> float:
    assert a.shape == b.shape, (a.shape, b.shape)
    return float(mx.abs(a.astype(mx.float32) - b.astype(mx.float32)).max())


def edit_tensors(path: Path, change) -> None:
    """Change the tensors of one file."""
    tensors = dict(mx.load(str(path)))
    mx.eval(list(tensors.values()))
    change(tensors)
    mx.save_safetensors(str(path), tensors, {"format": "mlx"})


def requantized(folder: Path, out: Path, dense: bool = False, **recipe: object) -> Path:
    """A folder in our spelling with every matrix requantized (embedding and output matrix too), or dense."""
    model, config = load_model(folder, dense=True, require_manifest=False)
    if not dense:
        nn.quantize(model, **recipe, class_predicate=lambda path, module: hasattr(module, "to_quantized"))
        config["quantization"] = recipe
    config.pop("quantization_config", None)
    out.mkdir()
    mx.save_safetensors(str(out / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"})
    (out / "config.json").write_text(json.dumps(config))
    return out
