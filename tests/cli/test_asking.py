"""`recommend`, `list`, `env`: what the program knows before there is a checkpoint."""

from __future__ import annotations

import functools
import os
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest

from ds4convert.api.asking import machine, recommending
from ds4convert.hub.settings import without_secrets
from ds4convert.planning.layouts import layouts
from ds4convert.planning.recipes import FORMATS, recipes
from ds4convert.words import macs, project
from tests.support import ROOT, run, run_process

# --- recommend ---


@functools.cache
def asked(mac: str, model: str = "flash", context: int = 4096) -> Any:
    """Return the document of `recommend`, made once."""
    return run("recommend", "--mac", mac, "--model", model, "--context", context, "--json").json


def test_what_is_recommended_fits_and_what_is_too_large_does_not() -> None:
    facts = asked("192GB")
    assert facts["usable_bytes"] == macs.usable(192 * macs.GIB) and facts["model"] == "flash"
    assert [r["recipe"] for r in facts["recipes"]] == ["q3", "q2"], "the largest that fits is the first"
    assert all(r["output_bytes"] < facts["usable_bytes"] and r["context"] >= 4096 for r in facts["recipes"])
    assert {r["recipe"] for r in facts["too_large"]} == {"bf16", "native", "q8", "q6", "q4"}
    for row in facts["too_large"]:
        assert row["needs_mac_bytes"] is None or macs.usable(row["needs_mac_bytes"]) > row["output_bytes"]


def test_sizes_are_those_of_the_plan() -> None:
    facts = asked("192GB")
    for row in facts["recipes"][:1]:
        planned = run("plan", "--config", "flash", "--recipe", row["recipe"], "--json").json["output_bytes"]
        assert planned <= row["output_bytes"] <= planned * 1.002, "headers and small files are counted at their most"


def test_the_command_line_is_one_that_the_program_takes() -> None:
    from ds4convert.cli import cli

    facts = asked("256GB")
    for line in [*(r["command"] for r in facts["recipes"]), facts["by_layer"]]:
        program, name, source, out, *options = line.split()
        assert (program, name, source) == ("ds4convert", "quantize", "hf://deepseek-ai/DeepSeek-V4-Flash") and out
        parent = click.Context(cli, help_option_names=["-h", "--help"])
        with cli.commands[name].make_context(name, [source, out, *options], parent) as context:
            assert context.params["recipe"] in {*recipes()} and (context.params["mac"] or options[0] == "--recipe")


def test_a_longer_context_leaves_room_for_less() -> None:
    short, long = asked("128GB"), asked("128GB", context=1_000_000)
    assert [r["recipe"] for r in short["recipes"]] == ["q2"] and long["recipes"] == [] and long["by_layer"] is None
    assert "No recipe fits." in run("recommend", "--mac", "128GB", "--context", 1_000_000).out
    context = short["recipes"][0]["context"]
    room = recommending.Room(short["usable_bytes"], 4096, recommending.args_of(_flash()))
    weights = short["recipes"][0]["output_bytes"]
    assert room.needs(weights, context) <= room.usable < room.needs(weights, context + 64)


def _flash() -> recommending.Inventory:
    return recommending.expected(recommending.parse_config(recommending.config_bytes("flash"), "flash"))


def test_quality_is_what_was_measured_and_else_said_to_be_not_measured() -> None:
    told = run("recommend", "--mac", "512GB")
    assert "not measured" in told.out and "KL 0.0902, same choice 81.9%" in told.out and "no promise" in told.out
    for row in asked("512GB")["recipes"]:
        assert row["quality"] is None and (row["demo_quality"] is None) is (row["recipe"] == "bf16")


def test_every_figure_of_quality_stands_in_the_place_that_it_names() -> None:
    table = tomllib.loads((ROOT / "manifests" / "quality.toml").read_text())
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text()
    assert table["measured"] and set(table["models"]) == set(recommending.MODELS)
    for row in table["measured"]:
        file, _, heading = row["source"].partition(", ")
        section = (ROOT / file).read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
        name = row["recipe"] if row["recipe"] == "native" else f"recipe {row['recipe']}"
        line = next(x for x in section.splitlines() if x.startswith(f"| {name} | {row['rounding']} |"))
        cells = [c.strip() for c in line.split("|")]
        assert float(cells[4]) == row["kl"] and cells[5] == f"{row['same']:.1%}", line
        assert f"{row['tokens']} tokens" in section and section in results


def test_a_family_that_is_not_run_is_compared_by_weights_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recommending, "args_of", lambda inventory: None)
    facts = run("recommend", "--mac", "512GB", "--model", "flash-v41", "--json").json
    assert facts["runs"] is False and {r["context"] for r in facts["recipes"]} == {None} and facts["by_layer"] is None
    assert "does not run it yet" in run("recommend", "--mac", "512GB", "--model", "flash-v41").out


