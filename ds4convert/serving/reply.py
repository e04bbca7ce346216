"""What a model says, split while it comes: reasoning, content and tool calls; and texts that stop it.

Text that may be the beginning of a mark or of a stop word is held back until the next pieces decide, and comes out at
the end: nothing that the model said is lost. A block of calls counts once it is closed and read; one that was cut off
is no call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from ds4convert.checkpoint.types import JSON
from ds4convert.inference import chat

REASONING, CONTENT, CALLS = "reasoning", "content", "calls"
_TAG = "stray tag in "

Parse = Callable[[str], list[JSON]]
"""From the text of a block of calls to `{"name", "arguments"}` each, arguments a JSON text. Raises ValueError."""


@dataclass(frozen=True)
class Marks:
    """The marks of one tokenizer. `is_dsml`: the calls of DeepSeek-V4, whose blocks are read with their tags, and of
    which no tag ever belongs to a text.
    """

    think_start: str | None = None
    think_end: str | None = None
    call_start: str | None = None
    call_end: str | None = None
    parse: Parse | None = None
    is_dsml: bool = False

    def of(self, state: str) -> dict[str, str]:
        """Return the marks that end a state, with the state that follows."""
        if state.startswith(_TAG):
            return {">": state.removeprefix(_TAG)}
        if state == CALLS:
            if self.is_dsml:
                return dict.fromkeys(chat.BLOCK_ENDS, CONTENT)
            return {self.call_end: CONTENT} if self.call_end else {}
        out = {}
        if state == REASONING and self.think_end:
            out[self.think_end] = CONTENT
        if state == CONTENT and self.think_start:
            out[self.think_start] = REASONING
        if self.is_dsml:
            out |= {
                f"\n\n<{chat.DSML}": CALLS,
                f"<{chat.DSML}": CALLS,
                f"</{chat.DSML}": _TAG + state,
                chat.DSML: state,
            }
        elif self.call_start:
            out[self.call_start] = CALLS
        return out


@dataclass
class Said:
    """Text of one state that can be told now; for calls, the whole block, and whether it was closed."""

    state: str
    text: str
    is_whole: bool = True


class Splitter:
    """Splits a reply that comes in pieces."""

    def __init__(self, marks: Marks, state: str) -> None:
        self.marks, self.state = marks, state
        self.held = ""

    def push(self, text: str) -> list[Said]:
        """Return what is certain after one more piece."""
        self.held += text
        out: list[Said] = []
        while (found := self._mark()) is not None:
            at, mark, after = found
            before, self.held = self.held[:at], self.held[at + len(mark) :]
            if self.state == CALLS:
                out.append(Said(CALLS, before + (mark if self.marks.is_dsml else "")))
            elif before and not self.state.startswith(_TAG):
                out.append(Said(self.state, before))
            self.state = after
            if after == CALLS and self.marks.is_dsml:
                self.held = mark.lstrip("\n") + self.held
        return out + self._certain()

    def end(self) -> list[Said]:
        """Return what was held back, after the last piece."""
        text, self.held = self.held, ""
        if self.state == CALLS:
            is_open_ended = not self.marks.is_dsml and not self.marks.call_end
            return [Said(CALLS, text, is_open_ended)] if text.strip() else []
        return [Said(self.state, text)] if text and not self.state.startswith(_TAG) else []

    def _mark(self) -> tuple[int, str, str] | None:
        """Return place, text and next state of the first mark in what is held."""
        best: tuple[int, str, str] | None = None
        for mark, after in self.marks.of(self.state).items():
            at = self.held.find(mark)
            while at >= 0 and self.state == CALLS and self.marks.is_dsml and chat.is_in_value(self.held[:at]):
                at = self.held.find(mark, at + 1)
            if at >= 0 and (best is None or at < best[0]):
                best = at, mark, after
        return best

    def _certain(self) -> list[Said]:
        if self.state == CALLS or self.state.startswith(_TAG):
            return []
        keep = unfinished(self.held, list(self.marks.of(self.state)))
        text, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return [Said(self.state, text)] if text else []


def unfinished(text: str, marks: list[str]) -> int:
    """Return the length of the longest end of `text` that is the beginning of a mark, and not all of it."""
    longest = max((len(m) for m in marks), default=1) - 1
    for size in range(min(longest, len(text)), 0, -1):
        end = text[-size:]
        if any(len(mark) > size and mark.startswith(end) for mark in marks):
            return size
    return 0


@dataclass(frozen=True)
class Piece:
    """One token: its text, log-probability, the likeliest tokens at its place with theirs, and whether the head
    drafted it. `is_told`: whether any of its text belongs to the reply (not that of the end or of a stop word).
    """

    text: str
    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    drafted: bool = False
    is_told: bool = True


@dataclass
class StopText:
    """Holds pieces back that may be part of a stop word, and ends the text before the first one, however it is cut."""

    words: list[str]
    is_found: bool = False
    _held: list[Piece] = field(default_factory=list)

    def push(self, piece: Piece) -> list[Piece]:
        """Return the pieces that are certain after one more; all, the last ones emptied, where a stop word is found."""
        self._held.append(piece)
        text = "".join(p.text for p in self._held)
        places = [at for at in map(text.find, self.words) if at >= 0]
        if places:
            self.is_found = True
            return self._cut(min(places))
        keep, out = unfinished(text, self.words), []
        safe = len(text) - keep
        while self._held and len(self._held[0].text) <= safe:
            safe -= len(self._held[0].text)
            out.append(self._held.pop(0))
        return out

    def rest(self) -> list[Piece]:
        """Return what is held, at the end of the text."""
        out, self._held = self._held, []
        return out

    def _cut(self, left: int) -> list[Piece]:
        out = []
        for piece in self.rest():
            out.append(replace(piece, text=piece.text[: max(0, left)], is_told=piece.is_told and left > 0))
            left -= len(piece.text)
        return out
