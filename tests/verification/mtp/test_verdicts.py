"""`verify --mtp` on a healthy head, a useless one, none at all, and scrambled ones: verdict, keys, exit code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import INDEX, Result, edit_json, run, tiny_config, write_synth
from tests.verification.mtp.folders import (
    DEMO,
    EXPERTS,
    HEAD,
    MANIFEST,
    Change,
    accept_digests,
    change_head,
    change_source,
    convert,
    random_head,
    swap,
    swap_slices,
    together,
)

CONTRACT = {
    "present", "kind", "format", "acceptance", "drafted", "accepted", "tokens_per_pass", "plain_tokens_per_second",
    "mtp_tokens_per_second", "speedup", "greedy_equal", "first_divergence", "verdict",
}  # fmt: skip


def verify(folder: Path, *options: object, prompts: Path | None = None, tokens: int = 12) -> Result:
    chosen = ["--prompts", prompts] if prompts else []
    return run("verify", folder, "--mtp", "--json", "--max-tokens", tokens, *chosen, *options)


def failed(facts: dict[str, Any]) -> set[str]:
    return {c["name"] for c in facts["checks"] if not c["ok"]}


@pytest.fixture(scope="module")
def healthy(demo: Path, short: Path) -> dict[str, Any]:
    result = verify(demo, prompts=short, tokens=24)
    assert result.code == 0, result.out
    return dict(result.json)


def test_healthy_head_has_every_key_of_the_contract(healthy: dict[str, Any]) -> None:
    head = healthy["mtp"]
    assert healthy["ok"] is True and head.keys() >= CONTRACT
    assert head["present"] is True and head["kind"] == "classic"
    assert head["format"] == "mxfp8+mxfp4+f32+bf16"
    assert head["greedy_equal"] is True and head["first_divergence"] is None
    assert 0.5 < head["acceptance"] < 1 and head["accepted"] < head["drafted"]
    assert head["acceptance"] == pytest.approx(head["accepted"] / head["drafted"], abs=1e-4)
    assert head["tokens_per_pass"] == pytest.approx(1 + head["accepted"] / head["passes"], abs=1e-4)
    ratio = head["mtp_tokens_per_second"] / head["plain_tokens_per_second"]
    assert head["speedup"] == pytest.approx(ratio, rel=0.01)
    assert head["verdict"].startswith("The head works: acceptance")


def test_figures_add_up_over_prompts_and_positions(healthy: dict[str, Any]) -> None:
    head = healthy["mtp"]
    assert [p["prompt"] for p in head["per_prompt"]] == ["prompt-1", "prompt-2"]
    for key in ("drafted", "accepted"):
        assert sum(p[key] for p in head["per_prompt"]) == head[key]
        assert sum(p[key] for p in head["per_position"]) == head[key]
    assert all(p["new_tokens"] == 24 for p in head["per_prompt"])
    assert healthy["compute"]["dtype"] == "float32" and healthy["compute"]["dense"] is True


def test_experts_of_a_trained_head_can_be_judged(healthy: dict[str, Any]) -> None:
    assert healthy["mtp"]["wiring"] == {"judged": True, "tried": 6, "found": []}


def test_deeper_drafts_are_counted_per_position(demo: Path, short: Path) -> None:
    head = verify(demo, "--draft-depth", 3, prompts=short, tokens=16).json["mtp"]
    rates = [p["acceptance"] for p in head["per_position"]]
    assert len(rates) == 3 and rates[0] >= rates[1] >= rates[2]
    assert head["greedy_equal"] is True


def test_text_report_shows_prompts_and_verdict(demo: Path, short: Path) -> None:
    result = run("verify", demo, "--mtp", "--prompts", short, "--max-tokens", 8)
    assert result.code == 0
    assert "prompt-1" in result.out and "plain tok/s" in result.out
    verdict, took = result.out.rstrip().splitlines()[-2:]
    assert verdict.startswith("The head works") and took.startswith("done in ")


# --- no head ---------------------------------------------------------------------------------------------------------


def assert_no_head(result: Result, *words: str) -> None:
    assert result.code == 1
    head = result.json["mtp"]
    assert head["present"] is False and head["kind"] == "none" and head.keys() >= CONTRACT
    assert head["acceptance"] is None and head["greedy_equal"] is None
    assert "head works" in failed(result.json)
    for word in words:
        assert word in head["verdict"], head["verdict"]


def test_stripped_head_is_named_with_its_size(fresh: Callable[[], Path], short: Path) -> None:
    folder = fresh()
    (folder / HEAD).unlink()

    def strip(table: dict[str, Any]) -> None:
        table["weight_map"] = {k: v for k, v in table["weight_map"].items() if v != HEAD}

    edit_json(folder / INDEX, strip)
    result = verify(folder, prompts=short)
    assert_no_head(result, "No MTP head", "config.json promises one", "stripped", "MB")
    assert "files" in failed(result.json) and "head" in failed(result.json)


def test_config_that_denies_the_head_is_named(fresh: Callable[[], Path], short: Path) -> None:
    folder = fresh()
    edit_json(folder / "config.json", lambda t: t.update(num_nextn_predict_layers=0))
    assert_no_head(verify(folder, prompts=short), "num_nextn_predict_layers 0")


def test_head_dropped_at_conversion_is_told_from_a_stripped_one(tmp_path: Path, short: Path) -> None:
    folder = convert(DEMO, tmp_path / "out", "--drop-mtp")
    assert_no_head(verify(folder, prompts=short), "left out at conversion")


def test_model_that_never_had_a_head_is_told_so(tmp_path: Path) -> None:
    source = write_synth(tmp_path / "source", tiny_config(num_nextn_predict_layers=0))
    assert_no_head(verify(convert(source, tmp_path / "out"), tokens=4), "never had one")


def test_plain_levels_do_not_ask_for_a_head(tmp_path: Path, short: Path) -> None:
    folder = convert(DEMO, tmp_path / "out", "--drop-mtp")
    for level in ("numerics", "decode"):
        result = run("verify", folder, "--level", level, "--json", "--prompts", short, "--max-tokens", 4)
        assert result.code == 0 and "mtp" not in result.json, result.out
        assert "numerics" in {c["name"] for c in result.json["checks"]}


# --- useless, and numerics off -----------------------------------------------------------------------------------------


def test_random_head_is_useless(fresh: Callable[[], Path], short: Path) -> None:
    folder = accept_digests(change_head(fresh(), random_head))
    result = verify(folder, prompts=short)
    assert result.code == 1 and failed(result.json) == {"head works"}, result.out
    assert result.json["mtp"]["present"] is True
    assert "useless" in result.json["mtp"]["verdict"] and "chance" in result.json["mtp"]["verdict"]
    assert result.json["mtp"]["greedy_equal"] is True


@pytest.mark.nightly
def test_random_checkpoint_has_a_useless_head_and_equal_tokens(tmp_path: Path) -> None:
    folder = convert(write_synth(tmp_path / "source", tiny_config()), tmp_path / "out")
    result = verify(folder, tokens=8)
    assert result.code == 1 and "useless" in result.json["mtp"]["verdict"]
    assert "No tokenizer.json" in result.err
    assert [p["prompt"] for p in result.json["mtp"]["per_prompt"]] == ["ids-7", "ids-40", "ids-90", "ids-150"]


def test_value_that_is_not_a_number_is_numerics_off(fresh: Callable[[], Path], short: Path) -> None:
    def poison(tensors: dict[str, Any]) -> None:
        t = tensors["model.norm.weight"]
        t.data = b"\xc0\x7f" + t.data[2:]

    folder = accept_digests(change_head(fresh(), poison, "model-00001-of-00001.safetensors"))
    result = verify(folder, prompts=short, tokens=4)
    assert result.code == 1 and "numerics" in failed(result.json)
    assert result.json["mtp"]["verdict"].startswith("Numerics are off")
    assert "NaN" not in result.out.replace("NaN or infinite", "")


def test_broken_backbone_is_numerics_off(fresh: Callable[[], Path], short: Path) -> None:
    """The output matrix upside down: everything is finite, and every text is as unlikely as noise."""

    def reverse(tensors: dict[str, Any]) -> None:
        t = tensors["lm_head.weight"]
        width = len(t.data) // t.shape[0]
        rows = [t.data[n * width : (n + 1) * width] for n in range(t.shape[0])]
        t.data = b"".join(reversed(rows))

    folder = accept_digests(change_head(fresh(), reverse, "model-00001-of-00001.safetensors"))
    result = verify(folder, prompts=short, tokens=4)
    assert result.code == 1 and "backbone is broken" in result.json["mtp"]["verdict"]


# --- scrambled -------------------------------------------------------------------------------------------------------

EXCHANGES: dict[str, tuple[Change, str]] = {
    "norms": (swap("mtp.0.enorm.weight", "mtp.0.hnorm.weight"), "enorm"),
    "experts": (
        together(swap_slices(f"{EXPERTS}.gate_proj.weight", 0, 1), swap_slices(f"{EXPERTS}.gate_proj.scales", 0, 1)),
        "gate_proj",
    ),
}


@pytest.mark.sampled(1)
@pytest.mark.parametrize("kind", EXCHANGES)
def test_altered_tensors_are_named_by_their_digests(kind: str, fresh: Callable[[], Path], short: Path) -> None:
    change, name = EXCHANGES[kind]
    result = verify(change_head(fresh(), change), prompts=short, tokens=6)
    assert result.code == 1 and {"digests", "tensor digests"} <= failed(result.json)
    detail = next(c["detail"] for c in result.json["checks"] if c["name"] == "tensor digests")
    assert name in detail and "attn" not in detail
    assert "not what was converted" in result.json["mtp"]["verdict"] or "scrambled" in result.json["mtp"]["verdict"]


@pytest.mark.parametrize("kind", EXCHANGES)
def test_the_source_tells_where_the_manifest_was_recomputed(kind: str, fresh: Callable[[], Path], short: Path) -> None:
    change, name = EXCHANGES[kind]
    folder = accept_digests(change_head(fresh(), change))
    result = run("verify", folder, "--source", DEMO, "--json")
    assert result.code == 1 and failed(result.json) == {"values"}
    official = {"norms": "enorm", "experts": "w1"}[kind]
    assert official in next(c["detail"] for c in result.json["checks"] if c["name"] == "values") or name in result.out


def official(matrix: str, a: int, b: int) -> Change:
    parts = ("weight", "scale")
    return together(
        *(swap(f"mtp.0.ffn.experts.{a}.{matrix}.{p}", f"mtp.0.ffn.experts.{b}.{matrix}.{p}") for p in parts)
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param(
            swap("mtp.0.enorm.weight", "mtp.0.hnorm.weight"),
            "enorm and hnorm look exchanged",
            marks=pytest.mark.nightly,
        ),
        (official("w1", 0, 1), "w1 of experts 0 and 1 look exchanged"),
        pytest.param(official("w2", 2, 6), "w2 of experts 2 and 6 look exchanged", marks=pytest.mark.nightly),
    ],
    ids=["norms", "w1", "w2"],
)
def test_head_scrambled_before_conversion_is_noticed_without_any_source(
    change: Change, words: str, tmp_path: Path
) -> None:
    source = change_source(Path(shutil.copytree(DEMO, tmp_path / "source")), change)
    result = verify(convert(source, tmp_path / "out"), tokens=2)
    assert result.code == 1 and "head wiring" in failed(result.json), result.out
    assert "scrambled" in result.json["mtp"]["verdict"] and words in result.json["mtp"]["verdict"]


@pytest.mark.nightly
def test_dspark_tensors_renamed_to_classic_are_noticed(tmp_path: Path) -> None:
    folder = convert(write_synth(tmp_path / "source", tiny_config_dspark()), tmp_path / "out")
    result = verify(folder, tokens=2)
    assert result.json["mtp"]["kind"] == "dspark" and result.json["mtp"]["block_size"] == 5

    def rename(tensors: dict[str, Any]) -> None:
        for name in list(tensors):
            if "markov" in name or "confidence" in name or "main_norm" in name:
                del tensors[name]
            elif "main_proj" in name:
                tensors[name.replace("main_proj", "e_proj")] = tensors.pop(name)

    change_head(folder, rename)
    names = dict.fromkeys(_names(folder / HEAD), HEAD)
    edit_json(folder / INDEX, lambda t: t.update(weight_map={
        **{k: v for k, v in t["weight_map"].items() if v != HEAD}, **names}))  # fmt: skip
    result = verify(folder, tokens=2)
    assert result.code == 1 and "not those of a classic MTP head" in result.json["mtp"]["verdict"], result.out
    assert {"digests", "inventory", "head works"} <= failed(result.json)


def tiny_config_dspark() -> dict[str, Any]:
    from ds4convert.demo import synth

    return dict(synth.shrink(tiny_config(), None, None, "dspark"))


def _names(path: Path) -> list[str]:
    raw = path.read_bytes()
    return [n for n in json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")]) if n != "__metadata__"]


def test_manifest_altered_by_hand_is_a_failed_check(fresh: Callable[[], Path], short: Path) -> None:
    folder = fresh()
    edit_json(folder / MANIFEST, lambda t: t.update(layout="universal"))
    result = verify(folder, prompts=short, tokens=4)
    assert result.code == 1 and "finished" in failed(result.json)
