"""What there is to choose from: recipes (files of one's own, too), layouts, formats, families; each in one line."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from ds4convert.api.reporting import document
from ds4convert.api.values import PathLike, as_paths
from ds4convert.checkpoint import advice
from ds4convert.checkpoint.family import families
from ds4convert.checkpoint.types import JSON
from ds4convert.errors import Ds4Error, InputError, UsageError
from ds4convert.planning.encodings import codec_of
from ds4convert.planning.layouts import layouts
from ds4convert.planning.recipes import FORMATS, Recipe, recipe_of, recipes
from ds4convert.storage.belonging import belongs

KINDS = ("recipes", "layouts", "formats", "families")
MOST_BYTES = 1 << 16
"""What a file may have that is looked at unasked, to see whether it is a recipe."""

SAID = {
    "native": "the source's own precision in MLX's layout, value for value",
    "bf16": "every weight as BF16, exact for FP4 and FP8",
}


def listed(kind: str, paths: PathLike | Iterable[PathLike] = ()) -> JSON:
    """Return the rows of one kind, as a document: name, description, and what else there is to say of the kind.

    `paths` are recipes of one's own, or folders of them; without any, those in the current folder are listed too.
    Raises `UsageError` for a kind that there is not, `InputError` for a path that is no recipe.
    """
    if kind not in KINDS:
        raise UsageError(f"list {kind!r}: expected {advice.either(KINDS)}{advice.did_you_mean(kind, KINDS)}")
    own = as_paths(paths)
    if own and kind != "recipes":
        raise UsageError(f"list {kind}: takes no file; only recipes can be files of one's own")
    rows = {"recipes": lambda: _recipes(own), "layouts": _layouts, "formats": _formats, "families": _families}[kind]()
    return document({"kind": kind, "rows": rows})


def _recipes(own: tuple[Path, ...]) -> list[JSON]:
    found = [_recipe(r, None) for r in recipes().values()]
    for path in own or (Path(),):
        if path.is_dir():
            found += [_recipe(r, p) for p, r in _in_folder(path)]
        else:
            found.append(_recipe(_read(path), path))
    return found


def _recipe(recipe: Recipe, path: Path | None) -> JSON:
    return {
        "name": recipe.name if path is None else str(path),
        "description": recipe.description,
        "file": None if path is None else str(path),
        "formats": recipe.as_formats(),
    }


def _read(path: Path) -> Recipe:
    if not os.path.lexists(path):
        raise InputError(f"{path}: no such file or folder", hint="name a recipe FILE.toml, or a folder of such files")
    if path.suffix != ".toml":
        raise InputError(f"{path}: a recipe is a file that ends in .toml", hint="rename it, or name another")
    return recipe_of(str(path))


def _in_folder(folder: Path) -> Iterable[tuple[Path, Recipe]]:
    """Yield the files of a folder that are recipes; what else ends in .toml is left alone."""
    for path in sorted(p for p in folder.glob("*.toml") if belongs(p.name)):
        try:
            if path.is_file() and path.stat().st_size <= MOST_BYTES:
                yield path, recipe_of(str(path))
        except (OSError, Ds4Error):
            continue


def _layouts() -> list[JSON]:
    return [
        {"name": y.name, "description": y.description, "hosts": [f"{h.name} {h.versions}" for h in y.hosts]}
        for y in layouts().values()
    ]


def _formats() -> list[JSON]:
    rows = []
    for name in FORMATS:
        codec = codec_of(name)
        if codec is None:
            rows.append({"name": name, "description": SAID[name], "bits_per_weight": 16.0 if name == "bf16" else None})
            continue
        each = "a scale and a bias" if codec.has_biases else "a scale"
        what = f"{codec.mode}: {codec.bits} bits in groups of {codec.group_size} with {each}"
        rows.append({"name": name, "description": what, "bits_per_weight": codec.bits_per_weight})
    return rows


def _families() -> list[JSON]:
    rows: list[Mapping[str, object]] = []
    for f in families().values():
        heads = advice.either(list(f.heads)) if f.heads else "no"
        does = "converts and runs" if f.runs else "converts; is not run yet"
        what = f"{f.title}: {does}; {heads} head"
        rows.append({"name": f.name, "description": what, "heads": list(f.heads), "runs": f.runs})
    return [dict(r) for r in rows]
