"""Recipes: which format each module is written in, by its role and layer. Read from TOML, ours or a user's own file.

Owns the precedence of rules (a default per part, formats per role, rules per layer, then flags), and refuses formats,
roles and layers that do not exist, and a format for what is never quantized.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from ds4convert.errors import InputError, UsageError
from ds4convert.formats.codecs import CODECS
from ds4convert.inventory import BACKBONE, HEAD, Inventory, Module

FORMATS = ("native", "bf16", *CODECS)
"""All formats by the name that users write."""

DEFAULTS = {BACKBONE: "backbone", HEAD: "mtp"}
"""The name of each part's default in a recipe."""

BACKBONE_ROLES = ("experts", "shared_experts", "attention", "indexer", "compressor", "embedding", "head")
HEAD_ROLES = (
    "mtp_experts", "mtp_shared_experts", "mtp_attention", "mtp_projection", "mtp_markov", "mtp_confidence",
)  # fmt: skip
PROTECTED = ("router", "hyper_connection", "sinks", "norm", "tid2eid", "gate_bias", "ape")
"""What is never quantized: small, and what all the rest hangs on. Everyone who tried lost quality or the model."""

FAMILY_ROLES = {"output": "head"}
"""Roles that users know by another name than family files."""


def role_of(module: Module) -> str:
    """Return the name that a recipe has for the role of `module`."""
    role = FAMILY_ROLES.get(module.role, module.role)
    return role if module.part == BACKBONE or role.startswith("mtp_") else f"mtp_{role}"


@dataclass(frozen=True)
class Rule:
    """A format for roles, in some layers (of the head: stages) or, None, in all."""

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
class Recipe:
    """A format for every role: `formats` by role, `backbone` and `mtp` for all others; then `rules`, last first."""

    name: str
    description: str
    formats: Mapping[str, str]
    rules: tuple[Rule, ...] = field(default=())

    def format_of(self, module: Module) -> str:
        """Return the format that `module` is written in; plain tensors (norms, router, ...) are always native."""
        if not module.may_quantize:
            return "native"
        role = role_of(module)
        for rule in reversed(self.rules):
            if role in rule.roles and (rule.layers is None or module.block in rule.layers):
                return rule.format
        return self.formats.get(role, self.formats[DEFAULTS[module.part]])

    def overridden(self, backbone: str | None, experts: str | None, mtp: str | None) -> Recipe:
        """Return the recipe with flags applied: `backbone` covers the experts too unless `experts` is given."""
        formats, rules = dict(self.formats), list(self.rules)
        for chosen, default, roles in (
            (backbone, "backbone", BACKBONE_ROLES),
            (experts, "experts", ("experts",)),
            (mtp, "mtp", HEAD_ROLES),
        ):
            if chosen is not None:
                formats = {k: v for k, v in formats.items() if k not in roles} | {default: check_format(chosen)}
                rules = [replace(r, roles=r.roles - set(roles)) for r in rules]
        return replace(self, formats=formats, rules=tuple(r for r in rules if r.roles))

    def check(self, inventory: Inventory) -> None:
        """Raise `InputError` if a rule names a layer that the model does not have."""
        blocks: dict[str, set[int]] = {}
        for module in inventory.modules:
            if module.block is not None:
                blocks.setdefault(role_of(module), set()).add(module.block)
        for rule in self.rules:
            known = set().union(*(blocks.get(r, set()) for r in rule.roles))
            lacking = (rule.layers or frozenset()) - known
            if lacking:
                raise InputError(
                    f"recipe {self.name}: the rule for {'+'.join(sorted(rule.roles))} names layer {runs(lacking)}; "
                    f"this model has these in layers {runs(known) or '(none)'}"
                )

    def as_formats(self) -> dict[str, str]:
        """Return the formats by part, role, and role with layers."""
        default = self.formats["backbone"]
        base = {"backbone": default, "experts": self.formats.get("experts", default)}
        return base | dict(self.formats) | {rule.label(): rule.format for rule in self.rules}


