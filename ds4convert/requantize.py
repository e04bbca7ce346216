"""A converted folder as the source of another conversion: its values, lossy or not, in other formats.

What the folder lost against its own source stays lost; the manifest of the result records the whole chain, with the
errors of each link where they are known. Errors of this run are against the folder's values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ds4convert import execute, manifest, stored
from ds4convert import origin as origins
from ds4convert import plan as plans
from ds4convert.convert import Ending, Source
from ds4convert.files import Disk
from ds4convert.formats import ENCODERS, MX_GROUP, Encoding, Part, Spec
from ds4convert.formats.codecs import CODECS
from ds4convert.inventory import BACKBONE, HEAD, Module, Named
from ds4convert.layouts import key_of
from ds4convert.stored import Stored, StoredModule
from ds4convert.types import JSON, ByteRange, LeftOut, Output, Plan, Step

SAME_BYTES = {"mxfp4": ("fp4", (1, MX_GROUP)), "mxfp8": ("fp8", (1, MX_GROUP))}
"""Formats of MLX that lie as one of the official checkpoint's does: its store, and the tile of one scale."""


@dataclass(frozen=True)
class Again:
    """A plan whose source is a converted folder, and what `convert.run` needs to carry it out."""

    plan: Plan
    base: Stored

    @property
    def source(self) -> Source:
        """Return the folder as `convert.run` takes it."""
        return Source(self.base.folder.checkpoint, self.base.inventory, Named({}, ()))

    def ending(self) -> Ending:
        """Return how a run ends: the folder's small files, then the manifest."""
        made, base = self.plan, self.base

        def write(out: Path, result: execute.Result, disk: Disk) -> None:
            for name in made.copies:
                disk.write_file(out / name, stored.checked_small(base, name))
            for name, text in made.texts.items():
                disk.write_file(out / name, text)
            disk.write_file(out / manifest.MANIFEST_NAME, manifest.build(made, result.steps, result.hashes))

        apart = tuple(dict.fromkeys((base.path, *(folder for folder, _ in base.places))))
        sizes = {f.name: f.size for f in made.files}
        return Ending(made.id, sizes, (*made.texts, *made.copies), apart, write, 0, base.places)


def opened(path: Path) -> Stored:
    """Return the converted folder at `path`. Raises `InputError` where it is none, or is not whole."""
    return stored.read(path)


def plan(base: Stored, options: plans.Options) -> Again:
    """Return the plan for converting a converted folder again.

    Raises `InputError` where it has a part that the wished format cannot hold.
    """
    inventory = base.inventory
    has_head = base.has_head and options.keep_mtp
    options.recipe.check(inventory)
    chosen = [m for m in base.modules if m.module.part == BACKBONE or has_head]
    encoded = [(m.module, *_encode(m, options)) for m in chosen]
    places = options.layout.places(inventory.head_kind, inventory.stages) if has_head else ()
    make = partial(_step, {key_of(m.module): m for m in chosen}, options)
    files, steps = plans.draw(encoded, places, make, options.max_shard_bytes)
    texts, table = plans.texts(inventory, options.layout, places, encoded, files, steps, has_head)
    copies, added, left = stored.small_files(base)
    made = Plan(
        id="",
        family=inventory.config.family.name,
        head_kind=inventory.head_kind if has_head else "none",
        layout=options.layout.name,
        recipe=options.recipe.name,
        formats=options.recipe.as_formats(),
        hashing=options.hashing,
        sources=base.files,
        files=tuple(files),
        steps=tuple(steps),
        texts=texts | added | plans.model_file(options.layout, options.model_source),
        copies=copies,
        left_out=tuple(_dropped(base)) if base.has_head and not has_head else (),
        files_left_out=left,
        quantization=table,
        chain=chain(base),
        origin=origins.of(base.folder.checkpoint),
    )
    return Again(plans.signed(made), base)


def chain(base: Stored) -> tuple[JSON, ...]:
    """Return what is known of how the folder came about, the first conversion first."""
    record = base.record
    if record is None:
        return ({"tool": None, "recipe": stored.UNKNOWN, "formats": base.formats, "errors": None},)
    errors = {r["name"]: r["error"] for r in record["tensors"] if "error" in r}
    before = record.get("source", {})
    kept = ("tool", "recipe", "formats", "layout", manifest.DIGEST)
    source = {k: before[k] for k in ("repo", "revision", "files") if k in before}
    link = {k: record.get(k) for k in kept} | {"source": source, "errors": errors}
    return (*before.get("chain", ()), link)


def _dropped(base: Stored) -> Iterator[LeftOut]:
    for module in base.of(HEAD):
        for part in module.parts:
            for name in part.names:
                yield LeftOut(name, "the head was dropped at the user's wish (--drop-mtp)")


def _outputs(found: StoredModule) -> list[tuple[Spec, str, ByteRange]]:
    """Return (what it is, its name, where it lies) of every tensor of a module."""
    return [x for p in found.parts for x in zip(p.part.outputs, p.names, p.at, strict=True)]


def _encode(found: StoredModule, options: plans.Options) -> tuple[str, Encoding]:
    """Return (format, what a module becomes); where that is what it is, its tensors are copied."""
    name = options.recipe.format_of(found.module)
    was = found.encoding
    codec = CODECS.get(was.label) if was.table is not None else None
    dense = "native" if codec else was.label
    if name in ("native", was.label, dense) or (name == "bf16" and codec is None) or not found.module.may_quantize:
        parts = tuple(Part((spec,), "copy", (spec.suffix,), {}) for spec, _, _ in _outputs(found))
        return was.label, Encoding(parts, was.table, was.label)
    made = ENCODERS[name](_as_source(found))
    if codec is None or codec.name in SAME_BYTES:
        return name, made
    part = made.parts[0]
    transform = "codec_to_bf16" if name == "bf16" else "quantize_codec"
    outputs = (replace(part.outputs[0], dtype="BF16"),) if name == "bf16" else part.outputs
    rows, cols = found.module.shape
    params = {"rows": rows, "cols": cols, "tile_rows": 1, "tile_cols": cols, **part.params, "from": codec.name}
    label = "bf16" if name == "bf16" else made.label
    operands = tuple(spec.suffix for spec, _, _ in _outputs(found))
    return name, Encoding((Part(outputs, transform, operands, params),), made.table, label)


def _as_source(found: StoredModule) -> Module:
    """Return the module as an official checkpoint would store these bytes."""
    store, tile = SAME_BYTES.get(found.encoding.label, ("BF16", found.module.tile))
    return replace(found.module, store=store, tile=tile, fused=None)


OPERANDS = {"scale": "scales"}
"""Operands of an official checkpoint that MLX calls otherwise."""


def _step(by_key: dict[str, StoredModule], options: plans.Options, item: plans.Item, outputs: Sequence[Output]) -> Step:
    """Return the step that makes `outputs` of a stored module's tensors."""
    module, part = item.module, item.part
    stored_as = {spec.suffix: (spec, name, at) for spec, name, at in _outputs(by_key[key_of(module)])}
    found = [stored_as[OPERANDS.get(o, o)] for o in part.operands]
    params = dict(part.params) | plans.rounding_params(module, part, options)
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
