"""A converted folder made from another one: what is kept, what is moved, what comes from a source, as plans.

Owns the account of such a result: the very plan that a conversion with the same options has, so that files and
manifest come out alike. A second plan, `work`, holds only the files that have to be written, and where their bytes
are. Planning reads headers and small files; nothing is written before `run`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import xxhash

from ds4convert.checkpoint.folder import Checkpoint
from ds4convert.checkpoint.headers import DTYPE_BYTES
from ds4convert.checkpoint.inventory import BACKBONE, HEAD, Inventory, Module, key_of
from ds4convert.checkpoint.types import LeftOut, Origin
from ds4convert.converted import modules as stored
from ds4convert.converted.modules import Stored, StoredModule, StoredPart
from ds4convert.derive import requantize
from ds4convert.errors import InputError
from ds4convert.execution import file_writer
from ds4convert.execution.completion import Completion
from ds4convert.execution.sources import begin_of
from ds4convert.files import Disk
from ds4convert.planning import build, config_files, shards
from ds4convert.planning.config_files import model_file
from ds4convert.planning.encodings import Encoding
from ds4convert.planning.layouts import HeadPlace, Layout, Spelling, layout_of
from ds4convert.planning.types import Done, Output, OutputFile, Plan, Step
from ds4convert.storage import strict_json
from ds4convert.storage.byte_source import ByteSource
from ds4convert.storage.digests import feed, sha256_of
from ds4convert.storage.local_files import joined
from ds4convert.storage.records import ByteRange, SourceFile
from ds4convert.storage.safe_open import resolve_inside

Progress = Callable[[int], None]
Encoded = tuple[Module, str, Encoding]
DROPPED = "the head was dropped at the user's wish (--drop-mtp)"


@dataclass(frozen=True)
class Task:
    """What a step of `work` makes: all outputs of a step of the account, or a copy of one (by its place)."""

    step: int
    output: int = 0


@dataclass(frozen=True)
class Assembly:
    """`account` is what the manifest will tell; `work` what is written anew, `tasks` its steps in the account.

    `kept` are the files of the account (by number) that the folder `base` has already; `recorded` is what its manifest
    knows of the steps of the account whose bytes it has. `bytes` reads the files that `work` reads.
    """

    base: Stored
    bytes: ByteSource
    account: Plan
    work: Plan
    tasks: tuple[Task, ...]
    kept: tuple[int, ...]
    recorded: Mapping[int, Done]


@dataclass
class Drawing:
    """Files and steps of an account while they are laid out; `parts` are the stored parts by (file, offset).

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
        """Return the step that makes a stored part, as the account tells it."""
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

    def keep(self, base: Stored, modules: Sequence[StoredModule]) -> None:
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


def header_bytes(base: Stored, at: int) -> bytes:
    """Return the first bytes of a file, up to its data, after the headers have been checked."""
    file = base.files[at]
    with closing(base.bytes) as source:
        return source.read(file.name, 0, begin_of(source, file))


def can_keep(base: Stored, layout: Layout) -> bool:
    """Return whether the backbone's files are as we write them, hold nothing else, and leave the head's names free."""
    if base.folder.spelling != layout.backbone:
        return False
    parts = [p for m in base.of(BACKBONE) for p in m.parts]
    backbone = {r.file for p in parts for r in p.at}
    if backbone & base.respelled or any(_widened(p, i) for p in parts for i in range(len(p.at))):
        return False
    head = {r.file for m in base.of(HEAD) for p in m.parts for r in p.at}
    names = [base.files[at].name for at in backbone]
    return not backbone & head and all(n.startswith("model") and not n.startswith("model-mtp") for n in names)


def _widened(part: StoredPart, i: int) -> bool:
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


