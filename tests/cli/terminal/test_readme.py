"""The Python of the README runs as it stands, on the demo."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests import support
from tests.support import ROOT


def snippets() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


def test_the_python_of_the_readme_runs(tmp_path: Path) -> None:
    assert snippets()
    (tmp_path / "DeepSeek-V4-Flash").symlink_to(ROOT / "manifests" / "demo")
    for text in snippets():
        done = subprocess.run(
            [sys.executable, "-P", "-c", text], cwd=tmp_path, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        numbers = done.stdout.split("\n")[-2].split()
        assert len(numbers) == 2 and 0 <= float(numbers[0]) <= 1 <= float(numbers[1])


def test_the_commands_of_the_readme_have_the_options_that_they_name() -> None:
    """Every `ds4convert` line of the README parses: no option in it is one that the command lacks."""
    import shlex

    import click

    from ds4convert.cli import cli

    text = (ROOT / "README.md").read_text()
    rows = [r.partition("  #")[0].strip() for b in re.findall(r"```sh\n(.*?)```", text, re.S) for r in b.split("\n")]
    commands = [shlex.split(r)[1:] for r in rows if r.startswith("ds4convert ")]
    assert len(commands) > 20 and support.ROOT == ROOT
    for name, *words in commands:
        known = {o for p in cli.commands[name].params for o in (*p.opts, *p.secondary_opts)}
        assert {w for w in words if w.startswith("--")} <= known, (name, words)
        assert isinstance(cli.commands[name], click.Command)
