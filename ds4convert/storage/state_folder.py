"""The names of the state folder of an unfinished run."""

from __future__ import annotations

from pathlib import Path

STATE_FOLDER = ".ds4convert"
PLAN_NAME, CLEARING_NAME = "plan.json", "clearing.json"


def is_begun(folder: Path) -> bool:
    """Return whether a run that has not ended left its plan in a folder."""
    return (folder / STATE_FOLDER / PLAN_NAME).is_file()
