"""Rounding that lets later columns make up for the errors of earlier ones, as the moments of the inputs say.

Three steps, each kept only where it helps. Columns are rounded in order, a group at a time with the scale that the
search of `optimal` finds, and each column's error is spread over the columns still to come. Then sweeps over the groups
fit scale and bias again (least squares under the moments H) and move single codes, which never raises a row's error
`e H e^T`. At last each row is compared with the same row as `optimal` rounds it, and the better one is stored.

Rows do not depend on each other. They are worked on in blocks of `BLOCK` rows, the last one filled up, because a matrix
product may sum in another order for another number of rows: so bytes do not depend on how a matrix is cut in chunks.
Arrays lie as `[in, rows]`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ds4convert.formats import compiled, rounding
from ds4convert.formats.array_backends import HOST
from ds4convert.formats.codecs import Codec
from ds4convert.formats.float_codecs import KINDS
from ds4convert.formats.packing import pack
from ds4convert.formats.rounding import Encoded
from ds4convert.formats.second_moments import Factor
from ds4convert.formats.small_floats import F32, bf16_bits

BLOCK = 128
"""Rows that are worked on at once. Chunks of a matrix are cut at multiples of it."""

SWEEPS = 3
"""Sweeps of refinement: the third gains little more."""

SPAN = 512
"""Columns whose pull by all earlier ones is one product: whole groups of every size."""

COUNTS_AS = 16
"""How many weights of `optimal` one of these is as much work as, before it pays to load compiled loops."""

LEAST = 1e-30
"""Determinant below which no line is fitted."""


class Grid(Protocol):
    """The values that one group of each row can take: chosen once, then asked column by column."""

    def choose(self, x: F32) -> None:
        """Choose the grids for groups `x` `[n, rows]`."""

    def nearest(self, wanted: F32) -> tuple[NDArray[Any], F32]:
        """Return (codes, values) nearest to `wanted`, whose last axis is that of rows."""

    def stored(self) -> list[NDArray[Any]]:
        """Return what describes the grids as it is stored: scales, and biases where the codec has them."""


class Affine:
    """Values `code * scale + bias`."""

    def __init__(self, codec: Codec) -> None:
        self.codec, self.top = codec, 2**codec.bits - 1
        self.scale = self.bias = np.zeros(0, np.float32)

    def choose(self, x: F32) -> None:
        """Search as `optimal` does."""
        self.scale, self.bias = (HOST.bf16(v) for v in rounding.searched(x, self.codec.bits, COUNTS_AS))

    @property
    def line(self) -> F32:
        """Return scales and biases `[2, rows]`."""
        return np.stack([self.scale, self.bias])

    def nearest(self, wanted: F32) -> tuple[F32, F32]:
        """Return codes (whole numbers in float32) and values."""
        codes = HOST.codes(wanted, self.scale, self.bias, self.top)
        return codes, codes * self.scale + self.bias

    def stored(self) -> list[NDArray[Any]]:
        """Return scales and biases as BF16 bits."""
        return [bf16_bits(self.scale), bf16_bits(self.bias)]

    def fit(self, codes: F32, before: F32, weights: F32, near: F32, cross: F32) -> F32:
        """Fit scale and bias to the codes of a group where that lowers the error; return the new errors `[n, rows]`.

        `before` are the errors so far, `weights` the group's values, `near` the moments within the group, `cross` the
        products of the moments with the errors of all other groups.
        """
        one = near.sum(axis=1)
        wanted = near @ weights + cross
        aa, ab = HOST.dot(codes, near @ codes), one @ codes
        bb = np.float32(one.sum())
        at, bt = HOST.dot(codes, wanted), wanted.sum(axis=0)
        det = aa * bb - ab * ab
        with np.errstate(all="ignore"):  # codes that are all alike fit no line; what is not better is not taken
            scale, bias = HOST.bf16((at * bb - ab * bt) / det), HOST.bf16((aa * bt - ab * at) / det)
            after = weights - (codes * scale + bias)
            gain = _cost(after, near, cross) < _cost(before, near, cross)
        gain &= np.isfinite(scale) & np.isfinite(bias) & (det > LEAST)
        self.scale, self.bias = np.where(gain, scale, self.scale), np.where(gain, bias, self.bias)
        return np.where(gain, after, before)


def _cost(error: F32, near: F32, cross: F32) -> F32:
    """Return what a group's errors cost its row, apart from what the other groups cost among themselves."""
    return np.asarray(HOST.dot(error, near @ error + 2 * cross))


