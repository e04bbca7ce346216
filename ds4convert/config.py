"""config.json of a source checkpoint: read strictly, checked against its family, reduced to whole numbers.

Refuses wrong types, unknown model types, and values that contradict each other, before any tensor is looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from ds4convert import strictjson
from ds4convert.errors import ConfigError
from ds4convert.family import Family, family_of
from ds4convert.strictjson import show

MAX_CONFIG_BYTES = 16_000_000
MAX_DIM = 1 << 24
MAX_TENSORS = 250_000
"""Tensors that are expected or read at most: Pro has 147 thousand, and each takes about half a KB of memory."""

BLOCK_TENSORS = 64
"""More than a block has beside those of its routed experts."""

DEFAULT_TILE = (128, 128)


@dataclass(frozen=True)
class ModelConfig:
    """What a config.json says about its tensors.

    `dims` maps the family's symbols to sizes; `ratios` has one compress ratio per backbone layer, then one per head
    stage; `stages` is the number of head blocks that the config promises; `tile` is (rows, columns) per FP8
    block scale; `raw` is the whole parsed file.
    """

    family: Family
    raw: Mapping[str, Any]
    dims: Mapping[str, int]
    layers: int
    stages: int
    hash_layers: int
    ratios: tuple[int, ...]
    expert_dtype: str | None
    has_fp8: bool
    tile: tuple[int, int]
    head_hint: str


def parse_config(raw: bytes, where: str = "config.json", is_mlx: bool = False) -> ModelConfig:
    """Return the checked config; `is_mlx` says that it is of a converted folder, whose table is MLX's own.

    Raises `ConfigError` naming the key, what was expected and what was found.
    """
    if len(raw) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{where}: {len(raw)} bytes, expected at most {MAX_CONFIG_BYTES}")
    table = strictjson.loads(raw, where, ConfigError)
    if not isinstance(table, dict):
        raise ConfigError(f"{where}: expected a JSON object")
    if "model_type" not in table:
        raise ConfigError(f"{where}: has no model_type")
    return check_config(table, where, is_mlx)


def check_config(table: Mapping[str, Any], where: str = "config.json", is_mlx: bool = False) -> ModelConfig:
    """Return the checked config of the parsed JSON object `table`."""
    family = family_of(table["model_type"])
    keys = family.config_keys
    dims = {symbol: _number(table, key, where) for symbol, key in family.dims.items()}
    layers = _number(table, keys["layers"], where)
    stages = _number(table, keys["stages"], where, least=0, default=0)
    hash_layers = _number(table, keys["hash_layers"], where, least=0, default=0)
    _check_fixed(family, table, where)
    hint = _head_hint(family, table, stages)
    if hint in family.heads:
        head = family.heads[hint]
        dims |= {symbol: _number(table, key, where) for symbol, key in head.dims.items()}
        dims |= {symbol: len(_whole_numbers(table, key, where)) for symbol, key in head.lengths.items()}
    ratios = _ratios(family, table, layers, stages, hint, where)
    if hash_layers > layers:
        raise ConfigError(f"{where}: {keys['hash_layers']} is {hash_layers}, more than the {layers} layers")
    if count_bound(layers + stages, dims) > MAX_TENSORS:
        raise ConfigError(f"{where}: {layers} layers of {dims['E']} experts is more than this tool handles")
    if dims["H"] * dims["d"] % dims["G"]:
        raise ConfigError(f"{where}: o_groups {dims['G']} does not divide {dims['H']} heads of {dims['d']}")
    has_fp8, tile = (False, DEFAULT_TILE) if is_mlx else _fp8(table, where)
    return ModelConfig(
        family,
        table,
        dims,
        layers,
        stages,
        hash_layers,
        ratios,
        _expert_dtype(table, where),
        has_fp8,
        tile,
        hint,
    )


def count_bound(blocks: int, dims: Mapping[str, int]) -> int:
    """Return a number that `blocks` blocks of such a model do not exceed in tensors."""
    return blocks * (dims["E"] * 6 + BLOCK_TENSORS)


def named_config(name: str) -> bytes | None:
    """Return the bytes of the config that ships with the package as `name` (flash, pro, tiny), or None."""
    if not name.isidentifier():
        return None
    entry = resources.files("ds4convert.manifests").joinpath("configs", f"{name}.json")
    return entry.read_bytes() if entry.is_file() else None


def _number(table: Mapping[str, Any], key: str, where: str, least: int = 1, default: int | None = None) -> int:
    value = table.get(key, default)
    if type(value) is not int or not least <= value <= MAX_DIM:
        found = show(repr(table[key])) if key in table else "nothing"
        raise ConfigError(f"{where}: {key} must be a whole number from {least} to {MAX_DIM}, found {found}")
    return value


def _whole_numbers(table: Mapping[str, Any], key: str, where: str) -> list[int]:
    value = table.get(key)
    if not isinstance(value, list) or not all(type(v) is int and 0 <= v <= MAX_DIM for v in value):
        raise ConfigError(f"{where}: {key} must be a list of whole numbers, found {show(repr(value))}")
    return value


def _check_fixed(family: Family, table: Mapping[str, Any], where: str) -> None:
    for key, wanted in family.must_be.items():
        if table.get(key, wanted) != wanted:
            raise ConfigError(f"{where}: {key} is {show(repr(table[key]))}, expected {wanted}")
    tied = table.get("tie_word_embeddings", False)
    if tied is not False:
        raise ConfigError(f"{where}: tie_word_embeddings is {show(repr(tied))}, expected false for {family.title}")


def _head_hint(family: Family, table: Mapping[str, Any], stages: int) -> str:
    """Return the kind of head that the config alone suggests: the kind whose own keys it has, else classic."""
    for head in family.heads.values():
        if head.config_keys and any(table.get(k) for k in head.config_keys):
            return head.name
    plain = [h.name for h in family.heads.values() if not h.config_keys]
    return plain[0] if stages else "none"


def _ratios(
    family: Family, table: Mapping[str, Any], layers: int, stages: int, hint: str, where: str
) -> tuple[int, ...]:
    """Return the compress ratios, one per layer and head stage; a head that is counted by names may have fewer."""
    key = family.config_keys["ratios"]
    ratios = _whole_numbers(table, key, where)
    for at, ratio in enumerate(ratios):
        if ratio not in family.compression:
            raise ConfigError(f"{where}: {key}[{at}] is {ratio}, expected one of {sorted(family.compression)}")
    counted = hint in family.heads and family.heads[hint].stages_from == "config"
    fits = len(ratios) == layers + stages
    if hint not in family.heads:  # a checkpoint whose head was taken out may keep the head's ratio
        fits = layers <= len(ratios) <= layers + 1
    if not fits and (counted or len(ratios) < layers or hint not in family.heads):
        raise ConfigError(
            f"{where}: {key} has {len(ratios)} items, expected {layers + stages} "
            f"({layers} layers and {stages} head stages)"
        )
    return tuple(ratios)


def _expert_dtype(table: Mapping[str, Any], where: str) -> str | None:
    value = table.get("expert_dtype")
    if value not in (None, "fp4", "fp8", "bf16"):
        raise ConfigError(f"{where}: expert_dtype is {show(repr(value))}, expected fp4, fp8, bf16 or nothing")
    return value if value is None else str(value)


def _fp8(table: Mapping[str, Any], where: str) -> tuple[bool, tuple[int, int]]:
    """Return whether the config declares FP8 weights, and the tile of one block scale."""
    q = table.get("quantization_config")
    if q is None:
        return False, DEFAULT_TILE
    if not isinstance(q, dict) or q.get("quant_method") != "fp8":
        raise ConfigError(
            f"{where}: quantization_config is not the official FP8 one (quant_method fp8). An MLX folder is read "
            "as a result (verify, diff, inspect), not as the source of a conversion"
        )
    if q.get("fmt", "e4m3") != "e4m3" or q.get("scale_fmt", "ue8m0") != "ue8m0":
        raise ConfigError(f"{where}: quantization_config has fmt/scale_fmt other than e4m3/ue8m0")
    tile = q.get("weight_block_size", list(DEFAULT_TILE))
    if not (isinstance(tile, list) and len(tile) == 2 and all(type(n) is int and 0 < n <= 4096 for n in tile)):
        raise ConfigError(f"{where}: weight_block_size is {show(repr(tile))}, expected two whole numbers")
    return True, (tile[0], tile[1])
