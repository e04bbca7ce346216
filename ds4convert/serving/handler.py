"""HTTP: what stands before and behind mlx-lm's handler.

Before: key, size, route and body are checked, so that mlx-lm's code sees good requests only. Behind: the figures of
the head are added to its responses, and errors get OpenAI's form. A client that leaves is noticed at the next token, or
within a tenth of a second while it waits.
"""

# mlx-lm's server carries few types, so these checks would only repeat that.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import hmac
import io
import json
import select
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http import HTTPStatus
from queue import Empty
from typing import Any

from mlx_lm import server as base

from ds4convert.serving import validation
from ds4convert.serving.metrics import Metrics
from ds4convert.serving.seam import ClientGone, Context, Decoder, Piece, Ticket
from ds4convert.serving.validation import CHAT, TEXT, Limits, Refused
from ds4convert.types import JSON

ROUTES = {"/v1/chat/completions": CHAT, "/chat/completions": CHAT, "/v1/completions": TEXT}
OPEN = ("/", "/health")
"""Paths that need no key: they tell nothing of requests."""

POLL_SECONDS = 0.1
CLIENT_GONE = 499
EXTENSION = "ds4convert"
"""Name of the added field in responses; OpenAI's clients leave it alone."""


@dataclass
class Site:
    """What all connections share."""

    decoder: Decoder
    metrics: Metrics
    limits: Limits
    name: str
    fingerprint: str
    page: bytes
    api_key: str | None
    max_body: int
    log: Callable[[str], None]
    is_draining: bool = False


class GenerationFailed(BaseException):
    """An error of the generation on its way past mlx-lm's `except Exception`, which would answer it with 404."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


class Watched:
    """mlx-lm's view of the decoder for one request: watches the client, and tells the handler what goes out."""

    def __init__(self, site: Site, handler: Handler) -> None:
        self.site, self.handler = site, handler
        self.cli_args = site.decoder.cli_args

    def generate(self, request: Any, args: Any, progress_callback: Any = None) -> tuple[Context, Iterator[Piece]]:
        """Queue a request; returns its context and an iterator of its pieces. Raises `GenerationFailed`."""
        ticket = Ticket()
        self.site.metrics.queue(waiting=1)
        self.site.decoder.requests.put((ticket, request, args))
        ctx = self._next(ticket)
        self.handler.ctx = ctx
        return ctx, self._pieces(ticket, progress_callback)

    def _pieces(self, ticket: Ticket, progress: Any) -> Iterator[Piece]:
        try:
            while (item := self._next(ticket)) is not None:
                if isinstance(item, tuple):
                    if progress is not None:
                        progress(*item)
                    continue
                self.handler.going.append(item)
                yield item
        finally:
            ticket.gone.set()

    def _next(self, ticket: Ticket) -> Any:
        """Return the next thing on the ticket. Raises `ClientGone` or `GenerationFailed`."""
        while True:
            try:
                item = ticket.get(timeout=POLL_SECONDS)
            except Empty:
                item = Empty
            if self.handler.is_client_gone():
                ticket.gone.set()
                raise GenerationFailed(ClientGone())
            if isinstance(item, Exception):
                raise GenerationFailed(item)
            if item is not Empty:
                return item
            if not self.site.decoder.generation_available():
                raise GenerationFailed(RuntimeError("the generation thread has ended"))


