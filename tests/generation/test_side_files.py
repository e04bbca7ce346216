"""The files beside the tensors that make a folder usable: the chat template, and the model file of layout mlx-lm."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from ds4convert.checkpoint.source import open_source
from ds4convert.inference.single_file import single_file_source
from ds4convert.planning import build
from ds4convert.planning.build import make_plan
from ds4convert.planning.layouts import layout_of, layouts
from ds4convert.planning.recipes import recipe_of
from tests import support
from tests.generation.conftest import quantized
from tests.support import run

TEMPLATE = support.ROOT / "manifests" / "templates" / "deepseek_v4.jinja"
NAME = "chat_template.jinja"


def recorded(folder: Path, name: str) -> dict:
    files = json.loads((folder / "ds4convert_manifest.json").read_text())["files"]
    return next(f for f in files if f["name"] == name)


@pytest.mark.parametrize("layout", sorted(n for n, y in layouts().items() if not y.named_only))
def test_every_layout_holds_the_chat_template_and_records_it(layout: str, mini_source: Path, tmp_path: Path) -> None:
    out = quantized(mini_source, tmp_path / "out", "--layout", layout)
    text = TEMPLATE.read_bytes()
    assert (out / NAME).read_bytes() == text
    assert recorded(out, NAME) == {"name": NAME, "bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    assert run("verify", out).code == 0


def test_a_template_of_the_source_is_copied_instead(source: Path, tmp_path: Path) -> None:
    (source / NAME).write_text("{{ messages }} their own")
    out = quantized(source, tmp_path / "out")
    assert (out / NAME).read_text() == "{{ messages }} their own"
    assert recorded(out, NAME)["sha256"] == hashlib.sha256((source / NAME).read_bytes()).hexdigest()


def test_a_template_inside_the_tokenizer_config_is_not_overruled(source: Path, tmp_path: Path) -> None:
    (source / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    out = quantized(source, tmp_path / "out")
    assert not (out / NAME).exists()
    assert (out / "tokenizer_config.json").read_text() == '{"chat_template": "{{ messages }}"}'


@pytest.mark.parametrize("text", ["{}", '{"chat_template": null}'])
def test_a_tokenizer_config_without_a_template_does_not_keep_ours_away(text: str, source: Path, tmp_path: Path) -> None:
    (source / "tokenizer_config.json").write_text(text)
    assert (quantized(source, tmp_path / "out") / NAME).read_bytes() == TEMPLATE.read_bytes()


def test_an_altered_template_does_not_verify(mini_source: Path, tmp_path: Path) -> None:
    out = quantized(mini_source, tmp_path / "out")
    (out / NAME).write_text("{{ messages }}")
    assert run("verify", out).code == 1


def test_only_layout_mlx_lm_holds_a_model_file_and_its_config_names_it(mini_source: Path, tmp_path: Path) -> None:
    named = {n: y.model_file for n, y in layouts().items() if y.model_file}
    assert named == {"mlx-lm": "ds4_mlx_model.py"}
    out = quantized(mini_source, tmp_path / "out", "--layout", "mlx-lm")
    text = single_file_source().encode()
    assert (out / "ds4_mlx_model.py").read_bytes() == text
    assert json.loads((out / "config.json").read_text())["model_file"] == "ds4_mlx_model.py"
    assert recorded(out, "ds4_mlx_model.py")["sha256"] == hashlib.sha256(text).hexdigest()
    plain = quantized(mini_source, tmp_path / "plain")
    assert not list(plain.glob("*.py")) and "model_file" not in json.loads((plain / "config.json").read_text())


def test_overwrite_removes_the_model_file_of_the_layout_before(mini_source: Path, tmp_path: Path) -> None:
    out = quantized(mini_source, tmp_path / "out", "--layout", "mlx-lm")
    quantized(mini_source, out, "--overwrite")
    assert not list(out.glob("*.py")) and run("verify", out).code == 0


def test_a_plan_that_would_name_a_model_file_and_not_write_it_is_refused(mini_source: Path) -> None:
    options = build.Options(recipe_of("native"), layout_of("mlx-lm"))
    with pytest.raises(ValueError, match=r"model_source.*ds4_mlx_model\.py"):
        make_plan(open_source(mini_source), options)


def test_the_plan_counts_both_files(mini_source: Path, tmp_path: Path) -> None:
    result = run("plan", mini_source, "--layout", "mlx-lm", "--json", "--full")
    assert {NAME, "ds4_mlx_model.py"} <= set(result.json["steps"]["texts"])
    assert run("plan", "--config", "tiny", "--layout", "mlx-lm").code == 0
