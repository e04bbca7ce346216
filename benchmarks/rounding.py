"""Squared error of the searched rounding against MLX's own, per format.

    python benchmarks/rounding.py [--values 2097152] [--demo manifests/demo] [--formats NAME ...]

Three kinds of weights: normal in BF16, normal that went through FP4 (a block scale per 32), and the matrices of a
checkpoint (FP4, FP8 and BF16, two experts of each layer). The baseline is mx.quantize of the same BF16 values; errors
are taken in float64 from what mx.dequantize makes of either. "worst group" is the highest error of a group relative to
the baseline's; above 1 would be a group that the search has made worse. Groups that the baseline holds exactly are left
out of it if the search does too, and infinite if it does not.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from ds4convert.checkpoint import tensors
from ds4convert.checkpoint.tensors import LogicalTensor, decode, grid_of
from ds4convert.converted.open import open_checkpoint
from ds4convert.formats import blocks, small_floats
from ds4convert.formats.codecs import CODECS, Codec
from ds4convert.formats.rounding import Encoded, encode, encode_fp4
from ds4convert.formats.small_floats import F32, U8
from ds4convert.storage.byte_source import Numbered

COLS = 4096
SEED = 2026
FORMATS = (*(f"affine-{bits}-g64" for bits in (2, 3, 4, 5, 6, 8)), "mxfp4", "mxfp8", "nvfp4")
QUANTIZABLE = {"fp4", "fp8", "bf16"}
EXPERTS = 2
"""Experts of each layer that are measured."""


@dataclass(frozen=True)
class Matrix:
    """Values `[rows, cols]`, and the FP4 codes and block scales that they come from, if they do."""

    values: F32
    fp4: tuple[U8, U8] | None = None

    def rounded(self, codec: Codec) -> Encoded:
        """Return the matrix as `quantize` would write it."""
        return encode_fp4(*self.fp4, codec, "optimal") if self.fp4 else encode(self.values, codec, "optimal")


@dataclass
class Sums:
    """Squared errors of both roundings, squared values, and the worst ratio of a group."""

    found: float = 0.0
    plain: float = 0.0
    norm: float = 0.0
    worst: float = 0.0

    def add(self, matrix: Matrix, codec: Codec) -> None:
        """Round a matrix both ways and add what was lost."""
        found, plain = group_errors(matrix, codec, ours(matrix, codec)), group_errors(matrix, codec, mlx(matrix, codec))
        self.found, self.plain = self.found + float(found.sum()), self.plain + float(plain.sum())
        self.norm += float((matrix.values.astype(np.float64) ** 2).sum())
        counts = (found > 0) | (plain > 0)
        with np.errstate(divide="ignore"):
            self.worst = max(self.worst, float((found[counts] / plain[counts]).max(initial=0)))

    def row(self) -> str:
        """Return the cells of a table."""
        saved = f"{100 * (1 - self.found / self.plain):.1f} %" if self.plain else "both exact"
        return f"{self.plain / self.norm:.3e} | {self.found / self.norm:.3e} | {saved} | {self.worst:.6f}"


def ours(matrix: Matrix, codec: Codec) -> F32:
    """Return what MLX reads of our rounding."""
    e = matrix.rounded(codec)
    parts = [mx.array(e.weight), mx.array(e.scales)]
    if e.biases is not None:
        parts = [parts[0], *(p.view(mx.bfloat16).astype(mx.float32) for p in (parts[1], mx.array(e.biases)))]
    return np.array(mx.dequantize(*parts, **codec.table(), dtype=mx.float32))


def mlx(matrix: Matrix, codec: Codec) -> F32:
    """Return what MLX reads of its own rounding."""
    parts = mx.quantize(mx.array(matrix.values).astype(mx.bfloat16), **codec.table())
    wide = [p.astype(mx.float32) if p.dtype == mx.bfloat16 else p for p in parts]
    return np.array(mx.dequantize(*wide, **codec.table(), dtype=mx.float32))


def group_errors(matrix: Matrix, codec: Codec, values: F32) -> np.ndarray:
    """Return the squared error of each group, float64."""
    rest = values.astype(np.float64) - matrix.values
    squares: np.ndarray = (rest**2).reshape(-1, codec.group_size).sum(axis=1)
    return squares


def normal(rng: np.random.Generator, rows: int) -> F32:
    """Return normal values that BF16 holds."""
    return small_floats.bf16_values(small_floats.bf16_bits(rng.standard_normal((rows, COLS)).astype(np.float32)))


def through_fp4(rng: np.random.Generator, rows: int) -> Matrix:
    """Return normal weights that went through FP4, rows of all sizes: where a group's largest lies then varies."""
    x = rng.standard_normal((rows, COLS // 32, 32)).astype(np.float32) * np.exp2(rng.random((rows, 1, 1)) - 6)
    power = np.ceil(np.log2(np.abs(x).max(axis=2, keepdims=True) / 6))
    steps = np.convolve(small_floats.fp4_values()[:8], [0.5, 0.5], "valid")
    codes = np.searchsorted(steps, np.abs(x / 2.0**power)) + 8 * (x < 0)
    codes = codes.reshape(rows, COLS).astype(np.uint8)
    packed, scales = codes[:, ::2] | codes[:, 1::2] << 4, (power[..., 0] + 127).astype(np.uint8)
    return Matrix(blocks.decode_fp4(packed, scales), (packed, scales))


def matrices_of(folder: Path) -> Iterator[Matrix]:
    """Yield the matrices of a source checkpoint whose rows are whole groups of 128."""
    view = open_checkpoint(folder).view
    reader = view.reader()
    try:
        for tensor in view.tensors.values():
            if tensor.store in QUANTIZABLE and tensor.rows > 1 and tensor.cols % 128 == 0 and len(tensor.shape) > 1:
                for number in range(min(tensor.matrices, EXPERTS)):
                    yield _read(tensor, reader, number)
    finally:
        reader.close()


def _read(tensor: LogicalTensor, reader: Numbered, number: int) -> Matrix:
    packed, grid = (
        tensors.codes(tensor, reader, number, 0, tensor.rows),
        grid_of(tensor, reader, number),
    )
    values = decode(tensor, packed, grid, 0)
    return Matrix(values, (packed, grid.scales) if tensor.store == "fp4" and grid is not None else None)


def show(name: str, matrices: Iterable[Matrix], formats: Iterable[str]) -> None:
    """Print the lines of one kind of weights."""
    sums = {f: Sums() for f in formats}
    for matrix in matrices:
        for f, s in sums.items():
            s.add(matrix, CODECS[f])
    for f, s in sums.items():
        print(f"| {name} | {f} | {s.row()} |", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--values", type=int, default=1 << 21, help="Weights of each random kind.")
    parser.add_argument("--demo", type=Path, default=Path(__file__).parents[1] / "manifests" / "demo")
    parser.add_argument("--formats", nargs="+", default=FORMATS, choices=sorted(CODECS))
    args = parser.parse_args()
    mx.set_default_device(mx.cpu)
    rng, rows = np.random.default_rng(SEED), max(args.values // COLS, 1)
    print("| weights | format | mx.quantize, relative | searched, relative | saved | worst group |")
    print("| --- | --- | --- | --- | --- | --- |")
    show("normal, BF16", [Matrix(normal(rng, rows))], args.formats)
    show("normal, through FP4", [through_fp4(rng, rows)], [f for f in args.formats if f != "mxfp4"])
    trained = list(matrices_of(args.demo))
    of_fp4 = [m for m in trained if m.fp4]
    show("trained, FP4 experts", of_fp4, [f for f in args.formats if f != "mxfp4"])
    show("trained, FP8 and BF16", [m for m in trained if not m.fp4], args.formats)


if __name__ == "__main__":
    main()
