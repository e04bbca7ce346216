"""Compare every tensor of a converted folder with the checkpoint that it came from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ds4convert.checkpoint import compare
from ds4convert.checkpoint import inventory as inventories
from ds4convert.checkpoint.folder import read_checkpoint
from ds4convert.checkpoint.inventory import Inventory
from ds4convert.checkpoint.names import Speller
from ds4convert.checkpoint.source import Source, open_source
from ds4convert.checkpoint.tensors import LogicalTensor, TensorView
from ds4convert.converted import manifest, modules, settings
from ds4convert.converted.folder import MlxFolder, second_head
from ds4convert.converted.modules import ConvertedModel
from ds4convert.converted.open import open_checkpoint
from ds4convert.converted.records import Manifest, TensorRecord
from ds4convert.converted.settings import Said
from ds4convert.errors import InputError
from ds4convert.execution.workers import rounding_pool
from ds4convert.planning.layouts import head_stems_inside, layouts
from ds4convert.planning.parts import Part, names_of
from ds4convert.planning.types import RoundingError
from ds4convert.storage.records import SourceFile
from ds4convert.verification import rounded
from ds4convert.verification.checks import Check, _some
from ds4convert.verification.rounded import Again
from ds4convert.verification.structure import _folder
from ds4convert.words.figures import Progress


def against_source(
    path: Path,
    source: Path | Source,
    jobs: int = 2,
    progress: Progress = lambda n: None,
    weights: Path | None = None,
    part: Part | None = None,
) -> list[Check]:
    """Return the checks of a folder against a source checkpoint (its folder, or one opened): config, files, tensors.

    Where the format keeps the source's codes, codes and values both have to be equal; a dequantized tensor has to be
    the correctly rounded value; a quantized one is rounded again, with the calibration file `weights` where one was
    used, and has to be what comes of it, as far from the source as the manifest records. With `part`, tensors are
    compared that lie in the files of that part; tensors that the folder lacks are told of by every part.
    """
    opened = _opened(source)
    try:
        record = manifest.read(path)
        folder = _folder(path, read_checkpoint(path), record)
        views = _views(folder)
        said = settings.of_converted(folder, record)
    except InputError as e:
        return [Check("values", False, f"cannot be compared with the source: {e}")]
    checks = [Check("config", *_config(opened.said, said, record))]
    checks.append(Check("carried files", *_carried(opened.said, said)))
    if record is not None:
        checks.append(Check("source headers", *_same_source(record, opened)))
        checks.append(Check("left out", *_left_out(record, opened)))
    mine = None if part is None else _files_of(views, part)
    wanted = opened.view if mine is None else _not_in_others(opened.view, views, mine)
    views = views if mine is None else [(name, _kept(view, lambda t: t.file in mine)) for name, view in views]
    hows = rounded.hows(record)
    importance = rounded.calibration_of(weights, opened.inventory, hows)
    total = sum(rounded.weights_of(view, hows, said.kind != settings.OURS) for _, view in views)
    with rounding_pool(total) as pool:
        again = Again(hows, importance, pool, said.kind != settings.OURS)
        checks += _compared_values(folder, wanted, views, _losses(record), again, jobs, progress)
    return checks


def _files_of(views: Sequence[tuple[str, TensorView]], part: Part) -> frozenset[str]:
    """Return the files that a part compares, by the bytes of the tensors in each."""
    sizes: dict[str, int] = {}
    for _, view in views:
        for tensor in view.tensors.values():
            sizes[tensor.file] = sizes.get(tensor.file, 0) + tensor.size
    return names_of(sizes, part)


def _not_in_others(wanted: TensorView, views: Sequence[tuple[str, TensorView]], mine: frozenset[str]) -> TensorView:
    """Return the source's tensors but for those that the folder has in files of other parts alone."""
    files: dict[str, set[str]] = {}
    for _, view in views:
        for key, tensor in view.tensors.items():
            files.setdefault(key, set()).add(tensor.file)
    return _kept(wanted, lambda t: t.key not in files or bool(files[t.key] & mine))


def _kept(view: TensorView, wanted: Callable[[LogicalTensor], bool]) -> TensorView:
    return dataclasses.replace(view, tensors={k: t for k, t in view.tensors.items() if wanted(t)})


def _compared_values(
    folder: MlxFolder, wanted: TensorView, views: Sequence[tuple[str, TensorView]], losses: Losses,
    again: Again, jobs: int, progress: Progress,
) -> list[Check]:  # fmt: skip
    checks = []
    for name, view in views:
        ours = _without_head(wanted) if folder.head_kind == "none" else wanted
        if name:
            head = {k: t for k, t in ours.tensors.items() if t.part == inventories.HEAD}
            ours = dataclasses.replace(ours, tensors=head)
        checks.append(Check(f"values{name}", *_values(ours, view, losses, again, jobs, progress)))
    return checks


