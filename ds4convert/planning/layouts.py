"""Target layouts, read from `manifests/layouts/*.toml`: where a host looks for the head, and how it spells it.

Owns the names of output tensors. The backbone has the MLX names of its family's file, but in a layout of which that
file says otherwise. A new layout is a new file. A family whose heads or hosts are others says so in its own file, per
layout.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from typing import Any

from ds4convert.checkpoint import advice
from ds4convert.checkpoint.families.rows import EXPERT
from ds4convert.checkpoint.family import Family, families
from ds4convert.checkpoint.inventory import Module, backbone_name
from ds4convert.errors import InputError, UsageError
from ds4convert.storage.belonging import belongs
from ds4convert.words.terminal import show

STAGE = "{stage}"
"""Stands for the number of a stage in the prefixes of a place."""


@dataclass(frozen=True)
class Host:
    """A program that loads a layout: its versions, and the option that makes it use the head ("" if none).

    `command` loads the folder DIR ("" where there is no such command line). `native_head`: it reads a head at the
    official checkpoint's own precision (or in BF16) alone. `kinds`: the heads it runs,
    None where it runs every kind. `text_only`: it stops at tensors of a tower.
    """

    name: str
    versions: str
    backbone: bool
    mtp: str
    command: str = ""
    native_head: bool = False
    kinds: Sequence[str] | None = None
    text_only: bool = False

    def runs(self, kind: str) -> bool:
        """Return whether it drafts with a head of this kind; what is no head is no reason against it."""
        return self.kinds is None or kind in self.kinds or kind == "none"


@dataclass(frozen=True)
class Spelling:
    """How a layout spells the backbone: under the family's MLX names, or (`official`) under the official ones.

    `but` are modules (by their MLX path in a block) that have MLX names all the same.
    `first` maps the first component of a path to what stands there instead, `rename` runs of components anywhere; the
    experts of a layer, which lie in one tensor, are a run with `{expert}` in it. `listed_twice`: the quantization table
    lists a module under its MLX name, too.
    """

    official: bool = False
    but: Sequence[str] = ()
    first: Mapping[str, str] = field(default_factory=dict)
    rename: Mapping[str, str] = field(default_factory=dict)
    listed_twice: bool = False

    folder = ""
    file = "model"

    def name(self, module: Module) -> str:
        """Return the path of a backbone module."""
        if module.mlx in self.but or not self.official:
            return backbone_name(module)
        begin, dot, rest = module.name.partition(".")
        path = f".{self.first.get(begin, begin)}{dot}{rest}."
        for theirs, ours in self.rename.items():
            path = path.replace(f".{theirs}.", f".{ours}.")
        return path.replace(f".{EXPERT}.", ".")[1:-1]

    def table_names(self, module: Module) -> list[str]:
        """Return the paths under which the quantization table lists the module."""
        return list(dict.fromkeys((self.name(module), *([backbone_name(module)] if self.listed_twice else []))))


@dataclass(frozen=True)
class HeadPlace:
    """One place of the head: folder and file stem, the prefix of a block's tensors and of the head's own ones.

    `table` and `own_table` are the prefixes under which the quantization table lists the modules. `config` is the
    config.json of a drafter folder, whose `$names` are filled in at planning; `beside` has further JSON files that
    hosts read, by kind of head and name, filled in alike.
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
    beside: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)

    def name(self, module: Module) -> str:
        """Return the path of a head module in this place."""
        prefix = self.own_prefix if module.own else self.prefix
        return prefix.replace(STAGE, str(module.block)) + self.rename.get(module.mlx, module.mlx)

    def table_names(self, module: Module) -> list[str]:
        """Return the paths under which the quantization table lists the module."""
        prefixes = self.own_table if module.own else self.table
        tail = self.rename.get(module.mlx, module.mlx)
        return [p.replace(STAGE, str(module.block)) + tail for p in prefixes]


