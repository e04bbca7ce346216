"""What the report page shows, as values: bars, pairs, points, maps, texts and tables, with their places.

All of it becomes HTML and inline SVG in `manifests/pages/report.html.jinja`. Bars and pairs are tables with a drawing
beside each number; plots and lanes are pictures with a text that is spoken instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

WIDTH, HEIGHT, LEFT, BOTTOM, EDGE = 360, 220, 40, 20, 8
"""Of a plot, in the units of its viewBox (about CSS pixels on a phone), and the room for the numbers beside it."""

NARROW, BROAD, CHARACTER, PADDING = 320, 840, 7, 8
"""CSS pixels: a lane on the narrowest phone and on a desk, a character of a label in it, and the room beside one."""

TICKS = 8
"""Numbers on the scale of layers, at most."""


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar: what it is, its length (0 to 1), the value in words, a note beside it, and its colour (a or b)."""

    label: str
    share: float
    text: str
    note: str = ""
    colour: Literal["a", "b"] = "a"

    @property
    def percent(self) -> str:
        """Return the length in percent of the track."""
        return _percent(self.share)


@dataclass(frozen=True)
class Bars:
    """Horizontal bars, a row of a table each; `heads` are the names of the columns label, value and note."""

    kind: ClassVar[str] = "bars"
    title: str
    heads: tuple[str, str, str]
    bars: Sequence[Bar]


@dataclass(frozen=True, slots=True)
class Pair:
    """Two figures of one thing, without and with the head; `ratio` is the second by the first, in words."""

    label: str
    without: float
    mtp: float
    ratio: str


@dataclass(frozen=True, slots=True)
class PlacedPair:
    """A pair with its places in percent of the track: of both dots, and of the line between them."""

    pair: Pair
    without: str
    mtp: str
    left: str
    width: str


@dataclass(frozen=True)
class Pairs:
    """Pairs as two dots on one scale, a row of a table each."""

    kind: ClassVar[str] = "pairs"
    title: str
    unit: str
    pairs: Sequence[Pair]

    @property
    def top(self) -> float:
        """Return the end of the scale: the least of 1, 2 or 5 times a power of ten that holds all."""
        most = max((max(p.without, p.mtp) for p in self.pairs), default=0.0)
        if most <= 0:
            return 1.0
        power = 10.0 ** math.floor(math.log10(most))
        return next(power * n for n in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if power * n >= most)

    def ticks(self) -> Iterator[tuple[str, str]]:
        """Yield place in percent and number of the ends and the middle of the scale."""
        for share in (0.0, 0.5, 1.0):
            yield _percent(share), f"{share * self.top:g}"

    def rows(self) -> Iterator[PlacedPair]:
        """Yield every pair with its places."""
        for p in self.pairs:
            a, b = p.without / self.top, p.mtp / self.top
            yield PlacedPair(p, _percent(a), _percent(b), _percent(min(a, b)), _percent(abs(a - b)))


