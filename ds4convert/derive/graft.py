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

from ds4convert.checkpoint import compare, provenance
from ds4convert.checkpoint.families.rows import NUMBER
from ds4convert.checkpoint.inventory import BACKBONE, HEAD, Inventory, key_of
from ds4convert.checkpoint.inventory import compare as differences
from ds4convert.checkpoint.names import Named, Speller, ignored_reason
from ds4convert.checkpoint.published import pruning
from ds4convert.checkpoint.published.findings import findings_error
from ds4convert.checkpoint.source import Source
from ds4convert.checkpoint.tensors import TensorView
from ds4convert.checkpoint.types import JSON, LeftOut
from ds4convert.converted.modules import ConvertedModules, StoredModule, commonest, read, shaped
from ds4convert.derive import derivation, requantize
from ds4convert.derive.derivation import Derivation, HeadFacts
from ds4convert.derive.donor import Donor
from ds4convert.derive.plan_builder import PlanBuilder
from ds4convert.errors import ConfigError, InputError, InventoryError, UsageError
from ds4convert.execution import run as convert
from ds4convert.execution.run import Outcome
from ds4convert.files import Disk
from ds4convert.planning import build
from ds4convert.planning.build import config_sha256
from ds4convert.planning.config_files import source_only_keys
from ds4convert.planning.layouts import Layout
from ds4convert.planning.recipes import Recipe, head_roles
from ds4convert.storage.records import SourceFile

ROUNDED = 2.0**-8
"""Relative difference that the rounding of BF16, the coarsest format of a small tensor, may make."""

COMPARED_ROLES = ("norm", "router")


@dataclass(frozen=True)
class Request:
    """What the user asked for; None is what the folder has. `force`: also a head of another training run."""

    layout: Layout | None = None
    mtp: str | None = None
    max_shard_bytes: int = build.DEFAULT_SHARD_BYTES
    force: bool = False


@dataclass(frozen=True)
class Graft:
    """A planned graft: what it makes, what was checked before, and what the user has to know."""

    made: Derivation
    source: Source
    checked: str
    warnings: tuple[str, ...]


def plan(path: Path, source: Source, request: Request, model_source: bytes) -> Graft:
    """Return the graft of the head of `source` into the converted folder at `path`.

    Raises `InputError` where the folder has a head, the source has none or an incomplete one, the two do not belong
    together.
    """
    base = read(path)
    _check_base(base)
    inventory = _check_head(source)
    warnings = _check_configs(base, inventory)
    wanted = source.view
    checked, other = _check_values(base, wanted)
    if other and not request.force:
        raise InputError(f"{other}; --force grafts it all the same")
    warnings += [f"{other}; grafted because of --force"] if other else []
    layout = _layout(base, request)
    made = _derived(base, source, inventory, request, layout, model_source)
    return Graft(made, source, checked, tuple(warnings))


def plan_converted(path: Path, donor: Donor, request: Request, model_source: bytes) -> Graft:
    """Return the graft of a head that is converted already. It keeps its format; errors as in `plan`."""
    base = read(path)
    _check_base(base)
    if request.mtp:
        raise UsageError(
            f"--mtp {request.mtp}: the head in {donor.path} is converted already and keeps its format",
            hint="leave it out, or take the head from the official checkpoint",
        )
    warnings = _check_configs(base, donor.inventory)
    checked, other = _check_values(base, donor.backbone.view) if donor.backbone else (_NO_BACKBONE, "")
    if other and not request.force:
        raise InputError(f"{other}; --force grafts it all the same")
    warnings += [f"{other}; grafted because of --force"] if other else []
    joined = _without_left_out(read(path, donor.headers, donor.records))
    layout = _layout(base, request)
    made = _derived_of_converted(base, joined, donor, request, layout, model_source)
    return Graft(made, Source(donor.headers, donor.inventory, Named({}, ())), checked, tuple(warnings))


def _layout(base: ConvertedModules, request: Request) -> Layout:
    """Return the layout of the result, as it is for the folder's family: the one asked for, else the folder's own."""
    if request.layout is None:
        return derivation.layout_of_stored(base)
    config = base.inventory.config
    return request.layout.wanted_of(config.family, config.has_tower)


