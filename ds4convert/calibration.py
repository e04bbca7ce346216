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

from ds4convert import strictjson
from ds4convert.errors import InputError
from ds4convert.files import Disk, disk_errors
from ds4convert.inventory import Inventory
from ds4convert.layouts import key_of

METADATA = "ds4convert"
KIND = "calibration"
ROWS = ".rows"
SEEN = 64
"""Rows from which on an expert's own moments count more than the mean of its layer's."""


@dataclass(frozen=True)
class Calibration:
    """A calibration file that fits a model: moments by key, rows by key, sha256 of the file."""

    digest: str
    moments: Mapping[str, NDArray[np.float32]]
    rows: Mapping[str, NDArray[np.int64]]

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


def write(path: Path, inventory: Inventory, found: Mapping[str, Any], tokens: int) -> int:
    """Write moments (`squares` and `rows` by key) as a calibration file; return its size in bytes."""
    from safetensors.numpy import save

    tensors: dict[str, np.ndarray] = {}
    for key, moments in sorted(found.items()):
        rows = np.asarray(moments.rows)
        tensors[key] = (moments.squares / np.maximum(rows, 1)[..., None]).astype(np.float32)
        tensors[key + ROWS] = np.atleast_1d(rows).astype(np.int64)
    # One key: the library writes several in any order, and equal input has to give equal bytes.
    told = json.dumps({"kind": KIND, "model": facts_of(inventory), "tokens": tokens}, sort_keys=True)
    data = save(tensors, {METADATA: told})
    with disk_errors("writing", path):
        Disk().write_file(path, data)
    return len(data)


def read(path: Path, inventory: Inventory) -> Calibration:
    """Return the calibration at `path`. Raises `InputError` where it is none, damaged, or of another model."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as f:
            told = strictjson.loads((f.metadata() or {}).get(METADATA, "{}").encode(), str(path), InputError)
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 - not a mapping
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, SafetensorError, ValueError, TypeError) as e:
        raise InputError(
            f"{path}: cannot be read as a calibration file: {e}; make one with: ds4convert calibrate"
        ) from None
    if not isinstance(told, dict) or told.get("kind") != KIND:
        raise InputError(f"{path}: is not a calibration file; make one with: ds4convert calibrate")
    if told.get("model") != facts_of(inventory):
        raise InputError(
            f"{path}: is the calibration of a model of other dimensions; run ds4convert calibrate on a conversion of "
            "this checkpoint"
        )
    modules = {key_of(m): m for m in inventory.modules}
    moments: dict[str, NDArray[np.float32]] = {}
    rows: dict[str, NDArray[np.int64]] = {}
    for key, values in tensors.items():
        if key.endswith(ROWS):
            continue
        module, counted = modules.get(key), tensors.get(key + ROWS)
        if module is None:
            continue  # of a head that this checkpoint does not have
        wanted = (module.experts, module.shape[1]) if module.experts else (module.shape[1],)
        good = (
            values.dtype == np.float32 and values.shape == wanted and np.isfinite(values).all() and (values >= 0).all()
        )
        if not good or counted is None or counted.shape != (module.experts or 1,) or (counted < 0).any():
            raise InputError(
                f"{path}: {key}: expected finite float32 {list(wanted)} with row counts; make the file again"
            )
        moments[key], rows[key] = values, counted
    return Calibration(digest, moments, rows)
