"""One finding of a check, and how a list of them is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ds4convert.checkpoint.types import JSON
from ds4convert.storage.belonging import belongs

SHOWN = 5


@dataclass(frozen=True)
class Check:
    """One question and its answer in words."""

    name: str
    ok: bool
    detail: str

    def as_json(self) -> JSON:
        """Return the check under the keys of the command line contract."""
        return {"name": self.name, "ok": self.ok, "detail": self.detail}


def _some(problems: list[str], good: str) -> tuple[bool, str]:
    """Return (ok, text): `good`, or the first problems and how many more there are."""
    if not problems:
        return True, good
    more = f" (and {len(problems) - SHOWN} more)" if len(problems) > SHOWN else ""
    return False, "; ".join(problems[:SHOWN]) + more


def work(path: Path, with_source: bool) -> int:
    """Return about how many bytes the checks will read, for a progress bar."""
    found = [f for f in path.glob("**/*") if belongs(f.relative_to(path).as_posix()) and f.is_file()]
    tensors = (f for f in found if f.suffix == ".safetensors") if with_source else ()
    return sum(f.stat().st_size for f in (*found, *tensors))


def as_json(checks: list[Check]) -> Mapping[str, object]:
    """Return the result under the keys of the command line contract."""
    return {"ok": all(c.ok for c in checks), "checks": [c.as_json() for c in checks]}