def relaid(base: Stored, layout: Layout, model_source: bytes) -> Assembly:
    """Return the assembly of the same tensors in another layout. Raises `InputError` where its hosts load no such head.

    A drafter folder that is a second copy of the head is not read: the copy in the folder itself is.
    """
    kind, stages = base.folder.head_kind, base.inventory.stages
    layout = layout.wanted_of(base.inventory.config.family, base.inventory.config.has_tower)
    places = layout.places(base.inventory.config.family, kind, stages) if base.has_head else ()
    drawing = Drawing()
    backbone, head = ([stored.shaped(m, layout) for m in base.of(part)] for part in (BACKBONE, HEAD))
    if can_keep(base, layout):
        drawing.keep(base, backbone)
    else:
        usual = base.record is None or bool(base.respelled)
        drawing.move(backbone, layout.backbone, build.DEFAULT_SHARD_BYTES if usual else limit_of(backbone), layout)
    limit = limit_of(head)
    for place in places:
        drawing.move(head, place, limit, layout)
    account = account_of(
        base, drawing, layout, model_source, places, [requantize.encoded(m, layout) for m in (*backbone, *head)]
    )
    return assemble(base, drawing, account)


def without_head(base: Stored, model_source: bytes) -> Assembly:
    """Return the assembly of the backbone alone, in the layout of the folder: as converted with `--drop-mtp`."""
    drawing = Drawing()
    drawing.keep(base, base.of(BACKBONE))
    layout = layout_of_stored(base)
    account = account_of(
        base, drawing, layout, model_source, (), [requantize.encoded(m, layout) for m in base.of(BACKBONE)]
    )
    return assemble(base, drawing, account)


def layout_of_stored(base: Stored) -> Layout:
    """Return the layout that the manifest names, else the default one, as it is for the folder's family."""
    config = base.inventory.config
    return (base.layout or layout_of("inline")).wanted_of(config.family, config.has_tower)


def account_of(
    base: Stored,
    drawing: Drawing,
    layout: Layout,
    model_source: bytes,
    places: Sequence[HeadPlace],
    modules: Sequence[Encoded],
    head: HeadFacts | None = None,
) -> Plan:
    """Return the account of what is drawn: the plan of a conversion that makes the same folder."""
    inventory = head.inventory if head else base.inventory
    copies, texts, files_left_out = stored.small_files(base)
    made, table = config_files.texts(inventory, layout, places, modules, drawing.files, drawing.steps, bool(places))
    kind = head.kind if head else base.folder.head_kind
    unsigned = Plan(
        id="",
        family=inventory.config.family.name,
        head_kind=kind if places else "none",
        layout=layout.name,
        recipe=base.record.recipe if base.record else stored.UNKNOWN,
        formats=base.formats | dict(head.formats if head else {}),
        hashing=base.hashing,
        sources=head.sources if head else base.sources(),
        files=tuple(drawing.files),
        steps=tuple(drawing.steps),
        texts=made | texts | model_file(layout, model_source),
        copies=copies,
        left_out=_left_out(base, drawing.steps, head.left_out if head else (), bool(places)),
        files_left_out=files_left_out,
        quantization=table,
        chain=base.record.chain if base.record else (),
        origin=(base.record.origin if base.record else None) or (head.origin if head else None),
        config_sha256=base.record.config_sha256 if base.record else head.config_sha256 if head else "",
    )
    return build.signed(unsigned)


@dataclass(frozen=True)
class HeadFacts:
    """What a head from a source adds to an account: its kind, the inventory with it, formats, source files."""

    kind: str
    inventory: Inventory
    formats: Mapping[str, str]
    sources: tuple[SourceFile, ...]
    left_out: tuple[LeftOut, ...] = ()
    origin: Origin | None = None
    config_sha256: str = ""


def _left_out(base: Stored, steps: Sequence[Step], more: tuple[LeftOut, ...], has_head: bool) -> tuple[LeftOut, ...]:
    """Return what was left out and is not in the result; the tensors of a head that is taken out are, too."""
    used = {n for s in steps for names in s.sources for n in names}
    out = {x.tensor: x for x in (*more, *base.left_out) if x.tensor not in used}
    if base.has_head and not has_head:
        names = {n for m in base.of(HEAD) for p in m.parts for n in p.sources}
        out |= {n: LeftOut(n, DROPPED) for n in names}
    return tuple(sorted(out.values(), key=lambda x: x.tensor))


