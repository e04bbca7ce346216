"""Headers, names, recipe and layout joined into a `Plan`: every byte that will be written, before any is.

Owns the proof that nothing is lost: each source tensor is either the source of a step or in `left_out` with a reason,
and the expected inventory, the headers and the steps agree by name, shape and dtype. Pure, but for the small files of
the source (tokenizer and the like), whose bytes are handed in.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

from ds4convert import headers, strictjson
from ds4convert.errors import ConfigError, InventoryError, UsageError
from ds4convert.formats import ENCODERS, Encoding, Part, Spec
from ds4convert.inventory import (
    BACKBONE,
    HEAD,
    Inventory,
    Module,
    Named,
    compare,
    fused_name,
    ignored_reason,
)
from ds4convert.layouts import HeadPlace, Layout, backbone_name, key_of
from ds4convert.recipes import Recipe
from ds4convert.shards import Draft, file_names, place, split
from ds4convert.types import (
    JSON,
    ByteRange,
    Finding,
    LeftOut,
    Output,
    OutputFile,
    Plan,
    SourceFile,
    Step,
    TensorInfo,
)

INDEX_NAME = "model.safetensors.index.json"
DEFAULT_SHARD_BYTES = 5_000_000_000
SHOWN_FINDINGS = 10


class Weighing(Protocol):
    """What a plan has to know of a calibration: which it is, and which modules (by MLX path) it has columns of."""

    @property
    def digest(self) -> str:
        """Return the sha256 of its file."""

    def __contains__(self, key: str) -> bool: ...


@dataclass(frozen=True)
class Options:
    """What the user chose: recipe (flags applied), layout, head kept or dropped, shard size, hashing.

    `rounding` is optimal or nearest; `calibration` the importance of input columns, by which errors are weighed.
    `model_source` is the text of the model file, for a layout that has one: conversion does not know the model, so
    the edge hands it in (`inference.single_file`).
    """

    recipe: Recipe
    layout: Layout
    keep_mtp: bool = True
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    hashing: bool = True
    model_source: bytes = b""
    rounding: str = "optimal"
    calibration: Weighing | None = None


@dataclass(frozen=True)
class SideFiles:
    """Small files of the source: `copies` (name to sha256) are taken over, `left_out` are not, with the reason.

    `added` (name to bytes) are written because hosts read them and the source has none.
    """

    copies: Mapping[str, str]
    left_out: tuple[LeftOut, ...]
    added: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Item:
    """A part of a module, named: what becomes one step with one or more output tensors."""

    module: Module
    part: Part
    label: str
    drafts: tuple[Draft, ...]


def findings_error(findings: Sequence[Finding], hint: str) -> InventoryError:
    """Return one error for all `findings`: the first ten in full, then the count, then what to do."""
    shown = [strictjson.show(str(f), 300) for f in findings[:SHOWN_FINDINGS]]
    rest = len(findings) - len(shown)
    more = [f"and {rest} more"] if rest > 0 else []
    return InventoryError("\n".join([*shown, *more, hint]))


def build(
    inventory: Inventory, named: Named, sources: tuple[SourceFile, ...], options: Options, side: SideFiles
) -> Plan:
    """Return the plan. Raises `InventoryError` with all differences between config and headers.

    `named` holds the found tensors by official name. The result depends on nothing but the arguments.
    """
    names = tuple(s.name for s in sources)
    findings = compare(inventory, named, names)
    if not options.keep_mtp:
        findings = [f for f in findings if not (f.kind == "missing" and f.tensor.startswith("mtp."))]
    if findings:
        raise findings_error(findings, _hint(findings))
    has_head = inventory.head_kind != "none" and options.keep_mtp
    places = options.layout.places(inventory.head_kind, inventory.stages) if has_head else ()
    encoded = encode(inventory, options)
    if not options.keep_mtp:
        encoded = [(m, f, e) for m, f, e in encoded if m.part == BACKBONE]
    files, steps = draw(encoded, places, partial(step_of, named, options), options.max_shard_bytes)
    made, table = texts(inventory, options.layout, places, encoded, files, steps, has_head)
    unsigned = Plan(
        id="",
        family=inventory.config.family.name,
        head_kind=inventory.head_kind if has_head else "none",
        layout=options.layout.name,
        recipe=options.recipe.name,
        formats=options.recipe.as_formats(),
        hashing=options.hashing,
        sources=sources,
        files=tuple(files),
        steps=tuple(steps),
        texts=made | dict(side.added) | model_file(options.layout, options.model_source),
        copies=side.copies,
        left_out=_left_out(inventory, named, steps, options.keep_mtp),
        files_left_out=side.left_out,
        quantization=table,
    )
    return signed(unsigned)


def signed(plan: Plan) -> Plan:
    """Return the plan with its id."""
    return replace(plan, id=strictjson.digest(as_json(plan) | {"steps": list(_identities(plan.steps))}))


def model_file(layout: Layout, source: bytes) -> dict[str, bytes]:
    """Return the model file that the layout's config names, by name; {} for a layout without one."""
    name = layout.model_file
    if not name:
        return {}
    if not source:
        raise ValueError(f"layout {layout.name}: expected Options.model_source, the text of its {name}")
    return {name: source}


