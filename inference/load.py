"""Loads a converted folder, or a small official checkpoint, strictly: every name and shape is checked before
use.

Reads only public files: config.json, the safetensors files and their index, and where the head is kept apart,
the drafter folder `mtp/` (or the sibling `NAME-mtp/`). Refuses, with exit code 3 and the tensors' names: a
folder that is not ours (no manifest) unless told otherwise, packed weights without a quantization table,
missing, extra or misshapen tensors. A head that is absent is no error; the model says why (`Model.head`).
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds4convert.errors import ConfigError, InputError, InventoryError

from .config import OVERLAP_RATIO, ModelArgs

if TYPE_CHECKING:
    import mlx.core as mx

    from .deepseek_v4 import Model

MANIFEST = "ds4convert_manifest.json"
INDEX = "model.safetensors.index.json"
SHOWN = 10
"""Problems that a message names in full."""


def load_model(
    folder: Path,
    *,
    dtype: str = "bfloat16",
    dense: bool = False,
    require_manifest: bool = True,
    drafter: Path | None = None,
) -> tuple[Model, dict[str, Any]]:
    """The model of a folder, evaluated, and its parsed config.json.

    `dtype` is "float32" or "bfloat16"; `dense` dequantizes all matrices (fast on a CPU, large);
    `drafter` names the head's own folder where it is not `mtp/` or `NAME-mtp/`.
    Raises InputError, ConfigError or InventoryError before anything is computed.
    """
    import mlx.core as mx

    if require_manifest and not (folder / MANIFEST).is_file():
        raise InputError(
            f"{folder}: no {MANIFEST}, so this is not a finished conversion of ds4convert. "
            "Run `ds4convert quantize` (again, if it was interrupted) and use its output folder."
        )
    config = read_config(folder)
    weights = read_weights(folder)
    if not any(name.startswith(("mtp.", "model.mtp.")) for name in weights):
        config, weights = _with_drafter(folder, drafter, config, weights)
    model = build_model(config, weights, str(folder))
    model.set_compute_dtype({"float32": mx.float32, "bfloat16": mx.bfloat16}[dtype])
    if dense:
        model.dequantize()
    mx.eval(model.parameters())
    return model, config


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed config.json of a folder; ConfigError where it is missing, malformed or of another family."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: not found; a checkpoint folder has a config.json") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return config


def read_weights(folder: Path) -> dict[str, mx.array]:
    """All tensors of a folder by name, not yet read from disk; InputError on a missing or broken file."""
    import mlx.core as mx

    weights: dict[str, mx.array] = {}
    for path in weight_files(folder):
        try:
            tensors: dict[str, mx.array] = mx.load(str(path))  # type: ignore[assignment]
        except Exception as error:
            raise InputError(f"{path}: not readable as safetensors: {error}") from None
        if doubled := sorted(weights.keys() & tensors.keys()):
            raise InputError(f"{path}: {doubled[0]} is also in another file of {folder}")
        weights |= tensors
    return weights


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model: those of its index and `model*.safetensors`; without both, all of
    them.

    A file that the index names may be absent if it held the head alone: such a head was cut off, which is no error.
    """
    names = {path.name for path in folder.glob("model*.safetensors")}
    index = folder / INDEX
    if index.is_file():
        try:
            places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            listed = set(places.values())
            backbone = {file for name, file in places.items() if not name.startswith(("mtp.", "model.mtp."))}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{index}: not a safetensors index: {error!r}") from None
        for name in sorted(listed):
            if Path(name).name != name:
                raise InputError(f"{index}: {name!r} points outside the folder")
            if name in backbone and not (folder / name).is_file():
                raise InputError(f"{folder / name}: named by the index, but not found")
        names |= {name for name in listed if (folder / name).is_file()}
    if not names:
        names = {path.name for path in folder.glob("*.safetensors")}
    if not names:
        raise InputError(f"{folder}: no safetensors files")
    return [folder / name for name in sorted(names)]


def build_model(config: dict[str, Any], weights: dict[str, mx.array], where: str) -> Model:
    """A model with these weights, all names and shapes checked; `where` names their origin in messages."""
    import mlx.nn as nn

    from .deepseek_v4 import Model

    model = Model(read_args(config, where))
    try:
        weights = model.sanitize(weights)
        table = _quantization_table(config, weights, where)
        nn.quantize(  # type: ignore[attr-defined]
            model, class_predicate=lambda path, module: table.get(path, False)
        )
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None
    check_inventory(model, weights, where)
    model.load_weights(list(weights.items()), strict=True)
    return model


