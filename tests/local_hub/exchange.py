"""One HTTP request and its answer: routing, tokens, bodies, errors as the Hub words them, faults and counting."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.local_hub.faults import Counters, Faults
from tests.local_hub.store import Commit, Conflict, Missing, Repo, Store

CHUNK = 1 << 20
TOKENS = {
    "hf_local_owner": {"name": "owner", "role": "write"},
    "hf_local_reader": {"name": "reader", "role": "read"},
}
"""The owner reads and writes everything; the reader has access to public repos only, and may not write."""


@dataclass
class State:
    """What all requests of a server share."""

    store: Store
    secret: bytes
    part_size: int
    page_size: int
    hub_url: str = ""
    cdn_url: str = ""
    mirror_url: str = ""
    faults: Faults = field(default_factory=Faults)
    counters: Counters = field(default_factory=Counters)

    def sign(self, path: str, seconds: int = 3600) -> str:
        """Return `path` (starting with `/`) with an expiry and a signature of both."""
        end = str(int(time.time()) + seconds)
        return f"{path}?Expires={end}&Signature={self.signature(path, end)}"

    def signature(self, path: str, end: str) -> str:
        return hmac.new(self.secret, f"{path} {end}".encode(), hashlib.sha256).hexdigest()


class Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, code: str = "", headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers or {}


@dataclass(frozen=True)
class Route:
    methods: tuple[str, ...]
    pattern: re.Pattern[str]
    kind: str
    act: Callable[..., None]


ROUTES: list[Route] = []
REPO = r"(?P<repo>[^/]+/[^/]+)"


def route(methods: str, pattern: str, kind: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function for requests; groups of the pattern become its arguments, unquoted."""

    def register(act: Callable[..., None]) -> Callable[..., None]:
        ROUTES.append(Route(tuple(methods.split()), re.compile(pattern), kind, act))
        return act

    return register


