"""`synth` and `demo`: checkpoints to try the tool on, and the whole chain in one command."""

from __future__ import annotations

from pathlib import Path

import click

from ds4convert.choices import PATH
from ds4convert.cli.session import Session, cli, common, config_bytes


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

    raw = synthesis.shrink(synthesis.parse(config_bytes(config), config), layers, experts, head)
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