def test_no_memory_and_no_model_are_refused() -> None:
    for words in ([], ["--mac", "none"], ["--mac", "64", "--model", "v5"], ["--mac", "64", "--context", "0"]):
        assert run("recommend", *words).code == 2, words


# --- list ---


def test_everything_there_is_to_choose_from_is_listed_with_a_description() -> None:
    for kind, names in (("recipes", [*recipes()]), ("layouts", [*layouts()]), ("formats", [*FORMATS])):
        rows = run("list", kind, "--json").json["rows"]
        assert [r["name"] for r in rows] == names and all(
            r["description"] and "\n" not in r["description"] for r in rows
        )
        text = run("list", kind).out
        assert all(r["name"] in text and r["description"] in text for r in rows)
    families = run("list", "families", "--json").json["rows"]
    assert [(r["name"], r["runs"]) for r in families] == [("deepseek_v4", True), ("deepseek_v41", True)]


def test_recipes_of_ones_own_are_listed_beside_those_that_ship(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = 'description = "my mix"\n[formats]\nbackbone = "affine-6-g64"\n'
    (tmp_path / "mine.toml").write_text(own)
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    (tmp_path / "._mine.toml").write_text(own)
    os.mkfifo(tmp_path / "pipe.toml")
    here = run("list", "recipes", tmp_path, "--json").json["rows"][len(recipes()) :]
    assert [(r["name"], r["description"]) for r in here] == [(str(tmp_path / "mine.toml"), "my mix")]
    assert here[0]["formats"]["backbone"] == "affine-6-g64"
    monkeypatch.chdir(tmp_path)
    assert [r["file"] for r in run("list", "recipes", "--json").json["rows"] if r["file"]] == ["mine.toml"]
    assert run("list", "recipes", "mine.toml").out.count("my mix") == 1
    for words, said in ((["pyproject.toml"], "a recipe has"), (["gone.toml"], "no such file"), (["x"], "no such file")):
        refused = run("list", "recipes", *words)
        assert refused.code == 3 and said in refused.err
    assert run("list", "formats", "mine.toml").code == 2


# --- env ---


def test_env_tells_versions_and_hides_secrets(tmp_path: Path) -> None:
    variables = {
        "HF_TOKEN": "hf_geheim", "HF_ENDPOINT": "https://me:geheim@mirror.example/hub?key=geheim", "HOME": str(tmp_path),
        "HF_HOME": str(tmp_path / "hf"), "DS4CONVERT_API_KEY": "geheim", "DS4CONVERT_JOBS": "3", "DS4CONVERT_TOKEN": "geheim",
        "DS4CONVERT_ENDPOINT": "https://geheim@mirror.example",
    }  # fmt: skip
    for flags in ((), ("--json",), ("-v",)):
        result = run_process("env", *flags, variables=variables)
        assert result.code == 0 and "geheim" not in result.out + result.err and str(tmp_path) not in result.out
    facts = run_process("env", "--json", variables=variables).json
    assert facts["hub"]["endpoint"] == "https://mirror.example/hub" and facts["hub"]["token"] == "environment"
    assert facts["hub"]["cache"] == "~/hf/hub" and facts["variables"]["DS4CONVERT_JOBS"] == "3"
    assert (
        facts["variables"]["DS4CONVERT_API_KEY"] == "(set)" and facts["packages"]["mlx"] and facts["memory_bytes"] > 1e9
    )


def test_env_works_where_libraries_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ImportError("libmlx.so: no such file")

    monkeypatch.setattr("ds4convert.inference.load.metal_limits", broken)
    monkeypatch.setattr("ds4convert.hub.settings.settings", broken)
    result = run("env")
    assert result.code == 0 and "MLX does not load: ImportError: libmlx.so" in result.out
    assert machine.environment()["hub"]["error"].startswith("ImportError")


def test_metal_is_told_as_mlx_tells_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The names are those of mlx.core.device_info: device_name, max_recommended_working_set_size."""
    import mlx.core as mx

    info = {
        "device_name": "Apple M4 Max",
        "max_recommended_working_set_size": 96 * macs.GIB,
        "memory_size": 128 * macs.GIB,
    }
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: info, raising=False)
    assert machine.environment()["metal"]["working_set_bytes"] == 96 * macs.GIB
    assert "Apple M4 Max, may use 96.0 GiB" in run("env").out


def test_addresses_lose_what_is_secret() -> None:
    assert without_secrets("https://u:p@h.example:8/x?y#z") == "https://h.example:8/x"
    assert without_secrets("http://[") == "(not an address)"


# --- the project's address ---


def test_the_address_comes_from_one_place_and_none_is_printed_before_it_is_decided(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"].get("urls", {})
    assert project.address() == (urls.get("Repository") or urls.get("Homepage"))
    assert urls or ("address" not in run("env").out and run("env", "--json").json["address"] is None)
    monkeypatch.setattr("ds4convert.words.project.address", lambda: "https://project.example")
    assert "address          https://project.example" in run("env").out
