"""Writes small converted folders, in the layouts that this package must read, from a golden checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from tests.inference.golden_data import build, config

MANIFEST = "ds4convert_manifest.json"
HC = [f"{part}_hc.{leaf}" for part in ("attn", "ffn") for leaf in ("fn", "base", "scale")]
OFFICIAL_HC = {name: f"hc_{name.split('_')[0]}_{name.split('.')[1]}" for name in HC}
OFFICIAL_HC |= {f"hc_head.{leaf}": f"hc_head_{leaf}" for leaf in ("fn", "base", "scale")}


def parameters(name: str, recipe: dict | None = None) -> tuple[dict[str, mx.array], dict[str, dict]]:
    """Tensors by module path and the quantization table; `recipe` requantizes every dense-able matrix."""
    model = build(name, mx.bfloat16, dense=recipe is not None)
    if recipe:
        nn.quantize(model, **recipe, class_predicate=lambda path, module: hasattr(module, "to_quantized"))
    table = {
        path: {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
        for path, module in model.named_modules()
        if hasattr(module, "group_size")
    }
    return dict(tree_flatten(model.parameters())), table


def head_spelling(name: str, layout: str) -> str:
    """On-disk name of a tensor or module of the head, from our module path."""
    prefix, tail = "mtp.0.", name.removeprefix("mtp.0.")
    if layout == "mtplx":
        return name
    if layout == "block":
        is_own = tail.split(".")[0] in ("attn", "ffn", "attn_norm", "ffn_norm", "attn_hc", "ffn_hc")
        return f"{prefix}block.{tail}" if is_own else name
    if layout == "drafter":
        is_own = tail.split(".")[0] in ("attn", "ffn", "attn_norm", "ffn_norm", "attn_hc", "ffn_hc")
        return f"decoder.{tail}" if is_own else tail
    return prefix + OFFICIAL_HC.get(tail, tail)


def write(folder: Path, name: str, layout: str = "inline", recipe: dict | None = None, manifest: bool = True) -> Path:
    """A converted folder; layouts inline, mtplx, block, drafter (in `mtp/`), none (head stripped, still
    promised).
    """
    folder.mkdir(parents=True)
    tensors, table = parameters(name, recipe)
    head = {key: tensors.pop(key) for key in [key for key in tensors if key.startswith("mtp.")]}
    default = next(iter(table.values()))
    settings = config(name) | {"quantization": default | table}
    settings["quantization_config"] = settings["quantization"]
    mx.save_safetensors(str(folder / "model-00001-of-00001.safetensors"), tensors, {"format": "mlx"})
    files = dict.fromkeys(tensors, "model-00001-of-00001.safetensors")
    if layout == "drafter":
        write_drafter(folder / "mtp", settings, head, table)
    elif layout != "none":
        renamed = {head_spelling(key, layout): value for key, value in head.items()}
        mx.save_safetensors(str(folder / "model-mtp.safetensors"), renamed, {"format": "mlx"})
        files |= dict.fromkeys(renamed, "model-mtp.safetensors")
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    if manifest:
        (folder / MANIFEST).write_text("{}")
    return folder


def write_drafter(folder: Path, settings: dict, head: dict[str, mx.array], table: dict[str, dict]) -> None:
    folder.mkdir()
    own = {head_spelling(key, "drafter"): value for key, value in table.items() if key.startswith("mtp.")}
    renamed = {head_spelling(key, "drafter"): value for key, value in head.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), renamed, {"format": "mlx"})
    text = {key: value for key, value in settings.items() if "quantization" not in key}
    drafter = {"model_type": "deepseek_v4_mtp", "text_config": text, "block_size": 2}
    drafter["quantization"] = next(iter(own.values())) | own
    (folder / "config.json").write_text(json.dumps(drafter))


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A tokenizer whose token n is the word `tn`; token 1 ends a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"t{n}": n for n in range(vocab_size)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "t1", "unk_token": "t0"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    settings.update(changes)
    path.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))
