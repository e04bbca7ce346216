"""Synthetic checkpoints in the official format, of any size: random but finite values, streamed, fixed by a seed.

Values are scaled so that a forward pass stays finite and lively. Each tensor's stream depends on the seed and its
name alone, so more layers or experts do not change the others.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ds4convert.checkpoint.config import ModelConfig, check_config, parse_config, without_heads_keys
from ds4convert.checkpoint.family import Family, family_of
from ds4convert.checkpoint.headers import DTYPE_BYTES, build_header
from ds4convert.checkpoint.inventory import HEAD, Inventory, TensorSpec, expected
from ds4convert.errors import EnvironmentFault, OutputError, UsageError
from ds4convert.files import PARTIAL, Disk, disk_errors, free_bytes
from ds4convert.planning.shards import file_names
from ds4convert.storage import strict_json
from ds4convert.storage.safe_open import names_in

CHUNK_BYTES = 4 << 20

RMS_FP4, RMS_E4M3 = 2.93, 100.0
"""Root mean square of evenly drawn codes; block scales divide by it."""

Raw = Callable[[int], NDArray[np.uint64]]


def shrink(raw: Mapping[str, Any], layers: int | None, experts: int | None, head: str | None = None) -> dict[str, Any]:
    """Return a copy of the config `raw` with fewer layers and experts and another kind of head.

    The layers kept are the first ones; if those would miss a kind of attention, one of each kind comes first, the
    compressed kinds being kept longest. With two layers or more, the last is routed by score, not by hash. Lists of
    layers lose those that are gone.
    """
    family = family_of(raw["model_type"])
    out, keys = family.flat(raw), family.config_keys
    count = out[keys["layers"]]
    ratios, tail = _ratios_of(family, out, count)
    if layers is not None:
        if layers < 1:
            raise UsageError("--layers must be at least 1")
        kinds = sorted(set(ratios))
        cut = [ratios[i % count] for i in range(layers)]
        if set(cut) != set(kinds):
            cut = kinds[-layers:] if layers <= len(kinds) else kinds + cut[len(kinds) :]
        ratios = cut
        out[keys["layers"]] = layers
        out |= _marks_of(family, out, layers) | _taps_of(family, out, layers)
    if experts is not None:
        if experts < 1:
            raise UsageError("--experts must be at least 1")
        total, active = family.dims[family.experts], family.dims[family.active]
        out |= {total: experts, active: min(out[active], experts)}
    if head == "none":
        tail, out = [], without_heads_keys(family, out | {keys["stages"]: 0})
    elif head is not None:
        out, tail = _with_head(family, out, head, tail)
    if "ratios" in keys:
        out[keys["ratios"]] = ratios + tail
    return family.unflat(out)


def _ratios_of(family: Family, flat: Mapping[str, Any], count: int) -> tuple[list[int], list[int]]:
    """Return the compress ratios of the layers and of the head."""
    key = family.config_keys.get("ratios")
    found = [0] * count if key is None else list(flat[key])
    return found[:count], found[count:]


def _marks_of(family: Family, flat: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """Return the keys that mark layers, and those of dims that layers have of their own, for the layers that are left.

    A number that marks the first layers leaves one of two or more without the mark.
    """
    out: dict[str, Any] = {}
    for rule in family.marks.values():
        if rule.before:
            out[rule.before] = min(flat.get(rule.before, 0), max(1, layers - 1))
        elif rule.listed:
            out[rule.listed] = [n for n in flat[rule.listed] if n < layers]
    for each in family.per_layer.values():
        listed = flat[family.marks[each.mark].listed]
        out[each.key] = [v for n, v in zip(listed, flat[each.key], strict=True) if n < layers]
    for key in family.carriers:
        if type(only := flat.get(key)) is int and only >= layers:
            out[key] = _in_its_place(only, [flat.get(k) for k in family.carriers], layers)
    return out


def _in_its_place(gone: int, lists: Sequence[Any], layers: int) -> int:
    """Return the layer that stands for one that is gone: the last of the first list that it was in, else the last."""
    found = next((x for x in lists if isinstance(x, list) and gone in x), [])
    return max((n for n in found if n < layers), default=layers - 1)


def _taps_of(family: Family, flat: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """Return the lists of layers that a head reads, where they name one that is gone: the last layers, then."""
    heads = family.heads.values()
    read = [k for h in heads for k, limit in h.below.items() if limit == "layers" and isinstance(flat.get(k), list)]
    gone = [k for k in read if any(n >= layers for n in flat[k])]
    return {k: [max(layers - n, 0) for n in range(len(flat[k]), 0, -1)] for k in gone}


def _with_head(family: Family, flat: dict[str, Any], kind: str, tail: list[int]) -> tuple[dict[str, Any], list[int]]:
    """Return the config with another kind of head, and the compress ratios of its stages."""
    if kind not in family.heads:
        raise UsageError(f"--head {kind}: {family.title} has no such head; expected one of: {', '.join(family.heads)}")
    wanted, layers = family.heads[kind], flat[family.config_keys["layers"]]
    if not wanted.invented:
        return flat, tail
    made = {key: _invented(rule, family, flat, layers) for key, rule in wanted.invented.items()}
    return flat | made, [0] * wanted.default_stages


def _invented(rule: Any, family: Family, flat: Mapping[str, Any], layers: int) -> Any:
    """Return the value that a rule of a family file makes for a key of a head."""
    if not isinstance(rule, dict):
        return rule
    if "at_most" in rule:
        return min(rule["at_most"], flat[family.dims[rule["of"]]])
    if "last" in rule:
        return flat[family.dims[rule["last"]]] - 1
    return [max(layers - n, 0) for n in range(rule["last_layers"], 0, -1)]


def write(
    raw: Mapping[str, Any],
    out: Path,
    seed: int = 0,
    jobs: int = 2,
    progress: Callable[[int], None] = lambda n: None,
    disk: Disk | None = None,
) -> int:
    """Write the checkpoint that the config `raw` describes into the empty or new folder `out`; return its bytes.

    One shard for the embedding, one per layer, one for the output matrix, one for the head, as the official
    releases have it. Raises `OutputError` when the folder is not empty.
    """
    disk = disk or Disk()
    config = check_config(raw)
    if out.exists() and (not out.is_dir() or names_in(out)):
        raise OutputError(f"{out}: is not an empty folder", hint="choose another")
    groups = shards(expected(config))
    total = sum(tensor_bytes(s) for shard in groups for s in shard)
    if free_bytes(out) < total:
        raise EnvironmentFault(
            f"{out}: {total:,} bytes are needed, {free_bytes(out):,} are free", hint="use --layers or --experts"
        )
    names = file_names("model", len(groups), True)
    with disk_errors("writing", out):
        disk.make_folder(out)
        with ThreadPoolExecutor(jobs) as pool:
            tasks = [
                pool.submit(_write_shard, disk, out / n, s, config, seed, progress)
                for n, s in zip(names, groups, strict=True)
            ]
            for task in tasks:
                task.result()
        weight_map = {s.name: n for n, shard in zip(names, groups, strict=True) for s in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        disk.write_file(out / "model.safetensors.index.json", strict_json.pretty(index))
        disk.write_file(out / "config.json", strict_json.pretty(raw))
    return total


def parse(raw: bytes, where: str) -> dict[str, Any]:
    """Return the parsed and checked config that a synthetic checkpoint is to follow."""
    return dict(parse_config(raw, where).raw)


def total_bytes(raw: Mapping[str, Any]) -> int:
    """Return the bytes of all tensors of the checkpoint that `write` would make of this config."""
    return sum(tensor_bytes(s) for s in expected(check_config(raw)).tensors())


def tensor_bytes(spec: TensorSpec) -> int:
    """Return the bytes of a tensor in its usual dtype."""
    return math.prod(spec.shape) * DTYPE_BYTES[spec.dtypes[0]]


def shards(inventory: Inventory) -> list[list[TensorSpec]]:
    """Return the tensors of each shard, in the order of their bytes: wider dtypes first, then by name."""
    groups: dict[tuple[int, int], list[TensorSpec]] = {}
    layers = inventory.config.layers
    for spec in inventory.tensors():
        if spec.part == HEAD:
            key = (3, 0)
        elif spec.layer is not None:
            key = (1, spec.layer)
        else:
            key = (0, 0) if spec.role == "embedding" else (2, layers)
        groups.setdefault(key, []).append(spec)
    order = [groups[k] for k in sorted(groups)]
    return [sorted(g, key=lambda s: (-DTYPE_BYTES[s.dtypes[0]], s.dtypes[0], s.name)) for g in order]


def _write_shard(
    disk: Disk,
    path: Path,
    specs: list[TensorSpec],
    config: ModelConfig,
    seed: int,
    progress: Callable[[int], None],
) -> None:
    header = build_header(((s.name, s.dtypes[0], s.shape, tensor_bytes(s)) for s in specs), {"format": "pt"})
    partial = path.with_name(path.name + PARTIAL)
    fd = disk.open_partial(partial, len(header) + sum(tensor_bytes(s) for s in specs))
    try:
        disk.write_at(fd, header, 0)
        at = len(header)
        for spec in specs:
            for data in _values(spec, config, seed):
                disk.write_at(fd, data, at)
                at += len(data)
                progress(len(data))
        disk.sync_data(fd)
    finally:
        os.close(fd)
    disk.rename(partial, path)


def _values(spec: TensorSpec, config: ModelConfig, seed: int) -> Iterator[memoryview]:
    """Yield the tensor's bytes in pieces of about 4 MB."""
    key = hashlib.sha256(f"{seed}\0{spec.name}".encode()).digest()
    words = np.frombuffer(key, "<u4").tolist()
    stream: Raw = np.random.SFC64(np.random.SeedSequence(words)).random_raw
    make, width = _MAKERS[spec.dtypes[0]]
    left, start = math.prod(spec.shape), 0
    while left:
        n = min(left, CHUNK_BYTES // width)
        raw = np.asarray(stream(-(-n * width // 8)), np.uint64).view(np.uint8)[: n * width]
        made = make(raw, spec, config, start)
        yield np.ascontiguousarray(made).reshape(-1).view(np.uint8).data
        left, start = left - n, start + n


Maker = Callable[[NDArray[np.uint8], TensorSpec, ModelConfig, int], NDArray[Any]]


def _fp4(raw: NDArray[np.uint8], spec: TensorSpec, config: ModelConfig, start: int) -> NDArray[Any]:
    return raw


def _e4m3(raw: NDArray[np.uint8], spec: TensorSpec, config: ModelConfig, start: int) -> NDArray[Any]:
    out = raw.copy()
    out[(out & 0x7F) == 0x7F] ^= 1
    return out


def _e8m0(raw: NDArray[np.uint8], spec: TensorSpec, config: ModelConfig, start: int) -> NDArray[Any]:
    """Scales around the one that gives rows of unit gain: 2^-1, 1 or 2 times it."""
    is_fp4 = spec.scales == "fp4"
    columns = spec.shape[-1] * spec.group
    middle = 127 + round(math.log2(1 / ((RMS_FP4 if is_fp4 else RMS_E4M3) * math.sqrt(columns))))
    return (raw % 3 + (middle - 1)).astype(np.uint8)


def _bf16(raw: NDArray[np.uint8], spec: TensorSpec, config: ModelConfig, start: int) -> NDArray[Any]:
    bits = raw.view("<u2")
    if len(spec.shape) == 1:  # a norm's weights: from 1 to 1.25
        return 0x3F80 | (bits & 0x1F)
    exponent = 127 + round(math.log2(1 / math.sqrt(spec.shape[1])))
    return (bits & 0x80FF) | np.uint16(((exponent - 1) & 0xFE) << 7)


def _f32(raw: NDArray[np.uint8], spec: TensorSpec, config: ModelConfig, start: int) -> NDArray[Any]:
    gain = 1 / math.sqrt(spec.shape[-1]) if spec.name.endswith("_fn") else 0.5
    return ((raw.view("<u4") / np.float32(1 << 31) - 1) * np.float32(gain)).astype("<f4")


def _i64(raw: NDArray[np.uint8], spec: TensorSpec, config: ModelConfig, start: int) -> NDArray[Any]:
    """Rows of distinct experts: the n-th entry of a row is its row's number, hashed, plus n, modulo E."""
    k, experts = spec.shape[1], spec.values_below
    at = start + np.arange(raw.size // 8, dtype=np.int64)
    row, n = at // k, at % k
    return ((row * 2654435761 % 4294967296 // 65536 + n) % experts).astype("<i8")


_MAKERS: Mapping[str, tuple[Maker, int]] = {
    "I8": (_fp4, 1), "F8_E4M3": (_e4m3, 1), "F8_E8M0": (_e8m0, 1), "BF16": (_bf16, 2), "F32": (_f32, 4),
    "I64": (_i64, 8),
}  # fmt: skip