class Exchange(BaseHTTPRequestHandler):
    """The handler. `state` is set by a subclass that the server makes."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    state: State

    def log_message(self, format: str, *args: Any) -> None:
        pass

    # Routing

    def do_GET(self) -> None:
        split = urlsplit(self.path)
        self.raw_path, self.query = split.path, parse_qs(split.query)
        self.kind, self.subject, self.status = "unknown", unquote(split.path), 0
        self.sent, self.received = 0, 0
        self._left: int | None = None if self._chunked else int(self.headers.get("Content-Length") or 0)
        if self.raw_path.startswith("/__control__/"):
            return self._route()
        self.state.counters.begin()
        try:
            self._route()
        except (ConnectionError, TimeoutError):
            self.close_connection = True
        finally:
            span = self.headers.get("Range")
            counted = (self.kind, self.command, self.subject, self.status, self.sent, self.received, span)
            self.state.counters.end(*counted)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _route(self) -> None:
        try:
            for r in ROUTES:
                found = r.pattern.fullmatch(self.raw_path)
                if found and self.command in r.methods:
                    groups = {k: unquote(v or "") for k, v in found.groupdict().items()}
                    self.kind = r.kind
                    if "path" in groups:
                        self.subject = f"{groups['repo']}/{groups['path']}"
                    if (fault := self.fault("status")) is not None:
                        wait = fault["retry_after"]
                        headers = {} if wait is None else {"Retry-After": str(wait)}
                        raise Refused(fault["code"], "fault", headers=headers)
                    if (fault := self.fault("limit")) and (left := self.state.faults.limited(fault["seconds"])) > 0:
                        headers = {"RateLimit": f'"resolvers";r=0;t={left}'}
                        headers |= {"RateLimit-Policy": '"fixed window";"resolvers";q=3000;w=300'}
                        raise Refused(429, "fault", headers=headers)
                    if (fault := self.fault("endless")) is not None:
                        return self.endless(fault["code"])
                    return r.act(self, **groups)
            raise Refused(404, f"no such endpoint: {self.command} {self.raw_path}")
        except Refused as e:
            self.refuse(e)
        except Missing as e:
            self.refuse(Refused(404, str(e), e.code))
        except Conflict as e:
            self.refuse(Refused(409, str(e)))

    def fault(self, kind: str) -> dict[str, Any] | None:
        """Return the arguments of a fault for this request. Rules name `owner/model/path`, `path`, or the URL's path."""
        if self.raw_path.startswith("/__control__/"):
            return None
        subjects = [self.subject, self.subject.split("/", 2)[-1], unquote(self.raw_path)]
        return self.state.faults.take(kind, subjects, self.command, self.kind)

    # Who asks, and what may be seen

    @property
    def user(self) -> dict[str, str] | None:
        given = self.headers.get("Authorization")
        if not given:
            return None
        user = TOKENS.get(given.removeprefix("Bearer "))
        if user is None:
            raise Refused(401, "Invalid credentials in Authorization header")
        return user

    def writer(self) -> dict[str, str]:
        user = self.user
        if user is None:
            raise Refused(401, "Invalid username or password.")
        if user["role"] != "write":
            raise Refused(403, "Forbidden: you need a token with the write role")
        return user

    def repo(self, name: str) -> Repo:
        """Return a repo that the user may know of. A private one is missing to others, as on the Hub."""
        user = self.user
        try:
            found = self.state.store.repo(name)
            if not found.private or (user and user["role"] == "write"):
                return found
        except Missing:
            pass
        if user is None:
            raise Refused(401, "Invalid username or password.", "RepoNotFound")
        raise Refused(404, "Repository not found", "RepoNotFound")

    def readable(self, name: str, revision: str) -> tuple[Repo, Commit]:
        repo = self.repo(name)
        return repo, self.state.store.commit_of(repo, revision)

    def check_gate(self, repo: Repo) -> None:
        user = self.user
        if repo.gated and (user is None or user["role"] != "write"):
            message = f"Access to model {repo.name} is restricted. You must have access to it and be authenticated."
            raise Refused(401 if user is None else 403, message, "GatedRepo")

    def check_signature(self) -> None:
        """Refuse an unsigned or expired URL as object storage does, and a token that should not have been sent here."""
        end, given = (self.query.get(k, [""])[0] for k in ("Expires", "Signature"))
        if self.headers.get("Authorization"):
            raise Refused(400, "Only one auth mechanism allowed")
        if not hmac.compare_digest(given, self.state.signature(self.raw_path, end)):
            raise Refused(403, "SignatureDoesNotMatch")
        if int(end) < time.time():
            raise Refused(403, "Request has expired")

    # Bodies

    @property
    def _chunked(self) -> bool:
        return "chunked" in self.headers.get("Transfer-Encoding", "").lower()

    def chunks(self) -> Iterator[bytes]:
        """Yield the request's body. Raises ConnectionError where it ends early."""
        if self._chunked:
            yield from self._chunked_body()
            return
        while self._left:
            piece = self.rfile.read(min(self._left, CHUNK))
            if not piece:
                raise ConnectionResetError("the body ended early")
            self._left -= len(piece)
            self.received += len(piece)
            yield piece

    def _chunked_body(self) -> Iterator[bytes]:
        while self._left is None:
            line = self.rfile.readline(64)
            if not line.endswith(b"\n"):
                raise ConnectionResetError("the body ended early")
            size = int(line.split(b";")[0], 16)
            piece = self.rfile.read(size)
            if len(piece) < size or not self.rfile.readline(8).endswith(b"\n"):
                raise ConnectionResetError("the body ended early")
            self.received += size
            if not size:
                self._left = 0
                return
            yield piece

    def body(self) -> bytes:
        return b"".join(self.chunks())

    def json(self) -> Any:
        try:
            return json.loads(self.body() or b"{}")
        except ValueError:
            raise Refused(400, "the body is not JSON") from None

    # Answers

    def answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        """Send an answer. What is left of the request's body is read first, as clients read no answer before."""
        for _ in self.chunks():
            pass
        self.begin(status, {"Content-Length": str(len(body))} | headers)
        if self.command != "HEAD":
            self.wfile.write(body)
            self.sent += len(body)

    def begin(self, status: int, headers: dict[str, str]) -> None:
        self.status = status
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()

    def reply(self, value: Any, headers: dict[str, str] | None = None, status: int = 200) -> None:
        raw = json.dumps(value).encode()
        self.answer(status, {"Content-Type": "application/json; charset=utf-8"} | (headers or {}), raw)

    def refuse(self, e: Refused) -> None:
        headers = {"X-Error-Message": str(e)} | ({"X-Error-Code": e.code} if e.code else {}) | e.headers
        self.reply({"error": str(e)}, headers, e.status)

    def endless(self, status: int) -> None:
        """Send a body that ends only when the client leaves (or after 8 GB)."""
        headers = {"Content-Type": "application/json", "Connection": "close"}
        self.begin(status, headers | ({"Location": "/endless"} if 300 <= status < 400 else {}))
        self.close_connection = True
        for _ in range(8 << 10):
            self.wfile.write(b" " * CHUNK)
            self.sent += CHUNK

    def hang_up(self) -> None:
        """Close the connection in the middle of things."""
        self.close_connection = True
        try:
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