def _hint(findings: Sequence[Finding]) -> str:
    if all(f.kind == "missing" and f.tensor.startswith("mtp.") for f in findings):
        return (
            "config.json promises a head (num_nextn_predict_layers), but its tensors are not all here; "
            "download the shard that holds mtp.*, or convert without it: --drop-mtp"
        )
    return "config.json and the tensors contradict each other; pull the repo again, at one revision"


def encode(inventory: Inventory, options: Options) -> list[tuple[Module, str, Encoding]]:
    """Return (module, format, what it becomes) for every module, as the recipe says."""
    options.recipe.check(inventory)
    out = []
    for module in inventory.modules:
        name = options.recipe.format_of(module)
        out.append((module, name, ENCODERS[name](module)))
    return out


def items(encoded: Sequence[tuple[Module, str, Encoding]], at: HeadPlace | None) -> list[list[Item]]:
    """Return the output tensors of each module, named for the backbone or for one place of the head."""
    out = []
    for module, _, encoding in encoded:
        path = backbone_name(module) if at is None else at.name(module)
        out.append([Item(module, p, encoding.label, tuple(_draft(path, s) for s in p.outputs)) for p in encoding.parts])
    return out


def _draft(path: str, spec: Spec) -> Draft:
    name = f"{path}.{spec.suffix}" if spec.suffix else path
    return Draft(name, spec.dtype, spec.shape, math.prod(spec.shape) * headers.DTYPE_BYTES[spec.dtype])


def draw(
    encoded: Sequence[tuple[Module, str, Encoding]], places: Sequence[HeadPlace], make: Make, limit: int
) -> tuple[list[OutputFile], list[Step]]:
    """Return all files and steps: those of the backbone, then those of the head at each of its places."""
    files: list[OutputFile] = []
    steps: list[Step] = []
    backbone, head = ([x for x in encoded if x[0].part == part] for part in (BACKBONE, HEAD))
    lay_out(files, steps, make, items(backbone, None), limit, "", "model", True)
    for at in places:
        lay_out(files, steps, make, items(head, at), limit, at.folder, at.file, False)
    return files, steps


Make = Callable[["Item", tuple[Output, ...]], Step]
"""Makes the step of an item, given its outputs with their places."""


def lay_out(
    files: list[OutputFile],
    steps: list[Step],
    make: Make,
    groups: list[list[Item]],
    limit: int,
    folder: str,
    stem: str,
    always_number: bool,
) -> None:
    """Append the files that hold `groups`, and their steps in the order of the bytes of each file."""
    shards = split([sum(d.size for i in g for d in i.drafts) for g in groups], limit)
    names = file_names(stem, len(shards), always_number)
    for name, shard in zip(names, shards, strict=True):
        items = [item for at in shard for item in groups[at]]
        drafts = [d for i in items for d in i.drafts]
        placed = place(drafts)
        number = len(files)
        files.append(OutputFile(f"{folder}/{name}" if folder else name, placed.size, placed.header))
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
        if why is None and name.startswith("mtp.") and not keep_mtp:
            why = "the head was dropped at the user's wish (--drop-mtp)"
        if why is None:
            raise InventoryError(f"{info.name}: no step of the plan reads it; this is a bug of ds4convert")
        out.append(LeftOut(info.name, why))
    return tuple(sorted(out, key=lambda x: x.tensor))


