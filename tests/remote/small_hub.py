"""A hub of one repo on loopback: model info and resolve with ranges, as huggingface_hub's client asks for them."""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

COMMIT = "c0ffee" + "0" * 34


@dataclass
class SmallHub:
    """The repo `owner/model`. `faults` are taken one per request of a shard, from the front."""

    files: dict[str, Path]
    faults: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    sent: int = 0
    url: str = ""

    @property
    def requests(self) -> int:
        """Return how many requests were answered, without the client's own look at which harness it runs in."""
        return len([p for p in self.paths if "owner" in p])

    def digest(self, name: str) -> str:
        raw = self.files[name].read_bytes() if name in self.files else b""
        if name.endswith(".safetensors"):
            return hashlib.sha256(raw).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(raw) + raw).hexdigest()

    def info(self) -> dict[str, Any]:
        rows: list[dict[str, Any]] = []
        for name in [*self.files, *self.names]:
            size = self.files[name].stat().st_size if name in self.files else 0
            row: dict[str, Any] = {"rfilename": name, "size": size, "blobId": self.digest(name)}
            if name.endswith(".safetensors"):
                row["lfs"] = {"sha256": self.digest(name), "size": size, "pointerSize": 130}
            rows.append(row)
        return {"id": "owner/model", "sha": COMMIT, "siblings": rows, "private": False, "tags": [], "downloads": 0}


def serve(hub: SmallHub) -> ThreadingHTTPServer:
    """Start serving on a free port and set `hub.url`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def reply(self, status: int, body: bytes, extra: dict[str, str] | None = None, cut: int | None = None) -> None:
            self.send_response(status)
            for key, value in ({"Content-Length": str(len(body))} | (extra or {})).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            self.wfile.write(body[:cut])
            hub.sent += len(body[:cut])
            if cut is not None:
                self.close_connection = True

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlparse(self.path).path)
            hub.paths.append(path)
            if path.startswith("/api/models/owner/model/tree/"):
                rows = [
                    {"type": "file", "path": r["rfilename"], "size": r["size"], "oid": r["blobId"]}
                    | (
                        {"lfs": {"oid": r["lfs"]["sha256"], "size": r["size"], "pointerSize": 130}}
                        if "lfs" in r
                        else {}
                    )
                    for r in hub.info()["siblings"]
                ]
                return self.reply(200, json.dumps(rows).encode())
            if path.startswith("/api/models/owner/model"):
                return self.reply(200, json.dumps(hub.info()).encode(), {"Content-Type": "application/json"})
            name = path.partition(f"/owner/model/resolve/{COMMIT}/")[2]
            if name not in hub.files:
                code = "EntryNotFound" if path.startswith("/owner/model/") else "RepoNotFound"
                return self.reply(404, b"", {"X-Error-Code": code})
            return self.file(name)

        def file(self, name: str) -> None:
            raw, size = hub.files[name].read_bytes(), hub.files[name].stat().st_size
            fault = hub.faults.pop(0) if hub.faults and name.endswith(".safetensors") else ""
            tag = "0" * 64 if fault == "etag" else hub.digest(name)
            extra = {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            if fault.isdigit():
                return self.reply(int(fault), b"", {"Retry-After": "0"})
            if fault == "html":
                return self.reply(200, b"<html>sign in</html>", extra)
            wanted = self.headers.get("Range")
            if not wanted or fault == "whole":
                return self.reply(200, raw, extra)
            first, last = wanted.removeprefix("bytes=").split("-")
            start, end = int(first), min(int(last or size - 1), size - 1)
            extra["Content-Range"] = f"bytes {start + (fault == 'shifted')}-{end}/{size}"
            return self.reply(206, raw[start : end + 1], extra, 10 if fault == "cut" else None)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    return server
