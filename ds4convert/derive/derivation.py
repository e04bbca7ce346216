"""Derive a new folder from a converted one (relayout, graft): which files are kept, rewritten, or new, as plans.

The result plan is the very plan that a conversion of the source with the same options has, so that files and manifest
come out alike. The write plan holds only the files that have to be written, and where their bytes are. Planning reads
headers and small files; nothing is written before `run`.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import xxhash

from ds4convert.checkpoint.folder import Checkpoint
from ds4convert.checkpoint.inventory import BACKBONE, HEAD, Inventory
from ds4convert.checkpoint.types import LeftOut, Provenance
from ds4convert.converted.modules import UNKNOWN, ConvertedModules, StoredPart, checked_small, shaped, small_files
from ds4convert.derive import requantize
from ds4convert.derive.plan_builder import Encoded, PlanBuilder, header_bytes, limit_of, widened
from ds4convert.errors import InputError
from ds4convert.execution import file_writer
from ds4convert.execution.completion import Completion
from ds4convert.files import Disk
from ds4convert.planning import build, config_files
from ds4convert.planning.config_files import model_file
from ds4convert.planning.layouts import HeadPlace, Layout, layout_of
from ds4convert.planning.types import Done, Plan, Step
from ds4convert.storage import strict_json
from ds4convert.storage.byte_source import ByteSource
from ds4convert.storage.digests import feed, sha256_of
from ds4convert.storage.local_files import joined
from ds4convert.storage.records import ByteRange, SourceFile
from ds4convert.storage.safe_open import resolve_inside

Progress = Callable[[int], None]
DROPPED = "the head was dropped at the user's wish (--drop-mtp)"


@dataclass(frozen=True)
class WorkStep:
    """What a step of the write plan makes: all outputs of a step of the result plan, or a copy of one by its place."""

    step: int
    output: int = 0


@dataclass(frozen=True)
class Derivation:
    """A folder derived from the converted folder `base`, by two plans.

    `result_plan` is the whole folder as its manifest will describe it: the plan of a conversion of the source with the
    same options, so that both have one id and one manifest. `write_plan` has only the files that `base` lacks, and
    where their bytes are now; `tasks` are its steps, as steps of the result plan. They are two because a step may be
    one in the result (codes, scales and biases rounded together) and several copies now, some of them in files that
    are kept. `kept` are the numbers, in the result plan, of files that `base` has already; `recorded` is what its
    manifest knows of the steps whose bytes it has. `bytes` reads the files that the write plan reads.
    """

    base: ConvertedModules
    bytes: ByteSource
    result_plan: Plan
    write_plan: Plan
    tasks: tuple[WorkStep, ...]
    kept: tuple[int, ...]
    recorded: Mapping[int, Done]


def with_layout(base: ConvertedModules, layout: Layout, model_source: bytes) -> Derivation:
    """Return the same tensors in another layout. Raises `InputError` where its hosts load no such head.

    A drafter folder that is a second copy of the head is not read: the copy in the folder itself is.
    """
    kind, stages = base.folder.head_kind, base.inventory.stages
    layout = layout.wanted_of(base.inventory.config.family, base.inventory.config.has_tower)
    places = layout.places(base.inventory.config.family, kind, stages) if base.has_head else ()
    builder = PlanBuilder()
    backbone, head = ([shaped(m, layout) for m in base.of(part)] for part in (BACKBONE, HEAD))
    usual = base.record is None or bool(base.respelled)
    builder.backbone(base, layout, build.DEFAULT_SHARD_BYTES if usual else limit_of(backbone))
    limit = limit_of(head)
    for place in places:
        builder.move(head, place, limit, layout)
    result = result_plan_of(
        base, builder, layout, model_source, places, [requantize.encoded(m, layout) for m in (*backbone, *head)]
    )
    return derive(base, builder, result)


def without_head(base: ConvertedModules, model_source: bytes) -> Derivation:
    """Return the backbone alone, in the layout of the folder: as converted with `--drop-mtp`."""
    builder = PlanBuilder()
    builder.keep(base, base.of(BACKBONE))
    layout = layout_of_stored(base)
    result = result_plan_of(
        base, builder, layout, model_source, (), [requantize.encoded(m, layout) for m in base.of(BACKBONE)]
    )
    return derive(base, builder, result)


def layout_of_stored(base: ConvertedModules) -> Layout:
    """Return the layout that the manifest names, else the default one, as it is for the folder's family."""
    config = base.inventory.config
    return (base.layout or layout_of("inline")).wanted_of(config.family, config.has_tower)


