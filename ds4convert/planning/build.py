"""Headers, names, recipe and layout joined into a `Plan`: every byte that will be written, before any is.

Owns the proof that nothing is lost: each source tensor is either the source of a step or in `left_out` with a reason,
and the expected inventory, the headers and the steps agree by name, shape and dtype. Pure, but for the small files of
the source (tokenizer and the like), whose bytes are handed in.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from ds4convert.checkpoint import headers
from ds4convert.checkpoint.folder import Checkpoint
from ds4convert.checkpoint.inventory import (
    BACKBONE,
    HEAD,
    Inventory,
    Module,
    compare,
    fused_name,
    key_of,
)
from ds4convert.checkpoint.names import Named, ignored_reason
from ds4convert.checkpoint.published import findings as advised
from ds4convert.checkpoint.source import Source
from ds4convert.checkpoint.types import JSON, LeftOut, TensorInfo
from ds4convert.errors import InventoryError, UsageError
from ds4convert.planning.config_files import model_file, texts
from ds4convert.planning.encodings import ENCODERS, Encoding, Part, Spec, as_official, as_packed
from ds4convert.planning.layouts import HeadPlace, Layout, Spelling
from ds4convert.planning.recipes import Recipe
from ds4convert.planning.shards import Draft, file_names, place, split
from ds4convert.planning.side_files import SideFiles, survey
from ds4convert.planning.types import Output, OutputFile, Plan, Step
from ds4convert.storage import strict_json
from ds4convert.storage.records import ByteRange, SourceFile

DEFAULT_SHARD_BYTES = 5_000_000_000


class Weighing(Protocol):
    """What a plan has to know of a calibration: which it is, and which modules (by MLX path) it has columns of."""

    @property
    def digest(self) -> str:
        """Return the sha256 of its file."""

    def __contains__(self, key: str) -> bool: ...


@dataclass(frozen=True)
class Text:
    """What a plan knows of the text that compensated rounding goes by: the sha256 of its token ids, and how many."""

    digest: str
    tokens: int


@dataclass(frozen=True)
class Options:
    """What the user chose: recipe (flags applied), layout, head kept or dropped, shard size, hashing.

    `rounding` is optimal, nearest or compensated, which needs `text`; `calibration` the importance of input columns, by
    which errors are weighed. `model_source` is the text of the model file, for a layout that has one: conversion does
    not know the model, so the edge hands it in (`inference.single_file`).
    """

    recipe: Recipe
    layout: Layout
    keep_mtp: bool = True
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    hashing: bool = True
    model_source: bytes = b""
    rounding: str = "optimal"
    calibration: Weighing | None = None
    text: Text | None = None


@dataclass(frozen=True)
class Item:
    """A part of a module, named: what becomes one step with one or more output tensors."""

    module: Module
    part: Part
    label: str
    drafts: tuple[Draft, ...]


def build(
    inventory: Inventory, named: Named, sources: tuple[SourceFile, ...], options: Options, side: SideFiles
) -> Plan:
    """Return the plan. Raises `InventoryError` with all differences between config and headers.

    `named` holds the found tensors by official name. The result depends on nothing but the arguments.
    """
    names, family = tuple(s.name for s in sources), inventory.config.family
    findings = compare(inventory, named, names)
    if not options.keep_mtp:
        found = {info.name: name for name, info in named.tensors.items()} if findings else {}
        findings = [f for f in findings if not family.is_of_head(found.get(f.tensor, f.tensor))]
    if findings:
        what_to_do = advised.advice(findings, inventory.config, named.tensors, names)
        raise advised.findings_error(findings, what_to_do)
    has_head = inventory.head_kind != "none" and options.keep_mtp
    kind = inventory.head_kind if has_head else "none"
    layout = options.layout.wanted_of(family, inventory.config.has_tower, kind)
    places = layout.places(family, kind, inventory.stages) if has_head else ()
    options = replace(options, layout=layout, recipe=options.recipe.of(inventory).bound(layout.formats))
    encoded = encode(inventory, options)
    if not options.keep_mtp:
        encoded = [(m, f, e) for m, f, e in encoded if m.part == BACKBONE]
    make = partial(step_of, named, options)
    files, steps = draw(encoded, (layout.backbone, *places), make, options.max_shard_bytes)
    made, table = texts(inventory, layout, places, encoded, files, steps, has_head)
    unsigned = Plan(
        id="",
        family=family.name,
        head_kind=kind,
        layout=layout.name,
        recipe=options.recipe.name,
        formats=options.recipe.as_formats(),
        hashing=options.hashing,
        sources=sources,
        files=tuple(files),
        steps=tuple(steps),
        texts=made | dict(side.added) | model_file(layout, options.model_source),
        copies=side.copies,
        left_out=_left_out(inventory, named, steps, options.keep_mtp),
        files_left_out=side.left_out,
        quantization=table,
    )
    return signed(unsigned)


def signed(plan: Plan) -> Plan:
    """Return the plan with its id."""
    return replace(plan, id=strict_json.digest(as_json(plan) | {"steps": list(_identities(plan.steps))}))


def encode(inventory: Inventory, options: Options) -> list[tuple[Module, str, Encoding]]:
    """Return (module, format, what it becomes) for every module, as the recipe says."""
    out = []
    for module in inventory.modules:
        name = options.recipe.format_of(module)
        out.append((module, name, shaped(module, ENCODERS[name](module), options.layout)))
    return out


def shaped(module: Module, encoding: Encoding, layout: Layout) -> Encoding:
    """Return what a module becomes in a layout whose hosts may read it under other names and dtypes."""
    return as_official(module, encoding) if module.role in layout.official else as_packed(module, encoding)


def items(encoded: Sequence[tuple[Module, str, Encoding]], at: Spelling | HeadPlace) -> list[list[Item]]:
    """Return the output tensors of each module, named for the backbone or for one place of the head."""
    out = []
    for module, _, encoding in encoded:
        path = at.name(module)
        out.append([Item(module, p, encoding.label, tuple(_draft(path, s) for s in p.outputs)) for p in encoding.parts])
    return out


def _draft(path: str, spec: Spec) -> Draft:
    name = f"{path}.{spec.suffix}" if spec.suffix else path
    return Draft(name, spec.dtype, spec.shape, math.prod(spec.shape) * headers.DTYPE_BYTES[spec.dtype])


def draw(
    encoded: Sequence[tuple[Module, str, Encoding]], places: Sequence[Spelling | HeadPlace], make: Make, limit: int
) -> tuple[list[OutputFile], list[Step]]:
    """Return all files and steps: those of the backbone, then those of the head at each of its places."""
    files: list[OutputFile] = []
    steps: list[Step] = []
    for at in places:
        part = BACKBONE if isinstance(at, Spelling) else HEAD
        lay_out(files, steps, make, shards_of(items([x for x in encoded if x[0].part == part], at), limit, at))
    return files, steps


def shards_of(groups: list[list[Item]], limit: int, at: Spelling | HeadPlace) -> list[tuple[str, list[Item]]]:
    """Divide groups of tensors that stay together into files of at most `limit` bytes: of the backbone, or of the head
    for one place.
    """
    shards = split([sum(d.size for i in g for d in i.drafts) for g in groups], limit)
    names = file_names(at.file, len(shards), isinstance(at, Spelling))
    inside = f"{at.folder}/" if at.folder else ""
    return [(inside + name, [i for g in shard for i in groups[g]]) for name, shard in zip(names, shards, strict=True)]


Make = Callable[["Item", tuple[Output, ...]], Step]
"""Makes the step of an item, given its outputs with their places."""


def lay_out(files: list[OutputFile], steps: list[Step], make: Make, shards: Sequence[tuple[str, list[Item]]]) -> None:
    """Append the files of `shards`, and their steps in the order of the bytes of each file."""
    for name, items in shards:
        drafts = [d for i in items for d in i.drafts]
        placed = place(drafts)
        number = len(files)
        files.append(OutputFile(name, placed.size, placed.header))
        at = dict(placed.offsets)
        outputs = iter([Output(d.name, d.dtype, d.shape, number, at[n], d.size) for n, d in enumerate(drafts)])
        made = [make(item, tuple(next(outputs) for _ in item.drafts)) for item in items]
        steps += sorted(made, key=lambda s: s.outputs[0].offset)


def step_of(named: Named, options: Options, item: Item, outputs: tuple[Output, ...]) -> Step:
    """Return the step that makes `outputs` of an item from the source's tensors."""
    module, part = item.module, item.part
    picked = [operand(module, kind, named) for kind in part.operands]
    params = dict(part.params) | rounding_params(module, part, options)
    if module.fused is not None:
        first = module.fused.parts.index(module.name.rpartition(".")[2])
        params["fused_first_row"] = first * module.shape[0]
        params["fused_first_scale_row"] = first * (module.scale_shape()[0] if module.has_scale else 0)
    main = named.tensors[picked[0][1][0]]
    return Step(
        outputs=outputs,
        transform=part.transform,
        operands=tuple(ranges for ranges, _, _ in picked),
        params=params,
        sources=tuple(tuple(named.tensors[n].name for n in names) for _, names, _ in picked),
        source_shapes=tuple(shape for _, _, shape in picked),
        source_dtype=main.dtype,
        format=item.label,
        part=module.part,
        role=module.role,
        layer=module.block,
        weights=0 if part.outputs[0].suffix == "scales" else module.weights,
    )


