"""Checkpoints that look like ours and are something else: named by format, tower or tool, each with a way on.

Owns the refusals by config keys and by tensor names of what the families here do not describe. Pure.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ds4convert.checkpoint.family import Family, families
from ds4convert.checkpoint.types import TensorInfo
from ds4convert.errors import ConfigError, InventoryError
from ds4convert.words.terminal import show, show_value

OFFICIAL = "take the official release (such as deepseek-ai/DeepSeek-V4-Flash), or a BF16 export of this one"

MODELS = {
    "deepseek_v41_text": "the text part of DeepSeek-V4.1 alone; the config.json of its release has it in text_config",
    "deepseek_v3": "DeepSeek-V3, another model than V4",
    "deepseek_v32": "DeepSeek-V3.2, another model than V4",
}

METHODS = {
    "modelopt": "NVIDIA ModelOpt (NVFP4 or FP8 with scales per tensor)",
    "modelopt_fp4": "NVIDIA ModelOpt NVFP4",
    "compressed-tensors": "compressed-tensors (llm-compressor)",
    "gptq": "GPTQ", "awq": "AWQ", "auto-round": "AutoRound", "bitsandbytes": "bitsandbytes",
    "mxfp4": "MXFP4 of Transformers",
    "fbgemm_fp8": "FBGEMM FP8", "quark": "AMD Quark", "hqq": "HQQ", "torchao": "torchao", "exl3": "EXL3",
}  # fmt: skip
"""`quant_method` of other programs. Source: transformers, utils/quantization_config.py (QuantizationMethod)."""

MARKS = (
    (r"(\.|_)lora_[AB]\b|\.lora_magnitude|\.base_layer\.|^base_model\.model\.", "a LoRA adapter that was not merged",
     "merge it into the weights first (peft: merge_and_unload), and save that"),
    (r"\.weight_packed$|\.weight_global_scale$|\.input_global_scale$", "weights of compressed-tensors (NVFP4)",
     OFFICIAL),
    (r"\.weight_scale_2$", "NVFP4 of NVIDIA ModelOpt (codes with an E4M3 scale per 16 and a scale per tensor)",
     OFFICIAL),
    (r"\.input_scale$|\.activation_scale$", "static scales of activations, which MLX has no use for",
     "take the release with activation_scheme dynamic, or " + OFFICIAL),
    (r"\.qweight$|\.qzeros$|\.g_idx$", "weights of GPTQ or AWQ", OFFICIAL),
    (r"_(blocks|scales)$", "MXFP4 as gpt-oss and Transformers store it (codes and scales in _blocks and _scales)",
     OFFICIAL),
    (r"\.absmax$|\.quant_state\.", "weights of bitsandbytes", OFFICIAL),
    (r"^(vision|vision_tower|visual|aligner)\.|^image_(start|end|newline|pad)$|\.bias_vl$",
     "a vision tower in another spelling than DeepSeek's", "take the official release (the towers of V4 Vision-Exp and "
     "V4.1 convert), or an export of the text model alone"),
    (r"\.engram\.", "engrams of DeepSeek-V4.1", "that is another model, which this version does not convert"),
)  # fmt: skip
"""(names, what they are, a way on)."""

_MARKS = tuple((re.compile(pattern), what, way) for pattern, what, way in MARKS)
_ENDS, _WORDS = (".weight", ".scale"), ("lora_", "base_", "vis", "aligner", "engram", "quant_state")
"""Nearly all tensors have a name that ends so without any of these words; none of the marks has such a one."""


def check_model(table: Mapping[str, Any], where: str) -> None:
    """Raise `ConfigError` for a config whose text keys are nested, or of a model that is known as another one."""
    kind, nested = table.get("model_type"), table.get("text_config")
    family = next((f for f in families().values() if kind in f.model_types), None)
    _check_architecture(table, family, where)
    if isinstance(kind, str) and kind in MODELS:
        raise ConfigError(
            f"{where}: model_type is {kind!r}, expected one of: {_known_types()}. This is {MODELS[kind]}; this version "
            "of ds4convert does not convert it"
        )
    if family is not None and family.container:
        if not isinstance(table.get(family.container), dict):
            raise ConfigError(
                f"{where}: {family.container}: missing, or no table; model_type {kind!r} is "
                f"{family.title}, whose keys (hidden_size and so on) are in it",
                hint="Take the config.json of the official release",
            )
        return
    if isinstance(nested, dict) and "hidden_size" not in table and "hidden_size" in nested:
        inner = nested.get("model_type")
        tower = " and a vision tower (vision_config)" if "vision_config" in table else ""
        raise ConfigError(
            f"{where}: text_config: the keys of the text model (hidden_size and so on) are "
            f"nested in it{tower}, model_type {show_value(inner)}; ds4convert reads them at the "
            "top",
            hint=("Move the keys of text_config to the top level, or take the config.json of the official release"),
        )


def _check_architecture(table: Mapping[str, Any], family: Family | None, where: str) -> None:
    """Raise `ConfigError` where `architectures` and the shape of the table are of another family than model_type."""
    said = table.get("architectures")
    names = [n for n in said if isinstance(n, str)] if isinstance(said, list) else []
    meant = next((f for f in families().values() if any(n in f.architectures for n in names)), None)
    if meant is None or meant is family or (family is None and not meant.container):
        return
    if meant.container and not isinstance(table.get(meant.container), dict):
        return
    raise ConfigError(
        f"{where}: model_type is {show_value(table.get('model_type'))}, expected "
        f"{' or '.join(map(repr, meant.model_types))}: architectures says {show_value(names[0])}, "
        f"which is {meant.title}",
        hint=f"Set model_type to {meant.model_types[0]!r}, or take the config.json of the official release",
    )


def _known_types() -> str:
    return ", ".join(t for f in families().values() for t in f.model_types)


def check_method(q: Mapping[str, Any], where: str) -> None:
    """Raise `ConfigError` where `quantization_config` is that of another format, naming it."""
    method = q.get("quant_method")
    algo = next((q[k] for k in ("moe_quant_algo", "quant_algo") if isinstance(q.get(k), str)), None)
    if isinstance(method, str) and method != "fp8":
        inner = f", format {show(str(q['format']))}" if isinstance(q.get("format"), str) else ""
        title = METHODS.get(method.lower(), "no format that this version reads")
        raise ConfigError(
            f"{where}: quantization_config.quant_method is {show_value(method)}{inner}: {title}; "
            f"quantization_config is not the official FP8 one (quant_method fp8). To go on: {OFFICIAL}"
        )
    if algo is not None and algo.upper() not in {"FP8", "NONE"}:
        raise ConfigError(
            f"{where}: quantization_config has quant_algo {show_value(algo)}: NVFP4 or another format of NVIDIA "
            f"ModelOpt, whose experts are not the official FP4. To go on: {OFFICIAL}"
        )


def check_names(tensors: Iterable[TensorInfo], files: Sequence[str], is_known: Callable[[str], bool]) -> None:
    """Raise `InventoryError` for tensors that tell of another format, tower or tool.

    `is_known` tells names that the family of the checkpoint has, which may be those of a tower.
    """
    counts: Counter[int] = Counter()
    first: dict[int, TensorInfo] = {}
    for tensor in tensors:
        if tensor.name.endswith(_ENDS) and not any(word in tensor.name for word in _WORDS):
            continue
        n = next((n for n, (pattern, _, _) in enumerate(_MARKS) if pattern.search(tensor.name)), None)
        if n is not None and not is_known(tensor.name):
            counts[n] += 1
            first.setdefault(n, tensor)
    if not counts:
        return
    _, what, way = _MARKS[min(counts)]
    tensor, count = first[min(counts)], counts[min(counts)]
    more = f" (and {count - 1:,} more)" if count > 1 else ""
    raise InventoryError(
        f"{files[tensor.file]}: {show(tensor.name)}{more}: {what}; this is not supported. To go on: {way}"
    )
