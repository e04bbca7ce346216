"""Folders of other programs in our spelling: names, joined shapes, tables, and what is said of those that are not read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ds4convert.checkpoint.folder import Checkpoint
from ds4convert.checkpoint.types import Finding, Header, TensorInfo
from ds4convert.converted import names
from ds4convert.errors import HeaderError
from ds4convert.formats.codecs import CODECS
from ds4convert.storage.local_files import LocalFiles
from ds4convert.storage.records import SourceFile

V4 = {"model_type": "deepseek_v4"}


def info(name: str, dtype: str = "BF16", shape: tuple[int, ...] = (2, 2), file: int = 0) -> TensorInfo:
    return TensorInfo(name, dtype, shape, file, 0, 8)


def folder(*tensors: TensorInfo, config: Any = V4) -> Checkpoint:
    """Return headers of two files; none is read."""
    headers = tuple(Header(tuple(t for t in tensors if t.file == n), {}, 8) for n in (0, 1))
    files = tuple(SourceFile(f"{n}.safetensors", 8, "") for n in (0, 1))
    raw = None if config is None else config if isinstance(config, bytes) else json.dumps(config).encode()
    return Checkpoint(Path("x"), files, headers, raw, False, LocalFiles({}))


def spelled(*tensors: TensorInfo, config: Any = V4) -> list[TensorInfo]:
    return list(names.canonical(folder(*tensors, config=config)).tensors())


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("language_model.model.norm.weight", "model.norm.weight"), ("model.language_model.x", "model.language_model.x"),
        ("model.layers.0.hc_attn.fn", "model.layers.0.attn_hc.fn"), ("model.layers.0.hc_ffn.fn", "model.layers.0.ffn_hc.fn"),
        ("model.layers.0.hc_attn_fn", "model.layers.0.hc_attn_fn"), ("model.layers.0.attn_hc.fn", "model.layers.0.attn_hc.fn"),
        ("mtp.0.block.attn.wq_a.weight", "mtp.0.attn.wq_a.weight"), ("mtp.1.decoder.hc_ffn.fn", "mtp.1.ffn_hc.fn"),
        ("mtp.0.block", "mtp.0.block"), ("mtp.0.norm.block.x", "mtp.0.norm.block.x"), ("x.0.block.attn.w", "x.0.block.attn.w"),
        ("language_model.mtp.0.block.norm.weight", "mtp.0.norm.weight"),
    ],
)  # fmt: skip
def test_names_of_other_programs(theirs: str, ours: str) -> None:
    """Source: layouts.md, sections 1 and 3 (mlx-vlm's wrapper, oMLX's components, the wrappers of heads)."""
    assert spelled(info(theirs))[0].name == ours


@pytest.mark.parametrize(
    ("name", "shape", "ours"),
    [
        ("model.layers.0.attn.wo_a.weight", (2, 3, 4), (6, 4)), ("model.layers.0.attn.wo_a.scales", (2, 3, 1), (6, 1)),
        ("attn.wo_a.biases", (2, 3, 1), (6, 1)), ("model.layers.0.attn.wo_a.weight", (6, 4), (6, 4)),
        ("model.layers.0.attn.wo_b.weight", (2, 3, 4), (2, 3, 4)), ("model.layers.0.xattn.wo_a.weight", (2, 3, 4), (2, 3, 4)),
        ("model.layers.0.attn.wo_a.weight", (1, 2, 3, 4), (1, 2, 3, 4)),
    ],
)  # fmt: skip
def test_the_groups_of_an_output_projection_become_rows(
    name: str, shape: tuple[int, ...], ours: tuple[int, ...]
) -> None:
    assert spelled(info(name, shape=shape))[0].shape == ours


def test_two_tensors_of_one_name_are_refused_by_the_second_file() -> None:
    with pytest.raises(HeaderError, match=r"^1\.safetensors: model\.x: is here in two spellings$"):
        spelled(info("model.x"), info("language_model.model.x", file=1))


def test_files_are_told_of_which_something_was_respelled() -> None:
    before = folder(info("model.x"), info("language_model.y", file=1), info("z", file=1))
    assert names.changed(before, names.canonical(before)) == {1}
    same = folder(info("model.x"))
    assert names.changed(same, names.canonical(same)) == frozenset()


@pytest.mark.parametrize("config", [None, b"{", [1], {"model_type": "other"}, {"model_type": "other", "text_config": {"model_type": "deepseek_v4"}}])  # fmt: skip
def test_names_are_respelled_whatever_the_config_says(config: Any) -> None:
    """Also where it cannot be read: whoever reads it says what is wrong with it."""
    if config == b"{":
        assert names._rules_for(folder(config=config)) == names.spellings()
        return
    assert spelled(info("language_model.model.x"), config=config)[0].name == "model.x"


def test_a_prefix_that_a_family_itself_has_stays() -> None:
    """DeepSeek-V4.1's own MLX names begin so: its text model is one of two."""
    v41 = {"model_type": "deepseek_v41", "text_config": {"model_type": "deepseek_v41_text"}}
    assert spelled(info("language_model.model.x"), config=v41)[0].name == "language_model.model.x"


