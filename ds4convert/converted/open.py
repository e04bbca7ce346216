"""Open any folder: what it is, with its tensors by key, its inventory, its bytes and where it came from.

`open_checkpoint` is the door for folders and files here, `hub.doors` the one for repos as well. Opening reads headers
and small files; it converts nothing, and what does not fit the config is told by what was opened.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ds4convert.checkpoint import provenance
from ds4convert.checkpoint.folder import Checkpoint, is_mlx, read_checkpoint
from ds4convert.checkpoint.inventory import Inventory, compare
from ds4convert.checkpoint.names import ignored_reason
from ds4convert.checkpoint.source import Source, open_source, recognised
from ds4convert.checkpoint.tensors import LogicalTensor, TensorView, plain_view, shifted
from ds4convert.checkpoint.types import DRAFTER, JSON, Finding, Provenance
from ds4convert.converted import modules, settings
from ds4convert.converted.folder import MlxFolder, is_drafter, second_head, with_unexplained
from ds4convert.converted.modules import ConvertedModel
from ds4convert.storage.byte_source import ByteSource


@dataclass(frozen=True)
class PlainFiles:
    """Tensors without a config.json, such as a single file: nothing says what they should be."""

    checkpoint: Checkpoint

    @property
    def bytes(self) -> ByteSource:
        """Return what reads the files."""
        return self.checkpoint.bytes

    @property
    def view(self) -> TensorView:
        """Return the tensors, each under its own name, and what reads them."""
        return plain_view(self.checkpoint)

    @property
    def tensors(self) -> Mapping[str, LogicalTensor]:
        """Return the tensors, each under its own name."""
        return self.view.tensors

    @property
    def inventory(self) -> None:
        """Return None: without a config nothing is expected."""
        return

    @property
    def provenance(self) -> Provenance | None:
        """Return the repo and commit that the files came from, None where that is not known."""
        return provenance.of(self.checkpoint)


OpenCheckpoint = Source | ConvertedModel | PlainFiles
"""An official checkpoint, a converted model, or tensors that no config explains."""


def open_checkpoint(path: Path, head_alone: bool = False) -> OpenCheckpoint:
    """Return the checkpoint at `path`, a folder or a file here.

    `head_alone`: the head's files are enough, where the index names others too. Raises `InputError` for what cannot be
    read as a checkpoint, and for a converted folder that is unfinished.
    """
    return opened(read_checkpoint(path, head_alone=head_alone))


def opened(checkpoint: Checkpoint, origin: Provenance | None = None) -> OpenCheckpoint:
    """Return what a checkpoint is whose headers have been read, wherever it is. Raises as `open_checkpoint`.

    `origin` is where it is known to come from; else a folder here may tell.
    """
    if checkpoint.config is None:
        return PlainFiles(checkpoint)
    if is_drafter(checkpoint):
        return modules.open_head(checkpoint)
    if is_mlx(checkpoint):
        return modules.open_folder(checkpoint.path, checkpoint)
    return recognised(checkpoint, origin or (provenance.of(checkpoint) if checkpoint.is_here else None))


@dataclass(frozen=True)
class Comparable:
    """What `diff` compares of one side: all its tensors, what its config and small files say, what does not fit them.

    `said` is None where there is no config. `second` is the second copy of a head that a layout stores twice.
    """

    view: TensorView
    said: settings.Said | None = None
    findings: tuple[Finding, ...] = ()
    second: TensorView | None = None

    def beside(self, other: Comparable) -> TensorView:
        """Return the tensors to compare with another side's: a second copy of the head, where both have one, too."""
        if self.second is None or other.second is None:
            return self.view
        shift = len(self.view.names) - len(self.second.names)
        more = {f"{DRAFTER}/{k}": shifted(t, shift) for k, t in self.second.tensors.items()}
        return replace(self.view, tensors={**self.view.tensors, **more})


def comparable(path: Path) -> Comparable:
    """Return a local folder or file as `diff` takes it. Raises as `open_checkpoint`."""
    return compared(open_checkpoint(path))


def comparable_of(checkpoint: Checkpoint) -> Comparable:
    """Return a checkpoint whose headers have been read, wherever it is, as `diff` takes it."""
    return compared(opened(checkpoint))


def compared(found: OpenCheckpoint) -> Comparable:
    """Return what was opened as `diff` takes it.

    Tensors that its config does not imply are compared as well, each under its own name.
    """
    if isinstance(found, PlainFiles):
        return Comparable(found.view)
    if isinstance(found, ConvertedModel):
        said = settings.of_converted(found.folder, found.record)
        if found.is_head:
            return Comparable(found.view, said, found.folder.findings)
        view = _all_tensors(found.folder)
        return Comparable(view, said, found.folder.findings, second_head(found.folder))
    named, family = found.named.tensors, found.inventory.config.family
    ignored = {(t.file, t.start) for n, t in named.items() if ignored_reason(family, n)}
    view = with_unexplained(found.view, found.checkpoint, lambda t: (t.file, t.start) in ignored)
    headless = not any(family.is_of_head(n) for n in named)
    said = settings.of_official(found.checkpoint, family, found.inventory.config.raw, headless)
    problems = compare(found.inventory, found.named, found.checkpoint.file_names)
    alone = not headless and all(family.is_of_head(n) for n in named)
    return Comparable(view, said, tuple(p for p in problems if not alone or family.is_of_head(p.tensor)))


def beside(a: Comparable, b: Comparable) -> JSON:
    """Return how two sides differ beside their tensors, and which tensors do not fit the config of their side.

    Keys: `config` (list of `{key, a, b}`, values as JSON), `files` (list of `{file, a, b}`, sha256), `problems` (as
    those of `inspect`, with `side`); null is what a side does not have.
    """
    problems = [f.as_json() | {"side": side} for side, x in (("a", a), ("b", b)) for f in x.findings]
    if a.said is None or b.said is None:
        return {"config": [], "files": [], "problems": problems}
    config = [u.as_json("key") for u in settings.config_unlike(a.said, b.said)]
    return {
        "config": config,
        "files": [u.as_json("file") for u in settings.files_unlike(a.said, b.said)],
        "problems": problems,
    }


def _all_tensors(folder: MlxFolder) -> TensorView:
    """Return the view of a converted folder with the tensors, too, that its config does not imply."""
    extra = {f.tensor for f in folder.findings}
    view = with_unexplained(folder.view, folder.checkpoint, lambda t: not _concerns(t.name, extra))
    if folder.drafter is None:
        return view
    shift = len(folder.checkpoint.files)
    return with_unexplained(view, folder.drafter, lambda t: not _concerns(t.name, extra), shift)


def _concerns(name: str, findings: set[str]) -> bool:
    """Return whether a tensor is one that does not fit, or belongs to the same module as one."""
    stem = name.rpartition(".")[0]
    return bool({name, f"{stem}.weight", f"{stem}.scales", f"{stem}.biases"} & findings)


def inventory_of(path: Path) -> Inventory:
    """Return what a source or a whole converted folder holds. Raises `InputError` where it is neither."""
    found = open_checkpoint(path)
    if isinstance(found, ConvertedModel):
        return modules.read(path).inventory
    return found.inventory if isinstance(found, Source) else open_source(path).inventory
