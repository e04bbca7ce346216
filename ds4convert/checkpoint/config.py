"""config.json of a source checkpoint: read strictly, checked against its family, reduced to whole numbers.

Refuses wrong types, unknown model types, and values that contradict each other, before any tensor is looked at.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from typing import Any

from ds4convert.checkpoint.families import keys
from ds4convert.checkpoint.families.rows import MarkRule
from ds4convert.checkpoint.family import Family, evaluate, family_of
from ds4convert.checkpoint.published import foreign, heads
from ds4convert.errors import ConfigError, naming
from ds4convert.storage import strict_json
from ds4convert.words.terminal import show_value

MAX_CONFIG_BYTES = 16_000_000
MAX_DIM = 1 << 24
MAX_ROWS = 1 << 40
"""Of a dim that a single layer has: V4.1's tables of n-grams have 384 million rows."""

MAX_TENSORS = 250_000
"""Tensors that are expected or read at most: Pro has 147 thousand, and each takes about half a KB of memory."""

MOST_LEFT_RATIOS = 16
"""Compress ratios of head stages that a config without its head may still have."""

BLOCK_TENSORS = 64
"""More than a block has beside those of its routed experts."""


@dataclass(frozen=True)
class Mark:
    """Which blocks a mark of the family is on: backbone layers, or `everywhere`. `value` is what the config says."""

    value: Any
    layers: frozenset[int]
    everywhere: bool = False

    def is_on(self, layer: int | None) -> bool:
        """Return whether a backbone layer (None: a head's block) has the mark."""
        return self.everywhere or layer in self.layers


@dataclass(frozen=True)
class ModelConfig:
    """What a config.json says about its tensors.

    `dims` maps the family's symbols to sizes, `head_dims` those that differ in blocks of the head, `layer_dims` those
    that each layer has its own of; `ratios` has one compress ratio per backbone layer, then one per head stage;
    `stages` is the number of head blocks that the config promises; `tile` is (rows, columns) per FP8 block scale;
    `towers` has the dims of each of the family's towers, and their number of blocks under "n"; `carriers` are the
    layers that others lean on; `raw` is the whole parsed file. `pruned_from` is the number of experts that the file
    states where the tensors show fewer, else 0.
    """

    family: Family
    raw: Mapping[str, Any]
    dims: Mapping[str, int]
    layers: int
    stages: int
    ratios: tuple[int, ...]
    expert_dtype: str | None
    has_fp8: bool
    tile: tuple[int, int]
    head_hint: str
    marks: Mapping[str, Mark] = field(default_factory=dict)
    head_dims: Mapping[str, int] = field(default_factory=dict)
    layer_dims: Mapping[str, Mapping[int, int]] = field(default_factory=dict)
    towers: tuple[Mapping[str, int], ...] = ()
    carriers: frozenset[int] = frozenset()
    pruned_from: int = 0

    @property
    def flat(self) -> dict[str, Any]:
        """Return the file with its keys by the dotted names that the family has for them."""
        return self.family.flat(self.raw)

    def value(self, key: str) -> Any:
        """Return the value of a key of the text model, however deep the family has it; None where it is not there."""
        return next((v for k, v in self.flat.items() if k.rpartition(".")[2] == key), None)

    @property
    def has_tower(self) -> bool:
        """Return whether it describes a tower beside the text model."""
        return any(self.towers)

    def with_experts(self, left: int) -> ModelConfig:
        """Return the config with the number of routed experts that the tensors show to be left of those it states."""
        family, stated = self.family, self.dims[self.family.experts]
        raw = family.unflat(self.flat | {family.dims[family.experts]: left})
        return replace(self, dims={**self.dims, family.experts: left}, raw=raw, pruned_from=stated)

    def with_stages(self, stages: int) -> ModelConfig:
        """Return the config with the number of head stages that the tensors show where it promises none.

        What is written states their compress ratios too: programs that strip the number may have stripped these.
        """
        keys_of, lacking = self.family.config_keys, self.layers + stages - len(self.ratios)
        flat = self.flat | {keys_of["stages"]: stages}
        if "ratios" in keys_of:
            flat[keys_of["ratios"]] = [*self.ratios, *[0] * lacking]
        return replace(self, stages=stages, raw=self.family.unflat(flat))


@naming(file="where")
def parse_config(raw: bytes, where: str = "config.json", is_mlx: bool = False) -> ModelConfig:
    """Return the checked config; `is_mlx` says that it is of a converted folder, whose table is MLX's own.

    Raises `ConfigError` naming the key, what was expected and what was found.
    """
    return check_config(parse_table(raw, where, is_mlx), where, is_mlx)


