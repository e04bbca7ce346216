"""The model card here and the one on the Hub, joined: what people wrote on either side is not lost unseen.

A card ends with two lines: digests of the text above and below them as they were published, and the mark. So it can be
told, on any machine, whether somebody changed the card since.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from ds4convert.errors import OutputError

MARK = "<!-- ds4convert publish writes all above this line anew; what you write below it is kept -->"
_SIGNED = re.compile(r"<!-- ds4convert card ([0-9a-f]{16}) ([0-9a-f]{16}) -->\s*\Z")
DIGITS = 16


@dataclass(frozen=True)
class Card:
    """A card that `publish` wrote: the text above the mark, what stands below, and their digests as published."""

    upper: str
    below: str
    upper_digest: str = ""
    below_digest: str = ""

    @property
    def below_edited(self) -> bool:
        """Return whether what stands below was changed since it was published."""
        return _digest(self.below) != self.below_digest


def _digest(text: str) -> str:
    return hashlib.sha256(_plain(text).encode()).hexdigest()[:DIGITS]


def _plain(text: str) -> str:
    """Return text without what editors change of themselves: line ends, and empty lines around it."""
    return text.replace("\r\n", "\n").strip()


def split(text: str) -> Card | None:
    """Return the parts of a card that `publish` wrote; None for any other text."""
    if MARK not in text:
        return None
    top, _, below = text.partition(MARK)
    signed = _SIGNED.search(top)
    upper = _plain(top[: signed.start()] if signed else top)
    return Card(upper, _plain(below), *(signed.groups() if signed else ()))


def text_of(upper: str, below: str) -> str:
    """Return the card of these two texts."""
    own = f"\n{_plain(below)}\n" if _plain(below) else ""
    signed = f"<!-- ds4convert card {_digest(upper)} {_digest(below)} -->"
    return f"{_plain(upper)}\n\n{signed}\n{MARK}\n{own}"


def joined(upper: str, here: str, there: str, replace: bool = False, known: bool = False) -> str:
    """Return the card to publish: `upper` is the text above the mark, as written anew.

    `here` is the folder's card or "", `there` the Hub's or "". `known`: the Hub's is byte for byte what was last sent
    from here. Raises `OutputError` where somebody changed the Hub's card above the mark, unless `replace`.
    """
    mine, theirs = split(here), split(there)
    if there and not replace and not known:
        _check_unchanged(theirs, {_plain(upper), mine.upper if mine else ""})
    return text_of(upper, _below(mine, theirs))


def _check_unchanged(theirs: Card | None, written: set[str]) -> None:
    if theirs is None:
        raise OutputError(_REFUSED.format(what="is another than `publish` wrote"))
    signed = theirs.upper_digest == _digest(theirs.upper)
    if not signed and theirs.upper not in written:
        raise OutputError(_REFUSED.format(what="was edited there, above the line that says what is kept"))


_REFUSED = (
    "README.md: the card on the Hub {what}, and would be replaced. Nothing was sent. Take over here what is of use "
    "(below its last line it is kept), then add --replace-card"
)


def check_own(here: str, there: str, replace: bool = False, known: bool = False) -> None:
    """Raise `OutputError` where a README.md of one's own, `here`, would replace words of others on the Hub unseen."""
    if not there or replace or known or _plain(here) == _plain(there):
        return
    theirs = split(there)
    _check_unchanged(theirs, set())
    if theirs is not None and theirs.below and theirs.below_edited:
        raise OutputError(_REFUSED.format(what="was edited there, below its last line"))


def _below(mine: Card | None, theirs: Card | None) -> str:
    """Return what stands below the mark: the text that was changed since it was published; both where both were."""
    if mine is None or theirs is None:
        found = theirs or mine
        return found.below if found else ""
    if mine.below in theirs.below:
        return theirs.below if theirs.below_edited or not mine.below_edited else mine.below
    if theirs.below in mine.below or not theirs.below_edited:
        return mine.below
    return f"{theirs.below}\n\n{mine.below}" if mine.below_edited else theirs.below
