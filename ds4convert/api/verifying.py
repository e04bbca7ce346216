"""`verify`: whether a converted folder is finished, complete, unaltered, equal to its source, and its head working."""

from __future__ import annotations

import dataclasses
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict, Unpack

from ds4convert.api.opening import Opened, Place, exchanged_kinds, existing, is_remote, local, source_of
from ds4convert.api.reporting import Listener, MessageCallback, ProgressCallback, document
from ds4convert.api.values import OptionRecord, PathLike, combined, flag, number, one_of, part_field, path
from ds4convert.checkpoint.published import zeros
from ds4convert.checkpoint.source import Source
from ds4convert.checkpoint.types import JSON
from ds4convert.converted import verify_record
from ds4convert.errors import EnvironmentFault, UsageError
from ds4convert.inference.several.ranks import team, together
from ds4convert.planning.parts import Part
from ds4convert.report import html, pages
from ds4convert.report.setting import Setting
from ds4convert.verification import run
from ds4convert.verification.checks import Check, work
from ds4convert.verification.facts import Facts
from ds4convert.verification.request import LEVELS, Outcome, Request, level_of
from ds4convert.words import launched

DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class VerifyOptions(OptionRecord):
    """How far `verify` looks; each is the option of the same name of the command.

    `source` is the checkpoint to compare every tensor with, `calibration` the file that rounding was weighed by. `mtp`
    decodes with and without the head. `report` is the HTML page to write. `reference` has recordings to compare
    with at `atol` and `rtol`. `layerwise` never holds more than one layer. `part` (`"2/8"`) compares a share of the
    files with the source, beside other machines; the folder is proven when every part is good.
    """

    source: Place | None = None
    calibration: Path | None = path(None)
    mtp: bool = flag(False)
    level: str | None = one_of(LEVELS, None)
    prompts: Path | None = path(None)
    max_tokens: int = number(64, 2)
    draft_depth: int | None = number(None, 1, 16)
    confidence: float = number(0.0, 0.0, 1.0)
    drafter: Path | None = path(None)
    reference: Path | None = path(None)
    atol: float = number(2e-4, 0.0)
    rtol: float = number(0.0, 0.0)
    report: Path | None = path(None)
    dtype: str | None = one_of(DTYPES, None)
    jobs: int = number(2, 1, 64)
    layerwise: bool = flag(False)
    part: Part | None = part_field()

    def __post_init__(self) -> None:
        """Raise `UsageError` on values out of range, and on a level that does not go with the rest."""
        super().__post_init__()
        if self.source is not None and not isinstance(self.source, str | os.PathLike | Opened):
            raise UsageError(f"--source {self.source!r}: expected a path, a repo, or what `open` returned")
        if self.part is not None and (self.source is None or self.reached != "source" or self.layerwise):
            raise UsageError(
                "--part divides the comparison with --source SRC", hint="leave out what decodes, or --part"
            )
        _ = self.reached

    @property
    def reached(self) -> str:
        """Return the level that is checked at."""
        shows = self.report is not None and not self.layerwise
        return level_of(self.level, self.mtp, self.source is not None, shows)

    def without_effect(self) -> dict[str, str]:
        """Return the names of options that have no use beside the others, each with what it is for."""
        decodes = (self.mtp or self.report is not None or self.level == "decode") and not self.layerwise
        runs = decodes or self.layerwise or self.level == "numerics"
        measured = "--mtp, --layerwise or --level numerics"
        needs = {
            "calibration": (self.source is not None, "--source"),
            "atol": (self.reference is not None, "--reference"),
            "rtol": (self.reference is not None, "--reference"),
            "draft_depth": (decodes, "decoding: --mtp"),
            "confidence": (decodes, "decoding: --mtp"),
            "max_tokens": (decodes, "decoding: --mtp or --level decode"),
            "drafter": (decodes, "decoding: --mtp or --level decode"),
            "prompts": (runs, measured),
            "dtype": (runs and self.reference is None, f"{measured}, in float32 with --reference"),
        }
        return {name: what for name, (used, what) in needs.items() if not used}


class VerifyChoices(TypedDict, total=False):
    """The options of `verify` as keywords; `VerifyOptions` says what each is."""

    source: Place | None
    calibration: PathLike | None
    mtp: bool
    level: Literal["structure", "source", "numerics", "decode"] | None
    prompts: PathLike | None
    max_tokens: int
    draft_depth: int | None
    confidence: float
    drafter: PathLike | None
    reference: PathLike | None
    atol: float
    rtol: float
    report: PathLike | None
    dtype: Literal["float32", "bfloat16"] | None
    jobs: int
    layerwise: bool
    part: Part | str | None