def texts(
    inventory: Inventory,
    layout: Layout,
    places: Sequence[HeadPlace],
    encoded: Sequence[tuple[Module, str, Encoding]],
    files: Sequence[OutputFile],
    steps: Sequence[Step],
    has_head: bool,
) -> tuple[dict[str, bytes], JSON]:
    """Return the config and index files of the folder and of drafter folders, and the quantization table.

    The config is that of `inventory`, so its stages have to be those that the head's source states.
    """
    inside = [p for p in places if not p.folder]
    paths = [(backbone_name(m), e) for m, _, e in encoded if m.part == BACKBONE]
    paths += [(n, e) for p in inside for m, _, e in encoded if m.part == HEAD for n in p.table_names(m)]
    table = _table(paths)
    stages_key = inventory.config.family.config_keys["stages"]
    source = {k: v for k, v in inventory.config.raw.items() if k not in SOURCE_ONLY_KEYS}
    promised = source.get(stages_key, inventory.stages) if has_head and layout.promises_head else 0
    config = _quantized(source | {stages_key: promised}, table)
    if layout.model_file:
        config["model_file"] = layout.model_file
    out = {"config.json": strictjson.pretty(config), INDEX_NAME: _index(files, steps, "")}
    for p in places:
        if p.folder:
            inner = [(n, e) for m, _, e in encoded if m.part == HEAD for n in p.table_names(m)]
            filled = {k: _fill(v, inventory, config, stages_key) for k, v in p.config.items()}
            out[f"{p.folder}/config.json"] = strictjson.pretty(_quantized(filled, _table(inner)))
            out[f"{p.folder}/{INDEX_NAME}"] = _index(files, steps, p.folder + "/")
    return out, table


SOURCE_ONLY_KEYS = {"quantization_config", "expert_dtype", "quantization", "model_file", "auto_map"}
"""Keys that describe the source's storage, or name code; the result has its own."""


def _quantized(config: JSON, table: JSON) -> JSON:
    return config | ({"quantization": table, "quantization_config": table} if table else {})


def _table(paths: Sequence[tuple[str, Encoding]]) -> JSON:
    """Return the full per-path quantization table, or {} where nothing is quantized.

    The scalars at its top are what hosts assume for a path that is not listed; every path is listed.
    """
    entries = {path: dict(e.table) for path, e in paths if e.table is not None}
    if not entries:
        return {}
    return {**next(iter(entries.values())), **entries}


def _index(files: Sequence[OutputFile], steps: Sequence[Step], folder: str) -> bytes:
    weight_map, total = {}, 0
    for output in (o for s in steps for o in s.outputs):
        name = files[output.file].name
        if name.startswith(folder) and "/" not in name.removeprefix(folder):
            weight_map[output.name] = name.removeprefix(folder)
            total += output.size
    return strictjson.pretty({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def _fill(value: Any, inventory: Inventory, config: JSON, stages_key: str) -> Any:
    """Return a drafter's config value with its `$name` filled in: facts of the head, or a key of the config."""
    if not isinstance(value, str) or not value.startswith("$"):
        return value
    name, plus = value[1:], 0
    if name.endswith("_plus_one"):
        name, plus = name.removesuffix("_plus_one"), 1
    raw = inventory.config.raw
    if name == "source_config":
        text = {k: v for k, v in raw.items() if k not in SOURCE_ONLY_KEYS}
        return text | {stages_key: raw.get(stages_key, inventory.stages)}
    if name == "stages":
        return inventory.stages + plus
    if name not in raw or (plus and type(raw[name]) is not int):
        raise ConfigError(f"config.json: the drafter folder of this layout needs the key {name}")
    return raw[name] + plus if plus else raw[name]


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
    } | ({"chain": list(plan.chain)} if plan.chain else {})


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
