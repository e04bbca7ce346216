"""A converted folder as the source of another conversion: its values, lossy or not, in other formats.

What the folder lost against its own source stays lost; the manifest of the result records the whole chain, with the
errors of each link where they are known. Errors of this run are against the folder's values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ds4convert.checkpoint import provenance
from ds4convert.checkpoint.inventory import BACKBONE, HEAD, Module, key_of
from ds4convert.checkpoint.names import Named
from ds4convert.checkpoint.source import Source
from ds4convert.checkpoint.types import LeftOut
from ds4convert.converted import modules
from ds4convert.converted.modules import ConvertedModules, StoredModule
from ds4convert.errors import InputError
from ds4convert.execution.completion import Completion
from ds4convert.planning import build, config_files
from ds4convert.planning.config_files import model_file
from ds4convert.planning.encodings import ENCODERS, MX_GROUP, Encoding, Part, Spec, codec_of
from ds4convert.planning.layouts import Layout
from ds4convert.planning.recipes import Recipe
from ds4convert.planning.types import Link, Output, Plan, Step
from ds4convert.storage.records import ByteRange

SAME_BYTES = {"mxfp4": ("fp4", (1, MX_GROUP)), "mxfp8": ("fp8", (1, MX_GROUP))}
"""Formats of MLX that lie as one of the official checkpoint's does: its store, and the tile of one scale."""


@dataclass(frozen=True)
class Again:
    """A plan whose source is a converted folder, and what `convert.run` needs to carry it out."""

    plan: Plan
    base: ConvertedModules

    @property
    def source(self) -> Source:
        """Return the folder as `convert.run` takes it."""
        return Source(self.base.folder.checkpoint, self.base.inventory, Named({}, ())).reading(self.base.bytes)

    def completion(self) -> Completion:
        """Return how a run ends: the folder's small files may not have changed on the way."""
        base = self.base
        apart = tuple(dict.fromkeys((base.path, *(folder for folder, _ in base.bytes.places.values()))))
        return Completion(self.plan, partial(modules.checked_small, base), apart)


def opened(path: Path) -> ConvertedModules:
    """Return the converted folder at `path`. Raises `InputError` where it is none, or is not whole."""
    return modules.read(path)


def plan(base: ConvertedModules, options: build.Options) -> Again:
    """Return the plan for converting a converted folder again.

    Raises `InputError` where it has a part that the wished format cannot hold.
    """
    inventory = base.inventory
    has_head = base.has_head and options.keep_mtp
    layout = options.layout.wanted_of(inventory.config.family, inventory.config.has_tower)
    options = replace(options, layout=layout, recipe=options.recipe.of(inventory).bound(layout.formats))
    chosen = [modules.packed(m) for m in base.modules if m.module.part == BACKBONE or has_head]
    encoded = [(m.module, *_encode(m, options)) for m in chosen]
    places = layout.places(inventory.config.family, inventory.head_kind, inventory.stages) if has_head else ()
    make = partial(_step, {key_of(m.module): m for m in chosen}, options)
    files, steps = build.draw(encoded, (layout.backbone, *places), make, options.max_shard_bytes)
    texts, table = config_files.texts(inventory, layout, places, encoded, files, steps, has_head)
    copies, added, left = modules.small_files(base)
    made = Plan(
        id="",
        family=inventory.config.family.name,
        head_kind=inventory.head_kind if has_head else "none",
        layout=layout.name,
        recipe=options.recipe.name,
        formats=options.recipe.as_formats(),
        hashing=options.hashing,
        sources=base.files,
        files=tuple(files),
        steps=tuple(steps),
        texts=texts | added | model_file(layout, options.model_source),
        copies=copies,
        left_out=tuple(_dropped(base)) if base.has_head and not has_head else (),
        files_left_out=left,
        quantization=table,
        chain=chain(base),
        origin=provenance.of(base.folder.checkpoint),
        config_sha256=base.config_sha256,
    )
    return Again(build.signed(made), base)


def chain(base: ConvertedModules) -> tuple[Link, ...]:
    """Return what is known of how the folder came about, the first conversion first."""
    record = base.record
    if record is None:
        return (Link(modules.UNKNOWN, base.formats),)
    errors = {t.name: t.error for t in record.tensors if t.error is not None}
    link = Link(record.recipe, record.formats, record.tool, record.layout, record.digest, record.source, errors)
    return (*record.chain, link)


def _dropped(base: ConvertedModules) -> Iterator[LeftOut]:
    for module in base.of(HEAD):
        for part in module.parts:
            for name in part.names:
                yield LeftOut(name, "the head was dropped at the user's wish (--drop-mtp)")


