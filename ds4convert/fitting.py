"""Fits a model into so many bytes: measures, chooses, and tells what was chosen, and what other sizes would give."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ds4convert import measure
from ds4convert import plan as plans
from ds4convert.errors import UsageError
from ds4convert.fit import Choice, Optimiser, Option, Unit
from ds4convert.formats import ENCODERS
from ds4convert.inventory import BACKBONE, Inventory
from ds4convert.recipes import Recipe, Rule, runs
from ds4convert.types import JSON

HEADER_BYTES_PER_TENSOR = 500
"""What a tensor takes in a header, the index and the config, at most."""

SMALL_FILES = 24 << 20
"""Tokenizer, chat template, config: what a folder holds beside tensors, at most."""

MEMORY_SIZES = tuple(gb * 10**9 for gb in (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024))


@dataclass(frozen=True)
class Room:
    """Memory that a model may take: in all, and what of it is not for weights (state of the context, working set)."""

    target: int
    context: int
    cache: int
    working: int

    @property
    def weights(self) -> int:
        """Return the bytes that are left for weights."""
        return self.target - self.cache - self.working


@dataclass(frozen=True)
class Fitted:
    """The recipe that was chosen, and its account for people and scripts."""

    recipe: Recipe
    facts: JSON


def fit(inventory: Inventory, options: plans.Options, errors: measure.Errors, room: Room) -> Fitted:
    """Return the recipe of least error that leaves the model in its room; `options` says all else.

    Raises `UsageError` for a room that is too small, naming the smallest that is not.
    """
    optimiser = Optimiser(measure.options(inventory, errors))
    fixed = _fixed(inventory, options)
    least = optimiser.size + fixed + room.cache + room.working
    if least > room.target:
        raise UsageError(
            f"--fit {room.target / 1e9:g}GB is too small for this model: in its smallest formats it needs "
            f"{least / 1e9:.1f} GB ({(optimiser.size + fixed) / 1e9:.1f} GB weights, {room.cache / 1e9:.2f} GB state "
            f"for {room.context:,} tokens, {room.working / 1e9:.1f} GB working set); --fit {least / 1e9 + 0.1:.1f}GB "
            "is the smallest size"
        )
    choice = optimiser.choose(room.weights - fixed)
    return Fitted(_recipe(options.recipe, choice), _facts(inventory, optimiser, choice, fixed, room))


def _fixed(inventory: Inventory, options: plans.Options) -> int:
    """Return the bytes of all that no choice is made for: head, small tensors, headers, small files; at most."""
    total, tensors = SMALL_FILES, 0
    for module in inventory.modules:
        if module.part != BACKBONE and not options.keep_mtp:
            continue
        name = options.recipe.format_of(module)
        encoding = ENCODERS[name if not (module.part == BACKBONE and module.may_quantize) else "native"](module)
        tensors += 3
        if module.part != BACKBONE or not module.may_quantize:
            total += encoding.size_bytes
    return total + tensors * HEADER_BYTES_PER_TENSOR


def _recipe(base: Recipe, choice: Choice) -> Recipe:
    """Return the choice as a recipe: a rule for each role and format; the head as in `base`."""
    chosen: dict[tuple[str, str], set[int | None]] = {}
    for (role, layer), option in choice.options.items():
        chosen.setdefault((role, option.format), set()).add(layer)
    rules = []
    for (role, name), layers in sorted(chosen.items()):
        numbers = frozenset(n for n in layers if n is not None)
        rules.append(Rule(frozenset({role}), numbers or None, name))
    head = {k: v for k, v in base.formats.items() if k.startswith("mtp")}
    return replace(base, name="fit", formats={"backbone": "native", **head}, rules=tuple(rules))


def _facts(inventory: Inventory, optimiser: Optimiser, choice: Choice, fixed: int, room: Room) -> JSON:
    weights = {u: sum(m.weights for m in modules) for u, modules in measure.units(inventory).items()}
    smaller = [s for s in MEMORY_SIZES if s < room.target][-2:]
    larger = [s for s in MEMORY_SIZES if s > room.target][:2]
    return {
        "target_bytes": room.target,
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
    limit = target - room.cache - room.working - fixed
    if limit < optimiser.size:
        return {"target_bytes": target, "fits": False}
    choice = optimiser.choose(limit)
    return {
        "target_bytes": target,
        "fits": True,
        "weights_bytes": choice.size + fixed,
        "bits_per_weight": round(8 * choice.size / weights, 3),
        "total_error": choice.error,
    }