def table_of(table: dict[str, Any], *tensors: TensorInfo, key: str = "quantization") -> Any:
    return json.loads(names.canonical(folder(*tensors, config=V4 | {key: table})).config or b"")[key]


def packed(stem: str, codec: str = "affine-4-g64", file: int = 0) -> list[TensorInfo]:
    c = CODECS[codec]
    made = [
        info(f"{stem}.weight", "U32", (4, 128 * c.bits // 32)),
        info(f"{stem}.scales", c.scale_dtype, (4, 128 // c.group_size)),
    ]
    return made + ([info(f"{stem}.biases", "BF16", (4, 128 // c.group_size))] if c.has_biases else [])


G64 = {"group_size": 64, "bits": 4}


@pytest.mark.parametrize("key", ["quantization", "quantization_config"])
def test_a_table_lists_every_module_under_our_name_and_those_it_left_out_with_its_scalars(key: str) -> None:
    tensors = [
        *packed("language_model.a"),
        *packed("b"),
        *packed("c", "affine-8-g64"),
        *packed("d", "mxfp4"),
        info("e.weight"),
    ]
    listed = {"language_model.a": {"group_size": 32, "bits": 8}, "f": False}
    assert table_of(G64 | listed, *tensors, key=key) == G64 | {
        "a": {"group_size": 32, "bits": 8},  # listed: what it says stays, right or wrong
        "b": {"mode": "affine"} | G64,  # like the scalars
    }, "c and d are stored otherwise, as their headers show"


def test_a_table_without_scalars_that_are_a_codec_lists_no_more() -> None:
    assert table_of({"group_size": 48, "bits": 4}, *packed("b")) == {"group_size": 48, "bits": 4}
    assert table_of({"group_size": 32, "bits": 4, "mode": "mxfp4"}, *packed("b", "mxfp4"))["b"]["mode"] == "mxfp4"
    lone = [t for t in packed("b") if t.name != "b.weight"]
    assert "b" not in table_of(G64, *lone) and "b" not in table_of(G64, *packed("b")[:2])


def test_a_config_that_is_no_object_is_left_as_it_is() -> None:
    assert names.canonical(folder(config=[1])).config == b"[1]" and names.canonical(folder(config=None)).config is None


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("model.layers.0.attn.wo_a.0.weight", "an MLX conversion of the first days"),
        ("model.layers.0.ffn.experts.w1.weight", "an MLX conversion of the first days"),
        ("model.layers.0.ffn.switch_mlp.gate_up_proj.weight", "gate and up projection of the experts in one tensor"),
        ("model.layers.0.attn.wo_a.weight", ""), ("model.layers.0.ffn.switch_mlp.gate_proj.weight", ""),
    ],
)  # fmt: skip
def test_folders_that_nothing_reads_are_known_by_a_name(name: str, what: str) -> None:
    told = names.stranger(folder(info("model.norm.weight"), info(name)))
    assert what in told and bool(told) == bool(what)
    if what:
        way = "No way leads from it to today's hosts: convert the official checkpoint, ds4convert quantize SRC OUT"
        assert told.endswith(f". {way}")


def findings(missing: int = 0, extra: int = 0, shape: int = 0) -> list[Finding]:
    kinds = ["missing"] * missing + ["extra"] * extra + ["shape"] * shape
    return [Finding(k, "x", "a", "b") for k in kinds]


@pytest.mark.parametrize(
    ("found", "begins"),
    [
        (findings(2, 3), "2 tensors that config.json implies are not here, and 3 are that it does not imply: names of a program"),
        (findings(2, 3, 1), "2 tensors that config.json implies are not here, and 3 are"),
        (findings(2), "incomplete: 2 tensors that config.json implies are not here; copy or download the folder again"),
        (findings(shape=3), "3 tensors are stored otherwise than this version reads; convert the official checkpoint"),
        (findings(2, shape=1), "config.json and the tensors do not fit; convert the official checkpoint again"),
        (findings(extra=2), "config.json and the tensors do not fit"),
    ],
)  # fmt: skip
def test_differences_in_a_sentence(found: list[Finding], begins: str) -> None:
    assert names.unfit(found).startswith(begins) and names.unfit(found).endswith("ds4convert quantize SRC OUT")
