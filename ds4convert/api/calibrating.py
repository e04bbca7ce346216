"""`calibrate`: how strong each input column of each matrix is on a text, for rounding to weigh errors by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

from ds4convert.api.opening import Place, existing, local
from ds4convert.api.reporting import Listener, MessageCallback, ProgressCallback, document
from ds4convert.api.values import OptionRecord, PathLike, combined, flag, number, one_of
from ds4convert.checkpoint.types import JSON
from ds4convert.converted.open import inventory_of
from ds4convert.errors import UsageError
from ds4convert.evaluate import calibration, input_moments
from ds4convert.evaluate.inputs import sensitivity as units
from ds4convert.evaluate.layerwise import work_bytes
from ds4convert.inference import calibration_text
from ds4convert.inference.calibration_text import Rows


@dataclass(frozen=True)
class CalibrateOptions(OptionRecord):
    """How much of the texts `calibrate` uses, how many tokens are run together, and in which precision.

    With `sensitivity` it is measured as well what rounding each matrix alone does to the output, on so many tokens.
    """

    max_tokens: int = number(32768, 2)
    sequence: int = number(512, 2)
    sensitivity: bool = flag(False)
    sensitivity_tokens: int = number(2048, 2)
    dtype: str = one_of(("float32", "bfloat16"), "float32")


class CalibrateChoices(TypedDict, total=False):
    """The options of `calibrate` as keywords; `CalibrateOptions` says what each is."""

    max_tokens: int
    sequence: int
    sensitivity: bool
    sensitivity_tokens: int
    dtype: Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Calibrated:
    """A calibration file that was written, and what it was made from."""

    file: Path
    bytes: int
    tokens: int
    matrices: int
    rows: Rows
    experts: Mapping[str, Mapping[str, Any]]
    sensitivities: int

    def as_json(self) -> JSON:
        """Return the document of `calibrate`."""
        facts = {"file": str(self.file), "bytes": self.bytes, "tokens": self.tokens, "matrices": self.matrices}
        facts |= {"texts": self.rows.texts, "rows": len(self.rows.ids), "available_tokens": self.rows.available}
        return document(facts | {"experts": dict(self.experts), "sensitivities": self.sensitivities})


def calibrate(
    source: Place, text: PathLike | Sequence[PathLike], out: PathLike, options: CalibrateOptions | None = None, *,
    progress: ProgressCallback | None = None, say: MessageCallback | None = None, **choices: Unpack[CalibrateChoices],
) -> Calibrated:  # fmt: skip
    """Run texts through a checkpoint or converted folder, and write what goes into each matrix to `out`.

    A text is a text file, a folder of them, or a file of JSON lines with `text` or `messages`.

    One layer is in memory at a time. The file is what `calibration=` of `plan` and `convert` takes. Raises `InputError`
    for a text that is too short or no UTF-8, `OutputError` where `out` is another kind of file.

    >>> import ds4convert as ds4
    >>> done = ds4.calibrate("checkpoint", "book.txt", "moments.safetensors", max_tokens=16)
    >>> done.tokens, ds4.plan("checkpoint", recipe="q4", calibration=done.file).as_json()["recipe"]
    (16, 'q4')
    """
    settled, listener = combined(CalibrateOptions, options, choices), Listener(progress, say)
    folder, target = local(source), Path(out)
    calibration.check_target(target)
    inventory = inventory_of(folder)
    places = [Path(p) for p in text] if isinstance(text, Sequence) and not isinstance(text, str) else [Path(str(text))]
    for place in places:
        existing(place, "no such file or folder")
        if place.resolve() == target.resolve():
            raise UsageError(f"{target}: is both a TEXT and OUT", hint="name the file that is to be written last")
    if settled.sensitivity:
        units.check(folder)
    rows = calibration_text.read(folder, places, settled.max_tokens, settled.sequence)
    with listener.counting("calibrating", work_bytes(folder)) as count:
        found = input_moments.collect(folder, [list(r) for r in rows.ids], dtype=settled.dtype, progress=count)
    known = None
    if settled.sensitivity:
        some = calibration_text.read(folder, places, settled.sensitivity_tokens, min(settled.sequence, SHORT))
        known = units.measure(folder, inventory, some.ids, target, lambda n: listener.note(f"{n:,} matrices measured"))
    found = input_moments.by_key(found, inventory)
    size = calibration.write(target, inventory, found, rows.tokens, known)
    units.finished(target)
    experts = calibration.experts(found)
    for told in calibration.few(experts):
        listener.note(told)
    return Calibrated(target, size, rows.tokens, len(found), rows, experts, len(known.losses) if known else 0)


SHORT = 128
"""Tokens of a row that sensitivities are measured on: many short texts tell more than few long ones."""
