"""`inspect`: what a checkpoint is and holds; and with `report` a page of it, by which one decides before a download."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ds4convert.api.asking import recommending
from ds4convert.api.asking.recommending import LARGEST_MAC, LEAST_CONTEXT, Candidate, Room
from ds4convert.api.opening import Inspected, Opened, Place, located, look
from ds4convert.api.reporting import Listener, MessageCallback
from ds4convert.api.values import PathLike
from ds4convert.checkpoint.inventory import BACKBONE, Inventory, group_of
from ds4convert.checkpoint.types import JSON
from ds4convert.converted import manifest, verify_record
from ds4convert.converted.inspection import Inspection
from ds4convert.converted.records import Manifest
from ds4convert.errors import Ds4Error, InputError
from ds4convert.hub import kinds
from ds4convert.hub.kinds import Listing
from ds4convert.hub.records import Repo
from ds4convert.planning.recipes import recipes
from ds4convert.report import inspected, pages
from ds4convert.report.inspected import Choice, Holding, Listed, Quality, Subject
from ds4convert.words import macs

if TYPE_CHECKING:
    from ds4convert.inference.deepseek_v4.config import ModelArgs

SHAPE = {
    "Layers": "num_hidden_layers", "Hidden size": "hidden_size", "Experts": "n_routed_experts",
    "Experts of a token": "num_experts_per_tok", "Vocabulary": "vocab_size",
    "Longest context": "max_position_embeddings",
}  # fmt: skip
"""Dimensions that a page tells, with their keys in config.json."""


def inspect(
    source: Place | None = None, *, config: PathLike | None = None, tensors: str | None = None,
    report: PathLike | None = None, say: MessageCallback | None = None,
) -> Inspected:  # fmt: skip
    """Return what a checkpoint is and holds: family, kind of head, bytes per group, what does not fit its config.

    `source` is a folder, a file, or a repo of the Hub, of which headers alone are read. With `config` (a file, or the
    name of one that ships with the package: `flash`, `pro`, `tiny`, `flash-v41`) it is what a model of that config
    holds. `tensors` is a shell pattern: the tensors whose names match are listed under `matching`. `report` is the HTML
    page to write. `say` is warned of zeros that tell of an unfinished download. Raises `InputError` for what cannot be
    read as a checkpoint, `OutputError` where something else than a page stands in the place of `report`.

    >>> import ds4convert as ds4
    >>> found = ds4.inspect("checkpoint", tensors="mtp.0.?_proj.weight", report="checkpoint.html")
    >>> found.head_kind, found.problems, len(found.as_json()["matching"])
    ('classic', (), 2)
    """
    if report is not None:
        pages.check_target(Path(report))
    place: Place | Listing | None = source
    if report is not None and source is not None and config is None:
        place = located(source) if not isinstance(source, Opened) else source  # once: a repo is one commit
    found = look(place, config, tensors, say)
    if report is not None:
        facts = replace(found.facts, manifest=found.facts.manifest or _manifest(place, found.facts))
        subject = _subject(source, place, config, facts)
        pages.write(Path(report), inspected.page(subject))
        Listener(say=say).note(f"Report: {report}")
    return found


def _manifest(place: Place | Listing | None, found: Inspection) -> Manifest | None:
    """Return the manifest of a converted folder on the Hub; None without one, and where it is of other files."""
    repo = place.repo if isinstance(place, Opened) else place
    if found.format != "mlx" or not isinstance(repo, Repo):
        return None
    listed = {f.name: f for f in repo.files}
    file = listed.get(manifest.MANIFEST_NAME)
    if file is None or file.size > manifest.MAX_BYTES:
        return None
    from ds4convert.hub.remote_checkpoint import fetch_small

    with suppress(InputError):
        record = manifest.parsed(fetch_small(repo, file))
        if all(f.name in listed and listed[f.name].size == f.size for f in record.files if f.holds_tensors):
            return record
    return None


def _subject(
    source: Place | None, place: Place | Listing | None, config: PathLike | None, found: Inspection
) -> Subject:
    """Return what the page is about: its name, its place without a path, and all that is worked out from the facts."""
    if isinstance(place, Opened):
        source, place = place.name, place.repo or place.path
    name, word, repo, revision, model = "", "", "", "", ""
    files: tuple[Listed, ...] = ()
    kept = None
    if place is None:
        name, word, model = _of_config(str(config))
    elif not isinstance(place, str | os.PathLike):
        name, word = place.name, str(source)
        files = tuple(Listed(f.name, f.size, f.sha256) for f in place.files)
        came_from = kinds.provenance(place)
        repo, revision = (came_from.repo, came_from.revision) if came_from is not None else ("", "")
    else:
        folder = Path(os.fspath(place)).resolve()
        name = word = folder.name
        if found.manifest is not None:
            kept = verify_record.read(folder, found.manifest)
        elif found.origin is not None:
            repo, revision = found.origin.repo, found.origin.revision
    model = model or _known(repo)
    choices, holders = _worked_out(found, model)
    return Subject(
        name, word, found, repo, revision, tuple(_shape(found.inventory)), choices, holders, LEAST_CONTEXT,
        tuple(n for n in recipes() if n != "fit" and choices and n not in {c.recipe for c in choices}),
        found.inventory is not None and bool(found.inventory.config.family.mapped_roles), files, kept,
    )  # fmt: skip


def _of_config(config: str) -> tuple[str, str, str]:
    """Return (name, place, model) of a config: of one that ships, the repo that it is of."""
    known = recommending.known_facts()["models"].get(config)
    if known is not None:
        return known["name"], known["repo"], config
    return Path(config).resolve().name, "SRC", ""


def _known(repo: str) -> str:
    """Return the name of a model of which measurements may be known, by its repo; "" for all others."""
    models: JSON = recommending.known_facts()["models"]
    return next((name for name, m in models.items() if m["repo"] == f"hf://{repo}"), "")


def _shape(inventory: Inventory | None) -> Iterator[tuple[str, str]]:
    if inventory is None:
        return
    for word, key in SHAPE.items():
        value = inventory.config.value(key)
        if type(value) is int:
            yield word, f"{value:,}"


def _worked_out(found: Inspection, model: str) -> tuple[tuple[Choice, ...], tuple[Holding, ...]]:
    """Return what recipes make of an official checkpoint, and which Macs hold what; nothing where it is not known."""
    inventory = found.inventory
    if inventory is None:
        return (), ()
    room = Room(0, LEAST_CONTEXT, _runs(inventory))
    if found.format == "mlx":
        mapped = {group_of(BACKBONE, role) for role in inventory.config.family.mapped_roles}
        held = recommending.beside(len(found.rows)) + sum(r.size for r in found.rows if r.group not in mapped)
        return (), tuple(_holdings([("the model", held)], room, inventory))
    made = recommending.candidates(inventory)
    exact = next(c for c in made if c.recipe.name == "native")
    choices = tuple(_choice(c, inventory, room, model) for c in made)
    sizes = [(c.recipe.name, c.held) for c in made if c.folder <= exact.folder]
    return choices, tuple(_holdings(sizes, room, inventory))


def _runs(inventory: Inventory) -> ModelArgs | None:
    """Return the sizes of a model that runs here; None for a config that the forward pass cannot compute."""
    with suppress(Ds4Error):
        return recommending.args_of(inventory)
    return None


def _choice(made: Candidate, inventory: Inventory, room: Room, model: str) -> Choice:
    name, weights = made.recipe.name, sum(m.weights for m in inventory.modules)
    return Choice(
        recipe=name,
        description=made.recipe.description,
        size=made.tensors,
        bits_per_weight=8 * made.tensors / weights if weights else 0.0,
        mac=recommending.smallest_mac(made.held, room),
        quality=_quality(model, name),
        demo=_quality("demo", name),
    )


def _quality(model: str, recipe: str) -> Quality | None:
    found = recommending.measured(model, recipe)
    return None if found is None else Quality(found["kl"], found["same"])


def _holdings(models: Sequence[tuple[str, int]], room: Room, inventory: Inventory) -> Iterator[Holding]:
    """Yield which of `models` (names and bytes in memory, the best first) Macs hold, Macs of the same answer as one."""
    rows: list[Holding] = []
    most = recommending.most_tokens(inventory)
    for gib in (n for n in macs.SIZES if n <= LARGEST_MAC):
        mac = replace(room, usable=macs.usable(gib * macs.GIB))
        name, held = next(((n, h) for n, h in models if mac.holds(h)), (None, 0))
        context = mac.longest(held, most) if name is not None and mac.args is not None else None
        if rows and (rows[-1].recipe, rows[-1].context) == (name, context):
            rows[-1] = replace(rows[-1], largest=gib * macs.GIB)
        else:
            rows.append(Holding(gib * macs.GIB, gib * macs.GIB, name, context))
    yield from rows
