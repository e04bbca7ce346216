"""Loads a converted folder, or a small official checkpoint, strictly: every name and shape is checked before
use.

Reads only public files: config.json, the safetensors files and their index (`tensor_files`), and where the head is
kept apart, the drafter folder `mtp/` or the one that is named (`head_folder`). Refuses, with exit code 3 and the
tensors' names: a folder that is not ours (no manifest) unless told otherwise, packed weights without a quantization
table, missing, extra or misshapen tensors. A head that is absent is no error; the model says why (`Model.head`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds4convert.errors import ConfigError, InputError, InventoryError
from ds4convert.formats.codecs import CODECS, Codec
from ds4convert.inference.deepseek_v4.config import ModelArgs
from ds4convert.inference.deepseek_v4.images import without_images
from ds4convert.words.terminal import show

from .arguments import implementation, read_args, with_usual_table
from .head_folder import check_same_model, drafter_place, head_of, merged_config, without_head
from .tensor_files import Stored, read_config, read_weights, stored_tensors, weight_files
from .tokens import compressed_ids

if TYPE_CHECKING:
    import mlx.core as mx

    from ds4convert.inference.deepseek_v4.model import Model
    from ds4convert.inference.several.ranks import Team


__all__ = ["Stored", "read_args", "read_config", "read_weights", "stored_tensors", "weight_files"]
"""Read here by other modules as well."""

MANIFEST = "ds4convert_manifest.json"
SHOWN = 10
"""Problems that a message names in full."""


def load_model(
    folder: Path,
    *,
    dtype: str = "bfloat16",
    dense: bool = False,
    require_manifest: bool = True,
    drafter: Path | None = None,
    ranks: Team | None = None,
) -> tuple[Model, dict[str, Any]]:
    """The model of a folder, evaluated, and its parsed config.json.

    `dtype` is "float32" or "bfloat16"; `dense` dequantizes all matrices (fast on a CPU, large);
    `drafter` names the head's own folder where it is not `mtp/`; its head is run even if the folder has one.
    Of several `ranks` each gets its share of the backbone's experts.
    Raises InputError, ConfigError or InventoryError before anything is computed.
    """
    import mlx.core as mx

    model, config = open_model(folder, require_manifest=require_manifest, drafter=drafter)
    if ranks is not None:
        from .several.experts import divide

        divide(model, ranks)
    model.set_compute_dtype({"float32": mx.float32, "bfloat16": mx.bfloat16}[dtype])
    if dense:
        model.dequantize()
    mx.eval(model.parameters())
    return model, config


def open_model(
    folder: Path, *, require_manifest: bool = True, drafter: Path | None = None
) -> tuple[Model, dict[str, Any]]:
    """The model of a folder and its config.json: every name and shape checked, no tensor read from disk yet.

    Dtypes are those stored. What is evaluated is read then, and stays as long as the model holds it.
    """
    if require_manifest and not (folder / MANIFEST).is_file():
        raise InputError(
            f"{folder}: no {MANIFEST}, so this is not a finished conversion of ds4convert",
            hint=("Run `ds4convert quantize` (again, if it was interrupted) and use its output folder."),
        )
    config = read_config(folder)
    read_args(config, str(folder))
    config = with_usual_table(config)
    weights = read_weights(folder)
    if (place := drafter_place(folder, drafter, weights)) is not None:
        own = read_config(place)
        check_same_model(place, own, config)
        head = head_of(place, read_weights(place))
        config, weights = merged_config(config, own, head), without_head(weights) | head
    kept = implementation(read_args(config, str(folder))).on_disk
    if kept is None:
        return build_model(config, weights, str(folder)), config
    tables = {name: stored for name, stored in stored_parameters(folder).items() if kept in name}
    rest = {name: tensor for name, tensor in weights.items() if kept not in name}
    return _with_tables(build_model(config, rest, str(folder)), config, tables, folder), config


def _with_tables(model: Model, config: dict[str, Any], tables: dict[str, Stored], folder: Path) -> Model:
    """The model with tables that stay on disk, and what finds rows in them."""
    from ds4convert.inference.deepseek_v41.model import Model as WithTables
    from ds4convert.inference.deepseek_v41.table import MappedLeaf

    assert isinstance(model, WithTables)
    if not model.args.engram_layer_ids:
        return model
    forms = _quantization_table(config, tables, str(folder))
    try:
        model.attach_tables({name: MappedLeaf(stored) for name, stored in tables.items()}, forms)
        model.attach_tokenizer(compressed_ids(folder))
    except ValueError as error:
        raise InventoryError(f"{folder}: {error}") from None
    return model


def build_model(config: dict[str, Any], weights: dict[str, mx.array], where: str) -> Model:
    """A model with these weights, all names and shapes checked; `where` names their origin in messages.

    What serves images alone is left out. Of a family whose tables stay on disk, those are not among the weights, or are
    small enough to be.
    """
    import mlx.nn as nn

    args, weights = read_args(config, where), without_images(weights)
    if len(weights) < args.num_hidden_layers:
        raise InventoryError(f"{where}: {len(weights)} tensors for the {args.num_hidden_layers} layers of config.json")
    try:
        model = implementation(args).model()(args)
        weights = model.sanitize(weights)
        table = _quantization_table(config, weights, where)
        nn.quantize(model, class_predicate=lambda p, m: _is_plain(m) and table.get(p, False))  # type: ignore[attr-defined]
    except (ValueError, IndexError, TypeError, KeyError, RuntimeError, OverflowError) as error:
        raise InputError(f"{where}: the tensors do not fit config.json: {show(str(error), 400)}") from None
    check_inventory(model, weights, where)
    model.load_weights(list(weights.items()), strict=True)
    return model


def _is_plain(module: Any) -> bool:
    """Whether a module can be made quantized, and is not yet: a source's own block scales did that already."""
    return hasattr(module, "to_quantized") and "scales" not in module


