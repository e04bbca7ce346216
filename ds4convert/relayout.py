"""A converted folder in another host's spelling: the same values, other names. The backbone's files are shared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ds4convert import assembly, convert, stored
from ds4convert.assembly import Assembly
from ds4convert.convert import Outcome, Source
from ds4convert.files import Disk
from ds4convert.inventory import Named
from ds4convert.layouts import Layout


def plan(path: Path, layout: Layout, model_source: bytes, drafter: Path | None = None) -> Assembly:
    """Return what `layout` makes of the converted folder at `path`; `model_source` as in `plan.Options`.

    `drafter` is the folder that holds its head, where that lies apart.

    Raises `InputError` where the folder is no whole conversion, or the layout's hosts do not load its head.
    """
    return assembly.relaid(stored.read(path, drafter), layout, model_source)


def work(made: Assembly) -> int:
    """Return about how many bytes a run reads, for a progress bar."""
    return sum(f.size for f in made.account.files)


def run(
    made: Assembly,
    out: Path,
    jobs: int = 2,
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda n: None,
    disk: Disk | None = None,
) -> Outcome:
    """Write the folder `out`, resuming what an earlier run left there. Errors as in `convert.run`."""
    base = made.base
    apart = tuple(dict.fromkeys((base.path, *(folder for folder, _ in base.places))))
    ending = assembly.ending(made, out, apart, progress)
    source = Source(base.folder.checkpoint, base.inventory, Named({}, ()))
    return convert.run(source, made.work, out, jobs, overwrite, progress, disk, ending=ending)