def _without_left_out(joined: ConvertedModules) -> ConvertedModules:
    """Return the folder with its head, whose tensors count no longer as left out."""
    if joined.record is None:
        return joined
    left = tuple(x for x in joined.record.left_out if not _is_of_head(joined, x.tensor))
    return dataclasses.replace(joined, record=dataclasses.replace(joined.record, left_out=left))


def _derived_of_converted(
    base: ConvertedModules,
    joined: ConvertedModules,
    donor: Donor,
    request: Request,
    layout: Layout,
    model_source: bytes,
) -> Derivation:
    places = layout.places(base.inventory.config.family, donor.inventory.head_kind, donor.inventory.stages)
    builder, head = PlanBuilder(), joined.of(HEAD)
    builder.backbone(joined, layout, request.max_shard_bytes)
    for place in places:
        builder.move(head, place, request.max_shard_bytes, layout)
    config = dataclasses.replace(donor.inventory.config, raw=_with_stages(base, donor.inventory))
    known = base.sources()
    facts = HeadFacts(
        donor.inventory.head_kind,
        dataclasses.replace(donor.inventory, config=config),
        {HEAD: commonest(m.encoding.label for m in head if m.module.may_quantize)} | dict(donor.formats),
        (*known, *(f for f in donor.sources if f not in known)),
    )
    modules = [requantize.encoded(shaped(m, layout), layout) for m in joined.modules]
    result = derivation.result_plan_of(joined, builder, layout, model_source, places, modules, facts)
    return derivation.derive(joined, builder, result)


def already(path: Path, source: Source, request: Request) -> bool:
    """Return whether the folder has this very head, as a graft with these options would have put it in."""
    try:
        base = read(path)
        if base.record is None or base.folder.head_kind != source.inventory.head_kind:
            return False
        asked: list[tuple[str | None, str | None]] = [
            (request.layout.name if request.layout else None, base.record.layout)
        ]
        asked += [(request.mtp, base.formats.get(HEAD))]
        sources = set(base.sources())
        fits = all(wanted in {None, found} for wanted, found in asked)
        return fits and sources >= set(provenance.originals(source.checkpoint)) and _same_head(base, source)
    except InputError:
        return False


def _same_head(base: ConvertedModules, source: Source) -> bool:
    """Return whether the head's norms and router tensors are those of the source: headers do not tell of values."""
    wanted = source.view
    chosen = [
        k
        for k, t in wanted.tensors.items()
        if t.part == HEAD and t.role in COMPARED_ROLES and k in base.folder.view.tensors
    ]
    if not chosen:
        return False
    pairs = compare.compare_views(_only(wanted, chosen), _only(base.folder.view, chosen))
    return all(d.status == "same" or d.relative_square <= ROUNDED**2 for *_, d in pairs)


def _check_base(base: ConvertedModules) -> None:
    if base.has_head:
        raise InputError(
            f"{base.path}: has a {base.folder.head_kind} head already",
            hint=f"take it out first: ds4convert graft --remove {base.path}",
        )


def _check_head(source: Source) -> Inventory:
    """Return the inventory of the head alone. Raises `InventoryError` where it is missing or incomplete."""
    family = source.inventory.config.family
    tensors = {n: t for n, t in source.named.tensors.items() if family.is_of_head(n)}
    if not tensors:
        raise InventoryError(
            f"{source.checkpoint.path}: holds no tensor under {family.of_head}",
            hint=("name the source with its head (the whole checkpoint, or one pulled with --only mtp)"),
        )
    head = tuple(m for m in source.inventory.modules if m.part == HEAD)
    inventory = dataclasses.replace(source.inventory, modules=head)
    doubled = tuple(pair for pair in source.named.doubled if pair[0] in {t.name for t in tensors.values()})
    findings = differences(inventory, Named(tensors, doubled), source.checkpoint.file_names)
    if findings:
        not_whole = (
            f"{source.checkpoint.path}: the head is not whole; name a source that has all of it (the whole checkpoint, "
            "or one pulled with --only mtp)"
        )
        raise findings_error(findings, pruning.advice(inventory.config, source.named.tensors) or not_whole)
    return inventory


