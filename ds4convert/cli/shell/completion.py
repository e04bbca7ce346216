"""The completion script of a shell, as click makes it: it asks the program itself what may come next."""

from __future__ import annotations

import click
from click import shell_completion

VARIABLE = "_DS4CONVERT_COMPLETE"


def script(group: click.Group, shell: str) -> str:
    """Return the script; nothing is run for it, not even the shell, whose version click's own way asks for."""
    kind = shell_completion.get_completion_class(shell)
    assert kind is not None, shell
    made = kind(group, {}, "ds4convert", VARIABLE)
    text = made.source_template % made.source_vars()
    return text.replace('string split "," $completion', 'string split -m 1 "," $completion')  # fish: a help has commas
