"""The demo's DSpark checkpoint, put together over the classic one's backbone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ds4convert.demo import embedded
from tests import support
from tests.support import ROOT, header_of, run

HOME = ROOT / "manifests" / "demo"
HEAD = "model-00004-of-00004.safetensors"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the DSpark checkpoint as a folder."""
    folder = tmp_path_factory.mktemp("dspark") / "source"
    folder.mkdir()
    for name, data in embedded.files(embedded.DSPARK):
        (folder / name).write_bytes(data)
    return folder


def test_the_classic_checkpoint_is_the_folder_itself() -> None:
    found = dict(embedded.files(embedded.CLASSIC))
    assert found == {p.name: p.read_bytes() for p in HOME.iterdir() if p.is_file() and p.suffix != ".md"}


def test_only_head_config_and_index_differ_and_the_head_adds_less_than_3_mb() -> None:
    classic, dspark = dict(embedded.files(embedded.CLASSIC)), dict(embedded.files(embedded.DSPARK))
    assert set(classic) == set(dspark)
    other = {name for name in classic if classic[name] != dspark[name]}
    assert other == {HEAD, "config.json", "model.safetensors.index.json"}
    assert dict(embedded.files(embedded.DSPARK)) == dspark, "the same bytes every time"
    assert sum(p.stat().st_size for p in (HOME / "dspark").iterdir()) < 3_000_000


def test_the_index_names_every_tensor_of_every_shard_once(source: Path) -> None:
    index = json.loads((source / support.INDEX).read_text())["weight_map"]
    shards = {p.name: set(header_of(p)) - {"__metadata__"} for p in sorted(source.glob("*.safetensors"))}
    assert {name: {n for n, file in index.items() if file == name} for name in shards} == shards


def test_it_is_read_as_a_whole_dspark_checkpoint_in_official_names_and_formats(source: Path) -> None:
    facts = run("inspect", source, "--json").json
    assert facts["problems"] == [] and facts["mtp"]["kind"] == "dspark"
    tensors = {k: v for k, v in header_of(source / HEAD).items() if k != "__metadata__"}
    assert tensors["mtp.0.ffn.experts.7.w2.weight"] == tensors["mtp.0.ffn.experts.7.w2.weight"] | {"dtype": "I8"}
    assert tensors["mtp.0.main_proj.weight"]["dtype"] == "F8_E4M3"
    assert tensors["mtp.0.main_proj.scale"]["dtype"] == "F8_E8M0"
    assert {"mtp.0.markov_head.markov_w1.weight", "mtp.0.confidence_head.proj.weight"} <= set(tensors)


def test_the_config_is_that_of_the_classic_demo_with_the_heads_own_keys() -> None:
    classic, dspark = (json.loads((folder / "config.json").read_text()) for folder in (HOME, HOME / "dspark"))
    other = {key for key in dspark if dspark[key] != classic.get(key)}
    assert {key for key in other if not key.startswith("dspark_")} <= {"compress_ratios"}
    assert dspark["dspark_noise_token_id"] < dspark["vocab_size"]
    assert max(dspark["dspark_target_layer_ids"]) < dspark["num_hidden_layers"]