def _outputs(found: StoredModule) -> list[tuple[Spec, str, ByteRange]]:
    """Return (what it is, its name, where it lies) of every tensor of a module."""
    return [x for p in found.parts for x in zip(p.part.outputs, p.names, p.at, strict=True)]


def _encode(found: StoredModule, options: build.Options) -> tuple[str, Encoding]:
    """Return (format, what a module becomes); where that is what it is, its tensors are copied."""
    name = options.recipe.format_of(found.module)
    was = found.encoding
    codec = codec_of(was.label) if was.table is not None else None
    dense = "native" if codec else was.label
    if name in ("native", was.label, dense) or (name == "bf16" and codec is None) or not found.module.may_quantize:
        parts = tuple(Part((spec,), "copy", (spec.suffix,), {}) for spec, _, _ in _outputs(found))
        return was.label, Encoding(parts, was.table, was.label)
    made = ENCODERS[name](_as_source(found))
    if codec is None or codec.name in SAME_BYTES:
        return name, made
    if name == "bf16":
        return name, decoded(found)
    part = made.parts[0]
    params = {**_geometry(found), **part.params, "from": codec.name}
    operands = tuple(spec.suffix for spec, _, _ in _outputs(found))
    return name, Encoding((Part(part.outputs, "quantize_codec", operands, params),), made.table, made.label)


def encoded(m: StoredModule, layout: Layout) -> tuple[Module, str, Encoding]:
    """Return a stored module as a layout takes it: decoded where its hosts read no packed one.

    Raises `InputError` where it was rounded: nothing would tell any more what that cost.
    """
    wanted = Recipe("", "", {"backbone": "", HEAD: ""}).bound(layout.formats).format_of(m.module)
    if wanted != "bf16" or m.encoding.table is None:
        return m.module, "", m.encoding
    if m.encoding.label not in SAME_BYTES or any(p.done.loss for p in m.parts):
        raise InputError(
            f"{m.parts[0].names[0]}: layout {layout.name} has it dense, and here it is rounded to {m.encoding.label}; "
            f"convert the folder again instead: ds4convert quantize MLX_DIR OUT --from-mlx --layout {layout.name}"
        )
    return m.module, wanted, decoded(m)


def decoded(found: StoredModule) -> Encoding:
    """Return a packed module decoded to BF16."""
    codec, shape = codec_of(found.encoding.label), found.module.shape
    assert codec is not None
    whole = (found.module.experts, *shape) if found.module.experts else shape
    operands = tuple(spec.suffix for spec, _, _ in _outputs(found))
    params = {**_geometry(found), "from": codec.name}
    part = Part((Spec("weight", "BF16", whole),), "codec_to_bf16", operands, params)
    return Encoding((part,), None, "bf16")


def _geometry(found: StoredModule) -> dict[str, int | str]:
    rows, cols = found.module.shape
    return {"rows": rows, "cols": cols, "tile_rows": 1, "tile_cols": cols}


def _as_source(found: StoredModule) -> Module:
    """Return the module as an official checkpoint would store these bytes."""
    store, tile = SAME_BYTES.get(found.encoding.label, ("BF16", found.module.tile))
    return replace(found.module, store=store, tile=tile, fused=None)


OPERANDS = {"scale": "scales"}
"""Operands of an official checkpoint that MLX calls otherwise."""


def _step(by_key: dict[str, StoredModule], options: build.Options, item: build.Item, outputs: Sequence[Output]) -> Step:
    """Return the step that makes `outputs` of a stored module's tensors."""
    module, part = item.module, item.part
    stored_as = {spec.suffix: (spec, name, at) for spec, name, at in _outputs(by_key[key_of(module)])}
    found = [stored_as[OPERANDS.get(o, o)] for o in part.operands]
    params = dict(part.params) | build.rounding_params(module, part, options)
    if module.experts:  # one tensor holds all experts
        params |= {"fused_first_row": 0, "fused_first_scale_row": 0}
    return Step(
        outputs=tuple(outputs),
        transform=part.transform,
        operands=tuple((at,) for _, _, at in found),
        params=params,
        sources=tuple((name,) for _, name, _ in found),
        source_shapes=tuple(spec.shape[-2:] if module.experts else spec.shape for spec, _, _ in found),
        source_dtype=found[0][0].dtype,
        format=item.label,
        part=module.part,
        role=module.role,
        layer=module.block,
        weights=module.weights if part.outputs[0].suffix in ("", "weight") else 0,
    )
