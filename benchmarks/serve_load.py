"""Many clients at once against `ds4convert serve`, a quarter of them leaving in the middle of a stream.

    ds4convert serve MLX_DIR --mtp --port 8080 &
    python benchmarks/serve_load.py --port 8080 --pid $! --clients 64 --seconds 60

Prints one JSON document: what the clients saw, what /metrics counted, and resident memory after warm-up and at the
end (Linux only). Exits 1 if a client saw an error, if a request is missing in /metrics, or if memory grew by over 10 %.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import threading
import time
from collections import Counter
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

WARM_UP_SECONDS = 0.25  # share of the time
PATIENCE_SECONDS = 60  # for the last requests to be counted
TOKENS = 12


class Load:
    """One run; `seen` counts how requests ended, as the clients saw it."""

    def __init__(self, port: int, clients: int, seconds: float, pid: int | None) -> None:
        self.port, self.clients, self.seconds, self.pid = port, clients, seconds, pid
        self.seen: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.until = 0.0

    def run(self) -> dict[str, Any]:
        """Run all clients, and return what they saw and what the server counted."""
        before = self.metrics()
        self.until = time.monotonic() + self.seconds
        threads = [threading.Thread(target=self._client, args=(n,)) for n in range(self.clients)]
        for thread in threads:
            thread.start()
        time.sleep(self.seconds * WARM_UP_SECONDS)
        warm = self.resident()
        for thread in threads:
            thread.join()
        patience = time.monotonic() + PATIENCE_SECONDS
        while True:  # a request is counted a moment after its client has the answer
            end, after = self.resident(), self.metrics()
            answered, left = (self._counted(before, after, status) for status in (200, 499))
            busy = after["queue_running"] or after["queue_waiting"]
            if time.monotonic() > patience or (not busy and answered + left >= self.seen["whole"] + self.seen["left"]):
                break
            time.sleep(0.1)
        return {
            "clients": self.clients, "seconds": self.seconds, "seen": dict(self.seen),
            "counted": {"200": answered, "499": left},
            "errors": sum(n for name, n in self.seen.items() if name not in ("whole", "left")),
            "all_counted": answered + left == self.seen["whole"] + self.seen["left"],
            "acceptance": after["acceptance_ratio"],
            "tokens": after["generated_tokens_total"] - before["generated_tokens_total"],
            "resident_after_warm_up": warm, "resident_at_end": end,
            "growth": round(end / warm - 1, 4) if warm and end else None,
        }  # fmt: skip

    @staticmethod
    def _counted(before: dict[str, float], after: dict[str, float], status: int) -> float:
        """Return how many completions the server has counted with a status."""
        names = [
            n for n in after if n.startswith("requests_total") and "completions" in n and f'status="{status}"' in n
        ]
        return sum(after[n] - before.get(n, 0) for n in names)

    def _client(self, number: int) -> None:
        rng, leaves = random.Random(number), number % 4 == 0
        while time.monotonic() < self.until:
            try:
                outcome = self._request(rng, leaves)
            except (OSError, HTTPException, ValueError) as e:
                outcome = f"{type(e).__name__}: {e}"
            with self.lock:
                self.seen[outcome] += 1

    def _request(self, rng: random.Random, leaves: bool) -> str:
        body = {
            "prompt": f"In the {rng.randrange(40)}th year",
            "max_tokens": TOKENS,
            "stream": leaves or rng.random() < 0.5,
        }
        connection = HTTPConnection("127.0.0.1", self.port, timeout=300)
        try:
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            if leaves and rng.random() < 0.3:
                time.sleep(rng.random())
                return "left"
            response = connection.getresponse()
            if response.status != 200:
                return f"status {response.status}"
            if leaves:
                response.read(200)
                return "left"
            raw = response.read().decode()
            return "whole" if raw.rstrip().endswith("[DONE]") or json.loads(raw)["usage"] else "cut short"
        finally:
            connection.close()

    def metrics(self) -> dict[str, float]:
        """Return the server's figures by name."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request("GET", "/metrics")
            lines = connection.getresponse().read().decode().splitlines()
        finally:
            connection.close()
        pairs = (line.removeprefix("ds4convert_").rpartition(" ") for line in lines if not line.startswith("#"))
        return {name: float(value) for name, _, value in pairs}

    def resident(self) -> int | None:
        """Return the resident bytes of the server, None without its process id."""
        path = Path(f"/proc/{self.pid}/statm")
        return int(path.read_text().split()[1]) * os.sysconf("SC_PAGESIZE") if self.pid and path.exists() else None


def is_good(facts: dict[str, Any]) -> bool:
    """Return whether nothing but the intended happened."""
    return not facts["errors"] and facts["all_counted"] and (facts["growth"] is None or facts["growth"] <= 0.1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--pid", type=int)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    chosen = parser.parse_args()
    facts = Load(chosen.port, chosen.clients, chosen.seconds, chosen.pid).run()
    print(json.dumps(facts, indent=2))
    sys.exit(0 if is_good(facts) else 1)
