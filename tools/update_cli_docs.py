"""Write docs/cli.md: the `--help` text of every command, as the program prints it. A test checks that it is current.

Run it after any change of the command line: `python tools/update_cli_docs.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "cli.md"
WIDTH = 100

HEAD = """# The commands

Made by `tools/update_cli_docs.py` from the program's own help; do not edit. Exit codes: 0 done and good · 1 a check
found something wrong · 2 wrong usage · 3 the input is bad or unsupported · 4 the environment failed · 130 interrupted.
"""


def render() -> str:
    """Return the whole text of docs/cli.md."""
    from ds4convert.cli import cli

    parts = [HEAD, _section("ds4convert", cli, None)]
    parts += [_section(f"ds4convert {name}", command, cli) for name, command in cli.commands.items()]
    return "\n".join(parts)


def _section(title: str, command: click.Command, parent: click.Group | None) -> str:
    outer = click.Context(parent, info_name="ds4convert") if parent else None
    context = click.Context(
        command, outer, info_name=title.split()[-1], terminal_width=WIDTH, help_option_names=["-h", "--help"]
    )
    text = "\n".join(line.rstrip() for line in command.get_help(context).splitlines())
    return f"## {title}\n\n```text\n{text}\n```\n"


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    TARGET.write_text(render(), encoding="utf-8")
