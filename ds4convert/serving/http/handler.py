"""HTTP: one request of one connection.

Owns the order of the checks (host, origin, key, path, body, fields), the deadline of a request as a whole, and how
every ending becomes a response, a count and a line of the access log. A client that leaves is noticed at the next
token, or within a tenth of a second while it waits.
"""

from __future__ import annotations

import io
import json
import logging
import select
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from email.message import Message
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import Any, cast
from urllib.parse import unquote

from ds4convert.checkpoint.types import JSON
from ds4convert.serving import validation
from ds4convert.serving.http import access, bodies
from ds4convert.serving.http.access import Policy
from ds4convert.serving.http.bodies import Framing, HeadTooLarge, Incoming
from ds4convert.serving.http.exchange import Exchange
from ds4convert.serving.http.responses import EXTENSION, Form, dumps
from ds4convert.serving.metrics import Metrics
from ds4convert.serving.refused import Refused
from ds4convert.serving.seam import ClientGone, Decoder
from ds4convert.serving.validation import CHAT, TEXT, Limits

LOG = logging.getLogger(__name__)
ROUTES = {"/v1/chat/completions": CHAT, "/chat/completions": CHAT, "/v1/completions": TEXT}
OPEN = ("/", "/health")
"""Paths that need no key: they tell nothing of requests."""

