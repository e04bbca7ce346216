"""Fault switches and counters of the local Hub.

Without a switch it answers as the Hub does (seen in huggingface_hub 2.4.0's own client code and in logs quoted in public
issues, among them raullenchai/Rapid-MLX 1122 and huggingface/swift-transformers 209): a regular file by a relative 307 to
`/api/resolve-cache/`, whose answer carries git's id as ETag; a large file by a 302 to a store on another host.

| kind | where | arguments |
| --- | --- | --- |
| `status` | any request | `code`, `retry_after` (seconds or a date, optional) |
| `limit` | any request | 429 for `seconds` from the first refusal on, with the headers of the Hub's rate limits |
| `endless` | any request | `code`; a body that never ends |
| `renamed` | a file, info | `to` the new name, `code` 307 or 301: redirected there first, by a relative address |
| `elsewhere` | a file | an absolute redirect to the Hub itself (or `to`), as mirrors send |
| `direct` | a file | 200 or 206 at once, without a redirect |
| `linked_etag` | a regular file | the redirect carries X-Linked-ETag too |
| `weak_etag` | a file's headers | `W/` before the etag |
| `drop` | a file's headers | the header `name` is missing |
| `listing` | info | `body` (text) and `type` instead of the listing |
| `commit` | info | `sha` instead of the commit's id |
| `row` | info | `key` of the first file's row gets `value` |
| `cut` | a file's bytes | `after` bytes the connection is closed |
| `slow` | a file's bytes | `bytes_per_second` |
| `hold` | a file's bytes, an upload, a commit | `after` bytes it waits until the faults are cleared (`HubFaults.held`) |
| `wrong` | a file's bytes | the byte `at` of what is sent is inverted |
| `html` | a file's bytes | an HTML page with status 200 instead |
| `ignore_range` | a file's bytes | 200 and the whole file |
| `content_range` | a file's bytes | Content-Range says one byte further |
| `etag` | a file's headers | another etag |
| `expired_download` | a large file's bytes | 403, as an expired signed URL |
| `cut_upload` | an upload | `after` received bytes the connection is closed |
| `expired` | an upload | 403, as an expired signed URL |

Every rule also takes `skip` (matching requests let through first), `method` and `on` (the kind of request, as counters name it).
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

ARGUMENTS: dict[str, dict[str, Any]] = {
    "status": {"code": 503, "retry_after": None},
    "limit": {"seconds": 1},
    "endless": {"code": 200},
    "renamed": {"to": "", "code": 307},
    "elsewhere": {"to": ""},
    "direct": {},
    "linked_etag": {},
    "weak_etag": {},
    "drop": {"name": ""},
    "listing": {"body": "", "type": "text/html"},
    "commit": {"sha": ""},
    "row": {"key": "", "value": None},
    "cut": {"after": 0},
    "slow": {"bytes_per_second": 100_000},
    "hold": {"after": 0},
    "wrong": {"at": 0},
    "html": {},
    "ignore_range": {},
    "content_range": {},
    "etag": {},
    "expired_download": {},
    "cut_upload": {"after": 0},
    "expired": {},
}
"""The kinds, and their arguments with defaults."""


@dataclass
class Rule:
    kind: str
    glob: str
    times: int
    skip: int = 0
    method: str | None = None
    on: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)


def rule(kind: str, path_glob: str, times: int = 1, **args: Any) -> Rule:
    """Return a checked rule; `times` -1 is for ever. Raises ValueError for an unknown kind or argument."""
    if kind not in ARGUMENTS:
        raise ValueError(f"unknown fault {kind!r}: expected one of {', '.join(ARGUMENTS)}")
    common = {k: args.pop(k) for k in ("skip", "method", "on") if k in args}
    if unknown := set(args) - set(ARGUMENTS[kind]):
        raise ValueError(f"fault {kind!r} has no argument {', '.join(sorted(unknown))}")
    return Rule(kind, path_glob, times, **common, arguments=ARGUMENTS[kind] | args)


class Faults:
    """The rules in force. A rule is used up after `times` requests."""

    def __init__(self) -> None:
        self._rules: list[Rule] = []
        self._lock = threading.Lock()
        self._changed = threading.Condition()
        self._held = self._cleared = 0
        self._limit_ends: float | None = None

    def add(self, new: Rule) -> None:
        with self._lock:
            self._rules.append(new)

    def clear(self) -> None:
        with self._lock:
            self._rules.clear()
        with self._changed:
            self._cleared += 1
            self._held = 0
            self._changed.notify_all()

    def limited(self, seconds: int) -> int:
        """Return how many seconds of a rate limit are left; it begins when it is first asked for."""
        with self._lock:
            if self._limit_ends is None:
                self._limit_ends = time.monotonic() + seconds
            return math.ceil(self._limit_ends - time.monotonic())

    def hold(self) -> None:
        """Wait until the faults are cleared."""
        with self._changed:
            cleared = self._cleared
            self._held += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._cleared > cleared)

    def wait_for_held(self, count: int, patience: float) -> int:
        """Return how many requests have been held since faults were cleared: once they are `count`, or after a while."""
        with self._changed:
            self._changed.wait_for(lambda: self._held >= count, patience)
            return self._held

    def take(self, kind: str, subjects: list[str], method: str, on: str) -> dict[str, Any] | None:
        """Return the arguments of the first rule of `kind` that fits the request, and count it; None without one."""
        with self._lock:
            for r in self._rules:
                fits = any(fnmatchcase(s, r.glob) for s in subjects)
                if (
                    r.kind != kind
                    or not fits
                    or r.times == 0
                    or r.method not in (None, method)
                    or r.on not in (None, on)
                ):
                    continue
                if r.skip:
                    r.skip -= 1
                    continue
                r.times -= 1
                return r.arguments
        return None


class Counters:
    """Requests per kind and method, bytes of bodies per path. Read only when no request is under way."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._under_way = 0
        self.reset()

    def reset(self) -> None:
        with self._changed:
            self._requests: Counter[str] = Counter()
            self._sent: Counter[str] = Counter()
            self._received: Counter[str] = Counter()
            self._log: list[dict[str, Any]] = []

    def begin(self) -> None:
        with self._changed:
            self._under_way += 1

    def end(self, kind: str, method: str, path: str, status: int, sent: int, received: int, span: str | None) -> None:
        with self._changed:
            self._under_way -= 1
            self._requests[kind] += 1
            self._requests[f"{method} {kind}"] += 1
            self._sent[path] += sent
            self._received[path] += received
            if len(self._log) < 20_000:
                row = {"method": method, "kind": kind, "path": path, "status": status, "range": span}
                self._log.append(row | {"sent": sent, "received": received})
            self._changed.notify_all()

    def read(self, patience: float = 5.0) -> dict[str, Any]:
        """Return all counts. A client may be done a moment before its request is counted: wait for that."""
        end = time.monotonic() + patience
        with self._changed:
            while self._under_way and (left := end - time.monotonic()) > 0:
                self._changed.wait(left)
            return {
                "requests": dict(self._requests),
                "sent": {k: v for k, v in self._sent.items() if v},
                "received": {k: v for k, v in self._received.items() if v},
                "bytes_sent": sum(self._sent.values()),
                "bytes_received": sum(self._received.values()),
                "log": list(self._log),
            }
