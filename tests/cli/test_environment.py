"""Defaults of options in the environment, as the installed program reads them."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from ds4convert.cli import cli
from tests.support import Result, run

PROGRAM = Path(sys.executable).with_name("ds4convert")


def program(*words: object, **variables: str) -> Result:
    """Run the installed program with these variables and no others of ours."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("DS4CONVERT_")}
    done = subprocess.run(
        [PROGRAM, *map(str, words)], capture_output=True, text=True, env=clean | variables, timeout=120
    )
    return Result(done.returncode, done.stdout, done.stderr)


def test_options_flags_and_json_have_their_defaults_in_the_environment(mini_source: Path) -> None:
    variables = {"DS4CONVERT_LAYOUT": "mtplx", "DS4CONVERT_KEEP_MTP": "0", "DS4CONVERT_JSON": "1"}
    facts = program("plan", mini_source, **variables).json
    assert (facts["layout"], facts["head"], facts["schema"]) == ("mtplx", "none", 2)
    said = program("plan", mini_source, "--layout", "vlm", "--keep-mtp", **variables).json
    assert (said["layout"], said["head"]) == ("vlm", "classic")


def test_a_switch_has_a_variable_for_either_of_its_names(mini_source: Path) -> None:
    for variables, head in (
        ({"DS4CONVERT_DROP_MTP": "1"}, "none"), ({"DS4CONVERT_DROP_MTP": "0"}, "classic"), ({"DS4CONVERT_KEEP_MTP": "no"}, "none"),
        ({"DS4CONVERT_PLAN_DROP_MTP": "yes", "DS4CONVERT_KEEP_MTP": "1"}, "none"),
        ({"DS4CONVERT_DROP_MTP": "1", "DS4CONVERT_KEEP_MTP": "0"}, "none"),
    ):  # fmt: skip
        assert program("plan", mini_source, "--json", **variables).json["head"] == head, variables
    assert program("plan", mini_source, "--keep-mtp", "--json", DS4CONVERT_DROP_MTP="1").json["head"] == "classic"
    opposite = program("plan", mini_source, DS4CONVERT_DROP_MTP="1", DS4CONVERT_KEEP_MTP="1")
    assert opposite.code == 2 and "DS4CONVERT_KEEP_MTP and DS4CONVERT_DROP_MTP say the opposite" in opposite.err
    wrong = program("plan", mini_source, DS4CONVERT_DROP_MTP="perhaps")
    assert wrong.code == 2 and "(from the environment: DS4CONVERT_DROP_MTP)" in wrong.err


def test_a_variable_of_one_command_goes_before_that_of_all(mini_source: Path, tmp_path: Path) -> None:
    variables = {"DS4CONVERT_LAYOUT": "vlm", "DS4CONVERT_QUANTIZE_LAYOUT": "universal", "DS4CONVERT_HASH": "no"}
    assert program("plan", mini_source, "--json", **variables).json["layout"] == "vlm"
    done = program("quantize", mini_source, tmp_path / "out", "--json", **variables).json
    assert done["layout"] == "universal"
    record = json.loads((tmp_path / "out" / "ds4convert_manifest.json").read_text())
    assert not any(f.get("sha256") for f in record["files"] if f["name"].endswith(".safetensors"))


def test_a_wrong_value_is_refused_with_the_name_of_its_variable(mini_source: Path) -> None:
    for variables in ({"DS4CONVERT_JOBS": "many"}, {"DS4CONVERT_PLAN_JOBS": "0"}, {"DS4CONVERT_KEEP_MTP": "perhaps"}):
        result = program("plan", mini_source, **variables)
        assert result.code == 2 and f"(from the environment: {next(iter(variables))})" in result.err, result
    part = program("quantize", mini_source, "out", DS4CONVERT_PART="9/2")
    assert part.code == 2 and "(from the environment: DS4CONVERT_PART)" in part.err
    failed = program("plan", mini_source, DS4CONVERT_JOBS="many", DS4CONVERT_JSON="1")
    assert failed.json["error"]["kind"] == "usage"


def test_an_option_that_the_library_refuses_is_traced_to_its_variable_and_others_are_not(mini_source: Path) -> None:
    for name, value in (("LAYOUT", "mtplex"), ("RECIPE", "nosuch"), ("PLAN_MTP", "0"), ("BACKBONE", "q9")):
        result = program("plan", mini_source, DS4CONVERT_JOBS="3", **{f"DS4CONVERT_{name}": value})
        assert result.code == 2 and result.err.endswith(f"(from the environment: DS4CONVERT_{name})\n"), result
    assert "environment" not in program("plan", mini_source, "--recipe", "nosuch", DS4CONVERT_JOBS="3").err
    pair = program("plan", mini_source, "--mac", "8GB", DS4CONVERT_RECIPE="q4")
    assert pair.code == 2 and "DS4CONVERT_RECIPE" in pair.err


def test_json_of_one_command_in_the_environment_makes_a_document_of_its_usage_errors() -> None:
    for name in ("DS4CONVERT_VERIFY_JSON", "DS4CONVERT_JSON"):
        assert program("verify", **{name: "1"}).json["error"]["kind"] == "usage"
        assert program("verify", "--no-such", **{name: "on"}).json["error"]["code"] == 2
    assert program("verify", DS4CONVERT_PLAN_JSON="1").out == ""
    assert program("verify", DS4CONVERT_VERIFY_JSON="0", DS4CONVERT_JSON="1").out == ""


def test_an_option_that_is_not_on_the_command_line_is_not_warned_of(mini_source: Path) -> None:
    quiet = program("plan", mini_source, DS4CONVERT_CONTEXT="65536")
    loud = program("plan", mini_source, "--context", 65536)
    assert "--context has no effect" in loud.err and quiet.err == "" and quiet.code == 0


def test_a_repeatable_option_takes_several_values() -> None:
    serve = cli.commands["serve"]
    context = click.Context(serve, click.Context(cli, help_option_names=["-h", "--help"]), info_name="serve")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS4CONVERT_ALLOWED_ORIGIN", "http://a http://b")
        patch.setenv("DS4CONVERT_MTP", "false")
        serve.parse_args(context, ["folder"])
    assert context.params["allowed_origin"] == ("http://a", "http://b") and context.params["mtp"] is False


def test_every_option_has_its_variable_and_help_says_so() -> None:
    for name, command in cli.commands.items():
        for param in command.params:
            if isinstance(param, click.Option):
                option = max(param.opts, key=len).lstrip("-").upper().replace("-", "_")
                wanted = [f"DS4CONVERT_{name.upper()}_{option}", f"DS4CONVERT_{option}"]
                assert [v for v in param.envvar or () if v in wanted] == wanted
                assert len(param.envvar or ()) == (4 if param.secondary_opts else 2)
        assert "DS4CONVERT_JOBS for --jobs" in run(name, "--help").out
    assert "DS4CONVERT_HASH=0" in run("--help").out


def test_convert_is_another_name_of_quantize(mini_source: Path, tmp_path: Path) -> None:
    assert "convert     Another name of `quantize`." in run("--help").out
    assert "Example: ds4convert convert " in run("convert", "--help").out
    done = program("convert", mini_source, tmp_path / "out", "--drop-mtp", "--json").json
    again = program("quantize", mini_source, tmp_path / "out", "--drop-mtp", "--json").json
    assert not done["already_done"] and again["already_done"] and done["plan"] == again["plan"]


def test_h_is_help_of_a_command_that_is_used_without_the_program() -> None:
    command = copy.copy(cli.commands["serve"])
    command._help_option = None
    assert "-h, --help" in command.get_help(click.Context(command, info_name="serve"))
