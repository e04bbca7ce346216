"""Rows of values into the codes, scales and biases of a codec, and back; what rounding cost, in the same pass.

`nearest` gives the bytes of mx.quantize for the same values in BF16. `optimal` searches scale and bias (or the block
scale) of least squared error, weighted by the importance of the input columns where given, and keeps the plain
rounding of every group that it does not better: no group is ever worse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ds4convert.formats import affine, affine_from_fp4, blocks, compiled, float_codecs, small_floats
from ds4convert.formats.array_backends import HOST, Arrays, arrays
from ds4convert.formats.blocks import MX_GROUP
from ds4convert.formats.codecs import Codec
from ds4convert.formats.packing import pack, unpack
from ds4convert.formats.small_floats import F32, U8, bf16_bits, bf16_values

if TYPE_CHECKING:
    from ds4convert.formats.compiled.tiles import Tiles

FAST_IN_MLX = {"affine", "mxfp8"}
"""Modes whose plain rounding is quicker in mlx than in numpy; its encoders of 4-bit floats take many times as long."""

LEAST_EXPONENT, MOST_EXPONENT = -100, 126
"""Powers of two that groups are scaled by for a search; a group of smaller values is searched as it is."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """Encoded rows: `weight` uint32 `[rows, words]`; `scales`, `biases` `[rows, groups]` as stored (uint16: BF16 bits).

    `squared` and `norm` are the sums of squared errors and of squared values (unweighted), `max_abs` the largest error.
    """

    weight: NDArray[np.uint32]
    scales: NDArray[Any]
    biases: NDArray[np.uint16] | None
    squared: float
    norm: float
    max_abs: float


def encode(values: F32, codec: Codec, rounding: str, importance: F32 | None = None) -> Encoded:
    """Return `values` `[rows, cols]` in a codec; `rounding` is `nearest` or `optimal`.

    `importance` `[cols]`, none negative, weighs the squared error of each input column. Raises `ValueError` for values
    that are not finite, and for columns that are no whole groups.
    """
    _check(values, codec)
    if codec.mode in FAST_IN_MLX and rounding == "nearest" and small_floats.all_bf16(values):
        return _by_mlx(values, codec)
    if codec.mode != "affine" or rounding != "optimal":
        return _grouped(values, codec, _rounder(codec, rounding, None), importance)
    fast = _fast(codec, importance, values.size, None)
    return _grouped(values, codec, _rounder(codec, rounding, _finder(codec)), importance, fast)


def _fast(codec: Codec, importance: F32 | None, weights: int, find: Callable[[slice], Any] | None) -> Tiles | None:
    """Return what rounds tiles with compiled loops; None where this process takes the plain path."""
    kernels = compiled.affine(weights)
    if kernels is None:
        return None
    from ds4convert.formats.compiled.tiles import Tiles

    relative = None if importance is None else _relative(importance, codec.group_size)
    return Tiles(kernels, codec.bits, relative, find)


def _by_mlx(values: F32, codec: Codec) -> Encoded:
    """Return BF16 values as mx.quantize rounds them, by itself: it is faster than its steps taken one by one."""
    import mlx.core as mx

    x = mx.array(values).astype(mx.bfloat16)
    made = mx.quantize(x, codec.group_size, codec.bits, mode=codec.mode)
    mx.eval(made)
    weight, scales, *more = [np.array(a.view(mx.uint16) if a.dtype == mx.bfloat16 else a) for a in made]
    stored = weight, scales, more[0] if more else None
    error = decode(codec, *stored)
    np.subtract(values, error, out=error)
    total = _Total()
    total.add(values, error)
    return Encoded(*stored, total.squared, total.norm, total.max_abs)


def encode_fp4(codes: U8, scales: U8, codec: Codec, rounding: str, importance: F32 | None = None) -> Encoded:
    """Return FP4 in a codec: `codes` uint8 `[rows, cols/2]`, `scales` E8M0 `[rows, cols/32]`; else as `encode`."""
    values = blocks.decode_fp4(codes, scales)
    pays = codec.mode == "affine" and affine_from_fp4.PAYS.get(codec.bits, 0) >= codec.group_size // MX_GROUP
    if rounding != "optimal" and codec.mode in FAST_IN_MLX and scales.max(initial=0) <= MOST_SCALE:
        _check_columns(values, codec)
        return _by_mlx(values, codec)
    if rounding != "optimal" or not pays:
        return encode(values, codec, rounding, importance)
    _check(values, codec)
    ops, n = arrays(), codec.group_size
    single = np.stack([codes & 15, codes >> 4], axis=-1).reshape(-1, n)
    exponents = scales.reshape(-1, n // MX_GROUP)

    def find(at: slice, x: F32, weight: F32 | None) -> tuple[F32, F32]:
        counted, power, holds = affine_from_fp4.histograms(
            single[at], exponents[at], None if weight is None else weight.T
        )
        scale, bias = (ops.get(v) for v in affine_from_fp4.search(ops, counted, codec.bits))
        scale, bias = np.ldexp(scale, power), np.ldexp(bias, power)
        if not holds.all():
            rest = ~holds
            other = search(ops, x[:, rest], None if weight is None else weight[:, rest], codec.bits)
            scale[rest], bias[rest] = other
        return scale, bias

    def found(at: slice) -> tuple[F32, F32]:
        tile = np.ascontiguousarray(values.reshape(-1, n)[at].T)
        return find(at, tile, None if importance is None else _weights(importance, n, at))

    fast = _fast(codec, importance, values.size, found)
    return _grouped(values, codec, _rounder(codec, rounding, find), importance, fast)


def decode(codec: Codec, weight: NDArray[Any], scales: NDArray[Any], biases: NDArray[Any] | None) -> F32:
    """Return the float32 values `[rows, cols]` of encoded rows, exactly those of mx.dequantize in float32."""
    if codec.mode != "affine":
        return float_codecs.decode(codec, weight, scales)
    assert biases is not None
    q = unpack(weight, codec.bits).reshape(weight.shape[0], -1, codec.group_size).astype(np.float32)
    q *= bf16_values(scales)[..., None]
    q += bf16_values(biases)[..., None]
    return q.reshape(weight.shape[0], -1)


MOST_SCALE = 250
"""Largest E8M0 byte of which FP4 values are finite, and BF16 values, for certain."""


def _check_columns(values: F32, codec: Codec) -> None:
    if values.shape[1] % codec.group_size:
        raise ValueError(f"{codec.name}: expected whole groups of {codec.group_size}, found {values.shape[1]} columns")


def _check(values: F32, codec: Codec) -> None:
    _check_columns(values, codec)
    with np.errstate(over="ignore", invalid="ignore"):
        whole = np.isfinite(values.sum()) or np.isfinite(values).all()  # the sum of good values may be infinite
    if not whole:
        raise ValueError(f"{codec.name}: expected finite values, found infinity or NaN")


@dataclass(frozen=True, slots=True)
class Rounded:
    """Groups `[n, groups]` rounded: codes, scales and biases `[groups]` as stored, errors `[n, groups]`."""

    codes: NDArray[Any]
    scales: NDArray[Any]
    biases: NDArray[np.uint16] | None
    error: F32

    def or_better(self, other: Rounded, weight: F32 | None, unit: F32 | None) -> Rounded:
        """Return, group by group, the other where its squared error is smaller."""
        gain = _weighed(other.error, weight, unit) < _weighed(self.error, weight, unit)
        biases = None
        if self.biases is not None and other.biases is not None:
            biases = np.where(gain, other.biases, self.biases)
        return Rounded(
            np.where(gain, other.codes, self.codes),
            np.where(gain, other.scales, self.scales),
            biases,
            np.where(gain, other.error, self.error),
        )


Find = Callable[[slice, F32, "F32 | None"], tuple[F32, F32]]
"""Returns (scale, bias) for groups: their place among all, values `[n, groups]`, weights `[n, groups]` or None."""

Round = Callable[[slice, F32, "F32 | None"], Rounded]
"""Returns groups rounded, given the same."""


def _rounder(codec: Codec, rounding: str, find: Find | None) -> Round:
    if codec.mode == "affine":
        return partial(_affine, 2**codec.bits - 1, find)
    return partial(floats, codec, rounding == "optimal")


def _affine(top: int, find: Find | None, at: slice, x: F32, weight: F32 | None) -> Rounded:
    q, scale, bias = affine.plain(x, top)
    scale, bias = HOST.bf16(scale), HOST.bf16(bias)
    first = Rounded(q, bf16_bits(scale), bf16_bits(bias), x - (q * scale + bias))
    if find is None:
        return first
    scale, bias = (HOST.bf16(v) for v in find(at, x, weight))
    q = HOST.codes(x, scale, bias, top)
    found = Rounded(q, bf16_bits(scale), bf16_bits(bias), x - (q * scale + bias))
    return first.or_better(found, weight, _unit(x))


def floats(codec: Codec, optimal: bool, at: slice, x: F32, weight: F32 | None) -> Rounded:
    """Return groups of small floats rounded, with the plain scale or, `optimal`, the best of those near it."""
    codes, scales, error = float_codecs.plain(x, codec)
    best = Rounded(codes, scales, None, error)
    if optimal:
        unit = _unit(x)
        for codes, scale, error in float_codecs.others(x, codec, scales):
            best = best.or_better(Rounded(codes, scale, None, error), weight, unit)
    return best


def _finder(codec: Codec) -> Find:
    ops = arrays()

    def find(at: slice, x: F32, weight: F32 | None) -> tuple[F32, F32]:
        return search(ops, x, weight, codec.bits)

    return find


def _grouped(values: F32, codec: Codec, rounder: Round, importance: F32 | None, fast: Tiles | None = None) -> Encoded:
    (rows, cols), n = values.shape, codec.group_size
    x = np.ascontiguousarray(values, np.float32).reshape(-1, n)
    codes = np.empty(x.shape, np.uint8)
    scales = np.empty(len(x), np.uint16 if codec.scale_dtype == "BF16" else np.uint8)
    biases = np.empty(len(x), np.uint16) if codec.has_biases else None
    total = _Total()
    for at in _tiles(len(x), max(arrays().tile // n, 1)):
        if fast is not None and biases is not None and (quick := fast.rounded(at, x[at], codes[at], SAFE)):
            scales[at], biases[at] = quick.scales, quick.biases
            total.add_sums(quick.squared, quick.norm, quick.most)
            continue
        tile = np.ascontiguousarray(x[at].T)
        found = rounder(at, tile, None if importance is None else _weights(importance, n, at))
        # Transposed as float32, then narrowed: numpy moves single bytes across rows at a third of the speed.
        codes[at], scales[at] = np.ascontiguousarray(found.codes.T), found.scales
        if biases is not None and found.biases is not None:
            biases[at] = found.biases
        total.add(tile, found.error)
    shape = (rows, cols // n)
    return Encoded(
        pack(codes.reshape(rows, cols), codec.bits),
        scales.reshape(shape),
        None if biases is None else biases.reshape(shape),
        total.squared,
        total.norm,
        total.max_abs,
    )


@dataclass
class _Total:
    squared: float = 0.0
    norm: float = 0.0
    max_abs: float = 0.0

    def add(self, values: F32, error: F32) -> None:
        """Add a tile; float64, as squares of large values leave float32."""
        self.add_sums(_square(error), _square(values), float(max(error.max(), -error.min())))

    def add_sums(self, squared: float, norm: float, max_abs: float) -> None:
        """Add what is known of a tile."""
        self.max_abs = max(self.max_abs, max_abs)
        self.squared += squared
        self.norm += norm


def _square(x: F32) -> float:
    """Return the sum of squares: in float32 (fast) where that is an ordinary number, so that nothing was lost."""
    with np.errstate(over="ignore"):
        fast = float(np.einsum("ij,ij->j", x, x).sum(dtype=np.float64))
    return fast if SAFE[0] < fast < SAFE[1] else float((x.astype(np.float64) ** 2).sum())


SAFE = (1e-12, 1e12)
"""Numbers whose squares, and sums of squares, are ordinary float32 numbers."""


def _weighed(error: F32, weight: F32 | None, unit: F32 | None) -> F32:
    if unit is not None:
        error = error * unit
    return np.asarray(HOST.dot(error if weight is None else error * weight, error))


def _unit(x: F32) -> F32 | None:
    """Return a power of two per group that brings its largest value to about 1; None where all are near enough."""
    most = np.abs(x).max(axis=0)
    if ((most == 0) | ((most > SAFE[0]) & (most < SAFE[1]))).all():
        return None
    power = np.clip(np.frexp(most)[1], LEAST_EXPONENT, MOST_EXPONENT)
    return np.asarray(np.ldexp(np.float32(1), -power), np.float32)


def searched(x: F32, bits: int, counts_as: int = 1) -> tuple[F32, F32]:
    """Return (scale, bias) as `search` of groups `x` `[n, groups]` that count alike, with compiled loops where it pays.

    `counts_as`: how many weights each of these stands for, as work that loading the loops has to be worth.
    """
    kernels = compiled.affine(x.size * counts_as)
    if kernels is not None and x.shape[1] > 1:
        from ds4convert.formats.compiled import tiles

        rows = np.ascontiguousarray(x.T)
        if kernels.is_ordinary(rows, *SAFE):
            scale, bias = tiles.search(kernels, rows, None, bits)
            return scale, bias
    return search(arrays(), x, None, bits)


def search(ops: Arrays, x: F32, weight: F32 | None, bits: int) -> tuple[F32, F32]:
    """Return (scale, bias) of nearly the least squared error for groups `x` `[n, groups]` of values of any size."""
    unit = _unit(x)
    near = x if unit is None else x * unit
    scale, bias = affine.search(ops, ops.put(near), None if weight is None else ops.put(weight), bits)
    scale, bias = ops.get(scale), ops.get(bias)
    if unit is None:
        return scale, bias
    return np.asarray(scale / unit, np.float32), np.asarray(bias / unit, np.float32)


LEAST_WEIGHT = np.float32(1e-4)
"""Weight of a column that was never active, relative to its group's mean: its values should not be arbitrary."""


def _relative(importance: F32, n: int) -> F32:
    """Return the weights `[groups, n]` of one row's groups, of mean about 1 in each; all alike where none counts."""
    parts = importance.astype(np.float32).reshape(-1, n)
    mean = parts.mean(axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.where(mean > 0, parts / mean, np.float32(1))
    return np.maximum(relative, LEAST_WEIGHT)


def _weights(importance: F32, n: int, at: slice) -> F32:
    """Return the weights `[n, groups]` of some groups."""
    relative = _relative(importance, n)
    return np.ascontiguousarray(relative[np.arange(at.start, at.stop) % len(relative)].T)


def _tiles(count: int, size: int) -> Iterator[slice]:
    for first in range(0, count, size):
        yield slice(first, min(first + size, count))
