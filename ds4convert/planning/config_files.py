"""The small files that a plan writes: config.json, the index, the quantization table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ds4convert.checkpoint import config as configs
from ds4convert.checkpoint.family import Family
from ds4convert.checkpoint.inventory import BACKBONE, HEAD, Inventory, Module
from ds4convert.checkpoint.types import JSON
from ds4convert.errors import ConfigError
from ds4convert.planning import host_block
from ds4convert.planning.encodings import Encoding
from ds4convert.planning.layouts import HeadPlace, Layout
from ds4convert.planning.types import OutputFile, Step
from ds4convert.storage import strict_json

STAGE_COUNT = "n_mtp_layers"
"""Stages of a head in the folder itself, where its family says that programs read them there: oMLX does.

The promise of a Hugging Face config does not count them (DSpark description, section 1)."""

INDEX_NAME = "model.safetensors.index.json"


def model_file(layout: Layout, source: bytes) -> dict[str, bytes]:
    """Return the model file that the layout's config names, by name; {} for a layout without one."""
    name = layout.model_file
    if not name:
        return {}
    if not source:
        raise ValueError(f"layout {layout.name}: expected Options.model_source, the text of its {name}")
    return {name: source}


def texts(
    inventory: Inventory,
    layout: Layout,
    places: Sequence[HeadPlace],
    encoded: Sequence[tuple[Module, str, Encoding]],
    files: Sequence[OutputFile],
    steps: Sequence[Step],
    has_head: bool,
) -> tuple[dict[str, bytes], JSON]:
    """Return the config and index files of the folder and of drafter folders, and the quantization table.

    The config is that of `inventory`, so its stages have to be those that the head's source states.
    """
    inside = [p for p in places if not p.folder]
    paths = [(n, e) for m, _, e in encoded if m.part == BACKBONE for n in layout.backbone.table_names(m)]
    paths += [(n, e) for p in inside for m, _, e in encoded if m.part == HEAD for n in p.table_names(m)]
    table = _table(paths)
    family = inventory.config.family
    stages_key, skipped = family.config_keys["stages"], source_only_keys(family)
    source = {k: v for k, v in inventory.config.flat.items() if k not in skipped}
    if has_head and layout.promises_head:
        promised = source.get(stages_key, inventory.stages)
    else:  # programs look for a head where these keys are, and there is none beside this config
        source, promised = configs.without_heads_keys(family, source), 0
    counts = inside and has_head and family.heads[inventory.head_kind].counted
    counted = {STAGE_COUNT: inventory.stages} if counts else {}
    bare = family.unflat(source | {stages_key: promised} | counted)
    own = host_block.written(layout, places, encoded, files, steps)
    config = bare | own if own else _quantized(bare, table)
    if layout.model_file:
        config["model_file"] = layout.model_file
    out = {"config.json": strict_json.pretty(config), INDEX_NAME: _index(files, steps, "")}
    for p in places:
        if p.folder:
            inner = [(n, e) for m, _, e in encoded if m.part == HEAD for n in p.table_names(m)]
            filled = {k: _fill(v, inventory, config, stages_key) for k, v in p.config.items()}
            out[f"{p.folder}/config.json"] = strict_json.pretty(_quantized(filled, _table(inner)))
            out[f"{p.folder}/{INDEX_NAME}"] = _index(files, steps, p.folder + "/")
        for name, values in p.beside.get(inventory.head_kind, {}).items():
            told = {k: _fill(v, inventory, config, stages_key) for k, v in values.items()}
            out[name] = strict_json.pretty(told)
    return out, table


SOURCE_ONLY_KEYS = {"quantization_config", "expert_dtype", "quantization", "model_file", "auto_map", STAGE_COUNT}
"""Keys that describe the source's storage, name code, or count what was stored; the result has its own."""


def source_only_keys(family: Family) -> set[str]:
    """Return the keys of a source's config, dotted ones too, that the result does not take over."""
    return SOURCE_ONLY_KEYS | {family.storage.expert_dtype} | host_block.block_keys(family)


def _quantized(config: JSON, table: JSON) -> JSON:
    return config | ({"quantization": table, "quantization_config": table} if table else {})


def _table(paths: Sequence[tuple[str, Encoding]]) -> JSON:
    """Return the full per-path quantization table, or {} where nothing is quantized.

    The scalars at its top are what hosts assume for a path that is not listed; every path is listed.
    """
    entries = {path: dict(e.table) for path, e in paths if e.table is not None}
    if not entries:
        return {}
    return {**next(iter(entries.values())), **entries}


def _index(files: Sequence[OutputFile], steps: Sequence[Step], folder: str) -> bytes:
    weight_map, total = {}, 0
    for output in (o for s in steps for o in s.outputs):
        name = files[output.file].name
        if name.startswith(folder) and "/" not in name.removeprefix(folder):
            weight_map[output.name] = name.removeprefix(folder)
            total += output.size
    return strict_json.pretty({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def _fill(value: Any, inventory: Inventory, config: JSON, stages_key: str) -> Any:
    """Return a drafter's config value with its `$name` filled in: facts of the head, or a key of the config."""
    if not isinstance(value, str) or not value.startswith("$"):
        return value
    name, plus = value[1:], 0
    if name.endswith("_plus_one"):
        name, plus = name.removesuffix("_plus_one"), 1
    family, raw = inventory.config.family, inventory.config.flat
    if name == "source_config":
        skipped = source_only_keys(family)
        text = {k: v for k, v in raw.items() if k not in skipped}
        return family.unflat(text | {stages_key: raw.get(stages_key, inventory.stages)})
    if name == "stages":
        return inventory.stages + plus
    if name not in raw or (plus and type(raw[name]) is not int):
        raise ConfigError(f"config.json: the drafter folder of this layout needs the key {name}")
    return raw[name] + plus if plus else raw[name]
