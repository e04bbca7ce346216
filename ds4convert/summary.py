"""What a plan comes to, in figures: the facts behind `plan` and `quantize --json`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from ds4convert import plan as plans
from ds4convert import pool
from ds4convert.execute import BUFFERS
from ds4convert.files import free_bytes
from ds4convert.formats.quantize import STORES
from ds4convert.formats.transforms import CHUNK_BYTES, numbers
from ds4convert.headers import DTYPE_BYTES
from ds4convert.inspection import group_of
from ds4convert.inventory import Inventory, Named
from ds4convert.types import JSON, Plan, SourceFile, TensorInfo

BASE_BYTES = 60 << 20
"""An interpreter with numpy, measured."""

STEP_BYTES, SOURCE_BYTES = 2_500, 1_000
"""What a step and a source tensor (header entry, names, ranges) take in memory, measured on Flash's inventory."""

TILE_BYTES = 40 << 20
"""What rounding one chunk takes in the run's own process: its values, codes and errors, and tiles of them."""

RAM_SIZES_GB = (32, 64, 96, 128, 192, 256, 512)
USABLE = 0.75
"""The part of a Mac's memory that Metal may use by default."""


def peak_memory(plan: Plan, jobs: int) -> int:
    """Return the bytes of memory that carrying out the plan with `jobs` workers takes at most."""
    tensors = sum(len(names) for s in plan.steps for names in s.sources)
    sizes = (numbers(s) for s in plan.steps)
    made = max((p.get("rows", 0) * p.get("cols", 0) // 32 for p in sizes), default=0)
    worker = (BUFFERS + 6) * CHUNK_BYTES + min(2 * made, 64 << 20)
    rounded = sum(s.weights for s in plan.steps if s.transform in STORES)
    return (
        BASE_BYTES
        + STEP_BYTES * len(plan.steps)
        + SOURCE_BYTES * tensors
        + min(jobs, len(plan.files)) * worker
        + (pool.workers() * (pool.WORKER_BYTES if pool.uses_processes(rounded) else TILE_BYTES) if rounded else 0)
    )


def summarise(plan: Plan, out: Path, jobs: int) -> JSON:
    """Return the figures of a plan under the keys of the command line contract."""
    size = plans.output_bytes(plan)
    weights = sum(s.weights for s in _first_copies(plan))
    stored = sum(o.size for s in _first_copies(plan) for o in s.outputs)
    return {
        "plan": plan.id,
        "family": plan.family,
        "head": plan.head_kind,
        "recipe": plan.recipe,
        "formats": dict(plan.formats),
        "layout": plan.layout,
        "output_bytes": size,
        "output_tensors": sum(len(s.outputs) for s in plan.steps),
        "output_shards": len(plan.files),
        "free_bytes": free_bytes(out.absolute()),
        "peak_memory_bytes": peak_memory(plan, jobs),
        "bits_per_weight": round(8 * stored / weights, 4) if weights else None,
        "fits_in_ram": {f"{gb} GB": size <= gb * 1e9 * USABLE for gb in RAM_SIZES_GB},
        "groups": groups(plan),
        "left_out": [{"tensor": x.tensor, "why": x.why} for x in plan.left_out],
        "files_left_out": [{"file": x.tensor, "why": x.why} for x in plan.files_left_out],
    }


def _first_copies(plan: Plan) -> list:  # type: ignore[type-arg]
    """Return the steps without those of a second copy of the head."""
    places = dict.fromkeys(plan.files[s.outputs[0].file].name.rpartition("/")[0] for s in plan.steps if s.part == "mtp")
    first = next(iter(places), "")
    return [s for s in plan.steps if s.part != "mtp" or plan.files[s.outputs[0].file].name.rpartition("/")[0] == first]


def groups(plan: Plan) -> list[JSON]:
    """Return per group of the output: name, tensors, bytes, dtypes and formats."""
    out: dict[str, JSON] = {}
    for s in plan.steps:
        name = group_of(s.part, s.role)
        g = out.setdefault(name, {"name": name, "tensors": 0, "bytes": 0, "dtypes": [], "formats": []})
        for o in s.outputs:
            g["tensors"] += 1
            g["bytes"] += o.size
            if o.dtype not in g["dtypes"]:
                g["dtypes"].append(o.dtype)
        if s.format not in g["formats"]:
            g["formats"].append(s.format)
    order = sorted(out.values(), key=lambda g: g["name"].startswith("mtp."))
    return order


def imagined(inventory: Inventory) -> tuple[Named, tuple[SourceFile, ...]]:
    """Return the tensors that a checkpoint of this inventory would have, in one imagined file."""
    tensors: dict[str, TensorInfo] = {}
    at = 0
    for spec in inventory.tensors():
        size = math.prod(spec.shape) * DTYPE_BYTES[spec.dtypes[0]]
        tensors[spec.name] = TensorInfo(spec.name, spec.dtypes[0], spec.shape, 0, at, size)
        at += size
    return Named(tensors, ()), (SourceFile("(from the config alone)", at, ""),)


def full(plan: Plan) -> Mapping[str, object]:
    """Return the whole plan, every step and byte range."""
    return plans.as_json(plan)
