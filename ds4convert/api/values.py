"""Option values as people write them (sizes, paths) made numbers and paths, and the base of all option records."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ds4convert.checkpoint import advice
from ds4convert.errors import UsageError
from ds4convert.hub.objects.address import Address, is_address, place_of_result

if TYPE_CHECKING:
    from ds4convert.planning.parts import Part

PathLike = str | os.PathLike[str]
UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
LEAST_BYTES = 1_000_000
"""A plain number of fewer is no size of a model in bytes."""


def size(value: int | str) -> int:
    """Return the bytes of 5GB (decimal), 5GiB (binary), or a plain number. Raises `UsageError`."""
    if isinstance(value, int):
        return value
    digits = value.rstrip("abgikmtABGIKMT ")
    unit = value[len(digits) :].strip().lower()
    try:
        return int(float(digits) * UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        raise UsageError(f"{value!r} is not a size such as 5GB (5 x 10^9 bytes) or 5GiB (5 x 2^30)") from None


def fit_size(value: int | str) -> int:
    """Return the bytes of a size of memory, with its unit said: text of 96 bytes is meant by nobody.

    A number is bytes, as it is everywhere in Python.
    """
    if isinstance(value, int):
        return size(value)
    text = value.strip()
    number = text.rstrip("gG").strip()
    if number.replace(".", "", 1).isdigit() and (text != number or float(number) < LEAST_BYTES):
        raise UsageError(
            f"{text!r} does not say which unit: {number}GB is {number} x 10^9 bytes, {number}GiB {number} x 2^30; "
            f"for what a Mac with {number} GB of memory can hold: --mac {number}GB"
        )
    return size(value)


def mac_size(value: int | str) -> int:
    """Return the bytes of memory of a Mac, as it is sold: 128, 128G, 128GB and 128GiB are all 128 GiB."""
    if isinstance(value, int):
        return value
    match = re.fullmatch(r"\s*(\d{1,5}(?:\.\d+)?)\s*(g|gb|gib|t|tb|tib|)\s*", value.lower(), re.ASCII)
    if match is None or not 1 <= (gib := float(match[1]) * (1024 if match[2][:1] == "t" else 1)) <= 1 << 20:
        raise UsageError(f"{value!r} is not the memory of a Mac, such as 128GB")
    return int(gib * (1 << 30))


@dataclass(frozen=True)
class OptionRecord:
    """Base of the option records: checks its values when it is made, and turns sizes and paths into numbers and paths.

    A field's metadata say what its values may be: `choices` (a list), `range` (least and most, None for any) and
    `convert` (a function).
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None or field.default is not None:
                object.__setattr__(self, field.name, _checked(self, field, value))


def _checked(record: OptionRecord, field: dataclasses.Field[Any], value: Any) -> Any:
    """Return the value of an option as its field has it. Raises `UsageError` where the field cannot have it."""
    told, option = field.metadata, f"--{field.name.replace('_', '-')}"
    try:
        value = told.get("convert", _unchanged)(value)
    except UsageError as e:
        raise UsageError(str(e) if str(e).startswith(option) else f"{option}: {e}") from None
    except (TypeError, ValueError):
        raise UsageError(f"{option} {value!r}: is not a value of this option") from None
    if (wanted := told.get("choices")) and value not in wanted:
        raise UsageError(f"{option} {value!r}: expected {advice.either(list(wanted))}")
    wanted_type = told.get("type")
    if wanted_type and (not isinstance(value, wanted_type) or (isinstance(value, bool) and wanted_type is not bool)):
        names = wanted_type if isinstance(wanted_type, tuple) else (wanted_type,)
        raise UsageError(f"{option} {value!r}: expected {advice.either([t.__name__ for t in names])}")
    least, most = told.get("range", (None, None))
    if (least is not None and value < least) or (most is not None and value > most):
        raise UsageError(f"{option} {value}: expected {_said(least, most)}")
    return value


def _unchanged(value: Any) -> Any:
    return value


def _said(least: Any, most: Any) -> str:
    return f"{least} or more" if most is None else f"at most {most}" if least is None else f"{least} to {most}"


