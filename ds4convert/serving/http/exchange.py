"""One completion, from a checked request to its response: runs its prompts one by one and writes what they say.

Whole responses are collected; streams are written as they come, with a comment where nothing can be told for a while
(a long prompt, a long tool call), so that no proxy between gives up.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from queue import Empty
from typing import Any

from ds4convert.checkpoint.types import JSON
from ds4convert.errors import InputError
from ds4convert.serving.http.responses import Form, Part, Usage, event
from ds4convert.serving.refused import Refused
from ds4convert.serving.reply import CALLS, REASONING, Marks, Piece, Said, Splitter
from ds4convert.serving.seam import ClientGone, Context, Decoder, Job, Ticket
from ds4convert.serving.validation import CHAT, Asked, Prompt

LOG = logging.getLogger(__name__)
POLL_SECONDS = 0.1
PROGRESS_SECONDS, SILENT_SECONDS, WAITING_SECONDS = 1.0, 5.0, 10.0
"""Between two comments in a stream: while a prompt is read, while nothing of a reply can be told, and while others are
decoded.
"""

Write = Callable[[bytes], None]


class Voice:
    """What one generation says, ready to be told: split where it is a chat, as it is where it is a text."""

    def __init__(self, asked: Asked, marks: Marks, state: str) -> None:
        self.asked, self.marks = asked, marks
        self.splitter = Splitter(marks, state) if asked.kind == CHAT else None
        self.made_calls = False

    def push(self, piece: Piece, part: Part) -> None:
        """Add one piece to a part."""
        if self.splitter is None:
            part.pieces.append(piece)
            part.content += piece.text
            return
        was_thinking = self.splitter.state == REASONING
        self._tell(self.splitter.push(piece.text), part, "stop")
        if self.asked.tells_reasoning or not was_thinking:  # tokens tell the reasoning as well
            part.pieces.append(piece)

    def end(self, reason: str, part: Part) -> str:
        """Add what was held back; returns the finish reason: `tool_calls` only where no call was cut off."""
        if self.splitter is None:
            return reason
        was_cut = not self._tell(self.splitter.end(), part, reason)
        return "tool_calls" if reason == "stop" and self.made_calls and not was_cut else reason

    def _tell(self, said: list[Said], part: Part, reason: str) -> bool:
        """Add texts and calls; returns whether every block of calls was one."""
        is_good = True
        for one in said:
            if one.state == CALLS:
                calls = self._calls(one, reason)
                is_good = is_good and bool(calls)
                if not self.asked.parallel_calls:
                    calls = [] if self.made_calls or part.calls else calls[:1]
                part.calls += calls
            elif one.state != REASONING:
                part.content += one.text
            elif self.asked.tells_reasoning:
                part.reasoning += one.text
        self.made_calls = self.made_calls or bool(part.calls)
        return is_good

    def _calls(self, block: Said, reason: str) -> list[JSON]:
        """Return the calls of a block; none where it was cut off or is malformed, which the log tells."""
        if not block.is_whole or reason != "stop" or self.marks.parse is None:
            LOG.warning("a reply ends within a tool call, which is left out")
            return []
        try:
            return self.marks.parse(block.text)
        except (ValueError, KeyError, TypeError, InputError) as e:
            LOG.warning(
                "a tool call cannot be read and is left out: %s", str(e)[:300].encode("unicode_escape").decode()
            )
            return []


class Exchange:
    """Runs one request. `write` sends bytes of a stream, `begin` its headers; `is_gone` tells of a client that left."""

    def __init__(
        self, decoder: Decoder, asked: Asked, form: Form, begin: Callable[[], None], write: Write,
        is_gone: Callable[[], bool], queued: Callable[[], None],
    ) -> None:  # fmt: skip
        self.decoder, self.asked, self.form = decoder, asked, form
        self.begin, self.write, self.is_gone, self.queued = begin, write, is_gone, queued
        self.usage = Usage(is_active=decoder.draft_depth > 0 and asked.mtp)
        self.ctx: Context | None = None
        self.written = time.monotonic()

    def whole(self) -> JSON:
        """Return the whole response."""
        choices = []
        for index, prompt in enumerate(self._prompts()):
            for part, reason in self._parts(prompt, Part()):
                choices.append(self.form.choice(index, part, reason or "stop"))
        return self.form.whole(choices, self.usage)

    def stream(self) -> None:
        """Write the response as it comes."""
        for index, prompt in enumerate(self._prompts()):
            for part, reason in self._parts(prompt, None):
                assert self.ctx is not None
                self._send(event(self.form.chunk(index, part, reason, self.usage, self.ctx.stats)))
        if self.asked.tells_usage:
            self._send(event(self.form.last(self.usage)))
        self._send(b"data: [DONE]\n\n")

    def _prompts(self) -> tuple[Prompt | None, ...]:
        return (None,) if self.asked.kind == CHAT else self.asked.prompts

    def _parts(self, prompt: Prompt | None, collected: Part | None) -> Iterator[tuple[Part, str | None]]:
        """Yield parts of one choice as they can be told, the last one with a finish reason. With `collected` there is
        one, of all.
        """
        ticket = Ticket()
        self.queued()
        self.decoder.requests.put(Job(ticket, self.asked, prompt))
        try:
            self.ctx = ctx = self._next(ticket)
            if not isinstance(ctx, Context):
                raise ClientGone
            if self.asked.stream:
                self.begin()
            voice, part = Voice(self.asked, self.decoder.marks, ctx.state), collected or Part()
            while not isinstance(item := self._next(ticket), str):
                if isinstance(item, tuple):
                    self._keep_alive(f": keepalive {item[0]}/{item[1]}\n\n".encode(), PROGRESS_SECONDS)
                    continue
                voice.push(item, part)
                if collected is None and part.is_told:
                    yield part, None
                    part = Part()
                self._keep_alive(b": keepalive\n\n", SILENT_SECONDS)
            reason = voice.end(item, part)
            self.usage.add(ctx.prompt_tokens, ctx.cached_tokens, ctx.stats)
            yield part, reason
        finally:
            ticket.gone.set()

    def _next(self, ticket: Ticket) -> Any:
        """Return the next thing on the ticket. Raises `ClientGone`, and what the decoder raised."""
        while True:
            try:
                item = ticket.get(timeout=POLL_SECONDS)
            except Empty:
                item = None
                self._wait()
            if self.is_gone():
                raise ClientGone
            if isinstance(item, BaseException):
                raise item
            if item is not None:
                return item
            if not self.decoder.is_healthy:
                raise Refused(500, "the generation thread has ended; the server's log says why")

    def _wait(self) -> None:
        """Begin a stream that waits long for its turn: clients give up on a server that sends no headers."""
        if self.asked.stream and time.monotonic() - self.written >= WAITING_SECONDS:
            self.begin()
            self._send(b": waiting\n\n")

    def _send(self, data: bytes) -> None:
        self.write(data)
        self.written = time.monotonic()

    def _keep_alive(self, data: bytes, after: float) -> None:
        if self.asked.stream and time.monotonic() - self.written >= after:
            self._send(data)
