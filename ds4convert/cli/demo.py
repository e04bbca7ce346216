"""`synth` and `demo`: checkpoints to try the tool on, and the whole chain in one command."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from ds4convert.cli.session import Session, common
from ds4convert.cli.shell.group import cli
from ds4convert.cli.shell.kinds import CONFIG, FOLDER
from ds4convert.words import terminal


@cli.command()
@click.argument("out", type=FOLDER)
@click.option(
    "--config",
    default="tiny",
    show_default=True,
    type=CONFIG,
    metavar="FILE|flash|pro|tiny|flash-v41",
    help="The model's shape.",
)
@click.option("--layers", type=click.IntRange(1, 4096), help="Backbone layers. [default: as in the config]")
@click.option("--experts", type=click.IntRange(1, 65536), help="Routed experts. [default: as in the config]")
@click.option(
    "--head",
    metavar="KIND",
    help="Kind of head that the family has, such as classic or dspark, or none. [default: as in the config]",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Equal seeds give equal bytes.")
@click.option("--jobs", type=click.IntRange(1, 64), default=2, show_default=True, help="Workers.")
@common()
def synth(session: Session, out: Path, config: str, seed: int, jobs: int, **shape: Any) -> None:
    """Write a checkpoint of random values in the official format, of any size, to test and measure with.

    \b
    Example: ds4convert synth /tmp/two-layers --config flash --layers 2
    """
    from ds4convert.api.opening import config_bytes
    from ds4convert.demo import synth as synthesis
    from ds4convert.words.figures import size

    raw = synthesis.shrink(synthesis.parse(config_bytes(config), config), **shape)
    with session.progress(synthesis.total_bytes(raw), "writing") as progress:
        written = synthesis.write(raw, out, seed, jobs, progress)
    then = shlex.join(["ds4convert", "plan", str(out)])
    session.emit({"path": str(out), "bytes": written}, f"{size(written)} in {terminal.line(out)}", then)


@cli.command()
@click.argument("folder", type=FOLDER, default=Path("ds4convert-demo"), metavar="[DIR]")
@common()
def demo(session: Session, folder: Path) -> int:
    """Run the whole chain on the trained checkpoint that comes along: inspect, quantize, verify, diff, generate.

    DIR (default: ds4convert-demo) is new or of an earlier demo; what is finished in it is not done again.

    \b
    Example: ds4convert demo
    """
    from ds4convert.demo.demo import run

    facts = run(folder, session.say)
    session.emit(facts, f"\nAll of it is in {terminal.line(folder)}." if facts["ok"] else "\nThe demo failed.")
    if not facts["ok"]:
        session.fail("The demo failed.")
    return 0 if facts["ok"] else 1