def rounding_params(module: Module, part: Part, options: Options) -> dict[str, int | str]:
    """Return how a part that rounds is to do it; {} for one that does not."""
    if "codec" not in part.params:
        return {}
    if options.text is not None:
        if module.role == "embedding":  # its rows are looked up: nothing goes into it
            return {"rounding": "optimal"}
        text = options.text
        told = {"rounding": options.rounding, "importance": key_of(module), "text": text.digest}
        return told | {"tokens": text.tokens}
    params: dict[str, int | str] = {"rounding": options.rounding}
    if options.calibration is not None and key_of(module) in options.calibration:
        params |= {"importance": key_of(module), "calibration": options.calibration.digest}
    return params


def operand(module: Module, kind: str, named: Named) -> tuple[tuple[ByteRange, ...], tuple[str, ...], tuple[int, ...]]:
    """Return (byte ranges, official names, shape of one slice) of a module's weights or scales."""
    is_weight = kind == "weight"
    shape = module.weight_spec()[0] if is_weight else module.scale_shape()
    if module.fused is not None:
        name = fused_name(module) + ("" if is_weight else module.fused_scale)
        return merge(_fused_ranges(module, named.tensors[name])), (name,), shape
    namer = module.weight_name if is_weight else module.scale_name
    names = tuple(namer(e) for e in range(module.experts or 1))
    infos = [named.tensors[n] for n in names]
    return merge([ByteRange(t.file, t.start, t.size) for t in infos]), names, shape


