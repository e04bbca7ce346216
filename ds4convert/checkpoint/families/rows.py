"""The parts of a family file as values: rows of tensors, kinds of head, towers, marks of layers, rules for them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

NUMBER = "{n}"
"""Stands for the number of a block in prefixes, and in the names of a tower's rows."""

EXPERT = "{expert}"
"""Stands for the number of a routed expert."""

MATRICES = {"dense", "expert", "linear"}
"""What `store` says of rows that are matrices: their names lack `.weight`, and a recipe may choose their format."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a family file. `shape` holds expressions over dims; `store` says how the tensor lies on disk.

    `tile` are two expressions: rows and columns that share a block scale; without any it is the config's tile. `apart`:
    it is of a tower, whose matrices stay as they are unless a recipe names their role.
    """

    name: str
    mlx: str
    hf: str
    role: str
    store: str
    shape: tuple[str, ...]
    when: tuple[str, ...] = ()
    stage: str = ""
    file: str = ""
    write: str = ""
    values_below: str = ""
    tile: tuple[str, ...] = ()
    apart: bool = False

    @property
    def is_matrix(self) -> bool:
        """Return whether it is a matrix, whose tensors are `NAME.weight` and, packed, `NAME.scale`."""
        return self.store in MATRICES

    def tails(self) -> list[tuple[str, str]]:
        """Return (spelling in Transformers, official) tails of the tensors that the row stands for."""
        if self.is_matrix:
            return [(f"{self.hf}.{part}", f"{self.name}.{part}") for part in ("weight", "scale")]
        return [(self.hf, self.name)]


@dataclass(frozen=True, slots=True)
class HeadKind:
    """A kind of multi-token-prediction head: how it is recognised, and its rows beside those of every block.

    `key_prefix` is that of its own config keys; `below` maps keys to the dim (or `layers`) that their values are under,
    `least` to the least value, where that is not 0. Keys of `lengths` are lists of unlike numbers, others are numbers.
    `replaces` are dims that have another value in its blocks, by key. `counted` tells whether the config of a converted
    folder counts the stages once more, and `invented` what `synth` writes for its keys.
    """

    name: str
    title: str
    signature: tuple[str, ...]
    stages_from: str
    default_stages: int
    config_keys: tuple[str, ...]
    dims: Mapping[str, str]
    lengths: Mapping[str, str]
    replaces: Mapping[str, str]
    key_prefix: str
    below: Mapping[str, str]
    least: Mapping[str, int]
    counted: bool
    invented: Mapping[str, Any]
    rows: tuple[Row, ...]

    def owns(self, key: str) -> bool:
        """Return whether a (dotted) key of config.json is this head's own."""
        return bool(self.key_prefix) and key.startswith(self.key_prefix)

    def converted_signature(self) -> tuple[tuple[str, str], ...]:
        """Return (MLX path, what follows it) of the tensors of the signature in a converted folder."""
        rows = {official: r for r in self.rows for _, official in r.tails()}
        found = ((rows[s], s) for s in self.signature)
        return tuple((r.mlx, s.removeprefix(r.name)) for r, s in found)

    def own_keys(self) -> tuple[str, ...]:
        """Return every key that this head needs or reads."""
        values = (*self.dims.values(), *self.lengths.values(), *self.replaces.values())
        return tuple(dict.fromkeys((*self.config_keys, *values)))


@dataclass(frozen=True, slots=True)
class Fused:
    """A tensor that holds several expert matrices of all experts: `[E, rows of all parts, in]`.

    `stem` is what the names of the parts begin with, up to the number of the expert.
    """

    name: str
    parts: tuple[str, ...]
    stem: str


