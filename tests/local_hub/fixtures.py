"""The fixture `hub`; a conftest.py imports it: `from tests.local_hub.fixtures import hub`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.local_hub import LocalHub


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LocalHub]:
    made = LocalHub(tmp_path / "local_hub")
    yield made
    made.close()
