"""Files: `resolve` with the Hub's headers, and the "CDN" on a second port that large files are redirected to."""

from __future__ import annotations

import hashlib
import re
import time
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote, unquote, urlsplit

from tests.local_hub.exchange import CHUNK, REPO, Exchange, Refused, route
from tests.local_hub.store import Entry, Missing

PAGE = b"<!DOCTYPE html><html><head><title>Sign in</title></head><body>Please sign in.</body></html>"


HEADERS = ("X-Linked-ETag", "X-Linked-Size", "X-Repo-Commit", "X-Xet-Hash", "ETag", "Content-Length", "Accept-Ranges")
"""What an answer of the Hub may carry and a mirror may drop (fault `drop`)."""


def kept(x: Exchange, headers: dict[str, str]) -> dict[str, str]:
    """Return the headers without those that a fault `drop` names; its answers have them neither here nor later."""
    for _ in HEADERS:
        if (fault := x.fault("drop")) is not None:
            headers = {k: v for k, v in headers.items() if k.lower() != fault["name"].lower()}
    return headers


def moved(x: Exchange, repo: str) -> bool:
    """Answer a request for a repo that was renamed: the Hub sends clients to the new name first."""
    if (fault := x.fault("renamed")) is None:
        return False
    there = quote(unquote(urlsplit(x.path).path).replace(repo, fault["to"], 1))
    x.answer(fault["code"], {"Location": there + (f"?{urlsplit(x.path).query}" if "?" in x.path else "")})
    return True


@route("GET HEAD", f"/{REPO}/resolve/(?P<rev>[^/]+)/(?P<path>.+)", "resolve")
def resolve(x: Exchange, repo: str, rev: str, path: str) -> None:
    if moved(x, repo):
        return None
    at_mirror = f"//{x.headers.get('Host')}" in x.state.mirror_url
    if at_mirror and (fault := x.fault("elsewhere")) is not None:  # a mirror that passes requests on to the Hub itself
        return x.answer(302, {"Location": (fault["to"] or x.state.hub_url) + x.path})
    found, commit = x.readable(repo, rev)
    x.check_gate(found)
    known = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
    entry = commit.files.get(path)
    if entry is None:
        raise Refused(404, "Entry not found", "EntryNotFound", known)
    linked = {"X-Linked-Size": str(entry.size)}
    if not entry.lfs:
        if x.fault("direct") is not None:  # as some mirrors do, and as the Hub itself once did
            return send(x, entry, known)
        tag = f'"{entry.etag}"'
        there = f"/api/resolve-cache/models/{repo}/{commit.oid}/{quote(path)}"
        place = f"{there}?{quote(path, safe='')}=&etag={quote(tag, safe='')}"
        linked |= {"X-Linked-ETag": tag} if x.fault("linked_etag") is not None else {}
        return x.answer(307, kept(x, known | linked | {"Location": place}))
    place = x.state.sign(f"/cdn/{repo}/{commit.oid}/{quote(path)}")
    tag = etag(x, entry)
    linked |= {"X-Linked-ETag": tag, "ETag": f'"{entry.oid}"', "X-Xet-Hash": entry.sha256[::-1]}
    if x.fault("direct") is not None:
        return send(x, entry, known | linked)
    return x.answer(302, kept(x, known | linked | {"Location": x.state.cdn_url + place}))


@route("GET HEAD", f"/api/resolve-cache/models/{REPO}/(?P<commit>[0-9a-f]+)/(?P<path>.+)", "resolve-cache")
def from_cache(x: Exchange, repo: str, commit: str, path: str) -> None:
    """A regular file, behind the Hub's relative redirect: here stands its ETag."""
    found, at = x.readable(repo, commit)
    x.check_gate(found)
    entry = at.files.get(path)
    if entry is None:
        raise Refused(404, "Entry not found", "EntryNotFound")
    send(x, entry, {"X-Repo-Commit": at.oid, "Accept-Ranges": "bytes"})


@route("GET HEAD", f"/cdn/{REPO}/(?P<commit>[0-9a-f]+)/(?P<path>.+)", "file")
def from_cdn(x: Exchange, repo: str, commit: str, path: str) -> None:
    x.check_signature()
    if x.command == "GET" and x.fault("expired_download") is not None:
        raise Refused(403, "Request has expired")
    entry = x.state.store.commit_of(x.state.store.repo(repo), commit).files.get(path)
    if entry is None:
        raise Missing("EntryNotFound", "no such object")
    # A store has an ETag of its own, which looks like a digest and is none of ours.
    send(x, entry, {"Accept-Ranges": "bytes", "ETag": f'"{hashlib.sha256(entry.sha256.encode()).hexdigest()}"'})


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
    if x.fault("weak_etag") is not None:
        tag = f"W/{tag}"
    headers = {"Content-Type": "application/octet-stream", "ETag": tag} | headers
    if x.command == "HEAD":
        return x.answer(200, kept(x, headers | {"Content-Length": str(entry.size)}))
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
    x.begin(206 if span else 200, kept(x, headers))
    send_bytes(x, x.state.store.blob(entry.sha256), start, end - start + 1)


def send_bytes(x: Exchange, path: Path, start: int, count: int) -> None:
    slow, wrong, cut, hold = x.fault("slow"), x.fault("wrong"), x.fault("cut"), x.fault("hold")
    left = count if cut is None else min(count, cut["after"])
    with path.open("rb") as file:
        if hold is not None:
            before = min(left, hold["after"])
            if before:
                send_quickly(x, file, start, before)
            x.state.faults.hold()
            start, left = start + before, left - before
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
