"""The commands of the contract: parse, call, report, exit code. Heavy imports live inside the commands."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ds4convert.choices import PATH, F, conversion_options, generation_options, verify_options
from ds4convert.errors import UsageError

if TYPE_CHECKING:
    from ds4convert.convert import Source
    from ds4convert.plan import Options
    from ds4convert.types import Plan


@dataclass
class Session:
    """What every command shares: how much to say, and where."""

    verbose: int = 0
    quiet: bool = False
    as_json: bool = False

    def emit(self, facts: Any, text: str) -> None:
        """Print the result: one JSON document, or text for people."""
        click.echo(json.dumps(facts) if self.as_json else text)

    def note(self, text: str) -> None:
        """Say something on the way, on standard error."""
        if not self.quiet:
            click.echo(text, err=True)

    def warn(self, text: str) -> None:
        """Say on standard error what the user has to know, even with --quiet."""
        click.echo(f"Warning: {text}", err=True)

    @contextmanager
    def progress(self, total: int, what: str) -> Iterator[Callable[[int], None]]:
        """Yield a callback for numbers of bytes; shows a bar on a terminal."""
        if self.quiet or not sys.stderr.isatty():
            yield lambda n: None
            return
        from tqdm import tqdm

        bar = tqdm(total=total, unit="B", unit_scale=True, desc=what, smoothing=0.05, leave=False)
        with bar:
            yield lambda n: bar.update(n) and None


def common(reports: bool = True) -> Callable[[F], F]:
    """Add -q, -v and (for commands that report) --json, and hand the command its `Session`."""

    def wrap(f: F) -> F:
        def set_up(ctx: click.Context, param: click.Parameter, value: Any) -> None:
            session = ctx.ensure_object(Session)
            if value:
                setattr(session, {"json": "as_json"}.get(param.name or "", param.name or ""), value)

        options = [
            click.option("-q", "--quiet", is_flag=True, expose_value=False, callback=set_up, help="Say less."),
            click.option(
                "-v",
                "--verbose",
                count=True,
                expose_value=False,
                callback=set_up,
                help="Say more; -vv shows tracebacks.",
            ),
        ]
        if reports:
            options.append(
                click.option(
                    "--json",
                    is_flag=True,
                    expose_value=False,
                    callback=set_up,
                    help="One JSON document on standard output.",
                )
            )
        for option in options:
            f = option(f)
        return click.pass_obj(f)  # type: ignore[return-value]

    return wrap


def _options(
    recipe: str, backbone: str | None, experts: str | None, mtp: str | None, keep_mtp: bool, layout: str,
    max_shard_size: int, hashing: bool, **_: Any,
) -> Options:  # fmt: skip
    from ds4convert.layouts import layout_of
    from ds4convert.plan import Options, check_limit
    from ds4convert.recipes import recipe_of

    if mtp and not keep_mtp:
        raise UsageError("--mtp FORMAT and --drop-mtp contradict each other")
    chosen = recipe_of(recipe).overridden(backbone, experts, mtp)
    place = layout_of(layout)
    source = _model_source() if place.model_file else b""
    return Options(chosen, place, keep_mtp, check_limit(max_shard_size), hashing, source)


def _model_source() -> bytes:
    """Return the text of the model file: the one thing of `inference/` that a converted folder can hold."""
    from ds4convert.inference.single_file import single_file_source

    return single_file_source().encode()


def _config_bytes(name: str) -> bytes:
    """Return the config of --config: a name that ships with the package, or a file."""
    from ds4convert.config import named_config
    from ds4convert.folder import read_small

    found = named_config(name)
    path = Path(name)
    return found if found is not None else read_small(path.parent, path.name)


def _local(src: str) -> Path:
    if src.startswith("hf://"):
        raise UsageError(f"{src}: reading from the Hub is not in this version; download the repo and name its folder")
    return Path(src)


class Commands(click.Group):
    """Lists commands in the order in which they are used, not by name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the command names in definition order."""
        return list(self.commands)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="ds4convert", message="%(version)s")
def cli() -> None:
    """Convert DeepSeek-V4 checkpoints to MLX with the multi-token-prediction head kept, and prove the result.

    \b
    Example: ds4convert quantize DeepSeek-V4-Flash DeepSeek-V4-Flash-mlx
             ds4convert verify DeepSeek-V4-Flash-mlx --source DeepSeek-V4-Flash
    """


@cli.command()
@click.argument("src", required=False)
@click.option("--config", metavar="FILE|flash|pro|tiny", help="Say what such a model holds, from its config alone.")
@click.option("--tensors", metavar="GLOB", help="List the tensors whose names match.")
@common()
def inspect(session: Session, src: str | None, config: str | None, tensors: str | None) -> None:
    """Show what a checkpoint is and holds, from its headers alone.

    \b
    Example: ds4convert inspect DeepSeek-V4-Flash
             ds4convert inspect --config flash --tensors 'mtp.0.*proj*'
    """
    from ds4convert import inspection, report

    if (src is None) == (config is None):
        raise click.UsageError("name either SRC or --config")
    found = (
        inspection.inspect_config(_config_bytes(config), config) if config else inspection.inspect(_local(src or ""))
    )
    if tensors is None:
        session.emit(found.as_json(), report.inspection(found))
    else:
        rows = found.matching(tensors)
        session.emit(found.as_json() | {"matching": rows}, report.tensors(rows))


def _planned(src: str | None, config: str | None, options: Options) -> tuple[Source | None, Plan]:
    from ds4convert import convert, sidefiles, summary
    from ds4convert import plan as plans
    from ds4convert.config import parse_config
    from ds4convert.inventory import expected

    if config is None:
        source = convert.open_source(_local(src or ""))
        return source, convert.make_plan(source, options)
    inventory = expected(parse_config(_config_bytes(config), config))
    named, files = summary.imagined(inventory)
    side = plans.SideFiles({}, (), sidefiles.template(inventory.config.family.name))
    return None, plans.build(inventory, named, files, options, side)


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
             ds4convert plan --config pro
    """
    from ds4convert import report, summary

    if (src is None) == (config is None):
        raise click.UsageError("name either SRC or --config")
    _, made = _planned(src, config, _options(**choices))
    facts = summary.summarise(made, out, jobs)
    session.emit(facts | ({"steps": summary.full(made)} if full else {}), report.plan(facts))


