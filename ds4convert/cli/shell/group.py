"""The program as a group of commands: which there are, what each is for, and defaults from the environment.

A command's module is imported when the command is asked for, so that `--help` and every command load no other.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from importlib import import_module
from typing import Any, TypeVar

import click

from ds4convert.errors import UsageError
from ds4convert.words.project import version

F = TypeVar("F", bound=Callable[..., Any])
EMPTY = "is empty; was a variable not set? The current folder is ."

GROUPS: dict[str, dict[str, tuple[str, str]]] = {
    "Look before": {
        "inspect": ("convert", "Show what a checkpoint is and holds, from its headers alone."),
        "plan": ("convert", "Show what `quantize` would write. Writes nothing."),
    },
    "Convert": {
        "quantize": ("convert", "Convert a checkpoint into an MLX folder, its head kept."),
        "convert": ("convert", "Another name of `quantize`."),
        "calibrate": ("calibrate", "Measure on a text what goes into each matrix."),
        "graft": ("derive", "Put the head of a checkpoint into a converted folder."),
        "relayout": ("derive", "Write a converted folder in another program's spelling."),
    },
    "Prove": {
        "verify": ("verify", "Check a folder, against its source and with its head."),
        "diff": ("verify", "Compare two checkpoints tensor by tensor."),
    },
    "Run": {
        "generate": ("generate", "Continue a prompt with a converted model."),
        "serve": ("serve", "Serve a converted model to OpenAI clients and a page."),
    },
    "Exchange": {
        "pull": ("hub", "Download a repo of the Hub, or its head alone."),
        "publish": ("hub", "Publish a converted folder as a repo of the Hub."),
    },
    "Try": {
        "synth": ("demo", "Write a checkpoint of random values, of any size."),
        "demo": ("demo", "Run the whole chain on the small model that comes along."),
    },
    "Ask": {
        "recommend": ("about", "Name the recipes that fit a Mac, and the command line."),
        "list": ("about", "List recipes, layouts, formats or model families."),
        "env": ("about", "Show versions, platform, memory and settings."),
        "completion": ("about", "Print the completion script of bash, zsh or fish."),
    },
}
"""By heading: the commands in the order of use, each with its module below `cli` and what it is for, in one line."""

_TABLE = {name: row for rows in GROUPS.values() for name, row in rows.items()}

PREFIX = "DS4CONVERT"
SECRET = ("token", "api_key")
"""Parameters whose values are never shown."""
SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
FROM_ENVIRONMENT = click.core.ParameterSource.ENVIRONMENT
KINDS = {"is not a valid integer range": "is not a whole number", "is not a valid float range": "is not a number"}
"""What click says of a value that is no number, and what it means."""

ENVIRONMENT = f"Defaults may stand in the environment: {PREFIX}_JOBS for --jobs, and so on."


class Command(click.Command):
    """A command whose options take their defaults from the environment: DS4CONVERT_JOBS is that of --jobs.

    DS4CONVERT_VERIFY_JOBS is that of `verify` alone, and goes before it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.epilog = ENVIRONMENT
        if str(self.name) in _TABLE:
            self.short_help = _TABLE[str(self.name)][1]
        for param in self.params:
            if isinstance(param, click.Option) and not param.is_eager:
                names = [_variable(param.opts), *([_variable(param.secondary_opts)] if param.secondary_opts else [])]
                param.envvar = [f"{PREFIX}_{middle}{n}" for middle in (f"{str(self.name).upper()}_", "") for n in names]

    def get_help_option_names(self, ctx: click.Context) -> list[str]:
        """Return the program's names for help; click keeps them from a command's first context, whichever that was."""
        return list(SETTINGS["help_option_names"])

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the command line; where a value of the environment is wrong, the message names the variable."""
        try:
            rest = super().parse_args(ctx, args)
        except click.BadParameter as e:
            told = e.message
            for theirs, ours in KINDS.items():
                told = told.replace(theirs, ours)
            if e.param is not None and ctx.get_parameter_source(str(e.param.name)) is FROM_ENVIRONMENT:
                told += f" {from_environment([e.param])}"
            if told == e.message:
                raise
            raise click.BadParameter(told, e.ctx, e.param, e.param_hint) from None

        for param in self.params:
            names_source = isinstance(param, click.Argument) or param.metavar == "SRC"
            if names_source and ctx.params.get(str(param.name)) == "":
                raise click.BadParameter(EMPTY, ctx, param)
        return rest

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; where options do not fit, the message names the variables that those of them come from."""
        ctx.obj.decided = f"decided: {'; '.join(self._decided(ctx)) or 'nothing, there are no options'}"
        try:
            return super().invoke(ctx)
        except UsageError as e:
            given = [p for p in self.params if ctx.get_parameter_source(str(p.name)) is FROM_ENVIRONMENT]
            unseen = [p for p in given if _is_named(p, str(e))]
            if not unseen:
                raise
            told = f"{e} {from_environment(unseen)}"
            raise UsageError(told, file=e.file, tensor=e.tensor, hint=e.hint) from e

    def _decided(self, ctx: click.Context) -> Iterator[str]:
        """Yield each option with its value and where that comes from, but for what is secret."""
        for param in self.params:
            value = ctx.params.get(str(param.name))
            if not isinstance(param, click.Option) or param.name not in ctx.params or value in (None, ()):
                continue
            source = ctx.get_parameter_source(str(param.name))
            name = param.opts[0] if value is not False or not param.secondary_opts else param.secondary_opts[0]
            said = "" if isinstance(value, bool) and (value or param.secondary_opts) else f" {value}"
            if param.name in SECRET:
                said = " (not shown)"
            origin = " (default)" if source is click.core.ParameterSource.DEFAULT else ""
            origin = f" {from_environment([param])}" if source is FROM_ENVIRONMENT else origin
            if value is not False or param.secondary_opts:
                yield f"{name}{said}{origin}"


