"""Sensitivities of all matrices of a backbone, resumed where an earlier run of the same measurement was stopped."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from ds4convert.checkpoint.inventory import Inventory
from ds4convert.evaluate import calibration
from ds4convert.evaluate.calibration import Sensitivities
from ds4convert.evaluate.inputs import kept, unit_losses
from ds4convert.evaluate.stages.matrices import check_tries
from ds4convert.files import Disk, disk_errors
from ds4convert.inference.load import read_args, read_config

UNFINISHED = ".unfinished"
"""What the name of a measurement that is not finished ends in."""


def check(folder: Path) -> None:
    """Raise `InputError` where the matrices of a folder's model cannot be tried one by one."""
    check_tries(read_args(read_config(folder), str(folder)), folder)


def measure(
    folder: Path,
    inventory: Inventory,
    rows: Sequence[Sequence[int]],
    out: Path,
    progress: Callable[[int], None] = lambda n: None,
    limit: int = unit_losses.COPY_BYTES,
) -> Sensitivities:
    """Return the sensitivities of the matrices on rows of token ids; what is known so far lies beside `out`.

    `progress` is called with numbers of matrices. Call `finished` once the result is safe.
    """
    probes = calibration.probes(inventory)
    facts = [calibration.facts_of(inventory), [list(r) for r in rows], probes]
    identity = kept.identity(folder, facts)
    path, disk = _unfinished(out), Disk()
    known = _known(path, identity, probes)
    for found in unit_losses.losses(folder, rows, probes, known, limit, progress):
        known |= found
        with disk_errors("writing", path):
            disk.write_file(path, json.dumps({"of": identity, "losses": known}).encode())
    return Sensitivities(known, probes)


def finished(out: Path) -> None:
    """Remove what lies beside a result that is written."""
    Disk().remove(_unfinished(out))


def _unfinished(out: Path) -> Path:
    return out.with_name(out.name + UNFINISHED)


def _known(path: Path, identity: str, probes: dict[str, str]) -> dict[str, float]:
    """Return what an earlier run of this very measurement found."""
    told = kept.read(path)
    try:
        if told["of"] != identity:
            return {}
        return {k: float(v) for k, v in told["losses"].items() if k in probes and 0 <= float(v) < float("inf")}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}
