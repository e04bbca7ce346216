"""Which recipes a Mac can hold of a model: size, the longest context, quality where it was measured, the command."""

from __future__ import annotations

import shlex
import tomllib
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

from ds4convert.api.opening import NAMED_CONFIGS, config_bytes
from ds4convert.api.reporting import document
from ds4convert.api.values import mac_size
from ds4convert.checkpoint import advice
from ds4convert.checkpoint.config import parse_config
from ds4convert.checkpoint.inventory import Inventory, expected
from ds4convert.checkpoint.types import JSON
from ds4convert.errors import InputError, UsageError
from ds4convert.fit.memory import is_mapped
from ds4convert.fit.size_budget import HEADER_BYTES_PER_TENSOR, SMALL_FILES
from ds4convert.planning.encodings import ENCODERS
from ds4convert.planning.recipes import Recipe, recipes
from ds4convert.words import macs

if TYPE_CHECKING:
    from ds4convert.inference.deepseek_v4.config import ModelArgs

MODELS = tuple(n for n in NAMED_CONFIGS if n != "tiny")
LEAST_CONTEXT = 4096
"""Tokens that a model has to have room for, where nothing else is said, to be called one that fits."""

LARGEST_MAC = 512
"""GiB of the largest Mac that is sold; `macs.SIZES` goes on beyond it."""


def recommend(mac: int | str, model: str = "flash", context: int | None = None) -> JSON:
    """Return the recipes of which a Mac can hold a model, the largest first, as a document.

    `mac` is the memory of the Mac, `model` the name of a config that ships; `context` are the tokens there has to be
    room for. A recipe's `context` is the longest that fits, null where the program does not run the family, so that
    weights alone are compared. `quality` is null where nobody measured it. Raises `UsageError`.
    """
    if model not in MODELS:
        raise UsageError(f"--model {model}: expected {advice.either(MODELS)}{advice.did_you_mean(model, MODELS)}")
    memory = mac_size(mac)
    inventory = expected(parse_config(config_bytes(model), model))
    room = Room(macs.usable(memory), context or LEAST_CONTEXT, args_of(inventory))
    known = known_facts()["models"][model]
    fits, others = [], []
    for found in candidates(inventory):
        row, name = _row(found, inventory, room, model), found.recipe.name
        if room.holds(found.held):
            fits.append(row | {"command": _command(known, ["--recipe", name], name)})
        else:
            others.append(row | {"needs_mac_bytes": smallest_mac(found.held, room)})
    chosen = _command(known, ["--mac", f"{memory / macs.GIB:g}GB"], f"{memory / macs.GIB:g}")
    return document(
        {
            "model": model, "repo": known["repo"], "mac_bytes": memory, "usable_bytes": room.usable,
            "least_context": room.least if room.args else None, "runs": room.args is not None, "recipes": fits,
            "too_large": others, "by_layer": chosen if fits and room.args else None,
        }
    )  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    """A recipe for a model: the bytes of its tensors (`tensors`), of all that a folder has beside them too, at most
    (`folder`), and of that what hosts read from the disk, row by row, and never hold (`mapped`).
    """

    recipe: Recipe
    tensors: int
    folder: int
    mapped: int = 0

    @property
    def held(self) -> int:
        """Return the bytes that lie in memory, at most."""
        return self.folder - self.mapped


def candidates(inventory: Inventory) -> list[Candidate]:
    """Return what each recipe that ships makes of a model, the largest first; none whose groups do not divide it."""
    found = []
    for recipe in recipes().values():
        if recipe.name != "fit":
            with suppress(InputError):
                found.append(_candidate(recipe, inventory))
    return sorted(found, key=lambda c: (-c.folder, c.recipe.name))


def _candidate(recipe: Recipe, inventory: Inventory) -> Candidate:
    sizes = [ENCODERS[recipe.format_of(m)](m).size_bytes for m in inventory.modules]
    total = sum(sizes)
    mapped = sum(n for n, m in zip(sizes, inventory.modules, strict=True) if is_mapped(inventory, m))
    return Candidate(recipe, total, total + beside(3 * len(sizes)), mapped)


def beside(tensors: int) -> int:
    """Return the bytes that a folder of so many tensors has beside them, at most."""
    return tensors * HEADER_BYTES_PER_TENSOR + SMALL_FILES


@dataclass(frozen=True)
class Room:
    """What Metal may use, the tokens there has to be room for, and the model's sizes (None: nothing here runs it)."""

    usable: int
    least: int
    args: ModelArgs | None

    def needs(self, weights: int, context: int) -> int:
        """Return the bytes that a model with so many bytes of weights takes with so many tokens."""
        if self.args is None:
            return weights
        from ds4convert.inference.load import cache_size_bytes, working_set_bytes

        return weights + cache_size_bytes(self.args, context, 2) + working_set_bytes(self.args)

    def holds(self, weights: int) -> bool:
        """Return whether there is room for so many bytes of weights, and for the least of tokens."""
        return self.needs(weights, self.least) <= self.usable

    def longest(self, weights: int, most: int) -> int:
        """Return the most tokens, up to `most`, that there is room for; 0 for none."""
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.needs(weights, middle) <= self.usable else (low, middle - 1)
        return low


def args_of(inventory: Inventory) -> ModelArgs | None:
    """Return the sizes of a model that runs here; None of a family that does not."""
    if not inventory.config.family.runs:
        return None
    from ds4convert.inference.load import read_args

    return read_args(dict(inventory.config.raw), "the config")


def _row(found: Candidate, inventory: Inventory, room: Room, model: str) -> JSON:
    recipe = found.recipe
    longest = None if room.args is None else room.longest(found.held, most_tokens(inventory))
    return {
        "recipe": recipe.name, "description": recipe.description, "output_bytes": found.folder, "context": longest,
        "quality": measured(model, recipe.name), "demo_quality": measured("demo", recipe.name),
    }  # fmt: skip


def most_tokens(inventory: Inventory) -> int:
    """Return the longest context that the model's config allows; 1,048,576 where it does not say."""
    found = inventory.config.value("max_position_embeddings")
    return found if type(found) is int and found > 0 else 1 << 20


def smallest_mac(held: int, room: Room) -> int | None:
    """Return the memory of the smallest Mac with room for so many bytes of weights, None where none has it."""
    need = room.needs(held, room.least)
    return next((n * macs.GIB for n in macs.SIZES if n <= LARGEST_MAC and macs.usable(n * macs.GIB) >= need), None)


def _command(known: JSON, options: list[str], suffix: str) -> str:
    return shlex.join(["ds4convert", "quantize", known["repo"], f"{known['name']}-{suffix}", *options])


def measured(model: str, recipe: str) -> JSON | None:
    """Return what was measured of a recipe on a model, with its source; None where nothing was."""
    rows = (r for r in known_facts()["measured"] if (r["model"], r["recipe"]) == (model, recipe))
    return next((dict(r) for r in rows), None)


@cache
def known_facts() -> JSON:
    """Return the data file of models and measured figures."""
    return tomllib.loads((resources.files("ds4convert.manifests") / "quality.toml").read_text("utf-8"))
