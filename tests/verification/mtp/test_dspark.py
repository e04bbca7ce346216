"""`verify --mtp` and `--reference` of folders with a DSpark head, healthy and damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support import combined, edit_json, nightly, run
from tests.verification.mtp.folders import GOLDEN, HEAD, change_head, change_source, convert, swap

NAMES = ("dspark-a", "dspark-b")
Edit = dict[str, Any]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    home = tmp_path_factory.mktemp("dspark")
    return {
        (name, layout): convert(GOLDEN / name / "checkpoint", home / name / layout, "--layout", layout)
        for name in NAMES
        for layout in ("inline", "vlm")
    }


def reference(folder: Path, name: str) -> Any:
    return run("verify", folder, "--reference", GOLDEN / name / "golden.safetensors", "--atol", 6.6e-5, "--json")


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("name", "layout"),
    combined(NAMES, ("inline", "vlm"), is_repetition=lambda name, layout: (name == "dspark-a") == (layout == "vlm")),
)
def test_a_converted_folder_gives_the_official_numbers(name: str, layout: str, folders: Any) -> None:
    found = reference(folders[name, layout], name)
    assert found.code == 0, found.out
    keys = {r["key"].split(".")[1] for r in found.json["reference"]}
    assert {"tap_lastw", "context_kv", "stage_hidden_last", "confidence", "verify_logits"} <= keys


@pytest.mark.parametrize("layout", nightly(["inline", "vlm"], lambda layout: layout == "vlm"))
def test_the_figures_of_the_head_are_told_by_position(layout: str, folders: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    found = run("verify", folders["dspark-a", layout], "--mtp", "--max-tokens", 20, "--report", page, "--json")
    head = found.json["mtp"]
    assert found.code == 0, found.out
    assert (head["kind"], head["block_size"], head["draft_depth"]) == ("dspark", 5, 5)
    shares = head["acceptance_by_position"]
    assert len(shares) == 5 and shares == sorted(shares, reverse=True) and shares[0] > 0.6
    assert head["greedy_equal"] and head["tokens_per_pass"] > 2 and head["teacher_forced"]["agreement"] > 0.5
    assert sum(b["drafts"] for b in head["calibration"]) >= head["accepted"]
    text = page.read_text()
    assert "Acceptance by position" in text and "Confidence against observed acceptance" in text
    assert all(f"draft {n}" in text and f"{share:.1%}" in text for n, share in enumerate(shares, 1))
    assert text.count("<circle") == 1 + len(head["calibration"]), "the mark of the verdict, and a point for each bin"


@pytest.mark.nightly
def test_fewer_drafts_and_a_confidence_threshold_are_taken(folders: Any) -> None:
    words = ("--mtp", "--max-tokens", 12, "--draft-depth", 3, "--confidence", 0.6, "--json")
    head = run("verify", folders["dspark-b", "inline"], *words).json["mtp"]
    assert (head["draft_depth"], head["confidence"], head["greedy_equal"]) == (3, 0.6, True)
    assert head["drafted"] < 3 * head["passes"]


@pytest.mark.parametrize("name", nightly(NAMES, lambda name: name == "dspark-b"))
def test_markov_tables_exchanged_before_conversion_are_noticed_without_any_source(name: str, tmp_path: Path) -> None:
    source = Path(shutil.copytree(GOLDEN / name / "checkpoint", tmp_path / "source"))
    last = "mtp.2" if name == "dspark-a" else "mtp.1"
    tables = [f"{last}.markov_head.markov_w{n}.weight" for n in (1, 2)]
    found = run(
        "verify", convert(change_source(source, swap(*tables)), tmp_path / "out"), "--mtp", "--max-tokens", 4, "--json"
    )
    assert found.code == 1 and "Markov tables" in found.json["mtp"]["verdict"], found.out


STAGE = ("attn.wq_a.weight", "attn.wkv.weight", "attn_norm.weight", "hc_ffn_fn", "ffn.gate.weight")
DAMAGE: dict[str, Any] = {
    "exchanged stages": lambda out: change_head(out, lambda t: [swap(f"mtp.0.{p}", f"mtp.1.{p}")(t) for p in STAGE]),
    "wrong taps": lambda out: edit_json(out / "config.json", lambda c: c.update(dspark_target_layer_ids=[1, 2, 3])),
    "taps in another order": lambda out: edit_json(
        out / "config.json", lambda c: c.update(dspark_target_layer_ids=[4, 3, 2])
    ),
    "another noise token": lambda out: edit_json(out / "config.json", lambda c: c.update(dspark_noise_token_id=0)),
    "a block of four": lambda out: edit_json(out / "config.json", lambda c: c.update(dspark_block_size=4)),
}


@pytest.mark.sampled(1)
@pytest.mark.parametrize("damage", nightly(DAMAGE, lambda d: d not in {"exchanged stages", "wrong taps"}))
def test_a_damaged_folder_is_told_by_the_recording(damage: str, folders: Any, tmp_path: Path) -> None:
    out = Path(shutil.copytree(folders["dspark-a", "inline"], tmp_path / "out"))
    DAMAGE[damage](out)
    found = reference(out, "dspark-a")
    wrong = {r["key"].split(".")[1] for r in found.json["reference"] if not r["ok"]}
    assert found.code == 1 and "draft_logits" in wrong and "logits" not in wrong


# ------------------------------------------------------------------ bad input


BAD: dict[str, tuple[Edit, tuple[str, ...]]] = {
    "target beyond the layers": ({"dspark_target_layer_ids": [2, 3, 5]}, ("dspark_target_layer_ids", "0 to 4")),
    "no target": ({"dspark_target_layer_ids": []}, ("dspark_target_layer_ids",)),
    "noise beyond the vocabulary": ({"dspark_noise_token_id": 320}, ("dspark_noise_token_id", "below 320")),
    "no block": ({"dspark_block_size": 0}, ("dspark_block_size", "1 or more")),
    "rank of text": ({"dspark_markov_rank": "64"}, ("dspark_markov_rank", "'64'")),
    "another rank": ({"dspark_markov_rank": 32}, ("markov_w1", "expected")),
}


@pytest.mark.parametrize("case", BAD)
def test_values_that_a_head_cannot_be_run_with_are_refused_by_name(case: str, folders: Any, tmp_path: Path) -> None:
    out = Path(shutil.copytree(folders["dspark-a", "inline"], tmp_path / "out"))
    changes, words = BAD[case]
    edit_json(out / "config.json", lambda c: c.update(changes))
    found = run("generate", out, "--prompt-ids", "1,2", "--mtp")
    assert found.code == 3 and found.out == "" and "Traceback" not in found.err
    for word in words:
        assert word in found.err


def test_a_head_whose_stage_is_missing_is_refused_with_what_to_do(folders: Any, tmp_path: Path) -> None:
    out = Path(shutil.copytree(folders["dspark-a", "inline"], tmp_path / "out"))
    change_head(out, lambda t: [t.pop(n) for n in list(t) if n.startswith("mtp.1.")])
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert HEAD in index.values()
    found = run("generate", out, "--prompt-ids", "1,2", "--mtp")
    assert found.code == 3 and "mtp.1" in found.err and "graft" in found.err and found.out == ""


@pytest.mark.parametrize(("stage", "words"), [("mtp.0.", ("mtp.0", "graft")), ("mtp.2.", ("mtp.1.", "missing"))])
def test_a_head_without_its_first_or_last_stage_is_refused(
    stage: str, words: tuple[str, ...], folders: Any, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(folders["dspark-a", "inline"], tmp_path / "out"))
    change_head(out, lambda t: [t.pop(n) for n in list(t) if n.startswith(stage)])
    for command in (("generate", out, "--prompt-ids", "1,2", "--mtp"), ("verify", out, "--mtp")):
        found = run(*command)
        assert found.code in (1, 3) and "Traceback" not in found.err
        assert command[0] == "verify" or (found.code == 3 and all(word in found.err for word in words)), found.err


SOURCES: dict[str, tuple[Edit, tuple[str, ...]]] = {
    "a target beyond the layers": ({"dspark_target_layer_ids": [2, 3, 5]}, ("dspark_target_layer_ids", "5")),
    "a noise token beyond the vocabulary": ({"dspark_noise_token_id": 320}, ("dspark_noise_token_id", "320")),
    "no block size": ({"dspark_block_size": None}, ("dspark_block_size",)),
}


@pytest.mark.parametrize("case", SOURCES)
def test_a_source_with_such_values_is_not_converted(case: str, tmp_path: Path) -> None:
    source = Path(shutil.copytree(GOLDEN / "dspark-a" / "checkpoint", tmp_path / "source"))
    changes, words = SOURCES[case]
    edit_json(source / "config.json", lambda c: c.update(changes))
    found = run("quantize", source, tmp_path / "out")
    assert found.code == 3 and "Traceback" not in found.err and not (tmp_path / "out").exists(), found.err
    for word in words:
        assert word in found.err


def test_a_source_whose_stage_is_missing_is_not_converted(tmp_path: Path) -> None:
    source = Path(shutil.copytree(GOLDEN / "dspark-a" / "checkpoint", tmp_path / "source"))
    change_source(source, lambda t: [t.pop(n) for n in list(t) if n.startswith("mtp.1.")])
    found = run("quantize", source, tmp_path / "out")
    assert found.code == 3 and "mtp.1." in found.err and not (tmp_path / "out").exists()


def test_a_drafter_that_is_a_whole_folder_of_another_model_is_refused(folders: Any) -> None:
    other, mine = folders["dspark-b", "inline"], folders["dspark-a", "inline"]
    for command in (("generate", mine, "--prompt-ids", "1,2", "--mtp"), ("verify", mine, "--mtp")):
        found = run(*command, "--drafter", other)
        assert found.code == 3 and "another model" in found.err and "hidden_size" in found.err and found.out == ""


def test_more_drafts_than_the_block_has_and_an_impossible_threshold_are_usage_errors(folders: Any) -> None:
    folder = folders["dspark-b", "inline"]
    for words, told in (
        (("--draft-depth", 5), "1 to 4"), (("--draft-depth", 17), "17"), (("--confidence", 1.5), "--confidence"),
        (("--confidence", "nan"), "--confidence"), (("--confidence", -0.1), "--confidence"),
    ):  # fmt: skip
        found = run("verify", folder, "--mtp", *words)
        assert found.code == 2 and told in found.err and found.out == "", (words, found.err)


def test_a_block_larger_than_eight_is_verified_whole_through_the_program(tmp_path: Path) -> None:
    source = Path(shutil.copytree(GOLDEN / "dspark-b" / "checkpoint", tmp_path / "source"))
    edit_json(source / "config.json", lambda c: c.update(dspark_block_size=12))
    words = ("generate", convert(source, tmp_path / "out"), "--prompt-ids", "5,6,7", "--max-tokens", 24)
    words += ("--dtype", "float32", "--json")
    plain = run(*words, "--no-mtp").json["tokens"]
    for depth in (10, 12):
        facts = run(*words, "--mtp", "--draft-depth", depth).json
        assert facts["draft_depth"] == depth == len(facts["accepted_at"]) and facts["tokens"] == plain
    assert run(*words, "--mtp").json["draft_depth"] == 12


def test_a_drafter_of_another_model_is_refused(folders: Any, tmp_path: Path) -> None:
    out = Path(shutil.copytree(folders["dspark-a", "vlm"], tmp_path / "out"))
    shutil.rmtree(out / "mtp")
    shutil.copytree(folders["dspark-b", "vlm"] / "mtp", out / "mtp")
    found = run("generate", out, "--prompt-ids", "1,2", "--mtp")
    assert found.code == 3 and "another model" in found.err and "hidden_size" in found.err and found.out == ""