def parse_table(raw: bytes, where: str = "config.json", is_mlx: bool = False) -> dict[str, Any]:
    """Return a config as a table with a model_type, unchecked beyond that. Raises `ConfigError` for anything else."""
    if len(raw) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{where}: {len(raw)} bytes, expected at most {MAX_CONFIG_BYTES}")
    table = strict_json.loads(raw, where, ConfigError, may_have_bom=not is_mlx)
    if not isinstance(table, dict):
        raise ConfigError(f"{where}: expected a JSON object")
    if "model_type" not in table:
        raise ConfigError(f"{where}: has no model_type")
    return table


@naming(file="where")
def check_config(table: Mapping[str, Any], where: str = "config.json", is_mlx: bool = False) -> ModelConfig:
    """Return the checked config of the parsed JSON object `table`."""
    foreign.check_model(table, where)
    family = family_of(table["model_type"])
    counts = {family.config_keys["stages"], *(r.before for r in family.marks.values())}
    flat = {k: v for k, v in family.flat(table).items() if v is not None or k not in counts}
    table = family.unflat(flat)  # programs write null where a model has no such layers
    dims = {symbol: _number(table, key, where) for symbol, key in family.dims.items()}
    layers = _number(table, family.config_keys["layers"], where)
    stages = _number(table, family.config_keys["stages"], where, least=0, default=0)
    marks = {name: _mark(rule, table, layers, where) for name, rule in family.marks.items()}
    _check_fixed(family, table, where)
    hint = _head_hint(family, table, stages)
    head_dims: dict[str, int] = {}
    if hint in family.heads:
        head = family.heads[hint]
        heads.check_present(head, table, where, family.of_head)
        dims |= {symbol: _number(table, key, where) for symbol, key in head.dims.items()}
        dims |= {symbol: len(_whole_numbers(table, key, where)) for symbol, key in head.lengths.items()}
        head_dims = {symbol: _number(table, key, where) for symbol, key in head.replaces.items()}
        heads.check_values(head, table, dims | {"layers": layers}, where)
    ratios = _ratios(family, table, layers, stages, hint, where)
    _check_marks(family, marks, layers, where)
    towers = tuple(_tower_dims(family, n, table, where) for n in range(len(family.towers)))
    _check_sizes(family, dims, head_dims, layers + stages, where)
    has_fp8, tile = (False, family.storage.tile) if is_mlx else _fp8(family, table, where)
    return ModelConfig(
        family,
        table,
        dims,
        layers,
        stages,
        ratios,
        _expert_dtype(family, table, where),
        has_fp8,
        tile,
        hint,
        marks,
        head_dims,
        {symbol: _layer_dims(family, symbol, marks, table, where) for symbol in family.per_layer},
        towers,
        frozenset(n for key in family.carriers for n in _carriers(key, table, layers, where)),
    )


def _carriers(key: str, table: Mapping[str, Any], layers: int, where: str) -> list[int]:
    """Return the layers that a key names: a list of them, or one; none where it is not there."""
    found = keys.get(table, key)
    if found is None:
        return []
    if isinstance(found, list):
        found = _whole_numbers(table, key, where)
    named = found if isinstance(found, list) else [_number(table, key, where, least=0)]
    if too_large := [n for n in named if n >= layers]:
        raise ConfigError(f"{where}: {key} names {too_large[0]}, but there are only {layers} layers, from 0")
    return named


def count_bound(blocks: int, experts: int, matrices: int = 3) -> int:
    """Return a number that `blocks` blocks of so many experts, each of some matrices, do not exceed in tensors."""
    return blocks * (experts * 2 * matrices + BLOCK_TENSORS)


def _check_sizes(
    family: Family, dims: Mapping[str, int], head_dims: Mapping[str, int], blocks: int, where: str
) -> None:
    experts = max(dims[family.experts], head_dims.get(family.experts, 0))
    if count_bound(blocks, experts, len(family.expert_rows)) > MAX_TENSORS:
        raise ConfigError(f"{where}: {blocks} blocks of {experts} experts is more than this tool handles")
    for rule in family.divisions:
        if evaluate(rule.of, dims) % dims[rule.by]:
            raise ConfigError(
                f"{where}: {family.dims[rule.by]} {dims[rule.by]} does not divide {rule.what.format_map(dict(dims))}"
            )


def named_config(name: str) -> bytes | None:
    """Return the bytes of the config that ships with the package as `name` (flash, pro, tiny, ...), or None."""
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name):
        return None
    entry = resources.files("ds4convert.manifests").joinpath("configs", f"{name}.json")
    return entry.read_bytes() if entry.is_file() else None


