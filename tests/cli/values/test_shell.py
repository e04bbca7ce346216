"""What a command line is made of: colour where it is wanted, JSON where it is asked for, defaults of the environment."""

from __future__ import annotations

import io

import click
import pytest

from ds4convert.cli.progress import _line
from ds4convert.cli.session import _took
from ds4convert.cli.shell import colour, group
from ds4convert.cli.shell.group import Switch, from_environment, wants_json
from ds4convert.words.terminal import Escaped


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


COLOUR = [
    # https://no-color.org and https://bixense.com/clicolors
    ({}, True, True), ({}, False, False), ({"NO_COLOR": "1"}, True, False), ({"NO_COLOR": ""}, True, True),
    ({"TERM": "dumb"}, True, False), ({"CLICOLOR": "0"}, True, False), ({"CLICOLOR": "1"}, True, True),
    ({"CLICOLOR_FORCE": "1"}, False, True), ({"CLICOLOR_FORCE": "0"}, False, False), ({"CLICOLOR_FORCE": ""}, False, False),
    ({"CLICOLOR_FORCE": "1", "NO_COLOR": "1"}, True, False), ({"CLICOLOR_FORCE": "1", "CLICOLOR": "0"}, True, True),
]  # fmt: skip


@pytest.mark.parametrize(("variables", "terminal", "wanted"), COLOUR)
def test_colour_is_wanted_as_the_variables_of_the_trade_say(
    variables: dict[str, str], terminal: bool, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert colour.is_wanted(Terminal() if terminal else io.StringIO()) is wanted


def test_only_the_words_that_lines_begin_with_are_coloured_and_nothing_of_a_stranger_obeyed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    behind = Terminal()
    colour.write("ok  a: ok  b\nFAIL  c\nError: d\x1b[2J\nWarning: e\nokay  f\n  ok  g", Escaped(behind))  # type: ignore[arg-type]
    assert behind.getvalue() == (
        "\x1b[32mok\x1b[0m  a: ok  b\n\x1b[1;31mFAIL\x1b[0m  c\n\x1b[1;31mError\x1b[0m: d\\x1b[2J\n"
        "\x1b[33mWarning\x1b[0m: e\nokay  f\n  ok  g\n"
    )
    plain = io.StringIO()
    colour.write("ok  a", plain)
    assert plain.getvalue() == "ok  a\n"


@pytest.mark.parametrize(
    ("words", "variables", "wanted"),
    [
        (["plan", "--json"], {}, True),
        (["plan", "--", "--json"], {}, False),
        (["plan"], {}, False),
        ([], {"DS4CONVERT_JSON": "1"}, True),
        (["plan"], {"DS4CONVERT_JSON": "TRUE"}, True),
        (["plan"], {"DS4CONVERT_JSON": "no"}, False),
        (["plan"], {"DS4CONVERT_PLAN_JSON": "yes"}, True),
        (["plan"], {"DS4CONVERT_PLAN_JSON": "0", "DS4CONVERT_JSON": "1"}, False),
        (["verify"], {"DS4CONVERT_PLAN_JSON": "1"}, False),
    ],
)
def test_json_is_asked_for_on_the_line_or_in_the_environment(
    words: list[str], variables: dict[str, str], wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert wants_json(words) is wanted


def keep(command: str = "plan") -> Switch:
    option = Switch(["--keep-mtp/--drop-mtp"], default=True)
    return group.Command(command, params=[option]).params[0]  # type: ignore[return-value]


SWITCHES = [
    ({}, None), ({"DS4CONVERT_KEEP_MTP": "0"}, "0"), ({"DS4CONVERT_DROP_MTP": "1"}, "False"),
    ({"DS4CONVERT_DROP_MTP": "0"}, "True"), ({"DS4CONVERT_PLAN_DROP_MTP": "1", "DS4CONVERT_KEEP_MTP": "1"}, "False"),
    ({"DS4CONVERT_KEEP_MTP": "1", "DS4CONVERT_DROP_MTP": "0"}, "1"), ({"DS4CONVERT_KEEP_MTP": "maybe"}, "maybe"),
    ({"DS4CONVERT_DROP_MTP": "maybe"}, "maybe"), ({"DS4CONVERT_KEEP_MTP": ""}, None),
]  # fmt: skip


@pytest.mark.parametrize(("variables", "value"), SWITCHES)
def test_a_switch_has_a_variable_for_either_name_and_that_of_its_command_goes_first(
    variables: dict[str, str], value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, said in variables.items():
        monkeypatch.setenv(name, said)
    option = keep()
    assert option.resolve_envvar_value(click.Context(click.Command("plan"))) == value


def test_two_names_that_contradict_each_other_are_both_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS4CONVERT_KEEP_MTP", "1")
    monkeypatch.setenv("DS4CONVERT_DROP_MTP", "yes")
    option = keep()
    with pytest.raises(click.BadParameter) as found:
        option.resolve_envvar_value(click.Context(click.Command("plan")))
    assert (
        found.value.message == "DS4CONVERT_KEEP_MTP and DS4CONVERT_DROP_MTP say the opposite of each other; unset one"
    )
    assert from_environment([option]) == "(from the environment: DS4CONVERT_KEEP_MTP)"


@pytest.mark.parametrize(
    ("message", "named"),
    [("--keep-mtp is wrong", True), ("--drop-mtp is wrong", True), ("keep-mtp-more", False), ("nothing of it", False),
     ("found odd here", True), ("found oddly here", False)],
)  # fmt: skip
def test_a_message_speaks_of_an_option_by_either_name_or_by_its_value(
    message: str, named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS4CONVERT_KEEP_MTP", "odd")
    assert group._is_named(keep(), message) is named


@pytest.mark.parametrize(
    ("done", "total", "seconds", "left", "told"),
    [
        (500, 1000, 60.0, 60.0, "copying: 500 B of 1.0 KB (50%) in 60 s, about 60 s left"),
        (0, 1000, 0.0, None, "copying: 0 B of 1.0 KB (0%) in 0 s"),
        (0, 0, 0.0, None, "copying: 0 B of 0 B in 0 s"),
        (10**9, 10**10, 600.0, 5400.0, "copying: 1.0 GB of 10.0 GB (10%) in 10 min, about 1 h 30 min left"),
    ],
)
def test_a_line_of_progress_has_bytes_share_time_and_the_time_left_where_it_is_known(
    done: int, total: int, seconds: float, left: float | None, told: str
) -> None:
    assert _line("copying", done, total, seconds, lambda d, s: left) == told


@pytest.mark.parametrize(("seconds", "told"), [(0.04, "done in 0.0 s"), (9.94, "done in 9.9 s"), (10.0, "done in 10 s"),
                                               (100.0, "done in 2 min")])  # fmt: skip
def test_how_long_it_took_has_tenths_below_ten_seconds(seconds: float, told: str) -> None:
    assert _took(seconds) == told