class Floats:
    """Values of a table of small floats, times a block scale."""

    def __init__(self, codec: Codec) -> None:
        self.codec, self.kind = codec, KINDS[codec.mode]
        self.code = np.zeros(0, np.uint8)
        self.by = np.zeros(0, np.float32)

    def choose(self, x: F32) -> None:
        """Take the best of the scales that `optimal` tries."""
        self.code = rounding.floats(self.codec, True, slice(0, x.shape[1]), x, None).scales
        self.by = self.kind.scales()[self.code]

    def nearest(self, wanted: F32) -> tuple[NDArray[Any], F32]:
        """Return codes uint8 and values."""
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            codes = self.kind.encode(np.where(self.by > 0, wanted / self.by, np.float32(0)))
        return codes, np.take(self.kind.values(), codes) * self.by

    def stored(self) -> list[NDArray[Any]]:
        """Return scale codes."""
        return [self.code]


@dataclass(frozen=True)
class Block:
    """A block of rows rounded: codes and errors `[in, rows]`, a grid per group, `cost` `[rows]` = e H e^T.

    `pull` is H e^T where it is known.
    """

    codes: NDArray[Any]
    error: F32
    grids: tuple[Grid, ...]
    cost: F32
    pull: F32 | None = None


def cost(error: F32, factor: Factor) -> F32:
    """Return e H e^T of each row, of errors `[in, rows]`: the square of e R, half of the work of a product with H."""
    total = np.zeros(error.shape[1], np.float32)
    for first in range(0, len(error), SPAN):
        last = min(first + SPAN, len(error))
        made = factor.root[:last, first:last].T @ error[:last]
        total += HOST.dot(made, made)
    return total


def compensated(values: F32, codec: Codec, factor: Factor, plain: Encoded, sweeps: int = SWEEPS) -> Encoded:
    """Return `values` `[rows, in]` rounded against the moments of their inputs; `plain` is their `optimal` rounding.

    Each row is the better of the two. Values are finite, columns whole groups: `plain` was made of them.
    """
    made = [
        _of_block(values[n : n + BLOCK], codec, factor, _cut(plain, n), sweeps) for n in range(0, len(values), BLOCK)
    ]
    weight, scales = (np.concatenate([m[part] for m in made]) for part in (0, 1))
    biases = np.concatenate([m[2] for m in made if m[2] is not None]) if plain.biases is not None else None
    error = (values - rounding.decode(codec, weight, scales, biases)).astype(np.float64)
    return Encoded(weight, scales, biases, float((error**2).sum()), plain.norm, float(np.abs(error).max(initial=0)))


def _cut(plain: Encoded, first: int) -> Encoded:
    rows = slice(first, first + BLOCK)
    biases = None if plain.biases is None else plain.biases[rows]
    return replace(plain, weight=plain.weight[rows], scales=plain.scales[rows], biases=biases)


Stored = tuple[NDArray[np.uint32], NDArray[Any], "NDArray[np.uint16] | None"]
"""Words, scales and biases of rows."""


def _of_block(values: F32, codec: Codec, factor: Factor, plain: Encoded, sweeps: int) -> Stored:
    rows = len(values)
    filled = np.pad(values, ((0, BLOCK - rows), (0, 0)), mode="edge")
    wanted = np.ascontiguousarray(filled.T, np.float32)
    before = np.pad(rounding.decode(codec, plain.weight, plain.scales, plain.biases), ((0, BLOCK - rows), (0, 0)))
    least = cost(np.ascontiguousarray(wanted - before.T), factor)
    with np.errstate(over="ignore", invalid="ignore"):  # values near the largest: their rows stay as they were
        found = refined(wanted, codec, factor, spread(wanted, codec, factor), sweeps)
        gain = (found.cost < least)[:rows, None]
    words = pack(np.ascontiguousarray(found.codes.T).astype(np.uint8), codec.bits)[:rows]
    tables = [np.stack(parts, axis=1)[:rows] for parts in zip(*(g.stored() for g in found.grids), strict=True)]
    biases = None if plain.biases is None else np.where(gain, tables[1], plain.biases)
    return np.where(gain, words, plain.weight), np.where(gain, tables[0], plain.scales), biases