@dataclass(frozen=True, slots=True)
class Tower:
    """Blocks beside the backbone's, such as those of a vision tower: as many as `count` (a config key) says.

    `title` is what messages call it. `needs` is a key of config.json without which (or with 0) there are none. Its own
    `dims` are read from keys of their own.
    """

    title: str
    needs: str
    count: str
    dims: Mapping[str, str]
    root: tuple[Row, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class MarkRule:
    """What marks layers: those below the number at key `before`, those listed at `listed`, or all if `has` is there.

    `within` is another mark that has to include these layers.
    """

    before: str = ""
    listed: str = ""
    has: str = ""
    within: str = ""

    @property
    def key(self) -> str:
        """Return the config key that it reads."""
        return self.before or self.listed or self.has


@dataclass(frozen=True, slots=True)
class Condition:
    """Which blocks have a row: of these compress ratios (None: of any), with these marks and without those."""

    ratios: tuple[int, ...] | None
    marked: tuple[str, ...]
    unmarked: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Division:
    """A dim that has to divide the value of an expression; `what` says that in words, with `{dims}` to be filled in."""

    by: str
    of: str
    what: str


@dataclass(frozen=True, slots=True)
class PerLayer:
    """A dim that differs from layer to layer: the list at `key` has one value for each layer of a mark, in order."""

    key: str
    mark: str


@dataclass(frozen=True, slots=True)
class State:
    """What decoding keeps in each block for which `when` holds: expressions of bytes, in all and per entry.

    A block has an entry for as many tokens of the context as its compress ratio says, and at least for each one.
    """

    when: tuple[str, ...] = ()
    bytes: str = ""
    per_entry: str = ""


@dataclass(frozen=True, slots=True)
class Probes:
    """How storage is told: official tails of a dense matrix and of an expert's, and config keys and tiles without them.

    `tile` is (rows, columns) of a block scale where the config does not say; `tiles` are others that are seen on disk.
    """

    dense: str
    expert: str
    expert_dtype: str
    tile: tuple[int, int]
    tiles: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Prefixes:
    """What names of blocks begin with: official (backbone, head), and of the backbone in MLX. All hold `{n}`."""

    block: str
    head: str
    mlx: str

    def __post_init__(self) -> None:
        for prefix in (self.block, self.head, self.mlx):
            if not prefix.endswith(f"{NUMBER}.") or prefix.count(NUMBER) != 1:
                raise ValueError(f"a family's prefix is {prefix!r}, expected one that ends with {NUMBER}. and a dot")

    @property
    def head_stem(self) -> str:
        """Return what all official names of a head begin with."""
        return self.head.partition(NUMBER)[0]

    def pattern(self) -> re.Pattern[str]:
        """Return what matches the official name of a block's tensor: groups block, head, number, tail."""
        block, head = (re.escape(p.partition(NUMBER)[0]) for p in (self.block, self.head))
        return re.compile(rf"(?:(?P<block>{block})|(?P<head>{head}))(?P<number>\d+)\.(?P<tail>.+)", re.DOTALL)


def row(table: Mapping[str, Any]) -> Row:
    """Return a row of a family file."""
    name, when = table["name"], table.get("when", [])
    return Row(
        name=name,
        mlx=table.get("mlx", name),
        hf=table.get("hf", name),
        role=table["role"],
        store=table["store"],
        shape=tuple(table["shape"]),
        when=(when,) if isinstance(when, str) else tuple(when),
        stage=table.get("stage", ""),
        file=table.get("file", ""),
        write=table.get("write", ""),
        values_below=table.get("values_below", ""),
        tile=tuple(table.get("tile", ())),
    )


def head(name: str, table: Mapping[str, Any]) -> HeadKind:
    """Return a kind of head of a family file."""
    return HeadKind(
        name=name,
        title=table["title"],
        signature=tuple(table["signature"]),
        stages_from=table["stages"],
        default_stages=table.get("default_stages", 1),
        config_keys=tuple(table["config_keys"]),
        dims=table.get("dims", {}),
        lengths=table.get("lengths", {}),
        replaces=table.get("replaces", {}),
        key_prefix=table.get("key_prefix", ""),
        below=table.get("below", {}),
        least=table.get("least", {}),
        counted=table.get("counted", False),
        invented=table.get("invented", {}),
        rows=tuple(row(r) for r in table["rows"]),
    )


def tower(table: Mapping[str, Any]) -> Tower:
    """Return a tower of a family file."""
    root, rows = (tuple(replace(row(r), apart=True) for r in table.get(key, ())) for key in ("root", "rows"))
    return Tower(table.get("title", "tower"), table["needs"], table["count"], table["dims"], root, rows)


def condition(table: Mapping[str, Any]) -> Condition:
    """Return a condition of a family file."""
    ratios = tuple(table["ratios"]) if "ratios" in table else None
    return Condition(ratios, tuple(table.get("marked", ())), tuple(table.get("unmarked", ())))


def state(table: Mapping[str, Any]) -> State:
    """Return a row of what decoding keeps."""
    when = table.get("when", ())
    names = (when,) if isinstance(when, str) else tuple(when)
    return State(names, table.get("bytes", ""), table.get("per_entry", ""))


def probes(table: Mapping[str, Any]) -> Probes:
    """Return the storage probes of a family file."""
    tiles = tuple((a, b) for a, b in table["tiles"])
    rows, cols = table["tile"]
    return Probes(table["dense"], table["expert"], table["expert_dtype"], (rows, cols), tiles)


def fused(table: Mapping[str, Any], rows: Iterable[Row]) -> Fused:
    """Return a fused tensor of a family file; `rows` are all those of blocks."""
    parts = tuple(table["parts"])
    stems = {r.name.partition(EXPERT)[0] for r in rows if EXPERT in r.name and r.name.rpartition(".")[2] in parts}
    if len(stems) != 1:
        raise ValueError(f"the parts of the fused tensor {table['name']} are no rows of experts")
    return Fused(table["name"], parts, stems.pop())
