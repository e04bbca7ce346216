# pathlib is a module too, and not loaded yet
# ruff: noqa: PTH100, PTH109, PTH117, PTH120
"""Which folders modules may be imported from: never the current one, which may be a stranger's checkpoint.

`python -m ds4convert` puts the current folder in front of the import path, and so does an empty entry of PYTHONPATH
(Python's documentation of `sys.path` and of `-P`): a `random.py` of a checkpoint would run instead of Python's own. The
program calls `leave_current_folder` before it imports anything, and its workers get `import_path()` and nothing else.
What Python itself imports before that (a `ds4convert.py` beside `python -m ds4convert`) is kept out by `python -P -m
ds4convert` and by the installed program.

One thing cannot be helped here: with `PYTHONPATH=.` Python imports `encodings`, `site` and others from the current
folder while it starts, before any line of ours. `python -I -m ds4convert`, or no such variable, keeps these out. Our
worker processes start without the variable, so they run nothing of that folder.

This module imports only what Python has loaded already: not even `from __future__`, which is a module like any other.
"""

import os
import sys

OWN_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
"""The folder (or archive) that holds this package."""

LEFT_OUT = ("PYTHONPATH", "PYTHONSTARTUP", "PYTHONINSPECT", "PYTHONSAFEPATH")
"""Variables that a process of ours does not inherit: its import path is given to it whole."""

WHOLE_PATHS = ("PYTHONHOME", "PYTHONUSERBASE", "PYTHONPYCACHEPREFIX")
"""Variables that it inherits if they are whole paths: others mean a folder in the current one, to be imported from."""


def import_path() -> list[str]:
    """Return `sys.path` as absolute paths, without the current folder.

    The current folder stays where it was asked for by its whole path in PYTHONPATH, or holds this very package.
    """
    try:
        here = os.path.realpath(os.getcwd())
    except OSError:  # it has been removed
        return [p for p in sys.path if os.path.isabs(p)]
    asked = {OWN_ROOT, *(p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if os.path.isabs(p))}
    if sys.flags.ignore_environment:
        asked = {OWN_ROOT}
    found = [p for p in sys.path if isinstance(p, str)]
    return [os.path.abspath(p) for p in found if p in asked or os.path.realpath(p or os.curdir) != here]


def leave_current_folder() -> None:
    """Take the current folder out of this process's import path."""
    sys.path[:] = import_path()


def interpreter(code: str) -> list[str]:
    """Return the command of another Python process that runs `code` with this process's import path and package."""
    start = f"import sys; sys.path[:] = [{OWN_ROOT!r}]; import ds4convert; sys.path[:] = {import_path()!r}; "
    return [sys.executable, "-P", "-c", start + code]


def environment(**variables: str) -> dict[str, str]:
    """Return the environment of such a process: this one's, with `variables`, without what changes its import path."""
    kept = {k: v for k, v in os.environ.items() if k not in LEFT_OUT}
    return {k: v for k, v in kept.items() if k not in WHOLE_PATHS or os.path.isabs(v)} | variables