def result_plan_of(
    base: ConvertedModules,
    builder: PlanBuilder,
    layout: Layout,
    model_source: bytes,
    places: Sequence[HeadPlace],
    modules: Sequence[Encoded],
    head: HeadFacts | None = None,
) -> Plan:
    """Return the result plan of what is laid out: that of a conversion which makes the same folder."""
    inventory = head.inventory if head else base.inventory
    copies, texts, files_left_out = small_files(base)
    made, table = config_files.texts(inventory, layout, places, modules, builder.files, builder.steps, bool(places))
    kind = head.kind if head else base.folder.head_kind
    unsigned = Plan(
        id="",
        family=inventory.config.family.name,
        head_kind=kind if places else "none",
        layout=layout.name,
        recipe=base.record.recipe if base.record else UNKNOWN,
        formats=base.formats | dict(head.formats if head else {}),
        hashing=base.hashing,
        sources=head.sources if head else base.sources(),
        files=tuple(builder.files),
        steps=tuple(builder.steps),
        texts=made | texts | model_file(layout, model_source),
        copies=copies,
        left_out=_left_out(base, builder.steps, head.left_out if head else (), bool(places)),
        files_left_out=files_left_out,
        quantization=table,
        chain=base.record.chain if base.record else (),
        origin=(base.record.origin if base.record else None) or (head.origin if head else None),
        config_sha256=base.record.config_sha256 if base.record else head.config_sha256 if head else "",
    )
    return build.signed(unsigned)


@dataclass(frozen=True)
class HeadFacts:
    """What a head from a source adds to a result plan: its kind, the inventory with it, formats, source files."""

    kind: str
    inventory: Inventory
    formats: Mapping[str, str]
    sources: tuple[SourceFile, ...]
    left_out: tuple[LeftOut, ...] = ()
    origin: Provenance | None = None
    config_sha256: str = ""


def _left_out(
    base: ConvertedModules, steps: Sequence[Step], more: tuple[LeftOut, ...], has_head: bool
) -> tuple[LeftOut, ...]:
    """Return what was left out and is not in the result; the tensors of a head that is taken out are, too."""
    used = {n for s in steps for names in s.sources for n in names}
    out = {x.tensor: x for x in (*more, *base.left_out) if x.tensor not in used}
    if base.has_head and not has_head:
        names = {n for m in base.of(HEAD) for p in m.parts for n in p.sources}
        out |= {n: LeftOut(n, DROPPED) for n in names}
    return tuple(sorted(out.values(), key=lambda x: x.tensor))


def derive(base: ConvertedModules, builder: PlanBuilder, result: Plan, head: Checkpoint | None = None) -> Derivation:
    """Return the derived folder: files of the result plan that `base` has are kept, all others are written.

    `head` is the source that the other steps read; its files come first among those that are read.
    """
    kept = [n for n in range(len(builder.files)) if _same_file(base, builder, n)]
    number = {n: i for i, n in enumerate(n for n in range(len(builder.files)) if n not in kept)}
    made: list[tuple[Step, WorkStep]] = []
    recorded: dict[int, Done] = {}
    more = head.files if head else ()
    parts = [(head.bytes, {f.name: f.name for f in more})] if head else []
    for at, step in enumerate(builder.steps):
        part = builder.part_of(step)
        if part is not None:
            recorded[at] = part.done
        if (step.outputs[0].file, step.outputs[0].offset) in builder.decoded:
            moved = (tuple(dataclasses.replace(r, file=r.file + len(more)) for r in o) for o in step.operands)
            step = dataclasses.replace(step, operands=tuple(moved))
        made += _write_steps(at, step, part, number, len(more))
    made.sort(key=lambda pair: (pair[0].outputs[0].file, pair[0].outputs[0].offset))
    sources = more
    if builder.decoded or any(task.step in recorded for _, task in made):
        label = "MLX_DIR/" if head else ""
        sources += tuple(dataclasses.replace(f, name=label + f.name) for f in base.files)
        parts.append((base.bytes, {label + f.name: f.name for f in base.files}))
    written = dataclasses.replace(
        result,
        id=strict_json.digest([result.id, "assembled", [dataclasses.astuple(s) for s in sources]]),
        sources=sources,
        files=tuple(builder.files[n] for n in number),
        steps=tuple(step for step, _ in made),
        texts={},
        copies={},
    )
    return Derivation(base, joined(*parts), result, written, tuple(t for _, t in made), tuple(kept), recorded)


def _same_file(base: ConvertedModules, builder: PlanBuilder, n: int) -> bool:
    """Return whether the folder has this very file: by name, header, and the place of every tensor."""
    file = builder.files[n]
    at = next((i for i, f in enumerate(base.files) if (f.name, f.size) == (file.name, file.size)), None)
    if at is None or header_bytes(base, at) != file.header:
        return False
    for step in builder.steps:
        part = builder.part_of(step)
        for i, o in enumerate(step.outputs):
            if o.file == n and (part is None or part.at[i] != ByteRange(at, o.offset, o.size)):
                return False
    return True


