"""The fixture `hub`; a conftest.py imports it: `from tests.hub.fixtures import hub`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub import LocalHub


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LocalHub]:
    made = LocalHub(tmp_path / "local_hub")
    yield made
    made.close()