@dataclass(frozen=True)
class Opened:
    """What a folder is compared with: files and tensors by their headers, and the view of its values."""

    files: Sequence[SourceFile]
    tensors: Sequence[str]
    view: TensorView
    said: Said
    inventory: Inventory


def _opened(path: Path | Source) -> Opened:
    """Return an official checkpoint, or (the source of `--from-mlx`) a converted folder, opened."""
    if isinstance(path, Source):
        return _opened_source(path)
    found = open_checkpoint(path)
    if isinstance(found, ConvertedModel):
        base = modules.read(path)
        names = [name for m in base.modules for p in m.parts for name in p.names]
        said = settings.of_converted(base.folder, base.record)
        return Opened(base.files, names, base.folder.view, said, base.inventory)
    return _opened_source(found if isinstance(found, Source) else open_source(path))


def _opened_source(source: Source) -> Opened:
    view = source.view
    config = source.inventory.config
    headless = not any(config.family.is_of_head(n) for n in source.named.tensors)
    said = settings.of_official(source.checkpoint, config.family, config.raw, headless)
    names = [t.name for t in source.checkpoint.tensors()]
    return Opened(source.checkpoint.files, names, view, said, source.inventory)


Losses = Mapping[tuple[str, str], TensorRecord]
"""The manifest's records of the tensors that were rounded, by (file, name)."""


def _losses(record: Manifest | None) -> Losses:
    return {place: t for place, t in record.by_place().items() if t.error is not None} if record else {}


def _views(folder: MlxFolder) -> list[tuple[str, TensorView]]:
    """Return the folder's tensors, and those of a second copy of the head, each under the name of its check."""
    out = [("", folder.view)]
    second = second_head(folder)
    return out + ([(" of the head in mtp/", second)] if second else [])


def _without_head(view: TensorView) -> TensorView:
    kept = {k: t for k, t in view.tensors.items() if t.part != inventories.HEAD}
    return dataclasses.replace(view, tensors=kept)


def _config(source: Said, found: Said, record: Manifest | None) -> tuple[bool, str]:
    """Every key of the config that conversion does not write itself is the source's."""
    layout = layouts().get(record.layout) if record else None
    problems = settings.against_source(source, found, layout.model_file if layout else "")
    good = "every key that conversion does not write itself has the source's value"
    converted = record.config_sha256 if record else ""
    if converted and source.config_sha256 not in ("", converted):
        good += "; the source's config.json is another file than the one that was converted, with the same values"
    return _some(problems, good)


def _carried(source: Said, found: Said) -> tuple[bool, str]:
    problems = settings.files_against_source(source, found)
    return _some(problems, f"{len(source.files)} files beside the tensors (tokenizer and the like) are the source's")


def _same_source(record: Manifest, source: Opened) -> tuple[bool, str]:
    recorded = {f.name: f.header_sha256 for f in record.source.files}
    if not recorded:
        return True, "the manifest tells of no source: another program converted this folder"
    found = {f.name: f.header_sha256 for f in source.files}
    return _some(
        [
            f"{n}: not the file that was converted"
            for n in sorted({**recorded, **found})
            if recorded.get(n) != found.get(n)
        ],
        f"{len(found)} files, headers as recorded",
    )


def _left_out(record: Manifest, source: Opened) -> tuple[bool, str]:
    """Every source tensor is either in a record of the manifest or left out with a reason."""
    told = {n for t in record.tensors for n in t.sources} | {x.tensor for x in record.left_out}
    untold = {t.part for t in record.tensors if not t.sources}
    if inventories.BACKBONE in untold:
        return True, "the manifest does not tell what the tensors came from: another program converted them"
    own = {n for n in source.tensors if inventories.HEAD in untold and _is_of_head(source, n)}
    lost = [name for name in source.tensors if name not in told and name not in own]
    problems = [f"{name}: neither written nor left out" for name in lost]
    return _some(problems, f"every source tensor accounted for, {len(record.left_out)} left out with a reason")


def _is_of_head(source: Opened, name: str) -> bool:
    """Return whether a name, as found in the source, is of a tensor of the head."""
    family = source.inventory.config.family
    return family.is_of_head(Speller(family).official(name)) or name.startswith(head_stems_inside())