@dataclass(frozen=True)
class Layout:
    """A layout file as a value. `promises_head`: whether config.json at the root counts the stored head.

    `backbone` is how it spells all but the head. `formats` are those that its hosts demand, by role or kind of matrix;
    `official` the roles of tables that they read in the official checkpoint's own dtypes, and `block` the table of
    config.json in which they look for all of this (`host_block`). `named_only`: it is one of the families alone whose
    files name it. `has_tower`: it is that of a model with a tower.
    """

    name: str
    description: str
    hosts: tuple[Host, ...]
    promises_head: bool
    model_file: str
    heads: tuple[HeadPlace, ...] = field(default=())
    backbone: Spelling = field(default_factory=Spelling)
    formats: Mapping[str, str] = field(default_factory=dict)
    official: tuple[str, ...] = ()
    block: Mapping[str, Any] = field(default_factory=dict)
    named_only: bool = False
    has_tower: bool = False

    def of(self, family: Family) -> Layout | None:
        """Return the layout as it is for a family, whose file may say that itself; None where no host loads it so."""
        if not family.layouts:
            return None if self.named_only else self
        table = family.layouts.get(self.name)
        if table is None:
            return None
        hosts, heads = tuple(Host(**h) for h in table["hosts"]), tuple(_place(p) for p in table["heads"])
        promises = table.get("promises_head", self.promises_head)
        made = replace(self, hosts=hosts, heads=heads, promises_head=promises)
        spelling, formats = Spelling(**table.get("backbone", {})), table.get("formats", {})
        official, block = tuple(table.get("official", ())), table.get("block", {})
        return replace(made, backbone=spelling, formats=formats, official=official, block=block)

    def with_tower(self) -> Layout:
        """Return the layout with those hosts that load a model which has a tower."""
        return replace(self, hosts=tuple(h for h in self.hosts if not h.text_only), has_tower=True)

    def wanted_of(self, family: Family, has_tower: bool = False, head_kind: str = "none") -> Layout:
        """Return the layout as it is for a family, or for a model of it that `has_tower`; advice minds the head.

        Raises `InputError` where none of its hosts loads such models.
        """
        own = self.of(family)
        if own is not None and has_tower and not own.with_tower().hosts:
            ways = advice.for_head_place(self.name, _able(family, head_kind, True), False)
            raise InputError(f"layout {self.name}: its hosts load the text model of {family.title} alone; {ways}")
        if own is None:
            able = [y.name for y in layouts().values() if y.of(family) is not None]
            here = " in it" if self.named_only else ""  # they may in another
            ways = advice.for_head_place(self.name, able, False)
            raise InputError(f"layout {self.name}: its hosts load no {family.title}{here}; {ways}")
        return own.with_tower() if has_tower else own

    def places(self, family: Family, head_kind: str, stages: int) -> tuple[HeadPlace, ...]:
        """Return the places of a head of this kind; `InputError` where the layout's hosts cannot load it."""
        places = tuple(p for p in self.wanted_of(family).heads if head_kind in p.kinds and stages <= p.max_stages)
        if not places:
            ways = advice.for_head_place(self.name, _able(family, head_kind, self.has_tower))
            raise InputError(f"layout {self.name}: its hosts load no {head_kind} head of {stages} stage(s); {ways}")
        return places


def _able(family: Family, head_kind: str, has_tower: bool) -> list[str]:
    """Return the layouts whose hosts load models of a family with such a head ("none": without), and with a tower."""
    own = ((y.name, y.of(family)) for y in layouts().values())
    found = ((name, y.with_tower() if has_tower else y) for name, y in own if y is not None)
    return [n for n, y in found if y.hosts and (head_kind == "none" or any(head_kind in p.kinds for p in y.heads))]


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
        beside=table.get("beside", {}),
    )


@cache
def layouts() -> Mapping[str, Layout]:
    """Return all layouts that the package knows, by name."""
    folder = resources.files("ds4convert.manifests").joinpath("layouts")
    out = []
    for entry in folder.iterdir():
        if entry.name.endswith(".toml") and belongs(entry.name):
            t = tomllib.loads(entry.read_text("utf-8"))
            hosts = tuple(Host(**h) for h in t["hosts"])
            heads = tuple(_place(p) for p in t["heads"])
            layout = Layout(t["name"], t["description"], hosts, t["promises_head"], t.get("model_file", ""), heads)
            out.append(replace(layout, named_only=t.get("named_only", False)))
    return {y.name: y for y in sorted(out, key=lambda y: y.name)}


def heads_of(layout: Layout, family: Family) -> tuple[HeadPlace, ...]:
    """Return the places of heads in a layout of a family; none where it is no layout of that family."""
    own = layout.of(family)
    return own.heads if own is not None else ()


def spellings_of(family: Family) -> list[Spelling]:
    """Return how layouts spell the backbone of a family, its own MLX names first."""
    own = (y.of(family) for y in layouts().values())
    found = [Spelling()]
    for layout in own:
        if layout is not None and layout.backbone not in found:
            found.append(layout.backbone)
    return found


def all_places(family: Family) -> list[HeadPlace]:
    """Return every place where a head of a family may be, in the order of the layouts."""
    return [p for y in layouts().values() for p in heads_of(y, family)]


def beside_names() -> frozenset[str]:
    """Return the names of all files that layouts have beside a head, for hosts that look there for its sizes."""
    places = (p for f in families().values() for p in all_places(f))
    return frozenset(name for p in places for files in p.beside.values() for name in files)


def head_stems_inside() -> tuple[str, ...]:
    """Return what names of heads begin with that lie in a converted folder itself, of any family."""
    places = (p for f in families().values() for p in all_places(f) if not p.folder)
    return tuple(dict.fromkeys(p.prefix.partition(STAGE)[0] for p in places))


def layout_for(name: str, family: str, roles: Iterable[str] = ()) -> Layout:
    """Return the layout called `name` as it is for the family called `family`, which a plan or a manifest names.

    `roles` are those of the tensors, by which it is told whether the model has a tower.
    """
    layout, known = layout_of(name), families().get(family)
    own = (known and layout.of(known)) or layout
    return own if known is None or known.tower_roles.isdisjoint(roles) else own.with_tower()


def layout_of(name: str) -> Layout:
    """Return the layout called `name`. Raises `UsageError` naming the known ones."""
    known = layouts()
    if name not in known:
        near = advice.did_you_mean(name, known)
        raise UsageError(f"no layout is called {show(name)}{near}; known: {', '.join(known)}")
    return known[name]
