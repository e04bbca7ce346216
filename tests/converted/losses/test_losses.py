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


LANE = re.compile(r'<div class="name">(.*?) <span>.*?</div>\n<div class="cells".*?</div></div>', re.S)
SPAN = re.compile(r'title="layers? (\d+)(?: to (\d+))?: ([^"]*)"')


def told_by_the_map(page: str, section: str) -> dict[tuple[str, int], str]:
    """Return what a map says of every role and layer."""
    text = page[page.index(f'<section id="{section}"') :]
    found: dict[tuple[str, int], str] = {}
    for lane in LANE.finditer(text[: text.index("</section>")]):
        for first, last, said in SPAN.findall(lane[0]):
            for layer in range(int(first), int(last or first) + 1):
                assert (lane[1], layer) not in found
                found[lane[1], layer] = said
    return found


@pytest.mark.slow
def test_the_page_says_format_and_error_of_every_role_in_every_layer(rounded: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    s.cli("verify", rounded, "--mtp", "--max-tokens", "4", "--report", page, exit_code=None)
    rows = [r for r in json.loads(s.cli("inspect", rounded, "--json").stdout)["losses"] if r["layer"] is not None]
    inside = [r for r in rows if not r["group"].startswith("mtp")]
    formats, errors = (told_by_the_map(page.read_text(), name) for name in ("formats", "rounding"))
    assert len(inside) > 10 and len(formats) == len(errors) == len(inside)
    assert sorted(said for said in formats.values()) == sorted(
        f"{' + '.join(r['formats'])}, {r['bits_per_weight']:.3g} bits" for r in inside
    )
    assert sum(said == "nothing lost" for said in errors.values()) == sum(not r["relative_square"] for r in inside)
    assert formats["experts", 0] == "affine-2-g64, 2.5 bits" and errors["experts", 0].startswith(
        "affine-2-g64, error 0."
    )
