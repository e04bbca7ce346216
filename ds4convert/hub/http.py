"""Requests to the Hub: its rule for redirects, bounded bodies, a floor for the speed, failures in our words.

The rule is that of the Hub's own client (huggingface_hub 2.4.0, `get_hf_file_metadata`): relative redirects are
followed with the token; the first other answer decides. Its `X-Linked-ETag`, else its `ETag`, names the file; a
redirect to another host is followed without the token, and what that host says of the file (its ETag) means nothing.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urljoin, urlsplit

from ds4convert.errors import EnvironmentFault
from ds4convert.hub.errors import AGAIN, hub_errors
from ds4convert.storage.patience import LONGEST_ASKED_S, TRANSIENT, asked_wait
from ds4convert.words.terminal import show

PIECE_BYTES = 1 << 20
MAX_ERROR_BYTES = 64 << 10
"""Read of an answer that is an error: its words are short."""

MAX_HOPS = 8
SLOWEST_BYTES_PER_S = 2_000
SLOW_S = 30.0
"""A connection below `SLOWEST_BYTES_PER_S` over this time is given up and made anew."""


class Again(Exception):
    """An answer that may be better next time; `wait_s` is what the Hub asked for."""

    def __init__(self, why: str, wait_s: float = 0.0) -> None:
        super().__init__(why)
        self.wait_s = wait_s


@dataclass
class Told:
    """What the Hub said of a file on the way to its bytes; "" where it said nothing.

    `linked` is an `X-Linked-ETag`, which always speaks of the file; `etag` the plain one of the answer that decides.
    """

    linked: str = ""
    etag: str = ""
    commit: str = ""
    headers: list[Mapping[str, str]] = field(default_factory=list)


def normal_etag(text: str | None) -> str:
    """Return an ETag without its quotes and the mark of a weak one."""
    return (text or "").strip().removeprefix("W/").strip('"')


@contextmanager
def get(url: str, repo: str, token: str | None, wanted: Mapping[str, str]) -> Iterator[tuple[Any, Told]]:
    """Yield the answer at the end of the redirects, unread, and what the Hub said of the file on the way.

    Raises `Again` for failures that may pass, and errors of ours for all others.
    """
    from huggingface_hub import constants, errors, get_session
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined,unused-ignore]

    # Bodies are read as they come, within bounds, so none may be packed: the client would ask for gzip by itself.
    with_token = build_hf_headers(token=token, headers={"accept-encoding": "identity"} | dict(wanted))
    transport = errors.HTTPError  # type: ignore[attr-defined,unused-ignore]
    told, home, at_hub = Told(), _origin(url), True
    try:
        for _ in range(MAX_HOPS):
            head = with_token if _origin(url) == home else _without_token(with_token)
            timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
            with get_session().stream("GET", url, headers=head, timeout=timeout, follow_redirects=False) as answer:
                place = answer.headers.get("location")
                if answer.status_code in {301, 302, 303, 307, 308} and place:
                    there = _joined(url, place, repo)
                    relative = not urlsplit(place).netloc
                    if len(answer.headers.get("content-length", "0" * 9)) < 6:  # read, so that the connection is kept
                        bounded(answer, MAX_ERROR_BYTES, cut=True)
                    _note(told, answer.headers, decides=at_hub and not relative)
                    at_hub = at_hub and (relative or _origin(there) == home)
                    url = there
                    continue
                if answer.status_code >= 400 or not 200 <= answer.status_code < 300:
                    _refuse(answer, repo, at_hub)
                _note(told, answer.headers, decides=at_hub)
                yield answer, told
                return
        raise EnvironmentFault(f"{repo}: over {MAX_HOPS} redirects, one after the other; is HF_ENDPOINT a Hub?")
    except errors.OfflineModeIsEnabled as e:
        with hub_errors(repo):
            raise e
    except transport as e:
        if isinstance(e, errors.HfHubHTTPError):
            raise
        name = type(e).__name__
        what = "the Hub cannot be reached" if name.startswith(("Connect", "Proxy")) else "the connection failed"
        raise Again(f"{what} ({name})") from None


def _joined(url: str, place: str, repo: str) -> str:
    """Return where a redirect leads. Raises `EnvironmentFault` for what is no address of HTTP: `file:`, half a host."""
    try:
        there = urljoin(url, place)
        split = urlsplit(there)
        if split.scheme in {"http", "https"} and split.hostname and split.port != 0:
            return there
    except ValueError:
        pass
    raise EnvironmentFault(
        f"{repo}: the Hub redirects to {show(place)}, expected an address of http or https; is HF_ENDPOINT a Hub?"
    )


def _origin(url: str) -> tuple[str, str]:
    split = urlsplit(url)
    return split.scheme, split.netloc


def _without_token(headers: Mapping[str, str]) -> dict[str, str]:
    return {k: v for k, v in headers.items() if k.lower() not in {"authorization", "cookie"}}


def _note(told: Told, headers: Mapping[str, str], decides: bool) -> None:
    """Keep what an answer says of the file. An `ETag` counts only of the answer that decides; the linked one always."""
    told.headers.append(headers)
    told.commit = told.commit or headers.get("x-repo-commit") or ""
    told.linked = told.linked or normal_etag(headers.get("x-linked-etag"))
    told.etag = told.etag or (normal_etag(headers.get("etag")) if decides else "")


def _refuse(answer: Any, repo: str, at_hub: bool) -> None:
    """Raise for an answer that is no success. What it says is read up to a bound."""
    from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined,unused-ignore]

    if answer.status_code in TRANSIENT or (answer.status_code == 403 and not at_hub):  # an expired signed address
        wait = asked_wait(answer.headers)
        asks = f" and asks to wait {wait:,.0f} seconds" if wait > LONGEST_ASKED_S else ""
        raise Again(f"the Hub answered HTTP {answer.status_code}{asks}", wait)
    nameless = "authorization" not in answer.request.headers
    if answer.status_code == 403 and nameless and answer.headers.get("x-error-code") != "GatedRepo":
        raise EnvironmentFault(
            f"{repo}: the Hub, or a proxy on the way to it, refused to answer (HTTP 403), and no token was given",
            hint=(
                "Open the repo's page from this machine; where it needs a login: `hf auth login`, HF_TOKEN or --token"
            ),
        )
    if answer.status_code < 400:
        raise EnvironmentFault(f"{repo}: the Hub answered HTTP {answer.status_code}, which is no answer. {AGAIN}")
    # The client reads the words as UTF-8 and fails on others.
    words = bounded(answer, MAX_ERROR_BYTES, cut=True).decode("utf-8", "replace").encode()
    kept = {
        k: v
        for k, v in answer.headers.items()
        if k.lower() not in {"content-encoding", "transfer-encoding", "content-length"}
    }
    short = type(answer)(answer.status_code, headers=kept, content=words, request=answer.request)
    with hub_errors(repo):
        hf_raise_for_status(short)


def pieces(answer: Any) -> Iterator[bytes]:
    """Yield an answer's bytes as they come. Raises `Again` where they come more slowly than the floor."""
    begun, came = time.monotonic(), 0
    for piece in answer.iter_raw():  # without a size: the client would hold back what is less
        yield piece
        came += len(piece)
        spent = time.monotonic() - begun
        if spent >= SLOW_S:
            if came < SLOWEST_BYTES_PER_S * spent:
                raise Again(f"the bytes came at {came / spent:,.0f} a second")
            begun, came = time.monotonic(), 0


def _unpacked(answer: Any, most: int) -> Iterator[bytes]:
    """Yield an answer's bytes, unpacked where they are gzip or deflate; no piece is much longer than `most`."""
    if (answer.headers.get("content-encoding") or "").strip().lower() not in {"gzip", "x-gzip", "deflate"}:
        yield from pieces(answer)
        return
    unpack = zlib.decompressobj(zlib.MAX_WBITS | 32)  # gzip and zlib, told apart by their first bytes
    try:
        for piece in pieces(answer):
            yield unpack.decompress(piece, most + 1)
    except zlib.error:
        raise Again("the bytes came packed, and broken") from None


def bounded(answer: Any, most: int, cut: bool = False) -> bytes:
    """Return an answer's whole body, at most `most` bytes. Raises `EnvironmentFault` for a longer one, or cuts it.

    A body that comes packed although it was asked for as it is (some proxies do so) is unpacked, within the bound.
    """
    out = bytearray()
    for piece in _unpacked(answer, most):
        out += piece
        if len(out) > most:
            if cut:
                break
            raise EnvironmentFault(f"the Hub's answer is longer than {most:,} bytes; is HF_ENDPOINT a Hub?")
    return bytes(out[:most])
