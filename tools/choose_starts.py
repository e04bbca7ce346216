"""Chooses the starts of the search in `ds4convert/formats/affine.py`, and prints them.

One after another: each is the candidate that lowers the summed error of many groups of normal values most, given those
before it. Run it after a change of the search: python tools/choose_starts.py
"""

from __future__ import annotations

import itertools

import numpy as np

from ds4convert.formats.affine import Search
from ds4convert.formats.array_backends import HOST
from ds4convert.formats.small_floats import F32, bf16_bits, bf16_values

GROUPS, SIZE, WANTED = 4096, 64, 9
CUT = {2: 0.30, 3: 0.20, 4: 0.12, 5: 0.08, 6: 0.05}
"""About the largest cut of a range that pays, by bits."""


def greedy(errors: F32, wanted: int) -> list[int]:
    """Return the numbers of the rows of `errors` `[candidates, groups]` to take, best first."""
    best, chosen = np.full(errors.shape[1], np.inf, np.float32), []
    for _ in range(wanted):
        n = int(np.minimum(errors, best).sum(axis=1).argmin())
        chosen.append(n)
        best = np.minimum(best, errors[n])
    return chosen


def main() -> None:
    """Print the table of cuts by bits, and that of steps for 8 bits."""
    rng = np.random.default_rng(0)
    x = bf16_values(bf16_bits(rng.standard_normal((SIZE, GROUPS)).astype(np.float32)))
    for bits, cut in CUT.items():
        look = Search(HOST, x, None, bits)
        ends = [round(float(e), 3) for e in np.linspace(-0.5 * cut, 1.3 * cut, 19)]
        pool = list(itertools.product(ends, ends))
        errors = np.stack([look.from_starts([start]).error for start in pool])
        print(f"    {bits}: {tuple(pool[n] for n in greedy(errors, WANTED))},")
    look = Search(HOST, x, None, 8)
    steps = list(itertools.product(range(-4, 10), range(-2, 4)))
    errors = np.stack([look.covering([step]).error for step in steps])
    print(f"    {tuple(steps[n] for n in greedy(errors, 12))}")


if __name__ == "__main__":
    main()
