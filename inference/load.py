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
from collections.abc import Iterable
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

    model, config = open_model(folder, require_manifest=require_manifest, drafter=drafter)
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
            f"{folder}: no {MANIFEST}, so this is not a finished conversion of ds4convert. "
            "Run `ds4convert quantize` (again, if it was interrupted) and use its output folder."
        )
    config = read_config(folder)
    weights = read_weights(folder)
    if not has_head_inside(weights):
        config, weights = _with_drafter(folder, drafter, config, weights)
    return build_model(config, weights, str(folder)), config


def has_head_inside(names: Iterable[str]) -> bool:
    """Whether a folder's own tensors are those of a model with its head, so that no drafter folder is asked."""
    return any(name.startswith(("mtp.", "model.mtp.")) for name in names)


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
    place = _drafter_place(folder, drafter)
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


def _drafter_place(folder: Path, drafter: Path | None) -> Path | None:
    """The folder that holds the head alone, if there is one."""
    places = [drafter] if drafter else [folder / "mtp", folder.with_name(f"{folder.name}-mtp")]
    return next((place for place in places if (place / "config.json").is_file()), None)


def _drafter_name(name: str) -> str:
    """Name inside the whole model of a tensor or module in a drafter folder."""
    return name if name.startswith("mtp.") else f"mtp.0.{name}"


DTYPES = {
    "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "uint8", "F8_E8M0": "uint8",
    "U8": "uint8", "I8": "int8", "U32": "uint32", "I32": "int32", "I64": "int64",
}  # fmt: skip
"""Names of safetensors to those of mlx, which reads FP8 as bytes."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Where one tensor lies: its name on disk, file, dtype (name of safetensors), shape, absolute byte range."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size_bytes: int

    def read(self, row: int | None = None) -> mx.array:
        """The tensor, or row `row` of its leading axis alone, read from disk now. InputError where it cannot be."""
        import mlx.core as mx

        shape, start, size = self.shape, self.start, self.size_bytes
        if row is not None:
            shape, size = shape[1:], size // shape[0]
            start += row * size
        if self.dtype not in DTYPES:
            raise InputError(f"{self.name}: dtype {self.dtype} is not one that the model reads ({self.path})")
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                data = file.read(size)
        except OSError as error:
            raise InputError(f"{self.name}: not readable from {self.path}: {error}") from None
        if len(data) != size:
            raise InputError(f"{self.name}: {self.path} ends inside it; expected {size} bytes at {start}")
        codes = mx.array(memoryview(data))  # type: ignore[arg-type]
        return codes.view(getattr(mx, DTYPES[self.dtype])).reshape(shape)


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Where each tensor of a folder lies, by its name on disk; InputError names one that its file is too short for."""
    return {tensor.name: tensor for path in weight_files(folder) for tensor in _read_header(path)}


def _read_header(path: Path) -> list[Stored]:
    found = []
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            base = 8 + int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(base, size) - 8))
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                found.append(Stored(name, path, entry["dtype"], tuple(entry["shape"]), base + start, end - start))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not readable as safetensors: {error}") from None
    for tensor in found:
        if tensor.start + tensor.size_bytes > size:
            raise InputError(f"{tensor.name}: {path} has {size} bytes and ends before this tensor does")
    return found


def stored_parameters(folder: Path, drafter: Path | None = None) -> dict[str, Stored]:
    """Where each tensor of the model of a folder lies, by this model's spelling; experts as they are stored.

    A head in a folder of its own is included, as in `open_model`.
    """
    from .weights import canonical_name

    found = stored_tensors(folder)
    place = None if has_head_inside(found) else _drafter_place(folder, drafter)
    if place is not None:
        found |= {_drafter_name(name): tensor for name, tensor in stored_tensors(place).items()}
    return {canonical_name(name): tensor for name, tensor in found.items()}


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
    for tensor in stored_tensors(folder).values():
        size = tensor.size_bytes
        total += size * width // 2 if tensor.dtype in ("BF16", "F16") else size
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
