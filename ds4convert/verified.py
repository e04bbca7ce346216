"""What `verify --mtp` measured, kept beside a converted folder for its model card.

`ds4convert_verify.json` counts as long as the folder's manifest is the one it was made for. Speeds are of the device
that the record names.
"""

from __future__ import annotations

import platform
from contextlib import suppress
from pathlib import Path

from ds4convert import manifest, strictjson
from ds4convert.errors import Ds4Error, InputError
from ds4convert.files import Disk, disk_errors
from ds4convert.folder import read_small
from ds4convert.manifest import DIGEST, VERIFY_NAME
from ds4convert.types import JSON

VERSION = 1
KEPT = (
    "kind", "format", "acceptance", "drafted", "accepted", "tokens_per_pass", "plain_tokens_per_second",
    "mtp_tokens_per_second", "speedup", "greedy_equal", "draft_depth", "verdict",
)  # fmt: skip


def write(folder: Path, facts: JSON) -> None:
    """Keep what a run of `verify --mtp` found (its JSON) about a folder with a manifest.

    Raises `EnvironmentFault` where the folder cannot be written.
    """
    record = None
    with suppress(InputError):  # an altered manifest: the checks have said so
        record = manifest.read(folder)
    if record is None or "mtp" not in facts:
        return
    table = {
        "record_version": VERSION,
        "tool": {"name": "ds4convert", "version": manifest.tool_version()},
        "manifest": record[DIGEST],
        "device": _device(),
        "ok": facts["ok"],
        "checks": [c["name"] for c in facts["checks"]],
        "mtp": {k: facts["mtp"].get(k) for k in KEPT},
    }
    with disk_errors("writing", folder / VERIFY_NAME):
        Disk().write_file(folder / VERIFY_NAME, strictjson.pretty(table))


def read(folder: Path, record: JSON) -> JSON | None:
    """Return the record of the folder whose manifest is `record`; None without one, and where it is of another."""
    if not (folder / VERIFY_NAME).is_file():
        return None
    with suppress(Ds4Error):
        table = strictjson.loads(read_small(folder, VERIFY_NAME), VERIFY_NAME)
        if isinstance(table, dict) and table.get("record_version") == VERSION and _well_formed(table):
            return table if table["manifest"] == record.get(DIGEST) else None
    return None


def _well_formed(table: JSON) -> bool:
    mtp = table.get("mtp")
    if not isinstance(mtp, dict) or not isinstance(table.get("ok"), bool) or not isinstance(table.get("device"), str):
        return False
    numbers = (mtp.get(k) for k in KEPT if k not in {"kind", "format", "verdict"})
    return isinstance(mtp.get("verdict"), str) and all(n is None or isinstance(n, int | float) for n in numbers)


def _device() -> str:
    """Return the kind of processor that the model ran on."""
    import mlx.core as mx

    with suppress(AttributeError, RuntimeError):  # not in every version of mlx
        name = mx.device_info().get("device_name")
        if isinstance(name, str) and name:
            return name
    return platform.machine()
