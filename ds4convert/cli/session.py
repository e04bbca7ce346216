"""What all commands share: the session, and the common options."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypedDict

import click

from ds4convert.api.reporting import Failure, Listener, Message, MessageCallback, ProgressCallback, document
from ds4convert.checkpoint import advice
from ds4convert.checkpoint.types import JSON
from ds4convert.cli import progress
from ds4convert.cli.shell import colour
from ds4convert.cli.shell.group import F
from ds4convert.words import figures, terminal


class Heard(TypedDict):
    """The callables that the functions of the library take, by the names of their arguments."""

    progress: ProgressCallback | None
    say: MessageCallback


@dataclass
class Session:
    """What every command shares: how much to say, and where."""

    verbose: int = 0
    quiet: bool = False
    as_json: bool = False
    told: bool = False
    began: float | None = None
    decided: str = ""
    """What --verbose tells before all else; a command that fails at once tells its error alone."""

    def emit(self, facts: Any, text: str | Callable[[Any], str], then: str = "") -> None:
        """Print the result: one JSON document, or, not with --quiet, text for people.

        A function as `text` gets the facts with every text in them made one safe line, and returns what to print. Then
        come how long it took, where progress was shown, and `then`, the command line that is to be run next.
        """
        self._tell_decided()
        if self.as_json:
            self._document(document(facts))
        elif not self.quiet and text:
            with self._fitting():
                told = text if isinstance(text, str) else text(terminal.clean(facts))
            took = [] if self.began is None or "seconds" in facts else [_took(time.monotonic() - self.began)]
            colour.write("\n".join([told, *took, *([f"next: {then}"] if then else [])]), sys.stdout)

    @contextmanager
    def _fitting(self) -> Iterator[None]:
        """Have tables be made as wide as the terminal is that they are printed on; elsewhere as they come."""
        if not terminal.plain(sys.stdout).isatty():
            yield
            return
        token = figures.WIDTH.set(shutil.get_terminal_size().columns)
        try:
            yield
        finally:
            figures.WIDTH.reset(token)

    def result(self, facts: Any, text: str | Callable[[Any], str]) -> None:
        """Print what the command was asked to tell: as `emit`, and with --quiet too."""
        quiet, self.quiet = self.quiet, False
        try:
            self.emit(facts, text)
        finally:
            self.quiet = quiet

    def failed(self, failure: Failure) -> None:
        """Print what went wrong as a JSON document, with --json, and unless the result has been printed already."""
        if self.as_json and not self.told:
            with contextlib.suppress(OSError):  # standard output may be what failed
                self._document(failure.as_json())

    def _document(self, table: JSON) -> None:
        self.told = True
        click.echo(json.dumps(table))

    def say(self, text: str) -> None:
        """Print a part of what a command tells as it goes, of any number of lines; nothing with --quiet or --json."""
        self._tell_decided()
        if not self.quiet and not self.as_json:
            colour.write(text, sys.stdout)

    def _tell_decided(self) -> None:
        text, self.decided = self.decided, ""
        if self.verbose and text and not self.quiet:
            click.echo(terminal.line(text), err=True)

    def piece(self, text: str) -> None:
        """Print a piece of a text that comes in pieces: the result itself, so with --quiet too; not with --json."""
        self._tell_decided()
        if not self.as_json:
            click.echo(terminal.escape(text), nl=False)

    def fail(self, text: str) -> None:
        """Print what a check found wrong where --quiet leaves out the account of all checks."""
        if self.quiet and not self.as_json:
            colour.write(text, sys.stdout)

    def note(self, text: str) -> None:
        """Say something on the way, on standard error, in one line."""
        self._tell_decided()
        if not self.quiet:
            click.echo(terminal.line(text), err=True)

    def detail(self, text: str) -> None:
        """Say with --verbose what is being done, on standard error, in one line."""
        if self.verbose:
            self.note(text)

    def warn(self, text: str) -> None:
        """Say on standard error what the user has to know, even with --quiet."""
        colour.write(f"Warning: {terminal.line(text)}", sys.stderr)

    def hear(self, message: Message) -> None:
        """Print what a function says on the way."""
        {"detail": self.detail, "note": self.note, "warning": self.warn}[message.kind](message.text)

    def warn_of_unused(self, unused: Mapping[str, str]) -> None:
        """Say of each option that was given and that this run has no use for that it has none."""
        for name in filter(is_given, unused):
            self.warn(f"--{name.replace('_', '-')} has no effect here; it is for {unused[name]}")

    @contextmanager
    def listening(self) -> Iterator[Heard]:
        """Yield the callables by which a function tells how far it is, and what it found on the way.

        Progress is a bar on a terminal, elsewhere a line a minute. With --verbose the time taken is told.
        """
        self.began = time.monotonic()
        if self.quiet:
            yield {"progress": None, "say": self.hear}
            return
        with contextlib.closing(progress.Meter(self.note, self.detail)) as meter:
            yield {"progress": meter.heard, "say": self.hear}

    @contextmanager
    def progress(self, total: int, what: str) -> Iterator[Callable[[int], None]]:
        """Yield a callback for numbers of bytes, shown as `listening` does it."""
        with self.listening() as heard, Listener(heard["progress"]).counting(what, total) as count:
            yield count


def _took(seconds: float) -> str:
    return f"done in {seconds:.1f} s" if seconds < 10 else f"done in {figures.duration(seconds)}"


def is_given(name: str) -> bool:
    """Return whether an option of the command that runs stands on its command line."""
    return click.get_current_context().get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE


def common(reports: bool = True) -> Callable[[F], F]:
    """Add -q, -v and (for commands that report) --json, and hand the command its `Session`."""

    def wrap(f: F) -> F:
        def set_up(ctx: click.Context, param: click.Parameter, value: Any) -> None:
            session = ctx.ensure_object(Session)
            advice.OPTIONS.set(frozenset(o for p in ctx.command.params for o in (*p.opts, *p.secondary_opts)))
            if value:
                setattr(session, {"json": "as_json"}.get(param.name or "", param.name or ""), value)

        options = [
            click.option(
                "-q",
                "--quiet",
                is_flag=True,
                expose_value=False,
                callback=set_up,
                help="Print results and errors, nothing else.",
            ),
            click.option(
                "-v",
                "--verbose",
                count=True,
                expose_value=False,
                callback=set_up,
                help="Say what is decided and how long it took; -vv shows tracebacks.",
            ),
        ]
        if reports:
            options.append(
                click.option(
                    "--json",
                    is_flag=True,
                    expose_value=False,
                    callback=set_up,
                    help="One JSON document on standard output.",
                )
            )
        for option in options:
            f = option(f)
        return click.pass_obj(f)  # type: ignore[return-value]

    return wrap
