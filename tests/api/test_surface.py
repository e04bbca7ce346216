"""What `import ds4convert` gives: exactly the public names, loaded when they are asked for."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import ds4convert as ds4
from ds4convert import errors
from ds4convert.api.calibrating import CalibrateChoices, CalibrateOptions
from ds4convert.api.conversion import ConversionChoices, RunChoices, RunOptions
from ds4convert.api.conversion_options import ConversionOptions
from ds4convert.api.deriving import GraftChoices, GraftOptions, GraftPlace, RelayoutChoices, RelayoutOptions
from ds4convert.api.hub import PublishChoices, PublishOptions, PullChoices, PullOptions
from ds4convert.api.verifying import VerifyChoices, VerifyOptions
from ds4convert.cli import cli
from tests.support import ROOT

FUNCTIONS = {
    "open", "plan", "convert", "verify", "graft", "relayout", "diff", "inspect", "pull", "publish", "calibrate", "load",
}  # fmt: skip
RECORDS = [
    ((ConversionOptions,), ConversionChoices, "plan"),
    ((ConversionOptions, RunOptions), RunChoices, "quantize"),
    ((GraftOptions, GraftPlace), GraftChoices, "graft"),
    ((RelayoutOptions,), RelayoutChoices, "relayout"),
    ((VerifyOptions,), VerifyChoices, "verify"),
    ((PullOptions,), PullChoices, "pull"),
    ((PublishOptions,), PublishChoices, "publish"),
    ((CalibrateOptions,), CalibrateChoices, "calibrate"),
]


def test_the_package_shows_exactly_its_functions_its_errors_and_its_version() -> None:
    found = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.Ds4Error)]
    wanted = FUNCTIONS | {e.__name__ for e in found} | {"PromptError", "ReplyError", "__version__"}
    assert set(ds4.__all__) == wanted == set(dir(ds4)) and len(ds4.__all__) == len(wanted)
    assert all(callable(getattr(ds4, name)) for name in FUNCTIONS)
    assert issubclass(ds4.PromptError, ds4.InputError) and ds4.UsageError is errors.UsageError


def test_what_is_not_public_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="quantize"):
        ds4.quantize  # noqa: B018


def test_no_folder_or_file_of_the_package_has_the_name_of_a_function() -> None:
    names = {p.stem for p in (ROOT / "ds4convert").iterdir()}
    assert not names & FUNCTIONS


def loaded(code: str) -> set[str]:
    """Return the modules that are loaded after `code` has run in a fresh interpreter."""
    script = f"import sys\nbefore = set(sys.modules)\n{code}\nprint(*sorted(set(sys.modules) - before))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=60, check=True
    )
    return set(done.stdout.split())


def test_importing_the_package_loads_the_package_alone() -> None:
    assert loaded("import ds4convert, ds4convert as ds4; dir(ds4)") == {"ds4convert"}


def test_planning_from_python_loads_neither_the_model_nor_the_hub_nor_the_command_line() -> None:
    found = loaded("import ds4convert as ds4; ds4.plan(config='tiny')")
    assert not {m.split(".")[0] for m in found} & {"click", "huggingface_hub", "mlx_lm", "tqdm"}
    assert not [m for m in found if m.startswith(("ds4convert.cli", "ds4convert.serving"))]


def test_nothing_of_the_library_prints_exits_or_parses_a_command_line() -> None:
    for path in sorted((ROOT / "ds4convert" / "api").glob("*.py")):
        text = path.read_text()
        assert not any(w in text for w in ("print(", "sys.exit", "import click", "sys.argv", "sys.std")), path.name


@pytest.mark.parametrize(("records", "keywords", "command"), RECORDS, ids=[command for *_, command in RECORDS])
def test_keywords_records_and_commands_have_the_same_options_and_defaults(
    records: tuple[type, ...], keywords: type, command: str
) -> None:
    fields = {f.name: f.default for record in records for f in dataclasses.fields(record)}
    made = {name: getattr(record(), name) for record in records for name in vars(record())}
    assert typing.get_type_hints(keywords).keys() == fields.keys()
    others = {"full", "parts", "config", "src", "repo", "dest", "text", "mlx_dir"}
    others |= {"graft": set(), "relayout": {"layout", "out"}}.get(command, {"out"})
    names = {"page": "report"}
    params = {names.get(str(p.name), str(p.name)): p for p in cli.commands[command].params}
    options = {n: p for n, p in params.items() if n not in {*others, "json", "quiet", "verbose", "help"}}
    assert options.keys() == fields.keys()
    for name, param in options.items():
        default = param.type.convert(param.default, param, None) if isinstance(param.default, str) else param.default
        if name == "window":  # the command shows what None is
            continue
        if default in (None, False) or "UNSET" in repr(default):
            assert made[name] in (None, False, ()), name
        else:
            assert default == made[name], name


def test_every_function_says_what_it_does_with_an_example() -> None:
    for name in FUNCTIONS:
        text = inspect.getdoc(getattr(ds4, name)) or ""
        assert ">>> import ds4convert as ds4" in text, name


def test_records_are_frozen(mini_source: Path) -> None:
    made = ds4.plan(mini_source)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.facts = {}  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.options.layout = "vlm"  # type: ignore[misc]
