"""`graft` and `relayout`: a folder that is converted already, with a head put in or spelled for another host."""

from __future__ import annotations

from pathlib import Path

import click

from ds4convert.choices import PATH, LayoutName
from ds4convert.cli.session import Session, cli, common, model_source


@cli.command()
@click.argument("mlx_dir", type=PATH)
@click.argument("out", type=PATH)
@click.option("--layout", type=LayoutName(), required=True, help="Whose spelling.")
@click.option("--overwrite", is_flag=True, help="Replace a conversion that OUT holds; other files in OUT stay.")
@click.option("--jobs", type=click.IntRange(1, 64), default=2, show_default=True, help="Workers.")
@common()
def relayout(session: Session, mlx_dir: Path, out: Path, layout: str, overwrite: bool, jobs: int) -> None:
    """Write the converted folder MLX_DIR again in another host's spelling: the same values, byte for byte.

    OUT is what `quantize --layout NAME` would have written. Files that do not change are hard links where the disk
    has them, after their digests have been checked. Run it again after an interruption: it goes on.

    \b
    Example: ds4convert relayout DeepSeek-V4-Flash-mlx DeepSeek-V4-Flash-mtplx --layout mtplx
    """
    from ds4convert import relayout as relaying
    from ds4convert import report
    from ds4convert.layouts import layout_of

    place = layout_of(layout)
    made = relaying.plan(mlx_dir, place, model_source() if place.model_file else b"")
    with session.progress(relaying.work(made), "writing") as progress:
        outcome = relaying.run(made, out, jobs, overwrite, progress)
    facts = {
        "layout": place.name,
        "files_written": [f.name for f in made.work.files],
        "files_kept": [made.account.files[n].name for n in made.kept],
        "bytes_written": sum(f.size for f in made.work.files),
        "resumed": outcome.resumed,
        "already_done": outcome.already_done,
        "manifest": str(outcome.manifest),
    }
    session.emit(facts, report.rearranged(facts, str(out)))
