"""The JSON of every command: one document on standard output, nothing else there, the keys of the contract."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests import support
from tests.support import Result, mini_config, run, run_process

PLAN_KEYS = {
    "output_bytes", "output_tensors", "output_shards", "free_bytes", "peak_memory_bytes", "bits_per_weight", "groups",
    "left_out",
}  # fmt: skip


def document(result: Result, code: int = 0) -> dict[str, Any]:
    """Return the only JSON document of a run."""
    assert result.code == code, result
    value, end = json.JSONDecoder().raw_decode(result.out)
    assert result.out[end:] == "\n" and isinstance(value, dict)
    return value


def is_size(value: object) -> bool:
    return type(value) is int and value >= 0


def test_inspect_has_the_keys_of_the_contract_and_adds_up(mini_source: Path) -> None:
    facts = document(run("inspect", mini_source, "--json"))
    tensors = support.read_folder(mini_source)
    head = support.names(tensors, "mtp.")
    assert facts["family"] == "deepseek_v4" and facts["problems"] == []
    assert facts["tensors"] == len(tensors) and facts["bytes"] == sum(len(t.data) for t in tensors.values())
    assert facts["mtp"] == {"kind": "classic", "tensors": len(head), "bytes": sum(len(tensors[n].data) for n in head)}
    for group in facts["groups"]:
        assert group.keys() >= {"name", "tensors", "bytes", "dtypes"} and isinstance(group["dtypes"], list)
    assert sum(g["bytes"] for g in facts["groups"]) == facts["bytes"]
    assert sum(g["tensors"] for g in facts["groups"]) == facts["tensors"]
    assert 4 < facts["bits_per_weight"] < 32


def test_bits_per_weight_counts_scales_and_each_weight_once(mini_source: Path) -> None:
    tensors = support.read_folder(mini_source)
    weights = 0
    for name, t in tensors.items():
        count = len(t.data) // support.WIDTHS[t.dtype]
        weights += 0 if t.dtype == "F8_E8M0" else count * 2 if t.dtype == "I8" else count
        del name
    facts = document(run("inspect", mini_source, "--json"))
    assert facts["bits_per_weight"] == round(8 * facts["bytes"] / weights, 4)


def test_inspect_of_flash_from_its_config_alone_says_what_was_published() -> None:
    facts = document(run("inspect", "--config", "flash", "--json"))
    assert (facts["tensors"], facts["bytes"]) == (69_187, 159_609_485_896)
    assert facts["mtp"] == {"kind": "classic", "tensors": 1575, "bytes": 3_593_787_756}


def test_inspect_lists_the_tensors_that_match_a_glob(mini_source: Path) -> None:
    facts = document(run("inspect", mini_source, "--tensors", "mtp.0.?_proj.weight", "--json"))
    assert [t["name"] for t in facts["matching"]] == ["mtp.0.e_proj.weight", "mtp.0.h_proj.weight"]
    text = run("inspect", mini_source, "--tensors", "mtp.0.?_proj.weight").out
    assert "mtp.0.e_proj.weight" in text and "F8_E4M3" in text and "160x160" in text and "wq_a" not in text


def test_plan_has_the_keys_of_the_contract_and_promises_what_quantize_writes(mini_source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    planned = document(run("plan", mini_source, "--out", tmp_path, "--json"))
    assert planned.keys() >= PLAN_KEYS
    assert all(is_size(planned[k]) for k in PLAN_KEYS - {"bits_per_weight", "groups", "left_out"})
    assert not out.exists()
    done = document(run("quantize", mini_source, out, "--json"))
    assert done.keys() >= PLAN_KEYS | {"seconds", "bytes_per_second", "resumed", "manifest"}
    assert done["resumed"] is False and Path(done["manifest"]).is_file()
    for key in PLAN_KEYS - {"free_bytes"}:
        assert done[key] == planned[key], key
    files = [p for p in out.iterdir() if p.name != "ds4convert_manifest.json"]
    assert planned["output_bytes"] == sum(p.stat().st_size for p in files)
    stored = support.read_folder(out)
    assert planned["output_tensors"] == len(stored)
    assert planned["output_shards"] == len(list(out.glob("*.safetensors")))
    assert sum(g["bytes"] for g in planned["groups"]) == sum(len(t.data) for t in stored.values())


def test_plan_in_full_holds_every_step_with_its_byte_ranges(mini_source: Path) -> None:
    facts = document(run("plan", mini_source, "--json", "--full"))
    steps = facts["steps"]["steps"]
    assert sum(len(s[0]) for s in steps) == facts["output_tensors"]


def test_plan_of_flash_and_pro_from_their_configs_alone() -> None:
    for name in ("flash", "pro"):
        facts = document(run("plan", "--config", name, "--json"))
        assert facts["output_shards"] > 20 and facts["left_out"] == []


def test_a_plan_has_the_same_id_on_every_run(mini_source: Path) -> None:
    first, second = (document(run("plan", mini_source, "--json"))["plan"] for _ in range(2))
    other = document(run("plan", mini_source, "--json", "--layout", "mtplx"))["plan"]
    assert first == second != other and len(first) == 64


def test_left_out_tensors_are_listed_with_the_reason(mini_source: Path) -> None:
    facts = document(run("plan", mini_source, "--drop-mtp", "--json"))
    assert facts["left_out"] and all(x.keys() == {"tensor", "why"} for x in facts["left_out"])


def test_verify_has_the_keys_of_the_contract_and_code_1_when_a_check_fails(mini_source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("quantize", mini_source, out).code == 0
    for extra in ((), ("--source", mini_source)):
        facts = document(run("verify", out, "--json", *extra))
        assert facts["ok"] is True
        assert all(c.keys() >= {"name", "ok", "detail"} and c["ok"] is True and c["detail"] for c in facts["checks"])
    path = sorted(out.glob("*.safetensors"))[0]
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    facts = document(run("verify", out, "--json"), code=1)
    assert facts["ok"] is False and [c["name"] for c in facts["checks"] if not c["ok"]] == ["digests", "tensor digests"]


def test_diff_has_the_keys_of_the_contract_and_code_1_when_folders_differ(mini_source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("quantize", mini_source, out).code == 0
    facts = document(run("diff", mini_source, out, "--json"))
    assert facts.keys() >= {"same", "changed", "only_a", "only_b", "tensors"}
    assert (facts["changed"], facts["only_a"], facts["only_b"]) == (0, 0, 0) and facts["same"] == len(facts["tensors"])
    other = support.write_synth(tmp_path / "other", mini_config(), seed=1)
    facts = document(run("diff", mini_source, other, "--json"), code=1)
    assert facts["changed"] > 100 and all(t.keys() >= {"tensor", "status"} for t in facts["tensors"])
    assert run("quantize", mini_source, tmp_path / "bare", "--drop-mtp").code == 0
    facts = document(run("diff", out, tmp_path / "bare", "--json"), code=1)
    assert (
        facts["only_a"] == len(support.names([t["tensor"] for t in facts["tensors"]], "mtp.")) and not facts["only_b"]
    )


def test_quantize_again_reports_that_all_was_done(mini_source: Path, tmp_path: Path) -> None:
    first = document(run("quantize", mini_source, tmp_path / "out", "--json"))
    before = support.tree(tmp_path / "out")
    again = document(run("quantize", mini_source, tmp_path / "out", "--json"))
    assert (first["resumed"], again["resumed"]) == (False, True)
    assert support.tree(tmp_path / "out") == before


def test_synth_prints_one_document(tmp_path: Path) -> None:
    assert document(run("synth", tmp_path / "s", "--json"))["bytes"] > 1_000_000


@pytest.mark.parametrize("quiet", [(), ("-q",)])
def test_the_process_prints_json_alone_on_standard_output(
    quiet: tuple[str, ...], mini_source: Path, tmp_path: Path
) -> None:
    result = run_process("quantize", mini_source, tmp_path / "out", "--json", *quiet)
    assert document(result)["manifest"].endswith("ds4convert_manifest.json") and result.err == ""


def test_json_survives_a_folder_whose_name_is_not_utf_8(mini_source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out\udcff\U0001f600"
    for encoding in ("utf-8:strict", "ascii:strict"):
        variables = {"PYTHONIOENCODING": encoding}
        facts = document(run_process("quantize", mini_source, out, "--json", variables=variables))
        assert facts["manifest"] == f"{out}/ds4convert_manifest.json"
        text = run_process("verify", out, variables=variables)
        assert (text.code, text.err) == (0, "") and "All good." in text.out
        text = run_process("quantize", mini_source, out, variables=variables)
        assert (text.code, text.err) == (0, "") and "is already complete" in text.out


def test_nothing_but_the_contracts_exit_code_tells_a_failed_check_from_bad_input(
    mini_source: Path, tmp_path: Path
) -> None:
    assert run("quantize", mini_source, tmp_path / "out").code == 0
    assert run("verify", tmp_path / "out", "--source", tmp_path / "nothing").code == 3
    assert run("verify", mini_source, "--json").code == 1
