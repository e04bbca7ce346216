"""What rounding cost is told by layer and role: in the text and JSON of `inspect`, and as maps on the report's page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests import support_run as s

DEMO = s.ROOT / "manifests" / "demo"


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("losses") / "mlx"
    s.cli("quantize", DEMO, out, "--backbone", "affine-6-g64", "--experts", "affine-2-g64")
    return out


@pytest.mark.slow
def test_inspect_tells_bits_and_error_of_every_layer_and_role(rounded: Path) -> None:
    rows = json.loads(s.cli("inspect", rounded, "--json").stdout)["losses"]
    config = json.loads((rounded / "config.json").read_text())
    experts = [r for r in rows if r["group"] == "experts"]
    assert [r["layer"] for r in experts] == list(range(config["num_hidden_layers"]))
    assert all(r["bits_per_weight"] == 2.5 and 0.01 < r["relative_square"] < 0.3 for r in experts)
    shared = [r for r in rows if r["group"] == "shared_experts"]
    assert all(r["bits_per_weight"] == 6.5 and 0 < r["relative_square"] < 0.001 for r in shared)
    head = [r for r in rows if r["group"] == "mtp.experts"]
    assert head and all(r["relative_square"] == 0 and r["bits_per_weight"] == 4.25 for r in head)
    assert not any(r["group"] in {"router", "norm", "hyper_connection"} for r in rows)
    told = s.cli("inspect", rounded).stdout
    assert "What rounding cost" in told and re.search(r"experts +affine-2-g64 +2\.50 +\d+\.\d+%.*in layer", told)


def test_inspect_of_a_folder_that_lost_nothing_shows_no_losses(tmp_path: Path) -> None:
    s.run(DEMO, tmp_path / "mlx")
    assert json.loads(s.cli("inspect", tmp_path / "mlx", "--json").stdout)["losses"] == []
    assert "rounding" not in s.cli("inspect", tmp_path / "mlx").stdout


@pytest.mark.slow
def test_the_page_draws_a_cell_per_group_and_layer(rounded: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    s.cli("verify", rounded, "--mtp", "--max-tokens", "4", "--report", page, exit_code=None)
    text = page.read_text()
    rows = json.loads(s.cli("inspect", rounded, "--json").stdout)["losses"]
    maps = re.findall(r'<svg class="map".*?</svg>', text, re.S)
    assert len(maps) == 2 and all(m.count("<rect") == len(rows) for m in maps)
    assert "experts, layer 0, affine-2-g64: 2.50 bits" in text
    shades = [float(x) for x in re.findall(r'fill-opacity="([\d.]+)"', maps[0])]
    assert min(shades) == 0 and max(shades) == 1
