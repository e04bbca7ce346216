"""The curl examples of the README, run as they stand, on the port that they name."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from tests import support
from tests.serving.running import Running


def examples() -> list[str]:
    section = (support.ROOT / "README.md").read_text().partition("## Serve it")[2].partition("\n## ")[0]
    blocks = re.findall(r"```sh\n(.*?)```", section, re.S)
    return [c.strip() for block in blocks for c in block.split("\n\n") if c.startswith("curl")]


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def test_the_curl_examples_run_as_they_stand(folder: Path, tmp_path: Path) -> None:
    if shutil.which("curl") is None or not is_free(8080):
        pytest.skip("needs curl, and port 8080 to be free")
    server = Running(folder, tmp_path / "log", "--mtp", "--port", 8080)
    try:
        found = {c: subprocess.run(["bash", "-c", c], capture_output=True, text=True, timeout=60) for c in examples()}
        assert len(found) == 4
        for command, done in found.items():
            assert done.returncode == 0 and '"error"' not in done.stdout, (command, done)
        models, chat, stream, metrics = (done.stdout for done in found.values())
        assert '"demo-mlx"' in models
        assert '"content": "' in chat and '"mtp_active": true' in chat
        assert stream.rstrip().endswith("data: [DONE]") and '"usage"' in stream
        assert "ds4convert_mtp_active 1" in metrics
    finally:
        assert server.end() == 0
