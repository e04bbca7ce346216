"""Configs made smaller, and the values of a synthetic checkpoint: which layers stay, and what a seed fixes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds4convert.checkpoint.config import check_config
from ds4convert.checkpoint.inventory import expected
from ds4convert.demo import demo, embedded, synth
from ds4convert.errors import EnvironmentFault, OutputError, UsageError
from tests.support import mini_config, tiny_config

FLASH: dict[str, Any] = json.loads(
    (Path(synth.__file__).parents[2] / "manifests" / "configs" / "flash.json").read_text()
)


@given(st.integers(1, 60))
def test_a_smaller_model_has_the_first_layers_and_one_of_each_kind_of_attention_where_there_is_room(
    layers: int,
) -> None:
    made = synth.shrink(FLASH, layers, None)
    ratios, before = made["compress_ratios"], FLASH["compress_ratios"]
    stages = FLASH["num_nextn_predict_layers"]
    count = FLASH["num_hidden_layers"]
    assert made["num_hidden_layers"] == layers and len(ratios) == layers + stages
    assert ratios[layers:] == before[count:], "the head keeps its own"
    kinds = sorted(set(before[:count]))
    assert set(ratios[:layers]) == set(kinds[-layers:]), "compressed kinds are kept longest"
    if layers > count:
        assert ratios[count:layers] == before[: layers - count], "and a larger one begins anew"
    check_config(made)


def test_with_two_layers_or_more_the_last_is_routed_by_score() -> None:
    hashed = "num_hash_layers"
    assert [synth.shrink(FLASH, n, None)[hashed] for n in (1, 2, 3, 4, 9)] == [1, 1, 2, 3, 3]


def test_fewer_experts_are_never_fewer_than_are_picked() -> None:
    made = synth.shrink(FLASH, None, 4)
    assert (made["n_routed_experts"], made["num_experts_per_tok"]) == (4, 4)
    assert synth.shrink(FLASH, None, 100)["num_experts_per_tok"] == FLASH["num_experts_per_tok"]
    assert synth.shrink(FLASH, None, None) == FLASH


@pytest.mark.parametrize(
    ("shape", "why"),
    [
        ((0, None, None), "--layers must be at least 1"),
        ((None, 0, None), "--experts must be at least 1"),
        ((None, None, "best"), "--head best: DeepSeek-V4 has no such head; expected one of: classic, dspark"),
    ],
)
def test_a_shape_that_no_model_has_is_refused(shape: tuple[Any, Any, Any], why: str) -> None:
    with pytest.raises(UsageError) as found:
        synth.shrink(FLASH, *shape)
    assert str(found.value) == why


def test_a_model_without_a_head_has_no_stage_and_no_ratio_of_one() -> None:
    made = synth.shrink(FLASH, 3, None, "none")
    assert made["num_nextn_predict_layers"] == 0 and len(made["compress_ratios"]) == 3
    assert expected(check_config(made)).head_kind == "none"


@pytest.mark.parametrize(
    ("gone", "lists", "layers", "stands"),
    [
        (7, [[1, 3, 7]], 5, 3),
        (7, [[7], [0, 2, 7]], 5, 4),
        (7, [None, 7, [2, 7]], 5, 2),
        (7, [], 5, 4),
        (7, [[8]], 1, 0),
    ],
)
def test_a_layer_that_is_gone_is_stood_for_by_the_last_of_its_list_or_of_all(
    gone: int, lists: list[Any], layers: int, stands: int
) -> None:
    assert synth._in_its_place(gone, lists, layers) == stands


# --- values ---

CONFIG = check_config(mini_config())
SPECS = {s.dtypes[0]: s for s in expected(CONFIG).tensors()}


def values(spec: Any, seed: int = 0) -> bytes:
    return b"".join(bytes(v) for v in synth._values(spec, CONFIG, seed))


@pytest.mark.parametrize("dtype", sorted(SPECS))
def test_a_tensor_has_its_bytes_fixed_by_seed_and_name_however_it_is_cut(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = SPECS[dtype]
    whole = values(spec)
    assert len(whole) == synth.tensor_bytes(spec) and values(spec) == whole
    if dtype != "I64":  # tables of experts are counted, not drawn
        assert values(spec, 1) != whole
    monkeypatch.setattr(synth, "CHUNK_BYTES", 64)
    assert len(values(spec)) == len(whole)


def test_values_are_finite_and_scales_are_powers_around_unit_gain() -> None:
    e4m3 = np.frombuffer(values(SPECS["F8_E4M3"]), np.uint8)
    assert not ((e4m3 & 0x7F) == 0x7F).any(), "no NaN"
    e8m0 = np.frombuffer(values(SPECS["F8_E8M0"]), np.uint8)
    assert len(set(e8m0.tolist())) > 1 and int(e8m0.max()) - int(e8m0.min()) <= 2
    bf16 = np.frombuffer(values(SPECS["BF16"]), "<u2")
    assert ((bf16 & 0x7F80) != 0x7F80).all()
    f32 = np.frombuffer(values(SPECS["F32"]), "<f4")
    assert np.isfinite(f32).all() and np.abs(f32).max() <= 0.5


def test_a_row_of_a_table_of_tokens_names_distinct_experts() -> None:
    spec = SPECS["I64"]
    table = np.frombuffer(values(spec), "<i8").reshape(spec.shape)
    assert table.min() >= 0 and table.max() < CONFIG.dims["E"]
    assert all(len(set(row)) == spec.shape[1] for row in table.tolist())


def test_norms_are_drawn_from_1_to_a_quarter_more() -> None:
    norm = next(
        s for s in expected(CONFIG).tensors() if s.role == "norm" and s.dtypes[0] == "BF16" and len(s.shape) == 1
    )
    numbers = (np.frombuffer(values(norm), "<u2").astype(np.uint32) << 16).view(np.float32)
    assert numbers.min() >= 1.0 and numbers.max() < 1.25


def test_shards_are_embedding_layers_output_and_head_and_wide_dtypes_come_first() -> None:
    inventory = expected(check_config(tiny_config()))
    shards = synth.shards(inventory)
    assert sum(map(len, shards)) == len(list(inventory.tensors()))
    assert len(shards) == inventory.config.layers + 3
    assert {s.part for s in shards[-1]} == {"mtp"} and all(s.part != "mtp" for shard in shards[:-1] for s in shard)
    assert [s.role for s in shards[0]] == ["embedding"]
    for n, shard in enumerate(shards[1:-2]):
        assert {s.layer for s in shard} == {n}
    widths = {"F32": 4, "I64": 8, "BF16": 2, "F8_E4M3": 1, "F8_E8M0": 1, "I8": 1}
    for shard in shards:
        found = [widths[s.dtypes[0]] for s in shard]
        assert found == sorted(found, reverse=True)


def test_a_checkpoint_is_written_into_an_empty_folder_with_room_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").touch()
    with pytest.raises(OutputError) as found:
        synth.write(mini_config(), tmp_path)
    assert str(found.value) == f"{tmp_path}: is not an empty folder; choose another"
    with pytest.raises(OutputError):
        synth.write(mini_config(), tmp_path / "x")
    total = synth.total_bytes(mini_config())
    monkeypatch.setattr(synth, "free_bytes", lambda path: total - 1)
    with pytest.raises(EnvironmentFault) as short:
        synth.write(mini_config(), tmp_path / "new")
    assert str(short.value) == (
        f"{tmp_path / 'new'}: {total:,} bytes are needed, {total - 1:,} are free; use --layers or --experts"
    )
    assert not (tmp_path / "new").exists()


# --- the demo's own folder ---


def refused(folder: Path) -> str:
    with pytest.raises(OutputError) as found:
        demo._check_place(folder)
    return str(found.value)


def test_a_demo_goes_into_a_new_folder_or_that_of_an_earlier_one_alone(tmp_path: Path) -> None:
    demo._check_place(tmp_path / "new")
    demo._check_place(tmp_path)
    (tmp_path / "source").mkdir()
    demo._check_place(tmp_path)
    name, data = next(iter(embedded.files("classic")))
    (tmp_path / "source" / name).write_bytes(data)
    (tmp_path / "source" / "half.partial").touch()
    demo._check_place(tmp_path)
    (tmp_path / "source" / name).write_bytes(data + b"x")
    assert (
        refused(tmp_path)
        == f"{tmp_path / 'source' / name}: is not the demo's; name another folder: ds4convert demo DIR"
    )
    (tmp_path / "source" / name).unlink()
    (tmp_path / "thesis.txt").touch()
    assert refused(tmp_path) == (
        f"{tmp_path}: is not empty and no earlier demo; name another folder: ds4convert demo DIR"
    )
    assert (
        refused(tmp_path / "thesis.txt") == f"{tmp_path / 'thesis.txt'}: is a file; name a folder: ds4convert demo DIR"
    )


@pytest.mark.parametrize("name", ["mlx", "report.html", "mlx-dspark"])
def test_a_result_without_its_source_is_no_earlier_demo(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    assert "is not empty and no earlier demo" in refused(tmp_path)


@pytest.mark.parametrize("name", ["source-dspark", "mlx", "mlx-dspark"])
def test_a_link_in_the_place_of_a_folder_is_not_written_through(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "demo"
    (folder / "source").mkdir(parents=True)
    (folder / name).symlink_to(tmp_path)
    assert refused(folder) == (
        f"{folder}: holds links in the place of a demo's folders; name another: ds4convert demo DIR"
    )


def test_both_heads_stand_side_by_side_in_the_columns_of_their_titles() -> None:
    head = {
        "kind": "dspark", "draft_depth": 5, "tokens_per_pass": 2.25, "plain_tokens_per_second": 10.0,
        "mtp_tokens_per_second": 21.5, "speedup": 2.15, "acceptance_by_position": [0.75, None, 0.5],
    }  # fmt: skip
    *_, title, row = demo._side_by_side([head]).splitlines()
    assert row.split() == ["dspark", "5", "2.25", "10.0", "21.5", "2.15", "75%", "-", "50%"]
    for word, value in (("drafts", "5"), ("tokens per pass", "2.25")):
        assert row[: title.index(word) + len(word)].endswith(value), "numbers end under their titles"
