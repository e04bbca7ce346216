"""`graft` and `relayout`: a folder that is converted already, with a head put in or spelled for another host."""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ds4convert.cli.session import Session, common, is_given
from ds4convert.cli.shell.group import cli
from ds4convert.cli.shell.kinds import FOLDER, FORMAT, LAYOUT, SOURCE, Size
from ds4convert.errors import UsageError
from ds4convert.words import terminal

if TYPE_CHECKING:
    from ds4convert.api.deriving import Rearranged


@cli.command()
@click.argument("mlx_dir", type=FOLDER)
@click.option("--from", "src", type=SOURCE, metavar="SRC", help="Who has the head: official, converted, or a drafter.")
@click.option(
    "--out", type=FOLDER, help="Write a new folder; files that do not change are links where the disk has them."
)
@click.option("--in-place", is_flag=True, help="Put the head into MLX_DIR itself.")
@click.option(
    "--mtp",
    type=FORMAT,
    metavar="FORMAT",
    help="Format of the head. [default: as recorded for the folder, else native]",
)
@click.option("--layout", type=LAYOUT, help="Where the head lies. [default: as the folder, else inline]")
@click.option("--max-shard-size", type=Size(), default="5GB", show_default=True, help="Largest shard.")
@click.option("--force", is_flag=True, help="Graft although the backbone's values are not those of SRC.")
@click.option("--overwrite", is_flag=True, help="Start over what OUT holds, or what was begun with other settings.")
@click.option("--remove", is_flag=True, help="Take the head out of MLX_DIR again: it is what it was before.")
@click.option("--jobs", type=click.IntRange(1, 64), default=2, show_default=True, help="Workers.")
@common()
def graft(
    session: Session, mlx_dir: Path, src: str | None, out: Path | None, in_place: bool, remove: bool, **choices: Any
) -> None:
    """Add the MTP head of SRC to MLX_DIR, a converted folder without one, whoever converted it.

    Family, dims and layers have to agree, and the values of some norms and router tensors where SRC has them: the
    head of another training run would not fit. The result is what `quantize` would have written with the head kept.
    Run it again after an interruption: it goes on. In place, the folder is the old one or unfinished at any moment;
    names as mlx-vlm writes them cannot stay, so such a folder needs --out. A head that is converted already (an mlx-vlm
    drafter, or in a converted folder) keeps its format. Of a SRC on the Hub only the head and what
    is compared is fetched.

    \b
    Example: ds4convert graft DeepSeek-V4-Flash-4bit --from DeepSeek-V4-Flash --out DeepSeek-V4-Flash-4bit-mtp
             ds4convert graft DeepSeek-V4-Flash-4bit --from hf://deepseek-ai/DeepSeek-V4-Flash --in-place
             ds4convert graft --remove DeepSeek-V4-Flash-4bit
    """
    from ds4convert.api import deriving

    if remove:
        fit = {"mlx_dir", "remove"}
        params = [p for p in click.get_current_context().command.params if p.expose_value]
        if unfit := sorted(p.opts[0] for p in params if p.name not in fit and is_given(str(p.name))):
            raise UsageError("--remove takes nothing but MLX_DIR", hint=f"leave out {', '.join(unfit)}")
        _remove(session, mlx_dir)
        return
    options = deriving.GraftOptions(**choices)
    with session.listening() as heard:
        done = deriving.graft(mlx_dir, src, out=out, in_place=in_place, options=options, **heard)
    _report_graft(session, done)


def _report_graft(session: Session, done: Rearranged) -> None:
    from ds4convert.report import text as report

    where, then = terminal.line(done.folder), shlex.join(["ds4convert", "verify", str(done.folder), "--mtp"])
    if done.facts:
        session.emit(done.as_json(), partial(report.rearranged, out=where), then)
    elif done.resumed:
        session.emit(done.as_json(), f"{where}: finished the graft that an earlier run had begun.")
    else:
        session.emit(done.as_json(), f"{where}: has this head already; nothing was to do.")


def _remove(session: Session, mlx_dir: Path) -> None:
    from ds4convert.api import deriving

    done = deriving.graft(mlx_dir, remove=True)
    out = "the head is out; the folder is what it was without it."
    told = "has no head; there is nothing to remove." if done.already_done else out
    session.emit(done.as_json(), f"{terminal.line(mlx_dir)}: {told}")


@cli.command()
@click.argument("mlx_dir", type=FOLDER)
@click.argument("out", type=FOLDER)
@click.option("--layout", type=LAYOUT, required=True, help="Whose spelling.")
@click.option(
    "--drafter", type=FOLDER, metavar="DIR", help="The head's folder, where it lies apart, as mlx-vlm writes it."
)
@click.option("--overwrite", is_flag=True, help="Replace a conversion that OUT holds; other files in OUT stay.")
@click.option("--jobs", type=click.IntRange(1, 64), default=2, show_default=True, help="Workers.")
@common()
def relayout(session: Session, mlx_dir: Path, out: Path, layout: str, **choices: Any) -> None:
    """Write the converted folder MLX_DIR again in another host's spelling: the same values, byte for byte.

    MLX_DIR may be of mlx-lm and its branches, mlx-vlm, oMLX or MTPLX too. OUT is what `quantize --layout NAME` would
    have written. Files that do not change are hard links where the disk
    has them, after their digests have been checked. Run it again after an interruption: it goes on.

    \b
    Example: ds4convert relayout DeepSeek-V4-Flash-mlx DeepSeek-V4-Flash-mtplx --layout mtplx
    """
    from ds4convert.api import deriving
    from ds4convert.report import text as report

    with session.listening() as heard:
        done = deriving.relayout(mlx_dir, out, layout, **choices, **heard)
    then = shlex.join(["ds4convert", "verify", str(out)])
    session.emit(done.as_json(), partial(report.rearranged, out=terminal.line(out)), then)