@dataclass
class _Values:
    """The answer about values, while tensors are compared one by one."""

    losses: Losses
    again: Again
    problems: list[str] = field(default_factory=list)
    equal: int = 0
    repeated: int = 0
    tied: int = 0
    by_error: int = 0
    by_text: int = 0
    worst: float = 0.0

    def add(self, key: str, a: LogicalTensor | None, b: LogicalTensor | None, d: compare.Difference) -> None:
        """Take in the comparison of one tensor."""
        record = self.losses.get((b.file, b.name)) if b is not None else None
        if b is not None and d.repeated is not None:
            self._rounded_again(f"{key} ({b.file})", d, d.repeated, record)
        elif b is not None and record is not None and d.status in {"same", "value"}:
            if self.again.is_compensated(b):
                self.by_text += 1
            else:
                self.by_error += 1
            self._error(f"{key} ({b.file})", d, record.error)
        elif d.status == "same" or _correctly_rounded(a, b, d):
            self.equal += 1
        elif d.status == "missing":
            self.problems.append(f"{key}: {'not in the folder' if b is None else 'not in the source'}")
        elif d.status == "shape":
            self.problems.append(f"{key}: shapes {d.detail}")
        else:
            place = list(d.first or ())
            self.problems.append(f"{key} ({b.file if b else ''}): differs first at {place}, by up to {d.max_abs:.3g}")

    def _rounded_again(
        self, what: str, d: compare.Difference, r: compare.Repeated, record: TensorRecord | None
    ) -> None:
        self.repeated, self.tied = self.repeated + 1, self.tied + r.tied
        place = list(r.first or ())
        if r.unlike > r.tied:
            self.problems.append(
                f"{what}: {r.unlike - r.tied} of {r.groups} groups are not what rounding the source gives, "
                f"first at {place}"
            )
        elif r.tied and record is not None and record.xxh3_128 is None:
            self.problems.append(
                f"{what}: {r.tied} of {r.groups} groups are stored otherwise than they are rounded here, with the same "
                f"error, first at {place}: altered, or converted on another kind of processor; without digests "
                "(--no-hash) only that kind can tell"
            )
        elif record is not None:
            self._error(what, d, record.error)

    def _error(self, what: str, d: compare.Difference, loss: RoundingError | None) -> None:
        self.worst = max(self.worst, d.relative_square)
        if loss is not None and not _as_recorded(d, loss):
            self.problems.append(
                f"{what}: error {d.relative_square:.3g} (squared, relative), at most {d.max_abs:.3g}; recorded "
                f"{loss.relative_square} and {loss.max_abs}"
            )

    def result(self) -> tuple[bool, str]:
        """Return whether all is good, and the sentence."""
        text = f"{self.equal} weights equal to the source, value for value"
        if self.repeated:
            text += f"; {self.repeated} rounded, code for code what rounding the source again gives"
        if self.tied:
            text += f" (but for {self.tied} groups as good: this is another kind of processor)"
        if self.by_error:
            text += (
                f"; {self.by_error} compared by their recorded errors alone: their rounding cannot be repeated here "
                "(one weighed by a calibration needs --calibration FILE)"
            )
        if self.by_text:
            text += (
                f"; {self.by_text} rounded against a text (compensated): each value is one of its format, and the "
                "errors are those recorded; the rounding itself is not repeated, as the inputs that it went by are not "
                "kept"
            )
        if self.losses:
            text += f"; errors as recorded, {self.worst:.3g} (squared, relative) at most"
        return _some(self.problems, text)


def _values(
    wanted: TensorView, found: TensorView, losses: Losses, again: Again, jobs: int, progress: Progress
) -> tuple[bool, str]:
    told = _Values({k: r for k, r in losses.items() if k in {(t.file, t.name) for t in found.tensors.values()}}, again)
    for compared in compare.compare_views(wanted, found, jobs, progress, again):
        told.add(*compared)
    return told.result()


RECORDED_WITHIN = 1e-3
"""Relative difference between a recorded error and one found, for processors that sum in other orders."""


def _as_recorded(d: compare.Difference, loss: RoundingError) -> bool:
    """Return whether a tensor is as far from its source as the manifest says."""
    pairs = ((d.relative_square, loss.relative_square), (d.max_abs, loss.max_abs))
    return all(math.isclose(a, b, rel_tol=RECORDED_WITHIN) for a, b in pairs)


def _correctly_rounded(a: LogicalTensor | None, b: LogicalTensor | None, d: compare.Difference) -> bool:
    """Return whether all of a difference is BF16's rounding of values that BF16 does not have (deep subnormals)."""
    if a is None or b is None or a.store not in {"fp8", "fp4"} or b.store != "bf16" or d.status != "value":
        return False
    return d.max_abs <= 2.0**-134  # half a step of BF16's subnormals: the only inexact case
