"""Folders as other programs write them: their names, shapes and tables, read by `relayout` and `graft`."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import support
from tests import support_run as s

MANIFEST = "ds4convert_manifest.json"
FORMAT = ["--backbone", "affine-4-g32", "--experts", "mxfp4"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source; its conversion with the head in two layouts, and without the head."""
    home = tmp_path_factory.mktemp("home")
    s.tiny(home / "source", layers=3, experts=4)
    for name, words in {"mtplx": ["--layout", "mtplx"], "vlm": ["--layout", "vlm"], "none": ["--drop-mtp"]}.items():
        s.cli("quantize", home / "source", home / name, *words, *FORMAT, "-q")
    return home


def rewritten(folder: Path, out: Path, rename: Callable[[str], str], deep: bool = False, index: bool = True) -> Path:
    """Return a folder of the same tensors under other names; `deep`: `wo_a` in three dimensions. No manifest."""
    groups = json.loads((folder / "config.json").read_text())["o_groups"]
    tensors = {}
    for name, t in support.read_folder(folder).items():
        if deep and ".wo_a." in name:
            t = support.Tensor(t.dtype, [groups, t.shape[0] // groups, t.shape[1]], t.data)
        tensors[rename(name)] = t
    config = json.loads((folder / "config.json").read_text())
    for key in ("quantization", "quantization_config"):
        config[key] = {rename(k) if isinstance(v, dict) else k: v for k, v in config[key].items()}
    support.write_folder(out, tensors, config, 2)
    if not index:
        (out / support.INDEX).unlink()
    return out


def vlm_name(name: str) -> str:
    return f"language_model.{name}"


def branch_name(name: str) -> str:
    """As an mlx-lm branch stores a head: what a layer has too lies under `block`."""
    own = ("enorm", "hnorm", "norm", "e_proj", "h_proj", "hc_head")
    if name.startswith("mtp.0.") and name.split(".")[2] not in own:
        return name.replace("mtp.0.", "mtp.0.block.", 1)
    return name


def omlx_name(name: str) -> str:
    return branch_name(name).replace(".attn_hc.", ".hc_attn.").replace(".ffn_hc.", ".hc_ffn.")


def decoder_name(name: str) -> str:
    return branch_name(name).replace(".block.", ".decoder.")


def same(name: str) -> str:
    return name


def assert_equal(out: Path, wanted: Path) -> None:
    """Assert that every tensor and the quantization table are those of `wanted`."""
    found, expected = support.read_folder(out), support.read_folder(wanted)
    assert set(found) == set(expected)
    assert all(found[n] == expected[n] for n in expected), [n for n in expected if found[n] != expected[n]]
    tables = [json.loads((f / "config.json").read_text())["quantization"] for f in (out, wanted)]
    assert tables[0] == tables[1]
    assert s.wrong(out) == []


@pytest.mark.sampled(3)
@pytest.mark.parametrize("index", support.nightly([True, False], lambda index: index))
@pytest.mark.parametrize(
    ("base", "rename", "deep"),
    [
        ("none", vlm_name, True), ("none", same, True), ("none", same, False), ("mtplx", same, False),
        ("mtplx", branch_name, True), ("mtplx", omlx_name, True), ("mtplx", decoder_name, False),
    ],
)  # fmt: skip
def test_their_spelling_becomes_ours_without_a_changed_value(
    home: Path, base: str, rename: Callable[[str], str], deep: bool, index: bool, tmp_path: Path
) -> None:
    theirs = rewritten(home / base, tmp_path / "theirs", rename, deep, index)
    before = s.contents(theirs)
    s.cli("relayout", theirs, tmp_path / "out", "--layout", "mtplx", "-q")
    assert_equal(tmp_path / "out", home / base)
    assert s.contents(theirs) == before


def test_a_drafter_folder_beside_the_model_is_its_head(home: Path, tmp_path: Path) -> None:
    theirs = rewritten(home / "none", tmp_path / "theirs", vlm_name, True)
    drafter = s.copied(home / "vlm" / "mtp", tmp_path / "theirs-mtp")
    s.cli("relayout", theirs, tmp_path / "out", "--layout", "mtplx", "--drafter", drafter, "-q")
    assert_equal(tmp_path / "out", home / "mtplx")


def test_a_head_that_the_index_leaves_out_is_found(home: Path, tmp_path: Path) -> None:
    theirs = rewritten(home / "mtplx", tmp_path / "theirs", same)
    tensors = support.read_folder(theirs)
    (theirs / support.INDEX).unlink()
    for path in theirs.glob("*.safetensors"):
        path.unlink()
    head = {n: t for n, t in tensors.items() if n.startswith("mtp.")}
    support.write_file(theirs / "model.safetensors", {n: t for n, t in tensors.items() if n not in head})
    support.write_file(theirs / "mtp.safetensors", head)
    weights = {n: "model.safetensors" for n in tensors if n not in head}
    (theirs / support.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    s.cli("relayout", theirs, tmp_path / "out", "--layout", "mtplx", "-q")
    assert_equal(tmp_path / "out", home / "mtplx")


def test_modules_that_the_table_does_not_list_have_its_scalars(home: Path, tmp_path: Path) -> None:
    s.cli("quantize", home / "source", tmp_path / "even", "--drop-mtp", "--backbone", "affine-8-g64", "-q")
    theirs = rewritten(tmp_path / "even", tmp_path / "theirs", same, True)
    scalars = {"group_size": 64, "bits": 8}
    support.edit_json(theirs / "config.json", lambda c: c.update(quantization=scalars, quantization_config=scalars))
    s.cli("relayout", theirs, tmp_path / "out", "--layout", "inline", "-q")
    found, wanted = support.read_folder(tmp_path / "out"), support.read_folder(tmp_path / "even")
    assert found == wanted and s.wrong(tmp_path / "out") == []


def test_bf16_where_f32_belongs_is_widened(home: Path, tmp_path: Path) -> None:
    theirs = rewritten(home / "none", tmp_path / "theirs", same, True)
    tensors, name = support.read_folder(theirs), "model.layers.1.attn.compressor.ape"
    wide = tensors[name]
    count = math.prod(wide.shape)
    high = b"".join(wide.data[4 * i + 2 : 4 * i + 4] for i in range(count))
    tensors[name] = support.Tensor("BF16", wide.shape, high)
    config = json.loads((theirs / "config.json").read_text())
    support.write_folder(tmp_path / "narrow", tensors, config)
    s.cli("relayout", tmp_path / "narrow", tmp_path / "out", "--layout", "inline", "-q")
    found = support.read_folder(tmp_path / "out")[name]
    assert found.dtype == "F32" and found.shape == wide.shape
    assert found.data == b"".join(b"\0\0" + high[2 * i : 2 * i + 2] for i in range(count))
    assert s.wrong(tmp_path / "out") == []


@pytest.mark.parametrize("place", ["--out", "--in-place"])
def test_a_head_is_grafted_onto_their_folder(home: Path, place: str, tmp_path: Path) -> None:
    theirs = rewritten(home / "none", tmp_path / "theirs", vlm_name, True)
    before = s.contents(theirs)
    words = [place, *([tmp_path / "out"] if place == "--out" else [])]
    done = support.run("graft", theirs, "--from", home / "source", "--layout", "mtplx", *words)
    assert s.contents(theirs) == before
    if place == "--in-place":
        support.assert_refused(support.run(*["graft", theirs, "--from", home / "source", "-q", *words]), "--out DIR")
        return
    assert done.code == 0, done.err
    assert_equal(tmp_path / "out", home / "mtplx")
    record = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert all(r["sources"] and r["source_dtype"] for r in record["tensors"])


def test_a_name_in_two_spellings_is_refused(home: Path, tmp_path: Path) -> None:
    theirs = rewritten(home / "none", tmp_path / "theirs", same)
    tensors = support.read_folder(theirs)
    tensors["language_model.model.norm.weight"] = tensors["model.norm.weight"]
    support.write_folder(tmp_path / "twice", tensors, json.loads((theirs / "config.json").read_text()))
    result = support.run("relayout", tmp_path / "twice", tmp_path / "out", "--layout", "inline")
    support.assert_refused(result, "model.norm.weight", "two spellings")


def mlx_vlm(*words: str | Path) -> None:
    """Run one of mlx-vlm's own programs."""
    env = s.environment() | {"HF_HUB_OFFLINE": "1"}
    command: list[Any] = [sys.executable, "-m", *words]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr


@pytest.mark.nightly
@pytest.mark.slow
def test_what_mlx_vlm_itself_writes_gets_a_head_that_works(tmp_path: Path) -> None:
    """Its converted folder with a grafted head, and with the drafter that it splits off, are the same tensors."""
    pytest.importorskip("mlx_vlm")
    demo, theirs = s.ROOT / "manifests" / "demo", tmp_path / "theirs"
    s.cli("quantize", demo, tmp_path / "bf16", "--recipe", "bf16", "--drop-mtp", "-q")
    words = ["-q", "--q-bits", "8", "--q-group-size", "64"]
    mlx_vlm("mlx_vlm", "convert", "--hf-path", tmp_path / "bf16", "--mlx-path", theirs, *words)
    mlx_vlm("mlx_vlm.split_mtp", "--model", demo, "--output", tmp_path / "drafter")
    s.cli("graft", theirs, "--from", demo, "--out", tmp_path / "grafted", "-q")
    s.cli("relayout", theirs, tmp_path / "joined", "--drafter", tmp_path / "drafter", "--layout", "inline", "-q")
    assert support.read_folder(tmp_path / "joined") == support.read_folder(tmp_path / "grafted")
    assert s.wrong(tmp_path / "joined") == []
    loaded, kind = pytest.importorskip("mlx_vlm.speculative.drafters").load_drafter(str(tmp_path / "grafted"))
    assert kind == "mtp" and loaded is not None
    words = ["--mtp", "--max-tokens", "8", "--json"]
    facts = json.loads(s.cli("verify", tmp_path / "grafted", *words).stdout)
    assert facts["ok"] and facts["mtp"]["acceptance"] > 0.5