@cli.command()
@click.argument("src")
@click.argument("out", type=PATH)
@click.option("--overwrite", is_flag=True, help="Replace a conversion that OUT holds; other files in OUT stay.")
@conversion_options
@common()
def quantize(session: Session, src: str, out: Path, overwrite: bool, jobs: int, **choices: Any) -> None:
    """Convert the checkpoint SRC into the MLX folder OUT. Run it again after an interruption: it goes on.

    \b
    Example: ds4convert quantize DeepSeek-V4-Flash DeepSeek-V4-Flash-mlx --keep-mtp
    """
    import time

    from ds4convert import convert, report, summary

    start = time.monotonic()
    source, made = _planned(src, None, _options(**choices))
    assert source is not None
    facts = summary.summarise(made, out, jobs)
    with session.progress(facts["output_bytes"], "converting") as progress:
        outcome = convert.run(source, made, out, jobs, overwrite, progress)
    seconds = time.monotonic() - start
    facts |= {"seconds": round(seconds, 3), "bytes_per_second": round(facts["output_bytes"] / seconds)}
    facts |= {
        "resumed": outcome.resumed,
        "already_done": outcome.already_done,
        "manifest": str(outcome.manifest),
    }
    session.emit(facts, report.conversion(facts, str(out)))


def _without_effect(options: dict[str, Any], report: bool, level: str | None) -> list[str]:
    """Return a sentence for each option of `verify` that was given and that this run has no use for."""
    context = click.get_current_context()
    given = {n for n in options if context.get_parameter_source(n) is click.core.ParameterSource.COMMANDLINE}
    decodes = (options["mtp"] or report or level == "decode") and not options["layerwise"]
    runs = decodes or options["layerwise"] or level == "numerics"
    needs = {
        "atol": (options["reference"], "--reference"),
        "rtol": (options["reference"], "--reference"),
        "draft_depth": (decodes, "decoding: --mtp"),
        "max_tokens": (decodes, "decoding: --mtp or --level decode"),
        "prompts": (runs, "--mtp, --layerwise or --level numerics"),
        "dtype": (
            runs and not options["reference"],
            "--mtp, --layerwise or --level numerics, in float32 with --reference",
        ),
    }
    return [
        f"--{name.replace('_', '-')} has no effect here; it is for {what}"
        for name, (used, what) in needs.items()
        if name in given and not used
    ]