def check_format(name: Any, error: type[Exception] = UsageError) -> str:
    """Return `name` if it is a known format, else raise `error` with the known ones."""
    if name not in FORMATS:
        raise error(f"format {name!r} is not one that this version writes; it writes: {', '.join(FORMATS)}")
    return str(name)


def _parse(raw: str, where: str) -> Recipe:
    try:
        table = tomllib.loads(raw)
    except (tomllib.TOMLDecodeError, RecursionError) as e:
        raise InputError(f"{where}: not valid TOML: {e}") from None
    formats, rules = table.get("formats"), table.get("rule", [])
    unknown = sorted(set(table) - {"name", "description", "formats", "rule"})
    if unknown or not isinstance(formats, dict) or not isinstance(rules, list):
        what = ", ".join(unknown) or ("formats" if not isinstance(formats, dict) else "rule")
        raise InputError(
            f"{where}: a recipe has name, description, a table [formats] by role and tables [[rule]]; check: {what}"
        )
    for role, name in formats.items():
        _check_role(role, where, ("backbone", "mtp", *BACKBONE_ROLES, *HEAD_ROLES))
        _check(name, role, where)
    chosen = {"backbone": "native", "mtp": "native"} | formats
    made = tuple(_rule(r, f"{where}, rule {n + 1}") for n, r in enumerate(rules))
    return Recipe(str(table.get("name", "")), str(table.get("description", "")), chosen, made)


def _check(name: Any, role: str, where: str) -> str:
    if name not in FORMATS:
        raise InputError(f"{where}: {role} = {name!r}; this version writes: {', '.join(FORMATS)}")
    return str(name)


def _check_role(role: Any, where: str, known: tuple[str, ...]) -> str:
    if role in PROTECTED:
        raise InputError(f"{where}: {role} is never quantized; take it out of the recipe, it stays native")
    if role not in known:
        raise InputError(f"{where}: no role is called {role!r}; known: {', '.join(known)}")
    return str(role)


def _rule(table: Any, where: str) -> Rule:
    if (
        not isinstance(table, dict)
        or set(table) - {"roles", "layers", "format"}
        or not {"roles", "format"} <= set(table)
    ):
        raise InputError(f"{where}: a rule has roles (a list), format, and may have layers (a list of whole numbers)")
    roles, layers = table["roles"], table.get("layers")
    if not isinstance(roles, list) or not roles:
        raise InputError(f"{where}: roles is {roles!r}, expected a list of roles")
    if layers is not None and not (isinstance(layers, list) and layers and all(type(n) is int for n in layers)):
        raise InputError(f"{where}: layers is {layers!r}, expected a list of whole numbers such as [0, 1, 2]")
    names = frozenset(_check_role(r, where, BACKBONE_ROLES + HEAD_ROLES) for r in roles)
    chosen = None if layers is None else frozenset(layers)
    return Rule(names, chosen, _check(table["format"], "format", where))


@cache
def recipes() -> Mapping[str, Recipe]:
    """Return the recipes that ship with the package, by name."""
    folder = resources.files("ds4convert.manifests").joinpath("recipes")
    found = [_parse(f.read_text("utf-8"), f.name) for f in folder.iterdir() if f.name.endswith(".toml")]
    return {r.name: r for r in sorted(found, key=lambda r: r.name)}


def recipe_of(name: str) -> Recipe:
    """Return the recipe called `name`, or the one in the file NAME.toml. Raises naming the known ones."""
    if name.endswith(".toml"):
        try:
            recipe = _parse(Path(name).read_text("utf-8"), name)
        except (OSError, UnicodeDecodeError) as e:
            raise InputError(f"{name}: cannot be read as a recipe: {e}") from None
        return replace(recipe, name=recipe.name or Path(name).stem)
    known = recipes()
    if name not in known:
        raise UsageError(f"no recipe is called {name!r}; known: {', '.join(known)}, or a FILE.toml")
    return known[name]
