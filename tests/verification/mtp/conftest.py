"""Converted folders shared by the tests: read only; `fresh` gives a copy that a test may damage."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.verification.mtp.folders import DEMO, GOLDEN, convert


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(DEMO, tmp_path_factory.mktemp("demo") / "demo-mlx")


@pytest.fixture(scope="session")
def golden(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("golden")
    return {name: convert(GOLDEN / name / "checkpoint", base / name) for name in ("tiny-a", "tiny-b")}


@pytest.fixture
def fresh(demo: Path, tmp_path: Path) -> Callable[[], Path]:
    return lambda: Path(shutil.copytree(demo, tmp_path / "copy"))


@pytest.fixture(scope="session")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two prompts in the demo checkpoint's own language."""
    path = tmp_path_factory.mktemp("prompts") / "two.txt"
    path.write_text(
        "And God said, Let there be light: and there was light. And God saw the light, that it was\n\n"
        "Thus saith the LORD of hosts, the God of Israel; Go and tell the men of Judah and the\n"
    )
    return path