def _number(
    table: Mapping[str, Any], key: str, where: str, least: int = 1, default: int | None = None, most: int = MAX_DIM
) -> int:
    value = keys.get(table, key, default)
    if type(value) is not int or not least <= value <= most:
        raise ConfigError(f"{where}: {key} must be a whole number from {least} to {most}, {_found(table, key)}")
    return value


def _has(table: Mapping[str, Any], key: str) -> bool:
    """Return whether a model has what a key tells of; a text model may say 0 of the blocks of a tower."""
    value = keys.get(table, key)
    return value is not None and not (type(value) is int and value == 0)


def _found(table: Mapping[str, Any], key: str) -> str:
    """Say what stands under a key; where nothing does, why it was looked for: a model_type may be a wrong one."""
    there = keys.get(table, key, keys.ABSENT)
    if there is not keys.ABSENT:
        return f"found {show_value(there)}"
    return f"found nothing; models of model_type {show_value(table.get('model_type'))} have it"


def _whole_numbers(table: Mapping[str, Any], key: str, where: str, most: int = MAX_DIM) -> list[int]:
    value = keys.get(table, key)
    if not isinstance(value, list) or not all(type(v) is int and 0 <= v <= most for v in value):
        raise ConfigError(f"{where}: {key} must be a list of whole numbers, {_found(table, key)}")
    return value


def _mark(rule: MarkRule, table: Mapping[str, Any], layers: int, where: str) -> Mark:
    """Return the blocks that a mark is on."""
    if rule.has:
        there = _has(table, rule.has)
        return Mark(there, frozenset(), there)
    if rule.before:
        count = _number(table, rule.before, where, least=0, default=0)
        return Mark(count, frozenset(range(min(count, layers))))
    listed = _whole_numbers(table, rule.listed, where)
    return Mark(listed, frozenset(listed))


def _check_marks(family: Family, marks: Mapping[str, Mark], layers: int, where: str) -> None:
    """Raise `ConfigError` where a mark is on a layer that is not there, twice on one, or where another has to be."""
    for name, rule in family.marks.items():
        value, on = marks[name].value, marks[name].layers
        if rule.before and value > layers:
            raise ConfigError(f"{where}: {rule.key} is {value}, more than the {layers} layers")
        if not rule.listed:
            continue
        if too_large := [n for n in value if n >= layers]:
            raise ConfigError(f"{where}: {rule.key} names {too_large[0]}, but there are only {layers} layers, from 0")
        if len(on) != len(value):
            raise ConfigError(f"{where}: {rule.key} names a layer twice: {show_value(value)}")
        if rule.within and (alone := sorted(on - marks[rule.within].layers)):
            other = family.marks[rule.within].key
            raise ConfigError(f"{where}: {rule.key} names layer {alone[0]}, which {other} does not; it has to")


def _layer_dims(
    family: Family, symbol: str, marks: Mapping[str, Mark], table: Mapping[str, Any], where: str
) -> dict[int, int]:
    """Return a dim that each layer of a mark has its own of, by layer."""
    rule = family.per_layer[symbol]
    layers = marks[rule.mark].value
    values = _whole_numbers(table, rule.key, where, MAX_ROWS)
    if len(values) != len(layers) or 0 in values:
        raise ConfigError(
            f"{where}: {rule.key} is {show_value(values)}, expected a number from 1 for each of the {len(layers)} "
            f"layers of {family.marks[rule.mark].key}"
        )
    return dict(zip(layers, values, strict=True))


