"""A local Hub with the small checkpoint in it, and the program as its client."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.local_hub import LocalHub
from tests.local_hub.fixtures import hub  # noqa: F401
from tests.support import Result, run_process

NAME, REPO = "owner/model", "hf://owner/model"

Call = Callable[..., Result]
"""Runs the program against the Hub; keywords are environment variables."""


@pytest.fixture
def commit(hub: LocalHub, mini_source: Path) -> str:  # noqa: F811
    """Return the commit of the repo with the small checkpoint."""
    return hub.add_repo(NAME, mini_source)


@pytest.fixture
def call(hub: LocalHub, commit: str, tmp_path: Path) -> Call:  # noqa: F811
    """Return what runs the program in the test's folder."""

    def ran(*arguments: object, **more: str) -> Result:
        return run_process(*arguments, variables=hub.environment() | more, cwd=tmp_path)

    return ran
