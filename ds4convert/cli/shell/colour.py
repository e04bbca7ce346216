"""Colour for what is good and what is not, where a terminal takes it; elsewhere the words stand alone.

NO_COLOR (not empty) and TERM=dumb turn it off, CLICOLOR=0 too; CLICOLOR_FORCE turns it on where there is no terminal.
Sources: https://no-color.org, https://bixense.com/clicolors.
"""

from __future__ import annotations

import os
import re
from typing import TextIO

from ds4convert.words.terminal import Escaped, escape, plain

STYLES = {"ok": "32", "FAIL": "1;31", "Error": "1;31", "Warning": "33"}
_MARKS = re.compile(r"^(ok(?=  )|FAIL(?=  )|Error(?=: )|Warning(?=: ))", re.M)


def is_wanted(stream: TextIO) -> bool:
    """Return whether what is written to a stream is to be coloured."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    if os.environ.get("CLICOLOR_FORCE", "0") not in {"", "0"}:
        return True
    return os.environ.get("CLICOLOR") != "0" and stream.isatty()


def write(text: str, stream: TextIO) -> None:
    """Write lines to a stream: escaped, and with colour for the words that lines begin with, where it is wanted."""
    behind = plain(stream)
    if not isinstance(stream, Escaped) or not is_wanted(behind):
        stream.write(f"{text}\n")
    else:
        behind.write(_MARKS.sub(lambda m: f"\x1b[{STYLES[m[0]]}m{m[0]}\x1b[0m", escape(text)) + "\n")
    stream.flush()
