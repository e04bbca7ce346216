"""Which format every role has in every layer, and what rounding it cost: maps with a scale, from a manifest."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

from ds4convert.checkpoint.inventory import HEAD_GROUPS
from ds4convert.converted.grouping import Group
from ds4convert.converted.rounding_losses import LayerLoss
from ds4convert.report.drawings import Lane, Lanes, Part, Section, Span, Table
from ds4convert.words.figures import size

BITS = ((3.0, "b2", "2"), (4.0, "b3", "3"), (5.0, "b4", "4"), (6.0, "b5", "5"), (7.0, "b6", "6"), (10.0, "b8", "8"),
        (math.inf, "b16", "16 or 32"))  # fmt: skip
"""Steps of bits per weight, scales counted: below what they end, the colour, and what they are called."""

ERRORS = ((1e-6, "e0", "none"), (1e-5, "e1", "to 0.001 %"), (1e-4, "e2", "to 0.01 %"), (1e-3, "e3", "to 0.1 %"),
          (1e-2, "e4", "to 1 %"), (math.inf, "e5", "more"))  # fmt: skip
"""Steps of the relative squared error."""

Step = tuple[str, str, str]
"""Of a row of a map: its colour, its name, and what it says."""


def formats(rows: Sequence[LayerLoss], groups: Sequence[Group], said: str = "") -> Section | None:
    """Return the map of formats, with what is in no layer and the bytes of each role below; None without matrices.

    `said` is what people have to know of it first.
    """
    if not rows:
        return None
    lanes = list(_lanes(rows, groups, _format))
    sizes = {g.name: g.size for g in groups}
    once = [r for r in rows if not _is_of_a_layer(r)]
    drawn = [Lanes("Format of each role by layer", lanes, _scale(BITS), "Bits per weight, scales counted")]
    parts: list[Part] = [
        *(drawn if lanes else []),
        Table(
            "Outside the layers, and the head",
            ("Role", "Format", "Bits per weight", "Bytes"),
            [
                (name_of(name), ", ".join(found), f"{bits:.3g}", size(sizes[name]) if name in sizes else "")
                for name, found, bits in _merged(once)
            ],
            numbers=2,
        ),
    ]
    lines = (
        "A line per role, a column per layer of the backbone: the darker, the more bits. Empty: the layer has no such "
        "matrix. Norms and routers are never rounded."
    )
    note = f"{said}{lines}" if lanes else said
    return Section("formats", "Format by layer and role", note, parts, "Formats", wide=True)


def losses(rows: Sequence[LayerLoss], groups: Sequence[Group]) -> Section | None:
    """Return the map of what rounding cost; None where nothing was rounded."""
    if not rows:
        return None
    lanes = list(_lanes(rows, groups, _error))
    worst = max(rows, key=lambda r: r.relative_square)
    note = (
        f"The share of the squared values that rounding changed, layer by layer. Largest: {worst.relative_square:.3g} "
        f"in {name_of(worst.group)}{_layer(worst)}, {' '.join(worst.formats)}."
    )
    table = Table(
        "What rounding cost, in numbers",
        ("Role", "Layer", "Format", "Bits", "Relative squared error"),
        [
            (name_of(r.group), "-" if r.layer is None else str(r.layer), ", ".join(r.formats),
             f"{r.bits_per_weight:.3g}", f"{r.relative_square:.3g}")
            for r in rows
        ],
        folded="The same in numbers",
        numbers=2,
    )  # fmt: skip
    scale = _scale(ERRORS)
    return Section("rounding", "What rounding cost", note, [
        Lanes("Relative squared error of each role by layer", lanes, scale, "Relative squared error"), table,
    ], "Rounding", wide=True)  # fmt: skip


def _is_of_a_layer(r: LayerLoss) -> bool:
    return r.layer is not None and not r.group.startswith(HEAD_GROUPS)


def _lanes(rows: Sequence[LayerLoss], groups: Sequence[Group], say: Callable[[LayerLoss], Step]) -> Iterator[Lane]:
    """Yield a lane per role of the backbone, neighbouring layers that say the same made one span."""
    sizes = {g.name: g.size for g in groups}
    for name in dict.fromkeys(r.group for r in rows if _is_of_a_layer(r)):
        mine = sorted((r.layer or 0, say(r)) for r in rows if r.group == name and r.layer is not None)
        told = size(sizes[name]) if name in sizes else ""
        yield Lane(name_of(name), told, list(_spans(mine)))


def _spans(cells: Sequence[tuple[int, Step]]) -> Iterator[Span]:
    start = 0
    for n in range(1, len(cells) + 1):
        last, step = cells[n - 1]
        if n < len(cells) and cells[n] == (last + 1, step):
            continue
        first = cells[start][0]
        where = f"layer {first}" if first == last else f"layers {first} to {last}"
        yield Span(first, last, step[0], step[1], f"{where}: {step[2]}")
        start = n


def _format(r: LayerLoss) -> Step:
    name = " + ".join(r.formats)
    return _step(BITS, r.bits_per_weight), name, f"{name}, {r.bits_per_weight:.3g} bits"


def _error(r: LayerLoss) -> Step:
    told = f"{' + '.join(r.formats)}, error {r.relative_square:.3g}" if r.relative_square else "nothing lost"
    return _step(ERRORS, r.relative_square), "", told


def _step(steps: Sequence[tuple[float, str, str]], value: float) -> str:
    return next(name for end, name, _ in steps if value < end)


def _scale(steps: Sequence[tuple[float, str, str]]) -> list[tuple[str, str]]:
    """Return the colours of a scale with what they stand for."""
    return [(name, told) for _, name, told in steps]


def _merged(rows: Iterable[LayerLoss]) -> Iterator[tuple[str, list[str], float]]:
    """Yield each role once: its formats, and the mean of its bits."""
    found: dict[str, list[LayerLoss]] = {}
    for r in rows:
        found.setdefault(r.group, []).append(r)
    for name, mine in found.items():
        kinds = list(dict.fromkeys(f for r in mine for f in r.formats))
        yield name, kinds, sum(r.bits_per_weight for r in mine) / len(mine)


def name_of(group: str) -> str:
    """Return a group's name for people; the head's groups begin with its prefix."""
    told = group.replace("_", " ")
    return f"head: {told.partition('.')[2]}" if group.startswith(HEAD_GROUPS) else told


def _layer(r: LayerLoss) -> str:
    return "" if r.layer is None else f", layer {r.layer}"
