"""Target layouts, read from `manifests/layouts/*.toml`: where a host looks for the head, and how it spells it.

Owns the names of output tensors. The backbone is spelled alike in every layout; only the head differs. A new
layout is a new file.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

from ds4convert.errors import InputError, UsageError
from ds4convert.inventory import BACKBONE, Module


@dataclass(frozen=True)
class Host:
    """A program that loads a layout: its versions, and the option that makes it use the head ("" if none).

    `command` loads the folder DIR ("" where there is no such command line). `native_head`: it reads a head at the
    official checkpoint's own precision (or in BF16) alone.
    """

    name: str
    versions: str
    backbone: bool
    mtp: str
    command: str = ""
    native_head: bool = False


@dataclass(frozen=True)
class HeadPlace:
    """One place of the head: folder and file stem, the prefix of a block's tensors and of the head's own ones.

    `table` and `own_table` are the prefixes under which the quantization table lists the modules. `config` is the
    config.json of a drafter folder, whose `$names` are filled in at planning.
    """

    kinds: tuple[str, ...]
    folder: str
    file: str
    prefix: str
    own_prefix: str
    table: tuple[str, ...]
    own_table: tuple[str, ...]
    rename: Mapping[str, str]
    config: Mapping[str, Any]
    max_stages: int

    def name(self, module: Module) -> str:
        """Return the path of a head module in this place."""
        prefix = self.own_prefix if module.own else self.prefix
        return prefix.replace("{stage}", str(module.block)) + self.rename.get(module.mlx, module.mlx)

    def table_names(self, module: Module) -> list[str]:
        """Return the paths under which the quantization table lists the module."""
        prefixes = self.own_table if module.own else self.table
        tail = self.rename.get(module.mlx, module.mlx)
        return [p.replace("{stage}", str(module.block)) + tail for p in prefixes]


@dataclass(frozen=True)
class Layout:
    """A layout file as a value. `promises_head`: whether config.json at the root counts the stored head."""

    name: str
    description: str
    hosts: tuple[Host, ...]
    promises_head: bool
    model_file: str
    heads: tuple[HeadPlace, ...] = field(default=())

    def places(self, head_kind: str, stages: int) -> tuple[HeadPlace, ...]:
        """Return the places of a head of this kind; `InputError` where the layout's hosts cannot load it."""
        places = tuple(p for p in self.heads if head_kind in p.kinds and stages <= p.max_stages)
        if not places:
            able = [n for n, y in layouts().items() if any(head_kind in p.kinds for p in y.heads)]
            raise InputError(
                f"layout {self.name}: its hosts load no {head_kind} head of {stages} stage(s); "
                f"choose --layout {' or '.join(able)}, or --drop-mtp"
            )
        return places


def backbone_name(module: Module) -> str:
    """Return the MLX path of a backbone module: the same in every layout."""
    return module.mlx if module.block is None else f"model.layers.{module.block}.{module.mlx}"


def key_of(module: Module) -> str:
    """Return the key of a module in all layouts: its MLX path, the head's as if it lay in the folder."""
    return backbone_name(module) if module.part == BACKBONE else f"mtp.{module.block}.{module.mlx}"


def _place(table: Mapping[str, Any]) -> HeadPlace:
    return HeadPlace(
        kinds=tuple(table["kinds"]),
        folder=table["folder"],
        file=table["file"],
        prefix=table["prefix"],
        own_prefix=table["own_prefix"],
        table=tuple(table["table"]),
        own_table=tuple(table.get("own_table", table["table"])),
        rename=table.get("rename", {}),
        config=table.get("config", {}),
        max_stages=table.get("stages", 1 << 16),
    )


@cache
def layouts() -> Mapping[str, Layout]:
    """Return all layouts that the package knows, by name."""
    folder = resources.files("ds4convert.manifests").joinpath("layouts")
    out = []
    for entry in folder.iterdir():
        if entry.name.endswith(".toml"):
            t = tomllib.loads(entry.read_text("utf-8"))
            hosts = tuple(Host(**h) for h in t["hosts"])
            heads = tuple(_place(p) for p in t["heads"])
            layout = Layout(t["name"], t["description"], hosts, t["promises_head"], t.get("model_file", ""), heads)
            out.append(layout)
    return {y.name: y for y in sorted(out, key=lambda y: y.name)}


def layout_of(name: str) -> Layout:
    """Return the layout called `name`. Raises `UsageError` naming the known ones."""
    known = layouts()
    if name not in known:
        raise UsageError(f"no layout is called {name!r}; known: {', '.join(known)}")
    return known[name]
