"""The files and steps of a derived folder, laid out one after the other: taken over as they lie, or placed anew.

Owns the question whether a folder's own files are those that a layout writes. Reads headers; writes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field

from ds4convert.checkpoint.headers import DTYPE_BYTES
from ds4convert.checkpoint.inventory import BACKBONE, HEAD, Module, key_of
from ds4convert.converted.modules import ConvertedModules, StoredModule, StoredPart, shaped
from ds4convert.derive import requantize
from ds4convert.execution.sources import begin_of
from ds4convert.planning import build, shards
from ds4convert.planning.encodings import Encoding
from ds4convert.planning.layouts import HeadPlace, Layout, Spelling
from ds4convert.planning.types import Output, OutputFile, Step

Encoded = tuple[Module, str, Encoding]


@dataclass
class PlanBuilder:
    """Files and steps of a result plan while they are laid out; `parts` are the stored parts by (file, offset).

    `decoded` are the places of tensors that are made from several of the folder's, as a layout's hosts read no packed
    ones there.
    """

    files: list[OutputFile] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    parts: dict[tuple[int, int], StoredPart] = field(default_factory=dict)
    decoded: set[tuple[int, int]] = field(default_factory=set)

    def part_of(self, step: Step) -> StoredPart | None:
        """Return the stored part that a step's bytes are taken from, None where they are made from a source."""
        return self.parts.get((step.outputs[0].file, step.outputs[0].offset))

    def add(self, part: StoredPart, module: Module, label: str, outputs: tuple[Output, ...]) -> Step:
        """Return the step that makes a stored part, as the result plan tells it."""
        self.parts[outputs[0].file, outputs[0].offset] = part
        return Step(
            outputs=outputs,
            transform=part.part.transform,
            operands=(),
            params=part.part.params,
            sources=(part.sources,),
            source_shapes=(),
            source_dtype=part.source_dtype,
            format=label,
            part=module.part,
            role=module.role,
            layer=module.block,
            weights=0 if part.part.outputs[0].suffix == "scales" else module.weights,
        )

    def decode(self, found: StoredModule, item: build.Item, outputs: tuple[Output, ...]) -> Step:
        """Return the step that decodes a packed module."""
        self.decoded.add((outputs[0].file, outputs[0].offset))
        return Step(
            outputs=outputs,
            transform=item.part.transform,
            operands=tuple((r,) for p in found.parts for r in p.at),
            params=item.part.params,
            sources=tuple(p.sources for p in found.parts),
            source_shapes=tuple(s.shape for p in found.parts for s in p.part.outputs),
            source_dtype=found.parts[0].source_dtype,
            format=item.label,
            part=item.module.part,
            role=item.module.role,
            layer=item.module.block,
            weights=item.module.weights,
        )

    def keep(self, base: ConvertedModules, modules: Sequence[StoredModule]) -> None:
        """Take over the files that hold `modules` as they are."""
        wanted = sorted({r.file for m in modules for p in m.parts for r in p.at})
        numbers = {}
        for at in wanted:
            numbers[at] = len(self.files)
            self.files.append(OutputFile(base.files[at].name, base.files[at].size, header_bytes(base, at)))
        made = []
        for m in modules:
            for p in m.parts:
                places = zip(p.names, p.part.outputs, p.at, strict=True)
                outputs = tuple(Output(n, s.dtype, s.shape, numbers[r.file], r.offset, r.size) for n, s, r in places)
                made.append(self.add(p, m.module, m.encoding.label, outputs))
        self.steps += sorted(made, key=lambda s: (s.outputs[0].file, s.outputs[0].offset))

    def backbone(self, base: ConvertedModules, layout: Layout, limit: int) -> None:
        """Take over the files of the backbone where they are as the layout writes them; else lay it out anew."""
        modules = [shaped(m, layout) for m in base.of(BACKBONE)]
        if can_keep(base, layout):
            self.keep(base, modules)
        else:
            self.move(modules, layout.backbone, limit, layout)

    def move(self, modules: Sequence[StoredModule], at: Spelling | HeadPlace, limit: int, layout: Layout) -> None:
        """Lay out `modules` anew: the backbone, or the head for one place."""
        parts = {(key_of(m.module), p.part.outputs): p for m in modules for p in m.parts}
        known = {key_of(m.module): m for m in modules}

        def make(item: build.Item, outputs: tuple[Output, ...]) -> Step:
            key = key_of(item.module)
            if (key, item.part.outputs) not in parts:
                return self.decode(known[key], item, outputs)
            return self.add(parts[key, item.part.outputs], item.module, item.label, outputs)

        self.lay_out(make, [requantize.encoded(m, layout) for m in modules], at, limit)

    def lay_out(
        self,
        make: Callable[[build.Item, tuple[Output, ...]], Step],
        modules: Sequence[Encoded],
        at: Spelling | HeadPlace,
        limit: int,
    ) -> None:
        """Lay out encoded modules: the backbone, or the head for one place."""
        build.lay_out(self.files, self.steps, make, build.shards_of(build.items(modules, at), limit, at))


def header_bytes(base: ConvertedModules, at: int) -> bytes:
    """Return the first bytes of a file, up to its data, after the headers have been checked."""
    file = base.files[at]
    with closing(base.bytes) as source:
        return source.read(file.name, 0, begin_of(source, file))


def can_keep(base: ConvertedModules, layout: Layout) -> bool:
    """Return whether the backbone's files are as we write them, hold nothing else, and leave the head's names free."""
    if base.folder.spelling != layout.backbone:
        return False
    parts = [p for m in base.of(BACKBONE) for p in m.parts]
    backbone = {r.file for p in parts for r in p.at}
    if backbone & base.respelled or any(widened(p, i) for p in parts for i in range(len(p.at))):
        return False
    head = {r.file for m in base.of(HEAD) for p in m.parts for r in p.at}
    names = [base.files[at].name for at in backbone]
    return not backbone & head and all(n.startswith("model") and not n.startswith("model-mtp") for n in names)


def widened(part: StoredPart, i: int) -> bool:
    """Return whether an output has to be written in a wider dtype than it is stored in."""
    spec = part.part.outputs[i]
    return math.prod(spec.shape) * DTYPE_BYTES[spec.dtype] != part.at[i].size


def limit_of(modules: Sequence[StoredModule]) -> int:
    """Return a shard size that puts `modules` into files as they lie now; the usual one where none does."""
    sizes = [sum(r.size for p in m.parts for r in p.at) for m in modules]
    files = [m.parts[0].at[0].file for m in modules]
    groups: list[list[int]] = []
    for at, file in enumerate(files):
        if at == 0 or file != files[at - 1]:
            groups.append([])
        groups[-1].append(at)
    if len(groups) == 1:  # there is room for what becomes larger, as in a conversion
        return max(sum(sizes), build.DEFAULT_SHARD_BYTES)
    for limit in sorted(sum(sizes[i] for i in g) for g in groups):
        if shards.split(sizes, limit) == groups:
            return limit
    return build.DEFAULT_SHARD_BYTES
