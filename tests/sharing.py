"""A plugin of pytest that watches what fixtures make which several tests share.

Their folders go with the last of these tests, not at the end of the run; their processes may outlive a test.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import support

PROCESSES: set[int] = set()
"""Processes that such fixtures have started."""


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[object], request: pytest.FixtureRequest) -> Iterator[None]:
    """Note folders and processes that a fixture makes, unless it is for one test alone."""
    if fixturedef.scope == "function" or fixturedef.argname == "tmp_path_factory":
        return (yield)
    factory: pytest.TempPathFactory = request.getfixturevalue("tmp_path_factory")
    real, made, before = factory.mktemp, [], support.children()

    def mktemp(basename: str, numbered: bool = True) -> Path:
        made.append(real(basename, numbered))
        return made[-1]

    def remove() -> None:
        for folder in made:
            shutil.rmtree(folder, ignore_errors=True)

    fixturedef.addfinalizer(remove)  # before the fixture's own, so that it runs after them
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factory, "mktemp", mktemp)
        result = yield
    PROCESSES.update(support.children() - before)
    return result
