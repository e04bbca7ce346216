"""Starting, announcing and draining the server."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from importlib import metadata
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from ds4convert.errors import EnvironmentFault, UsageError
from ds4convert.generation.drafting import draft_depth
from ds4convert.generation.open_folder import Warn, check_memory, finished, head_reason, read_tokenizer, stop_tokens
from ds4convert.inference import load
from ds4convert.serving import seam
from ds4convert.serving.http.access import Policy, origin_of
from ds4convert.serving.http.handler import Handler, Site
from ds4convert.serving.metrics import Metrics
from ds4convert.serving.validation import Limits
from ds4convert.words.project import version
from ds4convert.words.templates import rendered

WAITING_CONNECTIONS = 128
LAST_WORDS_SECONDS = 2.0
"""Time that requests have to tell their clients that they were ended."""


@dataclass(frozen=True)
class Options:
    """The options of `ds4convert serve`; sizes in bytes, times in seconds.

    `mtp` None: with the head where there is one. `max_tokens` None: what the context leaves. `drafter`: a folder with
    the head to draft with. `draft_depth` None: what its kind of head drafts.
    """

    mtp: bool | None = None
    draft_depth: int | None = None
    confidence: float = 0.0
    drafter: Path | None = None
    host: str = "127.0.0.1"
    port: int = 8080
    api_key: str | None = None
    allowed_origin: tuple[str, ...] = ()
    max_tokens: int | None = None
    default_max_tokens: int = 32768
    max_body: int = 4 * 2**20
    cache_size: int = 10
    temp: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        """Raise `UsageError` on a key that no client could send, origins that no browser sends, and a head that is
        named and turned off."""
        if self.mtp is False and self.drafter is not None:
            raise UsageError("--drafter names a head to draft with; it does not go with --no-mtp")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable() and self.api_key):
            raise UsageError("--api-key: expected printable ASCII characters")
        for origin in self.allowed_origin:
            origin_of(origin)

    def limits(self, folder: Path, args: Any) -> Limits:
        """Return what requests may ask for; `args` are the model's sizes."""
        most = min(self.max_tokens or args.max_position_embeddings, args.max_position_embeddings)
        return Limits(
            most,
            min(self.default_max_tokens, most),
            args.max_position_embeddings,
            args.vocab_size,
            (folder.resolve().name, "default_model", str(folder), str(folder.resolve())),
            {"temperature": self.temp, "top_p": self.top_p, "top_k": self.top_k, "min_p": self.min_p},
        )


class Server(ThreadingHTTPServer):
    """A thread per connection."""

    daemon_threads = True
    request_queue_size = WAITING_CONNECTIONS

    def __init__(self, address: tuple[str, int], family: socket.AddressFamily, site: Site) -> None:
        self.address_family = family
        self.site = site
        super().__init__(address, lambda *args, **options: Handler(site, *args, **options))

    def close(self) -> None:
        """Give the port back and end the generation thread, at its next token where something runs."""
        self.server_close()
        self.site.decoder.stop_and_join()

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
    load.stored_parameters(folder, options.drafter)  # refuses broken files before a library is loaded
    limits = options.limits(folder, args)
    tokenizer = read_tokenizer(folder, stop_tokens(folder, config))
    check_memory(folder, limits.default_tokens, options.dtype, warn, options.drafter)
    model, _ = load.load_model(folder, dtype=options.dtype, require_manifest=False, drafter=options.drafter)
    reason = head_reason(folder, model, record, options.mtp, options.drafter, warn)
    is_active = options.mtp is not False and reason is None
    depth = draft_depth(model, options.draft_depth, options.confidence) if is_active else 0
    metrics = Metrics(is_active)
    policy = Policy(options.host, options.api_key, frozenset(map(origin_of, options.allowed_origin)))
    fingerprint = f"ds4convert-{version()}-mlx-lm-{metadata.version('mlx-lm')}"
    page = rendered("serve.html.jinja", {}, {}).encode()
    site = Site(
        None, metrics, limits, policy, fingerprint, page,  options.max_body, _safe(log),  # type: ignore[arg-type]
        request_seconds=Site.request_seconds + options.max_body / 2**20, has_head=reason is None,
    )  # fmt: skip
    server = _listen(site, options, warn)
    seam.keep_weights_wired()
    confidence = options.confidence
    site.decoder = seam.Decoder(model, tokenizer, depth, limits.context, options.cache_size, metrics, confidence)
    return server


def _listen(site: Site, options: Options, warn: Warn) -> Server:
    family, address = _address(options.host, options.port, warn)
    try:
        return Server(address, family, site)
    except OSError as e:
        raise EnvironmentFault(
            f"{options.host}:{options.port}: cannot listen there: {e.strerror or e}",
            hint="choose another --port or --host",
        ) from None


def _safe(log: Callable[[str], None]) -> Callable[[str], None]:
    """Return a log that never fails: the terminal may have been closed, and requests go on."""

    def write(text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            log(text)

    return write


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
    """Serve until SIGTERM, SIGINT or SIGHUP; then take nothing new and finish what runs, for `drain_seconds` at most.

    What runs longer is ended at its next token, and its client told. A second signal ends all at once.
    """
    site, asked = server.site, threading.Event()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    _take_signals(asked)
    try:
        thread.start()
        while not asked.wait(0.2) and thread.is_alive() and site.decoder.is_healthy:
            pass
        is_broken, site.is_draining = not asked.is_set(), True
        _safe(log)("Draining: requests that run are finished, new ones are refused")
        is_done = is_broken or _wait_idle(server, drain_seconds)
        site.decoder.abort()
        if not is_done:
            _safe(log)(f"Ending what still runs after {drain_seconds} s")
            _wait_idle(server, LAST_WORDS_SECONDS)
        server.shutdown()
    finally:
        server.close()
    if is_broken:
        raise EnvironmentFault("the generation thread has ended, so nothing can be served; the log says why")


def _take_signals(asked: threading.Event) -> None:
    """Turn the first signal into `asked`, the next one into `KeyboardInterrupt`; under nohup SIGHUP stays ignored."""

    def stop(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, stop)


def _wait_idle(server: Server, seconds: float) -> bool:
    """Wait until no request runs; returns whether that came within `seconds`."""
    until = time.monotonic() + seconds
    while not server.site.is_idle:
        if time.monotonic() >= until:
            return False
        time.sleep(0.05)
    return True