def _check_configs(base: ConvertedModules, inventory: Inventory) -> list[str]:
    """Return warnings on keys that differ. Raises `ConfigError` where the two are not of one shape."""
    ours, theirs = base.inventory.config, inventory.config
    keys, marks = ours.family.config_keys, ours.family.marks
    wrong = [
        f"{ours.family.dims.get(symbol, symbol)} {ours.dims[symbol]} here, {theirs.dims.get(symbol)} there"
        for symbol in ours.family.dims
        if ours.dims[symbol] != theirs.dims.get(symbol)
    ]
    pairs: list[tuple[str, Any, Any]] = [
        ("family", ours.family.name, theirs.family.name),
        (keys["layers"], ours.layers, theirs.layers),
        *(
            (marks[m].key, on.value, theirs.marks[m].value if m in theirs.marks else None)
            for m, on in ours.marks.items()
        ),
        (keys.get("ratios", "ratios"), list(ours.ratios[: ours.layers]), list(theirs.ratios[: theirs.layers])),
    ]
    wrong += [f"{name} {a} here, {b} there" for name, a, b in pairs if a != b]
    if wrong:
        raise ConfigError(
            f"{base.path}: is not of the same model as the source: {'; '.join(wrong)}",
            hint="Name the source that it was converted from",
        )
    hint = ours.head_hint if ours.head_hint != "none" else _dropped_kind(base)
    if hint not in {"none", inventory.head_kind}:
        raise ConfigError(
            f"{base.path}: config.json (or what the manifest left out) describes a "
            f"{ours.family.heads[hint].title}, the source has a "
            f"{theirs.family.heads[inventory.head_kind].title}",
            hint="name the source that the folder was converted from",
        )
    skipped = {*source_only_keys(ours.family), keys["stages"], keys.get("ratios", ""), *_HOST_KEYS}
    flat, others = ours.flat, theirs.flat
    other = sorted(k for k in (flat.keys() & others.keys()) - skipped if flat[k] != others[k])
    return [f"config.json differs from the source's in {', '.join(other)}; the folder's is kept"] if other else []


def _dropped_kind(base: ConvertedModules) -> str:
    """Return the kind of head that the folder's source had, where its keys went with it: by the tensors left out."""
    family = base.inventory.config.family
    names = {Speller(family).official(x.tensor) for x in base.left_out}
    first = family.prefix.head.replace(NUMBER, "0")
    heads = [h for h in family.heads.values() if h.key_prefix]
    return next((h.name for h in heads if all(first + s in names for s in h.signature)), "none")


def _is_of_head(base: ConvertedModules, name: str) -> bool:
    """Return whether a name of the source, as found there, is of a tensor of the head."""
    family = base.inventory.config.family
    return family.is_of_head(Speller(family).official(name))


_HOST_KEYS = {"transformers_version", "torch_dtype", "dtype", "_name_or_path", "architectures", "use_cache"}
"""Keys that programs write on their own; they say nothing of the model."""


_NO_BACKBONE = "family, dims and layers by config; the source has no backbone whose values could be compared"


