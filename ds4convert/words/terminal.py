"""The one place where text for a terminal is made safe: whatever it holds, it moves no cursor and forges no line.

Names of files and tensors, fields of manifests and configs, and answers of servers were written by strangers. A control
character in them could paint a false "All good.", a bidirectional override could show a name backwards, a line break
could end one message and begin another. So all text passes through here on its way out: `escape` for text of several
lines, `line` for what has to stay one line, `clean` for whole results before they become tables.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any, TextIO

_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters but tab and line feed
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # marks that turn the direction of writing
    "\u2028\u2029\ufeff"  # line and paragraph separators, and the mark that is shown as nothing
    "\ud800-\udfff"  # halves of characters
    "\ufff9-\ufffb\U000e0000-\U000e007f]"  # annotations and tags: shown as nothing
)
_BREAKS = re.compile("[\t\n]")


def _spelled(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape", "surrogatepass").decode("ascii")


def escape(text: str) -> str:
    """Return `text` with all that a terminal would obey, or hide, spelled out; tabs and line feeds stay."""
    return _UNSAFE.sub(_spelled, text)


def line(text: object) -> str:
    """Return `text` as one safe line: its line feeds and tabs are spelled out too."""
    return _BREAKS.sub(_spelled, escape(str(text)))


def clean(value: Any) -> Any:
    """Return a result (tables, lists, plain values) in which every text is one safe line."""
    if isinstance(value, str):
        return line(value)
    if isinstance(value, dict):
        return {clean(k): clean(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [clean(v) for v in value]
    return value


class Escaped:
    """A text stream that escapes what is written to it; all else is that of the stream behind it."""

    def __init__(self, stream: TextIO) -> None:
        self.plain = stream

    def write(self, text: str) -> int:
        """Write `text`, escaped; return its length."""
        self.plain.write(escape(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write each of `lines`, escaped."""
        for text in lines:
            self.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.plain, name)


def plain(stream: TextIO) -> TextIO:
    """Return the stream behind an `Escaped` one: for progress bars, which move the cursor of their own line."""
    return stream.plain if isinstance(stream, Escaped) else stream


def show(text: str, limit: int = 120) -> str:
    """Return `text` safe for a terminal: control and unencodable characters escaped, long ones shortened."""
    cut = text if len(text) <= limit else text[: limit - 20] + "..." + text[-17:]
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)


def show_value(value: Any, limit: int = 120) -> str:
    """Return a value of a JSON file as messages say it: as it stands in the file, texts in single quotes."""
    return show(repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str), limit)
