"""The server process: three ports (Hub, CDN and a mirror) of one set of routes, and the control endpoint that tests use."""

from __future__ import annotations

import argparse
import json
import secrets
import sys
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path

from tests.local_hub import api, downloads, uploads
from tests.local_hub.exchange import Exchange, Refused, State, route
from tests.local_hub.faults import rule
from tests.local_hub.store import Store

ENDPOINTS = (api, downloads, uploads)
"""The modules whose import registers the routes."""


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of clients that went away; tell of everything else, so that a bug is seen."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


@route("POST", "/__control__/(?P<action>[a-z]+)", "control")
def control(x: Exchange, action: str) -> None:
    """Faults and counters. Whoever has the folder has the secret that this asks for."""
    if x.headers.get("X-Control") != x.state.secret.hex():
        raise Refused(403, "not the secret of this server")
    body = x.json()
    match action:
        case "fault":
            try:
                x.state.faults.add(rule(**body))
            except (TypeError, ValueError) as e:
                raise Refused(400, str(e)) from None
        case "clear":
            x.state.faults.clear()
        case "held":
            return x.reply({"held": x.state.faults.wait_for_held(body["count"], body["patience"])})
        case "counters":
            return x.reply(x.state.counters.read())
        case "reset":
            x.state.counters.read()
            x.state.counters.reset()
        case _:
            raise Refused(404, f"no such action: {action}")
    return x.reply({})


def secret_of(root: Path) -> bytes:
    """Return the key of signed URLs and of the control endpoint; kept, so that URLs outlive a restart."""
    path = root / "secret"
    if not path.exists():
        path.write_text(secrets.token_hex(16))
    return bytes.fromhex(path.read_text())


def main() -> None:
    """Serve until standard input ends, so that no server outlives its test run."""
    parser = argparse.ArgumentParser(prog="python -m tests.local_hub", description="A Hub on loopback, for tests.")
    parser.add_argument("root", type=Path, help="folder that holds everything")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--cdn-port", type=int, default=0)
    parser.add_argument("--mirror-port", type=int, default=0)
    parser.add_argument("--part-size", type=int, default=16 << 20, help="bytes per part of a multipart upload")
    parser.add_argument("--page-size", type=int, default=1000, help="rows per page of a tree")
    given = parser.parse_args()
    store = Store(given.root)
    state = State(store, secret_of(given.root), given.part_size, given.page_size)
    handler = type("Handler", (Exchange,), {"state": state})
    ports = (given.port, given.cdn_port, given.mirror_port)
    servers = [Server(("127.0.0.1", port), handler) for port in ports]
    state.hub_url, state.cdn_url, state.mirror_url = (f"http://127.0.0.1:{s.server_port}" for s in servers)
    for server in servers:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True).start()
    names = ("port", "cdn_port", "mirror_port")
    print(json.dumps({n: s.server_port for n, s in zip(names, servers, strict=True)}), flush=True)
    sys.stdin.read()
