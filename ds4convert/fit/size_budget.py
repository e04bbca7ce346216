"""Fits a model into so many bytes: measures, chooses, and tells what was chosen, and what other sizes would give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ds4convert.checkpoint.inventory import BACKBONE, HEAD, Inventory, Module
from ds4convert.checkpoint.types import JSON
from ds4convert.errors import UsageError
from ds4convert.fit import format_errors
from ds4convert.fit.memory import is_mapped
from ds4convert.fit.optimiser import Choice, Optimiser, Option, Unit
from ds4convert.planning import build
from ds4convert.planning.encodings import ENCODERS
from ds4convert.planning.recipes import Recipe, Rule, engram_roles, runs
from ds4convert.words import macs

HEADER_BYTES_PER_TENSOR = 500
"""What a tensor takes in a header, the index and the config, at most."""

SMALL_FILES = 24 << 20
"""Tokenizer, chat template, config: what a folder holds beside tensors, at most."""


@dataclass(frozen=True)
class Room:
    """Memory that a model may take: in all, and what of it is not for weights (state of the context, working set).

    `mac` is the memory of the Mac that it is of, where that was said; all in bytes.
    """

    target: int
    context: int
    cache: int
    working: int
    mac: int | None = None

    @property
    def weights(self) -> int:
        """Return the bytes that are left for weights."""
        return self.target - self.cache - self.working


@dataclass(frozen=True)
class Fitted:
    """The recipe that was chosen, and its account for people and scripts."""

    recipe: Recipe
    facts: JSON


def fit(
    inventory: Inventory,
    options: build.Options,
    errors: format_errors.Errors,
    room: Room,
    known: format_errors.Sensitivities | None = None,
) -> Fitted:
    """Return the recipe of least error that leaves the model in its room; `options` says all else.

    With sensitivities each kind of matrix in each layer has a format of its own, and the error is what they tell.
    Raises `UsageError` for a room that is too small, naming the smallest that is not.
    """
    demanded = options.layout.wanted_of(inventory.config.family, inventory.config.has_tower).formats
    said = (*_said_roles(options.recipe), *demanded)
    options = replace(options, recipe=options.recipe.bound(demanded))
    optimiser = Optimiser(format_errors.options(inventory, errors, known, options.recipe.floor, said))
    fixed, mapped = _fixed(inventory, options, said)
    least = optimiser.size + fixed + room.cache + room.working
    if least > room.target:
        raise UsageError(
            f"{_said(room)} is too small for this model: in its smallest formats it needs "
            f"{least / 1e9:.1f} GB ({(optimiser.size + fixed) / 1e9:.1f} GB weights, {room.cache / 1e9:.2f} GB state "
            f"for {room.context:,} tokens, {room.working / 1e9:.1f} GB working set); {_smallest(least, room)}"
        )
    choice = optimiser.choose(room.weights - fixed)
    found = format_errors.units(inventory, known is not None, said)
    facts = _facts(found, optimiser, choice, fixed, room, known is not None)
    return Fitted(_recipe(options.recipe, choice), facts | ({"mapped_bytes": mapped} if mapped else {}))


def _said_roles(recipe: Recipe) -> tuple[str, ...]:
    """Return the roles of the backbone whose format is said where the rest is chosen: engrams, by their own option."""
    return tuple(r for r in engram_roles() if r in recipe.formats)


def _said(room: Room) -> str:
    """Return the option that says this room."""
    if room.mac is None:
        return f"--fit {room.target / 1e9:g}GB"
    return f"--mac {room.mac / macs.GIB:g}GB ({room.target / 1e9:.1f} GB for Metal)"


def _smallest(least: int, room: Room) -> str:
    """Return the smallest size that would do, in words."""
    if room.mac is None:
        return f"--fit {least / 1e9 + 0.1:.1f}GB is the smallest size"
    known = [n for n in macs.SIZES if macs.usable(n * macs.GIB) >= least]
    return f"--mac {known[0]}GB is the smallest that does" if known else "no Mac holds it"


def _fixed(inventory: Inventory, options: build.Options, said: Sequence[str]) -> tuple[int, int]:
    """Return the bytes of all that no choice is made for: (in memory, at most; in tables that stay on the disk).

    In memory are head, towers, small tensors, headers and small files.
    """
    total, mapped, tensors = SMALL_FILES, 0, 0
    for module in inventory.modules:
        if module.part != BACKBONE and not options.keep_mtp:
            continue
        name = options.recipe.format_of(module)
        chosen = format_errors.is_chosen(module, inventory, said)
        size = ENCODERS["native" if chosen else name](module).size_bytes
        tensors += 3
        if is_mapped(inventory, module):
            mapped += size
        elif not chosen:
            total += size
    return total + tensors * HEADER_BYTES_PER_TENSOR, mapped


def _recipe(base: Recipe, choice: Choice) -> Recipe:
    """Return the choice as a recipe: a rule for each role and format; the head as in `base`."""
    chosen: dict[tuple[str, str], set[int | None]] = {}
    for (role, layer), option in choice.options.items():
        chosen.setdefault((role, option.format), set()).add(layer)
    rules = []
    for (role, name), layers in sorted(chosen.items()):
        numbers = frozenset(n for n in layers if n is not None)
        rules.append(Rule(frozenset({role}), numbers or None, name))
    said = _said_roles(base)
    head = {k: v for k, v in base.formats.items() if k.startswith(HEAD) or k in said}
    return replace(base, name="fit", formats={"backbone": "native", **head}, rules=tuple(rules))


def _facts(
    found: Mapping[Unit, Sequence[Module]],
    optimiser: Optimiser,
    choice: Choice,
    fixed: int,
    room: Room,
    sensitive: bool,
) -> JSON:
    weights = {u: sum(m.weights for m in modules) for u, modules in found.items()}
    smaller = [s for s in macs.SIZES if macs.usable(s * macs.GIB) < room.target][-2:]
    larger = [s for s in macs.SIZES if macs.usable(s * macs.GIB) > room.target][:2]
    mac = {} if room.mac is None else {"mac_bytes": room.mac}
    return mac | {
        "target_bytes": room.target,
        "planned_bytes": choice.size + fixed + room.cache + room.working,
        "estimate": choice.error,
        "basis": "sensitivity" if sensitive else "weights",
        "context": room.context,
        "cache_bytes": room.cache,
        "working_bytes": room.working,
        "weights_bytes": choice.size + fixed,
        "total_error": choice.error,
        "gap": choice.gap,
        "smallest_bytes": optimiser.size + fixed + room.cache + room.working,
        "table": _table(choice.options, weights),
        "other_sizes": [_other(optimiser, s, fixed, room, sum(weights.values())) for s in (*smaller, *larger)],
    }


def _table(options: Mapping[Unit, Option], weights: Mapping[Unit, int]) -> list[JSON]:
    """Return a row per role and format: layers in runs, bits per weight, bytes, error."""
    rows: dict[tuple[str, str], list[Unit]] = {}
    for unit, option in options.items():
        rows.setdefault((unit[0], option.format), []).append(unit)
    out = []
    for (role, name), units in sorted(rows.items(), key=lambda r: (r[0][0], min(u[1] or 0 for u in r[1]))):
        size = sum(options[u].size for u in units)
        out.append(
            {
                "role": role,
                "layers": runs(u[1] for u in units if u[1] is not None),
                "format": name,
                "bits_per_weight": round(8 * size / sum(weights[u] for u in units), 3),
                "bytes": size,
                "error": sum(options[u].error for u in units),
            }
        )
    return out


def _other(optimiser: Optimiser, target: int, fixed: int, room: Room, weights: int) -> JSON:
    memory = target * macs.GIB
    told = {"mac_bytes": memory, "target_bytes": macs.usable(memory)}
    limit = macs.usable(memory) - room.cache - room.working - fixed
    if limit < optimiser.size:
        return told | {"fits": False}
    choice = optimiser.choose(limit)
    return told | {
        "fits": True,
        "weights_bytes": choice.size + fixed,
        "bits_per_weight": round(8 * choice.size / weights, 3),
        "total_error": choice.error,
    }