@dataclass(frozen=True)
class Verification:
    """What `verify` found: the checks in order, and the figures beside them; `ok` where every check is good."""

    checks: tuple[Check, ...]
    facts: Facts

    @property
    def ok(self) -> bool:
        """Return whether every check is good."""
        return all(c.ok for c in self.checks)

    @property
    def verdict(self) -> str | None:
        """Return the sentence on the head, None where it was not asked for."""
        return None if self.facts.mtp is None else self.facts.mtp.verdict

    def as_json(self) -> JSON:
        """Return the document of `verify`."""
        return document(Outcome(list(self.checks), self.facts).as_json())


def verify(
    folder: Place, options: VerifyOptions | None = None, *, progress: ProgressCallback | None = None,
    say: MessageCallback | None = None, **choices: Unpack[VerifyChoices],
) -> Verification:  # fmt: skip
    """Check a converted folder: finished, complete, unaltered; with `source` equal to it; with `mtp` its head as well.

    A check that fails is a result, not an error. Raises `UsageError` for options that do not go together, and
    `InputError` where a folder that is to be run cannot be loaded. Processes that mlx.launch started do it together.

    >>> import ds4convert as ds4
    >>> done = ds4.convert("checkpoint", "converted")
    >>> found = ds4.verify("converted", source="checkpoint")
    >>> found.ok, [c.name for c in found.checks][:3]
    (True, ['finished', 'files', 'digests'])
    """
    settled, listener = combined(VerifyOptions, options, choices), Listener(progress, say)
    unused = settled.without_effect()
    for name in unused.keys() & choices.keys():
        listener.warn(f"--{name.replace('_', '-')} has no effect here; it is for {unused[name]}")
    ranks = team()
    with together(ranks):
        base = local(folder, "no such folder")
        request = _request(base, settled)
        if settled.report is not None and launched.is_first():
            pages.check_target(settled.report)
    with listener.counting("verifying", work(base, settled.source is not None)) as count:
        outcome = run.run(request, listener.note, count, ranks)
    if settled.mtp and settled.drafter is None and launched.is_first():  # what is kept is told of the folder's own head
        _keep_figures(base, outcome, listener)
    if settled.report is not None and launched.is_first():
        html.write(settled.report, base, outcome, _setting(base, settled))
        listener.note(f"Report: {settled.report}")
    for told in zeros.of_folder(base):
        listener.warn(told)
    return Verification(tuple(outcome.checks), outcome.facts)


def _setting(folder: Path, options: VerifyOptions) -> Setting:
    """Return what the page tells of this run: the command, of files and folders the names alone, and the machine."""
    from ds4convert.api.asking import machine

    words = ["ds4convert", "verify", folder.resolve().name]
    for field in dataclasses.fields(options):
        value, option = getattr(options, field.name), f"--{field.name.replace('_', '-')}"
        if value != field.default:
            words += [option] if value is True else [option, _named(value)]
    return Setting(shlex.join(words), machine.described())


def _named(value: object) -> str:
    """Return the value of an option without the path to a file or folder."""
    if isinstance(value, Opened):
        return value.name if value.path is None else value.path.name
    if isinstance(value, Path) or (isinstance(value, str) and not is_remote(value) and os.sep in value):
        return Path(value).resolve().name
    return str(value)


def _request(folder: Path, options: VerifyOptions) -> Request:
    source: Path | Source | None = None
    if options.source is not None:
        source = source_of(options.source) if is_remote(options.source) else _folder_of(options.source)
        if isinstance(source, Path):
            exchanged_kinds(folder, source, "MLX_DIR and --source")
    same = (
        "mtp", "calibration", "reference", "drafter", "prompts", "max_tokens", "confidence", "atol", "rtol", "dtype",
        "layerwise", "jobs", "part",
    )  # fmt: skip
    return Request(
        folder,
        options.reached,
        source=source,
        depth=options.draft_depth,
        wants_report=options.report is not None,
        **{name: getattr(options, name) for name in same},
    )


def _folder_of(place: Place) -> Path:
    return existing(place.path or Path(place.name) if isinstance(place, Opened) else Path(place))


def _keep_figures(folder: Path, outcome: Outcome, listener: Listener) -> None:
    """Keep what was measured beside the folder's files, for the model card of `publish`."""
    if outcome.facts.mtp is None:
        return
    try:
        verify_record.write(folder, outcome.ok, [c.name for c in outcome.checks], outcome.facts.mtp.kept())
    except EnvironmentFault as e:
        listener.note(f"The figures were not kept for `publish`: {e}")
