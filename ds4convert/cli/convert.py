"""`inspect`, `plan`, `quantize`: what a checkpoint is, what a conversion would write, and the conversion."""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ds4convert.cli.options import PART, conversion_options
from ds4convert.cli.session import Session, common, is_given
from ds4convert.cli.shell.group import also_called, cli
from ds4convert.cli.shell.kinds import CONFIG, FOLDER, PATH, RESULT, SOURCE, Size
from ds4convert.words import terminal

if TYPE_CHECKING:
    from ds4convert.planning.parts import Part


@cli.command()
@click.argument("src", type=SOURCE, required=False)
@click.option(
    "--config",
    type=CONFIG,
    metavar="FILE|flash|pro|tiny|flash-v41",
    help="Say what such a model holds, from its config alone.",
)
@click.option("--tensors", metavar="GLOB", help="List the tensors whose names match.")
@click.option("--report", "page", type=PATH, metavar="FILE.html", help="Write one self-contained page to decide by: "
              "recipes, Macs, formats, bytes, where it comes from, what is proven.")  # fmt: skip
@common()
def inspect(session: Session, src: str | None, config: str | None, tensors: str | None, page: Path | None) -> None:
    """Show what a checkpoint is and holds, from its headers alone.

    Of a folder on this machine a few places are looked at as well: zeros tell of a download that was not finished.

    \b
    Example: ds4convert inspect DeepSeek-V4-Flash
             ds4convert inspect hf://deepseek-ai/DeepSeek-V4-Flash
             ds4convert inspect hf://deepseek-ai/DeepSeek-V4-Flash --report flash.html
             ds4convert inspect --config flash --tensors 'mtp.0.*proj*'
    """
    from ds4convert.api.asking import inspecting
    from ds4convert.report import text as report

    found = inspecting.inspect(src, config=config, tensors=tensors, report=page, say=session.hear)
    if tensors is None:
        session.result(found.as_json(), partial(report.inspection, found.facts))
    else:
        session.result(found.as_json(), lambda facts: report.tensors(facts["matching"]))


@cli.command()
@click.argument("src", type=SOURCE, required=False)
@click.option(
    "--config",
    type=CONFIG,
    metavar="FILE|flash|pro|tiny|flash-v41",
    help="Plan for such a model, from its config alone.",
)
@click.option("--out", type=FOLDER, default=Path(), help="Folder whose disk is checked. [default: here]")
@click.option("--full", is_flag=True, help="With --json: every step and byte range of the plan as well.")
@click.option("--parts", type=click.IntRange(1, 100_000), metavar="N",
              help="Divide the work into N parts: what each reads, writes and costs, and the commands.")  # fmt: skip
@conversion_options
@common()
def plan(
    session: Session, src: str | None, config: str | None, out: Path, full: bool, parts: int | None, **choices: Any
) -> None:
    """Show what `quantize` with the same options would write. Writes nothing.

    \b
    Example: ds4convert plan DeepSeek-V4-Flash --layout universal
             ds4convert plan --config flash --mac 128GB --context 32768
             ds4convert plan hf://deepseek-ai/DeepSeek-V4-Flash
    """
    from ds4convert.api import conversion
    from ds4convert.api.conversion_options import ConversionOptions
    from ds4convert.report import text as report

    options = ConversionOptions(**choices)
    session.warn_of_unused(options.without_effect())
    made = conversion.plan(src, options, config=config, out=out, say=session.hear)
    session.result(made.as_json(full, parts), report.plan)


@cli.command()
@click.argument("src", type=SOURCE)
@click.argument("out", type=RESULT)
@click.option("--overwrite", is_flag=True, help="Replace a conversion that OUT holds; other files in OUT stay.")
@click.option("--window", type=Size(), default="8GB", show_default=True,
              help="With SRC on the Hub or in a store: most bytes of it that lie on the disk at once.")  # fmt: skip
@PART
@click.option("--cluster", metavar="ADDRESS", help="Have the machines of a Ray cluster do the parts: HOST:PORT of its "
              "head, or auto on one of them. Needs the extra `ray` on all.")  # fmt: skip
@conversion_options
@common()
def quantize(
    session: Session, src: str, out: Path | str, window: int, part: Part | None, cluster: str | None, **choices: Any
) -> None:
    """Convert the checkpoint SRC into the MLX folder OUT. Run it again after an interruption: it goes on.

    A SRC on the Hub is not stored: its shards are fetched ahead of use and dropped after, each checked against the
    digest that the Hub lists. So is one in an object store (s3://, gs://, az://), where a file SHA256SUMS tells
    digests. OUT may be a folder of such a store: each file is put there when it is whole, replacing nothing.

    \b
    Example: ds4convert quantize DeepSeek-V4-Flash DeepSeek-V4-Flash-mlx --keep-mtp
             ds4convert quantize hf://deepseek-ai/DeepSeek-V4-Flash DeepSeek-V4-Flash-mlx --window 20GB
             ds4convert quantize s3://models/DeepSeek-V4-Flash s3://models/DeepSeek-V4-Flash-mlx
    """
    from ds4convert.api import conversion, opening
    from ds4convert.api.conversion_options import ConversionOptions
    from ds4convert.report import text as report

    overwrite = choices.pop("overwrite")
    options = ConversionOptions(**choices)
    session.warn_of_unused(options.without_effect())
    most = window if is_given("window") or opening.is_remote(src) else None
    with session.listening() as heard:
        how: conversion.RunChoices = {"overwrite": overwrite, "window": most, "part": part, "cluster": cluster}
        done = conversion.convert(src, out, options, **how, **heard)
    verify = ["verify", str(out), *([] if opening.is_remote(src) else ["--source", src])]
    then = shlex.join(["ds4convert", *(verify if isinstance(out, Path) else ["inspect", out])])
    session.emit(done.as_json(), partial(report.conversion, out=terminal.line(out)), then if done.manifest else "")


also_called("convert", quantize)
