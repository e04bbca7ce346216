"""The loops of `formats/compensated` over the columns of a group, compiled: the same steps, bit for bit.

Rows are worked on `LANES` at a time, so that a group of columns stays in the core's first cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ds4convert.formats.compiled.affine_kernels import LANES, code
from ds4convert.formats.compiled.options import F32, kernel


@kernel
def in_order(parts: tuple[F32, F32, F32], line: F32, top: Any, out: tuple[F32, F32, F32]) -> None:
    """Round columns in order, as `compensated._in_order`: `parts` are its values left and wanted, and its triangle.

    `out` takes codes, errors and shares; all of these are `[n, rows]`, `line` holds scales and biases `[2, rows]`.
    """
    left, wanted, part = parts
    codes, error, shares = out
    n, rows = left.shape
    for first in range(0, rows, LANES):
        last = min(first + LANES, rows)
        for i in range(n):
            by = part[i, i]
            for j in range(first, last):
                q = code(left[i, j], line[0, j], line[1, j], top)
                value = q * line[0, j] + line[1, j]
                codes[i, j], error[i, j] = q, wanted[i, j] - value
                shares[i, j] = (left[i, j] - value) / by
            for k in range(i + 1, n):
                much = part[i, k]
                for j in range(first, last):
                    left[k, j] -= much * shares[i, j]


@kernel
def moved(parts: tuple[F32, F32, F32], line: F32, top: Any, out: tuple[F32, F32]) -> None:
    """Move codes as `compensated._moved`: `parts` are its values wanted, its products and its moments.

    `out` holds codes and errors.
    """
    wanted, inner, near = parts
    codes, error = out
    n, rows = wanted.shape
    change = np.empty(LANES, np.float32)
    for first in range(0, rows, LANES):
        count = min(LANES, rows - first)
        for i in range(n):
            own = near[i, i]
            for j in range(count):
                g = first + j
                q = code(wanted[i, g] - error[i, g] + inner[i, g] / own, line[0, g], line[1, g], top)
                value = q * line[0, g] + line[1, g]
                change[j] = wanted[i, g] - value - error[i, g]
                codes[i, g] = q
                error[i, g] += change[j]
            for k in range(i + 1, n):
                much = near[i, k]
                for j in range(count):
                    inner[k, first + j] += much * change[j]
