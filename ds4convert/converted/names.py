"""Converted folders that other programs wrote, in our spelling: names, shapes, and the quantization table.

Owns the rules of `manifests/spellings.toml`. Only headers and the config are renamed, no byte of a tensor moves.
"""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Any

from ds4convert.checkpoint.family import families
from ds4convert.checkpoint.folder import CONFIG_NAME, Checkpoint
from ds4convert.checkpoint.types import JSON, Finding, Header, TensorInfo
from ds4convert.converted.matching import codec_of
from ds4convert.errors import HeaderError, InputError
from ds4convert.formats.codecs import WORD_BITS, Codec
from ds4convert.planning.host_block import block_keys
from ds4convert.planning.layouts import head_stems_inside
from ds4convert.storage import strict_json
from ds4convert.words.terminal import show

TABLES = ("quantization", "quantization_config")
SUFFIXES = (".weight", ".scales", ".biases")


@dataclass(frozen=True)
class Spellings:
    """The rules of the file: prefixes and components as pairs (theirs, ours)."""

    prefixes: Sequence[tuple[str, str]]
    components: Mapping[str, str]
    head_wrappers: frozenset[str]
    joined: tuple[str, ...]
    strangers: tuple[tuple[tuple[str, ...], str], ...]

    def name(self, name: str) -> str:
        """Return our name of a tensor or a module."""
        for theirs, ours in self.prefixes:
            if name.startswith(theirs):
                name = ours + name.removeprefix(theirs)
        parts = [self.components.get(p, p) for p in name.split(".")]
        if len(parts) > 3 and f"{parts[0]}." in head_stems_inside() and parts[2] in self.head_wrappers:
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
        tuple((tuple(s["names"]), s["what"]) for s in t["strangers"]),
    )


def canonical(checkpoint: Checkpoint) -> Checkpoint:
    """Return the headers and the config in our spelling, a table entry for every module that is stored with scales.

    Raises `HeaderError` where two tensors come to one name.
    """
    rules = _rules_for(checkpoint)
    heads = tuple(_header(h, rules.tensor) for h in checkpoint.headers)
    names: dict[str, TensorInfo] = {}
    for t in (t for h in heads for t in h.tensors):
        if t.name in names:
            raise HeaderError(f"{checkpoint.file_names[t.file]}: {show(t.name)}: is here in two spellings")
        names[t.name] = t
    config = None if checkpoint.config is None else _config(checkpoint.config, rules, names)
    return replace(checkpoint, headers=heads, config=config)


def _rules_for(checkpoint: Checkpoint) -> Spellings:
    """Return the rules for a folder: a prefix that its family itself has in MLX stays."""
    rules = spellings()
    try:
        found = strict_json.loads(checkpoint.config or b"{}", CONFIG_NAME)
    except InputError:
        return rules  # whoever reads it says what is wrong with it
    kind = found.get("model_type") if isinstance(found, dict) else None
    if isinstance(found, dict) and isinstance(inner := found.get("text_config"), dict) and "model_type" in inner:
        kind = kind if any(kind in f.model_types for f in families().values()) else inner["model_type"]
    family = next((f for f in families().values() if kind in f.model_types), None)
    if family is None:
        return rules
    return replace(rules, prefixes=[p for p in rules.prefixes if not family.prefix.mlx.startswith(p[0])])


def stranger(checkpoint: Checkpoint) -> str:
    """Return what kind of folder this is, where its tensors are known to lie as nothing here reads them; "" if not."""
    if any(key in (checkpoint.config or b"") for f in families().values() for key in map(str.encode, block_keys(f))):
        return ""  # oMLX has names of that kind, and says in its own table what lies where
    for parts, what in spellings().strangers:
        if all(any(part in t.name for t in checkpoint.tensors()) for part in parts):
            return f"{what}. No way leads from it to today's hosts: convert the official checkpoint, {OFFICIAL}"
    return ""


OFFICIAL = "ds4convert quantize SRC OUT"


def unfit(findings: Sequence[Finding]) -> str:
    """Return in a sentence what kind of difference `findings` are, and the way on."""
    kinds = Counter(f.kind for f in findings)
    if kinds["extra"] and kinds["missing"]:
        return (
            f"{kinds['missing']} tensors that config.json implies are not here, and {kinds['extra']} are that it does "
            "not imply: names of a program that is not known here, or of an earlier version of one. Known are those of "
            f"mlx-lm and its branches, mlx-vlm, oMLX and MTPLX; else convert the official checkpoint: {OFFICIAL}"
        )
    if kinds["missing"] == len(findings):
        return (
            f"incomplete: {kinds['missing']} tensors that config.json implies are not here; copy or download the "
            f"folder again, or convert the official checkpoint: {OFFICIAL}"
        )
    if kinds["missing"] + kinds["extra"] == 0:
        return (
            f"{len(findings)} tensors are stored otherwise than this version reads; convert the official checkpoint: "
            f"{OFFICIAL}"
        )
    return f"config.json and the tensors do not fit; convert the official checkpoint again: {OFFICIAL}"


def changed(before: Checkpoint, after: Checkpoint) -> frozenset[int]:
    """Return the numbers of the files of which a tensor has another name or shape in our spelling."""
    pairs = zip(before.tensors(), after.tensors(), strict=True)
    return frozenset(a.file for a, b in pairs if (a.name, a.shape) != (b.name, b.shape))


def _header(header: Header, tensor: Callable[[TensorInfo], TensorInfo]) -> Header:
    return replace(header, tensors=tuple(tensor(t) for t in header.tensors))


def _config(raw: bytes, rules: Spellings, names: Mapping[str, TensorInfo]) -> bytes:
    """Return a config whose table lists every quantized module under our name; as it is where it has no table."""
    config: Any = strict_json.loads(raw, CONFIG_NAME)
    if not isinstance(config, dict):
        return raw
    for key in TABLES:
        if isinstance(config.get(key), dict):
            config[key] = _table(config[key], rules, names)
    return strict_json.pretty(config)


def _table(table: JSON, rules: Spellings, names: Mapping[str, TensorInfo]) -> JSON:
    """Return the table by our names; a module that is not listed has the scalars at the table's top.

    But for one whose headers show another format: that is left to what they show.
    """
    scalars = {k: v for k, v in table.items() if k in {"group_size", "bits", "mode"}}
    listed = {rules.name(k): v for k, v in table.items() if isinstance(v, dict)}
    default = {"mode": "affine"} | scalars
    stems = sorted(n.removesuffix(".scales") for n in names if n.endswith(".scales"))
    codec = codec_of(default)
    alike = [s for s in stems if s not in listed and codec is not None and _like(codec, s, names)]
    return scalars | listed | dict.fromkeys(alike, default)


def _like(codec: Codec, stem: str, names: Mapping[str, TensorInfo]) -> bool:
    """Return whether a module's tensors have the sizes and dtypes of a codec."""
    weight, scale = names.get(f"{stem}.weight"), names[f"{stem}.scales"]
    if weight is None or not weight.shape or not scale.shape:
        return False
    same_size = weight.shape[-1] * WORD_BITS == scale.shape[-1] * codec.group_size * codec.bits
    return same_size and codec.has_biases == (f"{stem}.biases" in names)