def read_args(config: dict[str, Any], where: str) -> ModelArgs:
    """Model dimensions; ConfigError names missing keys and values that the forward pass cannot compute."""
    import dataclasses

    required = [item.name for item in dataclasses.fields(ModelArgs) if item.default is dataclasses.MISSING]
    if missing := [name for name in required if name not in config]:
        raise ConfigError(f"{where}/config.json: missing {', '.join(missing)}")
    try:
        return ModelArgs.from_dict(config)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{where}/config.json: {error}") from None


def _quantization_table(config: dict[str, Any], weights: dict[str, mx.array], where: str) -> dict[str, dict[str, Any]]:
    """Format of each module stored packed, by our module path; what the source's own scales made is left
    out.
    """
    from .weights import canonical_name

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
    exact = {canonical_name(key): value for key, value in stated.items() if isinstance(value, dict | bool)}
    table = {}
    for path in packed:
        chosen = exact.get(path, default)
        if not isinstance(chosen, dict) or not chosen:
            raise ConfigError(f"{where}/config.json: `quantization` says nothing of {path}, which is stored packed")
        table[path] = {key: chosen[key] for key in ("group_size", "bits", "mode") if key in chosen}
    return table


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


def _with_drafter(
    folder: Path, drafter: Path | None, config: dict[str, Any], weights: dict[str, mx.array]
) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """Config and weights with the head from its own folder added, where there is one."""
    places = [drafter] if drafter else [folder / "mtp", folder.with_name(f"{folder.name}-mtp")]
    place = next((place for place in places if (place / "config.json").is_file()), None)
    if place is None:
        if drafter is not None:
            raise InputError(f"{drafter}: no config.json, so no head can be loaded from it")
        return config, weights
    own = read_config(place)
    head = {_drafter_name(name): tensor for name, tensor in read_weights(place).items()}
    nextn = own.get("text_config", {}).get("num_nextn_predict_layers") or 1
    merged = config | {"num_nextn_predict_layers": nextn}
    if isinstance(own.get("quantization"), dict):
        table = dict(config.get("quantization") or {})
        defaults = {
            key: own["quantization"][key] for key in ("group_size", "bits", "mode") if key in own["quantization"]
        }
        for name in head:
            if name.endswith(".scales"):
                table[name.removesuffix(".scales")] = defaults
        table |= {
            _drafter_name(key): value for key, value in own["quantization"].items() if isinstance(value, dict | bool)
        }
        merged["quantization"] = table
    return merged, weights | head


def _drafter_name(name: str) -> str:
    """Name inside the whole model of a tensor or module in a drafter folder."""
    return name if name.startswith("mtp.") else f"mtp.0.{name}"


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a model will hold: weights as loaded, and decode state for a context."""

    weight_bytes: int
    cache_bytes: int

    @property
    def total_bytes(self) -> int:
        """Weights and state, with a tenth on top for activations."""
        return (self.weight_bytes + self.cache_bytes) * 11 // 10


def memory_estimate(folder: Path, context: int, dtype: str = "bfloat16") -> MemoryEstimate:
    """What loading a folder and decoding `context` tokens will hold, from headers and config alone."""
    args = read_args(read_config(folder), str(folder))
    width = {"float32": 4, "bfloat16": 2}[dtype]
    total = 0
    for path in weight_files(folder):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                total += (end - start) * width // 2 if entry["dtype"] in ("BF16", "F16") else end - start
    return MemoryEstimate(total, cache_size_bytes(args, context, width))


def cache_size_bytes(args: ModelArgs, context: int, width: int) -> int:
    """Bytes of decode state of all layers and the head after `context` tokens; `width` bytes per
    activation.
    """
    layers = args.num_hidden_layers + args.num_nextn_predict_layers
    total = layers * (args.sliding_window + 16) * args.head_dim * width
    for layer in range(args.num_hidden_layers):
        ratio = args.ratio(layer)
        if ratio == OVERLAP_RATIO:
            columns = args.head_dim + args.index_head_dim
            total += context // ratio * columns * width + (2 * ratio + 16) * 4 * columns * 4
        elif ratio:
            total += context // ratio * args.head_dim * width + (ratio + 16) * 2 * args.head_dim * 4
    return total


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
