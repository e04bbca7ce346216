"""A converted folder in another host's spelling: the same values, other names. The backbone's files are shared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ds4convert.checkpoint.names import Named
from ds4convert.checkpoint.source import Source
from ds4convert.converted import modules
from ds4convert.derive import derivation
from ds4convert.derive.derivation import Derivation
from ds4convert.execution import run as convert
from ds4convert.execution.run import Outcome
from ds4convert.files import Disk
from ds4convert.planning.layouts import Layout


def plan(path: Path, layout: Layout, model_source: bytes, drafter: Path | None = None) -> Derivation:
    """Return what `layout` makes of the converted folder at `path`; `model_source` as in `plan.Options`.

    `drafter` is the folder that holds its head, where that lies apart.

    Raises `InputError` where the folder is no whole conversion, or the layout's hosts do not load its head.
    """
    return derivation.with_layout(modules.read(path, drafter), layout, model_source)


def work(made: Derivation) -> int:
    """Return about how many bytes a run reads, for a progress bar."""
    return sum(f.size for f in made.result_plan.files)


def run(
    made: Derivation,
    out: Path,
    jobs: int = 2,
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda n: None,
    disk: Disk | None = None,
) -> Outcome:
    """Write the folder `out`, resuming what an earlier run left there. Errors as in `convert.run`."""
    base = made.base
    apart = tuple(dict.fromkeys((base.path, *(folder for folder, _ in base.bytes.places.values()))))
    ending = derivation.completion(made, out, apart, progress)
    source = Source(base.folder.checkpoint, base.inventory, Named({}, ())).reading(made.bytes)
    return convert.run(source, made.write_plan, out, convert.Way(jobs, overwrite, progress, disk or Disk()), ending)
