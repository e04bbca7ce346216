"""Recipes: which format each module is written in, by its role and layer. Read from TOML, ours or a user's own file.

Owns the precedence of rules (a default per part, formats per role, rules per layer, the floor, then flags), and refuses
formats, roles and layers that do not exist, and a format for what is never quantized.
"""

from __future__ import annotations

import tomllib
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from ds4convert.checkpoint import advice
from ds4convert.checkpoint.family import Family, families
from ds4convert.checkpoint.inventory import BACKBONE, HEAD, Inventory, Module
from ds4convert.errors import InputError, UsageError
from ds4convert.formats.codecs import CODECS
from ds4convert.storage.belonging import belongs
from ds4convert.words.terminal import show

FORMATS = ("native", "bf16", *CODECS)
"""All formats by the name that users write."""

DEFAULTS = {BACKBONE: "backbone", HEAD: HEAD}
"""The name of each part's default in a recipe."""

BACKBONE_ROLES = ("experts", "shared_experts", "attention", "indexer", "compressor", "embedding", "head")
HEAD_ROLES = (
    "mtp_experts", "mtp_shared_experts", "mtp_attention", "mtp_projection", "mtp_markov", "mtp_confidence",
)  # fmt: skip
"""Roles that recipes have names for whatever the family; `backbone_roles` and `head_roles` add those of families."""

PROTECTED = ("router", "hyper_connection", "sinks", "norm", "tid2eid", "gate_bias", "ape")
"""What is never quantized: small, and what all the rest hangs on. Everyone who tried lost quality or the model."""

FAMILY_ROLES = {"output": "head"}
"""Roles that recipes have another name for than family files: the output matrix was called `head` in recipes first."""

SAID = {"head": "output"}
"""What people read and may write for a role of a recipe: `head` alone means the MTP head everywhere else."""


def said(role: str) -> str:
    """Return what messages and tables call a role of a recipe."""
    return SAID.get(role, role)


def role_of(module: Module) -> str:
    """Return the name that a recipe has for the role of `module`."""
    role = FAMILY_ROLES.get(module.role, module.role)
    return role if module.part == BACKBONE else _of_head(role)


def _of_head(role: str) -> str:
    return role if role.startswith(f"{HEAD}_") else f"{HEAD}_{role}"


def backbone_roles() -> tuple[str, ...]:
    """Return the roles of backbone matrices in recipes: the usual ones, then those that only some family has."""
    return tuple(dict.fromkeys((*BACKBONE_ROLES, *(r for f in families().values() for r in _roles_in(f)))))


def _roles_in(family: Family) -> list[str]:
    """Return the roles of the backbone's matrices in a family, its towers included."""
    towers = (r for t in family.towers for r in (*t.root, *t.rows))
    return [FAMILY_ROLES.get(r.role, r.role) for r in (*family.root, *family.block, *towers) if r.is_matrix]


def engram_roles() -> tuple[str, ...]:
    """Return the roles whose format the option for engrams chooses, of any family."""
    return tuple(dict.fromkeys(r for f in families().values() for r in f.engram_roles))


def head_roles() -> tuple[str, ...]:
    """Return the roles of a head's matrices in recipes: the usual ones, then those that only some family has."""
    heads = [r for f in families().values() for h in f.heads.values() for r in h.rows if r.is_matrix]
    blocks = [
        r for f in families().values() for r in f.block
        if r.is_matrix and f.heads and all(not f.when[w].marked and not f.when[w].ratios for w in r.when)
    ]  # fmt: skip
    return tuple(dict.fromkeys((*HEAD_ROLES, *(_of_head(r.role) for r in (*blocks, *heads)))))


def kind_of(module: Module) -> str:
    """Return what one matrix of a layer is called among those of its role: `experts.w2`, `attention.wo_a`."""
    return f"{role_of(module)}.{module.name.rpartition('.')[2]}"


@dataclass(frozen=True)
class Rule:
    """A format for roles, or for kinds of matrices, in some layers (of the head: stages) or, None, in all."""

    roles: frozenset[str]
    layers: frozenset[int] | None
    format: str

    def label(self) -> str:
        """Return how the rule is told: roles, and layers in runs."""
        names = "+".join(sorted(self.roles))
        return names if self.layers is None else f"{names} {runs(self.layers)}"


def runs(numbers: Iterable[int]) -> str:
    """Return numbers as runs: `0-3,7`."""
    out: list[list[int]] = []
    for n in sorted(numbers):
        if out and n == out[-1][1] + 1:
            out[-1][1] = n
        else:
            out.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in out)


@dataclass(frozen=True)
class Floor:
    """What the layers get that others lean on (a family's `carriers`), where a recipe gives them fewer than `bits`.

    `free` are the roles that do without, as the user chose their formats himself.
    """

    bits: int
    format: str
    why: str
    free: frozenset[str] = frozenset()

    def holds(self, module: Module, layers: Container[int | None]) -> bool:
        """Return whether it is there for a module; `layers` are those that others lean on."""
        return module.part == BACKBONE and module.block in layers and role_of(module) not in self.free

    def is_below(self, name: str) -> bool:
        """Return whether a format has fewer bits than this; those of sources have four and more."""
        return name in CODECS and CODECS[name].bits < self.bits


