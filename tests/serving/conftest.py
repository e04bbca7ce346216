"""Two servers of the demo checkpoint, with the head and with --no-mtp, shared by the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("mlx.core")
from tests import support
from tests.serving.running import Running

DEMO = support.ROOT / "manifests" / "demo"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("serve") / "demo-mlx"
    assert support.run("quantize", DEMO, out).code == 0
    return out


def running(folder: Path, log: Path, *options: object) -> Iterator[Running]:
    server = Running(folder, log, *options)
    yield server
    assert server.end() == 0
    assert "Traceback" not in server.log


@pytest.fixture(scope="session")
def mtp(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    yield from running(
        folder, tmp_path_factory.mktemp("log") / "mtp", "--mtp", "--draft-depth", 2, "--dtype", "float32"
    )


@pytest.fixture(scope="session")
def plain(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    yield from running(folder, tmp_path_factory.mktemp("log") / "plain", "--no-mtp", "--dtype", "float32")
