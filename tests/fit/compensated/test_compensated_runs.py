"""`--rounding compensated`: less error in the output, the same bytes however a run goes, and what it refuses."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ds4convert.checkpoint.source import open_source
from ds4convert.errors import InputError
from ds4convert.evaluate.inputs.layer_inputs import LayerInputs
from ds4convert.execution import run
from ds4convert.execution.rounding_steps import Importance, Inputs, no_importance
from ds4convert.inference import calibration_text
from ds4convert.planning import build
from ds4convert.planning.build import Text, make_plan
from ds4convert.planning.layouts import layout_of
from ds4convert.planning.recipes import Rule, recipe_of
from tests import support_run as s
from tests.support import nightly

DEMO = s.ROOT / "manifests" / "demo"
TINY = s.CHECKPOINTS[0]
ROWS = [[(7 * n + 13 * m) % 200 + 2 for n in range(48)] for m in range(6)]


def silent(text: str) -> None:
    """Say nothing."""


def converted(
    source: Path, out: Path, backbone: str = "affine-2-g32", rounding: str = "compensated",
    weigh: Importance | None = None, jobs: int = 2, limit: int = 5_000_000_000,
) -> Path:  # fmt: skip
    opened = open_source(source)
    rules = (
        Rule(frozenset({"attention", "mtp_attention"}), None, backbone),
        Rule(frozenset({"experts"}), frozenset({1}), backbone),
    )
    recipe = replace(recipe_of("native"), rules=rules)
    options = build.Options(recipe, layout_of("inline"), rounding=rounding, max_shard_bytes=limit)
    if rounding == "compensated":
        options = replace(options, text=Text("0" * 64, sum(map(len, ROWS))))
        weigh = weigh or LayerInputs(source, ROWS, out, silent)
    run.run(opened, make_plan(opened, options), out, run.Way(jobs, importance=weigh or no_importance))
    return out


def tensors(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.glob("*.safetensors")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted(TINY, tmp_path_factory.mktemp("compensated") / "mlx")


def test_the_folder_is_whole_and_every_check_against_the_source_passes(whole: Path) -> None:
    assert s.failed_checks(whole, "--source", TINY) == []
    assert "rounded against a text (compensated)" in s.cli("verify", whole, "--source", TINY).stdout
    params = [r["params"] for r in json.loads((whole / "ds4convert_manifest.json").read_text())["tensors"]]
    told = [p for p in params if p.get("rounding") == "compensated"]
    assert told and all(p["text"] == "0" * 64 and p["tokens"] == 288 for p in told)
    assert not (whole / ".ds4convert").exists()


def test_it_gives_other_bytes_than_optimal_for_the_head_too(whole: Path, tmp_path: Path) -> None:
    plain = tensors(converted(TINY, tmp_path / "plain", rounding="optimal"))
    found = tensors(whole)
    assert plain.keys() == found.keys() and all(plain[n] != found[n] for n in plain)


def test_a_changed_tensor_is_found_though_its_rounding_cannot_be_repeated(whole: Path, tmp_path: Path) -> None:
    folder = s.copied(whole, tmp_path / "mlx")
    shard = next(iter(sorted(folder.glob("*.safetensors"))))
    record = next(r for r in json.loads((folder / "ds4convert_manifest.json").read_text())["tensors"]
                  if r["params"].get("rounding") == "compensated" and r["file"] == shard.name)  # fmt: skip
    data = bytearray(shard.read_bytes())
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    start, end = header[record["name"]]["data_offsets"]
    at = 8 + int.from_bytes(data[:8], "little") + (start + end) // 2
    data[at] ^= 0xFF
    shard.write_bytes(data)
    told = s.cli("verify", folder, "--source", TINY, exit_code=1).stdout
    assert record["name"].removesuffix(".weight") in told


@pytest.mark.nightly
def test_smaller_shards_and_more_writers_give_the_same_codes(whole: Path, tmp_path: Path) -> None:
    other = converted(TINY, tmp_path / "cut", jobs=8, limit=100_000)
    ours, theirs = (
        {r["name"]: r["xxh3_128"] for r in json.loads((f / "ds4convert_manifest.json").read_text())["tensors"]}
        for f in (whole, other)
    )
    assert ours == theirs and len(tensors(other)) > len(tensors(whole))


class Stopping:
    """The inputs of layers, until a matrix of some layer is asked for; counts the layers that were computed."""

    def __init__(self, out: Path, at: str, source: Path = TINY) -> None:
        self.inner, self.at = LayerInputs(source, ROWS, out, silent), at

    def __call__(self, key: str, expert: int) -> Inputs | None:
        if self.at and key.startswith(self.at):
            raise InputError("stopped here")
        return self.inner(key, expert)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    "at", nightly(["model.layers.1.ffn", "model.layers.2", "mtp"], lambda at: at != "model.layers.2")
)
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(at: str, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "mlx"
    with pytest.raises(InputError, match="stopped here"):
        converted(TINY, out, weigh=Stopping(out, at))
    streams = {p.name for p in (out / ".ds4convert" / "inputs").glob("streams-*.bin")}
    assert streams and len(streams) <= 3
    assert tensors(converted(TINY, out)) == tensors(whole)


@pytest.mark.nightly
def test_streams_that_were_damaged_are_not_gone_on_from(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "mlx"
    with pytest.raises(InputError):
        converted(TINY, out, weigh=Stopping(out, "mtp"))
    for path in (out / ".ds4convert" / "inputs").glob("streams-*.bin"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 0x55
        path.write_bytes(data)
    assert tensors(converted(TINY, out)) == tensors(whole)


def test_streams_of_another_model_in_the_same_place_are_not_gone_on_from(tmp_path: Path) -> None:
    """Two models of one shape have equal headers and so equal plans; what was kept is of the files that were there."""
    source, out = s.copied(TINY, tmp_path / "source"), tmp_path / "mlx"
    with pytest.raises(InputError, match="stopped here"):
        converted(source, out, weigh=Stopping(out, "model.layers.2", source))
    before = LayerInputs(source, ROWS, out, silent)
    shard = next(iter(sorted(source.glob("*.safetensors"))))
    os.utime(shard, ns=(1, 1))
    after = LayerInputs(source, ROWS, out, silent)
    numbers = [n for n in range(4) if (out / ".ds4convert" / "inputs" / f"streams-{n}.bin").exists()]
    assert numbers and all(before._kept(n) is not None and after._kept(n) is None for n in numbers)


@pytest.mark.parametrize("folder", s.BLOCK_CHECKPOINTS[:1], ids=lambda p: p.parent.name)
def test_a_dspark_head_is_rounded_against_its_own_inputs(folder: Path, tmp_path: Path) -> None:
    keys = []

    class Told(LayerInputs):
        def __call__(self, key: str, expert: int) -> Inputs | None:
            found = super().__call__(key, expert)
            keys.append((key, found is not None))
            return found

    out = tmp_path / "mlx"
    converted(folder, out, weigh=Told(folder, ROWS, out, silent))
    assert s.failed_checks(out, "--source", folder) == []
    head = [found for key, found in keys if key.startswith("mtp.")]
    assert head and sum(head) > len(head) / 2


def test_fp4_sources_that_the_format_holds_stay_exact(tmp_path: Path) -> None:
    out = converted(TINY, tmp_path / "mlx", "affine-8-g32")
    record = json.loads((out / "ds4convert_manifest.json").read_text())
    errors = [r["error"]["relative_square"] for r in record["tensors"]
              if r.get("source_dtype") == "I8" and "error" in r]  # fmt: skip
    assert all(e == 0 for e in errors)


def test_experts_that_few_rows_went_to_are_named(tmp_path: Path) -> None:
    said: list[str] = []
    found = LayerInputs(TINY, [ROWS[0][:3]], tmp_path, said.append)
    answers = [found("model.layers.0.ffn.switch_mlp.gate_proj", e) for e in range(4)]
    assert any(a is None for a in answers) or said
    assert "model.layers.0.ffn.switch_mlp.gate_proj" in said[0] and "none" in said[0]


# --- texts


class Words:
    """A tokenizer of words."""

    bos_token, bos_token_id, has_chat_template = "<s>", 0, False

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [0] * add_special_tokens + [len(w) for w in text.split()]


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(calibration_text.tokens, "read_tokenizer", lambda folder: Words())
    yield


@pytest.mark.usefixtures("words")
def test_rows_come_from_everywhere_and_begin_with_the_start_token(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text(" ".join("x" * (n // 10 + 1) for n in range(1000)))
    (tmp_path / "a.jsonl").write_text('{"text": "one two three"}\n\n{"text": "four"}\n')
    found = calibration_text.read(DEMO, [tmp_path], 300, 21)
    assert found.texts == 3 and 280 <= found.tokens <= 300
    assert all(row[0] == 0 and 2 <= len(row) <= 21 for row in found.ids)
    places = sorted(row[1] for row in found.ids if len(row) == 21)
    assert places[0] < 20 and places[-1] > 80 and max(np.diff(places)) < 20
    assert found == calibration_text.read(DEMO, [tmp_path], 300, 21)
    assert found.digest != calibration_text.read(DEMO, [tmp_path], 200, 21).digest


@pytest.mark.usefixtures("words")
@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.jsonl", "{}", "line 1"),
        ("a.jsonl", '{"text": "good"}\n{"text"', "line 2"),
        ("a.jsonl", '{"messages": []}', "messages"),
        ("a.txt", "", "expected at least 2"),
    ],
)
def test_what_is_no_text_is_refused_with_its_place(name: str, text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=told):
        calibration_text.read(DEMO, [tmp_path / name], 300)


def test_messages_are_written_as_the_chat_template_has_them(tmp_path: Path) -> None:
    line = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I am."}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(line))
    rows = calibration_text.read(DEMO, [tmp_path / "a.jsonl"], 300)
    tokenizer = calibration_text.tokens.read_tokenizer(DEMO)
    assert "<｜User｜>Who?<｜Assistant｜>" in tokenizer.decode(list(rows.ids[0]))


def test_options_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    words = ["--backbone", "affine-2-g64", "--rounding"]
    text = tmp_path / "text.txt"
    text.write_text("In the beginning")
    assert "--calibrate TEXT" in s.cli("plan", DEMO, *words, "compensated", exit_code=2).stderr
    assert "no use" in s.cli("plan", DEMO, *words, "optimal", "--calibrate", text, exit_code=2).stderr
    gone = s.cli("plan", DEMO, *words, "compensated", "--calibrate", tmp_path / "gone", exit_code=3).stderr
    assert "is not there" in gone
    config = ["--config", "flash", *words, "compensated", "--calibrate", text]
    assert "weights have to be here" in s.cli("plan", *config, exit_code=2).stderr