@dataclass(frozen=True)
class Recipe:
    """A format for every role: `formats` by role, `backbone` and `mtp` for all others; then `rules`, last first.

    `engram`: the option for engrams chose a format. `of` makes it the recipe of one model.
    """

    name: str
    description: str
    formats: Mapping[str, str]
    rules: tuple[Rule, ...] = field(default=())
    floor: Floor | None = None
    engram: bool = False

    def of(self, inventory: Inventory) -> Recipe:
        """Return the recipe of one model: its floor as rules, without roles that only other families have.

        Raises `InputError` if a rule names a layer that the model does not have, `UsageError` if an option is of no
        use.
        """
        family = inventory.config.family
        if self.engram and not family.engram_roles:
            raise UsageError(f"--engram: {family.title} has no engrams; leave it out")
        self.check(inventory)
        known = {"backbone", HEAD, *BACKBONE_ROLES, *head_roles(), *_roles_in(family)}
        mine = replace(self, formats={k: v for k, v in self.formats.items() if k in known}, floor=None)
        if self.floor is None:
            return mine
        lifted: dict[str, set[int]] = {}
        for module in inventory.modules:
            low = module.may_quantize and self.floor.is_below(mine.format_of(module))
            if low and module.block is not None and self.floor.holds(module, inventory.config.carriers):
                lifted.setdefault(role_of(module), set()).add(module.block)
        more = (Rule(frozenset({role}), frozenset(layers), self.floor.format) for role, layers in lifted.items())
        return replace(mine, rules=(*mine.rules, *more))

    def bound(self, formats: Mapping[str, str]) -> Recipe:
        """Return the recipe with formats, by role or kind of matrix, that a layout's hosts demand."""
        return replace(self, rules=(*self.rules, *(Rule(frozenset({r}), None, f) for r, f in formats.items())))

    def format_of(self, module: Module) -> str:
        """Return the format that `module` is written in; plain tensors (norms, router, ...) are always native.

        So are the matrices of towers that are a model of their own, unless the recipe names their role.
        """
        if not module.may_quantize:
            return "native"
        role, kind = role_of(module), kind_of(module)
        for rule in reversed(self.rules):
            if (role in rule.roles or kind in rule.roles) and (rule.layers is None or module.block in rule.layers):
                return rule.format
        return self.formats.get(role, "native" if module.apart else self.formats[DEFAULTS[module.part]])

    def overridden(
        self, backbone: str | None, experts: str | None, mtp: str | None, engram: str | None = None
    ) -> Recipe:
        """Return the recipe with flags applied: `backbone` covers experts and engrams too unless theirs are given."""
        formats, rules, free = dict(self.formats), list(self.rules), set[str]()
        for chosen, defaults, roles in (
            (backbone, ("backbone",), backbone_roles()),
            (experts, ("experts",), ("experts",)),
            (engram, engram_roles(), engram_roles()),
            (mtp, (HEAD,), head_roles()),
        ):
            if chosen is not None:
                kept = {k: v for k, v in formats.items() if k not in roles}
                formats = kept | dict.fromkeys(defaults, check_format(chosen))
                rules = [replace(r, roles=r.roles - set(roles)) for r in rules]
                free |= set(roles)
        floor = self.floor and replace(self.floor, free=frozenset(free))
        made = replace(self, formats=formats, rules=tuple(r for r in rules if r.roles), floor=floor)
        return replace(made, engram=engram is not None)

    def check(self, inventory: Inventory) -> None:
        """Raise `InputError` if a rule names a layer that the model does not have."""
        blocks: dict[str, set[int]] = {}
        for module in inventory.modules:
            if module.block is not None:
                for name in (role_of(module), kind_of(module)):
                    blocks.setdefault(name, set()).add(module.block)
        for rule in self.rules:
            known = set().union(*(blocks.get(r, set()) for r in rule.roles))
            lacking = (rule.layers or frozenset()) - known
            if lacking:
                raise InputError(
                    f"recipe {self.name}: the rule for {'+'.join(sorted(map(said, rule.roles)))} names layer "
                    f"{runs(lacking)}; this model has these in layers {runs(known) or '(none)'}"
                )

    def as_formats(self) -> dict[str, str]:
        """Return the formats by part, role, and role with layers."""
        default = self.formats["backbone"]
        base = {"backbone": default, "experts": self.formats.get("experts", default)}
        return base | dict(self.formats) | {rule.label(): rule.format for rule in self.rules}


def check_format(name: Any, error: type[Exception] = UsageError) -> str:
    """Return `name` if it is a known format, else raise `error` with the known ones."""
    if name not in FORMATS:
        near = advice.did_you_mean(str(name), FORMATS)
        known = f"; it writes: {', '.join(FORMATS)}"
        raise error(f"format {shown(name)} is not one that this version writes{near}{known}")
    return str(name)


