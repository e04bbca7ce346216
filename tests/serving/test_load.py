"""Many clients at once, a quarter of them leaving: a short run here, the long one nightly and as a benchmark."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tests import support
from tests.serving.running import Running

SCRIPT = support.ROOT / "benchmarks" / "serve_load.py"


def load(server: Running, clients: int, seconds: float) -> dict[str, Any]:
    spec = importlib.util.spec_from_file_location("serve_load", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    facts: dict[str, Any] = module.Load(server.port, clients, seconds, server.process.pid).run()
    return facts


@pytest.mark.slow
@pytest.mark.parametrize(("clients", "seconds"), [(16, 5), pytest.param(64, 60, marks=pytest.mark.nightly)])
def test_many_clients_see_no_error_and_all_are_counted(
    folder: Path, tmp_path: Path, clients: int, seconds: int
) -> None:
    server = Running(folder, tmp_path / "log", "--mtp")
    try:
        facts = load(server, clients, seconds)
        assert not facts["errors"] and facts["all_counted"], facts
        assert facts["seen"]["whole"] > 0 and facts["seen"]["left"] > 0
        assert facts["growth"] is None or seconds < 60 or facts["growth"] <= 0.1, facts
    finally:
        assert server.end() == 0
    assert "Traceback" not in server.log
