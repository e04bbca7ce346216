"""A sample both ways: numpy adds with fused products on some processors, where the kernels do not."""

from __future__ import annotations

import numpy as np

from ds4convert.formats import affine
from ds4convert.formats.array_backends import HOST
from ds4convert.formats.compiled import affine_kernels, tiles

BITS, GROUPS, SIZE = 3, 96, 64


def equal() -> bool:
    """Return whether the kernels add, and search, to the very bits of the plain path.

    The sums are compared by themselves, as what a search finds rarely shows how they were taken.
    """
    rng = np.random.default_rng(BITS)
    a, b = rng.standard_normal((2, SIZE, GROUPS)).astype(np.float32)
    plain = [a.sum(axis=0), HOST.dot(a, b), *affine.search(HOST, a, None, BITS)]
    rows = np.ascontiguousarray(a.T)
    found = [*affine_kernels.added(a, b), *tiles.search(affine_kernels, rows, None, BITS)]
    return all(np.array_equal(x, y) for x, y in zip(plain, found, strict=True))
