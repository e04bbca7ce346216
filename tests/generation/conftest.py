"""The demo checkpoint, converted by our command line; `converted` may be damaged by a test, `demo_mlx` not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import support

DEMO = support.ROOT / "manifests" / "demo"


def quantized(source: Path, out: Path, *options: object) -> Path:
    """Convert with the command line and return the folder."""
    result = support.run("quantize", source, out, *options)
    assert result.code == 0, result.err
    return out


@pytest.fixture(scope="session")
def demo_mlx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(DEMO, tmp_path_factory.mktemp("demo") / "mlx", "--layout", "mlx-lm")


@pytest.fixture
def converted(demo_mlx: Path, tmp_path: Path) -> Iterator[Path]:
    yield support.copy_folder(demo_mlx, tmp_path / "mlx")