def _tower_dims(family: Family, number: int, table: Mapping[str, Any], where: str) -> dict[str, int]:
    """Return the dims of a tower, its blocks as "n"; nothing where the config has no such tower."""
    tower = family.towers[number]
    if not _has(table, tower.needs):
        return {}
    dims = {symbol: _number(table, key, where) for symbol, key in tower.dims.items()}
    return dims | {"n": _number(table, tower.count, where, most=MAX_TENSORS // BLOCK_TENSORS)}


def _check_fixed(family: Family, table: Mapping[str, Any], where: str) -> None:
    """Raise `ConfigError` where a key has another value than the family file demands; a missing one is as demanded."""
    for key, wanted in family.must_be.items():
        found = keys.get(table, key, wanted)
        if type(wanted) is bool and found is not wanted:
            said = str(wanted).lower()
            raise ConfigError(f"{where}: {key} is {show_value(found)}, expected {said} for {family.title}")
        if found != wanted:
            raise ConfigError(f"{where}: {key} is {show_value(found)}, expected {show_value(wanted)}")


def _head_hint(family: Family, table: Mapping[str, Any], stages: int) -> str:
    """Return the kind of head that the config alone suggests: the kind whose own keys it has, else one without any."""
    flat = family.flat(table)
    for head in family.heads.values():
        if any(head.owns(k) and v not in (None, [], 0) for k, v in flat.items()):
            return head.name
    plain = [*(h.name for h in family.heads.values() if not h.config_keys), *family.heads]
    return plain[0] if stages and plain else "none"


def with_head_keys(config: ModelConfig, other: Any, where: str) -> ModelConfig:
    """Return the config of a converted folder with its head's own keys, taken from the drafter folder's copy `other`.

    They stand there where the head is there; the keys come in the order of that copy, which is the source's.
    """
    if not isinstance(other, dict):
        return config
    family = config.family
    theirs, ours = family.flat(other), config.flat
    owned = {k: v for k, v in theirs.items() if any(h.owns(k) for h in family.heads.values())}
    if not owned.keys() - ours.keys():
        return config
    merged = owned | ours
    return check_config(family.unflat({k: merged[k] for k in theirs if k in merged} | merged), where, is_mlx=True)


def without_heads_keys(family: Family, flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return a flat config without the keys that belong to heads: what a folder without a head has."""
    return {k: v for k, v in flat.items() if not any(h.owns(k) for h in family.heads.values())}


def _ratios(
    family: Family, table: Mapping[str, Any], layers: int, stages: int, hint: str, where: str
) -> tuple[int, ...]:
    """Return the compress ratios, one per layer and head stage; a head that is counted by names may have fewer."""
    key = family.config_keys.get("ratios")
    if key is None:  # a family whose layers do not differ in this
        return (0,) * (layers + stages)
    ratios = _whole_numbers(table, key, where)
    for at, ratio in enumerate(ratios):
        if ratio not in family.compression:
            raise ConfigError(f"{where}: {key}[{at}] is {ratio}, expected one of {sorted(family.compression)}")
    counted = hint in family.heads and family.heads[hint].stages_from == "config"
    fits = len(ratios) == layers + stages
    if hint not in family.heads:  # a checkpoint whose head was taken out may keep the head's ratios
        fits = layers <= len(ratios) <= layers + MOST_LEFT_RATIOS
    if not fits and (counted or len(ratios) < layers or hint not in family.heads):
        raise ConfigError(
            f"{where}: {key} has {len(ratios)} items, expected {layers + stages} "
            f"({layers} layers and {stages} head stages)"
        )
    return tuple(ratios)


def _expert_dtype(family: Family, table: Mapping[str, Any], where: str) -> str | None:
    key = family.storage.expert_dtype
    value = keys.get(table, key)
    if value not in (None, "fp4", "fp8", "bf16"):
        raise ConfigError(f"{where}: {key} is {show_value(value)}, expected fp4, fp8, bf16 or nothing")
    return value if value is None else str(value)


SCALE_FORMATS = ("ue8m0", None, "float", "float32", "fp32")
"""Scales in F32 are taken where each is a power of two; the headers and values tell, whatever the config calls them."""


def _fp8(family: Family, table: Mapping[str, Any], where: str) -> tuple[bool, tuple[int, int]]:
    """Return whether the config declares FP8 weights, and the tile of one block scale."""
    q = table.get("quantization_config")
    if q is None:
        return False, family.storage.tile
    if isinstance(q, dict):
        foreign.check_method(q, where)
    if not isinstance(q, dict) or q.get("quant_method") != "fp8":
        raise ConfigError(
            f"{where}: quantization_config is not the official FP8 one (quant_method fp8). An MLX folder is read "
            "as a result (verify, diff, inspect), not as the source of a conversion"
        )
    if q.get("fmt", "e4m3") not in ("e4m3", None) or q.get("scale_fmt") not in SCALE_FORMATS:
        raise ConfigError(
            f"{where}: quantization_config has fmt/scale_fmt other than e4m3/ue8m0: "
            f"{show_value(q.get('fmt'))} and {show_value(q.get('scale_fmt'))}; {foreign.OFFICIAL}"
        )
    tile = q.get("weight_block_size", list(family.storage.tile))
    if not (isinstance(tile, list) and len(tile) == 2 and all(type(n) is int and 0 < n <= 4096 for n in tile)):
        raise ConfigError(f"{where}: weight_block_size is {show_value(tile)}, expected two whole numbers")
    return True, (tile[0], tile[1])
