"""Every --json document is as its schema file says, and has no key that the schema does not tell of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from ds4convert.cli import cli
from tests.schemas import FOLDER, closed, schema_of, validate
from tests.support import ROOT, run

DEMO = ROOT / "manifests" / "demo"
FORMATS = ("--backbone", "affine-4-g64")


def check(name: str, *words: object, codes: tuple[int, ...] = (0,)) -> Any:
    """Run a command and hold its document to the schema of that name; return the document."""
    result = run(*words, "--json")
    assert result.code in codes, result
    document = json.loads(result.out)
    validate(name, document)
    return document


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("schemas")
    for out, options in (("mlx", ()), ("bare", ("--drop-mtp", *FORMATS))):
        assert run("quantize", DEMO, base / out, "-q", *options).code == 0
    return base


def test_every_command_has_a_schema_and_every_schema_a_command() -> None:
    assert {p.stem for p in FOLDER.iterdir()} == {*cli.commands, "error"}
    for path in FOLDER.iterdir():
        table = json.loads(path.read_text(encoding="utf-8"))
        jsonschema.Draft202012Validator.check_schema(table)
        assert table["properties"]["schema"]["const"] == 2 and "schema" in table["required"]
        assert table["$id"] == f"ds4convert/{path.name}" and table["title"] and table["description"]


def test_a_schema_refuses_what_is_not_so() -> None:
    document = run("inspect", DEMO, "--json").json
    for change in ({"schema": 1}, {"family": 4}, {"mtp": {"kind": "classic"}}, {"new": 1}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(document | change, closed(schema_of("inspect")))
    jsonschema.validate(document | {"new": 1}, schema_of("inspect"))


def test_what_looks_before(home: Path) -> None:
    for words in ((DEMO,), (home / "bare",), (home / "mlx",), ("--config", "tiny"), (DEMO, "--tensors", "mtp.*norm*"),
                  (DEMO / "model-00001-of-00004.safetensors",)):  # fmt: skip
        check("inspect", "inspect", *words)
    for options in ((), ("--parts", 2), ("--drop-mtp", "--layout", "vlm"), ("--full",), ("--mac", 1)):
        check("plan", "plan", DEMO, *options)


def test_what_converts(home: Path, tmp_path: Path) -> None:
    check("quantize", "quantize", DEMO, home / "mlx")
    check("quantize", "quantize", DEMO, tmp_path / "part", "--part", "1/2")
    check("convert", "convert", home / "mlx", tmp_path / "again", "--from-mlx", *FORMATS)
    check("relayout", "relayout", home / "mlx", tmp_path / "vlm", "--layout", "vlm")
    for words in (["--from", DEMO, "--out", tmp_path / "g"], ["--from", DEMO, "--in-place"], ["--from", DEMO, "--in-place"], ["--remove"], ["--remove"]):  # fmt: skip
        check("graft", "graft", home / "bare", *words)
    check("synth", "synth", tmp_path / "s", "--layers", 1)


def test_what_proves(home: Path) -> None:
    for words in ((home / "mlx",), (home / "mlx", "--source", DEMO), (home / "bare",), (DEMO,)):
        check("verify", "verify", *words, codes=(0, 1))
    check("diff", "diff", DEMO, home / "mlx")
    check("diff", "diff", home / "bare", home / "mlx", codes=(1,))


@pytest.mark.slow
def test_what_runs(home: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("In the beginning\n")
    few = ("--prompts", tmp_path / "prompt.txt", "--max-tokens", 4)
    check("verify", "verify", home / "mlx", "--mtp", "--report", tmp_path / "r.html", *few, codes=(0, 1))
    check("verify", "verify", home / "bare", "--mtp", *few, codes=(1,))
    check("verify", "verify", home / "mlx", "--layerwise", "--source", DEMO, "--prompts", few[1], codes=(0, 1))
    check("generate", "generate", home / "mlx", "--prompt", "x", "--max-tokens", 2)
    check("generate", "generate", home / "bare", "--prompt-ids", "1,2", "--max-tokens", 2)
    (tmp_path / "text.txt").write_text("In the beginning God created the heaven and the earth. " * 20)
    check("calibrate", "calibrate", DEMO, tmp_path / "text.txt", tmp_path / "c", "--max-tokens", 64, "--sequence", 32)


def test_what_is_asked() -> None:
    for words in (["recommend", "--mac", 256], ["recommend", "--mac", 8, "--model", "flash-v41"], ["env"], ["completion", "zsh"],
                  *(["list", kind] for kind in ("recipes", "layouts", "formats", "families"))):  # fmt: skip
        check(str(words[0]), *words)


@pytest.mark.parametrize(
    "words", [["plan"], ["nothing"], ["inspect", "gone"], ["plan", DEMO, "--jobs", "x"], ["inspect", DEMO / "config.json"]]
)  # fmt: skip
def test_errors(words: list[object]) -> None:
    assert check("error", *words, codes=(2, 3))["error"]["hint"]
