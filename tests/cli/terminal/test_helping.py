"""What the terminal says beside results: help in whole lines, near names, quiet and verbose, colour, progress, width."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from ds4convert.api.reporting import Listener, Progress
from ds4convert.cli import cli, progress
from ds4convert.cli.shell import colour
from ds4convert.cli.shell.group import GROUPS, Command
from ds4convert.words import activity, figures
from ds4convert.words.terminal import Escaped
from tests.support import ROOT, run, run_process

DEMO = ROOT / "manifests" / "demo"


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shell") / "mlx"
    assert run("quantize", DEMO, out, "-q").code == 0
    return out


# --- help ---


def test_the_name_of_the_program_alone_prints_its_help_in_lines() -> None:
    alone = run_process()
    assert alone.code in {0, 2} and "\\n" not in alone.err, "click 8.1 ends with 0, newer ones with 2"
    assert (alone.out or alone.err).strip() == run_process("--help").out.strip() and "Error" not in alone.err


@pytest.mark.parametrize(("option", "said"), [("--jobs", "a whole number"), ("--confidence", "a number")])
def test_what_is_no_number_is_said_to_be_none(option: str, said: str) -> None:
    refused = run("verify", DEMO, option, "many")
    assert refused.code == 2 and f"'many' is not {said}" in refused.err and "range" not in refused.err


def test_help_groups_all_commands_and_cuts_no_sentence_off() -> None:
    text = run("--help").out
    assert "..." not in text.partition("\n")[2] and all(len(row) <= 80 for row in text.splitlines())
    for heading, rows in GROUPS.items():
        assert f"\n{heading}:\n" in text
        for name, (_, what) in rows.items():
            assert re.search(rf"\n  {name} +{re.escape(what)}\n", text), name
    assert sorted(cli.commands) == sorted(n for rows in GROUPS.values() for n in rows)


def test_help_loads_one_commands_module_at_most() -> None:
    code = (
        "import sys, runpy\nsys.argv = ['ds4convert', *sys.argv[1:]]\n"
        "try: runpy.run_module('ds4convert', run_name='__main__')\nexcept SystemExit: pass\n"
        "print('LOADED', *(m for m in sys.modules if m.startswith('ds4convert.')))"
    )
    for words, wanted in ((["--help"], set()), (["serve", "--help"], {"ds4convert.cli.serve"})):
        done = subprocess.run(
            [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True, cwd=ROOT
        )
        loaded = set(done.stdout.split("LOADED")[1].split())
        assert {m for m in loaded if m.removeprefix("ds4convert.cli.") in {p.stem for p in Path(ROOT, "ds4convert/cli").glob("[a-z]*.py")} - {"session", "progress", "options"}} == wanted  # fmt: skip
        assert not loaded & {"ds4convert.planning.parts", "ds4convert.planning.recipes", "ds4convert.checkpoint.config"}


# --- near names ---


@pytest.mark.parametrize(
    ("words", "near"),
    [
        (["quantzie"], "quantize"), (["plan", DEMO, "--recipi", "q4"], "--recipe"),
        (["plan", DEMO, "--rounding", "neerest"], "did you mean nearest?"),
        (["plan", DEMO, "--layout", "inlne"], "did you mean inline?"), (["plan", DEMO, "--recipe", "natve"], "did you mean native?"),
        (["plan", DEMO, "--mtp", "afine-4-g64"], "did you mean affine-4-g64"), (["plan", DEMO, "--mtp", "affine-4"], "did you mean affine-4-g"), (["verify", DEMO, "--level", "structur"], "did you mean structure?"),
        (["plan", "--config", "flahs"], "did you mean flash"), (["recommend", "--mac", "64", "--model", "prof"], "did you mean pro?"),
        (["list", "recipies"], "did you mean recipes?"), (["synth", "x", "--head", "dsprak"], "dspark"),
    ],
    ids=lambda v: " ".join(map(str, v[-2:])) if isinstance(v, list) else v,
)  # fmt: skip
def test_a_mistyped_value_is_told_what_is_near(words: list[object], near: str) -> None:
    result = run(*words)
    assert result.code in {2, 3} and near in result.err, result


# --- quiet and verbose ---


def test_quiet_leaves_results_and_verbose_tells_what_was_decided(converted: Path) -> None:
    for words in (["inspect", DEMO], ["plan", DEMO], ["list", "formats"], ["env"], ["recommend", "--mac", 128]):
        loud, quiet = run(*words), run(*words, "-q")
        assert quiet.err == "" and quiet.out.split("time ")[0] == loud.out.split("time ")[0] and quiet.out, words
    assert run("verify", converted, "-q").out == ""
    told = run("verify", converted, "-v").err
    assert told.startswith("decided: ") and "--max-tokens 64 (default)" in told


def test_verbose_tells_where_a_value_comes_from_and_no_secret() -> None:
    variables = {"DS4CONVERT_LAYOUT": "vlm", "HF_HUB_OFFLINE": "1"}
    told = run_process("plan", DEMO, "--no-hash", "-v", variables=variables).err
    assert "--layout vlm (from the environment: DS4CONVERT_LAYOUT)" in told and "--no-hash;" in f"{told};".replace(
        "\n", ";"
    )
    secret = run_process("pull", "me/x", "--token", "hf_geheim", "-v", variables=variables)
    assert secret.code == 4 and "geheim" not in secret.err + secret.out
    pull, parent = cli.commands["pull"], click.Context(cli, help_option_names=["-h", "--help"])
    with pull.make_context("pull", ["me/x", "--token", "hf_geheim"], parent) as context:
        assert isinstance(pull, Command) and "--token (not shown)" in list(pull._decided(context))


# --- what comes next ---


def test_a_command_says_how_long_it_took_and_what_is_next(tmp_path: Path) -> None:
    out = tmp_path / "my mlx"
    done = run("quantize", DEMO, out)
    assert done.out.splitlines()[-1] == f"next: ds4convert verify '{out}' --source {DEMO}"
    assert re.search(r"\ndone in \d+\.\d s\n", run("verify", out).out)
    moved = run("relayout", out, tmp_path / "vlm", "--layout", "vlm")
    assert moved.out.splitlines()[-1] == f"next: ds4convert verify {tmp_path / 'vlm'}"
    assert "next" not in run("relayout", out, tmp_path / "b", "--layout", "vlm", "--json").json
    assert run("synth", tmp_path / "s", "--layers", 1).out.splitlines()[-1] == f"next: ds4convert plan {tmp_path / 's'}"


# --- colour ---


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


COLOURS = [
    ({}, Terminal, True), ({}, io.StringIO, False), ({"NO_COLOR": "1"}, Terminal, False), ({"NO_COLOR": ""}, Terminal, True),
    ({"TERM": "dumb"}, Terminal, False), ({"CLICOLOR": "0"}, Terminal, False), ({"CLICOLOR_FORCE": "1"}, io.StringIO, True),
    ({"CLICOLOR_FORCE": "0"}, io.StringIO, False), ({"CLICOLOR_FORCE": "1", "NO_COLOR": "1"}, Terminal, False),
]  # fmt: skip


@pytest.mark.parametrize(("variables", "kind", "wanted"), COLOURS)
def test_colour_only_where_it_is_taken(
    variables: dict[str, str], kind: type[io.StringIO], wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_COLOR", "CLICOLOR", "CLICOLOR_FORCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    stream = kind()
    colour.write("ok    files  all\nFAIL  head  \x1b[32mok\nWarning: x\nokay", Escaped(stream))
    text = stream.getvalue()
    assert ("\x1b[32mok\x1b[0m    files" in text) is wanted and ("\x1b[1;31mFAIL\x1b[0m" in text) is wanted
    assert "\\x1b[32mok" in text and "okay\n" in text, "what a folder says is escaped all the same"
    assert wanted or "\x1b" not in text


# --- tables ---


def test_a_table_fits_the_terminal() -> None:
    rows = [("inline", "one head in the folder itself, under its official names", "1"), ("x", "y" * 70, "22")]
    token = figures.WIDTH.set(50)
    try:
        narrow = figures.table(("name", "description", "n"), rows)
    finally:
        figures.WIDTH.reset(token)
    assert max(map(len, narrow.splitlines())) <= 50
    assert "".join(narrow.split()).count("y") == 70 and "official names" in " ".join(narrow.split())
    assert figures.table(("name", "description", "n"), rows).count("\n") == 3


@pytest.mark.skipif(shutil.which("script") is None, reason="no script(1) here")
def test_a_terminal_gets_colour_and_its_width(converted: Path) -> None:
    env = {k: v for k, v in os.environ.items() if k not in {"NO_COLOR", "CLICOLOR", "COLUMNS"}}
    env |= {"TERM": "xterm", "PYTHONPATH": str(ROOT)}
    command = (
        f"stty cols 60; {sys.executable} -m ds4convert list layouts; {sys.executable} -m ds4convert verify {converted}"
    )
    done = subprocess.run(["script", "-qec", command, "/dev/null"], capture_output=True, text=True, env=env, timeout=60, check=False)  # fmt: skip
    assert "\x1b[32mok\x1b[0m" in done.stdout
    table = done.stdout[: done.stdout.index("finished")].splitlines()[:8]
    assert len(table) == 8 and max(map(len, table)) <= 60


# --- progress ---


def test_a_line_names_phase_and_file(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.01)
    with progress.shown(
        1000, "converting", told.append, lambda done, s: 60.0, lambda: "model-00001.safetensors"
    ) as done:
        done(500)
        for _ in range(2000):
            if told:
                break
            progress.time.sleep(0.005)
    assert told[0].startswith("converting: 500 B of 1.0 KB (50%)") and told[0].endswith("; model-00001.safetensors")


def test_a_bar_names_phase_and_file(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with progress.shown(1000, "verifying", print, lambda done, s: 90.0, lambda: "evil\x1b[2J.safetensors") as done:
        done(500)
        for _ in range(2000):
            if "50%" in stream.getvalue():
                break
            progress.time.sleep(0.005)
            done(0)
    assert "verifying evil\\x1b[2J.safetensors:  50%" in stream.getvalue() and "2 min left" in stream.getvalue()


def test_who_listens_is_told_the_file_that_is_worked_on() -> None:
    heard: list[Progress] = []
    activity.at("of another run")
    with Listener(heard.append).counting("converting", 10) as count:
        activity.at("a.safetensors")
        count(5)
    assert [p.where for p in heard] == ["", "a.safetensors", ""] and heard[-1].finished
    rows: list[Progress] = []
    import ds4convert as ds4

    ds4.verify(DEMO, progress=rows.append)
    assert {p.what for p in rows} == {"verifying"}