@dataclass(frozen=True, slots=True)
class Point:
    """One point: x, y (a share, 0 to 1), and what it says in words."""

    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Plot:
    """Points over x from `span` beside the diagonal, on which x and y are equal; shares upwards."""

    kind: ClassVar[str] = "plot"
    width: ClassVar[int] = WIDTH
    height: ClassVar[int] = HEIGHT
    left: ClassVar[int] = LEFT
    right: ClassVar[int] = WIDTH - EDGE
    title: str
    points: Sequence[Point]
    span: tuple[float, float] = (0.0, 1.0)

    @property
    def spoken(self) -> str:
        """Return what is said instead of the picture."""
        return f"{self.title}. " + "; ".join(p.text for p in self.points)

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Return where a point lies."""
        low, high = self.span
        across = LEFT + (x - low) / (high - low) * (WIDTH - LEFT - EDGE)
        return round(across, 1), round(EDGE + (1 - max(0.0, min(1.0, y))) * (HEIGHT - BOTTOM - EDGE), 1)

    def shares(self) -> Iterator[tuple[float, str]]:
        """Yield height and text of the lines across."""
        for share in (0.0, 0.5, 1.0):
            yield self.place(self.span[0], share)[1], f"{share:.0%}"

    def ends(self) -> Iterator[tuple[float, str]]:
        """Yield place and text of both ends of the scale below."""
        for x in self.span:
            yield self.place(x, 0)[0], f"{x:.0%}"

    def dots(self) -> Iterator[tuple[float, float, str]]:
        """Yield the points: where they lie, and what they say."""
        for p in self.points:
            yield (*self.place(p.x, p.y), p.text)

    def diagonal_path(self) -> str:
        """Return the line on which both scales are equal."""
        (x1, y1), (x2, y2) = self.place(self.span[0], 0.0), self.place(self.span[1], 1.0)
        return f"M{x1} {y1}L{x2} {y2}"


@dataclass(frozen=True, slots=True)
class Span:
    """Neighbouring layers of a lane that are alike: first and last, their step on the scale, a name, what they say."""

    first: int
    last: int
    step: str
    label: str
    text: str


@dataclass(frozen=True)
class Lane:
    """A line of a map: what it is, a note beside it, and its spans over layers."""

    name: str
    note: str
    spans: Sequence[Span]

    @property
    def spoken(self) -> str:
        """Return what is said instead of the picture."""
        return f"{self.name}. " + "; ".join(s.text for s in self.spans)


@dataclass(frozen=True)
class Lanes:
    """A map: a lane per role over the layers; `scale` has every step of the colours with what it stands for."""

    kind: ClassVar[str] = "lanes"
    title: str
    lanes: Sequence[Lane]
    scale: Sequence[tuple[str, str]]
    measure: str

    @property
    def first(self) -> int:
        """Return the first layer that any lane has."""
        return min((s.first for lane in self.lanes for s in lane.spans), default=0)

    @property
    def count(self) -> int:
        """Return how many layers the map has."""
        return max((s.last for lane in self.lanes for s in lane.spans), default=0) - self.first + 1

    def columns(self, span: Span) -> str:
        """Return the place of a span as columns of a grid."""
        return f"{span.first - self.first + 1}/{span.last - self.first + 2}"

    def fits(self, span: Span, width: int) -> bool:
        """Return whether the name of a span fits into it where a lane is `width` CSS pixels wide."""
        return (span.last - span.first + 1) / self.count * width >= len(span.label) * CHARACTER + PADDING

    def placed(self, lane: Lane) -> Iterator[tuple[Span, str, str]]:
        """Yield the spans of a lane with their classes, and their names where they fit: "w" fits on no phone."""
        for s in lane.spans:
            is_short = self.fits(s, NARROW)
            yield s, s.step if is_short else f"{s.step} w", s.label if is_short or self.fits(s, BROAD) else ""

    def ticks(self) -> Iterator[tuple[int, str]]:
        """Yield column and number of the layers that the scale below names."""
        step = next((s for s in (1, 2, 5, 10, 20, 50, 100) if self.count / s <= TICKS), 500)
        for n in range(self.first, self.first + self.count):
            if n % step == 0:
                yield n - self.first + 1, str(n)


@dataclass(frozen=True, slots=True)
class Mark:
    """A piece of a reply: its text, which draft of its pass it was (0: the backbone's own), and its colour.

    `lead`: blanks before the text, which are not marked. A line end alone is shown by a sign.
    """

    lead: str
    text: str
    draft: int
    step: int
    differs: bool = False

    @classmethod
    def of(cls, text: str, draft: int, step: int, differs: bool) -> Mark:
        """Return a token as it is marked."""
        inner = text.lstrip(" ")
        if draft or differs:
            inner = f"↵{inner}" if inner and not inner.strip() else inner
        return cls(text[: len(text) - len(text.lstrip(" "))], inner, draft, step, differs)


@dataclass(frozen=True)
class Reply:
    """A prompt beside what followed it. `plain` is what follows without the head, where that differs.

    `cut`: characters of the prompt that are left out before what is shown.
    """

    name: str
    prompt: str
    cut: int
    marks: Sequence[Mark]
    note: str
    plain: Sequence[Mark] = ()


@dataclass(frozen=True)
class Replies:
    """Prompts and what followed them, with the places that drafts can have."""

    kind: ClassVar[str] = "replies"
    replies: Sequence[Reply]
    places: Sequence[tuple[int, str]]


@dataclass(frozen=True)
class Paragraph:
    """A sentence between pictures."""

    kind: ClassVar[str] = "paragraph"
    text: str


@dataclass(frozen=True)
class Texts:
    """A list of sentences."""

    kind: ClassVar[str] = "list"
    texts: Sequence[str]


@dataclass(frozen=True)
class Table:
    """A table: the names of its columns and its rows; `folded` behind a line that can be opened, named so."""

    kind: ClassVar[str] = "table"
    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    folded: str = ""
    numbers: int = 0
    """How many of the last columns are numbers."""


@dataclass(frozen=True)
class Terms:
    """Names with what they stand for; `code` are those of which the text is typed or compared."""

    kind: ClassVar[str] = "terms"
    rows: Sequence[tuple[str, str]]
    code: frozenset[str] = frozenset()


Part = Bars | Pairs | Plot | Lanes | Replies | Paragraph | Texts | Table | Terms


@dataclass(frozen=True)
class Section:
    """A part of the page: its name in the list of sections, its title, a note below it, and what it shows."""

    anchor: str
    title: str
    note: str
    parts: Sequence[Part] = ()
    short: str = ""
    wide: bool = False


def _percent(share: float) -> str:
    return f"{100 * max(0.0, min(1.0, share)):.2f}%"
