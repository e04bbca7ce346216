"""Options and fixtures of the whole suite."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import support
from tests.repetitions import NIGHTLY


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--nightly", action="store_true", help="run the tests marked nightly as well")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--nightly"):
        return
    skip = pytest.mark.skip(reason="only with --nightly")
    for item in items:
        if item.get_closest_marker("nightly") or NIGHTLY.search(item.nodeid):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def mini_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small checkpoint in the official format, shared by many tests: read only, copy it to change it."""
    return support.write_synth(tmp_path_factory.mktemp("mini") / "source", support.mini_config())


@pytest.fixture
def source(mini_source: Path, tmp_path: Path) -> Iterator[Path]:
    """Return a copy of the small checkpoint that a test may damage."""
    yield support.copy_folder(mini_source, tmp_path / "source")
