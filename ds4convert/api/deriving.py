"""`graft` and `relayout`: a folder that is converted already, with a head put in or spelled for another host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict, Unpack

from ds4convert.api.opening import (
    Opened,
    Place,
    exchanged,
    exchanged_kinds,
    existing,
    is_remote,
    local,
    model_source,
    source_of,
)
from ds4convert.api.reporting import Listener, MessageCallback, ProgressCallback, document
from ds4convert.api.values import OptionRecord, PathLike, apart, bytes_of, combined, flag, number, path, size, text
from ds4convert.checkpoint.source import Source
from ds4convert.checkpoint.types import JSON
from ds4convert.converted.manifest import MANIFEST_NAME
from ds4convert.derive import donor
from ds4convert.derive import graft as grafting
from ds4convert.derive import in_place as changes
from ds4convert.derive import relayout as relaying
from ds4convert.derive.derivation import Derivation
from ds4convert.derive.donor import Donor
from ds4convert.derive.graft import Graft
from ds4convert.errors import UsageError
from ds4convert.execution import run
from ds4convert.planning.build import DEFAULT_SHARD_BYTES, check_limit
from ds4convert.planning.layouts import layout_of
from ds4convert.planning.recipes import check_format

NO_FOLDER = "no such folder"


@dataclass(frozen=True)
class GraftOptions(OptionRecord):
    """How `graft` puts a head in: its format (`mtp`), where it lies (`layout`); None is as the folder has it.

    `force` grafts although the backbone's values are not those of the head's source; `overwrite` starts over.
    """

    mtp: str | None = text(None)
    layout: str | None = text(None)
    max_shard_size: int = bytes_of(size, DEFAULT_SHARD_BYTES)
    force: bool = flag(False)
    overwrite: bool = flag(False)
    jobs: int = number(2, 1, 64)


class GraftChoices(TypedDict, total=False):
    """The options of `graft` as keywords; `GraftOptions` and `GraftPlace` say what each is."""

    mtp: str | None
    layout: str | None
    max_shard_size: int | str
    force: bool
    overwrite: bool
    jobs: int
    out: PathLike | None
    in_place: bool
    remove: bool


@dataclass(frozen=True)
class GraftPlace(OptionRecord):
    """Where the result of `graft` goes: to the folder `out`, or with `in_place` into the folder itself.

    `remove`, alone, takes the head out of it again.
    """

    out: Path | None = path(None)
    in_place: bool = flag(False)
    remove: bool = flag(False)


@dataclass(frozen=True)
class RelayoutOptions(OptionRecord):
    """What `relayout` takes beside folder and layout: `drafter` is the head's folder where that lies apart."""

    drafter: Path | None = path(None)
    overwrite: bool = flag(False)
    jobs: int = number(2, 1, 64)


class RelayoutChoices(TypedDict, total=False):
    """The options of `relayout` as keywords; `RelayoutOptions` says what each is."""

    drafter: PathLike | None
    overwrite: bool
    jobs: int


@dataclass(frozen=True)
class Rearranged:
    """A folder that was made from a converted one, or changed in place.

    `resumed`: an earlier run had done some of it; `already_done`: nothing was to do, or nothing but to go on where an
    earlier run in place had been cut off while it moved its files in.
    """

    folder: Path
    resumed: bool
    already_done: bool
    facts: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def manifest(self) -> Path:
        """Return the manifest of the folder."""
        return self.folder / MANIFEST_NAME

    def as_json(self) -> JSON:
        """Return the document of `graft` or `relayout`."""
        ended = {"resumed": self.resumed, "already_done": self.already_done, "manifest": str(self.manifest)}
        return document({**self.facts, **ended})


def graft(
    folder: Place, head: Place | None = None, options: GraftOptions | None = None, *,
    progress: ProgressCallback | None = None, say: MessageCallback | None = None, **choices: Unpack[GraftChoices],
) -> Rearranged:  # fmt: skip
    """Add the MTP head of `head` (official, converted, or a drafter) to a converted folder that has none.

    The result goes to the folder `out`, or with `in_place` into `folder` itself; `remove`, alone, takes the head out of
    it again. Called again after an interruption, it goes on. Raises `UsageError` for arguments that do not go together,
    `InputError` where the head is of another model, or not whole, or the folder has one.

    >>> import ds4convert as ds4
    >>> bare = ds4.convert("checkpoint", "bare", keep_mtp=False)
    >>> done = ds4.graft("bare", "checkpoint", out="whole")
    >>> done.as_json()["head"], ds4.diff("whole", "checkpoint").equal
    ('classic', True)
    """
    place, of_head = apart(GraftPlace, choices)
    settled, listener = combined(GraftOptions, options, of_head), Listener(progress, say)
    base, target = local(folder, NO_FOLDER), place.out
    if place.remove:
        if head is not None or target is not None or place.in_place or options or of_head:
            raise UsageError("--remove takes nothing but MLX_DIR", hint="leave out all else")
        return _without_head(base)
    if head is None:
        raise UsageError("name the checkpoint with the head: --from SRC")
    if (target is None) == (not place.in_place):
        raise UsageError("say where the result goes: either --out DIR or --in-place")
    if not is_remote(head):
        exchanged_kinds(
            base, head.path or Path(head.name) if isinstance(head, Opened) else Path(head), "MLX_DIR and SRC"
        )
    if target is None and changes.recover(base) == changes.GRAFTED:
        return Rearranged(base, True, True)
    return _grafted(base, _head_of(head), target, settled, listener)


