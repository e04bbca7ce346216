"""Every output tensor against the source's values, decoded here and by mlx: the proof that a conversion is right."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import deserialize, safe_open

from tests import support_run as s

mx = pytest.importorskip("mlx.core")

F32_ENDINGS = (
    ".attn_sink", ".e_score_correction_bias", ".ape", "_hc.fn", "_hc.base", "_hc.scale", "hc_head.fn", "hc_head.base",
    "hc_head.scale", "hc_attn_fn", "hc_attn_base", "hc_attn_scale", "hc_ffn_fn", "hc_ffn_base", "hc_ffn_scale",
    "hc_head_fn", "hc_head_base", "hc_head_scale",
)  # fmt: skip
WIDTH = {"U8": 1, "BF16": 2, "U32": 4, "I32": 4, "F32": 4}
LAYOUTS = ("inline", "universal", "mtplx", "vlm", "mlx-lm")


@pytest.fixture(scope="module", params=s.CHECKPOINTS, ids=lambda p: p.parent.name)
def source(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture(scope="module", params=["native", "bf16"])
def recipe(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def result(source: Path, recipe: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("golden") / "mlx"
    s.run(source, out, recipe=recipe)
    return out


@pytest.fixture(scope="module")
def wanted(source: Path) -> dict[str, np.ndarray]:
    return {s.official_hc(k): v for k, v in s.expected_values(source).items()}


def loaded(folder: Path) -> dict[str, object]:
    out: dict[str, object] = {}
    for path in sorted(folder.glob("*.safetensors")):
        out |= mx.load(str(path))
    return out


def values(tensors: dict[str, object], config: dict[str, object], path: str) -> np.ndarray:
    """Return the values that a host sees for `path`, dequantized by mlx as the config's table says."""
    found = tensors[path]
    stem = path.removesuffix(".weight")
    scales = tensors.get(f"{stem}.scales")
    if scales is not None:
        entry = config["quantization"][stem]
        found = mx.dequantize(found, scales, None, **entry, dtype=mx.float32)
    elif found.dtype == mx.bfloat16:
        found = found.astype(mx.float32)
    return np.array(found)


def test_the_golden_folder_holds_checkpoints() -> None:
    assert len(s.CHECKPOINTS) >= 2


def test_every_output_tensor_dequantized_by_mlx_equals_the_source(result: Path, wanted: dict[str, np.ndarray]) -> None:
    tensors, config = loaded(result), json.loads((result / "config.json").read_text())
    weights = {n for n in tensors if not n.endswith(".scales")}
    assert weights == set(wanted)
    for path, value in wanted.items():
        found = values(tensors, config, path)
        assert found.shape == value.shape, path
        assert np.array_equal(found, value), f"{path}: {np.argwhere(found != value)[:3]}"


def test_native_keeps_the_source_codes_and_bf16_stores_no_codes(result: Path, recipe: str) -> None:
    kinds = {t.dtype for t in s.stored(result).values()}
    assert kinds == ({"U32", "U8", "F32", "BF16", "I32"} if recipe == "native" else {"F32", "BF16", "I32"})


def test_dtypes_are_those_that_the_hosts_expect(result: Path) -> None:
    for name, t in s.stored(result).items():
        if name.endswith(F32_ENDINGS):
            assert t.dtype == "F32", name
        elif name.endswith(".tid2eid"):
            assert t.dtype == "I32", name
        elif name.endswith(".scales"):
            assert t.dtype == "U8", name
        else:
            assert t.dtype in {"U32", "BF16"}, name


def test_safe_open_reads_every_file_and_sees_the_same_bytes_as_we_do(result: Path) -> None:
    ours, seen = s.stored(result), set()
    for path in sorted(result.glob("*.safetensors")):
        with safe_open(path, framework="np") as f:
            assert f.metadata() == {"format": "mlx"}
            for name in f.keys():  # noqa: SIM118 (not a dict)
                part = f.get_slice(name)
                assert (part.get_dtype(), tuple(part.get_shape())) == (ours[name].dtype, ours[name].shape)
                if ours[name].dtype != "BF16":  # numpy has no such dtype
                    assert np.array_equal(f.get_tensor(name), ours[name].raw()), name
        for name, t in deserialize(path.read_bytes()):
            assert bytes(t["data"]) == ours[name].raw().tobytes(), name
            seen.add(name)
    assert seen == set(ours)


