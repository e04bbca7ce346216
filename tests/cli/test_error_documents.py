"""With --json an error is a document as well: one, on standard output, beside the message on standard error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ds4convert import errors
from ds4convert.checkpoint.headers import parse_header
from tests import support
from tests.support import run

KEYS = {"code", "kind", "message", "file", "tensor", "hint"}


def failure(*words: object, code: int, kind: str) -> dict[str, Any]:
    """Run a command that fails; return the error of its document."""
    result = run(*words, "--json")
    assert result.code == code, result
    table = json.loads(result.out)
    assert table.keys() == {"schema", "error"} and table["schema"] == 2 and table["error"].keys() == KEYS
    error = dict(table["error"])
    assert (error["code"], error["kind"]) == (code, kind)
    assert error["message"] in result.err and "Traceback" not in result.err
    return error


def test_every_document_says_its_schema(mini_source: Path, tmp_path: Path) -> None:
    for words in (("inspect", mini_source), ("plan", mini_source), ("synth", tmp_path / "s", "--layers", 1)):
        table = run(*words, "--json").json
        assert table["schema"] == 2 and next(iter(table)) == "schema"


def test_a_missing_folder_is_named_with_what_is_near(mini_source: Path) -> None:
    error = failure("inspect", f"{mini_source}x", code=3, kind="input")
    assert error["file"] == f"{mini_source}x" and error["hint"] == f"did you mean {mini_source}?"


def test_arguments_the_wrong_way_round_are_recognised(mini_source: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    for words, names in (
        (("quantize", new, mini_source), "SRC and OUT"),
        (("relayout", new, mini_source, "--layout", "vlm"), "MLX_DIR and OUT"),
        (("publish", "me/new", mini_source), "MLX_DIR and REPO"),
    ):
        error = failure(*words, code=3, kind="input")
        assert error["hint"] == f"{mini_source} holds a checkpoint: are {names} exchanged?"
    near = failure("quantize", f"{mini_source}x", mini_source, code=3, kind="input")
    assert near["hint"] == f"did you mean {mini_source}?"


@pytest.mark.parametrize(
    "words",
    [
        ("inspect", ""), ("quantize", "SRC", ""), ("quantize", "", "out"), ("verify", ""), ("verify", "SRC", "--source", ""),
        ("graft", "SRC", "--from", "", "--in-place"), ("graft", "SRC", "--from", "SRC", "--out", ""), ("diff", "SRC", ""),
        ("relayout", "SRC", "", "--layout", "vlm"), ("verify", "SRC", "--report", ""), ("synth", ""), ("demo", ""),
        ("pull", "me/x", ""), ("publish", "SRC", ""), ("serve", ""), ("generate", ""),
    ],
)  # fmt: skip
def test_an_empty_name_is_not_the_current_folder(words: tuple[str, ...], mini_source: Path) -> None:
    told = failure(*(mini_source if w == "SRC" else w for w in words), code=2, kind="usage")["message"]
    assert "is empty; was a variable not set?" in told


def test_advice_names_options_that_the_command_has(mini_source: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a few words")
    told = failure("calibrate", mini_source, text, tmp_path / "out.safetensors", code=3, kind="input")["message"]
    assert told.endswith("no tokenizer.json; copy it from the source")
    told = failure("graft", mini_source, "--remove", "--out", tmp_path / "o", code=2, kind="usage")["message"]
    assert told.endswith("leave out --out")


def test_wrong_usage_is_a_document_wherever_the_command_line_is_wrong(mini_source: Path) -> None:
    failure("plan", mini_source, "--jobs", "none", code=2, kind="usage")
    failure("plan", mini_source, "--no-such-option", code=2, kind="usage")
    failure("quantize", mini_source, "out", "--part", "3/2", code=2, kind="usage")
    failure("quantize", mini_source, "out", "--part", "first", code=2, kind="usage")
    failure("plan", mini_source, "--mtp", "bf16", "--drop-mtp", code=2, kind="usage")
    failure("plan", code=2, kind="usage")
    failure("no-such-command", code=2, kind="usage")


def test_a_damaged_header_names_file_and_tensor(source: Path) -> None:
    path = support.shard_with(source, "norm.weight")
    support.edit_header(path, lambda t: t["norm.weight"].update(dtype="F7"))
    error = failure("quantize", source, source.parent / "out", code=3, kind="header")
    assert (error["file"], error["tensor"]) == (path.name, "norm.weight")


def test_a_header_that_is_no_json_and_one_that_leaves_a_gap_name_the_file() -> None:
    with pytest.raises(errors.HeaderError) as broken:
        parse_header(b'{"a": 1, "a": 2}', 100, "one.safetensors")
    assert (broken.value.file, broken.value.tensor) == ("one.safetensors", None)
    gap = b'{"x":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}'
    with pytest.raises(errors.HeaderError) as wrong:
        parse_header(gap, 8 + len(gap) + 2, "two.safetensors")
    assert (wrong.value.file, wrong.value.tensor) == ("two.safetensors", "x")


def test_a_config_a_missing_tensor_and_a_bad_value_are_told_apart(source: Path, tmp_path: Path) -> None:
    table = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(table | {"num_hidden_layers": 0}))
    assert failure("plan", source, code=3, kind="config")["file"] == "config.json"
    (source / "config.json").write_text(json.dumps(table))
    path = support.shard_with(source, "layers.0.attn.wq_a.scale")
    tensors = support.read_file(path)
    tensors["layers.0.attn.wq_a.scale"].data = b"\xff" + tensors["layers.0.attn.wq_a.scale"].data[1:]
    support.write_file(path, tensors)
    error = failure("quantize", source, tmp_path / "out", code=3, kind="value")
    assert error["tensor"] == "layers.0.attn.wq_a.scale" and error["hint"]
    tensors = {n: t for n, t in support.read_file(path).items() if n != "layers.0.attn.wq_a.scale"}
    support.write_file(path, tensors)
    support.edit_json(source / support.INDEX, lambda t: t["weight_map"].pop("layers.0.attn.wq_a.scale"))
    error = failure("plan", source, code=3, kind="findings")
    assert error["tensor"] == "layers.0.attn.wq_a.scale" and error["hint"] and "missing" in error["message"]


def test_an_output_folder_of_somebody_else_and_a_failing_machine(mini_source: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    failure("quantize", mini_source, tmp_path, code=3, kind="output")
    assert failure("verify", tmp_path / "nothing", code=3, kind="input")["file"] == str(tmp_path / "nothing")


def test_a_check_that_fails_is_a_result_and_no_error(mini_source: Path) -> None:
    result = run("verify", mini_source, "--json")
    assert result.code == 1 and "error" not in result.json and result.json["ok"] is False


def test_without_json_nothing_is_on_standard_output(tmp_path: Path) -> None:
    result = run("inspect", tmp_path / "nothing")
    assert (result.code, result.out) == (3, "")


@pytest.mark.parametrize("kind", [errors.UsageError, errors.HeaderError, errors.EnvironmentFault])
def test_an_error_keeps_its_facts_on_the_way_from_a_worker_process(kind: type[errors.Ds4Error]) -> None:
    import pickle

    sent = pickle.loads(pickle.dumps(kind("text", file="f", tensor="t", hint="h")))
    assert (str(sent), sent.file, sent.tensor, sent.hint, type(sent)) == ("text; h", "f", "t", "h", kind)
