"""A head from a source put into a converted folder that has none.

Owns the question whether the two belong together: family and dims by config, and the values of a few small tensors of
the backbone. What is made is what a conversion of the source with the same options would be.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ds4convert import assembly, compare, convert, logical, stored
from ds4convert import origin as origins
from ds4convert import plan as plans
from ds4convert.assembly import Assembly, Drawing, HeadFacts
from ds4convert.convert import Outcome, Source
from ds4convert.errors import ConfigError, InputError, InventoryError
from ds4convert.files import Disk
from ds4convert.inventory import BACKBONE, HEAD, Inventory, Named, ignored_reason
from ds4convert.inventory import compare as differences
from ds4convert.layouts import Layout, key_of
from ds4convert.recipes import HEAD_ROLES, Recipe
from ds4convert.stored import Stored, StoredModule
from ds4convert.types import JSON, LeftOut, SourceFile

ROUNDED = 2.0**-8
"""Relative difference that the rounding of BF16, the coarsest format of a small tensor, may make."""

COMPARED_ROLES = ("norm", "router")


@dataclass(frozen=True)
class Request:
    """What the user asked for; None is what the folder has. `force`: also a head of another training run."""

    layout: Layout | None = None
    mtp: str | None = None
    max_shard_bytes: int = plans.DEFAULT_SHARD_BYTES
    force: bool = False


@dataclass(frozen=True)
class Graft:
    """A planned graft: what it makes, what was checked before, and what the user has to know."""

    made: Assembly
    source: Source
    checked: str
    warnings: tuple[str, ...]


def plan(path: Path, source: Source, request: Request, model_source: bytes) -> Graft:
    """Return the graft of the head of `source` into the converted folder at `path`.

    Raises `InputError` where the folder has a head, the source has none or an incomplete one, the two do not belong
    together.
    """
    base = stored.read(path)
    _check_base(base)
    inventory = _check_head(source)
    warnings = _check_configs(base, inventory)
    checked, other = _check_values(base, source)
    if other and not request.force:
        raise InputError(f"{other}; --force grafts it all the same")
    warnings += [f"{other}; grafted because of --force"] if other else []
    layout = request.layout or assembly.layout_of_stored(base)
    made = _assemble(base, source, inventory, request, layout, model_source)
    return Graft(made, source, checked, tuple(warnings))


def _check_base(base: Stored) -> None:
    if base.has_head:
        raise InputError(
            f"{base.path}: has a {base.folder.head_kind} head already; take it out first: "
            f"ds4convert graft --remove {base.path}"
        )


def _check_head(source: Source) -> Inventory:
    """Return the inventory of the head alone. Raises `InventoryError` where it is missing or incomplete."""
    tensors = {n: t for n, t in source.named.tensors.items() if n.startswith("mtp.")}
    if not tensors:
        raise InventoryError(
            f"{source.checkpoint.path}: holds no tensor under mtp.*; name the source with its head "
            "(the whole checkpoint, or one pulled with --only mtp)"
        )
    head = tuple(m for m in source.inventory.modules if m.part == HEAD)
    inventory = dataclasses.replace(source.inventory, modules=head)
    doubled = tuple(pair for pair in source.named.doubled if pair[0] in {t.name for t in tensors.values()})
    findings = differences(inventory, Named(tensors, doubled), source.checkpoint.file_names)
    if findings:
        raise plans.findings_error(findings, f"{source.checkpoint.path}: the head is not whole; pull it again")
    return inventory


def _check_configs(base: Stored, inventory: Inventory) -> list[str]:
    """Return warnings on keys that differ. Raises `ConfigError` where the two are not of one shape."""
    ours, theirs = base.inventory.config, inventory.config
    keys = ours.family.config_keys
    wrong = [
        f"{ours.family.dims.get(symbol, symbol)} {ours.dims[symbol]} here, {theirs.dims.get(symbol)} there"
        for symbol in ours.family.dims
        if ours.dims[symbol] != theirs.dims.get(symbol)
    ]
    pairs: list[tuple[str, Any, Any]] = [
        ("family", ours.family.name, theirs.family.name),
        (keys["layers"], ours.layers, theirs.layers),
        (keys["hash_layers"], ours.hash_layers, theirs.hash_layers),
        (keys["ratios"], list(ours.ratios[: ours.layers]), list(theirs.ratios[: theirs.layers])),
    ]
    wrong += [f"{name} {a} here, {b} there" for name, a, b in pairs if a != b]
    if wrong:
        raise ConfigError(
            f"{base.path}: is not of the same model as the source: {'; '.join(wrong)}. Name the source that it was "
            "converted from"
        )
    hint = ours.head_hint
    if hint not in {"none", inventory.head_kind}:
        raise ConfigError(
            f"{base.path}: config.json describes a {ours.family.heads[hint].title}, the source has a "
            f"{theirs.family.heads[inventory.head_kind].title}; name the source that the folder was converted from"
        )
    skipped = {*plans.SOURCE_ONLY_KEYS, keys["stages"], keys["ratios"], *_HOST_KEYS}
    shared = (ours.raw.keys() & theirs.raw.keys()) - skipped
    other = sorted(k for k in shared if ours.raw[k] != theirs.raw[k])
    return [f"config.json differs from the source's in {', '.join(other)}; the folder's is kept"] if other else []


_HOST_KEYS = {"transformers_version", "torch_dtype", "dtype", "_name_or_path", "architectures", "use_cache"}
"""Keys that programs write on their own; they say nothing of the model."""


def _check_values(base: Stored, source: Source) -> tuple[str, str]:
    """Return (what was compared, what is wrong with it or "")."""
    wanted = logical.source_view(source.checkpoint, source.inventory, source.named, source.remote)
    layers = base.inventory.config.layers
    some = {None, 0, layers // 2, layers - 1}
    chosen = {
        k: t
        for k, t in wanted.tensors.items()
        if t.part == BACKBONE and t.role in COMPARED_ROLES and t.layer in some and not t.store.startswith("i")
    }
    if not chosen:
        return "family, dims and layers by config; the source has no backbone whose values could be compared", ""
    first, second = (_only(v, chosen) for v in (wanted, base.folder.view))
    for key, a, b, d in compare.compare_views(first, second):
        same_store = a is not None and b is not None and a.store == b.store
        if d.status != "same" and (same_store or d.status != "value" or d.relative_square > ROUNDED**2):
            place = f", first at {list(d.first)}" if d.first else ""
            return "", (
                f"{key}: the source's values are others than the folder's (by up to {d.max_abs:.3g}{place}), so its "
                "head is of another training run and would not fit"
            )
    return f"family, dims and layers by config; values of {len(chosen)} norms and router tensors", ""


def _only(view: logical.View, keys: Iterable[str]) -> logical.View:
    return dataclasses.replace(view, tensors={k: view.tensors[k] for k in keys})


def _assemble(
    base: Stored, source: Source, inventory: Inventory, request: Request, layout: Layout, model_source: bytes
) -> Assembly:
    base = _with_sources(base, source)
    formats = base.formats
    head_format = request.mtp or formats.get("mtp", "native")
    roles = {} if request.mtp else {k: v for k, v in formats.items() if k in HEAD_ROLES}
    recipe = Recipe("", "", {"backbone": formats.get("backbone", "native"), "mtp": head_format, **roles})
    options = plans.Options(recipe, layout, rounding=_rounding(base), hashing=base.hashing)
    encoded = plans.encode(inventory, options)
    places = layout.places(inventory.head_kind, inventory.stages)
    drawing = Drawing()
    if assembly.can_keep(base):
        drawing.keep(base, base.of(BACKBONE))
    else:
        drawing.move(base.of(BACKBONE), None, request.max_shard_bytes)
    for place in places:
        drawing.lay_out(partial(plans.step_of, source.named, options), encoded, place, request.max_shard_bytes)
    raw = _with_stages(base, inventory)
    config = dataclasses.replace(inventory.config, raw=raw)
    facts = HeadFacts(
        inventory.head_kind,
        dataclasses.replace(inventory, config=config),
        {"mtp": head_format},
        _sources(base, source),
        _ignored(source),
        source.origin,
    )
    backbone = [assembly.encoded(m) for m in base.of(BACKBONE)]
    account = assembly.account_of(base, drawing, layout, model_source, places, backbone + encoded, facts)
    return assembly.assemble(base, drawing, account, source.checkpoint)


def _with_sources(base: Stored, source: Source) -> Stored:
    """Return the folder with the names of the source's tensors, where no manifest tells what its own came from.

    What rounding cost the program that wrote it stays unknown.
    """
    modules = {key_of(m): m for m in source.inventory.modules}
    tensors = source.named.tensors
    if base.record is not None:
        return base

    def known(stored_module: StoredModule) -> StoredModule:
        module = modules[key_of(stored_module.module)]
        kinds = ["weight", *(["scale"] if module.has_scale else [])]
        if stored_module.module.part != BACKBONE or not all(
            module.weight_name(e) in tensors for e in range(module.experts or 1)
        ):
            return stored_module
        names = tuple(n for kind in kinds for n in plans.operand(module, kind, source.named)[1])
        dtype = tensors[module.weight_name()].dtype
        parts = tuple(dataclasses.replace(p, sources=names, source_dtype=dtype) for p in stored_module.parts)
        return dataclasses.replace(stored_module, parts=parts)

    return dataclasses.replace(base, modules=tuple(known(m) for m in base.modules))


def _rounding(base: Stored) -> str:
    """Return how the folder's tensors were rounded: as recorded, else the best way."""
    found = {p.part.params.get("rounding") for m in base.modules for p in m.parts} - {None}
    return str(found.pop()) if len(found) == 1 else "optimal"