PAGE_RULES = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""What the page may do: run what stands in it, and ask this server. Its icon is in it; no other site may frame it."""

CLIENT_GONE = 499
LINGER_SECONDS = 2.0
WRITE_SECONDS = 60.0


@dataclass
class Site:
    """What all connections share. `request_seconds`: time for a client to send a request, headers and body."""

    decoder: Decoder
    metrics: Metrics
    limits: Limits
    policy: Policy
    fingerprint: str
    page: bytes
    max_body: int
    log: Callable[[str], None]
    request_seconds: float = 30.0
    has_head: bool = False
    is_draining: bool = False
    parsing: threading.Lock = field(default_factory=threading.Lock)  # one at a time: JSON takes many times its bytes
    _running: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def busy(self, change: int) -> None:
        """Change the number of requests that are being answered."""
        with self._lock:
            self._running += change

    @property
    def is_idle(self) -> bool:
        """Whether no request is being answered; connections that say nothing do not count."""
        return self._running == 0

    @property
    def name(self) -> str:
        """The name of the model."""
        return self.limits.names[0]


class Handler(BaseHTTPRequestHandler):
    """One connection, which has one request."""

    protocol_version = "HTTP/1.1"
    server_version = "ds4convert"
    sys_version = ""
    timeout = WRITE_SECONDS

    def __init__(self, site: Site, *args: Any, **options: Any) -> None:
        self.site, self.status = site, 0
        self.begun = time.perf_counter()
        self.frame: Framing | None = None
        self.is_unread = False  # whether a body may be on its way
        self.has_refused = self.is_counted = False
        self.has_started = False  # whether the response has begun
        self.exchange: Exchange | None = None
        super().__init__(*args, **options)

    def setup(self) -> None:
        """Prepare the connection: what is read of it has a deadline."""
        super().setup()
        self.rfile.close()
        self.incoming = Incoming(self.connection, self.timeout, self.site.request_seconds)
        self.rfile = cast(Any, io.BufferedReader(self.incoming))

    # -- before -----------------------------------------------------------------------------------------------------

    def handle(self) -> None:
        """Handle the one request; a client that leaves is no error."""
        self.close_connection = True
        try:
            self.handle_one_request()
        except (ConnectionError, TimeoutError, ValueError):
            pass
        finally:
            if self.is_counted:
                self.site.busy(-1)
        if self.has_refused or self.is_unread:
            self._linger()

    def handle_one_request(self) -> None:
        """Read the head of a request and answer it. A head that does not come to its end in time is told so."""
        try:
            self.requestline, self.request_version, self.command, self.path = "", "HTTP/1.0", "", ""
            self.headers = cast(Any, Message())  # until there are some
            self.raw_requestline = self.rfile.readline(65537)
            self.is_counted = True
            self.site.busy(1)
            if len(self.raw_requestline) > 65536:
                self.send_error(HTTPStatus.REQUEST_URI_TOO_LONG)
            elif self.raw_requestline and self.parse_request():
                self.close_connection, self.incoming.is_head = True, False
                method = getattr(self, f"do_{self.command}", None)
                if method is None:
                    self.send_error(HTTPStatus.METHOD_NOT_ALLOWED, f"the method {self.command[:20]} is not known here")
                else:
                    method()
        except HeadTooLarge:
            self.send_error(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "the headers are too large")
        except TimeoutError:
            if self.incoming.received:
                self.send_error(HTTPStatus.REQUEST_TIMEOUT, "the request did not come to its end in time")

    def version_string(self) -> str:
        """Return the name in the header `Server`, without versions."""
        return self.server_version

    def handle_expect_100(self) -> bool:
        """Put the answer to `Expect: 100-continue` off until the body is wanted."""
        return True

    def do_GET(self) -> None:
        """Answer the page, the list of models, health and metrics."""
        self._answer(self._get)

    def do_HEAD(self) -> None:
        """Answer as GET does, without a body."""
        self._answer(self._get)

    def do_POST(self) -> None:
        """Answer a completion."""
        self._answer(self._post)

    def do_OPTIONS(self) -> None:
        """Answer a browser's question whether a page of another origin may send a request (a preflight)."""
        self._answer(self._options)

    def _answer(self, method: Callable[[], None]) -> None:
        """Run one method and turn every ending into a response, a count and a line of the log."""
        try:
            self.is_unread = (
                self.headers.get("Content-Length", "0").strip() != "0" or "Transfer-Encoding" in self.headers
            )
            self.site.policy.check_host(self.headers)
            self.site.policy.check_origin(self.headers)
            if self.command != "OPTIONS" and self._route() not in OPEN:
                self.site.policy.check_key(self.headers)
            self.frame = bodies.framing(self.headers, self.request_version)
            method()
        except Refused as e:
            self._refuse(e)
        except TimeoutError:
            self._timed_out()
        except (ConnectionError, ClientGone):
            self._left()
        except BaseException as e:  # one request's failure is never the server's
            LOG.error("a request failed: %s: %s", type(e).__name__, str(e)[:500].encode("unicode_escape").decode())
            LOG.debug("where", exc_info=e)
            self._refuse(Refused(500, f"the request failed ({type(e).__name__}); the server's log says more"))
        finally:
            self._count()

    def _route(self) -> str:
        return self.path.partition("?")[0]

    def _count(self) -> None:
        """Count the request, and log it."""
        path, status, seconds = self._route(), self.status or CLIENT_GONE, time.perf_counter() - self.begun
        known = path in ROUTES or path in (*OPEN, "/metrics") or path.startswith("/v1/models")
        self.site.metrics.request(path if known else "other", status)
        ctx = self.exchange.ctx if self.exchange is not None else None
        tokens = None
        if self.exchange is not None and ctx is not None:
            self.site.metrics.time("request_seconds", seconds)
            told, usage = ctx.stats.generated, self.exchange.usage
            tokens = (usage.prompt, usage.generated) if usage.prompt else (ctx.prompt_tokens, told)
        key = self.site.policy.api_key
        line = access.log_line(self.client_address[0], self.command or "-", path or "-", status, tokens, seconds, key)
        self.site.log(line)

    def _get(self) -> None:
        path = self._route()
        if path == "/":
            self._send(200, self.site.page, "text/html; charset=utf-8")
        elif path == "/health":
            self._health()
        elif path == "/metrics":
            self._send(200, self.site.metrics.text().encode(), "text/plain; version=0.0.4; charset=utf-8")
        elif path == "/v1/models":
            self._send_json(200, {"object": "list", "data": [self._model()]})
        elif path.startswith("/v1/models/"):
            if unquote(path.removeprefix("/v1/models/")) not in self.site.limits.names:
                raise Refused(404, "no such model; /v1/models lists what there is", "model", "model_not_found")
            self._send_json(200, self._model())
        else:
            raise Refused(405 if path in ROUTES else 404, "no such page" if path not in ROUTES else "use POST")

    def _health(self) -> None:
        is_well = self.site.decoder.is_healthy and not self.site.is_draining
        status = "ok" if is_well else "draining" if self.site.is_draining else "unavailable"
        self._send_json(200 if is_well else 503, {"status": status, "mtp_active": self.site.metrics.mtp_active})

    def _model(self) -> JSON:
        head = {"id": self.site.name, "object": "model", "created": 0, "owned_by": "local"}
        decoder, limits = self.site.decoder, self.site.limits
        return {
            **head,
            EXTENSION: {
                "mtp_active": self.site.metrics.mtp_active,
                "draft_depth": decoder.draft_depth,
                "thinks": decoder.marks.think_end is not None,
                "context": limits.context,
                "fields": validation.allowed(limits),
            },
        }

    def _options(self) -> None:
        self._send(204, b"", None)

    def _post(self) -> None:
        path = self._route()
        if path not in ROUTES:
            raise Refused(404, "no such page; completions are at /v1/chat/completions and /v1/completions")
        body = self._body()
        with self.site.parsing:
            asked = validation.parse(body, ROUTES[path], self.site.limits)
        del body
        if self.site.is_draining:
            raise Refused(503, "the server is shutting down", code="draining")
        form = Form(asked, self.site.name, self.site.fingerprint, self.site.decoder.token_bytes)
        self.exchange = Exchange(
            self.site.decoder, asked, form, self._begin_stream, self._write, self.is_client_gone,
            lambda: self.site.metrics.queue(waiting=1),
        )  # fmt: skip
        if asked.stream:
            self.exchange.stream()
        else:
            self._send(200, dumps(self.exchange.whole()), "application/json")

    def _body(self) -> bytes:
        """Return the bytes of the body. Raises `Refused` where it is too large, malformed, cut short or has no end."""
        assert self.frame is not None
        if self.headers.get("Expect", "").lower() == "100-continue" and self.request_version != "HTTP/1.0":
            if (self.frame.length or 0) > self.site.max_body:
                self.is_unread = False  # it is not sent unless it is asked for
            else:
                self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        try:
            raw = bodies.read(cast(io.BufferedReader, self.rfile), self.frame, self.site.max_body)
        except Refused as e:
            if e.status == HTTPStatus.BAD_REQUEST:
                self.frame = None  # nobody knows where it ends
            self.is_unread = self.is_unread and not (self.frame is not None and self.frame.is_chunked)
            raise
        self.is_unread = False
        return raw

    def is_client_gone(self) -> bool:
        """Return whether the client has closed its side; sends and takes nothing."""
        try:
            poll = select.poll()
            poll.register(self.connection, select.POLLIN)
            return bool(poll.poll(0)) and not self.connection.recv(1, socket.MSG_PEEK)
        except (OSError, ValueError):
            return True

    # -- behind -----------------------------------------------------------------------------------------------------

    def _begin_stream(self) -> None:
        if not self.has_started:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream; charset=utf-8")
            self.send_header("Cache-Control", "no-cache")
            self.send_header("X-Accel-Buffering", "no")  # else nginx keeps events back
            self.end_headers()

    def _write(self, data: bytes) -> None:
        self.wfile.write(data)
        self.wfile.flush()

    def _left(self) -> None:
        self.site.metrics.add("disconnects_total")
        self.status = CLIENT_GONE
        self._headers_buffer: list[bytes] = []

    def _timed_out(self) -> None:
        """Answer a request that did not come in time; a client that does not take its response has left."""
        if self.exchange is None and not self.has_started:
            self.is_unread = False
            self._refuse(Refused(408, "the request did not come to its end in time"))
        else:
            self._left()

    def _refuse(self, refused: Refused) -> None:
        """Send an error: as a response, or as an event where a stream has begun."""
        try:
            if self.has_started:
                self._write(f"data: {json.dumps(refused.as_json())}\n\n".encode())
                self.status = refused.status
                return
            if self.is_unread and self.headers.get("Expect", "").lower() != "100-continue":
                bodies.drain(cast(io.BufferedReader, self.rfile), self.incoming, self.frame, self.site.max_body)
            self._headers_buffer = []
            self._send_json(refused.status, refused.as_json())
            self.has_refused = True
        except OSError:
            self._left()

    def _linger(self) -> None:
        """Wait until the client has read the answer: closing a connection with unread bytes would destroy it."""
        self.incoming.until = time.monotonic() + LINGER_SECONDS
        left = 1 << 22
        try:
            self.connection.shutdown(socket.SHUT_WR)
            while left > 0 and (part := self.rfile.read1(bodies.PART)):
                left -= len(part)
        except (OSError, ValueError):
            pass

    def _send_json(self, status: int, value: JSON) -> None:
        self._send(status, dumps(value), "application/json")

    def _send(self, status: int, content: bytes, kind: str | None) -> None:
        self.send_response(status)
        if kind is not None:
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("X-Content-Type-Options", "nosniff")
        if kind is not None and kind.startswith("text/html"):
            self.send_header("Content-Security-Policy", PAGE_RULES)
        if status == HTTPStatus.UNAUTHORIZED:
            self.send_header("WWW-Authenticate", "Bearer")
        if status in (HTTPStatus.METHOD_NOT_ALLOWED, HTTPStatus.NO_CONTENT):
            self.send_header("Allow", "GET, HEAD, POST, OPTIONS")
        self.end_headers()
        if self.command != "HEAD":
            self._write(content)

    def end_headers(self) -> None:
        """Send the headers, those for pages of other origins among them, and note that the response has begun."""
        for name, value in self.site.policy.cors(self.headers, self.command == "OPTIONS").items():
            self.send_header(name, value)
        self.send_header("Connection", "close")
        super().end_headers()
        self.has_started = True

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what the HTTP parser refuses: as JSON, and as the client's fault, which it is."""
        status = {501: 405, 505: 400}.get(int(code), int(code))
        self.incoming.is_head = False
        self.command, self.is_unread = self.command or "GET", True
        self.request_version = "HTTP/1.0"
        self._refuse(Refused(status, message or HTTPStatus(status).phrase))
        self._count()

    def log_request(self, code: Any = "-", size: Any = "-") -> None:
        """Note the status for the count and the log."""
        self.status = int(code)

    def log_message(self, form: str, *args: Any) -> None:
        """Say nothing: the access log has a line for every request."""