def flag(default: bool | None) -> Any:
    """Return the field of an option that is on or off."""
    return dataclasses.field(default=default, metadata={"type": bool})


def text(default: str | None) -> Any:
    """Return the field of an option that is a text, or the name of a file."""
    return dataclasses.field(default=default, metadata={"convert": os.fspath, "type": str})


def path(default: Path | None) -> Any:
    """Return the field of an option that is a path."""
    return dataclasses.field(default=default, metadata={"convert": Path})


def paths() -> Any:
    """Return the field of an option that may be given several times: one path, or several."""
    return dataclasses.field(default=(), metadata={"convert": as_paths})


def as_paths(value: PathLike | Iterable[PathLike]) -> tuple[Path, ...]:
    """Return one path or several as paths."""
    return (Path(value),) if isinstance(value, str | os.PathLike) else tuple(Path(v) for v in value)


def part_field(default: Part | None = None) -> Any:
    """Return the field of an option that is a part of divided work, as `I/N` or as a `Part`."""
    return dataclasses.field(default=default, metadata={"convert": as_part})


def as_part(value: Part | str) -> Part:
    """Return a part that may be written `I/N`. Raises `UsageError`."""
    from ds4convert.planning.parts import Part

    return value if isinstance(value, Part) else Part.parse(value)


def one_of(choices: Collection[str], default: str | None) -> Any:
    """Return the field of an option that has one of these values."""
    return dataclasses.field(default=default, metadata={"choices": tuple(choices)})


def number(default: float | None, least: float | None = None, most: float | None = None) -> Any:
    """Return the field of an option that is a number; a whole one where the bounds, or the default, are whole."""
    known = [x for x in (default, least, most) if x is not None]
    kinds: Any = (int, float) if any(isinstance(x, float) for x in known) else int
    return dataclasses.field(default=default, metadata={"type": kinds, "range": (least, most)})


def bytes_of(convert: Any, default: int | None) -> Any:
    """Return the field of an option that is a size, which `convert` reads."""
    return dataclasses.field(default=default, metadata={"convert": convert, "type": int, "range": (0, None)})


def check_here(place: PathLike) -> None:
    """Raise `UsageError` for an object store where a folder or file of this machine is needed."""
    if is_address(os.fspath(place)):
        raise UsageError(
            f"{os.fspath(place)}: has to be on this machine, as it is read or written in place; copy it from or to the "
            "store with the store's own program"
        )


def result_place(out: PathLike) -> Address | None:
    """Return the folder of a store that a result is to go to, None where it is a folder here. Raises `UsageError`."""
    return place_of_result(out) if isinstance(out, str) else None


def check_jobs(jobs: int) -> None:
    """Raise `UsageError` on a number of workers that no run has."""
    if not isinstance(jobs, int) or not 1 <= jobs <= 64:
        raise UsageError(f"--jobs {jobs!r}: expected 1 to 64")


R = TypeVar("R", bound=OptionRecord)


def apart(kind: type[R], choices: Mapping[str, Any]) -> tuple[R, dict[str, Any]]:
    """Return the record of those choices that `kind` has, and the other ones."""
    own = {f.name for f in dataclasses.fields(kind)}
    return kind(**{n: v for n, v in choices.items() if n in own}), {n: v for n, v in choices.items() if n not in own}


def combined(kind: type[R], options: R | None, choices: Mapping[str, Any]) -> R:
    """Return an option record with `choices` in place of its values. Raises `UsageError` for one that it does not have.

    Unlike a wrong number of arguments, that is a mistake of people, so it gets a sentence with the nearest name.
    """
    known = [f.name for f in dataclasses.fields(kind)]
    for name in choices:
        if name not in known:
            raise UsageError(f"{name}: is no option here{advice.did_you_mean(name, known)}")
    if options is not None and not isinstance(options, kind):
        raise UsageError(f"options: expected {kind.__name__}, found {type(options).__name__}")
    return dataclasses.replace(options or kind(), **choices)
