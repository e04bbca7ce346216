"""What the report page draws, as values: bars, points and maps, with the places that its template puts them at.

All of it becomes inline SVG in `manifests/pages/report.html.jinja`, each picture with a text that is spoken instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

WIDTH, ROW, BAR = 360, 34, 10
"""Of a chart, in the units of its viewBox: about CSS pixels on a phone."""

HEIGHT, LEFT, BOTTOM, EDGE = 220, 40, 20, 8
"""Of a plot, and the room for the numbers beside it."""

CELL, LABELS = 16, 150
"""Of a map: the side of a cell, and the room for names to its left."""

SPOKEN = 200
"""Cells of a map that its spoken text tells, at most."""


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar: what it is, its length, the value in words, a note beside the name, and its colour (a or b)."""

    label: str
    value: float
    text: str
    note: str = ""
    colour: Literal["a", "b"] = "a"


@dataclass(frozen=True, slots=True)
class PlacedBar:
    """A bar with its place: the upper edge of its line, and its length in the units of the chart."""

    bar: Bar
    top: int
    length: str


@dataclass(frozen=True)
class Chart:
    """Horizontal bars; `full` is the value of a whole bar (None: the largest)."""

    kind: ClassVar[str] = "chart"
    width: ClassVar[int] = WIDTH
    thick: ClassVar[int] = BAR
    title: str
    bars: Sequence[Bar]
    full: float | None = None

    @property
    def height(self) -> int:
        """Return the height of the chart."""
        return len(self.bars) * ROW

    @property
    def spoken(self) -> str:
        """Return what is said instead of the picture."""
        return f"{self.title}. " + "; ".join(f"{b.label}: {b.text}" for b in self.bars)

    def rows(self) -> Iterator[PlacedBar]:
        """Yield every bar with its place."""
        largest = self.full or max((b.value for b in self.bars), default=0.0) or 1.0
        for n, b in enumerate(self.bars):
            yield PlacedBar(b, n * ROW, f"{max(0.0, min(1.0, b.value / largest)) * WIDTH:.1f}")


@dataclass(frozen=True, slots=True)
class Point:
    """One point: x, y (a share, 0 to 1), and what it says in words."""

    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Plot:
    """Points over x from `span`, joined by a line or beside the diagonal; shares upwards."""

    kind: ClassVar[str] = "plot"
    width: ClassVar[int] = WIDTH
    height: ClassVar[int] = HEIGHT
    left: ClassVar[int] = LEFT
    right: ClassVar[int] = WIDTH - EDGE
    title: str
    points: Sequence[Point]
    span: tuple[float, float]
    is_joined: bool = False
    diagonal: bool = False

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
            yield self.place(x, 0)[0], f"{x:g}"

    def dots(self) -> Iterator[tuple[float, float, str]]:
        """Yield the points: where they lie, and what they say."""
        for p in self.points:
            yield (*self.place(p.x, p.y), p.text)

    def joined_path(self) -> str:
        """Return the line through all points."""
        return "M" + "L".join(f"{x} {y}" for x, y, _ in self.dots())

    def diagonal_path(self) -> str:
        """Return the line on which both scales are equal."""
        (x1, y1), (x2, y2) = self.place(self.span[0], 0.0), self.place(self.span[1], 1.0)
        return f"M{x1} {y1}L{x2} {y2}"


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of a map: its line and its layer (None: of no layer), how dark it is (0 to 1), and what it says."""

    group: str
    layer: int | None
    shade: float
    text: str


@dataclass(frozen=True, slots=True)
class PlacedCell:
    """A cell with its place."""

    left: int
    top: int
    shade: str
    text: str


@dataclass(frozen=True)
class Map:
    """A line per group, a cell per layer."""

    kind: ClassVar[str] = "map"
    side: ClassVar[int] = CELL - 2
    title: str
    cells: Sequence[Cell]

    def _groups(self) -> list[str]:
        return list(dict.fromkeys(c.group for c in self.cells))

    def _columns(self) -> dict[int, int]:
        return {n: i for i, n in enumerate(sorted({c.layer for c in self.cells if c.layer is not None}))}

    @property
    def width(self) -> int:
        """Return the width of the map."""
        return LABELS + max(1, len(self._columns())) * CELL

    @property
    def height(self) -> int:
        """Return the height of the map."""
        return len(self._groups()) * CELL

    @property
    def spoken(self) -> str:
        """Return what is said instead of the picture."""
        return f"{self.title}. " + "; ".join(c.text for c in self.cells[:SPOKEN])

    def names(self) -> Iterator[tuple[int, str]]:
        """Yield the upper edge and the name of every line."""
        for n, group in enumerate(self._groups()):
            yield n * CELL, group.replace("_", " ")

    def placed(self) -> Iterator[PlacedCell]:
        """Yield every cell with its place."""
        line = {group: n for n, group in enumerate(self._groups())}
        column = self._columns()
        for c in self.cells:
            at = column[c.layer] if c.layer is not None else 0
            shade = max(0.0, min(1.0, c.shade))
            yield PlacedCell(LABELS + at * CELL, line[c.group] * CELL, f"{shade:.3f}", c.text)


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


Part = Chart | Plot | Map | Paragraph | Texts


@dataclass(frozen=True)
class Section:
    """A card of the page: its title, a note below it, and what it shows."""

    title: str
    note: str
    parts: Sequence[Part] = ()
