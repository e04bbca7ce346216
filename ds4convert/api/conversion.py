"""`plan` and `convert`: what a conversion would write, and the conversion."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

from ds4convert.api.conversion_options import ConversionOptions
from ds4convert.api.opening import Place, exchanged, is_remote, source_or_config
from ds4convert.api.planning import Prepared, prepare
from ds4convert.api.reporting import Listener, MessageCallback, ProgressCallback, document
from ds4convert.api.values import (
    OptionRecord,
    PathLike,
    apart,
    bytes_of,
    combined,
    flag,
    part_field,
    result_place,
    size,
    text,
)
from ds4convert.checkpoint import advice
from ds4convert.checkpoint.inventory import taken
from ds4convert.checkpoint.published import zeros
from ds4convert.checkpoint.types import JSON
from ds4convert.errors import UsageError
from ds4convert.execution import run
from ds4convert.execution.prefetch import LEAST_WINDOW
from ds4convert.execution.rounding_steps import Importance, no_importance
from ds4convert.fit import forecast, plan_facts
from ds4convert.hub.objects.address import Address
from ds4convert.planning import parts as division
from ds4convert.planning.parts import Part, Share


class ConversionChoices(TypedDict, total=False):
    """The options of `plan` and `convert`, as keywords; `ConversionOptions` says what each is."""

    recipe: PathLike
    backbone: str | None
    experts: str | None
    engram: str | None
    mtp: str | None
    mac: int | str | None
    fit: int | str | None
    context: int
    from_mlx: bool
    rounding: Literal["optimal", "nearest", "compensated"]
    calibration: PathLike | None
    calibrate: PathLike | Sequence[PathLike]
    calibration_tokens: int
    keep_mtp: bool
    layout: str
    max_shard_size: int | str
    jobs: int
    cores: int | None
    hashing: bool


@dataclass(frozen=True)
class RunOptions(OptionRecord):
    """How `convert` carries a plan out.

    `overwrite` replaces a conversion that `out` holds. Of a source on the Hub at most `window` bytes lie on the disk at
    once (8 GB where it is None). `part` (`"2/8"`) does a share of the work beside other machines; `cluster` has those
    of a Ray cluster do it, by the address of its head (`"HOST:PORT"`, or `"auto"` on one of them).
    """

    overwrite: bool = flag(False)
    window: int | None = bytes_of(size, None)
    part: Part | None = part_field()
    cluster: str | None = text(None)

    def __post_init__(self) -> None:
        """Raise `UsageError` on values out of range."""
        super().__post_init__()
        if self.window is not None and self.window < LEAST_WINDOW:
            raise UsageError(f"--window {self.window}: expected at least {LEAST_WINDOW:,} bytes")
        if self.cluster is not None and self.part is not None:
            raise UsageError(
                "--part and --cluster contradict each other: with --cluster the parts are handed out by Ray",
                hint="give one of them",
            )


class RunChoices(ConversionChoices, total=False):
    """The options of `convert` as keywords: those of the plan, and of carrying it out (`RunOptions`)."""

    overwrite: bool
    window: int | str | None
    part: Part | str | None
    cluster: str | None


@dataclass(frozen=True)
class ConversionPlan:
    """What a conversion would write, settled to the byte; `convert` carries it out."""

    prepared: Prepared = field(repr=False)
    options: ConversionOptions
    facts: Mapping[str, Any] = field(repr=False)
    out: Path = Path()

    @property
    def id(self) -> str:
        """Return the sha256 that names the plan: equal for equal sources and options, on every machine."""
        return self.prepared.plan.id

    @property
    def output_bytes(self) -> int:
        """Return the bytes of all files that would be written."""
        return int(self.facts["output_bytes"])

    def forecast(self) -> float:
        """Return the seconds that the conversion is estimated to take here; rounding is tried for a moment."""
        return forecast.seconds(self.prepared.plan, self.options.cores, self.prepared.share)

    def parts(self, count: int) -> list[Share]:
        """Return what each part reads, writes and costs where `count` machines share the work (`part` of `convert`)."""
        if not isinstance(count, int) or not 1 <= count <= division.MOST_PARTS:
            raise UsageError(f"--parts {count!r}: expected 1 to {division.MOST_PARTS:,}")
        _check_divisible(self.options)
        return division.shares(self.prepared.plan, count)

    def as_json(self, full: bool = False, parts: int | None = None) -> JSON:
        """Return the document of `plan`; `full` adds every step and byte range, `parts` a division in so many."""
        facts = {**self.facts, "seconds_estimate": round(self.forecast())}
        if parts is not None:
            facts["parts"] = [s.as_json() for s in self.parts(parts)]
            command, out = advice.COMMAND.get(), "OUT" if self.out == Path() else str(self.out)
            facts |= {"commands": division.commands(command, parts, out)} if command else {}
        return document(facts | ({"steps": plan_facts.full(self.prepared.plan)} if full else {}))


@dataclass(frozen=True)
class Conversion:
    """What `convert` did. `resumed`: an earlier run had done some of it; `already_done`: all of it.

    `folder` and `manifest` are paths; of a folder of an object store they are addresses. After a part of a plan `share`
    is what that was, and there is no manifest yet.
    """

    plan: ConversionPlan
    folder: Path | str
    manifest: Path | str | None
    resumed: bool
    already_done: bool
    seconds: float
    share: Share | None = None

    def as_json(self) -> JSON:
        """Return the document of `convert`."""
        facts = self.plan.facts
        return document(
            {
                **facts,
                **({} if self.share is None else {"parts": [self.share.as_json()]}),
                "seconds": round(self.seconds, 3),
                "bytes_per_second": round(facts["output_bytes"] / self.seconds),
                "resumed": self.resumed,
                "already_done": self.already_done,
                "manifest": None if self.manifest is None else str(self.manifest),
            }
        )


def plan(
    source: Place | None = None, options: ConversionOptions | None = None, *, config: PathLike | None = None,
    out: PathLike = ".", say: MessageCallback | None = None, **choices: Unpack[ConversionChoices],
) -> ConversionPlan:  # fmt: skip
    """Return what `convert` with the same options would write. Writes nothing.

    `source` is a checkpoint folder or a repo of the Hub; with `config` (a file, or `flash`, `pro`, `tiny`) the plan is
    for a model of that config. The disk of the folder `out` is the one whose free bytes are told. Options are keywords,
    or a record in `options`. Raises `UsageError` for options that do not go together, `InputError` for a source that
    is not whole.

    >>> import ds4convert as ds4
    >>> plan = ds4.plan("checkpoint", recipe="q4", layout="universal")
    >>> plan.as_json()["recipe"], len(plan.id), plan.as_json()["output_shards"]
    ('q4', 64, 3)
    """
    settled, listener = combined(ConversionOptions, options, choices), Listener(say=say)
    source_or_config(source, config)
    _warn_of_unused(settled.without_effect(), choices, listener)
    prepared = prepare(source, config, settled, listener)
    if prepared.source is not None and prepared.source.checkpoint.is_here:
        for told in zeros.warnings(prepared.source.checkpoint, zeros.FEW_LOOKS):
            listener.warn(told)
    return _planned(prepared, settled, Path(out))


def convert(
    source: Place | ConversionPlan, out: PathLike, options: ConversionOptions | None = None, *,
    progress: ProgressCallback | None = None, say: MessageCallback | None = None, **choices: Unpack[RunChoices],
) -> Conversion:  # fmt: skip
    """Convert a checkpoint, or carry out a plan, into the folder `out`. Called again after an interruption, it goes on.

    `out` may be a folder of an object store (`s3://`, `gs://`, `az://`), whose files are put there one by one.

    Keywords are the options of `plan` and of `RunOptions`: `overwrite`, `window`, `part`, `cluster`. After
    calls with `part` on several machines, one without it ends the conversion. `progress` is called with a `Progress`,
    `say` with a `Message`; what they raise ends the run, which the next call resumes. Raises `UsageError`, `InputError`
    or `EnvironmentFault`.

    >>> import ds4convert as ds4
    >>> done = ds4.convert("checkpoint", "converted", jobs=1)
    >>> done.manifest.name, done.resumed, ds4.convert("checkpoint", "converted").already_done
    ('ds4convert_manifest.json', False, True)
    """
    start, listener, address = time.monotonic(), Listener(progress, say), result_place(out)
    target = Path() if address else Path(out)
    how, of_plan = apart(RunOptions, choices)
    if how.cluster is not None and address:
        raise UsageError(
            f"--cluster and {address}: machines of a cluster write into a folder that they all share",
            hint="give such a folder, or leave out --cluster and have several machines put their --part there",
        )
    if how.part is not None or how.cluster is not None:
        given = source.options if isinstance(source, ConversionPlan) else combined(ConversionOptions, options, of_plan)
        _check_divisible(given, "the parts" if how.cluster is None else "--cluster")
    if isinstance(source, ConversionPlan):
        made = _again(source, options, of_plan, target)
    else:
        settled = combined(ConversionOptions, options, of_plan)
        _warn_of_unused(settled.without_effect(), of_plan, listener)
        if not is_remote(source) and not address:
            exchanged(source, target, "SRC and OUT")
        if how.window is not None and not is_remote(source):
            listener.warn("--window has no effect here; it is for a SRC on the Hub or in an object store")
        made = _planned(prepare(source, None, settled, listener), settled, target)
    share = None if how.part is None else division.share(made.prepared.plan, how.part)
    outcome = _carried_out(made, address or target, how, share, listener)
    seconds = time.monotonic() - start
    folder: Path | str = str(address) if address else target
    manifest = f"{address}/{outcome.manifest.name}" if address else outcome.manifest
    ended = manifest if outcome.complete else None
    return Conversion(made, folder, ended, outcome.resumed, outcome.already_done, seconds, share)


def _check_divisible(options: ConversionOptions, asked: str = "the parts") -> None:
    """Raise `UsageError` where a plan with these options cannot be carried out in parts."""
    if options.is_compensated:
        raise UsageError(
            "--rounding compensated goes through the model layer by layer, so it stays on one machine: leave out "
            f"{asked}"
        )


def _warn_of_unused(unused: Mapping[str, str], choices: Mapping[str, object], listener: Listener) -> None:
    for name in unused.keys() & choices.keys():
        listener.warn(f"--{name.replace('_', '-')} has no effect here; it is for {unused[name]}")


def _planned(prepared: Prepared, options: ConversionOptions, out: Path) -> ConversionPlan:
    facts = plan_facts.summarise(prepared.plan, out, options.jobs, options.cores)
    over = plan_facts.too_large(prepared.plan, options.max_shard_size)
    more = {"fit": prepared.fit, "over_shard_size": over}
    return ConversionPlan(prepared, options, facts | {k: v for k, v in more.items() if v}, out)


def _again(
    made: ConversionPlan, options: ConversionOptions | None, choices: Mapping[str, Any], out: Path
) -> ConversionPlan:
    """Return a plan for another folder and number of workers. Raises `UsageError` for options that it settled."""
    settled = combined(ConversionOptions, options or made.options, choices)
    if settled != combined(ConversionOptions, made.options, {"jobs": settled.jobs, "cores": settled.cores}):
        raise UsageError("the plan was made with its options: give convert(plan, out) no others but jobs and cores")
    if made.prepared.source is None:
        raise UsageError("the plan is of a config alone, so there is nothing to convert", hint="plan a source")
    return _planned(made.prepared, settled, out)


def _carried_out(
    made: ConversionPlan, place: Path | Address, how: RunOptions, share: Share | None, listener: Listener
) -> run.Outcome:
    from ds4convert.hub.objects import result

    prepared, jobs = made.prepared, made.options.jobs
    source, plan_ = prepared.source, prepared.plan
    assert source is not None
    out = place if isinstance(place, Path) else result.folder_here(place, plan_, how.part)
    for told in taken(source.inventory):
        listener.note(told)
    for told in zeros.warnings(source.checkpoint) if source.checkpoint.is_here else ():
        listener.warn(told)
    for told in _details(made.facts, jobs):
        listener.detail(told)
    weigh: Importance = prepared.calibration.importance if prepared.calibration else no_importance
    if prepared.text is not None:
        weigh = prepared.text.inputs(out, listener.note)
    left = None if listener.progress is None or share else forecast.left(plan_, made.options.cores)
    total = made.output_bytes if share is None else share.bytes_written
    window = run.WINDOW_BYTES if how.window is None else how.window
    way = run.Way(jobs, how.overwrite, importance=weigh, window_bytes=window, part=how.part, cores=made.options.cores)
    if how.cluster is not None:
        return _on_cluster(made, out, way, how.cluster, listener)
    with listener.counting("converting", total, left) as count:
        way = replace(way, progress=count)
        if isinstance(place, Path):
            return run.run(source, plan_, place, way, prepared.ending)
        return result.carry_out(source, plan_, place, way, prepared.ending)


def _on_cluster(made: ConversionPlan, out: Path, way: run.Way, address: str, listener: Listener) -> run.Outcome:
    """Have the machines of a cluster write the files, then end the conversion here."""
    from ds4convert.execution.cluster import parts

    source, plan_, ending = made.prepared.source, made.prepared.plan, made.prepared.ending
    assert source is not None
    voice = parts.Voice(listener.detail, listener.note, listener.warn)
    with listener.counting("converting", made.output_bytes) as count:
        begun = parts.write(source, plan_, out, replace(way, progress=count), address, voice, ending)
    if begun.complete:
        return begun
    with listener.counting("reading back", made.output_bytes) as count:
        return parts.finish(source, plan_, out, replace(way, progress=count), begun, ending)


def _details(facts: Mapping[str, Any], jobs: int) -> Iterator[str]:
    """Yield what is about to be done."""
    yield (
        f"plan {facts['plan']}: {facts['family']}, head {facts['head']}, recipe {facts['recipe']}, layout "
        f"{facts['layout']}; {facts['output_tensors']:,} tensors, {facts['output_bytes']:,} bytes in "
        f"{facts['output_shards']} files, {jobs} at a time, "
        f"{facts['cores']} cores, at most {facts['peak_memory_bytes']:,} bytes of memory"
    )
    for group in facts["groups"]:
        yield f"{group['name']}: {group['tensors']:,} tensors, {', '.join(group['formats'])}"