def _check_values(base: ConvertedModules, wanted: TensorView) -> tuple[str, str]:
    """Return (what was compared of the source's view, what is wrong with it or "")."""
    layers = base.inventory.config.layers
    some = {None, 0, layers // 2, layers - 1}
    chosen = {
        k: t
        for k, t in wanted.tensors.items()
        if t.part == BACKBONE and t.role in COMPARED_ROLES and t.layer in some and not t.store.startswith(("i", "u"))
    }
    if not chosen:
        return _NO_BACKBONE, ""
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


def _only(view: TensorView, keys: Iterable[str]) -> TensorView:
    return dataclasses.replace(view, tensors={k: view.tensors[k] for k in keys})


def _derived(
    base: ConvertedModules, source: Source, inventory: Inventory, request: Request, layout: Layout, model_source: bytes
) -> Derivation:
    base = _with_sources(base, source)
    formats = base.formats
    head_format = request.mtp or formats.get(HEAD, "native")
    roles = {} if request.mtp else {k: v for k, v in formats.items() if k in head_roles()}
    recipe = Recipe("", "", {"backbone": formats.get("backbone", "native"), HEAD: head_format, **roles})
    options = build.Options(recipe.bound(layout.formats), layout, rounding=_rounding(base), hashing=base.hashing)
    encoded = build.encode(inventory, options)
    places = layout.places(inventory.config.family, inventory.head_kind, inventory.stages)
    builder = PlanBuilder()
    builder.backbone(base, layout, request.max_shard_bytes)
    for place in places:
        builder.lay_out(partial(build.step_of, source.named, options), encoded, place, request.max_shard_bytes)
    raw = _with_stages(base, inventory)
    config = dataclasses.replace(inventory.config, raw=raw)
    facts = HeadFacts(
        inventory.head_kind,
        dataclasses.replace(inventory, config=config),
        {HEAD: head_format},
        _sources(base, source),
        _ignored(source),
        source.origin,
        config_sha256(source.checkpoint),
    )
    kept = [requantize.encoded(shaped(m, layout), layout) for m in base.of(BACKBONE)]
    result = derivation.result_plan_of(base, builder, layout, model_source, places, kept + encoded, facts)
    return derivation.derive(base, builder, result, source.checkpoint)


def _with_sources(base: ConvertedModules, source: Source) -> ConvertedModules:
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
        names = tuple(n for kind in kinds for n in build.operand(module, kind, source.named)[1])
        dtype = tensors[module.weight_name()].dtype
        parts = tuple(dataclasses.replace(p, sources=names, source_dtype=dtype) for p in stored_module.parts)
        return dataclasses.replace(stored_module, parts=parts)

    return dataclasses.replace(base, modules=tuple(known(m) for m in base.modules))


def _rounding(base: ConvertedModules) -> str:
    """Return how the folder's tensors were rounded: as recorded, else the best way."""
    found = {p.part.params.get("rounding") for m in base.modules for p in m.parts} - {None}
    return str(found.pop()) if len(found) == 1 else "optimal"


def _with_stages(base: ConvertedModules, inventory: Inventory) -> JSON:
    """Return the folder's config with what the source's says of the head: stages, their ratios, the head's own keys."""
    family, theirs = inventory.config.family, inventory.config.flat
    stages, ratios = family.config_keys["stages"], family.config_keys.get("ratios", "")
    head = family.heads[inventory.head_kind]
    wanted = {stages: theirs.get(stages, inventory.stages)} | {k: theirs[k] for k in (ratios,) if k}
    own = [*head.own_keys(), *(k for k in theirs if head.owns(k))]
    merged = base.inventory.config.flat | wanted | {k: theirs[k] for k in own if k in theirs}
    ordered = {k: merged[k] for k in theirs if k in merged} | merged  # as the source has them, as if converted
    return family.unflat(ordered)


def _sources(base: ConvertedModules, source: Source) -> tuple[SourceFile, ...]:
    """Return the source files of the result: the folder's, and those of the head that are not among them."""
    known = base.sources()
    return (*known, *(f for f in provenance.originals(source.checkpoint) if f not in known))


def _ignored(source: Source) -> tuple[LeftOut, ...]:
    """Return the tensors under the head that are copies of shared ones, with the reason for which they stay out."""
    family = source.inventory.config.family
    named: Mapping[str, str | None] = {t.name: ignored_reason(family, n) for n, t in source.named.tensors.items()}
    return tuple(LeftOut(name, why) for name, why in named.items() if why)


def work(made: Derivation, in_place: bool) -> int:
    """Return about how many bytes a run writes and checks, for a progress bar."""
    return sum(f.size for f in (made.write_plan if in_place else made.result_plan).files)


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
    ending = derivation.completion(made, out, (made.base.path, graft.source.checkpoint.path), progress)
    way = convert.Way(jobs, overwrite, progress, disk or Disk())
    return convert.run(graft.source.reading(made.bytes), made.write_plan, out, way, ending)