def _write_steps(
    at: int, step: Step, part: StoredPart | None, number: Mapping[int, int], shift: int
) -> list[tuple[Step, WorkStep]]:
    """Return what makes a step: itself where it reads a source, a copy for each output where the folder has it.

    The folder's files are counted from `shift`.
    """
    if part is None:
        outputs = tuple(dataclasses.replace(o, file=number[o.file]) for o in step.outputs)
        return [(dataclasses.replace(step, outputs=outputs), WorkStep(at))]
    out = []
    for i, (o, r) in enumerate(zip(step.outputs, part.at, strict=True)):
        if o.file in number:
            copy = dataclasses.replace(
                step,
                outputs=(dataclasses.replace(o, file=number[o.file]),),
                transform="widen_bf16" if widened(part, i) else "copy",
                params={},
                operands=((dataclasses.replace(r, file=r.file + shift),),),
                sources=((part.names[i],),),
                source_shapes=(o.shape,),
            )
            out.append((copy, WorkStep(at, i)))
    return out


def step_results(made: Derivation, result: file_writer.Result) -> dict[int, Done]:
    """Return what is known of every step of the result plan. Raises `InputError` where a copied tensor was altered."""
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
            name = made.write_plan.steps[n].sources[0][0]
            raise InputError(f"{made.base.path}: {name}: altered since it was written", hint="convert the folder again")
        filled = digests.setdefault(task.step, list(recorded.digests))
        filled[task.output] = known if found.digests[0] is None else found.digests[0]
        out[task.step] = Done(tuple(filled), recorded.loss)
    return out


@dataclass(frozen=True)
class FileDigests:
    """What was found of a kept file: its sha256, and xxh3-128 by offset of each tensor; None and {} if not asked."""

    sha256: str | None
    digests: Mapping[int, str]


def completion(made: Derivation, out: Path, apart: tuple[Path, ...], progress: Progress = lambda n: None) -> Completion:
    """Return how a run of `made.write_plan` into the folder `out` ends: kept files are put there, too."""

    def account(out: Path, written: file_writer.Result, disk: Disk) -> file_writer.Result:
        known, hashes = step_results(made, written), new_hashes(made, written)
        for n in made.kept:
            name = made.result_plan.files[n].name
            with closing(made.base.bytes) as files:
                fill_in(made, n, check_kept(made, n, files, progress), known, hashes)
                disk.make_folder((out / name).parent)
                disk.link_or_copy(resolve_inside(*files.places[name]), out / name)
                files.check(name)
        return file_writer.Result(known, hashes)

    copied = 0 if _same_disk(made.base.path, out) else sum(made.result_plan.files[n].size for n in made.kept)
    carried = partial(checked_small, made.base)
    return Completion(made.result_plan, carried, apart, account, copied, _digests(made))


def _digests(made: Derivation) -> dict[tuple[str, str], str]:
    """Return the digests that tensors of the result have to have, by (file, name): the manifest of the folder tells."""
    return {
        (made.result_plan.files[o.file].name, o.name): digest
        for n, done in made.recorded.items()
        for o, digest in zip(made.result_plan.steps[n].outputs, done.digests, strict=True)
        if digest is not None
    }


def _same_disk(a: Path, b: Path) -> bool:
    while not b.exists():
        b = b.absolute().parent
    return a.stat().st_dev == b.stat().st_dev


def new_hashes(made: Derivation, result: file_writer.Result) -> dict[int, str | None]:
    """Return the sha256 of every written file by its number in the result plan."""
    written = [n for n in range(len(made.result_plan.files)) if n not in made.kept]
    return {n: result.hashes[i] for i, n in enumerate(written)}


def check_kept(made: Derivation, n: int, source: ByteSource, progress: Progress) -> FileDigests:
    """Return what a kept file holds, read once. Raises `InputError` when it is not what the manifest records."""
    name = made.result_plan.files[n].name
    source.size(name)  # looks at the file, so that a change is seen from here on
    if made.base.record is None:
        return _read_through(made, n, source, progress)
    known = made.base.sha256(name)
    if known is None and made.base.hashing:
        return _read_through(made, n, source, progress)
    if known is not None and sha256_of(source, name, progress) != known:
        raise InputError(f"{made.base.path}: {name}: altered since it was written", hint="convert the folder again")
    return FileDigests(known, {})


def _read_through(made: Derivation, n: int, source: ByteSource, progress: Progress) -> FileDigests:
    """Return the digests of a file of which no manifest tells any: read from front to back."""
    file = made.result_plan.files[n]
    whole, digests = hashlib.sha256(file.header), {}
    places = sorted((o.offset, o.size) for s in made.result_plan.steps for o in s.outputs if o.file == n)
    for offset, size in places:
        tensor = xxhash.xxh3_128()
        feed(source, file.name, whole, tensor, start=offset, size=size, progress=progress)
        digests[offset] = tensor.hexdigest()
    return FileDigests(whole.hexdigest(), digests)


def fill_in(made: Derivation, n: int, seen: FileDigests, known: dict[int, Done], hashes: dict[int, str | None]) -> None:
    """Put what was found of kept file `n` into what is known."""
    hashes[n] = seen.sha256
    for at, step in enumerate(made.result_plan.steps):
        if seen.digests and any(o.file == n for o in step.outputs):
            pairs = zip(step.outputs, known[at].digests, strict=True)
            found = tuple(seen.digests[o.offset] if o.file == n else d for o, d in pairs)
            known[at] = Done(found, known[at].loss)