@cli.command()
@click.argument("mlx_dir", type=PATH)
@verify_options
@common()
def verify(
    session: Session, mlx_dir: Path, source: str | None, level: str | None, page: Path | None, **options: Any
) -> int:
    """Check a converted folder: finished, complete, unaltered, and equal to its source. Exit code 1 if not.

    \b
    Example: ds4convert verify DeepSeek-V4-Flash-mlx --source DeepSeek-V4-Flash
             ds4convert verify DeepSeek-V4-Flash-mlx --mtp --draft-depth 2 --report flash.html

    \b
    --mtp says one of:
      works        acceptance of first drafts at least 10 % and 1.5 times that of always proposing the commonest
                   token; the same against the backbone's choices on the prompts (5 %, 1.5 times);
                   below 40 % it is called weak (published heads: 59 to 82 %)
      useless      below that: wrong kind of head, over-quantized, wired wrongly; exit code 1
      scrambled    exchanging two parts of the head (norms, projections, matrices of two experts)
                   brings it nearer to the backbone by 3 standard errors, or each of two experts
                   fits the other's matrix by 3.5 standard errors; exit code 1
      no head      and whether it never had one, was dropped, or was stripped; exit code 1
      numerics off NaN or infinite values; decoding differs from prefill by over 0.002 in float32
                   (bfloat16: median KL over 0.005); perplexity of the best text over a quarter of
                   the vocabulary; greedy text with the head differs where the top-2 margin is over
                   0.001 in float32 (bfloat16: 0.5); exit code 1

    Altered bytes are named by the manifest's digests, unless it was written with --no-hash. Acceptance cannot see
    every exchange: in a folder whose manifest was recomputed after a change, only --source or --reference can tell
    for certain.
    """
    from ds4convert import html_report, mtp_check, report
    from ds4convert import verify as verifying

    for text in _without_effect(options, page is not None, level):
        session.warn(text)
    decodes = page is not None and not options["layerwise"]
    reached = mtp_check.level_of(level, options["mtp"], source is not None, decodes)
    depth = options.pop("draft_depth")
    given = _local(source) if source else None
    request = mtp_check.Request(mlx_dir, reached, source=given, depth=depth, wants_report=page is not None, **options)
    with session.progress(verifying.work(mlx_dir, source is not None), "verifying") as progress:
        outcome = mtp_check.run(request, session.note, progress)
    if page is not None:
        html_report.write(page, mlx_dir, outcome.as_json())
        session.note(f"Report: {page}")
    session.emit(outcome.as_json(), report.verification(outcome.checks, outcome.facts))
    return 0 if all(c.ok for c in outcome.checks) else 1


@cli.command()
@click.argument("a")
@click.argument("b")
@click.option("--jobs", type=click.IntRange(1, 64), default=2, show_default=True, help="Workers.")
@common()
def diff(session: Session, a: str, b: str, jobs: int) -> int:
    """Compare two checkpoints tensor by tensor, whatever their format and spelling. Exit code 1 if they differ.

    \b
    Example: ds4convert diff DeepSeek-V4-Flash DeepSeek-V4-Flash-mlx
    """
    from ds4convert import compare, report
    from ds4convert.inspection import view_of

    first, second = view_of(_local(a)), view_of(_local(b))
    with session.progress(sum(t.size for t in first.tensors.values()), "comparing") as progress:
        facts = compare.summarise(compare.compare_views(first, second, jobs, progress))
    session.emit(facts, report.differences(facts))
    return 1 if facts["changed"] or facts["only_a"] or facts["only_b"] else 0


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as e:
        raise UsageError(f"the prompt on standard input is not UTF-8 text: {e}") from None