def test_every_tensor_is_aligned_to_its_dtype(result: Path) -> None:
    for name, t in s.stored(result).items():
        assert t.start % WIDTH[t.dtype] == 0, name


def test_the_index_names_every_tensor_in_its_file_and_adds_up_their_bytes(result: Path) -> None:
    index = json.loads((result / "model.safetensors.index.json").read_text())
    ours = s.stored(result)
    assert index["weight_map"] == {n: t.file for n, t in ours.items()}
    assert list(index["weight_map"]) == sorted(index["weight_map"])
    assert index["metadata"]["total_size"] == sum(t.size for t in ours.values())


def test_the_head_lies_in_files_of_its_own(result: Path) -> None:
    for name, t in s.stored(result).items():
        assert t.file.startswith("model-mtp") == name.startswith("mtp."), name


def test_nothing_is_left_out_and_every_source_tensor_is_recorded_once(result: Path, source: Path) -> None:
    record = json.loads((result / "ds4convert_manifest.json").read_text())
    assert record["left_out"] == []
    used = [n for r in record["tensors"] for n in r["sources"]]
    assert set(used) == set(s.stored(source))
    ours = s.stored(result)
    for r in record["tensors"]:
        t = ours.pop(r["name"])
        assert (r["file"], r["offset"], r["bytes"], r["dtype"], r["shape"]) == (
            t.file,
            t.start,
            t.size,
            t.dtype,
            list(t.shape),
        )
    assert not ours


def test_the_manifest_records_the_sha256_of_every_other_file(result: Path) -> None:
    record = json.loads((result / "ds4convert_manifest.json").read_text())
    found = s.contents(result)
    found.pop("ds4convert_manifest.json")
    assert {f["name"]: f["sha256"] for f in record["files"]} == found


def test_the_quantization_table_is_full_and_stands_under_both_keys(result: Path, recipe: str) -> None:
    config = json.loads((result / "config.json").read_text())
    if recipe == "bf16":
        assert "quantization" not in config and "quantization_config" not in config
        return
    table = config["quantization"]
    assert config["quantization_config"] == table
    stems = {n.removesuffix(".scales") for n in s.stored(result) if n.endswith(".scales")}
    entries = {k for k, v in table.items() if isinstance(v, dict)}
    block = {f"mtp.0.block.{n.removeprefix('mtp.0.')}" for n in stems if n.startswith("mtp.0.")}
    assert entries == stems | block
    for stem in stems:
        mode = "mxfp4" if ".switch_mlp." in stem else "mxfp8"
        assert table[stem] == {"group_size": 32, "bits": 4 if mode == "mxfp4" else 8, "mode": mode}
    assert {"group_size", "bits", "mode"} <= set(table)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_holds_the_same_values_and_verifies_against_its_source(
    source: Path, recipe: str, layout: str, wanted: dict[str, np.ndarray], tmp_path: Path
) -> None:
    out = tmp_path / "mlx"
    s.run(source, out, layout=layout, recipe=recipe)
    assert s.wrong(out, source) == []
    config = json.loads((out / "config.json").read_text())
    tensors = loaded(out)
    backbone = {k for k in wanted if not k.startswith("mtp.")}
    assert {n for n in tensors if not n.startswith("mtp.") and not n.endswith(".scales")} == backbone
    assert config["num_nextn_predict_layers"] == (0 if layout == "vlm" else 1)
    assert ("model_file" in config) == (layout == "mlx-lm")
    for path in backbone:
        assert np.array_equal(values(tensors, config, path), wanted[path]), path
    assert not any(p.is_file() and p.suffix == ".safetensors" and "mtp" in p.name for p in out.iterdir()) or any(
        n.startswith("mtp.") for n in tensors
    )
    if layout in {"universal", "vlm"}:
        below, table = loaded(out / "mtp"), json.loads((out / "mtp" / "config.json").read_text())
        head = {mtplx: v for mtplx, v in s.expected_values(source).items() if mtplx.startswith("mtp.0.")}
        names = {n for n in below if not n.endswith(".scales")}
        assert len(names) == len(head)
        for path, value in head.items():
            tail = path.removeprefix("mtp.0.")
            name = next(n for n in (tail, f"decoder.{tail}") if n in below)
            assert np.array_equal(values(below, table, name), value), name