def _quantization_table(config: dict[str, Any], weights: Iterable[str], where: str) -> dict[str, dict[str, Any]]:
    """Format of each module stored packed, by our module path; what the source's own scales made is left
    out.
    """
    packed = [name.removesuffix(".scales") for name in weights if name.endswith(".scales")]
    stated = config.get("quantization")
    if not isinstance(stated, dict):
        sourced = (
            isinstance(config.get("quantization_config"), dict) and "quant_method" in config["quantization_config"]
        )
        if packed and not sourced:
            raise ConfigError(
                f"{where}/config.json: no `quantization` table, but {len(packed)} matrices are stored packed "
                f"(first: {sorted(packed)[0]}.scales)"
            )
        return {}
    default = {key: stated[key] for key in ("group_size", "bits", "mode") if key in stated}
    exact = {_module_path(key): value for key, value in stated.items() if isinstance(value, dict | bool)}
    table = {}
    for path in packed:
        chosen = exact.get(path, default)
        if not isinstance(chosen, dict) or not chosen:
            raise ConfigError(f"{where}/config.json: `quantization` says nothing of {path}, which is stored packed")
        if codec_of(chosen) is None:
            raise ConfigError(
                f"{where}/config.json: `quantization` of {path}: {show(repr(chosen), 200)} is no format that is read"
            )
        table[path] = {key: chosen[key] for key in ("group_size", "bits", "mode") if key in chosen}
    return table


def _module_path(key: str) -> str:
    """The path of the module that a key of a quantization table means; experts that are stacked lie in a module."""
    from ds4convert.inference.deepseek_v4.weights import canonical_name

    return canonical_name(key).replace(".ffn.experts.", ".ffn.switch_mlp.")


def codec_of(entry: dict[str, Any]) -> Codec | None:
    """The codec that an entry of a quantization table means, None for one that is not known; affine is the default."""
    wanted = (entry.get("mode", "affine"), entry.get("bits"), entry.get("group_size"))
    return next((c for c in CODECS.values() if (c.mode, c.bits, c.group_size) == wanted), None)


