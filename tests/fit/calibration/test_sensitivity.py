"""Sensitivities: each is the KL of a model with one matrix rounded, they are resumed, and `--fit` goes by them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from safetensors.numpy import load_file, save_file

from ds4convert.checkpoint.inventory import key_of
from ds4convert.checkpoint.source import open_source
from ds4convert.errors import InputError
from ds4convert.evaluate import calibration
from ds4convert.evaluate.calibration import Sensitivities
from ds4convert.evaluate.inputs import sensitivity
from ds4convert.evaluate.layerwise import run_layerwise
from ds4convert.evaluate.walk import Walk
from ds4convert.execution import run
from ds4convert.fit import format_errors
from ds4convert.planning import build
from ds4convert.planning.build import make_plan
from ds4convert.planning.layouts import layout_of
from ds4convert.planning.recipes import Rule, recipe_of
from tests import support_run as s
from tests.support import nightly

TINY = s.CHECKPOINTS[0]
ROWS = [[(7 * n + 13 * m) % 200 + 2 for n in range(24)] for m in range(2)]
INVENTORY = open_source(TINY).inventory


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Sensitivities:
    return sensitivity.measure(TINY, INVENTORY, ROWS, tmp_path_factory.mktemp("sensitivity") / "file")


def test_every_matrix_of_the_backbone_has_one(known: Sensitivities) -> None:
    wanted = calibration.probes(INVENTORY)
    assert known.losses.keys() == wanted.keys() and len(wanted) > 20
    assert all(v >= 0 for v in known.losses.values()) and sum(v > 0 for v in known.losses.values()) > len(wanted) / 2


KINDS = ("embedding.embed", "experts.w2", "attention.wo_a", "head.head")


@pytest.mark.sampled(1)
@pytest.mark.parametrize("kind", nightly(KINDS, lambda kind: kind not in {"experts.w2", "attention.wo_a"}))
def test_it_is_the_divergence_of_a_conversion_with_that_matrix_alone_rounded(
    kind: str, known: Sensitivities, tmp_path: Path
) -> None:
    source = open_source(TINY)
    (_, layer), modules = next((u, m) for u, m in format_errors.units(INVENTORY, True).items() if u[0] == kind)
    key = key_of(modules[0])
    rule = Rule(frozenset({kind}), None if layer is None else frozenset({layer}), known.probes[key])
    recipe = replace(recipe_of("native"), rules=(rule,))
    run.run(source, make_plan(source, build.Options(recipe, layout_of("inline"))), tmp_path / "mlx")
    found = run_layerwise(tmp_path / "mlx", ROWS, source=TINY).divergence
    assert found is not None and known.losses[key] == pytest.approx(found.kl_mean, rel=0.02, abs=1e-8)


@pytest.mark.nightly
def test_batches_of_any_size_give_the_same_and_are_gone_on_from(
    known: Sensitivities, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    walks: list[int] = []
    begin = Walk.embed

    def counted(self: Walk, prompts: list[mx.array]) -> None:
        walks.append(len(walks))
        if len(walks) == 3:
            raise KeyboardInterrupt
        begin(self, prompts)

    monkeypatch.setattr(Walk, "embed", counted)
    size = 48 * INVENTORY.config.dims["D"] * 4 * 4
    limit = size * (len(known.losses) // 4 + 1)
    with pytest.raises(KeyboardInterrupt):
        sensitivity.measure(TINY, INVENTORY, ROWS, tmp_path / "file", limit=limit)
    before = len(walks)
    found = sensitivity.measure(TINY, INVENTORY, ROWS, tmp_path / "file", limit=limit)
    assert len(walks) - before <= 2 + len(known.losses) // 4 and len(walks) > before
    assert found.losses == pytest.approx(known.losses, rel=1e-3, abs=1e-9)
    sensitivity.finished(tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def calibrated(path: Path, known: Sensitivities | None) -> calibration.Calibration:
    calibration.write(path, INVENTORY, {}, 48, known)
    return calibration.read(path, INVENTORY)


def test_the_file_gives_back_what_was_written(known: Sensitivities, tmp_path: Path) -> None:
    found = calibrated(tmp_path / "file", known).sensitivities
    assert found is not None and found.probes == known.probes
    assert found.losses == pytest.approx(known.losses, rel=1e-6)
    assert calibrated(tmp_path / "other", None).sensitivities is None


@pytest.mark.parametrize("kind", ["other units", "negative", "short"])
def test_sensitivities_of_other_units_are_refused(kind: str, known: Sensitivities, tmp_path: Path) -> None:
    path = tmp_path / "file"
    some = dict(list(known.losses.items())[:-1]) if kind == "other units" else known.losses
    calibration.write(path, INVENTORY, {}, 48, Sensitivities(some, known.probes))
    if kind != "other units":
        values, told = load_file(path), _metadata(path)
        values["sensitivity"] = -values["sensitivity"] - 1 if kind == "negative" else values["sensitivity"][1:].copy()
        save_file(values, path, told)
    with pytest.raises(InputError, match="calibrate --sensitivity"):
        calibration.read(path, INVENTORY)


def _metadata(path: Path) -> dict[str, str]:
    with path.open("rb") as f:
        table: dict[str, Any] = json.loads(f.read(int.from_bytes(f.read(8), "little")))
    return dict(table["__metadata__"])


def test_fit_goes_by_them_and_says_so(known: Sensitivities, tmp_path: Path) -> None:
    """The matrix that is said to matter most gets more bits than its equals, though all weights look alike."""
    key = next(k for k in known.losses if k.endswith("layers.1.ffn.switch_mlp.down_proj"))
    losses = dict.fromkeys(known.losses, 1e-6) | {key: 1.0}
    calibrated(tmp_path / "file", Sensitivities(losses, known.probes))
    smallest = json.loads(s.cli("plan", TINY, "--fit", "1GB", "--json").stdout)["fit"]["smallest_bytes"]
    words = ["plan", TINY, "--fit", str(smallest + 100_000), "--json"]
    plain = json.loads(s.cli(*words).stdout)["fit"]
    told = json.loads(s.cli(*words, "--calibration", tmp_path / "file").stdout)["fit"]
    assert plain["basis"] == "weights" and told["basis"] == "sensitivity"
    bits = {(r["role"], layer): r["bits_per_weight"] for r in told["table"] for layer in layers_of(r["layers"])}
    mine, others = bits["experts.w2", 1], [b for (role, _), b in bits.items() if role == "experts.w3"]
    assert others and mine > min(others)


def layers_of(text: str) -> list[int]:
    """Return the numbers of layers that a table tells in runs, such as 0-2,5."""
    runs = [run.partition("-") for run in text.split(",") if run]
    return [n for first, _, last in runs for n in range(int(first), int(last or first) + 1)]