def _fused_ranges(module: Module, info: TensorInfo) -> list[ByteRange]:
    """Return the ranges of one part (w1, w3, ...) of every expert in a fused tensor `[E, parts * rows, ...]`."""
    assert module.fused is not None
    parts = len(module.fused.parts)
    first = module.fused.parts.index(module.name.rpartition(".")[2])
    each = info.size // (module.experts * parts)
    starts = (info.start + (e * parts + first) * each for e in range(module.experts))
    return [ByteRange(info.file, start, each) for start in starts]


def merge(ranges: Sequence[ByteRange]) -> tuple[ByteRange, ...]:
    """Return `ranges` with neighbours that touch joined into one."""
    out: list[ByteRange] = []
    for r in ranges:
        if out and out[-1].file == r.file and out[-1].offset + out[-1].size == r.offset:
            out[-1] = ByteRange(r.file, out[-1].offset, out[-1].size + r.size)
        else:
            out.append(r)
    return tuple(out)


def _left_out(inventory: Inventory, named: Named, steps: Sequence[Step], keep_mtp: bool) -> tuple[LeftOut, ...]:
    """Return every source tensor that no step reads, with its reason; one without a reason is a bug and stops."""
    used = {name for step in steps for names in step.sources for name in names}
    out = []
    for name, info in named.tensors.items():
        if info.name in used:
            continue
        why = ignored_reason(inventory.config.family, name)
        if why is None and inventory.config.family.is_of_head(name) and not keep_mtp:
            why = "the head was dropped at the user's wish (--drop-mtp)"
        if why is None:
            raise InventoryError(f"{info.name}: no step of the plan reads it; this is a bug of ds4convert")
        out.append(LeftOut(info.name, why))
    return tuple(sorted(out, key=lambda x: x.tensor))


