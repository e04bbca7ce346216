"""Starting, announcing and draining the server."""

from __future__ import annotations

import argparse
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from importlib import metadata, resources
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from ds4convert.errors import EnvironmentFault, UsageError
from ds4convert.generation import Warn, check_memory, finished, read_tokenizer, stop_tokens, why_no_head
from ds4convert.inference import load
from ds4convert.serving import seam
from ds4convert.serving.handler import Handler, Site
from ds4convert.serving.metrics import Metrics
from ds4convert.serving.validation import Limits

WAITING_CONNECTIONS = 128


@dataclass(frozen=True)
class Options:
    """The options of `ds4convert serve`; sizes in bytes, times in seconds."""

    mtp: bool = False
    draft_depth: int = 1
    host: str = "127.0.0.1"
    port: int = 8080
    api_key: str | None = None
    max_tokens: int = 4096
    max_body: int = 4 * 2**20
    cache_size: int = 10
    drain_seconds: int = 30
    temp: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        """Raise `UsageError` on a key that no client could send."""
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable() and self.api_key):
            raise UsageError("--api-key: expected printable ASCII characters")


class Server(ThreadingHTTPServer):
    """Threads per connection; the site knows when it drains."""

    daemon_threads = True
    request_queue_size = WAITING_CONNECTIONS

    def __init__(self, address: tuple[str, int], family: socket.AddressFamily, site: Site) -> None:
        self.address_family = family
        self.site = site
        self._open = 0
        self._lock = threading.Lock()
        super().__init__(address, lambda *args, **options: Handler(site, *args, **options))

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Handle one connection, counted."""
        self._count(1)
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._count(-1)

    def _count(self, change: int) -> None:
        with self._lock:
            self._open += change

    @property
    def is_idle(self) -> bool:
        """Whether no connection is being handled."""
        return self._open == 0

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log an error of a connection in one line."""
        import sys

        self.site.log(f"a connection failed: {sys.exc_info()[1]!r}")


def open_server(folder: Path, options: Options, log: Callable[[str], None], warn: Warn) -> Server:
    """Load the model and take the port. Raises a `Ds4Error` where the folder, mlx-lm or the port is no good."""
    record = finished(folder)
    config = load.read_config(folder)
    args = load.read_args(config, str(folder))
    if (doubt := seam.check_version(metadata.version("mlx-lm"))) is not None:
        warn(doubt)
    tokenizer = seam.with_tools(read_tokenizer(folder, stop_tokens(folder, config)))
    check_memory(folder, min(args.max_position_embeddings, 2 * options.max_tokens), options.dtype, warn)
    model, _ = load.load_model(folder, dtype=options.dtype)
    reason = None if model.head.present else why_no_head(folder, model, record)
    if options.mtp and reason:
        warn(f"--mtp has no effect: {reason}. Decoding without it")
    is_active = options.mtp and reason is None
    name = folder.resolve().name
    known = frozenset({name, "default_model", str(folder), str(folder.resolve())})
    limits = Limits(min(options.max_tokens, args.max_position_embeddings), args.max_position_embeddings, known)
    sampling = {"temp": options.temp, "top_p": options.top_p, "top_k": options.top_k, "min_p": options.min_p}
    cli_args = seam.server_args(folder, min(512, limits.max_tokens), sampling, options.cache_size)
    metrics = Metrics(is_active)
    family, address = _address(options.host, options.port, warn)
    provider = _provider(model, tokenizer, cli_args)
    fingerprint = f"ds4convert-{metadata.version('ds4convert')}-mlx-lm-{metadata.version('mlx-lm')}"
    page = (resources.files("ds4convert.manifests") / "pages" / "serve.html").read_bytes()
    site = Site(None, metrics, limits, name, fingerprint, page, options.api_key, options.max_body, log)  # type: ignore[arg-type]
    try:
        server = Server(address, family, site)
    except OSError as e:
        raise EnvironmentFault(
            f"{options.host}:{options.port}: cannot listen there: {e.strerror or e}; choose another --port or --host"
        ) from None
    site.decoder = seam.Decoder(provider, options.draft_depth if is_active else 0, limits.context, metrics)
    return server


def _provider(model: Any, tokenizer: Any, cli_args: argparse.Namespace) -> seam.Provider:
    from mlx_lm.utils import maybe_set_recommended_wired_limit

    maybe_set_recommended_wired_limit()
    return seam.Provider(model, tokenizer, cli_args)


def _address(host: str, port: int, warn: Warn) -> tuple[socket.AddressFamily, Any]:
    """Return the address to listen at; warns where others than this machine can reach it."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError) as e:
        raise UsageError(f"--host {host}: no such address: {e}") from None
    if not ip_address(str(address[0]).partition("%")[0]).is_loopback:
        warn(
            f"--host {host}: other machines can reach this server. It has no encryption; use --api-key, and a proxy "
            "with TLS before it"
        )
    return family, address


def url(server: Server) -> str:
    """Return where the page of the server is."""
    host, port = server.server_address[:2]
    return f"http://[{host!s}]:{port}" if ":" in str(host) else f"http://{host!s}:{port}"


def serve(server: Server, drain_seconds: int, log: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT; then take nothing new and finish what runs, for `drain_seconds` at most."""
    asked = threading.Event()

    def stop(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    while not asked.wait(0.2) and thread.is_alive() and server.site.decoder.is_healthy:
        pass
    is_broken = not asked.is_set()
    server.site.is_draining = True
    log("Draining: requests that run are finished, new ones are refused")
    until = time.monotonic() + drain_seconds
    while not server.is_idle and time.monotonic() < until and not is_broken:
        time.sleep(0.05)
    server.shutdown()
    server.server_close()
    server.site.decoder.stop_and_join()  # type: ignore[no-untyped-call,unused-ignore]
    if is_broken:
        raise EnvironmentFault("the generation thread has ended, so nothing can be served; the log says why")
