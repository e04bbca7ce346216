"""The commands of the contract: parse, call, report, exit code. Heavy imports live inside the commands.

A file per group of commands; the order of the imports here is the order in which `--help` lists them.
"""

from ds4convert.cli import convert, calibrate, rearrange, check, run, serve, hub, trial  # noqa: I001 - command order
from ds4convert.cli.session import Session, cli

__all__ = ["Session", "calibrate", "check", "cli", "convert", "hub", "rearrange", "run", "serve", "trial"]
