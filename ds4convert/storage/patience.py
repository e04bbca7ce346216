"""One rule for trying again: how often, how long to wait, what a server's headers ask for. For every request."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

TRIES = 6
"""Failures in a row before an operation is given up."""

LONGEST_WAIT_S = 30.0
"""The longest wait of our own choosing; a server that names a time is waited for up to `LONGEST_ASKED_S`."""

LONGEST_ASKED_S = 330.0
"""A little over the Hub's window for rate limits, 5 minutes (its RateLimit-Policy header: `w=300`). Who asks for
more is not waited for: hours of silence help nobody."""

TRANSIENT = frozenset({408, 409, 412, 425, 429, 500, 502, 503, 504})
"""Answers that may be better next time; 409 and 412: somebody else committed meanwhile."""

_RESETS = re.compile(r"\br=0\s*;\s*t=(\d{1,6})")


def asked_wait(headers: Mapping[str, str]) -> float:
    """Return the seconds that an answer asks to wait: `RateLimit` (IETF draft), else `Retry-After`, a number or a date.

    `headers` are looked up case by case as the HTTP client does. 0 where neither is there or neither makes sense.
    """
    if found := _RESETS.search(headers.get("ratelimit") or ""):
        return float(found[1]) + 1.0
    text = (headers.get("retry-after") or "").strip()
    with suppress(ValueError, TypeError):
        if text.isdecimal():
            return float(text[:6])
        moment = parsedate_to_datetime(text)
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        return max(0.0, (moment - datetime.now(UTC)).total_seconds())
    return 0.0


@dataclass
class Patience:
    """The failures in a row of one operation. `tries` of them end it."""

    tries: int = TRIES
    first_s: float = 0.1
    failed: int = 0

    def progress(self) -> None:
        """Forget earlier failures: something was done since."""
        self.failed = 0

    def wait(self, asked_s: float = 0.0) -> float | None:
        """Count a failure; return the seconds to wait before the next try, None where there is none."""
        self.failed += 1
        if self.failed >= self.tries or asked_s > LONGEST_ASKED_S:
            return None
        own = min(LONGEST_WAIT_S, self.first_s * 2.0**self.failed)
        return max(asked_s, own)

    def again(self, asked_s: float = 0.0) -> bool:
        """Count a failure and sleep; return whether to try again."""
        seconds = self.wait(asked_s)
        if seconds is None:
            return False
        time.sleep(seconds)
        return True
