"""The program `ds4convert`: runs a command and turns every ending into a message and an exit code."""

from __future__ import annotations

import gc
import io
import os
import sys
import traceback

import click

from ds4convert.cli import Session, cli
from ds4convert.errors import Ds4Error


def main() -> None:
    """Run the command line and exit. No traceback reaches the user unless `-vv` was given."""
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal cannot show is escaped, not a failure
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    gc.set_threshold(200_000, 20, 20)  # headers make hundreds of thousands of objects, and hardly any cycles
    session = Session()
    sys.exit(_run(session))


def _run(session: Session) -> int:
    try:
        code = cli.main(obj=session, standalone_mode=False, prog_name="ds4convert")
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except click.exceptions.Exit as e:
        return e.exit_code
    except click.ClickException as e:
        e.show()
        return e.exit_code
    except (KeyboardInterrupt, click.Abort):
        _say(session, "Interrupted. What is finished is safe; the same command goes on from there.")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Ds4Error as e:
        _say(session, f"Error: {e}")
        return e.exit_code
    except OSError as e:
        _say(session, f"Error: {e.filename or 'the system'}: {e.strerror or e}")
        return 4
    except MemoryError:
        _say(session, "Error: out of memory")
        return 4
    except Exception as e:
        _say(session, f"Error: this is a bug of ds4convert ({type(e).__name__}: {e}); -vv shows where")
        return 4


def _say(session: Session, text: str) -> None:
    if session.verbose >= 2:
        traceback.print_exc()
    print(text, file=sys.stderr)


if __name__ == "__main__":
    main()
