"""Files: `resolve` with the Hub's headers, and the "CDN" on a second port that large files are redirected to."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote

from tests.hub.exchange import CHUNK, REPO, Exchange, Refused, route
from tests.hub.store import Entry, Missing

PAGE = b"<!DOCTYPE html><html><head><title>Sign in</title></head><body>Please sign in.</body></html>"


@route("GET HEAD", f"/{REPO}/resolve/(?P<rev>[^/]+)/(?P<path>.+)", "resolve")
def resolve(x: Exchange, repo: str, rev: str, path: str) -> None:
    found, commit = x.readable(repo, rev)
    x.check_gate(found)
    known = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
    entry = commit.files.get(path)
    if entry is None:
        raise Refused(404, "Entry not found", "EntryNotFound", known)
    if not entry.lfs:
        return send(x, entry, known)
    place = x.state.sign(f"/cdn/{repo}/{commit.oid}/{quote(path)}")
    linked = {"X-Linked-Size": str(entry.size), "X-Linked-ETag": etag(x, entry), "ETag": f'"{entry.oid}"'}
    return x.answer(302, known | linked | {"Location": x.state.cdn_url + place})


@route("GET HEAD", f"/cdn/{REPO}/(?P<commit>[0-9a-f]+)/(?P<path>.+)", "file")
def from_cdn(x: Exchange, repo: str, commit: str, path: str) -> None:
    x.check_signature()
    if x.command == "GET" and x.fault("expired_download") is not None:
        raise Refused(403, "Request has expired")
    entry = x.state.store.commit_of(x.state.store.repo(repo), commit).files.get(path)
    if entry is None:
        raise Missing("EntryNotFound", "no such object")
    send(x, entry, {"Accept-Ranges": "bytes"})


def etag(x: Exchange, entry: Entry) -> str:
    return f'"{entry.etag}"' if x.fault("etag") is None else f'"{entry.etag[::-1]}"'


def span_of(asked: str | None, size: int) -> tuple[int, int] | None:
    """Return first and last byte that a Range header asks for; None for the whole file. Raises Refused (416)."""
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", asked or "")
    if not found or found.groups() == ("", ""):
        return None
    first, last = found.groups()
    start = int(first) if first else max(size - int(last), 0)
    end = min(int(last), size - 1) if first and last else size - 1
    if start >= size or start > end:
        raise Refused(416, "Range Not Satisfiable", headers={"Content-Range": f"bytes */{size}"})
    return start, end


def send(x: Exchange, entry: Entry, headers: dict[str, str]) -> None:
    """Send a file or a range of it from disk, with the faults that concern a file's bytes."""
    tag = etag(x, entry)
    headers = {"Content-Type": "application/octet-stream", "ETag": tag} | headers
    if x.command == "HEAD":
        return x.answer(200, headers | {"Content-Length": str(entry.size)})
    if x.fault("html") is not None:
        return x.answer(200, headers | {"Content-Type": "text/html"}, PAGE)
    span = span_of(x.headers.get("Range"), entry.size)
    if x.headers.get("If-Range", tag) != tag or (span and x.fault("ignore_range") is not None):
        span = None
    start, end = span or (0, entry.size - 1)
    headers["Content-Length"] = str(end - start + 1)
    if span:
        shift = 0 if x.fault("content_range") is None else 1
        headers["Content-Range"] = f"bytes {start + shift}-{end + shift}/{entry.size}"
    for _ in x.chunks():
        pass
    x.begin(206 if span else 200, headers)
    send_bytes(x, x.state.store.blob(entry.sha256), start, end - start + 1)


def send_bytes(x: Exchange, path: Path, start: int, count: int) -> None:
    slow, wrong, cut = x.fault("slow"), x.fault("wrong"), x.fault("cut")
    left = count if cut is None else min(count, cut["after"])
    with path.open("rb") as file:
        if slow is not None or wrong is not None:
            send_slowly(x, file, start, left, slow and slow["bytes_per_second"], wrong and wrong["at"])
        elif left:
            send_quickly(x, file, start, left)
    if cut is not None:
        x.hang_up()


def send_quickly(x: Exchange, file: BinaryIO, start: int, count: int) -> None:
    x.wfile.flush()
    try:
        x.connection.sendfile(file, start, count)
    finally:
        x.sent += file.tell() - start  # sendfile leaves the position behind what went out, also when it failed


def send_slowly(x: Exchange, file: BinaryIO, start: int, count: int, speed: int | None, at: int | None) -> None:
    """Send `count` bytes, at `speed` bytes per second if given, with the byte `at` (from the range's start) inverted."""
    file.seek(start)
    size = max(1, speed // 20) if speed else CHUNK
    done = 0
    while done < count:
        piece = bytearray(file.read(min(size, count - done)))
        if at is not None and done <= at < done + len(piece):
            piece[at - done] ^= 0xFF
        x.wfile.write(piece)
        done += len(piece)
        x.sent += len(piece)
        if speed:
            time.sleep(len(piece) / speed)
