"""`graft` and `relayout`: a folder that is converted already, with a head put in or spelled for another host."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ds4convert.choices import PATH, LayoutName, Size
from ds4convert.cli.session import Session, cli, common, model_source, source_of
from ds4convert.errors import UsageError

if TYPE_CHECKING:
    from ds4convert.assembly import Assembly
    from ds4convert.convert import Source
    from ds4convert.graft import Graft
    from ds4convert.types import JSON


def _facts(made: Assembly, manifest: Path, resumed: bool, already_done: bool) -> JSON:
    return {
        "layout": made.account.layout,
        "head": made.account.head_kind,
        "files_written": [f.name for f in made.work.files],
        "files_kept": [made.account.files[n].name for n in made.kept],
        "bytes_written": sum(f.size for f in made.work.files),
        "resumed": resumed,
        "already_done": already_done,
        "manifest": str(manifest),
    }


@cli.command()
@click.argument("mlx_dir", type=PATH)
@click.option("--from", "src", metavar="SRC", help="The checkpoint with the head, in the official format.")
@click.option(
    "--out", type=PATH, help="Write a new folder; files that do not change are links where the disk has them."
)
@click.option("--in-place", is_flag=True, help="Put the head into MLX_DIR itself.")
@click.option("--mtp", metavar="FORMAT", help="Format of the head. [default: as recorded for the folder, else native]")
@click.option("--layout", type=LayoutName(), help="Where the head lies. [default: as the folder, else inline]")
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
    names as mlx-vlm writes them cannot stay, so such a folder needs --out. Of a SRC on the Hub only the head and what
    is compared is fetched.

    \b
    Example: ds4convert graft DeepSeek-V4-Flash-4bit --from DeepSeek-V4-Flash --out DeepSeek-V4-Flash-4bit-mtp
             ds4convert graft DeepSeek-V4-Flash-4bit --from hf://deepseek-ai/DeepSeek-V4-Flash --in-place
             ds4convert graft --remove DeepSeek-V4-Flash-4bit
    """
    from ds4convert import inplace

    given = click.get_current_context()
    if remove:
        others = [p for p in given.params if given.get_parameter_source(p) is click.core.ParameterSource.COMMANDLINE]
        if unfit := sorted(set(others) - {"mlx_dir", "remove"}):
            raise UsageError(f"--remove takes nothing but MLX_DIR; leave out {', '.join(unfit)}")
        _remove(session, mlx_dir)
        return
    if src is None:
        raise UsageError("name the checkpoint with the head: --from SRC")
    if (out is None) == (not in_place):
        raise UsageError("say where the result goes: either --out DIR or --in-place")
    if out is None and inplace.recover(mlx_dir) == inplace.GRAFTED:
        facts = {"manifest": str(mlx_dir / "ds4convert_manifest.json"), "resumed": True, "already_done": True}
        session.emit(facts, f"{mlx_dir}: finished the graft that an earlier run had begun.")
        return
    _graft(session, mlx_dir, source_of(src), out, **choices)


def _graft(
    session: Session, mlx_dir: Path, source: Source, out: Path | None, mtp: str | None, layout: str | None,
    max_shard_size: int, force: bool, overwrite: bool, jobs: int,
) -> None:  # fmt: skip
    from ds4convert import convert, inplace, report
    from ds4convert import graft as grafting
    from ds4convert.layouts import layout_of
    from ds4convert.plan import check_limit
    from ds4convert.recipes import check_format

    request = grafting.Request(
        layout_of(layout) if layout else None, check_format(mtp) if mtp else None, check_limit(max_shard_size), force
    )
    src = source.checkpoint.path
    for a, b in ((src, mlx_dir), *(((src, out), (mlx_dir, out)) if out else ())):
        convert.check_places(a, b)
    planned: Graft = grafting.plan(mlx_dir, source, request, model_source())
    session.note(f"checked: {planned.checked}")
    for text in planned.warnings:
        session.warn(text)
    made = planned.made
    with session.progress(grafting.work(made, out is None), "writing") as progress:
        if out is None:
            changed = inplace.graft(planned, jobs, overwrite, progress)
            facts = _facts(made, mlx_dir / "ds4convert_manifest.json", changed.resumed, False)
        else:
            outcome = grafting.run(planned, out, jobs, overwrite, progress)
            facts = _facts(made, outcome.manifest, outcome.resumed, outcome.already_done)
    facts |= {"checked": planned.checked, "warnings": list(planned.warnings)}
    session.emit(facts, report.rearranged(facts, str(out or mlx_dir)))


def _remove(session: Session, mlx_dir: Path) -> None:
    from ds4convert import inplace

    done = inplace.recover(mlx_dir) == inplace.REMOVED
    changed = inplace.Changed((), (), True) if done else inplace.remove(mlx_dir, model_source())
    facts = {"removed": list(changed.removed), "restored": list(changed.written), "resumed": changed.resumed}
    session.emit(facts, f"{mlx_dir}: the head is out; the folder is what it was without it.")


@cli.command()
@click.argument("mlx_dir", type=PATH)
@click.argument("out", type=PATH)
@click.option("--layout", type=LayoutName(), required=True, help="Whose spelling.")
@click.option(
    "--drafter", type=PATH, metavar="DIR", help="The head's folder, where it lies apart, as mlx-vlm writes it."
)
@click.option("--overwrite", is_flag=True, help="Replace a conversion that OUT holds; other files in OUT stay.")
@click.option("--jobs", type=click.IntRange(1, 64), default=2, show_default=True, help="Workers.")
@common()
def relayout(
    session: Session, mlx_dir: Path, out: Path, layout: str, drafter: Path | None, overwrite: bool, jobs: int
) -> None:
    """Write the converted folder MLX_DIR again in another host's spelling: the same values, byte for byte.

    MLX_DIR may be of mlx-lm and its branches, mlx-vlm, oMLX or MTPLX too. OUT is what `quantize --layout NAME` would
    have written. Files that do not change are hard links where the disk
    has them, after their digests have been checked. Run it again after an interruption: it goes on.

    \b
    Example: ds4convert relayout DeepSeek-V4-Flash-mlx DeepSeek-V4-Flash-mtplx --layout mtplx
    """
    from ds4convert import relayout as relaying
    from ds4convert import report
    from ds4convert.layouts import layout_of

    place = layout_of(layout)
    made = relaying.plan(mlx_dir, place, model_source() if place.model_file else b"", drafter)
    with session.progress(relaying.work(made), "writing") as progress:
        outcome = relaying.run(made, out, jobs, overwrite, progress)
    facts = _facts(made, outcome.manifest, outcome.resumed, outcome.already_done)
    session.emit(facts, report.rearranged(facts, str(out)))
