"""Calibration files: how strong each input column of each matrix is, for rounding to weigh errors by.

A safetensors file: per matrix, by its MLX path, the mean squared input of each column (float32 `[in]`, of experts
`[experts, in]`) and, as NAME.rows, the number of rows that it is the mean of. What model it is of is in the metadata.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ds4convert.checkpoint.inventory import BACKBONE, Inventory, Module, key_of
from ds4convert.errors import InputError, OutputError
from ds4convert.files import Disk, disk_errors
from ds4convert.formats.codecs import CODECS
from ds4convert.storage import strict_json
from ds4convert.storage.untrusted.fields import Fields

METADATA = "ds4convert"
KIND = "calibration"
ROWS = ".rows"
SENSITIVITY = "sensitivity"
"""Name of the losses of single matrices, in the order of the sorted keys of `units` in the metadata."""

SEEN = 64
"""Rows from which on an expert's own moments count more than the mean of its layer's."""


PROBES = ("affine-3-g64", "affine-3-g32", "mxfp4", "nvfp4")
"""Formats that sensitivities are measured with: of each matrix the first one that rounds it."""


@dataclass(frozen=True)
class Sensitivities:
    """What rounding single matrices does to the output: KL by key, measured with the format `probes` names."""

    losses: Mapping[str, float]
    probes: Mapping[str, str]


def probes(inventory: Inventory) -> dict[str, str]:
    """Return the format that the sensitivity of each matrix of the backbone is measured with, by key."""
    out = {}
    for module in inventory.modules:
        if module.part != BACKBONE or not module.may_quantize:
            continue
        for name in PROBES:
            exact = (module.store, name) == ("fp4", "mxfp4")
            if not exact and module.shape[1] % CODECS[name].group_size == 0:
                out[key_of(module)] = name
                break
    return out


@dataclass(frozen=True)
class Calibration:
    """A calibration file that fits a model: moments by key, rows by key, sha256 of the file."""

    digest: str
    moments: Mapping[str, NDArray[np.float32]]
    rows: Mapping[str, NDArray[np.int64]]
    sensitivities: Sensitivities | None = None

    def __contains__(self, key: str) -> bool:
        return key in self.moments

    def importance(self, key: str, expert: int) -> NDArray[np.float32] | None:
        """Return the importance of the input columns of a matrix, of one expert of a stack; None where not known.

        An expert that few rows went to gets the mean of its layer's experts, the more so the fewer.
        """
        found = self.moments.get(key)
        if found is None or found.ndim == 1:
            return found
        rows = self.rows[key].astype(np.float64)
        mean = (found * rows[:, None]).sum(axis=0) / max(rows.sum(), 1.0)
        return np.asarray((found[expert] * rows[expert] + mean * SEEN) / (rows[expert] + SEEN), np.float32)


def facts_of(inventory: Inventory) -> str:
    """Return the sha256 of the family and dimensions of a model: what a calibration has to agree with."""
    config = inventory.config
    facts = {"family": config.family.name, "dims": dict(config.dims), "layers": config.layers}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def write(
    path: Path,
    inventory: Inventory,
    found: Mapping[str, Any],
    tokens: int,
    sensitivities: Sensitivities | None = None,
) -> int:
    """Write moments (`squares` and `rows` by key), and sensitivities, as a calibration file; return its bytes."""
    from safetensors.numpy import save

    tensors: dict[str, np.ndarray] = {}
    for key, moments in sorted(found.items()):
        rows = np.asarray(moments.rows)
        tensors[key] = (moments.squares / np.maximum(rows, 1)[..., None]).astype(np.float32)
        tensors[key + ROWS] = np.atleast_1d(rows).astype(np.int64)
    # One key: the library writes several in any order, and equal input has to give equal bytes.
    told: dict[str, Any] = {"kind": KIND, "model": facts_of(inventory), "tokens": tokens}
    if sensitivities is not None:
        keys = sorted(sensitivities.losses)
        tensors[SENSITIVITY] = np.array([sensitivities.losses[k] for k in keys], np.float32)
        told["units"] = {k: sensitivities.probes[k] for k in keys}
    data = save(tensors, {METADATA: json.dumps(told, sort_keys=True)})
    with disk_errors("writing", path):
        Disk().write_file(path, data)
    return len(data)


FEW_ROWS = 16
"""Rows below which an expert is named."""


def experts(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the rows of experts by layer: the fewest, the mean, and the experts with fewer than `FEW_ROWS`."""
    out = {}
    for key, moments in sorted(found.items()):
        if key.endswith(".gate_proj") and np.ndim(moments.rows):
            rows = np.asarray(moments.rows)
            few = [int(n) for n in np.flatnonzero(rows < FEW_ROWS)]
            out[key.rpartition(".")[0]] = {"least": int(rows.min()), "mean": float(rows.mean()), "few": few}
    return out


