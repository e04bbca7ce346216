"""Which format for which layer and role, so that a model fits: a choice of least total error within a number of bytes.

Pure: options in, choices out. Each unit (a role in a layer) has options of some bytes and some error. On the lower
convex hull of each unit's options, a step to the next larger option gains less error per byte than the one before, so
taking all steps of all units in the order of that gain (which is what a Lagrange multiplier that sinks does) gives a
least error for the bytes it ends with: no choice of at most as many bytes has less. The bytes that are left over after
the last step that fits are filled with whatever other options still do, off the hulls too. What the step that did not
fit would gain with those bytes, were it divisible, bounds how far the choice can be from the best: `gap`.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ds4convert.errors import UsageError

LOOK_BACK = 32
"""Last steps that may be given up for a better filling."""


@dataclass(frozen=True, slots=True, order=True)
class Option:
    """A format of a unit: its bytes and its error (relative squared error times the weight of what it is lost on)."""

    format: str
    size: int
    error: float


Unit = tuple[str, int | None]
"""A role, as recipes call it, and a layer; None for what is not in a layer."""


def key(unit: Unit) -> tuple[str, int]:
    """Return what units are sorted by."""
    return unit[0], -1 if unit[1] is None else unit[1]


@dataclass(frozen=True)
class Choice:
    """An option for each unit; total bytes and error, and the most that any other choice could have less error."""

    options: Mapping[Unit, Option]
    size: int
    error: float
    gap: float


@dataclass(frozen=True, slots=True)
class _Step:
    gain: float
    unit: Unit
    to: Option
    size: int
    error: float


def hull(options: Sequence[Option]) -> list[Option]:
    """Return the options on the lower convex hull of error over size, smallest first."""
    best: list[Option] = []
    for o in sorted(options, key=lambda o: (o.size, o.error, o.format)):
        if best and o.error >= best[-1].error:
            continue
        while len(best) > 1 and _slope(best[-2], best[-1]) <= _slope(best[-2], o):
            best.pop()
        best.append(o)
    return best


def _slope(a: Option, b: Option) -> float:
    """Return the error gained per byte from `a` to the larger `b`."""
    return (a.error - b.error) / (b.size - a.size)


class Optimiser:
    """All choices of some units: made once, asked for any number of bytes."""

    def __init__(self, units: Mapping[Unit, Sequence[Option]]) -> None:
        hulls = {unit: hull(options) for unit, options in units.items()}
        self.units = units
        self.least = {unit: h[0] for unit, h in hulls.items()}
        self.size = sum(o.size for o in self.least.values())
        self.error = sum(o.error for o in self.least.values())
        # A unit's steps come in order by themselves: on a hull the gain falls.
        lists = [
            [_Step(_slope(a, b), unit, b, b.size - a.size, a.error - b.error) for a, b in pairwise(h)]
            for unit, h in hulls.items()
        ]
        self.steps = list(heapq.merge(*lists, key=lambda s: (-s.gain, *key(s.unit))))

    def choose(self, limit: int) -> Choice:
        """Return the choice for at most `limit` bytes. Raises `UsageError` where even the smallest needs more."""
        if limit < self.size:
            raise UsageError(f"even the smallest formats need {self.size:,} bytes, {limit:,} are there")
        taken, size, bound = 0, self.size, self.error
        while taken < len(self.steps) and size + self.steps[taken].size <= limit:
            size, bound, taken = size + self.steps[taken].size, bound - self.steps[taken].error, taken + 1
        if taken < len(self.steps):
            bound -= self.steps[taken].gain * (limit - size)
        given_up = range(max(0, taken - LOOK_BACK), taken)
        filled = (self._filled(*way, limit) for way in [(taken, None), *((n, self.steps[n].unit) for n in given_up)])
        options = min(filled, key=lambda chosen: sum(o.error for o in chosen.values()))
        total = sum(o.error for o in options.values())
        return Choice(options, sum(o.size for o in options.values()), total, max(total - max(bound, 0.0), 0.0))

    def _filled(self, taken: int, held: Unit | None, limit: int) -> dict[Unit, Option]:
        """Return the choice after the first `taken` steps, filled: what gains most per byte and still fits, again.

        `held` is the unit whose next step was given up: it stays as it is, as that very step would be the first again.
        """
        chosen = dict(self.least)
        for step in self.steps[:taken]:
            chosen[step.unit] = step.to
        rest = limit - sum(o.size for o in chosen.values())
        waiting: list[tuple[float, str, int, int, Option, Option]] = []

        def offer(unit: Unit) -> None:
            now = chosen[unit]
            for o in self.units[unit]:
                if o.error < now.error and now.size < o.size <= now.size + rest:
                    heapq.heappush(waiting, (-_slope(now, o), *key(unit), o.size, now, o))

        for unit in self.units:
            if unit != held:
                offer(unit)
        while waiting:
            *_, role, layer, _, now, to = heapq.heappop(waiting)
            unit = (role, layer if layer >= 0 else None)
            if chosen[unit] is now and to.size - now.size <= rest:
                chosen[unit], rest = to, rest - (to.size - now.size)
                offer(unit)
        return chosen

    def sizes(self) -> list[tuple[int, float]]:
        """Return (bytes, error) after each step, from the smallest choice to the largest."""
        size, error = self.size, self.error
        out = [(size, error)]
        for step in self.steps:
            size, error = size + step.size, error - step.error
            out.append((size, max(error, 0.0)))
        return out