def as_json(plan: Plan) -> JSON:
    """Return the whole plan as JSON values; equal plans give equal JSON. The id is not part of it."""
    return {
        "family": plan.family,
        "head_kind": plan.head_kind,
        "layout": plan.layout,
        "recipe": plan.recipe,
        "formats": dict(plan.formats),
        "hashing": plan.hashing,
        "sources": [[s.name, s.size, s.header_sha256] for s in plan.sources],
        "files": [[f.name, f.size, hashlib.sha256(f.header).hexdigest()] for f in plan.files],
        "steps": list(_steps_json(plan.steps)),
        "texts": {k: hashlib.sha256(v).hexdigest() for k, v in plan.texts.items()},
        "copies": dict(plan.copies),
        "left_out": [[x.tensor, x.why] for x in plan.left_out],
        "files_left_out": [[x.tensor, x.why] for x in plan.files_left_out],
    } | ({"chain": [x.as_json() for x in plan.chain]} if plan.chain else {})


def _steps_json(steps: Sequence[Step]) -> Iterator[list[Any]]:
    for s in steps:
        outputs = [[o.name, o.dtype, list(o.shape), o.file, o.offset, o.size] for o in s.outputs]
        ranges = [[(r.file, r.offset, r.size) for r in operand] for operand in s.operands]
        yield [outputs, s.transform, dict(s.params), ranges, s.sources, s.format, s.part, s.role, s.layer]


def _identities(steps: Sequence[Step]) -> Iterator[list[Any]]:
    """Yield what tells steps apart beside their byte ranges, which the source's headers imply: all that a manifest has.

    So the id of a conversion can be told from its result, and a result that was reached on another way has it too.
    """
    for s in steps:
        outputs = [[o.name, o.dtype, list(o.shape), o.file, o.offset, o.size] for o in s.outputs]
        names = [n for operand in s.sources for n in operand]
        yield [outputs, s.transform, dict(s.params), names, s.source_dtype, s.format, s.part, s.role, s.layer]


def output_bytes(plan: Plan) -> int:
    """Return the number of bytes of all files that the plan writes, but for those copied from the source."""
    return sum(f.size for f in plan.files) + sum(len(t) for t in plan.texts.values())


def check_limit(value: int) -> int:
    """Return `value` as a shard size. Raises `UsageError` below 1 MB, which would make thousands of files."""
    if value < 1_000_000:
        raise UsageError(f"a shard size of {value} bytes is too small; expected at least 1MB")
    return value


def make_plan(source: Source, options: Options) -> Plan:
    """Return the plan for converting `source`. Raises `InputError` with every difference found."""
    side = survey(source.checkpoint.path, source.inventory.config.family.name)
    side = replace(side, left_out=(*side.left_out, *source.checkpoint.left_out))
    made = build(source.inventory, source.named, source.checkpoint.files, options, side)
    return replace(made, origin=source.origin, config_sha256=config_sha256(source.checkpoint))


def config_sha256(checkpoint: Checkpoint) -> str:
    """Return the sha256 of a checkpoint's config.json, "" where it has none."""
    return hashlib.sha256(checkpoint.config).hexdigest() if checkpoint.config else ""
