"""`calibrate`: how strong each input column of each matrix is on a text, for rounding to weigh errors by."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from ds4convert.cli.session import Session, common
from ds4convert.cli.shell.group import cli
from ds4convert.cli.shell.kinds import PATH, SOURCE, OneOf
from ds4convert.words import terminal


@cli.command()
@click.argument("src", type=SOURCE)
@click.argument("text", type=PATH, nargs=-1, required=True)
@click.argument("out", type=PATH)
@click.option("--max-tokens", type=click.IntRange(2), default=32768, show_default=True,
              help="Tokens of the texts to use, taken from all over them.")  # fmt: skip
@click.option(
    "--sequence", type=click.IntRange(2), default=512, show_default=True, help="Tokens that are run together."
)
@click.option("--sensitivity", is_flag=True, help="Measure as well what rounding each matrix alone does to the output: "
              "for --fit and --mac.")  # fmt: skip
@click.option("--sensitivity-tokens", type=click.IntRange(2), default=2048, show_default=True,
              help="Tokens of the texts to use for that.")  # fmt: skip
@click.option("--dtype", type=OneOf(["float32", "bfloat16"]), default="float32", show_default=True,
              help="Precision of the computation.")  # fmt: skip
@common()
def calibrate(session: Session, src: str, text: tuple[Path, ...], out: Path, **choices: Any) -> None:
    """Run TEXT through SRC, a checkpoint or a converted folder, and write what goes into each matrix to OUT.

    TEXT is a text file, a folder of them, or a file of JSON lines with `text` or `messages`; it may be given several
    times. One layer is in memory at a time. Give OUT to `quantize --calibration OUT`.

    \b
    Example: ds4convert calibrate DeepSeek-V4-Flash-mlx book.txt flash.calibration.safetensors
    """
    from ds4convert.api import calibrating

    with session.listening() as heard:
        done = calibrating.calibrate(src, text, out, calibrating.CalibrateOptions(**choices), **heard)
    told = f"{done.matrices:,} matrices over {done.tokens:,} tokens: {terminal.line(out)}"
    then = shlex.join(["ds4convert", "quantize", src, "OUT", "--recipe", "q3", "--calibration", str(out)])
    session.emit(done.as_json(), told, then)
