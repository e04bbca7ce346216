"""The program `ds4convert`: runs a command and turns every ending into a message and an exit code."""

# Before anything else is imported, `from __future__` included: the current folder may be a stranger's checkpoint.
from ds4convert.isolation import leave_current_folder

leave_current_folder()

# First of all: a key that is pressed while the rest is loaded gives no traceback.
from ds4convert import interrupts  # noqa: E402  # isort: skip

import contextlib  # noqa: E402
import dataclasses  # noqa: E402
import errno  # noqa: E402
import gc  # noqa: E402
import io  # noqa: E402
import logging  # noqa: E402
import os  # noqa: E402
import shlex  # noqa: E402
import sys  # noqa: E402
import traceback  # noqa: E402
import warnings  # noqa: E402
from pathlib import Path  # noqa: E402

import click  # noqa: E402

from ds4convert.api.reporting import Failure  # noqa: E402
from ds4convert.checkpoint import advice  # noqa: E402
from ds4convert.cli import Session, cli  # noqa: E402
from ds4convert.cli.shell import colour  # noqa: E402
from ds4convert.cli.shell.group import wants_json  # noqa: E402
from ds4convert.errors import Ds4Error, FindingsError  # noqa: E402
from ds4convert.storage.limits import forgive_refusals, raise_open_files  # noqa: E402
from ds4convert.words import launched  # noqa: E402
from ds4convert.words.terminal import Escaped, line  # noqa: E402


def main() -> None:
    """Run the command line and exit. No traceback reaches the user unless `-vv` was given."""
    _open_streams()
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal cannot show is escaped, not a failure
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    gc.set_threshold(200_000, 20, 20)  # headers make hundreds of thousands of objects, and hardly any cycles
    interrupts.heed()
    raise_open_files()
    forgive_refusals()
    _quiet_libraries()
    _mend_temporary_folder()
    session = Session()
    if not launched.is_first():
        _be_silent()
    code = _run(session)
    interrupts.done()
    sys.exit(code)


def _open_streams() -> None:
    """Have standard input, output and error be there: what was started without one (`>&-`, some daemons) gets none.

    Else the first file that is opened takes its number, and what is meant for the terminal is written into a shard.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.dup2(nothing := os.open(os.devnull, os.O_RDWR), number)
            if nothing > 2:
                os.close(nothing)
    sys.stdin = sys.stdin or os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", encoding="utf-8", closefd=False)


LIBRARIES = {
    "HF_HUB_DISABLE_TELEMETRY": "1",  # else the client asks HF_ENDPOINT for a list of its own, of any length
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "critical",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "critical",
}
"""What keeps libraries from writing on our standard error; who sets one of these has it as set."""


def _quiet_libraries() -> None:
    """Have the libraries keep warnings, logs and bars to themselves: what a user has to know we say ourselves."""
    for name, value in LIBRARIES.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    logging.lastResort = _Ours(logging.WARNING)


def _be_silent() -> None:
    """Have a process that was launched beside the first one print nothing; what goes wrong here alone, `_fail` says."""
    sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115  # until the process ends


class _Ours(logging.Handler):
    """Prints the records of loggers that nobody set up: ours (what a drive or a store lacks), and no library's."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record of ours in one line."""
        if record.name.partition(".")[0] == "ds4convert":
            print(line(record.getMessage()), file=sys.stderr)


def _mend_temporary_folder() -> None:
    """Have TMPDIR name a folder that is there: MLX ends where it does not, and sessions outlive their own."""
    given = os.environ.get("TMPDIR")
    if given and not Path(given).is_dir():
        del os.environ["TMPDIR"]
        print(f"Warning: TMPDIR names {line(given)}, which is no folder; the system's own is used", file=sys.stderr)


