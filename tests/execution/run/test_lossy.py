"""Conversions that round: what they cost is recorded truly, whatever the number of workers or of interruptions."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from tests import support_run as s
from tests.execution.run.test_resume import Died, DiesInSecondFile

MIXES = {
    "affine": ["--backbone", "affine-4-g64", "--experts", "affine-2-g32", "--mtp", "affine-8-g128"],
    "odd widths": ["--backbone", "affine-6-g32", "--experts", "affine-3-g64", "--mtp", "affine-5-g64"],
    "floats": ["--backbone", "mxfp8", "--experts", "nvfp4", "--mtp", "mxfp4"],
}
SHARD = "1.5MB"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return s.tiny(tmp_path_factory.mktemp("lossy") / "source")


@dataclass
class Converted:
    """A finished folder, the flags that made it, and its manifest."""

    folder: Path
    flags: list[str]

    @property
    def manifest(self) -> dict[str, Any]:
        return json.loads((self.folder / "ds4convert_manifest.json").read_text())


@pytest.fixture(scope="module", params=MIXES)
def converted(request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    out = tmp_path_factory.mktemp("rounded") / "mlx"
    flags = [*MIXES[request.param], "--max-shard-size", SHARD]
    s.cli("quantize", source, out, *flags, "--jobs", "1")
    return Converted(out, flags)


def dequantized(folder: Path) -> dict[str, np.ndarray]:
    """Return the values of every quantized tensor as MLX itself reads it, by path."""
    table = json.loads((folder / "config.json").read_text())["quantization"]
    arrays: dict[str, mx.array] = {}
    for path in sorted(folder.glob("*.safetensors")):
        arrays |= mx.load(str(path))
    out = {}
    for path, entry in table.items():
        if isinstance(entry, dict) and f"{path}.weight" in arrays:
            parts = [arrays[f"{path}.{k}"] for k in ("weight", "scales", "biases") if f"{path}.{k}" in arrays]
            parts = [parts[0], *(p.astype(mx.float32) if p.dtype == mx.bfloat16 else p for p in parts[1:])]
            out[path] = np.array(mx.dequantize(*parts, **entry, dtype=mx.float32))
    return out


@pytest.mark.sampled(2)
def test_the_recorded_errors_are_those_that_mlx_shows(converted: Converted, source: Path) -> None:
    values, wanted = dequantized(converted.folder), s.expected_values(source)
    wanted = {s.official_hc(k): v for k, v in wanted.items()}
    records = {r["name"]: r for r in converted.manifest["tensors"] if "error" in r}
    assert len(records) > 30
    for name, record in records.items():
        path = name.removesuffix(".weight")
        found = next(values[p] for p in (path, path.removeprefix("model.")) if p in values)
        truth = next(v for k, v in wanted.items() if k.removesuffix(".weight") in {path, "model." + path})
        error = found.astype(np.float64) - truth
        relative = (error**2).sum() / (truth.astype(np.float64) ** 2).sum()
        assert record["error"]["relative_square"] == pytest.approx(relative, rel=1e-4, abs=1e-12), name
        assert record["error"]["max_abs"] == pytest.approx(np.abs(error).max(), rel=1e-4, abs=1e-12), name


@pytest.mark.sampled(1)
def test_verify_accepts_the_recorded_error_and_no_other(converted: Converted, source: Path, tmp_path: Path) -> None:
    assert s.failed_checks(converted.folder, "--source", source) == []
    out = s.copied(converted.folder, tmp_path / "mlx")
    record = max((r for r in converted.manifest["tensors"] if "error" in r), key=lambda r: r["bytes"])
    path = out / record["file"]
    for bit in (0, 3, 7):
        s.flip(path, record["offset"] + record["bytes"] // 2, bit)
    assert "values" in s.failed_checks(out, "--source", source)


@pytest.mark.sampled(1)
def test_the_number_of_workers_and_the_hashing_do_not_change_a_byte(
    converted: Converted, source: Path, tmp_path: Path
) -> None:
    wanted = s.contents(converted.folder)
    for jobs in ("2", "7"):
        s.cli("quantize", source, tmp_path / jobs, *converted.flags, "--jobs", jobs)
        assert s.contents(tmp_path / jobs) == wanted
    s.cli("quantize", source, tmp_path / "plain", *converted.flags, "--no-hash")
    plain = s.contents(tmp_path / "plain")
    assert {k: v for k, v in plain.items() if "manifest" not in k} == {
        k: v for k, v in wanted.items() if "manifest" not in k
    }


@pytest.mark.parametrize("hashing", [True, False])
def test_a_run_that_rounds_goes_on_where_it_died(
    source: Path, hashing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ds4convert.execution.file_writer.BATCH_BYTES", 50_000)
    options = {"hashing": hashing, "max_shard_bytes": 1_500_000, "formats": ("affine-4-g64", "affine-3-g32", "mxfp8")}
    s.run(source, tmp_path / "whole", **options)
    out = tmp_path / "mlx"
    with pytest.raises(Died):
        s.run(source, out, disk=DiesInSecondFile(), jobs=1, **options)
    lines = [json.loads(x) for x in (out / ".ds4convert" / "journal.jsonl").read_text().splitlines()]
    losses = [loss for x in lines for _, _, loss in x.get("steps", [])]
    assert any(losses), "nothing that was rounded is recorded as finished"
    assert s.run(source, out, **options).resumed
    assert s.contents(out) == s.contents(tmp_path / "whole")
