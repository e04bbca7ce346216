"""The completion scripts, in the shells themselves: commands, options, folders, recipes, layouts, formats."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT, run

BASH = """
eval "$(ds4convert completion bash)"
compopt() { echo "OPTION $2"; }
COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 )); COMP_TYPE=9
_ds4convert_completion ds4convert
printf '%s\\n' "${COMPREPLY[@]}"
"""
FISH = 'ds4convert completion fish | source; complete -C "$argv"'
ZSH = """
autoload -U compinit; compinit -D; eval "$(ds4convert completion zsh)"
[[ $_comps[ds4convert] == _ds4convert_completion ]] || exit 9
_describe() { local a; for a in "${(@P)3}"; do print -r -- "${a%%:*}"; done }
compadd() { print -rl -- "${(@P)5}" }
_path_files() { print -r -- "OPTION $*"; }
compstate=(); words=("$@"); CURRENT=$#; _ds4convert_completion
"""


def completed(shell: str, *words: str, folder: Path) -> list[str]:
    """Return what a shell offers for the last of the words of a command line, in a folder."""
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"no {shell} here")
    bins = folder / "bin"
    if not bins.exists():
        bins.mkdir()
        (bins / "ds4convert").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ds4convert "$@"\n')
        (bins / "ds4convert").chmod(0o755)
    line = ["ds4convert", *words]
    command = {
        "bash": ["--norc", "-c", BASH, "bash", *line],
        "zsh": ["-f", "-c", ZSH, "zsh", *line],
        "fish": ["--no-config", "-c", FISH, " ".join(line)],
    }[shell]
    env = os.environ | {"PATH": f"{bins}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "HOME": str(folder)}
    done = subprocess.run(
        [program, *command], cwd=folder, env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done
    return [text.partition("\t")[0] for text in done.stdout.splitlines() if text]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_commands_recipes_and_folders(shell: str, tmp_path: Path) -> None:
    assert completed(shell, "rel", folder=tmp_path) == ["relayout"]
    (tmp_path / "converted").mkdir()
    (tmp_path / "convert.txt").touch()
    assert completed(shell, "plan", "x", "--recipe", "q", folder=tmp_path) == ["q2", "q3", "q4", "q6", "q8"]
    found = completed(shell, "verify", "conv", folder=tmp_path)
    assert found == (["converted/"] if shell == "fish" else ["OPTION dirnames"] if shell == "bash" else found)
    assert shell != "zsh" or found[0].startswith("OPTION -/")


CASES = [
    (["plan", "x", "--layout", "m"], ["mlx-lm", "mtplx"]),
    (["plan", "x", "--mtp", "mxf"], ["mxfp4", "mxfp8"]),
    (["plan", "x", "--rounding", "n"], ["nearest"]),
    (["plan", "--config", "fl"], ["flash", "flash-v41"]),
    (["plan", "--rec"], ["--recipe"]),
    (["plan", "x", "--recipe", "mine"], ["OPTION"]),
    (["list", "f"], ["formats", "families"]),
    (["completion", "z"], ["zsh"]),
    (["graft", "x", "--mtp", "nv"], ["nvfp4"]),
    (["graft", "x", "--from", "y"], ["OPTION"]),
]


@pytest.mark.parametrize(("words", "wanted"), CASES, ids=[" ".join(w) for w, _ in CASES])
def test_what_may_come_next_is_known(words: list[str], wanted: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked as click's script for bash asks it."""
    from click.shell_completion import BashComplete

    from ds4convert.cli import cli

    made = BashComplete(cli, {}, "ds4convert", "_DS4CONVERT_COMPLETE")
    found = made.get_completions(words[:-1], words[-1])
    assert [f.value if f.type == "plain" else "OPTION" for f in found] == wanted


def test_a_script_is_a_document_with_json_and_no_other_shell_is_known() -> None:
    assert run("completion", "bash", "--json").json["script"].strip() == run("completion", "bash").out.strip()
    refused = run("completion", "fich")
    assert refused.code == 2 and "did you mean fish?" in refused.err
