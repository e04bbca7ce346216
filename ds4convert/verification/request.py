"""What `verify` is asked for, and what it fills in on the way."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ds4convert.checkpoint.source import Source
from ds4convert.checkpoint.types import JSON
from ds4convert.errors import UsageError
from ds4convert.planning.parts import Part
from ds4convert.verification import checks as checks_module
from ds4convert.verification.checks import Check
from ds4convert.verification.facts import Facts

LEVELS = ("structure", "source", "numerics", "decode")
RUNNING = LEVELS[2:]
"""Levels that run the model on prompts."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What `verify` was asked for; `level` is one of LEVELS."""

    folder: Path
    level: str
    mtp: bool = False
    source: Path | Source | None = None
    calibration: Path | None = None
    reference: Path | None = None
    drafter: Path | None = None
    prompts: Path | None = None
    max_tokens: int = 64
    depth: int | None = None
    confidence: float = 0.0
    atol: float = 2e-4
    rtol: float = 0.0
    dtype: str | None = None
    wants_report: bool = False
    layerwise: bool = False
    jobs: int = 2
    part: Part | None = None


@dataclass
class Outcome:
    """Checks in order, and the facts beside them under the keys of the command line contract."""

    checks: list[Check] = field(default_factory=list)
    facts: Facts = field(default_factory=Facts)

    def add(self, name: str, problems: list[str], good: str) -> None:
        """Add a check that is good where there are no problems."""
        self.checks.append(Check(name, not problems, "; ".join(problems) or good))

    def as_json(self) -> JSON:
        """Return everything, `ok` and `checks` first."""
        facts: JSON = _speakable({**checks_module.as_json(self.checks), **self.facts.as_json()})
        return facts

    @property
    def ok(self) -> bool:
        """Return whether every check is good."""
        return all(c.ok for c in self.checks)


def _speakable(value: Any) -> Any:
    """Return facts without NaN and infinities, which JSON does not have: null stands for them."""
    if isinstance(value, dict):
        return {k: _speakable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_speakable(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def level_of(level: str | None, mtp: bool, source: bool, report: bool = False) -> str:
    """Return the level to check at (a report shows decoding unless told otherwise).

    Raises `UsageError` where the options contradict each other.
    """
    if level == "source" and not source:
        raise UsageError("--level source needs --source SRC")
    if level == "structure" and source:
        raise UsageError("--level structure does not look at a source", hint="leave out --source")
    if mtp and level not in (None, "decode"):
        raise UsageError(f"--mtp decodes; --level {level} does not", hint="Leave out one of them")
    return level or ("decode" if mtp or report else "source" if source else "structure")


def needs_model(request: Request) -> bool:
    """Return whether a request goes beyond the files."""
    return request.level in RUNNING or request.reference is not None or request.layerwise
