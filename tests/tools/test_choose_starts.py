"""The choice of starts: each is the candidate that lowers the summed least error most, given those before it."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tests.tools.loaded import load

greedy = load("tools/choose_starts.py").greedy


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(1, 5), st.integers(1, 4))
def test_each_choice_is_the_best_one_beside_those_before_it(
    seed: int, candidates: int, groups: int, wanted: int
) -> None:
    errors = np.random.default_rng(seed).integers(0, 50, (candidates, groups)).astype(np.float32)
    chosen = greedy(errors, wanted)
    assert len(chosen) == wanted
    for n, taken in enumerate(chosen):

        def left(candidate: int, before: list[int] = chosen[:n]) -> float:
            return float(sum(min(errors[c, g] for c in [*before, candidate]) for g in range(groups)))

        assert left(taken) == min(map(left, range(candidates)))


def test_the_first_is_the_best_alone_and_the_second_the_best_beside_it() -> None:
    errors = np.array([[0, 9, 9], [4, 4, 4], [9, 1, 2.5]], np.float32)
    assert greedy(errors, 2) == [1, 2], "1 alone leaves 12, 2 leaves 12.5; beside 1, 2 leaves 7.5 and 0 leaves 8"
