"""`verify --reference`: both golden checkpoints agree through converted folders; one altered value does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from tests.support import assert_refused, nightly, run
from tests.verification.mtp.folders import GOLDEN, convert


def recording(name: str) -> Path:
    return GOLDEN / name / "golden.safetensors"


def altered(tmp_path: Path, changes: dict[str, Any], name: str = "tiny-a", only: str = "p0.") -> Path:
    tensors = {k: v for k, v in dict(mx.load(str(recording(name)))).items() if k.startswith(only)}
    for key, change in changes.items():
        if change is None:
            del tensors[key]
        else:
            tensors[key] = change(tensors[key])
    path = tmp_path / "recording.safetensors"
    mx.save_safetensors(str(path), tensors)
    return path


def bump(amount: float) -> Any:
    def change(value: mx.array) -> mx.array:
        flat = value.flatten()
        flat[3] = flat[3] + amount
        return flat.reshape(value.shape)

    return change


def rows(result: Any) -> dict[str, dict[str, Any]]:
    return {r["key"]: r for r in result.json["reference"]}


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", ["tiny-a", "tiny-b"])
def test_every_key_of_the_golden_files_is_within_tolerance(name: str, golden: dict[str, Path]) -> None:
    result = run("verify", golden[name], "--reference", recording(name), "--json")
    assert result.code == 0, result.out
    found, keys = rows(result), set(mx.load(str(recording(name))))
    assert set(found) == {k for k in keys if not k.endswith("input_ids")}
    assert all(r["ok"] for r in found.values())
    assert max(r["max_abs_diff"] for r in found.values()) < 5e-5
    assert set(result.json["reference"][0]) >= {"key", "max_abs_diff", "ok"}


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "key",
    nightly(
        ["logits", "mtp_logits", "decode_logits", "hidden_last8", "mtp_decode_logits"],
        lambda key: key not in {"logits", "mtp_logits"},
    ),
)
def test_one_altered_value_fails_and_is_named(key: str, golden: dict[str, Path], tmp_path: Path) -> None:
    path = altered(tmp_path, {f"p0.{key}": bump(1e-3)})
    result = run("verify", golden["tiny-a"], "--reference", path, "--json")
    assert result.code == 1
    assert {k for k, r in rows(result).items() if not r["ok"]} == {f"p0.{key}"}
    assert rows(result)[f"p0.{key}"]["max_abs_diff"] == pytest.approx(1e-3, abs=1e-4)
    wrong = [c for c in result.json["checks"] if not c["ok"]]
    assert len(wrong) == 1 and wrong[0]["name"] == "reference" and f"p0.{key}: 1 of" in wrong[0]["detail"]


@pytest.mark.sampled(1)
@pytest.mark.parametrize("key", ["expert_ids_last", "draft_match"])
def test_ids_have_to_be_equal_whatever_the_tolerance(key: str, golden: dict[str, Path], tmp_path: Path) -> None:
    path = altered(tmp_path, {f"p0.{key}": bump(1)})
    result = run("verify", golden["tiny-a"], "--reference", path, "--atol", 10, "--json")
    assert result.code == 1 and not rows(result)[f"p0.{key}"]["ok"]


def test_tolerances_can_be_widened(golden: dict[str, Path], tmp_path: Path) -> None:
    path = altered(tmp_path, {"p0.logits": bump(1e-3)})
    assert run("verify", golden["tiny-a"], "--reference", path, "--atol", 2e-3).code == 0
    assert run("verify", golden["tiny-a"], "--reference", path, "--rtol", 1).code == 0


def test_a_recording_of_few_keys_is_enough(golden: dict[str, Path], tmp_path: Path) -> None:
    keep = {"p0.input_ids", "p0.logits"}
    drop = {k: None for k in mx.load(str(recording("tiny-a"))) if k.startswith("p0.") and k not in keep}
    result = run("verify", golden["tiny-a"], "--reference", altered(tmp_path, drop), "--json")
    assert result.code == 0 and list(rows(result)) == ["p0.logits"]


def test_head_keys_fail_without_a_head(tmp_path: Path) -> None:
    folder = convert(GOLDEN / "tiny-a" / "checkpoint", tmp_path / "out", "--drop-mtp")
    result = run("verify", folder, "--reference", altered(tmp_path, {}), "--json")
    found = rows(result)
    assert result.code == 1 and found["p0.logits"]["ok"] and found["p0.greedy_ids"]["ok"]
    assert not found["p0.mtp_logits"]["ok"] and found["p0.mtp_logits"]["max_abs_diff"] is None
    assert "no head" in found["p0.mtp_logits"]["detail"]


def test_another_checkpoints_recording_fails(golden: dict[str, Path], tmp_path: Path) -> None:
    path = altered(tmp_path, {}, name="tiny-b")
    result = run("verify", golden["tiny-a"], "--reference", path, "--json")
    assert result.code == 1 and "expected shape" in rows(result)["p0.logits"]["detail"]


def test_damaged_recordings_are_refused(golden: dict[str, Path], tmp_path: Path) -> None:
    junk = tmp_path / "junk.safetensors"
    junk.write_bytes(b"junk")
    assert_refused(run("verify", golden["tiny-a"], "--reference", junk), "not readable as safetensors")
    path = altered(tmp_path, {"p0.input_ids": None})
    assert_refused(run("verify", golden["tiny-a"], "--reference", path), "p0.input_ids is missing")
    mx.save_safetensors(str(junk), {"weight": mx.zeros((2,))})
    assert_refused(run("verify", golden["tiny-a"], "--reference", junk), "no key to compare")


def test_values_that_are_not_numbers_fail_and_keep_the_json_valid(golden: dict[str, Path], tmp_path: Path) -> None:
    path = altered(tmp_path, {"p0.logits": bump(float("nan"))})
    result = run("verify", golden["tiny-a"], "--reference", path, "--json")
    assert (
        result.code == 1
        and rows(result)["p0.logits"]["max_abs_diff"] is None
        and "NaN" not in result.out.replace("NaN or", "")
    )
