"""How a run ends: what becomes of small files, the manifest, and by what a folder is recognised as finished.

The same for every run: small files that are taken over, those that are written, and the manifest, last. What differs is
told in a `Completion`: where small files are taken from, and how the manifest is told of what was written.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ds4convert.converted import manifest
from ds4convert.converted.manifest import MANIFEST_NAME
from ds4convert.errors import InputError
from ds4convert.execution import ownership
from ds4convert.execution.file_writer import Result
from ds4convert.execution.ownership import Marks
from ds4convert.files import Disk
from ds4convert.planning.types import Plan

Carried = Callable[[str, str], bytes]
"""Returns a small file that is taken over unchanged, by name and sha256; raises where it has other bytes now."""

Account = Callable[[Path, Result, Disk], Result]
"""Returns steps and hashes of the result from those of the files written; may put further files into the folder."""


def as_written(out: Path, written: Result, disk: Disk) -> Result:
    """Return what was written: the whole result, of a run that writes all files of it."""
    return written


@dataclass(frozen=True)
class Completion:
    """What is done when the files of a run's plan are written, and how the finished result is told.

    `result` is the plan that the manifest tells. `apart` are the folders that the output folder may not overlap;
    `more_bytes` is what `account` needs beside the plan. `digests` are those that tensors of the result, by (file,
    name), are known to have to have.
    """

    result: Plan
    carried: Carried
    apart: tuple[Path, ...] = ()
    account: Account = as_written
    more_bytes: int = 0
    digests: Mapping[tuple[str, str], str] = field(default_factory=dict)

    @property
    def sizes(self) -> dict[str, int]:
        """Return the sizes of the files of tensors that the folder has in the end, by name."""
        return {f.name: f.size for f in self.result.files}

    @property
    def small(self) -> tuple[str, ...]:
        """Return the names of the small files that the folder has in the end."""
        return (*self.result.texts, *self.result.copies)

    @property
    def marks(self) -> Marks:
        """Return what each file of the folder is known by."""
        return ownership.marks_of(self.result)

    def write(self, out: Path, written: Result, disk: Disk) -> None:
        """Put small files and the manifest, last, into the folder. Raises `InputError` where one was altered."""
        made = self.account(out, written, disk)
        for name, sha256 in self.result.copies.items():
            self.carry(out, name, self.carried(name, sha256), disk)
        for name, text in self.texts().items():
            disk.make_folder((out / name).parent)
            disk.write_file(out / name, text)
        disk.write_file(out / MANIFEST_NAME, manifest.build(self.result, made.steps, made.hashes))

    def carry(self, out: Path, name: str, data: bytes, disk: Disk) -> None:
        """Put a small file that is taken over into the folder."""
        disk.write_file(out / name, data)

    def texts(self) -> Mapping[str, bytes]:
        """Return the small files that are written."""
        return self.result.texts

    def is_done(self, out: Path) -> bool:
        """Return whether the folder holds the finished result, by manifest and file sizes."""
        with contextlib.suppress(InputError):
            found = manifest.read(out)
            if found is None or found.plan != self.result.id:
                return False
            whole = all((out / n).is_file() and (out / n).stat().st_size == size for n, size in self.sizes.items())
            told = found.by_place()  # a folder that another was made from may have changed since
            same = all(k not in told or told[k].xxh3_128 in {None, digest} for k, digest in self.digests.items())
            return whole and same and all((out / n).is_file() for n in self.small)
        return False


@dataclass(frozen=True)
class Aside(Completion):
    """A run whose result is moved into a finished folder afterwards: what that folder has already is not made again.

    `written` are the files of tensors that are made, by name with their sizes; `extra` are small files that come along
    and are not of the result. Files that are taken over lie in the folder already: they are looked at, no more.
    """

    written: Mapping[str, int] = field(default_factory=dict)
    extra: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def sizes(self) -> dict[str, int]:
        """Return the sizes of the files of tensors that are made, by name."""
        return dict(self.written)

    @property
    def small(self) -> tuple[str, ...]:
        """Return the names of the small files that are made."""
        return tuple(self.texts())

    @property
    def marks(self) -> Marks:
        """Return none: all that lies aside is of this run."""
        return {}

    def carry(self, out: Path, name: str, data: bytes, disk: Disk) -> None:
        """Leave a file that is taken over where it lies."""

    def texts(self) -> Mapping[str, bytes]:
        """Return the small files that are written, those that come along too."""
        return dict(self.result.texts) | dict(self.extra)
