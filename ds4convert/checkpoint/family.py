"""Model families, read from `manifests/models/*.toml`: templates of tensors, not tensors.

Owns the meaning of a family file. Refuses names and expressions that the file does not declare. A new family is a new
file; nothing here names one.
"""

from __future__ import annotations

import ast
import operator
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from ds4convert.checkpoint.families import keys, rows
from ds4convert.checkpoint.families.rows import (
    EXPERT,
    Condition,
    Division,
    Fused,
    HeadKind,
    MarkRule,
    PerLayer,
    Prefixes,
    Probes,
    Row,
    State,
    Tower,
)
from ds4convert.errors import ConfigError
from ds4convert.storage.belonging import belongs
from ds4convert.words.terminal import show_value

Dims = Mapping[str, int]

__all__ = ["Family", "Fused", "HeadKind", "Row", "evaluate", "families", "family_of", "with_families_of"]

_OPERATORS: Mapping[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


@dataclass(frozen=True)
class Family:
    """A family file as a value.

    `experts` and `active` are the symbols of the dims that count experts, and those of them that a token meets.
    `engram_roles` are those whose format the option for engrams chooses, `mapped_roles` those of tables of which hosts
    read single rows from the file. `carriers` are keys of layers that others lean on. `state` is what decoding keeps,
    and `working` an expression of what a step of a prompt holds at its busiest; empty where the forward pass tells.
    `container` is the table of config.json that has the model's keys, "" for the file itself. `layouts` has what the
    file says of layouts, by name; empty where all layouts are as their own files say. `runs`: `inference` has its
    forward pass.
    """

    name: str
    title: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    prefix: Prefixes
    dims: Mapping[str, str]
    experts: str
    active: str
    engram_roles: tuple[str, ...]
    mapped_roles: tuple[str, ...]
    carriers: tuple[str, ...]
    state: tuple[State, ...]
    working: str
    config_keys: Mapping[str, str]
    container: str
    must_be: Mapping[str, Any]
    divisions: tuple[Division, ...]
    marks: Mapping[str, MarkRule]
    per_layer: Mapping[str, PerLayer]
    compression: Mapping[int, int]
    when: Mapping[str, Condition]
    storage: Probes
    root: tuple[Row, ...]
    block: tuple[Row, ...]
    towers: tuple[Tower, ...]
    heads: Mapping[str, HeadKind]
    components: Mapping[str, str]
    prefixes: tuple[str, ...]
    fused: tuple[Fused, ...]
    fused_scale: str
    ignored: Mapping[str, str]
    layouts: Mapping[str, Mapping[str, Any]]
    runs: bool
    spellings: Mapping[str, str] = field(repr=False)

    def is_of_head(self, name: str) -> bool:
        """Return whether an official name is that of a tensor of a head."""
        return name.startswith(self.prefix.head_stem)

    @property
    def of_head(self) -> str:
        """Return what messages call the names of a head: `mtp.*`."""
        return f"{self.prefix.head_stem}*"

    def block_of(self, name: str) -> re.Match[str] | None:
        """Return the parts of the official name of a block's tensor (groups block, head, number, tail), else None."""
        return self._pattern.fullmatch(name)

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return self.prefix.pattern()

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """Return all rows: of the root, of blocks, of towers, of heads."""
        towers = (r for t in self.towers for r in (*t.root, *t.rows))
        return (*self.root, *self.block, *towers, *(r for h in self.heads.values() for r in h.rows))

    def tower_tails(self, tower: Tower) -> frozenset[str]:
        """Return the names (as in `tails`) that tensors of a tower have, and those that blocks have because of it."""
        marks = {name for name, rule in self.marks.items() if rule.has == tower.needs}
        of_it = [r for r in self.block if any(not marks.isdisjoint(self.when[w].marked) for w in r.when)]
        return frozenset(official for r in (*tower.root, *tower.rows, *of_it) for _, official in r.tails())

    @cached_property
    def tower_roles(self) -> frozenset[str]:
        """Return the roles that only tensors of towers have."""
        return frozenset(r.role for r in self.rows if r.apart) - {r.role for r in self.rows if not r.apart}

    @cached_property
    def expert_components(self) -> frozenset[str]:
        """Return the components of names that the number of an expert follows."""
        names = {n for r in self.rows for n in (r.name, r.hf) if f".{EXPERT}" in n}
        return frozenset(n.partition(f".{EXPERT}")[0].rpartition(".")[2] for n in names)

    @cached_property
    def expert_rows(self) -> tuple[Row, ...]:
        """Return the rows of blocks that are matrices of routed experts."""
        return tuple(r for r in self.block if r.store == "expert")

    @cached_property
    def tails(self) -> frozenset[str]:
        """Return all official names of tensors, without the prefix of a block, with `{expert}` and `{n}` in them."""
        return frozenset(official for row in self.rows for _, official in row.tails())

    def flat(self, table: Mapping[str, Any]) -> dict[str, Any]:
        """Return a config with its keys by their dotted names, as this family names them."""
        return keys.flat(table, self.container)

    def unflat(self, table: Mapping[str, Any]) -> dict[str, Any]:
        """Return the config that `flat` made this table of."""
        return keys.unflat(table, self.container)


def evaluate(expression: str, dims: Dims) -> int:
    """Return the value of a shape expression such as `(2+M)*M`: whole numbers, names of dims, + - * // only."""
    return _node(_parsed(expression), dims, expression)


@lru_cache(maxsize=512)
def _parsed(expression: str) -> ast.expr:
    """Return the expression as a tree; a family has a few dozen of them, each evaluated for every layer."""
    return ast.parse(expression, mode="eval").body


def _node(node: ast.expr, dims: Dims, expression: str) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.Name) and node.id in dims:
        return dims[node.id]
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _node(node.left, dims, expression), _node(node.right, dims, expression)
        return _OPERATORS[type(node.op)](left, right)
    raise ConfigError(f"the family file's expression {expression!r} uses something that is not a declared dim")