@cli.command()
@click.argument("mlx_dir")
@generation_options
@common()
def generate(session: Session, mlx_dir: str, prompt: str | None, prompt_ids: str | None, **choices: Any) -> None:
    """Continue a prompt with a converted model: text on standard output as it comes, figures on standard error.

    With --mtp the head drafts and the backbone verifies; the text is distributed as without it, and equal when
    greedy (exactly so in float32). Without a head, --mtp is a warning and decoding goes on without it.

    \b
    Example: ds4convert generate DeepSeek-V4-Flash-mlx --prompt "Why is the sky blue?" --mtp
             ds4convert generate DeepSeek-V4-Flash-mlx --raw --prompt "Once upon a time" --temp 0.7 --seed 1
             ds4convert generate DeepSeek-V4-Flash-mlx --prompt-ids 0,128,7 --max-tokens 20 --json
    """
    from ds4convert import generation, report

    text = _standard_input() if prompt == "-" else prompt
    ids = generation.parse_ids(prompt_ids) if prompt_ids is not None else None
    running = generation.prepare(_local(mlx_dir), generation.Request(text, ids, **choices), session.warn)
    if session.verbose and running.text is not None:
        session.note(f"prompt: {running.text!r}")
    for piece in running.pieces():
        if not session.as_json:
            click.echo(piece, nl=False)
    facts = running.facts()
    session.emit(facts, "")
    session.note(report.generation(facts))


@cli.command()
@click.argument("out", type=PATH)
@click.option("--config", default="tiny", show_default=True, metavar="FILE|flash|pro|tiny", help="The model's shape.")
@click.option("--layers", type=click.IntRange(1, 4096), help="Backbone layers. [default: as in the config]")
@click.option("--experts", type=click.IntRange(1, 65536), help="Routed experts. [default: as in the config]")
@click.option(
    "--head",
    type=click.Choice(["classic", "dspark", "none"]),
    help="Kind of head. [default: as in the config]",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Equal seeds give equal bytes.")
@click.option("--jobs", type=click.IntRange(1, 64), default=2, show_default=True, help="Workers.")
@common()
def synth(
    session: Session,
    out: Path,
    config: str,
    layers: int | None,
    experts: int | None,
    head: str | None,
    seed: int,
    jobs: int,
) -> None:
    """Write a checkpoint of random values in the official format, of any size, to test and measure with.

    \b
    Example: ds4convert synth /tmp/two-layers --config flash --layers 2
    """
    from ds4convert import synth as synthesis
    from ds4convert.report import size

    raw = synthesis.shrink(synthesis.parse(_config_bytes(config), config), layers, experts, head)
    with session.progress(synthesis.total_bytes(raw), "writing") as progress:
        written = synthesis.write(raw, out, seed, jobs, progress)
    session.emit({"path": str(out), "bytes": written}, f"{size(written)} in {out}")


@cli.command()
@click.argument("folder", type=PATH, default=Path("ds4convert-demo"), metavar="[DIR]")
@common()
def demo(session: Session, folder: Path) -> int:
    """Run the whole chain on the trained checkpoint that comes along: inspect, quantize, verify, diff, generate.

    DIR (default: ds4convert-demo) is new or of an earlier demo; what is finished in it is not done again.

    \b
    Example: ds4convert demo
    """
    from ds4convert.demo import run

    facts = run(folder, (lambda text: None) if session.as_json or session.quiet else click.echo)
    session.emit(facts, f"\nAll of it is in {folder}." if facts["ok"] else "\nThe demo failed.")
    return 0 if facts["ok"] else 1
