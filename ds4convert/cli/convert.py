"""`inspect`, `plan`, `quantize`: what a checkpoint is, what a conversion would write, and the conversion."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ds4convert.choices import PATH, Size, conversion_options
from ds4convert.cli.session import Session, cli, common, config_bytes, headers_of, local, model_source, source_of
from ds4convert.errors import UsageError

if TYPE_CHECKING:
    from ds4convert.calibration import Calibration
    from ds4convert.convert import Ending, Source
    from ds4convert.inventory import Inventory
    from ds4convert.plan import Options
    from ds4convert.types import JSON, Plan


@dataclass(frozen=True)
class Planned:
    """A plan, the source it is for (None: from a config alone), and the account of `--fit`."""

    source: Source | None
    plan: Plan
    fit: JSON | None = None
    ending: Ending | None = None
    calibration: Calibration | None = None


def _options(
    recipe: str, backbone: str | None, experts: str | None, mtp: str | None, keep_mtp: bool, layout: str,
    max_shard_size: int, hashing: bool, rounding: str, fit: int | None, **_: Any,
) -> Options:  # fmt: skip
    from ds4convert.layouts import layout_of
    from ds4convert.plan import Options, check_limit
    from ds4convert.recipes import recipe_of

    if mtp and not keep_mtp:
        raise UsageError("--mtp FORMAT and --drop-mtp contradict each other")
    if fit is None and recipe == "fit":
        raise UsageError("the recipe `fit` needs to know what to fit into; say --fit SIZE, such as --fit 96GB")
    if fit is not None and (backbone or experts or recipe not in {"native", "fit"}):
        raise UsageError("--fit chooses the formats of the backbone; it goes with no recipe, --backbone or "
                         "--experts (--mtp can)")  # fmt: skip
    chosen = recipe_of(recipe).overridden(backbone, experts, mtp)
    place = layout_of(layout)
    source = model_source() if place.model_file else b""
    limit = check_limit(max_shard_size)
    return Options(chosen, place, keep_mtp, limit, hashing, source, rounding)


def _warn_of_no_effect(session: Session, choices: dict[str, Any]) -> None:
    """Say of an option that was given and that this run has no use for that it has none, as `verify` does."""
    for name, needs, what in (("context", "fit", "--fit"), ("window", "window", "a SRC on the Hub")):
        given = click.get_current_context().get_parameter_source(name)
        if given is click.core.ParameterSource.COMMANDLINE and needs in choices and choices[needs] is None:
            session.warn(f"--{name} has no effect here; it is for {what}")


def _warn_of_rounding(session: Session, made: Plan) -> None:
    """Say so where a calibration was given and nothing is rounded by it."""
    if not any("importance" in s.params for s in made.steps):
        session.warn("--calibration has no effect here: with these formats nothing is rounded that it knows of")


def _warn_of_head(session: Session, made: Plan) -> None:
    """Say what is known where the head is not written at its own precision."""
    from ds4convert.layouts import layout_of

    lossy = sorted({s.format for s in made.steps if s.part == "mtp" and s.transform.startswith("quantize_")})
    if lossy:
        session.warn(
            f"the head is written as {', '.join(lossy)}. Heads are sensitive: on one published conversion a 4-bit "
            "head's acceptance fell from 59 % to 4 %. Run `ds4convert verify OUT --mtp` before you rely "
            "on it; `--mtp native` (the default) keeps it exact."
        )
    for host in layout_of(made.layout).hosts if lossy else ():
        if not host.native_head:
            continue
        session.warn(
            f"{host.name} {host.versions} does not load such a head in layout {made.layout}; it does in layout vlm or "
            "universal"
        )


def _warn(session: Session, planned: Planned) -> None:
    _warn_of_head(session, planned.plan)
    if planned.calibration is not None:
        _warn_of_rounding(session, planned.plan)


@cli.command()
@click.argument("src", required=False)
@click.option("--config", metavar="FILE|flash|pro|tiny", help="Say what such a model holds, from its config alone.")
@click.option("--tensors", metavar="GLOB", help="List the tensors whose names match.")
@common()
def inspect(session: Session, src: str | None, config: str | None, tensors: str | None) -> None:
    """Show what a checkpoint is and holds, from its headers alone.

    \b
    Example: ds4convert inspect DeepSeek-V4-Flash
             ds4convert inspect hf://deepseek-ai/DeepSeek-V4-Flash
             ds4convert inspect --config flash --tensors 'mtp.0.*proj*'
    """
    from ds4convert import inspection, losses, report

    if (src is None) == (config is None):
        raise click.UsageError("name either SRC or --config")
    if config:
        found = inspection.inspect_config(config_bytes(config), config)
    elif remote := headers_of(src or ""):
        found = inspection.inspect_checkpoint(remote)
    else:
        found = inspection.inspect(local(src or ""))
    if tensors is None:
        session.emit(found.as_json() | {"losses": losses.by_layer(found.manifest)}, report.inspection(found))
    else:
        rows = found.matching(tensors)
        session.emit(found.as_json() | {"matching": rows}, report.tensors(rows))


def _planned(src: str | None, config: str | None, choices: dict[str, Any]) -> Planned:
    from ds4convert import convert, sidefiles, summary
    from ds4convert import plan as plans
    from ds4convert.config import parse_config
    from ds4convert.inventory import expected

    options = _options(**choices)
    if choices["from_mlx"]:
        return _again(src, options, choices)
    if config is None:
        source = source_of(src or "")
        options, known = _calibrated(source.inventory, options, choices)
        options, account = _fit(source.inventory, source, options, choices, known)
        return Planned(source, convert.make_plan(source, options), account, calibration=known)
    if choices["calibration"]:
        raise UsageError("--calibration needs the weights: name SRC instead of --config")
    inventory = expected(parse_config(config_bytes(config), config))
    options, account = _fit(inventory, None, options, choices)
    named, files = summary.imagined(inventory)
    side = plans.SideFiles({}, (), sidefiles.template(inventory.config.family.name))
    return Planned(None, plans.build(inventory, named, files, options, side), account)


def _again(src: str | None, options: Options, choices: dict[str, Any]) -> Planned:
    from ds4convert import requantize

    if src is None or choices["fit"] is not None:
        raise UsageError(
            "--from-mlx needs a folder, and --fit measures official checkpoints; use --recipe or --backbone"
        )
    folder = local(src)
    base = requantize.opened(folder)
    options, known = _calibrated(base.inventory, options, choices)
    made = requantize.plan(base, options)
    return Planned(made.source, made.plan, None, made.ending(), known)


def _calibrated(inventory: Inventory, options: Options, choices: dict[str, Any]) -> tuple[Options, Calibration | None]:
    """Return the options with the calibration that was named, and that calibration."""
    if choices["calibration"] is None:
        return options, None
    from ds4convert import calibration

    if options.rounding == "nearest":
        raise UsageError("--calibration weighs the search of --rounding optimal; nearest has no use for it")
    known = calibration.read(choices["calibration"], inventory)
    return replace(options, calibration=known), known


def _fit(
    inventory: Inventory,
    source: Source | None,
    options: Options,
    choices: dict[str, Any],
    calibration: Calibration | None = None,
) -> tuple[Options, JSON | None]:
    """Return the options with the formats that --fit chooses, and the account of the choice; as they are without."""
    if choices["fit"] is None:
        return options, None
    from ds4convert import convert, fitting, measure
    from ds4convert.formats.quantize import no_importance
    from ds4convert.inference.load import cache_size_bytes, read_args, working_set_bytes
    from ds4convert.pool import ENOUGH_WEIGHTS, rounding_pool

    args = read_args(dict(inventory.config.raw), str(source.checkpoint.path if source else "the config"))
    context = choices["context"]
    room = fitting.Room(choices["fit"], context, cache_size_bytes(args, context, 2), working_set_bytes(args))
    if source is None:
        found = fitting.fit(inventory, options, measure.imagined(options.rounding), room)
    else:
        convert.make_plan(source, options)  # a checkpoint that is not whole is told of before it is measured
        weigh = calibration.importance if calibration else no_importance
        with convert.reading(source) as read, rounding_pool(ENOUGH_WEIGHTS) as pool:
            errors = measure.measured(source.named, options, read, pool, weigh)
            found = fitting.fit(inventory, options, errors, room)
    return replace(options, recipe=found.recipe), found.facts


@cli.command()
@click.argument("src", required=False)
@click.option("--config", metavar="FILE|flash|pro|tiny", help="Plan for such a model, from its config alone.")
@click.option("--out", type=PATH, default=Path(), help="Folder whose disk is checked. [default: here]")
@click.option("--full", is_flag=True, help="With --json: every step and byte range of the plan as well.")
@conversion_options
@common()
def plan(
    session: Session, src: str | None, config: str | None, out: Path, full: bool, jobs: int, **choices: Any
) -> None:
    """Show what `quantize` with the same options would write. Writes nothing.

    \b
    Example: ds4convert plan DeepSeek-V4-Flash --layout universal
             ds4convert plan --config flash --fit 96GB --context 32768
             ds4convert plan hf://deepseek-ai/DeepSeek-V4-Flash
    """
    from ds4convert import pace, report, summary

    if (src is None) == (config is None):
        raise click.UsageError("name either SRC or --config")
    _warn_of_no_effect(session, choices)
    planned = _planned(src, config, choices)
    made = planned.plan
    _warn(session, planned)
    facts = summary.summarise(made, out, jobs) | ({"fit": planned.fit} if planned.fit else {})
    facts["seconds_estimate"] = round(pace.seconds(made))
    session.emit(facts | ({"steps": summary.full(made)} if full else {}), report.plan(facts))


@cli.command()
@click.argument("src")
@click.argument("out", type=PATH)
@click.option("--overwrite", is_flag=True, help="Replace a conversion that OUT holds; other files in OUT stay.")
@click.option("--window", type=Size(), default="8GB", show_default=True,
              help="With SRC on the Hub: most bytes of it that lie on the disk at once.")  # fmt: skip
@conversion_options
@common()
def quantize(session: Session, src: str, out: Path, overwrite: bool, window: int, jobs: int, **choices: Any) -> None:
    """Convert the checkpoint SRC into the MLX folder OUT. Run it again after an interruption: it goes on.

    A SRC on the Hub is not stored: its shards are fetched ahead of use and dropped after, each checked against the
    digest that the Hub lists.

    \b
    Example: ds4convert quantize DeepSeek-V4-Flash DeepSeek-V4-Flash-mlx --keep-mtp
             ds4convert quantize hf://deepseek-ai/DeepSeek-V4-Flash DeepSeek-V4-Flash-mlx --window 20GB
    """
    import time

    from ds4convert import convert, report, summary
    from ds4convert.formats.quantize import no_importance
    from ds4convert.window import LEAST_WINDOW

    if window < LEAST_WINDOW:
        raise UsageError(f"--window {window}: expected at least {LEAST_WINDOW:,} bytes")
    start = time.monotonic()
    _warn_of_no_effect(session, choices | ({} if src.startswith("hf://") else {"window": None}))
    planned = _planned(src, None, choices)
    source, made = planned.source, planned.plan
    assert source is not None
    _warn(session, planned)
    facts = summary.summarise(made, out, jobs) | ({"fit": planned.fit} if planned.fit else {})
    weigh = planned.calibration.importance if planned.calibration else no_importance
    with session.progress(facts["output_bytes"], "converting") as progress:
        outcome = convert.run(
            source, made, out, jobs, overwrite, progress, None, weigh, ending=planned.ending, window_bytes=window
        )
    seconds = time.monotonic() - start
    facts |= {"seconds": round(seconds, 3), "bytes_per_second": round(facts["output_bytes"] / seconds)}
    facts |= {
        "resumed": outcome.resumed,
        "already_done": outcome.already_done,
        "manifest": str(outcome.manifest),
    }
    session.emit(facts, report.conversion(facts, str(out)))
