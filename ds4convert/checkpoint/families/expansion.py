"""The rows of a family expanded for one config: which blocks have which rows, under which names, in which sizes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from ds4convert.checkpoint.config import ModelConfig
from ds4convert.checkpoint.families.modules import BACKBONE, HEAD, Inventory, Module, Storage
from ds4convert.checkpoint.families.rows import NUMBER, Condition, HeadKind, Row
from ds4convert.checkpoint.family import Family, evaluate
from ds4convert.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Block:
    """A block, or the root: its number (None: the root) and compress ratio, and the dims that it has of its own."""

    part: str
    number: int | None = None
    ratio: int = 0
    own: tuple[tuple[str, int], ...] = ()

    @property
    def layer(self) -> int | None:
        """Return the number of a backbone layer, None for the head and the root."""
        return self.number if self.part == BACKBONE else None


def expand(config: ModelConfig, kind: str, stages: int, storage: Mapping[str, Storage]) -> Inventory:
    """Return the inventory of a config with everything that it leaves open settled: head and storage per part."""
    family, sizes = config.family, _Sizes(config)
    root, prefix = Block(BACKBONE), family.prefix
    modules: list[Module] = []

    def add(block: Block, rows: Iterable[Row], official: str, mlx: str = "", own: bool = False) -> None:
        stored = storage[block.part]
        modules.extend(_module(sizes, block, r, official + r.name, mlx, stored, own) for r in rows)

    add(root, [r for r in family.root if r.file == "first"], "")
    for layer in range(config.layers):
        block = Block(BACKBONE, layer, config.ratios[layer], _own_dims(config, layer))
        number = str(layer)
        rows = _rows_of(config, block)
        add(block, rows, prefix.block.replace(NUMBER, number), prefix.mlx.replace(NUMBER, number))
    add(root, [r for r in family.root if r.file != "first" and _is_there(config, r, root)], "")
    for block, rows in _towers(config):
        add(block, rows, "")
    for stage in range(stages):
        at = config.layers + stage
        ratio = config.ratios[at] if at < len(config.ratios) else 0
        block = Block(HEAD, stage, ratio, tuple(config.head_dims.items()))
        official = prefix.head.replace(NUMBER, str(stage))
        add(block, _head_rows(family.heads[kind], stage, stages), official, own=True)
        add(block, _rows_of(config, block), official)
    return Inventory(config, kind, stages, storage, tuple(modules))


def _own_dims(config: ModelConfig, layer: int) -> tuple[tuple[str, int], ...]:
    return tuple((symbol, values[layer]) for symbol, values in config.layer_dims.items() if layer in values)


def _towers(config: ModelConfig) -> Iterator[tuple[Block, list[Row]]]:
    """Yield the rows of each tower that the config has: those of its root, then those of each block, under its number.

    To all the rest they are of the backbone's root: recipes name their roles, and none of their blocks.
    """
    for tower, dims in zip(config.family.towers, config.towers, strict=True):
        if dims:
            block = Block(BACKBONE, own=tuple(dims.items()))
            yield block, list(tower.root)
            for n in range(dims["n"]):
                yield block, [_numbered(r, str(n)) for r in tower.rows]


def _numbered(row: Row, number: str) -> Row:
    return replace(row, name=row.name.replace(NUMBER, number), mlx=row.mlx.replace(NUMBER, number))


def _rows_of(config: ModelConfig, block: Block) -> list[Row]:
    return [row for row in config.family.block if _is_there(config, row, block)]


def _is_there(config: ModelConfig, row: Row, block: Block) -> bool:
    return holds(config, row.when, block)


def holds(config: ModelConfig, when: Iterable[str], block: Block) -> bool:
    """Return whether all of the family's conditions named in `when` hold for a block."""
    return all(_holds(config, config.family.when[name], block) for name in when)


def _holds(config: ModelConfig, condition: Condition, block: Block) -> bool:
    if condition.ratios is not None and block.ratio not in condition.ratios:
        return False
    on = {name for name, mark in config.marks.items() if mark.is_on(block.layer)}
    return on.issuperset(condition.marked) and on.isdisjoint(condition.unmarked)


def _head_rows(head: HeadKind, stage: int, stages: int) -> list[Row]:
    here = {""} | ({"first"} if stage == 0 else set()) | ({"last"} if stage == stages - 1 else set())
    return [row for row in head.rows if row.stage in here]


class _Sizes:
    """Shapes of rows for blocks of one compression: the same for many blocks, so each is evaluated once."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self._known: dict[tuple[tuple[str, ...], int, tuple[tuple[str, int], ...]], tuple[int, ...]] = {}

    def of(self, expressions: tuple[str, ...], block: Block) -> tuple[int, ...]:
        """Return the values of expressions over the config's dims, those of the ratio, and the block's own."""
        key = expressions, block.ratio, block.own
        if key not in self._known:
            family: Family = self.config.family
            dims = dict(self.config.dims) | {"r": block.ratio, "k": family.compression.get(block.ratio, 0)}
            self._known[key] = tuple(_positive(e, dims | dict(block.own)) for e in expressions)
        return self._known[key]


def _positive(expression: str, dims: Mapping[str, int]) -> int:
    value = evaluate(expression, dims)
    if value < 1:
        raise ConfigError(
            f"config.json: a tensor of {expression} = {value} rows or columns is implied", hint="check its sizes"
        )
    return value


def _module(sizes: _Sizes, block: Block, row: Row, name: str, mlx: str, storage: Storage, own: bool) -> Module:
    config, is_expert = sizes.config, row.store == "expert"
    store = {"dense": storage.dense, "expert": storage.experts}.get(row.store, row.store)
    fused = None
    if is_expert and storage.fused:
        last = row.name.rpartition(".")[2]
        fused = next(f for f in config.family.fused if last in f.parts)
    tile = config.tile
    if row.tile:
        rows, cols = sizes.of(row.tile, block)
        tile = (rows, cols)
    return Module(
        name=name,
        mlx=row.mlx,
        role=row.role,
        part=block.part,
        block=block.number,
        shape=sizes.of(row.shape, block),
        store={"bf16": "BF16", "linear": "BF16"}.get(store, store),
        experts=sizes.of((config.family.experts,), block)[0] if is_expert else 0,
        tile=tile,
        is_module=row.is_matrix,
        own=own,
        write=row.write,
        values_below=sizes.of((row.values_below,), block)[0] if row.values_below else 0,
        fused=fused,
        fused_scale=config.family.fused_scale,
        at=mlx,
        apart=row.apart,
    )
