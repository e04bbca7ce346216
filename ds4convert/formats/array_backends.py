"""The few array operations of the rounding searches, over numpy or over mlx, so that they are written once.

numpy works in tiles that stay in a core's cache, and on all cores (its operations release the interpreter). Where MLX
has a GPU, whole chunks go there. Sums differ in their last bits between processors; what is found is measured after.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, Protocol

import numpy as np

HOST_TILE = 1 << 16
"""Values that numpy works on at once: 256 kB per temporary, which a core's cache holds."""

DEVICE_TILE = 1 << 22
"""Values that a GPU works on at once."""


class Arrays(Protocol):
    """Operations on arrays of one library; elementwise, float32, but where it says so."""

    xp: Any
    """The library: where, maximum, matmul, argmin, take; methods sum, min and max of its arrays."""
    tile: int

    def put(self, values: np.ndarray) -> Any:
        """Return a numpy array as one of this library."""

    def get(self, values: Any) -> np.ndarray:
        """Return an array of this library as numpy's."""

    def space(self, shape: tuple[int, ...]) -> Any:
        """Return room for the results of `codes` and `rest`, where the library writes in place."""

    def codes(self, x: Any, scale: Any, bias: Any, top: int, room: Any = None) -> Any:
        """Return the codes nearest to `x` `[n, groups]` for `scale` and `bias` `[groups]`: whole numbers 0 to `top`."""

    def rest(self, x: Any, scale: Any, bias: Any, top: int, room: Any = None) -> Any:
        """Return what the nearest codes leave of `x`: `x - (code * scale + bias)`, `[n, groups]`."""

    def dot(self, a: Any, b: Any) -> Any:
        """Return the sums `[groups]` of the products of two `[n, groups]`."""

    def bf16(self, x: Any) -> Any:
        """Round to BF16, ties to even."""

    def bf16_at(self, x: Any, steps: int) -> Any:
        """Cut off to BF16 towards zero, then go `steps` representable values away from zero."""


class Host:
    """numpy."""

    xp: Any = np
    tile = HOST_TILE

    def put(self, values: np.ndarray) -> Any:
        """Return the array as it is."""
        return values

    def get(self, values: Any) -> np.ndarray:
        """Return the array as it is."""
        return np.asarray(values)

    def space(self, shape: tuple[int, ...]) -> Any:
        """Return two arrays: writing over the same memory saves half of the time."""
        return np.empty(shape, np.float32), np.empty(shape, np.float32)

    def codes(self, x: Any, scale: Any, bias: Any, top: int, room: Any = None) -> Any:
        """Return the codes nearest to `x`."""
        q = np.subtract(x, bias, out=None if room is None else room[0])
        with np.errstate(divide="ignore", invalid="ignore"):  # a scale too small for BF16 is 0: never the better one
            np.divide(q, scale, out=q)
        np.rint(q, out=q)
        return np.clip(q, np.float32(0), np.float32(top), out=q)

    def rest(self, x: Any, scale: Any, bias: Any, top: int, room: Any = None) -> Any:
        """Return what the nearest codes leave of `x`."""
        q = self.codes(x, scale, bias, top, room)
        left = np.subtract(x, bias, out=None if room is None else room[1])
        np.multiply(q, scale, out=q)
        return np.subtract(left, q, out=left)

    def dot(self, a: Any, b: Any) -> Any:
        """Return the sums of products, without an array of them."""
        return np.einsum("ij,ij->j", a, b)

    def bf16(self, x: Any) -> Any:
        """Round to BF16, ties to even."""
        bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
        bits = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        return (bits & np.uint32(0xFFFF0000)).view(np.float32)

    def bf16_at(self, x: Any, steps: int) -> Any:
        """Cut off to BF16 towards zero, then go `steps` representable values away from zero."""
        bits = np.ascontiguousarray(x, np.float32).view(np.int32) & np.int32(-0x10000)
        return (bits + np.int32(steps * 0x10000)).view(np.float32)


HOST = Host()


class Device:
    """mlx, on its default device."""

    tile = DEVICE_TILE

    def __init__(self) -> None:
        import mlx.core as mx

        self.xp: Any = mx

    def put(self, values: np.ndarray) -> Any:
        """Return a copy in mlx's memory."""
        return self.xp.array(values)

    def get(self, values: Any) -> np.ndarray:
        """Return a numpy copy, evaluated."""
        return np.array(values)

    def space(self, shape: tuple[int, ...]) -> Any:
        """Return None: mlx makes its own."""
        return None

    def codes(self, x: Any, scale: Any, bias: Any, top: int, room: Any = None) -> Any:
        """Return the codes nearest to `x`."""
        return self.xp.clip(self.xp.round((x - bias) / scale), 0, top)

    def rest(self, x: Any, scale: Any, bias: Any, top: int, room: Any = None) -> Any:
        """Return what the nearest codes leave of `x`."""
        return x - bias - self.codes(x, scale, bias, top) * scale

    def dot(self, a: Any, b: Any) -> Any:
        """Return the sums of products."""
        return (a * b).sum(axis=0)

    def bf16(self, x: Any) -> Any:
        """Round to BF16, ties to even."""
        return x.astype(self.xp.bfloat16).astype(self.xp.float32)

    def bf16_at(self, x: Any, steps: int) -> Any:
        """Cut off to BF16 towards zero, then go `steps` representable values away from zero."""
        bits = x.view(self.xp.int32) & -0x10000
        return (bits + steps * 0x10000).view(self.xp.float32)


@cache
def _device() -> Arrays | None:
    import mlx.core as mx

    return Device() if mx.metal.is_available() else None


def arrays() -> Arrays:
    """Return mlx where it has a GPU, else numpy, which is faster on processors and uses all cores."""
    return _device() or HOST


def on_host() -> bool:
    """Return whether the searches run in numpy, on this machine's processors."""
    return arrays() is HOST


BOTH: Mapping[str, type] = {"numpy": Host, "mlx": Device}
"""All libraries by name, for tests that want the same result of each."""
