"""Who may use the server: hosts, origins, keys; and the line that the access log has of each request.

A page of any site can make a browser send requests to the loopback. Three things stand against that: an Origin other
than the server's own is refused unless `--allowed-origin` names it; without a key, so is a Host that could be a
stranger's name for this machine (DNS rebinding makes such a page the "same origin"); and only named origins get CORS
headers.
"""

from __future__ import annotations

import hmac
import re
import time
from dataclasses import dataclass
from email.message import Message
from ipaddress import ip_address
from urllib.parse import urlsplit

from ds4convert.errors import UsageError
from ds4convert.serving.refused import Refused
from ds4convert.words.terminal import show

ANY = "*"
PREFLIGHT_SECONDS = 600
TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
DEFAULT_PORTS = {"http": 80, "https": 443}


def origin_of(text: str) -> str:
    """Return an origin as browsers write it: `https://host[:port]`, `null`, or `*` for all.

    Raises `UsageError` on anything else. A browser sends no path, so one final slash is a slip that is forgiven.
    """
    if text in (ANY, "null"):
        return text
    parts = urlsplit(text.removesuffix("/").lower())
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    rest = parts.path or parts.query or parts.fragment or parts.username
    if not parts.scheme or not host or rest or not text.isascii() or not text.isprintable() or " " in text:
        raise UsageError(f"--allowed-origin {text!r}: expected an origin such as http://localhost:3000, or * for all")
    name = f"[{host}]" if ":" in host else host
    is_default = port is None or DEFAULT_PORTS.get(parts.scheme) == port
    return f"{parts.scheme}://{name}" + ("" if is_default else f":{port}")


@dataclass(frozen=True)
class Policy:
    """What a request has to show. `host` is what `--host` says; `origins` those of `--allowed-origin`."""

    host: str
    api_key: str | None = None
    origins: frozenset[str] = frozenset()

    def check_host(self, headers: Message) -> None:
        """Raise `Refused` on a Host by which a page of another site could reach this server."""
        hosts = headers.get_all("Host", [])
        if len(hosts) > 1:
            raise Refused(400, "Host: expected one", code="invalid_host")
        if self.api_key is not None or not hosts:
            return
        name = host_name(hosts[0])
        if name != "localhost" and not _is_address(name) and name != self.host.lower().rstrip("."):
            raise Refused(
                403,
                f"Host: {show(hosts[0], 80)}: without a key this server answers to localhost, to IP "
                "addresses and to the name that `--host` gives, as a page of another site may stand behind any other. "
                "Use one of those, or start it with --api-key",
                code="foreign_host",
            )

    def check_origin(self, headers: Message) -> None:
        """Raise `Refused` on a page of a site that is neither this server nor named."""
        origin = headers.get("Origin")
        if (
            origin is None
            or self.allows(origin)
            or origin.partition("://")[2].lower() == headers.get("Host", "").lower()
        ):
            return
        raise Refused(
            403,
            f"Origin: {show(origin, 80)}: pages of other sites may not use this server, unless it is "
            "started with --allowed-origin and that origin",
            code="foreign_origin",
        )

    def check_key(self, headers: Message) -> None:
        """Raise `Refused` where a key is needed and not there."""
        if self.api_key is None:
            return
        scheme, _, key = headers.get("Authorization", "").partition(" ")
        given = key.strip().encode("utf-8", "surrogateescape")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given, self.api_key.encode()):
            raise Refused(401, "a valid key is needed: Authorization: Bearer KEY", code="invalid_api_key")

    def allows(self, origin: str) -> bool:
        """Return whether an Origin is one of those that were named."""
        return ANY in self.origins or origin.lower() in self.origins

    def cors(self, headers: Message, is_preflight: bool) -> dict[str, str]:
        """Return the headers by which a browser lets a page of a named origin read the answer.

        A preflight asks for headers by name: those are told back, as `*` would leave out Authorization (Fetch,
        CORS protocol), and OpenAI's browser client adds a dozen of its own.
        """
        origin = headers.get("Origin")
        if origin is None or not self.allows(origin):
            return {"Vary": "Origin"} if self.origins else {}
        out = {"Access-Control-Allow-Origin": ANY if ANY in self.origins else origin, "Vary": "Origin"}
        if not is_preflight:
            return out
        asked = [h.strip() for h in headers.get("Access-Control-Request-Headers", "").split(",")]
        names = [h for h in asked if TOKEN.fullmatch(h)] or ["Authorization", "Content-Type"]
        out["Access-Control-Allow-Methods"] = "GET, HEAD, POST, OPTIONS"
        out["Access-Control-Allow-Headers"] = ", ".join(names)
        out["Access-Control-Max-Age"] = str(PREFLIGHT_SECONDS)
        if headers.get("Access-Control-Request-Private-Network") == "true":
            out["Access-Control-Allow-Private-Network"] = "true"
        return out


def host_name(host: str) -> str:
    """Return the name or address in a Host header, without port, in lower case."""
    text = host.strip().lower()
    name = text[1:].partition("]")[0] if text.startswith("[") else text.rpartition(":")[0] if ":" in text else text
    return name.rstrip(".")


def _is_address(name: str) -> bool:
    try:
        ip_address(name.partition("%")[0])
    except ValueError:
        return False
    return True


def log_line(
    client: str, method: str, path: str, status: int, tokens: tuple[int, int] | None, seconds: float, key: str | None
) -> str:
    """Return the line of one request: time, client, method, path, status, tokens (prompt + new), seconds.

    What the client sent is escaped and shortened. The query is left out, as keys are sent in it; so is a key in the
    path.
    """
    shown_path = re.sub(r"//[^/@]*@", "//", path.partition("?")[0])
    if key:
        shown_path = shown_path.replace(key, "***")
    told = f"{tokens[0]}+{tokens[1]}" if tokens is not None else "-"
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    what = f"{show(method, 20)} {show(shown_path)}"
    return f"{stamp} {client} {what} {status} {told} tokens {seconds:.3f} s"