def _variable(options: Sequence[str]) -> str:
    return max(options, key=len).lstrip("-").upper().replace("-", "_")


class Switch(click.Option):
    """An option that is on or off and has a name for either; so has the environment: DS4CONVERT_DROP_MTP=1."""

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        """Return the value of the first of its variables that is set; turned round where it is the name for off.

        Raises `BadParameter` where the two names of one level say the opposite of each other.
        """
        names = list(self.envvar or ())
        off = _variable(self.secondary_opts) if self.secondary_opts else ""
        for pair in (names[:2], names[2:]):
            said = {n: v for n in pair if (v := os.environ.get(n))}
            values = {n: self._turned(v) if off and n.endswith(f"_{off}") else v for n, v in said.items()}
            if len({self._read(v) for v in values.values()}) > 1:
                raise click.BadParameter(f"{' and '.join(said)} say the opposite of each other; unset one", ctx, self)
            if values:
                return next(iter(values.values()))
        return None

    def _read(self, value: str) -> object:
        try:
            return click.BOOL.convert(value, self, None)
        except click.BadParameter:
            return value

    def _turned(self, value: str) -> str:
        read = self._read(value)
        return value if read is value else str(not read)


def switch(*names: str, **about: Any) -> Callable[[F], F]:
    """Return the decorator that adds an option which is on or off: `--keep-mtp/--drop-mtp`."""
    return click.option(*names, cls=Switch, **about)


def _is_named(param: click.Parameter, message: str) -> bool:
    """Return whether a message speaks of an option, or of the value that the environment gives it."""
    words = [option.lstrip("-") for option in (*param.opts, *param.secondary_opts)]
    values = [value for v in param.envvar or () if (value := os.environ.get(v))]
    said = rf"(?<!\w)({'|'.join(map(re.escape, words))})(?![\w-])"
    given = rf"(?<![\w-])({'|'.join(map(re.escape, values))})(?![\w-])"
    return re.search(said, message) is not None or re.search(given, message) is not None


def from_environment(params: Sequence[click.Parameter]) -> str:
    """Return which variables of the environment gave these options their values."""
    names = (next(v for v in p.envvar or () if os.environ.get(v)) for p in params)
    return f"(from the environment: {', '.join(names)})"


def wants_json(words: Sequence[str]) -> bool:
    """Return whether a command line that click could not parse asks for JSON; so may the environment."""
    if "--json" in (words[: words.index("--")] if "--" in words else words):
        return True
    name = f"{PREFIX}_{words[0].upper()}_JSON" if words else ""
    told = os.environ.get(name) or os.environ.get(f"{PREFIX}_JSON", "")
    return told.lower() in {"1", "true", "t", "yes", "y", "on"}


class Commands(click.Group):
    """Loads a command when it is asked for, and lists all under headings, in the order in which they are used."""

    command_class = Command

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._loaded: MutableMapping[str, click.Command] = {}
        super().__init__(*args, **kwargs)

    @property
    def commands(self) -> MutableMapping[str, click.Command]:
        """Return every command by name, all of them loaded."""
        return {name: self._get(name) for name in _TABLE}

    @commands.setter
    def commands(self, value: MutableMapping[str, click.Command]) -> None:
        """Take the commands that click's own constructor sets: none, as a rule."""
        self._loaded = dict(value)

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        """Take in a command whose module is being loaded."""
        self._loaded[str(name or cmd.name)] = cmd

    def _get(self, name: str) -> click.Command:
        if name not in self._loaded:
            import_module(f"ds4convert.cli.{_TABLE[name][0]}")
        return self._loaded[name]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command, None where there is none of that name."""
        return self._get(cmd_name) if cmd_name in _TABLE else None

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the command names in the order of use."""
        return list(_TABLE)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands under their headings; what each is for stands there already, so that none is loaded."""
        wide = max(map(len, _TABLE))
        for heading, rows in GROUPS.items():
            with formatter.section(heading):
                formatter.write_dl([(name.ljust(wide), what) for name, (_, what) in rows.items()], col_max=wide + 2)


def also_called(name: str, command: click.Command) -> None:
    """List a command a second time, under another name."""
    text = str(command.help).replace(f"ds4convert {command.name} ", f"ds4convert {name} ")
    params = [copy.copy(p) for p in command.params]
    cli.add_command(Command(name, params=params, callback=command.callback, help=text))


def _say_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    """Print the version and end; click's own option fails where a tree and an install both have metadata."""
    if wanted and not ctx.resilient_parsing:
        click.echo(version())
        ctx.exit()


@click.group(
    cls=Commands, context_settings=SETTINGS,
    epilog="`ds4convert COMMAND --help` tells the options of a command, with an example.",
)  # fmt: skip
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_say_version,
              help="Show the version and exit.")  # fmt: skip
def cli() -> None:
    """Convert DeepSeek-V4 checkpoints to MLX with the multi-token-prediction head kept, and prove the result.

    \b
    Example: ds4convert quantize DeepSeek-V4-Flash DeepSeek-V4-Flash-mlx
             ds4convert verify DeepSeek-V4-Flash-mlx --source DeepSeek-V4-Flash

    The default of an option may stand in the environment: DS4CONVERT_JOBS=8 for --jobs 8, DS4CONVERT_HASH=0 for
    --no-hash. DS4CONVERT_VERIFY_JOBS is that of `verify` alone; a repeatable option takes values with spaces between.
    """