def spread(wanted: F32, codec: Codec, factor: Factor) -> Block:
    """Return rows rounded column by column, each column's error spread over those that follow."""
    n, root, inverses = codec.group_size, factor.root, factor.inverse(codec.group_size)
    error, codes, grids = np.empty_like(wanted), np.empty_like(wanted), []
    total = np.zeros(wanted.shape[1], np.float32)
    for start in range(0, len(wanted), SPAN):
        end = min(start + SPAN, len(wanted))
        pull = root[:start, start:end].T @ error[:start]
        for first in range(start, end, n):
            at = slice(first, first + n)
            here = pull[first - start : first - start + n] + root[start:first, at].T @ error[start:first]
            left = wanted[at] + inverses[first // n].T @ here
            grid = _grid(codec)
            grid.choose(left)
            shares = _in_order(grid, wanted[at], left, inverses[first // n], (codes[at], error[at]))
            total += HOST.dot(shares, shares)
            grids.append(grid)
    return Block(codes, error, tuple(grids), total)


def _in_order(grid: Grid, wanted: F32, left: F32, part: F32, out: tuple[F32, F32]) -> F32:
    """Round the columns of a group in order; return the shares `[n, rows]` that their errors have.

    `left` holds the values that would make up for all earlier groups, `part` the group's triangle of the inverse
    moments; codes and errors go to `out`.
    """
    codes, error = out
    shares = np.empty_like(left)
    if isinstance(grid, Affine) and compiled.affine(0) is not None:
        from ds4convert.formats.compiled import spread_kernels

        spread_kernels.in_order((left, wanted, part), grid.line, np.float32(grid.top), (codes, error, shares))
        return shares
    for i in range(len(left)):
        codes[i], value = grid.nearest(left[i])
        error[i] = wanted[i] - value
        shares[i] = (left[i] - value) / part[i, i]
        left[i + 1 :] -= part[i, i + 1 :, None] * shares[i]
    return shares


def _grid(codec: Codec) -> Grid:
    return Affine(codec) if codec.mode == "affine" else Floats(codec)


def refined(wanted: F32, codec: Codec, factor: Factor, start: Block, sweeps: int = SWEEPS) -> Block:
    """Return rows after so many sweeps; of each row the best state, which is never worse than where it started."""
    best = start
    for _ in range(sweeps):
        best = _better(best, _swept(wanted, codec, factor, best))
    return best


def _better(a: Block, b: Block) -> Block:
    """Return, row by row, `b` where it costs less."""
    gain = b.cost < a.cost
    grids = tuple(_mixed(x, y, gain) for x, y in zip(a.grids, b.grids, strict=True))
    pull = b.pull if a.pull is None or b.pull is None else np.where(gain, b.pull, a.pull)
    if a.pull is None and not gain.all():
        pull = None
    return Block(
        np.where(gain, b.codes, a.codes), np.where(gain, b.error, a.error), grids, np.where(gain, b.cost, a.cost), pull
    )


def _mixed(a: Grid, b: Grid, gain: NDArray[np.bool_]) -> Grid:
    if not (isinstance(a, Affine) and isinstance(b, Affine)):
        return a  # sweeps leave block scales alone
    out = Affine(a.codec)
    out.scale, out.bias = np.where(gain, b.scale, a.scale), np.where(gain, b.bias, a.bias)
    return out


def _swept(wanted: F32, codec: Codec, factor: Factor, start: Block) -> Block:
    """Return rows after one sweep over all groups: scale and bias, then each code, given all the rest."""
    n, moments = codec.group_size, factor.moments
    error, codes, grids = start.error.copy(), start.codes.copy(), []
    pull = moments @ error if start.pull is None else start.pull.copy()
    for number, first in enumerate(range(0, len(wanted), n)):
        at = slice(first, first + n)
        near, old = np.ascontiguousarray(moments[at, at]), error[at].copy()
        grid, group = _copy(start.grids[number]), error[at]
        if isinstance(grid, Affine):
            group[:] = grid.fit(codes[at], old, wanted[at], near, pull[at] - near @ old)
        _moved(grid, wanted[at], pull[at] + near @ (group - old), near, (codes[at], group))
        pull += np.ascontiguousarray(moments[:, at]) @ (group - old)
        grids.append(grid)
    return Block(codes, error, tuple(grids), np.asarray(HOST.dot(error, pull)), pull)


def _moved(grid: Grid, wanted: F32, inner: F32, near: F32, out: tuple[F32, F32]) -> None:
    """Move the codes of a group, and their errors, in `out`: each to the best for its column, given all the others.

    `inner` are the products of the moments with all errors, `near` the moments within the group.
    """
    codes, error = out
    if isinstance(grid, Affine) and compiled.affine(0) is not None:
        from ds4convert.formats.compiled import spread_kernels

        spread_kernels.moved((wanted, inner, near), grid.line, np.float32(grid.top), (codes, error))
        return
    for i in range(len(wanted)):
        code, value = grid.nearest(wanted[i] - error[i] + inner[i] / near[i, i])
        change = wanted[i] - value - error[i]
        inner[i + 1 :] += near[i, i + 1 :, None] * change
        codes[i], error[i] = code, error[i] + change


def _copy(grid: Grid) -> Grid:
    if not isinstance(grid, Affine):
        return grid
    out = Affine(grid.codec)
    out.scale, out.bias = grid.scale, grid.bias
    return out
