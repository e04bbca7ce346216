"""Peak memory is that of one layer, however many there are. Each run has a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import support

SCRIPT = """
import json, sys
from pathlib import Path
from ds4convert.evaluate.layerwise import run_layerwise
folder = Path(sys.argv[1])
result = run_layerwise(folder, [list(range(40)), list(range(100, 130))])
print(json.dumps(result.as_json()["memory"]))
"""


def folder(tmp_path: Path, layers: int) -> Path:
    raw = support.tiny_config(
        hidden_size=512, moe_intermediate_size=512, n_routed_experts=32, num_experts_per_tok=4,
        num_hidden_layers=layers, compress_ratios=[*([0, 4] * (layers // 2)), 0],
    )  # fmt: skip
    return support.write_synth(tmp_path / f"layers-{layers}", raw)


def measure(path: Path) -> dict[str, int]:
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path)], cwd=support.ROOT, capture_output=True, text=True, check=True
    )
    return dict(json.loads(run.stdout))


@pytest.mark.slow
def test_peak_does_not_grow_with_the_number_of_layers(tmp_path: Path) -> None:
    two, eight = measure(folder(tmp_path, 2)), measure(folder(tmp_path, 8))
    dense_layer = 32 * 3 * 512 * 512 * 4
    assert eight["weights"] - two["weights"] > 5.5 * two["largest_layer"]
    assert eight["mlx_peak"] - two["mlx_peak"] < two["largest_layer"]
    assert eight["peak_rss"] - two["peak_rss"] < dense_layer / 3, "six more layers would be six times dense_layer"
