"""A local Hub, a converted folder, and the program as the Hub's client."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests import support, support_run
from tests.local_hub import LocalHub
from tests.local_hub.fixtures import hub  # noqa: F401
from tests.support import Result, run, run_process

Call = Callable[..., Result]
"""Runs the program against the Hub; keywords are environment variables."""


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint of random values converted: several shards and a head; read only."""
    home = tmp_path_factory.mktemp("converted")
    source = support_run.tiny(home / "source")
    (source / "LICENSE").write_text("MIT License\n\nCopyright (c) somebody\n")
    folder = home / "mlx"
    result = run("quantize", source, folder, "--max-shard-size", "1MB")
    assert result.code == 0, result
    return folder


@pytest.fixture
def folder(converted: Path, tmp_path: Path) -> Path:
    """Return a copy of the converted folder."""
    return support.copy_folder(converted, tmp_path / "mlx")


@pytest.fixture
def call(hub: LocalHub, tmp_path: Path) -> Call:  # noqa: F811
    """Return what runs the program in the test's folder."""

    def ran(*arguments: object, **more: str) -> Result:
        return run_process(*arguments, variables=hub.environment() | more, cwd=tmp_path)

    return ran


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """Return the demo checkpoint converted: its head is of use."""
    folder = tmp_path / "demo-mlx"
    assert run("quantize", support.ROOT / "manifests" / "demo", folder).code == 0
    return folder