class Handler(base.APIHandler):
    """One connection."""

    server_version = "ds4convert"
    sys_version = ""
    timeout = 60  # seconds for a client to send its request, or to take what it is sent
    site: Site

    def __init__(self, site: Site, *args: Any, **kwargs: Any) -> None:
        self.site, self.status = site, 0
        self.ctx: Any = None  # mlx-lm's context and ours, once a generation has begun
        self.going: list[Piece] = []
        self.started = False
        super().__init__(site.decoder, *args, system_fingerprint=site.fingerprint, **kwargs)

    # -- before -----------------------------------------------------------------------------------------------------

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
        """Answer without any header for other origins: pages of other sites may not use this server."""
        self._answer(lambda: self._send(204, b"", "text/plain"))

    def _answer(self, method: Callable[[], None]) -> None:
        """Run one method and turn every ending into a response and a count."""
        path = self.path.partition("?")[0]
        begun = time.perf_counter()
        try:
            self._check_access(path)
            method()
        except Refused as e:
            self._refuse(e)
        except (ConnectionError, TimeoutError):
            self._left()
        except GenerationFailed as e:
            self._fail(e.cause)
        finally:
            known = path in ROUTES or path in (*OPEN, "/metrics") or path.startswith("/v1/models")
            self.site.metrics.request(path if known else "other", self.status or CLIENT_GONE)
            if path in ROUTES and self.ctx is not None:
                self.site.metrics.time("request_seconds", time.perf_counter() - begun)

    def _check_access(self, path: str) -> None:
        origin = self.headers.get("Origin")
        if origin is not None and origin.partition("://")[2] != self.headers.get("Host"):
            raise Refused(403, "pages of other sites may not use this server", code="foreign_origin")
        if self.site.api_key is None or path in OPEN:
            return
        scheme, _, key = self.headers.get("Authorization", "").partition(" ")
        given = key.strip().encode("utf-8", "surrogateescape")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given, self.site.api_key.encode()):
            raise Refused(401, "a valid key is needed: Authorization: Bearer KEY", code="invalid_api_key")

    def _get(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/":
            self._send(200, self.site.page, "text/html; charset=utf-8")
        elif path == "/health":
            self._health()
        elif path == "/metrics":
            self._send(200, self.site.metrics.text().encode(), "text/plain; version=0.0.4; charset=utf-8")
        elif path == "/v1/models":
            self._send_json(200, {"object": "list", "data": [self._model()]})
        elif path.startswith("/v1/models/"):
            if path.removeprefix("/v1/models/") not in self.site.limits.models:
                raise Refused(404, "no such model; /v1/models lists what there is", "model", "model_not_found")
            self._send_json(200, self._model())
        else:
            raise Refused(405 if path in ROUTES else 404, "no such page" if path not in ROUTES else "use POST")

    def _health(self) -> None:
        is_well = self.site.decoder.is_healthy and not self.site.is_draining
        status = "ok" if is_well else "draining" if self.site.is_draining else "unavailable"
        self._send_json(200 if is_well else 503, {"status": status, "mtp_active": self.site.metrics.mtp_active})

    def _model(self) -> JSON:
        return {"id": self.site.name, "object": "model", "created": 0, "owned_by": "local"}

    def _post(self) -> None:
        path = self.path.partition("?")[0]
        if path not in ROUTES:
            raise Refused(404, "no such page; completions are at /v1/chat/completions and /v1/completions")
        raw = self._body()
        body = validation.parse(raw, ROUTES[path], self.site.limits)
        if self.site.is_draining:
            raise Refused(503, "the server is shutting down", code="draining")
        self.path, self.rfile = path, io.BytesIO(json.dumps(body).encode())
        self.headers.replace_header("Content-Length", str(self.rfile.getbuffer().nbytes))
        self.response_generator: Any = Watched(self.site, self)
        super().do_POST()

    def _body(self) -> bytes:
        """Return the bytes of the body. Raises `Refused` where it is too large, cut short or of no stated size."""
        lengths = self.headers.get_all("Content-Length", [])
        if not lengths or self.headers.get("Transfer-Encoding") is not None:
            raise Refused(411, "Content-Length is needed; chunked bodies are not taken")
        text = lengths[0].strip()
        if len(set(lengths)) > 1 or not (text.isascii() and text.isdigit() and len(text) < 19):
            raise Refused(400, "Content-Length: expected one whole number")
        size = int(text)
        if size > self.site.max_body:
            self._drain(size)
            raise Refused(413, f"the request has {size:,} bytes; at most {self.site.max_body:,} are taken")
        raw: bytes = self.rfile.read(size)
        if len(raw) < size:
            raise Refused(400, f"the request ends after {len(raw):,} of {size:,} bytes")
        return raw

    def _drain(self, size: int) -> None:
        """Read what a client with too much goes on to send, within bounds, so that it can read the answer."""
        left, until = min(size, 8 * self.site.max_body), time.monotonic() + 5
        self.connection.settimeout(2)
        try:
            while left > 0 and time.monotonic() < until:
                part = self.rfile.read1(min(left, 1 << 16))
                if not part:
                    break
                left -= len(part)
        except OSError:
            pass

    def is_client_gone(self) -> bool:
        """Return whether the client has closed its side; sends and takes nothing."""
        try:
            poll = select.poll()
            poll.register(self.connection, select.POLLIN)
            return bool(poll.poll(0)) and not self.connection.recv(1, socket.MSG_PEEK)
        except (OSError, ValueError):
            return True

    # -- behind -----------------------------------------------------------------------------------------------------

    def generate_response(self, text: str, finish_reason: Any, *args: Any, **options: Any) -> JSON:
        """Return mlx-lm's response with the name of the model, true counts, and the head's figures."""
        pieces, self.going = self.going, []
        response: JSON = super().generate_response(text, finish_reason, *args, **options)
        response["model"] = self.site.name
        stats = self.ctx.stats
        if "usage" in response:
            self._complete(response["usage"])
            content = response["choices"][0].get("logprobs", {}).get("content")
            if content and not all(p.whole for p in pieces):
                content.pop()  # the last token, told twice because a stop word begins in it
        else:
            response[EXTENSION] = {
                "tokens": [{"text": p.text, "drafted": p.drafted} for p in pieces],
                "drafted": stats.drafted,
                "accepted": stats.accepted,
                "passes": stats.passes,
            }
        return response

    def completion_usage_response(self, *args: Any, **options: Any) -> JSON:
        """Return mlx-lm's last chunk with true counts and the head's figures."""
        response: JSON = super().completion_usage_response(*args, **options)
        response["model"], response["object"] = self.site.name, self.object_type
        self._complete(response["usage"])
        return response

    def _complete(self, usage: JSON) -> None:
        stats = self.ctx.stats
        usage["completion_tokens"] = stats.generated
        usage["total_tokens"] = usage["prompt_tokens"] + stats.generated
        usage[EXTENSION] = {
            "mtp_active": self.ctx.mtp_active,
            "drafted": stats.drafted,
            "accepted": stats.accepted,
            "passes": stats.passes,
            "acceptance": round(stats.acceptance, 4) if stats.drafted else None,
            "tokens_per_pass": round(stats.tokens_per_pass, 4),
        }

    def _fail(self, cause: Exception) -> None:
        """Answer a generation that did not come to its end."""
        if isinstance(cause, ClientGone):
            self._left()
            return
        refused = cause if isinstance(cause, Refused) else Refused(500, f"the generation failed: {cause}")
        self._refuse(refused)

    def _left(self) -> None:
        self.site.metrics.add("disconnects_total")
        self.status = CLIENT_GONE
        self.close_connection = True
        self._headers_buffer: list[bytes] = []

    def _refuse(self, refused: Refused) -> None:
        """Send an error: as a response, or as an event where a stream has begun."""
        self.close_connection = True
        try:
            if self.started:
                self.wfile.write(f"data: {json.dumps(refused.as_json())}\n\n".encode())
                self.status = refused.status
            else:
                self._headers_buffer = []
                self._send_json(refused.status, refused.as_json())
        except OSError:
            self._left()

    def _send_json(self, status: int, value: JSON) -> None:
        self._send(status, json.dumps(value).encode(), "application/json")

    def _send(self, status: int, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Content-Type-Options", "nosniff")
        if kind.startswith("text/html"):
            rules = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
            self.send_header("Content-Security-Policy", rules)
        if status == HTTPStatus.UNAUTHORIZED:
            self.send_header("WWW-Authenticate", "Bearer")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
            self.wfile.flush()

    def end_headers(self) -> None:
        """Send the headers, and note that the response has begun."""
        super().end_headers()
        self.started = True

    def _set_cors_headers(self) -> None:
        """Allow no other origin."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what the HTTP parser refuses: as JSON, and as the client's fault, which it is."""
        status = {501: 405, 505: 400}.get(int(code), int(code))
        self.command = getattr(self, "command", None) or "GET"
        self.path = getattr(self, "path", "")
        self.request_version = "HTTP/1.0"
        self._refuse(Refused(status, message or HTTPStatus(status).phrase))
        self.site.metrics.request("other", status)

    def log_request(self, code: Any = "-", size: Any = "-") -> None:
        """Note the status for the count, and log one line."""
        self.status = int(code)
        self.site.log(f"{self.command} {self.path.partition('?')[0]!r} {self.status}")

    def log_message(self, form: str, *args: Any) -> None:
        """Log one line; what the client sent is escaped."""
        self.site.log((form % args).encode("unicode_escape").decode())

    def handle(self) -> None:
        """Handle the connection; a client that leaves is no error."""
        try:
            super().handle()
        except (ConnectionError, TimeoutError):
            pass