def _parse(table: Mapping[str, Any]) -> Family:
    root, block = (tuple(rows.row(r) for r in table[key]) for key in ("root", "block"))
    heads = {k: rows.head(k, v) for k, v in table.get("head", {}).items()}
    towers = tuple(rows.tower(t) for t in table.get("tower", ()))
    every = [
        *root,
        *block,
        *(r for t in towers for r in (*t.root, *t.rows)),
        *(r for h in heads.values() for r in h.rows),
    ]
    spelling, config = table["spelling"], table["config"]
    return Family(
        name=table["name"],
        title=table["title"],
        model_types=tuple(table["model_type"]),
        architectures=tuple(table["architectures"]),
        prefix=Prefixes(**table["prefix"]),
        dims=table["dims"],
        experts=table["roles"]["experts"],
        active=table["roles"]["active"],
        engram_roles=tuple(table["roles"].get("engram", ())),
        mapped_roles=tuple(table["roles"].get("mapped", ())),
        carriers=tuple(config.get("carriers", ())),
        state=tuple(rows.state(r) for r in table.get("memory", {}).get("state", ())),
        working=table.get("memory", {}).get("working", "0"),
        config_keys={k: v for k, v in config.items() if isinstance(v, str)},
        container=keys.parent(config["layers"]),
        must_be=config["must_be"],
        divisions=tuple(Division(**d) for d in config.get("divisions", ())),
        marks={k: MarkRule(**v) for k, v in table.get("marks", {}).items()},
        per_layer={k: PerLayer(**v) for k, v in table.get("per_layer", {}).items()},
        compression={int(k): v for k, v in table.get("compression", {"0": 0}).items()},
        when={k: rows.condition(v) for k, v in table.get("when", {}).items()},
        storage=rows.probes(table["storage"]),
        root=root,
        block=block,
        towers=towers,
        heads=heads,
        components=spelling.get("components", {}),
        prefixes=tuple(spelling.get("prefixes", ())),
        fused=tuple(rows.fused(f, block) for f in spelling.get("fused", ())),
        fused_scale=spelling.get("fused_scale", ""),
        ignored=spelling.get("ignored", {}),
        layouts=table.get("layouts", {}),
        runs=table.get("runs", False),
        spellings={hf: name for r in every for hf, name in r.tails()},
    )


@cache
def _shipped() -> Mapping[str, Family]:
    """Return the families whose files ship with the package, by name."""
    folder = resources.files("ds4convert.manifests").joinpath("models")
    texts = [f.read_text("utf-8") for f in folder.iterdir() if f.name.endswith(".toml") and belongs(f.name)]
    return _by_name(texts)


def _by_name(texts: list[str]) -> dict[str, Family]:
    found = [_parse(tomllib.loads(text)) for text in texts]
    return {f.name: f for f in sorted(found, key=lambda f: f.name)}


_MORE: dict[str, Family] = {}


def families() -> Mapping[str, Family]:
    """Return all families that the package knows, by name."""
    return {**_shipped(), **_MORE} if _MORE else _shipped()


@contextmanager
def with_families_of(folder: Path) -> Iterator[None]:
    """Know the families of a folder's files, too, in this process, as long as the context lasts."""
    found = _by_name([p.read_text("utf-8") for p in sorted(folder.glob("*.toml"))])
    _MORE.update(found)
    try:
        yield
    finally:
        for name in found:
            _MORE.pop(name, None)


def family_of(model_type: Any) -> Family:
    """Return the family whose file lists exactly `model_type`. Raises `ConfigError` naming the known ones."""
    for family in families().values():
        if model_type in family.model_types:
            return family
    known = ", ".join(t for f in families().values() for t in f.model_types)
    raise ConfigError(f"config.json: model_type is {show_value(model_type)}, expected one of: {known}")


def head_stems() -> tuple[str, ...]:
    """Return what names of heads begin with in official checkpoints, of any family and under any of its prefixes."""
    stems = [before + f.prefix.head_stem for f in families().values() for before in ("", *f.prefixes)]
    return tuple(dict.fromkeys(stems))


def expert_stems() -> tuple[str, ...]:
    """Return the parts of official names that the number of an expert follows, of any family."""
    rows_of = (r for f in families().values() for r in f.expert_rows)
    return tuple(dict.fromkeys(f".{r.name.partition(EXPERT)[0]}" for r in rows_of))


def mlx_marks() -> tuple[tuple[str, ...], frozenset[str]]:
    """Return what only converted folders have, of any family: parts of names of stacked experts, and whole names."""
    parts: dict[str, None] = {}
    whole: set[str] = set()
    for family in families().values():
        parts |= {f".{r.mlx.rpartition('.')[0]}.": None for r in family.expert_rows if EXPERT not in r.mlx}
        known = {before + n for r in family.root for n in (r.name, r.hf) for before in ("", *family.prefixes)}
        whole |= {r.mlx for r in family.root if not r.is_matrix and r.mlx not in known}
    return tuple(parts), frozenset(whole)
