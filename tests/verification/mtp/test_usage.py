"""Prompts, limits and options: what is refused, with which exit code and words, before any decode."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ds4convert.errors import UsageError
from ds4convert.evaluate import decode_runs
from ds4convert.verification.prompts import fixed_prompts, read_prompts
from tests.support import assert_refused, edit_json, run
from tests.verification.mtp.folders import MANIFEST, change_head


def contents(tmp_path: Path, text: str, name: str = "p.txt") -> list[object]:
    path = tmp_path / name
    path.write_text(text)
    return [p.content for p in read_prompts(path)]


def test_prompt_files_of_every_kind(tmp_path: Path) -> None:
    assert contents(tmp_path, "one\n\ntwo words\n") == ["one", "two words"]
    assert contents(tmp_path, "[1, 2, 3]\n4,5 , 6\nseven\n") == [(1, 2, 3), (4, 5, 6), "seven"]
    assert contents(tmp_path, "[1, 2, 3]") == [(1, 2, 3)]
    assert contents(tmp_path, '["a\\nb", [7, 8], [9]]') == ["a\nb", (7, 8), (9,)]
    assert contents(tmp_path, "[not json\n") == ["[not json"]
    assert contents(tmp_path, "[" * 200_000) == ["[" * 200_000]
    assert contents(tmp_path, "9" * 5000 + ",1") == ["9" * 5000 + ",1"]  # no id has so many digits


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("", "p.txt", "no prompt in it"),
        ("\n \n", "p.txt", "no prompt in it"),
        ("[]", "p.json", "no prompt in it"),
        ('["a", ""]', "p.json", "prompt 2 is empty"),
        ("[[1], []]", "p.json", "prompt 2 is empty"),
        ("[]\n", "p.txt", "no prompt in it"),
        ('[{"a": 1}]', "p.json", "found dict"),
        ("{}", "p.json", "expected a JSON list"),
        ("[1,", "p.json", "not JSON"),
        ("[" * 200_000, "p.json", "not JSON: nested too deeply"),
    ],
)
def test_bad_prompt_files_are_usage_errors(tmp_path: Path, text: str, name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        contents(tmp_path, text, name)


def test_the_fixed_set_has_its_eight_prompts() -> None:
    assert [p.name for p in fixed_prompts()] == [
        "genesis", "samuel", "story", "facts", "code", "letter", "explanation", "french"
    ]  # fmt: skip
    assert all(isinstance(p.content, str) and len(p.content) > 60 for p in fixed_prompts())


def test_id_prompts_are_the_same_everywhere_and_fit_the_vocabulary() -> None:
    for vocab in (4, 256, 129_280):
        prompts = decode_runs.id_prompts(vocab)
        assert prompts == decode_runs.id_prompts(vocab)
        assert [len(p.ids) for p in prompts] == [7, 40, 90, 150]
        assert all(2 <= i < vocab for p in prompts for i in p.ids)
    assert (
        decode_runs.id_prompts(256)[0].ids == (230, 182, 243, 122, 128, 4, 230)
        or len(set(decode_runs.id_prompts(256)[0].ids)) > 3
    )


@pytest.mark.parametrize("depth", ["0", "9", "-1", "x"])
def test_draft_depth_is_one_to_eight(demo: Path, depth: str) -> None:
    result = run("verify", demo, "--mtp", "--draft-depth", depth)
    assert result.code == 2 and "--draft-depth" in result.err and result.out == ""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" + ",".join(["5"] * 4090) + "]", ["4090 tokens", "4096 positions"]),
        ("[5000]", ["token id 5000", "vocabulary of 1024"]),
        ('["", [1]]', ["prompt 1 is empty"]),
    ],
)
def test_prompts_that_do_not_fit_the_model_are_usage_errors(
    demo: Path, tmp_path: Path, text: str, words: list[str]
) -> None:
    path = tmp_path / "prompts.json"
    path.write_text(text)
    assert_refused(run("verify", demo, "--mtp", "--prompts", path), *words, code=2)


def test_more_new_tokens_than_positions_is_a_usage_error(demo: Path) -> None:
    assert_refused(run("verify", demo, "--mtp", "--max-tokens", 5000), "4096 positions", code=2)


def test_text_prompts_without_a_tokenizer_are_a_usage_error(golden: dict[str, Path], short: Path) -> None:
    assert_refused(run("verify", golden["tiny-a"], "--mtp", "--prompts", short), "no tokenizer.json", code=2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--mtp", "--level", "structure"], "--mtp decodes"),
        (["--mtp", "--level", "numerics"], "--mtp decodes"),
        (["--level", "source"], "needs --source"),
    ],
)
def test_options_that_contradict_each_other(demo: Path, options: list[str], words: str) -> None:
    assert_refused(run("verify", demo, *options), words, code=2)


def test_missing_files_are_usage_errors(demo: Path, tmp_path: Path) -> None:
    for option in ("--prompts", "--reference"):
        result = run("verify", demo, "--mtp", option, tmp_path / "nowhere")
        assert result.code == 2 and "does not exist" in result.err


def test_bad_folders_are_refused_before_any_decode(fresh: Callable[[], Path], tmp_path: Path, short: Path) -> None:
    assert_refused(run("verify", tmp_path / "nowhere", "--mtp"), "no such folder")
    folder = fresh()
    lost = "model.layers.2.ffn.gate.weight"
    change_head(folder, lambda t: t.pop(lost), "model-00001-of-00001.safetensors")
    assert_refused(run("verify", folder, "--mtp", "--prompts", short), lost, "missing")
    (folder / MANIFEST).unlink()
    assert_refused(run("verify", folder, "--mtp", "--prompts", short), "no ds4convert_manifest.json")


def test_config_without_a_quantization_table_is_refused(fresh: Callable[[], Path], short: Path) -> None:
    folder = fresh()
    edit_json(folder / "config.json", lambda t: [t.pop(k, None) for k in ("quantization", "quantization_config")])
    assert_refused(run("verify", folder, "--mtp", "--prompts", short), "quantization")


@pytest.mark.nightly
def test_memory_estimate_above_free_memory_warns_and_points_to_layerwise(
    demo: Path, short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_runs, "free_memory_bytes", lambda: 1_000_000)
    result = run("verify", demo, "--mtp", "--prompts", short, "--max-tokens", 3, "--json")
    assert "Warning" in result.err and "0.0 GB are free" in result.err and "--layerwise" in result.err
    assert result.json["compute"] == {**result.json["compute"], "dtype": "bfloat16", "dense": False}


def test_help_states_the_thresholds() -> None:
    from ds4convert.evaluate import wiring
    from ds4convert.verification import verdict

    text = " ".join(run("verify", "--help").out.split())
    for figure in (
        f"{verdict.USELESS * 100:.0f} %", f"{verdict.CHANCE} times", f"{verdict.FORCED_USELESS * 100:.0f} %",
        f"{verdict.WEAK * 100:.0f} %", f"{wiring.BEHAVIOUR_LIMIT:.0f} standard errors",
        f"{wiring.SHAPE_LIMIT} standard errors", f"{verdict.CHUNK_LIMIT}", f"{verdict.CHUNK_KL}",
        f"{verdict.TIE['float32']}", f"{verdict.TIE['bfloat16']}",
    ):  # fmt: skip
        assert figure in text, figure


def test_json_is_the_only_thing_on_standard_output(demo: Path, short: Path) -> None:
    result = run("verify", demo, "--level", "decode", "--prompts", short, "--max-tokens", 3, "--json")
    assert json.loads(result.out)["ok"] is True and "mtp" not in result.json
    assert result.json["decode"]["plain_tokens_per_second"] > 0


def test_layerwise_writes_a_page_with_its_memory_and_does_not_decode(demo: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    result = run("verify", demo, "--layerwise", "--report", page, "--json")
    assert result.code == 0 and "mtp" not in result.json and "decode" not in result.json, result.err
    text = page.read_text()
    assert "Peak memory" in text and "of the layer-wise run" in text and "teacher-forced" in text
    assert run("verify", demo, "--layerwise", "--mtp").code == 2


def test_layerwise_takes_the_fixed_prompts_as_decoding_does(demo: Path) -> None:
    result = run("verify", demo, "--layerwise", "--json")
    assert result.code == 0 and result.json["layerwise"], result.err
    assert "562" in next(c["detail"] for c in result.json["checks"] if c["name"] == "layerwise head")


def test_options_that_a_run_has_no_use_for_are_said_to_have_none(demo: Path) -> None:
    result = run("verify", demo, "--draft-depth", 3, "--max-tokens", 9, "--atol", 0.1, "--json")
    assert result.code == 0 and json.loads(result.out)["ok"]
    for name in ("--draft-depth", "--max-tokens", "--atol"):
        assert f"{name} has no effect here" in result.err
    assert "no effect" not in run("verify", demo, "--json").err