def _without_head(folder: Path) -> Rearranged:
    done = changes.recover(folder) == changes.REMOVED
    changed = changes.Changed((), (), True) if done else changes.remove(folder, model_source())
    idle = not (changed.removed or changed.written or changed.resumed)
    facts = {"removed": list(changed.removed), "restored": list(changed.written)}
    return Rearranged(folder, changed.resumed, idle, facts)


def relayout(
    folder: Place, out: PathLike, layout: str, options: RelayoutOptions | None = None, *,
    progress: ProgressCallback | None = None, say: MessageCallback | None = None, **choices: Unpack[RelayoutChoices],
) -> Rearranged:  # fmt: skip
    """Write a converted folder again in another host's spelling: the same values, byte for byte.

    `folder` may be of mlx-lm and its branches, mlx-vlm, oMLX or MTPLX too; `drafter` is the head's folder where that
    lies apart. Called again after an interruption, it goes on. Raises `InputError` where the folder is no whole
    conversion, or the layout has no place for its head.

    >>> import ds4convert as ds4
    >>> done = ds4.convert("checkpoint", "converted")
    >>> ds4.relayout("converted", "for-mtplx", "mtplx").as_json()["layout"]
    'mtplx'
    """
    how = combined(RelayoutOptions, options, choices)
    exchanged(folder, out, "MLX_DIR and OUT")
    base, target, place = local(folder, NO_FOLDER), Path(out), layout_of(layout)
    text_of_model = model_source() if place.model_file else b""
    made = relaying.plan(base, place, text_of_model, how.drafter)
    with Listener(progress, say).counting("writing", relaying.work(made)) as count:
        outcome = relaying.run(made, target, how.jobs, how.overwrite, count)
    return Rearranged(target, outcome.resumed, outcome.already_done, _facts(made))


def _head_of(head: Place) -> Source | Donor:
    """Return who has the head: a folder that is converted already keeps its format."""
    if not is_remote(head):
        path = head.path or Path(head.name) if isinstance(head, Opened) else Path(head)
        if donor.is_one(path):
            return donor.read(path)
        existing(path)
    return source_of(head, head_alone=True)


def _grafted(
    base: Path, source: Source | Donor, out: Path | None, options: GraftOptions, listener: Listener
) -> Rearranged:
    request = grafting.Request(
        layout_of(options.layout) if options.layout else None,
        check_format(options.mtp) if options.mtp else None,
        check_limit(options.max_shard_size),
        options.force,
    )
    place = source.path if isinstance(source, Donor) else source.checkpoint.path
    for a, b in ((place, base), *(((place, out), (base, out)) if out else ())):
        run.check_places(a, b)
    if out is None and not isinstance(source, Donor) and grafting.already(base, source, request):
        return Rearranged(base, False, True)
    planned = (
        grafting.plan_converted(base, source, request, model_source())
        if isinstance(source, Donor)
        else grafting.plan(base, source, request, model_source())
    )
    listener.note(f"checked: {planned.checked}")
    for told in planned.warnings:
        listener.warn(told)
    return _written(planned, out, options, listener)


def _written(planned: Graft, out: Path | None, options: GraftOptions, listener: Listener) -> Rearranged:
    made = planned.made
    facts = _facts(made) | {"checked": planned.checked, "warnings": list(planned.warnings)}
    with listener.counting("writing", grafting.work(made, out is None)) as count:
        if out is None:
            changed = changes.graft(planned, options.jobs, options.overwrite, count)
            return Rearranged(made.base.path, changed.resumed, False, facts)
        outcome = grafting.run(planned, out, options.jobs, options.overwrite, count)
        return Rearranged(out, outcome.resumed, outcome.already_done, facts)


def _facts(made: Derivation) -> JSON:
    return {
        "layout": made.result_plan.layout,
        "head": made.result_plan.head_kind,
        "files_written": [f.name for f in made.write_plan.files],
        "files_kept": [made.result_plan.files[n].name for n in made.kept],
        "bytes_written": sum(f.size for f in made.write_plan.files),
    }
