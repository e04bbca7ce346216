"""Recipes: which format each module is written in. Read from `manifests/recipes/*.toml` or a user's own file.

Owns the precedence of rules (recipe, then flags) and refuses formats and parts that do not exist.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from ds4convert.errors import InputError, UsageError
from ds4convert.formats.codecs import CODECS
from ds4convert.inventory import HEAD, Module

PARTS = ("backbone", "experts", "mtp")
FORMATS = ("native", "bf16", *CODECS)
"""The formats of this version. The names of the other formats of the contract are reserved."""


@dataclass(frozen=True)
class Recipe:
    """A format for each of: backbone, the backbone's routed experts, head."""

    name: str
    description: str
    backbone: str
    experts: str
    mtp: str

    def format_of(self, module: Module) -> str:
        """Return the format that `module` is written in; plain tensors (norms, router, ...) are always native."""
        if not module.may_quantize:
            return "native"
        if module.part == HEAD:
            return self.mtp
        return self.experts if module.role == "experts" else self.backbone

    def overridden(self, backbone: str | None, experts: str | None, mtp: str | None) -> Recipe:
        """Return the recipe with flags applied: `backbone` covers the experts too unless `experts` is given."""
        return replace(
            self,
            backbone=check_format(backbone or self.backbone),
            experts=check_format(experts or backbone or self.experts),
            mtp=check_format(mtp or self.mtp),
        )

    def as_formats(self) -> dict[str, str]:
        """Return the format of each part by name."""
        return {"backbone": self.backbone, "experts": self.experts, "mtp": self.mtp}


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
    formats = table.get("formats")
    unknown = sorted(set(table) - {"name", "description", "formats"})
    if unknown or not isinstance(formats, dict) or set(formats) - set(PARTS):
        what = ", ".join(unknown) or "formats"
        raise InputError(
            f"{where}: a recipe has name, description and a table [formats] with {', '.join(PARTS)}; check: {what}"
        )
    backbone = formats.get("backbone", "native")
    chosen = {
        "backbone": backbone,
        "experts": formats.get("experts", backbone),
        "mtp": formats.get("mtp", "native"),
    }
    for part, name in chosen.items():
        if name not in FORMATS:
            raise InputError(f"{where}: {part} = {name!r}; this version writes: {', '.join(FORMATS)}")
    return Recipe(str(table.get("name", "")), str(table.get("description", "")), **chosen)


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