def check_inventory(model: Model, weights: dict[str, mx.array], where: str) -> None:
    """Raise InventoryError naming every tensor that is missing, extra or misshapen for the model (ten in
    full).
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten

    expected = dict(tree_flatten(model.parameters()))
    problems = [f"{name}: missing, expected {_shown(expected[name])}" for name in sorted(expected.keys() - weights)]
    problems += [
        f"{name}: not part of the model, found {_shown(weights[name])}" for name in sorted(weights.keys() - expected)
    ]
    for name in sorted(expected.keys() & weights.keys()):
        wanted, found = expected[name], weights[name]
        is_float = mx.issubdtype(wanted.dtype, mx.floating)
        is_kind_same = mx.issubdtype(found.dtype, mx.floating) if is_float else found.dtype == wanted.dtype
        if wanted.shape != found.shape or not is_kind_same:
            problems.append(f"{name}: expected {_shown(wanted)}, found {_shown(found)}")
    if problems:
        more = f"\n... and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        listing = "\n".join(problems[:SHOWN])
        raise InventoryError(f"{where}: {len(problems)} tensors do not fit the model\n{listing}{more}")


def _shown(tensor: mx.array) -> str:
    return f"{str(tensor.dtype).removeprefix('mlx.core.')} {list(tensor.shape)}"


def stored_parameters(folder: Path, drafter: Path | None = None) -> dict[str, Stored]:
    """Where each tensor of the model of a folder lies, by this model's spelling; experts as they are stored.

    A head in a folder of its own is included, as in `open_model`.
    """
    from ds4convert.inference.deepseek_v4.weights import canonical_name

    found = stored_tensors(folder)
    if (place := drafter_place(folder, drafter, found)) is not None:
        found = without_head(found) | head_of(place, stored_tensors(place))
    return {canonical_name(name): tensor for name, tensor in found.items()}


def held_parameters(folder: Path, drafter: Path | None = None) -> dict[str, Stored]:
    """As `stored_parameters`, without what is read by rows or serves images, and is never held."""
    kept = implementation(read_args(read_config(folder), str(folder))).on_disk
    found = without_images(stored_parameters(folder, drafter))
    return {name: tensor for name, tensor in found.items() if kept is None or kept not in name}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a model will hold: weights as loaded, and decode state for a context."""

    weight_bytes: int
    cache_bytes: int

    @property
    def total_bytes(self) -> int:
        """Weights and state, with a tenth on top for activations."""
        return (self.weight_bytes + self.cache_bytes) * 11 // 10


def memory_estimate(
    folder: Path, context: int, dtype: str = "bfloat16", drafter: Path | None = None, ranks: Team | None = None
) -> MemoryEstimate:
    """What loading a folder and decoding `context` tokens will hold, from headers and config alone; on each rank."""
    args = read_args(read_config(folder), str(folder))
    width = {"float32": 4, "bfloat16": 2}[dtype]
    total = 0
    for name, tensor in held_parameters(folder, drafter).items():
        is_divided = ranks is not None and ".switch_mlp." in name and not name.startswith("mtp.")
        size = tensor.size_bytes // (ranks.size if ranks is not None and is_divided else 1)
        total += size * width // 2 if tensor.dtype in ("BF16", "F16") else size
    return MemoryEstimate(total, cache_size_bytes(args, context, width))


def cache_size_bytes(args: ModelArgs, context: int, width: int) -> int:
    """Bytes of decode state of all layers and the head after `context` tokens; `width` bytes per
    activation.
    """
    blocks = head_stages(args)
    total = context_size_bytes(args, args.num_hidden_layers + blocks, width)
    layer_bytes = implementation(args).layer_bytes
    return total + sum(layer_bytes(args, layer, context, width) for layer in range(args.num_hidden_layers))


def context_size_bytes(args: ModelArgs, blocks: int, width: int) -> int:
    """Bytes of the window's keys of some blocks: backbone layers, a classic head, or stages of a DSpark head."""
    return blocks * (args.sliding_window + 16) * args.head_dim * width


def head_stages(args: ModelArgs) -> int:
    """Blocks of the head that a config promises; of a DSpark head as many as `compress_ratios` lists, else three.

    No key of a Hugging Face config counts DSpark stages (DSpark description, section 1).
    """
    if args.dspark_block_size:
        return max(0, len(args.compress_ratios) - args.num_hidden_layers) or 3
    return args.num_nextn_predict_layers


PREFILL_TOKENS = 2048
"""Prompt tokens that mlx-lm runs through the model at once."""


def working_set_bytes(args: ModelArgs) -> int:
    """Bytes that MLX holds beside weights and state at its busiest: one layer of a prefill step, and its logits.

    Per token, in float32: four times the residual streams (in, out, and the mixing of both), what goes into and comes
    out of its experts, and a logit per vocabulary entry.
    """
    streams = 4 * args.hc_mult * args.hidden_size
    experts = (args.num_experts_per_tok + 1) * (2 * args.moe_intermediate_size + args.hidden_size)
    return PREFILL_TOKENS * 4 * (streams + experts + args.vocab_size)


def free_memory_bytes() -> int | None:
    """Memory that can be had without swapping; None where the system does not say."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None


def metal_limits() -> dict[str, Any] | None:
    """The GPU that MLX has by Metal (`device`), and the bytes that a model may take of it (`working_set_bytes`).

    None where there is no Metal.
    """
    import mlx.core as mx

    if not mx.metal.is_available():
        return None
    info = mx.device_info() if hasattr(mx, "device_info") else mx.metal.device_info()
    return {"device": info.get("device_name"), "working_set_bytes": info.get("max_recommended_working_set_size")}
