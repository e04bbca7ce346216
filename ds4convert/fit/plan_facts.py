"""What a plan comes to, in figures: the facts behind `plan` and `quantize --json`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ds4convert.checkpoint.family import families
from ds4convert.checkpoint.inventory import HEAD, group_of
from ds4convert.checkpoint.types import JSON
from ds4convert.converted import grouping
from ds4convert.converted.grouping import Item
from ds4convert.execution import workers
from ds4convert.execution.feeders import division
from ds4convert.files import free_bytes
from ds4convert.fit.forecast import peak_memory, worker_bytes
from ds4convert.planning import build
from ds4convert.planning.types import Plan
from ds4convert.words import macs

RAM_SIZES_GB = (32, 64, 96, 128, 192, 256, 512)


def summarise(plan: Plan, out: Path, jobs: int, cores: int | None = None) -> JSON:
    """Return the figures of a plan under the keys of the command line contract."""
    size = build.output_bytes(plan)
    family = families().get(plan.family)
    mapped = sum(o.size for s in plan.steps for o in s.outputs if family and s.role in family.mapped_roles)
    weights = sum(s.weights for s in _first_copies(plan))
    stored = sum(o.size for s in _first_copies(plan) for o in s.outputs)
    cores = cores or workers.all_cores()
    found = division.divided(plan, cores)
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
        "peak_memory_bytes": peak_memory(plan, jobs, cores),
        "cores": cores,
        "workers": found.all_workers,
        "worker_bytes": worker_bytes(plan, found) if found.all_workers else 0,
        "bits_per_weight": round(8 * stored / weights, 4) if weights else None,
        "fits_in_ram": {f"{gb} GB": size - mapped <= macs.usable(gb * macs.GIB) for gb in RAM_SIZES_GB},
        "groups": groups(plan),
        "left_out": [{"tensor": x.tensor, "why": x.why} for x in plan.left_out],
        "files_left_out": [{"file": x.tensor, "why": x.why} for x in plan.files_left_out],
    } | ({"mapped_bytes": mapped} if mapped else {})


def too_large(plan: Plan, limit: int) -> list[JSON]:
    """Return the files over the shard size that was wished, as one tensor alone is: file, tensor, bytes."""
    over = [o for s in plan.steps for o in s.outputs if o.size > limit]
    return [{"file": plan.files[o.file].name, "tensor": o.name, "bytes": o.size} for o in over]


def _first_copies(plan: Plan) -> list:  # type: ignore[type-arg]
    """Return the steps without those of a second copy of the head."""
    places = dict.fromkeys(plan.files[s.outputs[0].file].name.rpartition("/")[0] for s in plan.steps if s.part == HEAD)
    first = next(iter(places), "")
    return [s for s in plan.steps if s.part != HEAD or plan.files[s.outputs[0].file].name.rpartition("/")[0] == first]


def groups(plan: Plan) -> list[JSON]:
    """Return per group of the output: name, tensors, bytes, dtypes and formats; the head's behind the backbone's."""
    items = (Item(group_of(s.part, s.role), o.dtype, s.format, o.size) for s in plan.steps for o in s.outputs)
    found = grouping.head_last(grouping.by_role(items))
    return [g.as_json() | {"dtypes": list(g.dtypes), "formats": list(g.formats)} for g in found]


def full(plan: Plan) -> Mapping[str, object]:
    """Return the whole plan, every step and byte range."""
    return build.as_json(plan)