def _with_stages(base: Stored, inventory: Inventory) -> JSON:
    """Return the folder's config with what the source's says of the head: stages, their ratios, the head's own keys."""
    family, theirs = inventory.config.family, inventory.config.raw
    stages, ratios = family.config_keys["stages"], family.config_keys["ratios"]
    head = family.heads[inventory.head_kind]
    own = [*head.config_keys, *head.dims.values(), *head.lengths.values()]
    wanted = {stages: theirs.get(stages, inventory.stages), ratios: theirs[ratios]}
    return dict(base.inventory.config.raw) | wanted | {k: theirs[k] for k in own if k in theirs}


def _sources(base: Stored, source: Source) -> tuple[SourceFile, ...]:
    """Return the source files of the result: the folder's, and those of the head that are not among them."""
    known = base.sources()
    return (*known, *(f for f in origins.originals(source.checkpoint) if f not in known))


def _ignored(source: Source) -> tuple[LeftOut, ...]:
    """Return the tensors under the head that are copies of shared ones, with the reason for which they stay out."""
    family = source.inventory.config.family
    named: Mapping[str, str | None] = {t.name: ignored_reason(family, n) for n, t in source.named.tensors.items()}
    return tuple(LeftOut(name, why) for name, why in named.items() if why)


def work(made: Assembly, in_place: bool) -> int:
    """Return about how many bytes a run writes and checks, for a progress bar."""
    return sum(f.size for f in (made.work if in_place else made.account).files)


def run(
    graft: Graft,
    out: Path,
    jobs: int = 2,
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda n: None,
    disk: Disk | None = None,
) -> Outcome:
    """Write the folder `out`, resuming what an earlier run left there. Errors as in `convert.run`."""
    made = graft.made
    ending = assembly.ending(made, out, (made.base.path, graft.source.checkpoint.path), progress)
    return convert.run(graft.source, made.work, out, jobs, overwrite, progress, disk, ending=ending)
