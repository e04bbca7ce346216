"""Converted folders that other programs wrote, in our spelling: names, shapes, and the quantization table.

Owns the rules of `manifests/spellings.toml`. Only headers and the config are renamed, no byte of a tensor moves.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Any

from ds4convert import strictjson
from ds4convert.errors import HeaderError
from ds4convert.folder import CONFIG_NAME, Checkpoint
from ds4convert.types import JSON, Header, TensorInfo

TABLES = ("quantization", "quantization_config")
SUFFIXES = (".weight", ".scales", ".biases")


@dataclass(frozen=True)
class Spellings:
    """The rules of the file: prefixes and components as pairs (theirs, ours)."""

    prefixes: Sequence[tuple[str, str]]
    components: Mapping[str, str]
    head_wrappers: frozenset[str]
    joined: tuple[str, ...]

    def name(self, name: str) -> str:
        """Return our name of a tensor or a module."""
        for theirs, ours in self.prefixes:
            if name.startswith(theirs):
                name = ours + name.removeprefix(theirs)
        parts = [self.components.get(p, p) for p in name.split(".")]
        if len(parts) > 3 and parts[0] == "mtp" and parts[2] in self.head_wrappers:
            del parts[2]
        return ".".join(parts)

    def tensor(self, info: TensorInfo) -> TensorInfo:
        """Return a tensor under our name, in our shape."""
        name, shape = self.name(info.name), info.shape
        stem = name.removesuffix(next((s for s in SUFFIXES if name.endswith(s)), ""))
        if len(shape) == 3 and any(stem == j or stem.endswith(f".{j}") for j in self.joined):
            shape = (shape[0] * shape[1], shape[2])
        return info if (name, shape) == (info.name, info.shape) else replace(info, name=name, shape=shape)


@cache
def spellings() -> Spellings:
    """Return the rules that ship with the package."""
    t = tomllib.loads(resources.files("ds4convert.manifests").joinpath("spellings.toml").read_text("utf-8"))
    return Spellings(
        tuple((r["from"], r["to"]) for r in t["prefixes"]),
        {r["from"]: r["to"] for r in t["components"]},
        frozenset(t["head_wrappers"]),
        tuple(t["joined"]),
    )


def canonical(checkpoint: Checkpoint) -> Checkpoint:
    """Return the headers and the config in our spelling, a table entry for every module that is stored with scales.

    Raises `HeaderError` where two tensors come to one name.
    """
    rules = spellings()
    heads = tuple(_header(h, rules.tensor) for h in checkpoint.headers)
    names: set[str] = set()
    for t in (t for h in heads for t in h.tensors):
        if t.name in names:
            raise HeaderError(f"{checkpoint.file_names[t.file]}: {strictjson.show(t.name)}: is here in two spellings")
        names.add(t.name)
    config = None if checkpoint.config is None else _config(checkpoint.config, rules, names)
    return replace(checkpoint, headers=heads, config=config)


def changed(before: Checkpoint, after: Checkpoint) -> frozenset[int]:
    """Return the numbers of the files of which a tensor has another name or shape in our spelling."""
    pairs = zip(before.tensors(), after.tensors(), strict=True)
    return frozenset(a.file for a, b in pairs if (a.name, a.shape) != (b.name, b.shape))


def _header(header: Header, tensor: Callable[[TensorInfo], TensorInfo]) -> Header:
    return replace(header, tensors=tuple(tensor(t) for t in header.tensors))


def _config(raw: bytes, rules: Spellings, names: set[str]) -> bytes:
    """Return a config whose table lists every quantized module under our name; as it is where it has no table."""
    config: Any = strictjson.loads(raw, CONFIG_NAME)
    if not isinstance(config, dict):
        return raw
    for key in TABLES:
        if isinstance(config.get(key), dict):
            config[key] = _table(config[key], rules, names)
    return strictjson.pretty(config)


def _table(table: JSON, rules: Spellings, names: set[str]) -> JSON:
    """Return the table by our names; a module that is not listed has the scalars at the table's top."""
    scalars = {k: v for k, v in table.items() if k in {"group_size", "bits", "mode"}}
    listed = {rules.name(k): v for k, v in table.items() if isinstance(v, dict)}
    default = {"mode": "affine"} | scalars
    stems = sorted(n.removesuffix(".scales") for n in names if n.endswith(".scales"))
    return scalars | listed | {s: default for s in stems if s not in listed}
