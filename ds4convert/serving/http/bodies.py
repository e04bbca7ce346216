"""Bodies of requests: how long they are (RFC 9112, section 6), read within a bound of bytes and of time.

Owns every read from a client's connection. A length in the header or chunks with trailers; all else is refused, and
what a refused client still sends is read away, within bounds, so that it can read the answer.
"""

from __future__ import annotations

import io
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from email.message import Message

from ds4convert.serving.refused import Refused

DRAIN_SECONDS = 5.0
DRAIN_TIMES = 8
"""How many times the largest body is read away of one that is refused."""

PAUSE = 0.5
"""Seconds for which a client is listened to that sends what has no length."""

MAX_LINE, MAX_TRAILERS = 8192, 100
MAX_HEAD = 1 << 18
"""Bytes of a request line and its headers; Python alone would hold a hundred headers of 64 KiB for every client."""

PART = 1 << 16


class HeadTooLarge(Exception):
    """The head of a request is larger than any real one."""


class Incoming(io.RawIOBase):
    """A client's connection to read from, with one time by which all has to be there.

    `idle` seconds may pass without a byte; `until` is a time of `time.monotonic`. Raises `TimeoutError` at either, and
    `HeadTooLarge` where `is_head` is true (until the handler has read it) and more than `MAX_HEAD` bytes have come.
    """

    def __init__(self, connection: socket.socket, idle: float, seconds: float) -> None:
        super().__init__()
        self.connection, self.idle = connection, idle
        self.until = time.monotonic() + seconds
        self.received, self.is_head = 0, True

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        """Read what is there, at least one byte; 0 at the end."""
        left = self.until - time.monotonic()
        if left <= 0:
            raise TimeoutError("the request was not complete in time")
        if self.is_head and self.received > MAX_HEAD:
            raise HeadTooLarge
        self.connection.settimeout(min(self.idle, left))
        try:
            count = self.connection.recv_into(buffer)
        finally:
            self.connection.settimeout(self.idle)
        self.received += count
        return count


@dataclass(frozen=True)
class Framing:
    """How the end of a body is known: by `length` bytes, by chunks, or not at all (None)."""

    length: int | None
    is_chunked: bool = False


def framing(headers: Message, version: str) -> Framing:
    """Return how the body is delimited. Raises `Refused` (400) where the headers do not say one thing."""
    lengths, codings = headers.get_all("Content-Length", []), headers.get_all("Transfer-Encoding", [])
    if codings:
        if lengths:
            raise Refused(400, "Transfer-Encoding and Content-Length: expected one of them")
        if [c.strip().lower() for c in ",".join(codings).split(",")] != ["chunked"] or version == "HTTP/1.0":
            raise Refused(400, "Transfer-Encoding: expected chunked, in HTTP/1.1")
        return Framing(None, is_chunked=True)
    if not lengths:
        return Framing(None)
    text = lengths[0].strip()
    if len(set(lengths)) > 1 or not (text.isascii() and text.isdigit() and len(text) < 19):
        raise Refused(400, "Content-Length: expected one whole number")
    return Framing(int(text))


def read(source: io.BufferedReader, frame: Framing, limit: int) -> bytes:
    """Return a body of at most `limit` bytes. Raises `Refused`: 400 malformed or cut short, 411 no length, 413 too
    large.
    """
    if frame.is_chunked:
        return _chunked(source, limit)
    if frame.length is None:
        raise Refused(411, "expected a body: Content-Length, or Transfer-Encoding: chunked")
    if frame.length > limit:
        raise Refused(413, f"the request has {frame.length:,} bytes; at most {limit:,} are taken")
    raw = source.read(frame.length)
    if len(raw) < frame.length:
        raise Refused(400, f"the request ends after {len(raw):,} of {frame.length:,} bytes")
    return raw


def _chunked(source: io.BufferedReader, limit: int) -> bytes:
    """Return the data of all chunks. Raises `Refused` where it is too large: then the rest has been read away."""
    parts, total = [], 0
    for data in _chunks(source, DRAIN_TIMES * limit):
        total += len(data)
        if total <= limit:
            parts.append(data)
    if total > limit:
        raise Refused(413, f"the request has {total:,} bytes or more; at most {limit:,} are taken")
    return b"".join(parts)


def _chunks(source: io.BufferedReader, limit: int) -> Iterator[bytes]:
    """Yield the data of chunks, and read the trailers away; ends early where more than `limit` bytes have come.

    Raises `Refused` on anything that two readers could read in two ways.
    """
    wire = 0
    while wire <= limit:
        line = _line(source)
        digits = line.partition(b";")[0].strip(b" \t")
        if not digits or len(digits) > 16 or digits.strip(b"0123456789abcdefABCDEF"):
            raise Refused(400, "chunked body: expected the size of a chunk in hexadecimal")
        size = int(digits, 16)
        if size == 0:
            return _trailers(source)
        if size > limit:  # the size that a chunk claims is not read away: it may be more than anybody ever sends
            raise Refused(413, f"chunked body: a chunk of {size:,} bytes; at most {limit:,} are taken")
        wire += len(line) + size
        yield from _data(source, size)


def _data(source: io.BufferedReader, size: int) -> Iterator[bytes]:
    """Yield the data of one chunk in parts: a size that is not true may be larger than the memory."""
    while size:
        data = source.read(min(size, PART))
        if not data:
            raise Refused(400, "chunked body: cut short")
        size -= len(data)
        yield data
    if source.read(2) != b"\r\n":
        raise Refused(400, "chunked body: a chunk does not end where its size says")


def _trailers(source: io.BufferedReader) -> None:
    for _ in range(MAX_TRAILERS + 1):
        if not _line(source):
            return
    raise Refused(400, f"chunked body: more than {MAX_TRAILERS} trailers")


def _line(source: io.BufferedReader) -> bytes:
    line = source.readline(MAX_LINE)
    if not line.endswith(b"\r\n"):
        raise Refused(400, "chunked body: cut short, or a line that is too long or does not end in CR LF")
    return line[:-2]


def drain(source: io.BufferedReader, incoming: Incoming, frame: Framing | None, limit: int) -> None:
    """Read away what a refused client goes on to send, within bounds of bytes and time.

    `frame` None: nobody knows where it ends, so what comes without a pause is read.
    """
    is_known = frame is not None and (frame.is_chunked or frame.length is not None)
    incoming.until = min(incoming.until, time.monotonic() + (DRAIN_SECONDS if is_known else PAUSE))
    left = DRAIN_TIMES * limit
    try:
        if frame is not None and frame.is_chunked:
            for _ in _chunks(source, left):
                pass
            return
        if frame is not None and frame.length is not None:
            left = min(left, frame.length)
        while left > 0 and (part := source.read1(min(left, PART))):
            left -= len(part)
    except (OSError, ValueError, Refused):
        pass
