"""Model families, read from `manifests/models/*.toml`: templates of tensors, not tensors.

Owns the meaning of a family file and the translation of on-disk spellings into official names. Refuses names
and expressions that the file does not declare. A new family is a new file; nothing here names one.
"""

from __future__ import annotations

import ast
import operator
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, lru_cache
from importlib import resources
from typing import Any

from ds4convert.errors import ConfigError
from ds4convert.strictjson import show

Dims = Mapping[str, int]

_OPERATORS: Mapping[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a family file. `shape` holds expressions over dims; `store` says how the tensor lies on disk."""

    name: str
    mlx: str
    hf: str
    role: str
    store: str
    shape: tuple[str, ...]
    when: str = ""
    stage: str = ""
    file: str = ""
    write: str = ""
    values_below: str = ""


@dataclass(frozen=True, slots=True)
class HeadKind:
    """A kind of multi-token-prediction head: how it is recognised, and its rows beside those of every block."""

    name: str
    title: str
    signature: tuple[str, ...]
    stages_from: str
    default_stages: int
    config_keys: tuple[str, ...]
    dims: Mapping[str, str]
    lengths: Mapping[str, str]
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class Fused:
    """A tensor that holds several expert matrices of all experts: `[E, rows of all parts, in]`."""

    name: str
    parts: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """A family file as a value."""

    name: str
    title: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    dims: Mapping[str, str]
    config_keys: Mapping[str, str]
    must_be: Mapping[str, Any]
    compression: Mapping[int, int]
    when: Mapping[str, Mapping[str, Any]]
    root: tuple[Row, ...]
    block: tuple[Row, ...]
    heads: Mapping[str, HeadKind]
    components: Mapping[str, str]
    prefixes: tuple[str, ...]
    fused: tuple[Fused, ...]
    fused_scale: str
    ignored: Mapping[str, str]
    spellings: Mapping[str, str] = field(repr=False)


def evaluate(expression: str, dims: Dims) -> int:
    """Return the value of a shape expression such as `(2+M)*M`: whole numbers, names of dims, + * // only."""
    return _node(_parsed(expression), dims, expression)


@lru_cache(maxsize=256)
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


def _row(table: Mapping[str, Any]) -> Row:
    name = table["name"]
    return Row(
        name=name,
        mlx=table.get("mlx", name),
        hf=table.get("hf", name),
        role=table["role"],
        store=table["store"],
        shape=tuple(table["shape"]),
        when=table.get("when", ""),
        stage=table.get("stage", ""),
        file=table.get("file", ""),
        write=table.get("write", ""),
        values_below=table.get("values_below", ""),
    )


def _head(name: str, table: Mapping[str, Any]) -> HeadKind:
    return HeadKind(
        name=name,
        title=table["title"],
        signature=tuple(table["signature"]),
        stages_from=table["stages"],
        default_stages=table.get("default_stages", 1),
        config_keys=tuple(table["config_keys"]),
        dims=table.get("dims", {}),
        lengths=table.get("lengths", {}),
        rows=tuple(_row(r) for r in table["rows"]),
    )


def _tensor_tails(row: Row) -> list[tuple[str, str]]:
    """Return (spelling in Transformers, official) tails of the tensors that a row stands for."""
    if row.store in {"dense", "expert"}:
        return [(f"{row.hf}.{part}", f"{row.name}.{part}") for part in ("weight", "scale")]
    if row.store == "linear":
        return [(f"{row.hf}.weight", f"{row.name}.weight")]
    return [(row.hf, row.name)]


def _parse(table: Mapping[str, Any]) -> Family:
    root = tuple(_row(r) for r in table["root"])
    block = tuple(_row(r) for r in table["block"])
    heads = {k: _head(k, v) for k, v in table["head"].items()}
    rows = [*root, *block, *(r for h in heads.values() for r in h.rows)]
    spelling = table["spelling"]
    return Family(
        name=table["name"],
        title=table["title"],
        model_types=tuple(table["model_type"]),
        architectures=tuple(table["architectures"]),
        dims=table["dims"],
        config_keys={k: v for k, v in table["config"].items() if isinstance(v, str)},
        must_be=table["config"]["must_be"],
        compression={int(k): v for k, v in table["compression"].items()},
        when=table["when"],
        root=root,
        block=block,
        heads=heads,
        components=spelling["components"],
        prefixes=tuple(spelling["prefixes"]),
        fused=tuple(Fused(f["name"], tuple(f["parts"])) for f in spelling["fused"]),
        fused_scale=spelling["fused_scale"],
        ignored=spelling["ignored"],
        spellings={hf: name for row in rows for hf, name in _tensor_tails(row)},
    )


@cache
def families() -> Mapping[str, Family]:
    """Return all families that the package knows, by name."""
    folder = resources.files("ds4convert.manifests").joinpath("models")
    found = [_parse(tomllib.loads(f.read_text("utf-8"))) for f in folder.iterdir() if f.name.endswith(".toml")]
    return {f.name: f for f in sorted(found, key=lambda f: f.name)}


def family_of(model_type: Any) -> Family:
    """Return the family whose file lists exactly `model_type`. Raises `ConfigError` naming the known ones."""
    for family in families().values():
        if model_type in family.model_types:
            return family
    known = ", ".join(t for f in families().values() for t in f.model_types)
    raise ConfigError(f"config.json: model_type is {show(repr(model_type))}, expected one of: {known}")


class Speller:
    """Translates names as found on disk into official names; a name that means nothing known stays as it is."""

    def __init__(self, family: Family) -> None:
        self._family = family
        self._tails: dict[str, str] = {}

    def official(self, name: str) -> str:
        """Return the official name that `name` means: prefix dropped, components and tails looked up."""
        for prefix in self._family.prefixes:
            name = name.removeprefix(prefix)
        kind, _, rest = name.partition(".")
        number, _, tail = rest.partition(".")
        if kind in {"layers", "mtp"} and number.isdigit() and tail:
            return f"{kind}.{number}.{self._tail(tail)}"
        return self._tail(name)

    def _tail(self, tail: str) -> str:
        known = self._tails.get(tail)
        if known is None:
            known = self._tails[tail] = self._translate(tail)
        return known

    def _translate(self, tail: str) -> str:
        parts = [self._family.components.get(p, p) for p in tail.split(".")]
        expert = ""
        for at, part in enumerate(parts[1:], 1):
            if parts[at - 1] == "experts" and part.isdigit():
                expert, parts[at] = part, "{expert}"
        generic = ".".join(parts)
        return self._family.spellings.get(generic, generic).replace("{expert}", expert)
