"""Fault switches and counters of the local Hub.

| kind | where | arguments |
| --- | --- | --- |
| `status` | any request | `code`, `retry_after` (seconds, optional) |
| `cut` | a file's bytes | `after` bytes the connection is closed |
| `slow` | a file's bytes | `bytes_per_second` |
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

import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

ARGUMENTS: dict[str, dict[str, Any]] = {
    "status": {"code": 503, "retry_after": None},
    "cut": {"after": 0},
    "slow": {"bytes_per_second": 100_000},
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

    def add(self, new: Rule) -> None:
        with self._lock:
            self._rules.append(new)

    def clear(self) -> None:
        with self._lock:
            self._rules.clear()

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