def few(experts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a line for each layer with experts that hardly any row went to."""
    lines = []
    for key, told in experts.items():
        names = ", ".join(map(str, told["few"][:12])) + (", ..." if len(told["few"]) > 12 else "")
        if told["few"]:
            lines.append(
                f"{key}: fewer than {FEW_ROWS} rows went to {len(told['few'])} experts ({names}); give more text"
            )
    return lines


@dataclass(frozen=True, slots=True)
class About:
    """What a calibration file tells of itself: the model that it is of (`facts_of`), the tokens that were read,
    and the units of its sensitivities, with the format that each was measured with.
    """

    model: str
    tokens: int
    units: object = None

    @classmethod
    def read(cls, raw: str, where: str) -> About | None:
        """Return what the text in a file's metadata tells; None where it is of no calibration file.

        Raises `InputError` for a field that is not as it has to be, naming it.
        """
        try:
            told = strict_json.loads(raw.encode(), where)
        except InputError:
            return None
        if not isinstance(told, dict) or told.get("kind") != KIND:
            return None
        fields = Fields.of(told, f"{where}: metadata {METADATA}", "make the file again: ds4convert calibrate")
        return cls(fields.text("model"), fields.count("tokens"), told.get("units"))


Arrays = Mapping[str, NDArray[Any]]


def _opened(path: Path) -> tuple[str, Arrays]:
    """Return the text about a calibration file in its metadata ("" without one), and its tensors."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as f:
        tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 - not a mapping
        return (f.metadata() or {}).get(METADATA, ""), tensors


def check_target(path: Path) -> None:
    """Raise `OutputError` where another file than a calibration has the name of the one to be written."""
    from safetensors import SafetensorError, safe_open

    if not path.exists() and not path.is_symlink():
        return
    try:
        with safe_open(path, framework="numpy") as f:
            told = About.read((f.metadata() or {}).get(METADATA, ""), str(path))
    except (OSError, SafetensorError, ValueError, TypeError, InputError):
        told = None
    if told is None:
        raise OutputError(f"{path}: is there, and no calibration file; it is not replaced: choose another name for OUT")


def read(path: Path, inventory: Inventory) -> Calibration:
    """Return the calibration at `path`. Raises `InputError` where it is none, damaged, or of another model."""
    from safetensors import SafetensorError

    try:
        text, tensors = _opened(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, SafetensorError, ValueError, TypeError) as e:
        raise InputError(
            f"{path}: cannot be read as a calibration file: {e}", hint="make one with: ds4convert calibrate"
        ) from None
    about = About.read(text, str(path))
    if about is None:
        raise InputError(f"{path}: is not a calibration file", hint="make one with: ds4convert calibrate")
    if about.model != facts_of(inventory):
        raise InputError(
            f"{path}: is the calibration of a model of other dimensions",
            hint="run ds4convert calibrate on a conversion of this checkpoint",
        )
    modules = {key_of(m): m for m in inventory.modules}  # a head that this checkpoint does not have is passed over
    keys = [k for k in tensors if not k.endswith(ROWS) and k in modules]
    for key in keys:
        _check(path, key, modules[key], tensors)
    sensitive = _sensitivities(path, about.units, tensors, inventory)
    return Calibration(digest, {k: tensors[k] for k in keys}, {k: tensors[k + ROWS] for k in keys}, sensitive)


def _check(path: Path, key: str, module: Module, tensors: Arrays) -> None:
    """Raise `InputError` unless a matrix has the moments, and the row counts, that its shape asks for."""
    values, counted = tensors[key], tensors.get(key + ROWS)
    wanted = (module.experts, module.shape[1]) if module.experts else (module.shape[1],)
    good = values.dtype == np.float32 and values.shape == wanted and np.isfinite(values).all() and (values >= 0).all()
    if not good or counted is None or counted.shape != (module.experts or 1,) or (counted < 0).any():
        raise InputError(
            f"{path}: {key}: expected finite float32 {list(wanted)} with row counts", hint="make the file again"
        )


def _sensitivities(path: Path, units: object, tensors: Arrays, inventory: Inventory) -> Sensitivities | None:
    """Return the sensitivities of a file, None where it has none. Raises `InputError` where they are of other units."""
    values = tensors.get(SENSITIVITY)
    if values is None and units is None:
        return None
    wanted = probes(inventory)
    good = isinstance(units, dict) and all(isinstance(p, str) and p in CODECS for p in units.values())
    if (
        not good
        or not isinstance(units, dict)
        or values is None
        or values.dtype != np.float32
        or values.shape != (len(units),)
    ):
        raise InputError(
            f"{path}: {SENSITIVITY}: damaged", hint="make the file again with: ds4convert calibrate --sensitivity"
        )
    if units.keys() != wanted.keys() or not np.isfinite(values).all() or (values < 0).any():
        other = sorted(units.keys() ^ wanted.keys())
        raise InputError(
            f"{path}: has sensitivities of {len(units)} matrices, expected one for each of "
            f"{len(wanted)}"
            f"{(f' ({other[0]} is in one of the two only)' if other else ', none negative or infinite')}",
            hint="make the file again with: ds4convert calibrate --sensitivity",
        )
    return Sensitivities(dict(zip(sorted(units), map(float, values), strict=True)), units)