def assemble(base: Stored, drawing: Drawing, account: Plan, head: Checkpoint | None = None) -> Assembly:
    """Return the assembly: files of the account that `base` has are kept, all others are written.

    `head` is the source that the other steps read; its files come first among those that are read.
    """
    kept = [n for n in range(len(drawing.files)) if _same_file(base, drawing, n)]
    number = {n: i for i, n in enumerate(n for n in range(len(drawing.files)) if n not in kept)}
    made: list[tuple[Step, Task]] = []
    recorded: dict[int, Done] = {}
    more = head.files if head else ()
    parts = [(head.bytes, {f.name: f.name for f in more})] if head else []
    for at, step in enumerate(drawing.steps):
        part = drawing.part_of(step)
        if part is not None:
            recorded[at] = part.done
        if (step.outputs[0].file, step.outputs[0].offset) in drawing.decoded:
            moved = (tuple(dataclasses.replace(r, file=r.file + len(more)) for r in o) for o in step.operands)
            step = dataclasses.replace(step, operands=tuple(moved))
        made += _work(at, step, part, number, len(more))
    made.sort(key=lambda pair: (pair[0].outputs[0].file, pair[0].outputs[0].offset))
    sources = more
    if drawing.decoded or any(task.step in recorded for _, task in made):
        label = "MLX_DIR/" if head else ""
        sources += tuple(dataclasses.replace(f, name=label + f.name) for f in base.files)
        parts.append((base.bytes, {label + f.name: f.name for f in base.files}))
    work = dataclasses.replace(
        account,
        id=strict_json.digest([account.id, "assembled", [dataclasses.astuple(s) for s in sources]]),
        sources=sources,
        files=tuple(drawing.files[n] for n in number),
        steps=tuple(step for step, _ in made),
        texts={},
        copies={},
    )
    return Assembly(base, joined(*parts), account, work, tuple(t for _, t in made), tuple(kept), recorded)


def _same_file(base: Stored, drawing: Drawing, n: int) -> bool:
    """Return whether the folder has this very file: by name, header, and the place of every tensor."""
    file = drawing.files[n]
    at = next((i for i, f in enumerate(base.files) if (f.name, f.size) == (file.name, file.size)), None)
    if at is None or header_bytes(base, at) != file.header:
        return False
    for step in drawing.steps:
        part = drawing.part_of(step)
        for i, o in enumerate(step.outputs):
            if o.file == n and (part is None or part.at[i] != ByteRange(at, o.offset, o.size)):
                return False
    return True


def _work(
    at: int, step: Step, part: StoredPart | None, number: Mapping[int, int], shift: int
) -> list[tuple[Step, Task]]:
    """Return what makes a step: itself where it reads a source, a copy for each output where the folder has it.

    The folder's files are counted from `shift`.
    """
    if part is None:
        outputs = tuple(dataclasses.replace(o, file=number[o.file]) for o in step.outputs)
        return [(dataclasses.replace(step, outputs=outputs), Task(at))]
    out = []
    for i, (o, r) in enumerate(zip(step.outputs, part.at, strict=True)):
        if o.file in number:
            copy = dataclasses.replace(
                step,
                outputs=(dataclasses.replace(o, file=number[o.file]),),
                transform="widen_bf16" if _widened(part, i) else "copy",
                params={},
                operands=((dataclasses.replace(r, file=r.file + shift),),),
                sources=((part.names[i],),),
                source_shapes=(o.shape,),
            )
            out.append((copy, Task(at, i)))
    return out


def merged(made: Assembly, result: file_writer.Result) -> dict[int, Done]:
    """Return what is known of every step of the account. Raises `InputError` where a copied tensor was altered."""
    out = {n: d for n, d in made.recorded.items() if n not in {t.step for t in made.tasks}}
    digests: dict[int, list[str | None]] = {}
    for n, task in enumerate(made.tasks):
        found = result.steps[n]
        recorded = made.recorded.get(task.step)
        if recorded is None:
            out[task.step] = found
            continue
        known = recorded.digests[task.output]
        if known is not None and found.digests[0] is not None and known != found.digests[0]:
            name = made.work.steps[n].sources[0][0]
            raise InputError(f"{made.base.path}: {name}: altered since it was written", hint="convert the folder again")
        filled = digests.setdefault(task.step, list(recorded.digests))
        filled[task.output] = known if found.digests[0] is None else found.digests[0]
        out[task.step] = Done(tuple(filled), recorded.loss)
    return out


