"""What strangers wrote (names, manifest fields, configs) reaches no terminal as anything but visible text, whatever prints."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from ds4convert.storage import strict_json
from ds4convert.words import terminal
from tests import support
from tests.support import ROOT, Result, run, run_process

DEMO = ROOT / "manifests" / "demo"
ESC = "\x1b[2J\x1b[1;1HAll good.\x07\r"
EVIL = f"x{ESC}\u202ey\u2066z\x9b31m"
LINES = f"{EVIL}\nAll good.\n"
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\u2028\u2029]")


def assert_harmless(result: Result) -> None:
    for stream in (result.out, result.err):
        found = UNSAFE.search(stream)
        assert found is None, (hex(ord(found[0])), stream[max(0, found.start() - 80) : found.end() + 20])
    assert "Traceback" not in result.err and "this is a bug" not in result.err, result.err


def signed(folder: Path, change: Any) -> None:
    """Change the manifest of a folder and sign it again, as an attacker would."""
    path = folder / "ds4convert_manifest.json"
    table = json.loads(path.read_text())
    del table["digest"]
    change(table)
    path.write_bytes(strict_json.pretty(table | {"digest": strict_json.digest(table)}))


def spoil(table: dict[str, Any]) -> None:
    table["tool"] = {"name": LINES, "version": LINES}
    table["head"]["kind"] = LINES
    table["recipe"] = LINES
    table["left_out"] = [{"tensor": LINES, "why": LINES}]
    for row in table["tensors"]:
        row["format"] = LINES
        row["role"] = LINES
        row["error"] = {"relative_square": 1.0, "max_abs": 1.0, "bits_per_weight": 2.0}
    table["files"].append({"name": f"{EVIL}.json", "sha256": "0" * 64})


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("escapes") / "mlx"
    assert run("quantize", DEMO, out, "-q").code == 0
    return out


COMMANDS = [
    ["inspect", "DIR"], ["inspect", "DIR", "--tensors", "*"], ["verify", "DIR"], ["verify", "DIR", "-q"],
    ["verify", "DIR", "--source", "SRC"], ["diff", "SRC", "DIR"], ["generate", "DIR", "--prompt-ids", "1,2"],
    ["relayout", "DIR", "OUT", "--layout", "mtplx"], ["graft", "DIR", "--from", "SRC", "--out", "OUT"],
    ["graft", "--remove", "DIR"], ["publish", "DIR", "me/x", "--dry-run", "--endpoint", "http://127.0.0.1:9"],
    ["plan", "DIR", "--from-mlx"], ["quantize", "DIR", "OUT", "--from-mlx"], ["calibrate", "DIR", "TEXT", "OUT"],
]  # fmt: skip


@pytest.mark.sampled(3)
@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_a_manifest_of_a_stranger_paints_nothing(arguments: list[str], converted: Path, tmp_path: Path) -> None:
    folder = support.copy_folder(converted, tmp_path / f"mlx{ESC[:4]}")
    signed(folder, spoil)
    text = tmp_path / "text"
    text.write_text("In the beginning")
    places = {"DIR": folder, "SRC": DEMO, "OUT": tmp_path / f"out{ESC[:4]}", "TEXT": text}
    result = run(*(places.get(a, a) for a in arguments))
    assert_harmless(result)
    assert "All good." not in [row.strip() for row in result.out.splitlines()[:-1]]


@pytest.mark.parametrize("command", ["inspect", "plan", "quantize", "verify", "diff"])
def test_names_of_files_and_tensors_of_a_stranger_paint_nothing(command: str, tmp_path: Path) -> None:
    folder = support.copy_folder(DEMO, tmp_path / "src")
    shard = sorted(folder.glob("model-*.safetensors"))[0]
    support.edit_header(shard, lambda t: t.update({LINES: t.pop(next(k for k in t if k != "__metadata__"))}))
    (folder / f"model-{EVIL.replace('/', '')}.safetensors").write_bytes(b"not one")
    (folder / "model.safetensors.index.json").unlink()
    words = {"quantize": [tmp_path / "out"], "diff": [DEMO]}.get(command, [])
    result = run(command, folder, *words)
    assert_harmless(result)
    assert result.code in {1, 3}


@pytest.mark.parametrize("key", ["model_type", "expert_dtype", "torch_dtype", "quantization_config", "architectures"])
def test_a_config_of_a_stranger_paints_nothing(key: str, tmp_path: Path) -> None:
    folder = support.copy_folder(DEMO, tmp_path / "src")
    support.edit_json(folder / "config.json", lambda t: t.update({key: LINES}))
    for words in (["inspect", folder], ["plan", "--config", folder / "config.json"]):
        assert_harmless(run(*words))


def test_arguments_are_shown_in_one_line(tmp_path: Path) -> None:
    for words in (["quantize", LINES], ["inspect", LINES], ["plan", "--layout", LINES, "x"], [LINES],
                  ["inspect", "--config", LINES], ["plan", "x", "--recipe", LINES], ["verify", "a", LINES],
                  ["plan", "--config", "tiny", "--fit", LINES], ["diff", LINES, LINES], ["publish", "x", LINES]):  # fmt: skip
        result = run(*words)
        assert_harmless(result)
        assert result.code in {2, 3} and "\nAll good." not in result.err


def test_every_word_of_every_library_goes_through_the_sink(tmp_path: Path) -> None:
    """Loggers, warnings and plain prints of others end at the same two streams."""
    stream = io.StringIO()
    sink = terminal.Escaped(stream)
    print(f"a{EVIL}", file=sink)
    sink.writelines(["b\r", "c\n"])
    assert UNSAFE.search(stream.getvalue()) is None and stream.getvalue().endswith("b\\rc\n")
    assert terminal.plain(sink) is stream and terminal.plain(stream) is stream  # type: ignore[arg-type]
    assert terminal.line("a\nb\tc") == "a\\nb\\tc" and terminal.escape("a\nb\tc é 日本") == "a\nb\tc é 日本"
    assert terminal.clean({EVIL: [EVIL, 1, None, True]}) == {terminal.line(EVIL): [terminal.line(EVIL), 1, None, True]}


def test_text_that_a_model_writes_moves_no_cursor(converted: Path, tmp_path: Path) -> None:
    folder = support.copy_folder(converted, tmp_path / "mlx")
    path = folder / "tokenizer.json"
    table = json.loads(path.read_text())
    vocab = table["model"]["vocab"]
    table["decoder"] = {"type": "Replace", "pattern": {"String": "e"}, "content": "\x1b[2J"}
    path.write_text(json.dumps(table))
    assert vocab
    result = run_process("generate", folder, "--raw", "--prompt", "In the", "--max-tokens", 8)
    assert_harmless(result)
    shutil.rmtree(folder)
