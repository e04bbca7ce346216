"""`verify --source` and `diff` look at what a folder says beside its tensors: config.json and the carried files."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ds4convert.verification import structure
from ds4convert.verification.against_source import against_source
from tests import support
from tests import support_run as s

MANIFEST = "ds4convert_manifest.json"
SMALL: dict[str, Any] = {
    "tokenizer.json": {
        "version": "1.0",
        "model": {"type": "BPE", "vocab": {"In": 5, "the": 6, "end": 7}, "merges": []},
    },
    "tokenizer_config.json": {"eos_token": "end", "add_bos_token": True},
    "generation_config.json": {"eos_token_id": 1, "temperature": 1.0},
}
DSPARK = {
    "num_nextn_predict_layers": 3, "dspark_block_size": 5, "dspark_markov_rank": 8, "dspark_noise_token_id": 3,
    "dspark_target_layer_ids": [0, 1, 2],
}  # fmt: skip
SCALING = {"type": "yarn", "factor": 16, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1}


def small_files(folder: Path) -> Path:
    for name, value in SMALL.items():
        (folder / name).write_text(json.dumps(value))
    return folder


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    table = json.loads(path.read_text())
    change(table)
    path.write_text(json.dumps(table, indent=2, ensure_ascii=False) + "\n")


def signed_again(folder: Path) -> None:
    """Make the manifest agree with the small files as they are now: nothing but the source can tell then."""
    record = json.loads((folder / MANIFEST).read_text())
    for f in record["files"]:
        path = folder / f["name"]
        if "header_sha256" not in f and path.is_file():
            f["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
            f |= {"bytes": path.stat().st_size} if "bytes" in f else {}
    record["files"] = [f for f in record["files"] if (folder / f["name"]).is_file()]
    del record["digest"]
    canonical = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    record["digest"] = hashlib.sha256(canonical).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def found(out: Path, source: Path) -> dict[str, str]:
    """Return what is wrong, by the name of the check."""
    checks = [*structure.structure(out), *against_source(out, source)]
    return {c.name: c.detail for c in checks if not c.ok}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("settings") / "source"
    return small_files(s.tiny(out, layers=4, experts=2, head="dspark", rope_scaling=SCALING))


@pytest.fixture(scope="module")
def good(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("settings") / "mlx"
    s.run(source, out)
    return out


KEYS: dict[str, Any] = {
    "rope_theta": 10001, "rms_norm_eps": 1e-5, "sliding_window": 127, "rope_scaling.factor": 17,
    "rope_scaling.beta_fast": 31, "index_topk": 9, "swiglu_limit": 9.5, "moe_intermediate_size": 64, "eos_token_id": 2,
    "routed_scaling_factor": 1.25, "scoring_func": "sigmoid", "compress_ratios": None, "dspark_block_size": 4,
    "dspark_noise_token_id": 4, "dspark_target_layer_ids": [0, 1, 3],
}  # fmt: skip


def changed(config: dict[str, Any], key: str, value: Any) -> None:
    """Put another value at a key (of a table in the config, where it has a dot)."""
    *outer, last = key.split(".")
    for name in outer:
        config = config[name]
    if key == "compress_ratios":
        config[last][2] = {0: 4, 4: 0, 128: 4}[config[last][2]]
        return
    assert config[last] != value, key
    config[last] = value


@pytest.mark.sampled(3)
@pytest.mark.parametrize("key", KEYS)
def test_another_value_of_one_key_is_found_by_its_name(good: Path, source: Path, key: str, tmp_path: Path) -> None:
    out = s.copied(good, tmp_path / "mlx")
    edit(out / "config.json", lambda c: changed(c, key, KEYS[key]))
    signed_again(out)
    assert key.split(".")[-1] in found(out, source)["config"]
    facts = json.loads(s.cli("diff", good, out, "--json", exit_code=1).stdout)
    assert [row for row in facts["config"] if row["key"].startswith(key)], facts["config"]


def test_both_values_are_told(good: Path, source: Path, tmp_path: Path) -> None:
    out = s.copied(good, tmp_path / "mlx")
    edit(out / "config.json", lambda c: c["rope_scaling"].update(factor=17, mscale=1))
    edit(out / "config.json", lambda c: c.pop("rms_norm_eps"))
    signed_again(out)
    told = found(out, source)["config"]
    assert "rope_scaling.factor is 17, 16 in the source" in told
    assert "rope_scaling.mscale is 1, the source does not have it" in told
    assert "rms_norm_eps is missing, 1e-06 in the source" in told


def test_code_that_hosts_would_run_is_no_key_of_ours(good: Path, source: Path, tmp_path: Path) -> None:
    for key, value in (("model_file", "x.py"), ("model_file", "ds4_mlx_model.py"), ("auto_map", {"AutoModel": "x.M"})):
        out = s.copied(good, tmp_path / "mlx")
        edit(out / "config.json", lambda c, k=key, v=value: c.update({k: v}))  # type: ignore[misc]
        signed_again(out)
        assert key in found(out, source)["config"]


def swapped(table: dict[str, Any]) -> None:
    vocab = table["model"]["vocab"]
    vocab["In"], vocab["the"] = vocab["the"], vocab["In"]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", [*SMALL, "chat_template.jinja"])
def test_another_carried_file_is_found_by_its_name(good: Path, source: Path, name: str, tmp_path: Path) -> None:
    for act in ("change", "remove"):
        out = s.copied(good, tmp_path / "mlx")
        if act == "remove" and name == "chat_template.jinja":
            continue  # the source has none: it is the family's
        if act == "remove":
            (out / name).unlink()
        elif name == "tokenizer.json":
            edit(out / name, swapped)
        elif name == "chat_template.jinja":
            (out / name).write_text("{{ 'another' }}")
        else:
            edit(out / name, lambda c: c.update(eos_token_id=2))
        signed_again(out)
        assert name in found(out, source)["carried files"]
        facts = json.loads(s.cli("diff", source, out, "--json", exit_code=1).stdout)
        assert [row["file"] for row in facts["files"]] == [name]


def test_a_file_that_the_source_does_not_have_is_found(good: Path, source: Path, tmp_path: Path) -> None:
    out = s.copied(good, tmp_path / "mlx")
    (out / "added_tokens.json").write_text("{}")
    assert "added_tokens.json" in found(out, source)["carried files"]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("layout", "head"),
    support.combined(
        ["inline", "universal", "mtplx", "vlm", "mlx-lm"],
        ["classic", "dspark"],
        is_repetition=lambda layout, head: (layout, head) not in {("universal", "classic"), ("vlm", "dspark")},
    ),
)
def test_what_is_healthy_stays_good_in_every_layout(layout: str, head: str, tmp_path: Path) -> None:
    if head == "dspark" and layout in {"universal", "mtplx"}:
        pytest.skip("this layout has no place for such a head")
    source = small_files(s.tiny(tmp_path / "source", layers=3, experts=2, head=head))
    s.run(source, tmp_path / "mlx", layout=layout)
    assert found(tmp_path / "mlx", source) == {}
    assert json.loads(s.cli("diff", source, tmp_path / "mlx", "--json").stdout)["config"] == []
    s.run(source, tmp_path / "bare", layout=layout, keep_mtp=False)
    assert found(tmp_path / "bare", source) == {}
    s.cli("graft", tmp_path / "bare", "--from", source, "--out", tmp_path / "grafted", "-q")
    assert found(tmp_path / "grafted", source) == {}
    s.cli("relayout", tmp_path / "mlx", tmp_path / "relaid", "--layout", "inline", "-q")
    assert found(tmp_path / "relaid", source) == {}
    s.cli("diff", tmp_path / "mlx", tmp_path / "relaid")


def test_a_drafters_copy_of_the_config_is_compared_too(tmp_path: Path) -> None:
    source = small_files(s.tiny(tmp_path / "source", layers=3, experts=2, head="dspark"))
    for key, value in (("target_layer_ids", [0, 0, 0]), ("mask_token_id", 9), ("block_size", 3)):
        s.run(source, tmp_path / key, layout="vlm")
        edit(tmp_path / key / "mtp" / "config.json", lambda c, k=key, v=value: c.update({k: v}))  # type: ignore[misc]
        signed_again(tmp_path / key)
        assert key in found(tmp_path / key, source)["config"]
    edit(tmp_path / "block_size" / "mtp" / "config.json", lambda c: c["text_config"].update(rope_theta=1))
    signed_again(tmp_path / "block_size")
    assert "text_config.rope_theta is 1" in found(tmp_path / "block_size", source)["config"]


def test_the_manifest_tells_which_config_was_converted(good: Path, source: Path, tmp_path: Path) -> None:
    record = json.loads((good / MANIFEST).read_text())
    assert record["source"]["config_sha256"] == hashlib.sha256((source / "config.json").read_bytes()).hexdigest()
    other = s.copied(source, tmp_path / "source")
    (other / "config.json").write_text(json.dumps(json.loads((source / "config.json").read_text())))
    checks = {c.name: c for c in against_source(good, other)}
    assert checks["config"].ok and "another file" in checks["config"].detail


def test_a_manifest_of_the_version_before_is_good(good: Path, source: Path, tmp_path: Path) -> None:
    out = s.copied(good, tmp_path / "mlx")
    record = json.loads((out / MANIFEST).read_text())
    del record["source"]["config_sha256"]
    (out / MANIFEST).write_text(json.dumps(record))
    signed_again(out)
    assert found(out, source) == {}
    s.cli("relayout", out, tmp_path / "relaid", "--layout", "inline", "-q")
    assert found(tmp_path / "relaid", source) == {}
    assert "config_sha256" not in json.loads((tmp_path / "relaid" / MANIFEST).read_text())["source"]
    shutil.rmtree(tmp_path / "relaid")