@dataclass(frozen=True)
class Seen:
    """What was found of a kept file: its sha256, and xxh3-128 by offset of each tensor; None and {} if not asked."""

    sha256: str | None
    digests: Mapping[int, str]


def ending(made: Assembly, out: Path, apart: tuple[Path, ...], progress: Progress = lambda n: None) -> Completion:
    """Return how a run of `made.work` into the folder `out` ends: kept files are put there, too."""

    def account(out: Path, written: file_writer.Result, disk: Disk) -> file_writer.Result:
        known, hashes = merged(made, written), new_hashes(made, written)
        for n in made.kept:
            name = made.account.files[n].name
            with closing(made.base.bytes) as files:
                absorb(made, n, check_kept(made, n, files, progress), known, hashes)
                disk.make_folder((out / name).parent)
                disk.link_or_copy(resolve_inside(*files.places[name]), out / name)
                files.check(name)
        return file_writer.Result(known, hashes)

    copied = 0 if _same_disk(made.base.path, out) else sum(made.account.files[n].size for n in made.kept)
    carried = partial(stored.checked_small, made.base)
    return Completion(made.account, carried, apart, account, copied, _digests(made))


def _digests(made: Assembly) -> dict[tuple[str, str], str]:
    """Return the digests that tensors of the result have to have, by (file, name): the manifest of the folder tells."""
    return {
        (made.account.files[o.file].name, o.name): digest
        for n, done in made.recorded.items()
        for o, digest in zip(made.account.steps[n].outputs, done.digests, strict=True)
        if digest is not None
    }


def _same_disk(a: Path, b: Path) -> bool:
    while not b.exists():
        b = b.absolute().parent
    return a.stat().st_dev == b.stat().st_dev


def new_hashes(made: Assembly, result: file_writer.Result) -> dict[int, str | None]:
    """Return the sha256 of every written file by its number in the account."""
    written = [n for n in range(len(made.account.files)) if n not in made.kept]
    return {n: result.hashes[i] for i, n in enumerate(written)}


def check_kept(made: Assembly, n: int, source: ByteSource, progress: Progress) -> Seen:
    """Return what a kept file holds, read once. Raises `InputError` when it is not what the manifest records."""
    name = made.account.files[n].name
    source.size(name)  # looks at the file, so that a change is seen from here on
    if made.base.record is None:
        return _read_through(made, n, source, progress)
    known = made.base.sha256(name)
    if known is None and made.base.hashing:
        return _read_through(made, n, source, progress)
    if known is not None and sha256_of(source, name, progress) != known:
        raise InputError(f"{made.base.path}: {name}: altered since it was written", hint="convert the folder again")
    return Seen(known, {})


def _read_through(made: Assembly, n: int, source: ByteSource, progress: Progress) -> Seen:
    """Return the digests of a file of which no manifest tells any: read from front to back."""
    file = made.account.files[n]
    whole, digests = hashlib.sha256(file.header), {}
    places = sorted((o.offset, o.size) for s in made.account.steps for o in s.outputs if o.file == n)
    for offset, size in places:
        tensor = xxhash.xxh3_128()
        feed(source, file.name, whole, tensor, start=offset, size=size, progress=progress)
        digests[offset] = tensor.hexdigest()
    return Seen(whole.hexdigest(), digests)


def absorb(made: Assembly, n: int, seen: Seen, known: dict[int, Done], hashes: dict[int, str | None]) -> None:
    """Put what was found of kept file `n` into what is known."""
    hashes[n] = seen.sha256
    for at, step in enumerate(made.account.steps):
        if seen.digests and any(o.file == n for o in step.outputs):
            pairs = zip(step.outputs, known[at].digests, strict=True)
            found = tuple(seen.digests[o.offset] if o.file == n else d for o, d in pairs)
            known[at] = Done(found, known[at].loss)