def shown(value: Any) -> str:
    """Return a value of a recipe or of an option as people write it: texts in quotes, tables and lists by kind."""
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value[:8]))}{', ...' if len(value) > 8 else ''}]"
    return show(repr(value) if isinstance(value, str) else str(value).lower())


def _parse(raw: str, where: str) -> Recipe:
    try:
        table = tomllib.loads(raw)
    except (tomllib.TOMLDecodeError, RecursionError) as e:
        raise InputError(f"{where}: not valid TOML: {e}") from None
    formats, rules = table.get("formats"), table.get("rule", [])
    unknown = sorted(set(table) - {"name", "description", "formats", "rule", "floor"})
    if unknown or not isinstance(formats, dict) or not isinstance(rules, list):
        what = ", ".join(unknown) or ("formats" if not isinstance(formats, dict) else "rule")
        raise InputError(
            f"{where}: a recipe has name, description, a table [formats] by role, tables [[rule]] and a table [floor]",
            hint=f"check: {what}",
        )
    for role, name in formats.items():
        _check_role(role, where, ("backbone", HEAD, *backbone_roles(), *head_roles()))
        _check(name, role, where)
    chosen = {"backbone": "native", HEAD: "native"} | {_stored(role): name for role, name in formats.items()}
    made = tuple(_rule(r, f"{where}, rule {n + 1}") for n, r in enumerate(rules))
    floor = _floor(table["floor"], f"{where}, floor") if "floor" in table else None
    return Recipe(str(table.get("name", "")), str(table.get("description", "")), chosen, made, floor)


def _floor(table: Any, where: str) -> Floor:
    if not isinstance(table, dict) or set(table) != {"bits", "format", "why"} or type(table["bits"]) is not int:
        raise InputError(f"{where}: a floor has bits (a whole number), format, and why (a reason)")
    made = Floor(table["bits"], _check(table["format"], "format", where), str(table["why"]))
    if made.is_below(made.format):
        raise InputError(f"{where}: format is {made.format}, which has fewer than {made.bits} bits itself")
    return made


def _check(name: Any, role: str, where: str) -> str:
    if name not in FORMATS:
        near = advice.did_you_mean(str(name), FORMATS)
        raise InputError(f"{where}: {role} = {shown(name)}; this version writes: {', '.join(FORMATS)}{near}")
    return str(name)


def _check_role(role: Any, where: str, known: tuple[str, ...]) -> str:
    if isinstance(role, str) and role in PROTECTED:
        raise InputError(f"{where}: {role} is never quantized", hint="take it out of the recipe, it stays native")
    if not isinstance(role, str) or _stored(role) not in known:
        words = [said(k) for k in known]
        raise InputError(
            f"{where}: no role is called {shown(role)}; known: {', '.join(words)}"
            f"{advice.did_you_mean(str(role), words)}"
        )
    return _stored(role)


def _stored(role: str) -> str:
    """Return the name on disk of a role as people write it."""
    return {v: k for k, v in SAID.items()}.get(role, role)


def _rule(table: Any, where: str) -> Rule:
    if (
        not isinstance(table, dict)
        or set(table) - {"roles", "layers", "format"}
        or not {"roles", "format"} <= set(table)
    ):
        raise InputError(f"{where}: a rule has roles (a list), format, and may have layers (a list of whole numbers)")
    roles, layers = table["roles"], table.get("layers")
    if not isinstance(roles, list) or not roles:
        raise InputError(f"{where}: roles is {shown(roles)}, expected a list of roles")
    if layers is not None and not (isinstance(layers, list) and layers and all(type(n) is int for n in layers)):
        raise InputError(f"{where}: layers is {shown(layers)}, expected a list of whole numbers such as [0, 1, 2]")
    names = frozenset(_check_role(r, where, backbone_roles() + head_roles()) for r in roles)
    chosen = None if layers is None else frozenset(layers)
    return Rule(names, chosen, _check(table["format"], "format", where))


@cache
def recipes() -> Mapping[str, Recipe]:
    """Return the recipes that ship with the package, by name."""
    folder = resources.files("ds4convert.manifests").joinpath("recipes")
    found = [
        _parse(f.read_text("utf-8"), f.name) for f in folder.iterdir() if f.name.endswith(".toml") and belongs(f.name)
    ]
    return {r.name: r for r in sorted(found, key=lambda r: r.name)}


def recipe_of(name: str) -> Recipe:
    """Return the recipe called `name`, or the one in the file NAME.toml. Raises naming the known ones."""
    if name.endswith(".toml"):
        try:
            recipe = _parse(Path(name).read_text("utf-8"), name)
        except (OSError, ValueError) as e:
            told = e.strerror if isinstance(e, OSError) else "it is not UTF-8 text"
            raise InputError(f"{show(name, 4096)}: cannot be read as a recipe: {told}") from None
        return replace(recipe, name=recipe.name or Path(name).stem)
    known = recipes()
    if name not in known:
        near = advice.did_you_mean(name, known)
        raise UsageError(f"no recipe is called {show(name)}{near}; known: {', '.join(known)}, or a FILE.toml")
    return known[name]
