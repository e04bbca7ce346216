"""The documentation of the commands is the program's own help."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest

from ds4convert.cli import cli
from ds4convert.planning.layouts import layouts
from tests.support import ROOT, run

DOCS = ROOT / "docs" / "cli.md"


def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("update_cli_docs", ROOT / "tools" / "update_cli_docs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_commands_are_documented_as_the_program_describes_them() -> None:
    assert DOCS.read_text(encoding="utf-8") == tool().render(), "run: python tools/update_cli_docs.py"


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_every_command_has_help_with_an_example_and_the_common_options(name: str) -> None:
    result = run(name, "--help")
    assert result.code == 0 and result.err == ""
    assert f"Example: ds4convert {name}" in result.out
    assert all(option in result.out for option in ("-q, --quiet", "-v, --verbose", "--json", "-h, --help"))


def test_help_of_the_program_lists_every_command_in_order_of_use() -> None:
    text = run("--help").out
    places = [text.index(f"\n  {name} ") for name in cli.commands]
    assert places == sorted(places) and list(cli.commands)[:3] == ["inspect", "plan", "quantize"]


def test_the_layout_option_names_exactly_the_layout_files() -> None:
    assert f"--layout {'|'.join(sorted(layouts()))}" in run("quantize", "--help").out


def test_the_version_is_that_of_the_package() -> None:
    import tomllib

    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert run("--version").out.strip() == wanted