def _run(session: Session) -> int:
    """Run the command that `sys.argv` says and return the exit code; all that it prints goes through `terminal`."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Escaped(sys.stdout), Escaped(sys.stderr)
    command = advice.COMMAND.set(_command_line(sys.argv[1:]))
    options = advice.OPTIONS.set(None)
    try:
        return _ended(session)
    finally:
        sys.stdout, sys.stderr = streams
        advice.COMMAND.reset(command)
        advice.OPTIONS.reset(options)


SECRET = ("--token", "--api-key")


def _command_line(arguments: list[str]) -> str:
    """Return the command line as a shell takes it, without tokens and keys."""
    words: list[str] = []
    hidden = False
    for word in arguments:
        name, is_one, _ = word.partition("=")
        words += [] if hidden or name in SECRET else [word]
        hidden = name in SECRET and not is_one
    return shlex.join(["ds4convert", *words])


def _ended(session: Session) -> int:
    try:
        code = cli.main(obj=session, standalone_mode=False, prog_name="ds4convert")
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except click.exceptions.Exit as e:
        return e.exit_code
    except click.ClickException as e:
        session.as_json = session.as_json or wants_json(sys.argv[1:])
        _usage(e)
        session.failed(Failure(e.exit_code, "usage", line(e.format_message()), hint=_usage_hint(e)))
        return e.exit_code
    except (KeyboardInterrupt, click.Abort):
        return _interrupted(session)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Ds4Error as e:
        if e.is_told and not launched.is_first():
            return e.exit_code
        told = str(e) if isinstance(e, FindingsError) else line(str(e))
        return _fail(session, dataclasses.replace(Failure.of(e), message=told))
    except OSError as e:
        where = e.filename or _unnamed(e)
        told = line(f"{where}: {e.strerror or e}")
        return _fail(session, Failure(4, "environment", told, str(e.filename) if e.filename else None))
    except MemoryError:
        return _fail(session, Failure(4, "environment", "out of memory"))
    except Exception as e:
        if _is_unwinding(e):
            return _interrupted(session)
        told = line(f"this is a bug of ds4convert ({type(e).__name__}: {e}); -vv shows where")
        return _fail(session, Failure(4, "bug", told))


def _is_unwinding(error: BaseException | None) -> bool:
    """Return whether an interruption was on its way up when this went wrong: closing what had only half begun."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def _interrupted(session: Session) -> int:
    with contextlib.suppress(OSError):  # the terminal may be what has gone
        return _fail(session, Failure(interrupts.exit_code(), "interrupted", interrupts.SAID.decode().strip()), "")
    return interrupts.exit_code()


def _fail(session: Session, failure: Failure, prefix: str = "Error: ") -> int:
    """Say what went wrong on standard error and, with --json, on standard output; return the exit code."""
    if session.verbose >= 2:
        traceback.print_exc()
    colour.write(f"{prefix}{failure.message}", sys.stderr)
    if not launched.is_first() and prefix:
        print(f"rank {launched.rank()}: {prefix}{line(failure.message)}", file=sys.__stderr__)
    session.failed(failure)
    return failure.code


NO_ARGUMENTS: type[click.UsageError] | tuple[()] = getattr(click.exceptions, "NoArgsIsHelpError", ())
"""What click raises for a group without a command, whose message is all of its help; click 8.1 prints that itself."""


def _usage(e: click.ClickException) -> None:
    """Print what click found wrong: usage, hint, and the message in one line, as arguments may be names of files."""
    context = e.ctx if isinstance(e, click.UsageError) else None
    if context is not None and isinstance(e, NO_ARGUMENTS):  # nothing was typed but the program's name
        click.echo(context.get_help(), err=True)
        return
    if context is not None:
        click.echo(context.get_usage(), err=True)
        click.echo(f"Try '{context.command_path} --help' for help.\n", err=True)
    colour.write(line(f"Error: {e.format_message()}"), sys.stderr)


def _usage_hint(e: click.ClickException) -> str | None:
    """Return what to write in place of a mistyped name, or where the command's options are told."""
    if near := list(getattr(e, "possibilities", None) or ()):
        return f"did you mean {' or '.join(near)}?"
    if (at := e.message.rfind("did you mean ")) >= 0:
        return line(e.message[at:])
    context = e.ctx if isinstance(e, click.UsageError) else None
    return f"run `{context.command_path} --help`: it tells options and an example" if context else None


def _unnamed(error: OSError) -> str:
    """Return what failed where the system names no file: the current folder, or a stream that is written to."""
    if isinstance(error, FileNotFoundError):
        return "the current folder has been removed; change to another (cd) and run the command again"
    if error.errno in {errno.ENOSPC, errno.EIO, errno.EBADF}:
        return "standard output cannot be written; what is finished in folders is safe"
    return "the system"


if __name__ == "__main__":
    main()
