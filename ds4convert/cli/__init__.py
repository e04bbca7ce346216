"""The commands of the contract: parse, call, report, exit code. Heavy imports live inside the commands.

A file per group of commands; `shell/group` lists them all, and loads each when it is asked for.
"""

from ds4convert.cli.session import Session
from ds4convert.cli.shell.group import cli

__all__ = ["Session", "cli"]
