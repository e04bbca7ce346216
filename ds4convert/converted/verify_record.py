"""What `verify --mtp` measured, kept beside a converted folder for its model card.

`ds4convert_verify.json` counts as long as the folder's manifest is the one it was made for. Speeds are of the device
that the record names.
"""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from ds4convert.checkpoint.types import JSON
from ds4convert.converted import manifest
from ds4convert.converted.manifest import VERIFY_NAME
from ds4convert.converted.records import Manifest
from ds4convert.errors import Ds4Error, InputError
from ds4convert.files import Disk, disk_errors
from ds4convert.planning.types import Tool
from ds4convert.storage import strict_json
from ds4convert.storage.safe_open import read_small
from ds4convert.storage.untrusted.fields import Fields
from ds4convert.words.project import version

VERSION = 1


@dataclass(frozen=True, slots=True)
class HeadFigures:
    """What was measured of a head; every figure is None of one that was not run. Named as in the record."""

    kind: str | None
    format: str | None
    acceptance: float | None = None
    drafted: int | None = None
    accepted: int | None = None
    tokens_per_pass: float | None = None
    plain_tokens_per_second: float | None = None
    mtp_tokens_per_second: float | None = None
    speedup: float | None = None
    greedy_equal: bool | None = None
    draft_depth: int | None = None
    verdict: str = field(kw_only=True)
    block_size: int | None = field(default=None, kw_only=True)
    acceptance_by_position: tuple[float, ...] | None = field(default=None, kw_only=True)

    @classmethod
    def read(cls, f: Fields) -> HeadFigures:
        """Return the figures in an object of a record."""
        return cls(
            kind=f.null_or("kind", f.text),
            format=f.null_or("format", f.text),
            acceptance=f.null_or("acceptance", f.number),
            drafted=f.null_or("drafted", f.count),
            accepted=f.null_or("accepted", f.count),
            tokens_per_pass=f.null_or("tokens_per_pass", f.number),
            plain_tokens_per_second=f.null_or("plain_tokens_per_second", f.number),
            mtp_tokens_per_second=f.null_or("mtp_tokens_per_second", f.number),
            speedup=f.null_or("speedup", f.number),
            greedy_equal=f.null_or("greedy_equal", f.flag),
            draft_depth=f.null_or("draft_depth", f.count),
            verdict=f.text("verdict"),
            block_size=f.absent_or("block_size", f.count),
            acceptance_by_position=f.absent_or("acceptance_by_position", f.numbers),
        )

    def as_json(self) -> JSON:
        """Return the object of a record; what only heads have that draft blocks is left out of others'."""
        table = dataclasses.asdict(self)
        return {k: v for k, v in table.items() if v is not None or k not in ("block_size", "acceptance_by_position")}


@dataclass(frozen=True, slots=True)
class VerifyRecord:
    """The record: `manifest` is the digest of the manifest that it is of, `checks` the names of those made."""

    tool: Tool
    manifest: str
    device: str
    ok: bool
    checks: tuple[str, ...]
    head: HeadFigures

    @classmethod
    def read(cls, f: Fields) -> VerifyRecord:
        """Return the record in a document. Raises `InputError` for the first field that is not as it has to be."""
        tool = f.object("tool")
        return cls(
            tool=Tool(tool.text("name"), tool.text("version")),
            manifest=f.text("manifest"),
            device=f.text("device"),
            ok=f.flag("ok"),
            checks=f.texts("checks"),
            head=HeadFigures.read(f.object("mtp")),
        )

    def as_json(self) -> JSON:
        """Return the record as it lies on the disk."""
        return {
            "record_version": VERSION,
            "tool": self.tool.as_json(),
            "manifest": self.manifest,
            "device": self.device,
            "ok": self.ok,
            "checks": list(self.checks),
            "mtp": self.head.as_json(),
        }


def write(folder: Path, ok: bool, checks: Sequence[str], head: HeadFigures) -> None:
    """Keep what a run of `verify --mtp` found about a folder with a manifest: whether all checks passed, the figures.

    Raises `EnvironmentFault` where the folder cannot be written.
    """
    record = None
    with suppress(InputError):  # an altered manifest: the checks have said so
        record = manifest.read(folder)
    if record is None:
        return
    tool = Tool("ds4convert", version())
    made = VerifyRecord(tool, record.digest, _device(), ok, tuple(checks), head)
    with disk_errors("writing", folder / VERIFY_NAME):
        Disk().write_file(folder / VERIFY_NAME, strict_json.pretty(made.as_json()))


def read(folder: Path, record: Manifest) -> VerifyRecord | None:
    """Return the record of the folder whose manifest is `record`; None without one, and where it is of another."""
    if not (folder / VERIFY_NAME).is_file():
        return None
    with suppress(Ds4Error):
        table = strict_json.loads(read_small(folder, VERIFY_NAME), VERIFY_NAME)
        if isinstance(table, dict) and table.get("record_version") == VERSION:
            found = VerifyRecord.read(Fields.of(table, VERIFY_NAME))
            return found if found.manifest == record.digest else None
    return None


def _device() -> str:
    """Return the kind of processor that the model ran on."""
    import mlx.core as mx

    with suppress(AttributeError, RuntimeError):  # not in every version of mlx
        name = mx.device_info().get("device_name")
        if isinstance(name, str) and name:
            return name
    return platform.machine()
