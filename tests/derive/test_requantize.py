"""A converted folder as source: nothing new is lost where nothing has to be, and the manifest tells the whole chain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests import support
from tests import support_run as s


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return s.tiny(tmp_path_factory.mktemp("again") / "source")


@pytest.fixture(scope="module")
def native(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("native") / "mlx"
    s.run(source, out)
    return out


@pytest.fixture(scope="module")
def lossy(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("lossy") / "mlx"
    s.run(source, out, formats=("affine-6-g64", "affine-4-g32", "nvfp4"))
    return out


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "ds4convert_manifest.json").read_text())


def tensors(folder: Path) -> dict[str, bytes]:
    return {name: t.raw().tobytes() for name, t in s.stored(folder).items()}


@pytest.mark.sampled(2)
@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    support.nightly(
        [["--recipe", "q3"], ["--backbone", "affine-4-g64", "--mtp", "mxfp8"], ["--recipe", "bf16"]],
        lambda words: "--backbone" not in words,
    ),
)
def test_from_a_native_folder_come_the_tensors_that_the_official_checkpoint_gives(
    source: Path, native: Path, words: list[str], tmp_path: Path
) -> None:
    s.cli("quantize", source, tmp_path / "direct", *words)
    s.cli("quantize", native, tmp_path / "again", "--from-mlx", *words)
    direct, again = tmp_path / "direct", tmp_path / "again"
    assert tensors(direct) == tensors(again)
    assert (direct / "config.json").read_bytes() == (again / "config.json").read_bytes()
    assert s.failed_checks(again, "--source", native) == []


def test_the_manifest_records_every_link_of_the_chain(lossy: Path, tmp_path: Path) -> None:
    s.cli("quantize", lossy, tmp_path / "two", "--from-mlx", "--experts", "affine-3-g32")
    s.cli("quantize", tmp_path / "two", tmp_path / "three", "--from-mlx", "--experts", "affine-2-g32")
    first, second, third = manifest(lossy), manifest(tmp_path / "two"), manifest(tmp_path / "three")
    chain = third["source"]["chain"]
    assert [link["digest"] for link in chain] == [first["digest"], second["digest"]]
    assert chain[0]["source"]["files"] == first["source"]["files"] and chain[0]["formats"] == first["formats"]
    name = "model.layers.0.ffn.switch_mlp.up_proj.weight"
    errors = [link["errors"][name]["relative_square"] for link in chain]
    last = next(r["error"]["relative_square"] for r in third["tensors"] if r["name"] == name)
    assert 0 < errors[0] < errors[1] < last
    assert "chain" not in first["source"]
    for after, before in ((tmp_path / "two", lossy), (tmp_path / "three", tmp_path / "two")):
        assert s.failed_checks(after, "--source", before) == []


def test_what_keeps_its_format_is_copied_byte_for_byte(lossy: Path, tmp_path: Path) -> None:
    s.cli("quantize", lossy, tmp_path / "same", "--from-mlx")
    assert tensors(tmp_path / "same") == tensors(lossy)
    assert not any("error" in r for r in manifest(tmp_path / "same")["tensors"])
    s.cli("quantize", lossy, tmp_path / "headless", "--from-mlx", "--drop-mtp")
    assert {n for n in tensors(lossy) if not n.startswith("mtp.")} == set(tensors(tmp_path / "headless"))
    assert s.failed_checks(tmp_path / "headless") == []


@pytest.mark.sampled(1)
@pytest.mark.parametrize("layout", ["mtplx", "vlm"])
def test_a_folder_of_any_layout_is_read_and_written(lossy: Path, source: Path, layout: str, tmp_path: Path) -> None:
    s.cli("relayout", lossy, tmp_path / "laid", "--layout", layout)
    s.cli("quantize", tmp_path / "laid", tmp_path / "again", "--from-mlx", "--experts", "affine-2-g64")
    s.cli("quantize", lossy, tmp_path / "direct", "--from-mlx", "--experts", "affine-2-g64", "--layout", "inline")
    assert tensors(tmp_path / "again") == tensors(tmp_path / "direct")


def test_a_converted_folder_is_not_taken_for_an_official_checkpoint(native: Path, source: Path, tmp_path: Path) -> None:
    told = s.cli("quantize", native, tmp_path / "out", exit_code=3).stderr
    assert "--from-mlx" in told and not (tmp_path / "out").exists()
    told = s.cli("quantize", source, tmp_path / "out", "--from-mlx", exit_code=3).stderr
    assert "not a converted folder" in told
    told = s.cli("plan", native, "--from-mlx", "--fit", "64GB", exit_code=2).stderr
    assert "--fit" in told


def test_a_folder_of_unknown_history_says_so(native: Path, tmp_path: Path) -> None:
    bare = s.copied(native, tmp_path / "bare")
    (bare / "ds4convert_manifest.json").unlink()
    s.cli("quantize", bare, tmp_path / "out", "--from-mlx", "--experts", "affine-3-g64")
    (link,) = manifest(tmp_path / "out")["source"]["chain"]
    assert link["tool"] is None and link["errors"] is None
