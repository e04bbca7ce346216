"""`as_json()` of a result is the command's own JSON document, for every command."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import ds4convert as ds4
from tests import support
from tests.support import run

UNSTEADY = {"seconds", "bytes_per_second", "free_bytes", "seconds_estimate"}
SPEED = {"plain_tokens_per_second", "mtp_tokens_per_second", "speedup", "tokens_per_second", "prompt_seconds"}
DEMO = support.ROOT / "manifests" / "demo"


def steady(value: Any) -> Any:
    """Return a document without what differs from one moment to the next, through JSON and back."""
    if isinstance(value, Mapping):
        return {k: steady(v) for k, v in value.items() if k not in UNSTEADY | SPEED and not k.endswith("_seconds")}
    return [steady(v) for v in value] if isinstance(value, list | tuple) else value


def same(found: dict[str, Any], *command: object, code: int = 0) -> dict[str, Any]:
    """Assert that a result's document is that of the command; return it."""
    result = run(*command, "--json")
    assert result.code == code, result
    printed = json.loads(result.out)
    assert found["schema"] == printed["schema"] == 2
    assert found.keys() == printed.keys()
    assert steady(json.loads(json.dumps(found))) == steady(printed)
    return printed


@pytest.fixture(scope="module")
def converted(mini_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ds4.convert(mini_source, tmp_path_factory.mktemp("api") / "mlx", jobs=1).folder


def test_inspect_and_open(mini_source: Path, converted: Path) -> None:
    for place in (mini_source, str(converted)):
        same(ds4.inspect(place).as_json(), "inspect", place)
        same(ds4.open(place).as_json(), "inspect", place)
    same(ds4.inspect(config="flash").as_json(), "inspect", "--config", "flash")
    same(ds4.inspect(mini_source, tensors="mtp.*").as_json(), "inspect", mini_source, "--tensors", "mtp.*")


def test_a_document_that_is_changed_leaves_its_record_as_it_was(mini_source: Path, converted: Path) -> None:
    for found in (ds4.inspect(mini_source), ds4.plan(mini_source), ds4.diff(mini_source, converted)):
        before = json.dumps(found.as_json())
        for value in found.as_json().values():
            if isinstance(value, list | dict):
                value.clear()
        assert json.dumps(found.as_json()) == before


def test_plan(mini_source: Path, tmp_path: Path) -> None:
    same(ds4.plan(mini_source).as_json(), "plan", mini_source)
    options = ("--recipe", "bf16", "--layout", "mtplx", "--max-shard-size", "1MB", "--no-hash")
    made = ds4.plan(mini_source, recipe="bf16", layout="mtplx", max_shard_size="1MB", hashing=False, out=tmp_path)
    printed = same(made.as_json(), "plan", mini_source, *options)
    assert made.id == printed["plan"] and made.output_bytes == printed["output_bytes"]
    same(ds4.plan(mini_source).as_json(full=True), "plan", mini_source, "--full")


def test_plan_that_fits_a_size() -> None:
    made = ds4.plan(DEMO, fit="400MB", context=64)
    printed = same(made.as_json(), "plan", DEMO, "--fit", "400MB", "--context", 64)
    assert printed["fit"]["target_bytes"] == 400_000_000 and printed["fit"]["basis"]


def test_convert(mini_source: Path, tmp_path: Path) -> None:
    first = ds4.convert(mini_source, tmp_path / "a", keep_mtp=False).as_json()
    again = ds4.convert(mini_source, tmp_path / "a", keep_mtp=False)
    assert again.already_done and again.resumed and not first["already_done"]
    for words in (("quantize",), ("convert",)):
        same(again.as_json(), *words, mini_source, tmp_path / "a", "--drop-mtp")


def test_convert_writes_the_bytes_that_the_command_writes(mini_source: Path, converted: Path, tmp_path: Path) -> None:
    assert run("quantize", mini_source, tmp_path / "out").code == 0
    assert support.tree(converted) == support.tree(tmp_path / "out")


def test_verify_and_diff(mini_source: Path, converted: Path) -> None:
    found = ds4.verify(converted, source=mini_source)
    same(found.as_json(), "verify", converted, "--source", mini_source)
    assert found.ok and found.verdict is None and all(c.ok for c in found.checks)
    difference = ds4.diff(mini_source, converted)
    same(difference.as_json(), "diff", mini_source, converted)
    assert difference.equal and len(difference.tensors) == difference.as_json()["same"]


def test_a_check_that_fails_is_a_result_and_not_an_error(converted: Path, mini_source: Path, tmp_path: Path) -> None:
    other = support.write_synth(tmp_path / "other", support.mini_config(), seed=1)
    found = ds4.verify(converted, source=other)
    assert not found.ok and [c.name for c in found.checks if not c.ok]
    same(found.as_json(), "verify", converted, "--source", other, code=1)
    assert not ds4.diff(mini_source, other).equal


def test_graft_relayout_and_removal(mini_source: Path, tmp_path: Path) -> None:
    bare = ds4.convert(mini_source, tmp_path / "bare", keep_mtp=False).folder
    done = ds4.graft(bare, mini_source, out=tmp_path / "whole")
    again = ds4.graft(bare, mini_source, out=tmp_path / "whole")
    assert done.as_json()["head"] == "classic" and again.already_done
    same(again.as_json(), "graft", bare, "--from", mini_source, "--out", tmp_path / "whole")
    before = support.tree(bare)
    ds4.graft(bare, mini_source, in_place=True)
    same(ds4.graft(bare, mini_source, in_place=True).as_json(), "graft", bare, "--from", mini_source, "--in-place")
    assert ds4.graft(bare, remove=True).as_json()["removed"] and support.tree(bare) == before
    same(ds4.graft(bare, remove=True).as_json(), "graft", bare, "--remove")
    ds4.relayout(tmp_path / "whole", tmp_path / "mtplx", "mtplx")
    relaid = ds4.relayout(tmp_path / "whole", tmp_path / "mtplx", "mtplx").as_json()
    same(relaid, "relayout", tmp_path / "whole", tmp_path / "mtplx", "--layout", "mtplx")


def test_calibrate_generate_and_the_head(tmp_path: Path) -> None:
    folder = ds4.convert(DEMO, tmp_path / "demo").folder
    text, out = tmp_path / "text.txt", tmp_path / "moments.safetensors"
    text.write_text("In the beginning God created the heaven and the earth.")
    done = ds4.calibrate(DEMO, text, out, max_tokens=8, dtype="bfloat16")
    same(done.as_json(), "calibrate", DEMO, text, out, "--max-tokens", 8, "--dtype", "bfloat16")
    model = ds4.load(folder, dtype="float32")
    found = model.generate([0, 5, 6, 7], max_tokens=6)
    ids = ("--prompt-ids", "0,5,6,7", "--max-tokens", 6, "--dtype", "float32")
    same(found.as_json(), "generate", folder, *ids)
    assert model.head_kind == "classic" and found.as_json()["mtp_active"] and found.acceptance is not None
