"""A host's own table in config.json, in place of the usual quantization table: written, and read back.

Owns what a layout's `[block]` means: the key, its fixed values, and what is told of packed modules and of tables of
which the host reads single rows. Source: oMLX, omlx/patches/deepseek_v41/ (convert.py, loading.py, storage.py), read
and not run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ds4convert.checkpoint.family import Family
from ds4convert.checkpoint.inventory import BACKBONE, HEAD, Module
from ds4convert.checkpoint.types import JSON
from ds4convert.planning.encodings import Encoding
from ds4convert.planning.layouts import HeadPlace, Layout, layouts
from ds4convert.planning.types import OutputFile, Step

MODULES, TABLES = "quantized_modules", "engram_tables"
"""The keys of the block under which packed modules and mapped tables stand."""

GROUP_OF_MX = 32
"""Columns per scale of mxfp4 and mxfp8, which the block need not say."""

PARTS = (("weight", "weight"), ("scale", "scales"), ("scale", "scale"), ("bias", "biases"))
"""What the block calls a part of a mapped table, and how its tensor's name ends."""


def written(
    layout: Layout,
    places: Sequence[HeadPlace],
    encoded: Sequence[tuple[Module, str, Encoding]],
    files: Sequence[OutputFile],
    steps: Sequence[Step],
) -> JSON:
    """Return {key: block} of a layout that has one, else {}."""
    if not layout.block:
        return {}
    at = {o.name: files[o.file].name for s in steps for o in s.outputs}
    modules: JSON = {}
    tables: JSON = {}
    for module, _, encoding in encoded:
        spelled = [layout.backbone] if module.part == BACKBONE else list(places)
        for path in (p.name(module) for p in spelled):
            if module.role in layout.official:
                tables[path] = _table(path, encoding, at)
            elif encoding.table is not None:
                modules[path] = _entry(encoding.table)
    told = dict(layout.block["values"]) | {MODULES: modules, TABLES: tables}
    return {layout.block["key"]: told | {layout.block["head"]: any(m.part == HEAD for m, _, _ in encoded)}}


def _entry(table: Mapping[str, int | str]) -> JSON:
    """Return what tells of a packed module: bits and mode, and the group where the mode does not imply it."""
    implied = str(table["mode"]).startswith("mx")
    return {k: v for k, v in table.items() if not (implied and k == "group_size")}


def _table(path: str, encoding: Encoding, at: Mapping[str, str]) -> JSON:
    """Return what tells of a mapped table: the names of its tensors, their files, and its codec where it has one."""
    out: JSON = {}
    for part, suffix in PARTS:
        if (name := f"{path}.{suffix}") in at:
            out |= {f"{part}_key": name, f"{part}_file": at[name]}
    out.pop("bias_file", None)  # it lies where the scales do
    if encoding.table is None:
        return out
    return out | {"bits": encoding.table["bits"], "group_size": encoding.table["group_size"], "mode": "affine"}


def block_keys(family: Family) -> set[str]:
    """Return the keys of such tables in any layout of a family."""
    own = (y.of(family) for y in layouts().values())
    return {str(y.block["key"]) for y in own if y is not None and y.block}


def table_in(family: Family, config: Mapping[str, Any]) -> JSON | None:
    """Return the quantization table that a block in a config comes to, None where it has none."""
    for key in block_keys(family):
        block = config.get(key)
        if isinstance(block, dict):
            modules, tables = block.get(MODULES), block.get(TABLES)
            known = {k: v for t in (modules, tables) if isinstance(t, dict) for k, v in t.items()}
            return {k: {"group_size": GROUP_OF_MX} | v for k, v in known.items() if isinstance(v, dict) and "bits" in v}
    return None
