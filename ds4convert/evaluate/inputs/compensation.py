"""What `--rounding compensated` needs beside a plan: the text in tokens, and the inputs that the model makes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ds4convert.errors import InputError, UsageError
from ds4convert.formats.second_moments import COMPENSATED, Inputs
from ds4convert.inference import calibration_text
from ds4convert.inference.calibration_text import Rows


@dataclass(frozen=True)
class Prepared:
    """The rows of a text for the model in a folder."""

    folder: Path
    rows: Rows

    def inputs(self, out: Path, said: Callable[[str], None]) -> Callable[[str, int], Inputs | None]:
        """Return what answers where the inputs of a matrix lie, in a run that writes to `out`; it may say things."""
        from ds4convert.evaluate.inputs.layer_inputs import LayerInputs

        return LayerInputs(self.folder, self.rows.ids, out, said)


def prepared(folder: Path | None, places: Sequence[Path], rounding: str, tokens: int) -> Prepared | None:
    """Return the rows of the texts for the model in `folder`; None for another rounding, which takes no text.

    Raises `UsageError` for options that contradict each other, and where the weights are not `folder` on this machine.
    """
    if rounding != COMPENSATED:
        if places:
            raise UsageError(f"--calibrate is for --rounding compensated; {rounding} has no use for a text")
        return None
    if not places:
        raise UsageError("--rounding compensated needs a text to go by: name one with --calibrate TEXT")
    if folder is None:
        raise UsageError(
            "--rounding compensated runs the model, so its weights have to be here: ds4convert pull REPO first"
        )
    for place in places:
        if not place.exists():
            raise InputError(f"{place}: is not there; --calibrate takes a text file, a folder or a file of JSON lines")
    return Prepared(folder, calibration_text.read(folder, places, tokens))
