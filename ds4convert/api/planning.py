"""From a source and options to a plan: formats that fit a size, a calibration, a folder converted already."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ds4convert.api.conversion_options import ConversionOptions
from ds4convert.api.opening import Place, config_bytes, is_remote, local, source_of
from ds4convert.api.reporting import Listener
from ds4convert.api.values import PathLike
from ds4convert.checkpoint.config import parse_config
from ds4convert.checkpoint.inventory import Inventory, expected
from ds4convert.checkpoint.source import Source, imagined
from ds4convert.checkpoint.types import JSON
from ds4convert.derive import requantize
from ds4convert.errors import UsageError
from ds4convert.execution import run
from ds4convert.execution.rounding_steps import no_importance
from ds4convert.execution.workers import ENOUGH_WEIGHTS, rounding_pool
from ds4convert.hub.records import ListedFiles
from ds4convert.planning import build, side_files
from ds4convert.planning.build import Options, make_plan
from ds4convert.planning.layouts import layout_for
from ds4convert.planning.side_files import SideFiles
from ds4convert.planning.types import Plan

if TYPE_CHECKING:
    from ds4convert.evaluate.calibration import Calibration
    from ds4convert.evaluate.inputs import compensation
    from ds4convert.execution.completion import Completion


@dataclass(frozen=True)
class Prepared:
    """A plan, the source it is for (None: from a config alone), and what else a run of it needs.

    `fit` is the account of `mac` or `fit`, `ending` how the run ends where that is not the common way.
    """

    source: Source | None
    plan: Plan
    fit: JSON | None = None
    ending: Completion | None = None
    calibration: Calibration | None = None
    text: compensation.Prepared | None = None

    @property
    def share(self) -> float:
        """Return the share of all rows of a text that go to each expert of a layer."""
        if self.source is None:
            return 1.0
        config = self.source.inventory.config.raw
        picked, experts = (config.get(k) for k in ("num_experts_per_tok", "n_routed_experts"))
        return picked / experts if isinstance(picked, int) and isinstance(experts, int) and experts else 1.0


def prepare(source: Place | None, config: PathLike | None, options: ConversionOptions, listener: Listener) -> Prepared:
    """Return the plan for a source, or for a config alone; the listener is warned of what people should know of it."""
    if told := options.advice():
        listener.warn(told)
    settled = options.settled()
    if options.from_mlx:
        prepared = _of_converted(source, options, settled)
    elif source is not None:
        prepared = _of_source(source_of(source), not is_remote(source), options, settled)
    else:
        assert config is not None
        prepared = _of_config(config, options, settled)
    files = prepared.source.bytes if prepared.source is not None else None
    if isinstance(files, ListedFiles) and files.told:
        listener.warn(files.told)
    for told in _warnings(prepared):
        listener.warn(told)
    return prepared


def _of_source(source: Source, here: bool, options: ConversionOptions, settled: Options) -> Prepared:
    settled, text = _with_text(source.checkpoint.path if here else None, options, settled)
    settled, known = _calibrated(source.inventory, options, settled)
    settled, account = _fitted(source.inventory, source, options, settled, known)
    return Prepared(source, make_plan(source, settled), account, calibration=known, text=text)


def _of_config(config: PathLike, options: ConversionOptions, settled: Options) -> Prepared:
    _with_text(None, options, settled)
    if options.calibration is not None:
        raise UsageError("--calibration needs the weights: name SRC instead of --config")
    inventory = expected(parse_config(config_bytes(config), str(config)))
    settled, account = _fitted(inventory, None, options, settled)
    named, files = imagined(inventory)
    side = SideFiles({}, (), side_files.template(inventory.config.family.name))
    return Prepared(None, build.build(inventory, named, files, settled, side), account)


def _of_converted(source: Place | None, options: ConversionOptions, settled: Options) -> Prepared:
    if source is None or options.target is not None:
        raise UsageError(
            "--from-mlx needs a folder, and --mac and --fit measure official checkpoints",
            hint="use --recipe or --backbone",
        )
    base = requantize.opened(local(source))
    settled, text = _with_text(local(source), options, settled)
    settled, known = _calibrated(base.inventory, options, settled)
    made = requantize.plan(base, settled)
    return Prepared(made.source, made.plan, None, made.completion(), known, text)


def _with_text(
    folder: Path | None, options: ConversionOptions, settled: Options
) -> tuple[Options, compensation.Prepared | None]:
    """Return the options with the text of compensated rounding, and that text in tokens for the model in `folder`."""
    from ds4convert.evaluate.inputs import compensation

    text = compensation.prepared(folder, list(options.calibrate), options.rounding, options.calibration_tokens)
    if text is None:
        return settled, None
    return replace(settled, text=build.Text(text.rows.digest, text.rows.tokens)), text


def _calibrated(
    inventory: Inventory, options: ConversionOptions, settled: Options
) -> tuple[Options, Calibration | None]:
    """Return the options with the calibration that was named, and that calibration."""
    if options.calibration is None:
        return settled, None
    from ds4convert.evaluate import calibration

    known = calibration.read(options.calibration, inventory)
    return replace(settled, calibration=known), known


def _fitted(
    inventory: Inventory, source: Source | None, options: ConversionOptions, settled: Options,
    calibration: Calibration | None = None,
) -> tuple[Options, JSON | None]:  # fmt: skip
    """Return the options with the formats that `mac` or `fit` chooses, and its account; as they are without."""
    if options.target is None:
        return settled, None
    from ds4convert.fit import format_errors, size_budget

    held = _held(inventory, options.context, str(source.checkpoint.path if source else "the config"))
    room = size_budget.Room(options.target, options.context, *held, options.mac)
    if source is None:
        found = size_budget.fit(inventory, settled, format_errors.imagined(settled.rounding), room)
    else:
        make_plan(source, settled)  # a checkpoint that is not whole is told of before it is measured
        weigh = calibration.importance if calibration else no_importance
        with run.reading(source) as read, rounding_pool(ENOUGH_WEIGHTS, cores=options.cores) as pool:
            errors = format_errors.measured(source.named, settled, read, pool, weigh)
            known = calibration.sensitivities if calibration else None
            found = size_budget.fit(inventory, settled, errors, room, known)
    return replace(settled, recipe=found.recipe), found.facts


def _held(inventory: Inventory, context: int, where: str) -> tuple[int, int]:
    """Return the bytes of (decode state of a context, working set) that a model holds beside its weights."""
    from ds4convert.fit import memory
    from ds4convert.inference.load import cache_size_bytes, read_args, working_set_bytes

    if inventory.config.family.state:
        return memory.state_bytes(inventory, context), memory.working_bytes(inventory.config)
    args = read_args(dict(inventory.config.raw), where)
    return cache_size_bytes(args, context, 2), working_set_bytes(args)


def _warnings(prepared: Prepared) -> Iterator[str]:
    """Yield what people should know of a plan before they carry it out."""
    made = prepared.plan
    lossy = sorted({s.format for s in made.steps if s.part == "mtp" and s.transform.startswith("quantize_")})
    if lossy:
        yield (
            f"the head is written as {', '.join(lossy)}. Heads are sensitive: on one published conversion a 4-bit "
            "head's acceptance fell from 59 % to 4 %. Run `ds4convert verify OUT --mtp` before you rely "
            "on it; `--mtp native` (the default) keeps it exact."
        )
    for host in layout_for(made.layout, made.family).hosts if lossy else ():
        if host.native_head:
            yield (
                f"{host.name} {host.versions} does not load such a head in layout {made.layout}; it does in layout "
                "vlm or universal"
            )
    if (
        prepared.calibration is not None
        and prepared.text is None
        and not any("importance" in s.params for s in made.steps)
    ):
        yield "--calibration has no effect here: with these formats nothing is rounded that it knows of"
