"""Counters of the server, and their text for Prometheus (text exposition format 0.0.4).

A few dozen numbers with fixed labels need no client library: a lock and a table do.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from dataclasses import dataclass, field
from typing import Protocol

PREFIX = "ds4convert_"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)

COUNTERS = {
    "prompt_tokens_total": "Tokens of prompts.",
    "cached_tokens_total": "Tokens of prompts that were found in the prompt cache.",
    "generated_tokens_total": "Tokens that were generated.",
    "passes_total": "Backbone passes after the prompt.",
    "drafted_tokens_total": "Tokens that the head drafted.",
    "accepted_tokens_total": "Drafted tokens that the backbone accepted.",
    "disconnects_total": "Requests whose client left before the end.",
}
HISTOGRAMS = {
    "request_seconds": "Time of a completion, from the request to the end of the response.",
    "queue_seconds": "Time that a completion waited for its turn.",
    "first_token_seconds": "Time from the request to the first token.",
}
POSITIONS = {
    "drafted_at_total": "Tokens that the head drafted, by place in the pass.",
    "accepted_at_total": "Drafted tokens that the backbone accepted, by place in the pass.",
}
REQUESTS = "requests_total"


class Counts(Protocol):
    """The figures of one generation; see `inference.decode.DecodeStats`."""

    generated: int
    passes: int
    drafted: int
    accepted: int
    drafted_at: list[int]
    accepted_at: list[int]


@dataclass
class Histogram:
    """Counts of values per bucket, their sum and number."""

    buckets: list[int] = field(default_factory=lambda: [0] * (len(SECONDS) + 1))
    total: float = 0.0

    def add(self, seconds: float) -> None:
        """Count one value."""
        self.buckets[bisect_left(SECONDS, seconds)] += 1
        self.total += seconds

    def lines(self, name: str) -> list[str]:
        """Return the series of one histogram; buckets are cumulative."""
        out, count = [], 0
        for bound, here in zip([*map(str, SECONDS), "+Inf"], self.buckets, strict=True):
            count += here
            out.append(f'{name}_bucket{{le="{bound}"}} {count}')
        return [*out, f"{name}_sum {self.total:.6f}", f"{name}_count {count}"]


class Metrics:
    """All figures of one server; every method may be called from any thread."""

    def __init__(self, mtp_active: bool) -> None:
        self.mtp_active = mtp_active
        self._lock = threading.Lock()
        self._counters = dict.fromkeys(COUNTERS, 0)
        self._histograms = {name: Histogram() for name in HISTOGRAMS}
        self._positions: dict[str, list[int]] = {name: [] for name in POSITIONS}
        self._requests: dict[tuple[str, int], int] = {}
        self._waiting = self._running = 0

    def request(self, endpoint: str, status: int) -> None:
        """Count a finished request; status 499 is a client that left."""
        with self._lock:
            self._requests[endpoint, status] = self._requests.get((endpoint, status), 0) + 1

    def add(self, name: str, count: int = 1) -> None:
        """Raise a counter."""
        with self._lock:
            self._counters[name] += count

    def time(self, name: str, seconds: float) -> None:
        """Count a duration."""
        with self._lock:
            self._histograms[name].add(seconds)

    def queue(self, waiting: int = 0, running: int = 0) -> None:
        """Change the number of requests that wait, and of those that are decoded."""
        with self._lock:
            self._waiting += waiting
            self._running += running

    def generation(self, counts: Counts) -> None:
        """Add what one generation did."""
        with self._lock:
            self._counters["generated_tokens_total"] += counts.generated
            self._counters["passes_total"] += counts.passes
            self._counters["drafted_tokens_total"] += counts.drafted
            self._counters["accepted_tokens_total"] += counts.accepted
            for name, found in (("drafted_at_total", counts.drafted_at), ("accepted_at_total", counts.accepted_at)):
                add_counts(self._positions[name], found)

    def text(self) -> str:
        """Return all series."""
        with self._lock:
            c, accepted = self._counters, self._counters["accepted_tokens_total"]
            gauges = {
                "mtp_active": ("Whether the head drafts.", int(self.mtp_active)),
                "acceptance_ratio": ("Accepted by drafted tokens.", _ratio(accepted, c["drafted_tokens_total"])),
                "tokens_per_pass": ("Tokens per backbone pass.", 1 + _ratio(accepted, c["passes_total"])),
                "queue_waiting": ("Completions that wait for their turn.", self._waiting),
                "queue_running": ("Completions that are decoded.", self._running),
            }  # fmt: skip
            lines = _head(REQUESTS, "Finished requests; 499 is a client that left.", "counter")
            for (endpoint, status), count in sorted(self._requests.items()):
                lines.append(f'{PREFIX}{REQUESTS}{{endpoint="{endpoint}",status="{status}"}} {count}')
            for name, text in COUNTERS.items():
                lines += [*_head(name, text, "counter"), f"{PREFIX}{name} {c[name]}"]
            for name, text in POSITIONS.items():
                lines += _head(name, text, "counter")
                lines += [f'{PREFIX}{name}{{position="{n}"}} {x}' for n, x in enumerate(self._positions[name], 1)]
            for name, (text, value) in gauges.items():
                lines += [*_head(name, text, "gauge"), f"{PREFIX}{name} {value:g}"]
            for name, text in HISTOGRAMS.items():
                lines += [*_head(name, text, "histogram"), *self._histograms[name].lines(PREFIX + name)]
        return "\n".join(lines) + "\n"


def add_counts(counts: list[int], more: list[int]) -> None:
    """Add counts by place, in place."""
    counts += [0] * (len(more) - len(counts))
    for place, count in enumerate(more):
        counts[place] += count


def _head(name: str, text: str, kind: str) -> list[str]:
    return [f"# HELP {PREFIX}{name} {text}", f"# TYPE {PREFIX}{name} {kind}"]


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
