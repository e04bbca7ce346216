"""Decode state by position: rings against a plain list, entries as they grow, how far back each cache can go, by hand."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds4convert.inference.deepseek_v4.cache import (
    ENTRY_STEP,
    SPARE,
    CompressorState,
    ContextCache,
    Entries,
    HeadCache,
    LayerCache,
    Ring,
)
from ds4convert.inference.deepseek_v41.cache import SourceCache
from ds4convert.inference.drafter import covered, take_back


def numbers(*values: float) -> mx.array:
    return mx.array([[[float(v)] for v in values]])


@settings(max_examples=40)
@given(st.integers(1, 6), st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_a_ring_holds_the_last_positions_of_a_list(capacity: int, counts: list[int]) -> None:
    ring, text = Ring(capacity), list[int]()
    for count in counts:
        ring.write(len(text), numbers(*range(len(text), len(text) + count)))
        text += range(len(text), len(text) + count)
        held = min(capacity, len(text))
        for n in range(1, held + 1):
            assert ring.read(len(text) - n, n)[0, :, 0].tolist() == text[-n:]
        slots = ring.positions(len(text)).tolist()
        assert sorted(p for p in slots if p >= 0) == text[-capacity:] and all(
            p % capacity == n for n, p in enumerate(slots)
        )


@settings(max_examples=40)
@given(st.integers(0, 5), st.integers(1, 4))
def test_positions_that_were_taken_back_are_written_over(back: int, again: int) -> None:
    ring = Ring(8)
    ring.write(0, numbers(*range(8)))
    ring.write(8 - back, numbers(*range(100, 100 + again)))
    wanted = [*range(8 - back), *range(100, 100 + again)]
    count = min(len(wanted), 8 - back if again < back else 8)
    assert ring.read(len(wanted) - count, count)[0, :, 0].tolist() == wanted[-count:]


def test_entries_grow_in_steps_and_keep_what_they_had() -> None:
    entries = Entries()
    entries.write(0, numbers(1, 2))
    assert entries.data is not None and entries.data.shape == (1, ENTRY_STEP, 1)
    entries.write(ENTRY_STEP - 1, numbers(8, 9))
    assert entries.data.shape == (1, 2 * ENTRY_STEP, 1) and entries.first(2)[0, :, 0].tolist() == [1, 2]
    assert entries.first(ENTRY_STEP + 1)[0, -2:, 0].tolist() == [8, 9]
    entries.write(16 * ENTRY_STEP, numbers(7))
    assert entries.data.shape[1] % ENTRY_STEP == 0 and entries.data.shape[1] > 16 * ENTRY_STEP


def test_entries_are_picked_per_text_of_a_batch() -> None:
    entries = Entries()
    entries.write(0, mx.array([[[0.0], [1.0], [2.0]], [[10.0], [11.0], [12.0]]]))
    found = entries.gather(mx.array([[[2, 0]], [[1, 1]]]))
    assert found[..., 0].tolist() == [[[2, 0]], [[11, 11]]]


@pytest.mark.parametrize(
    ("ratio", "offset", "first"),
    [(128, 0, 0), (128, 127, 0), (128, 128, 128), (128, 300, 256), (4, 0, 0), (4, 3, 0), (4, 4, 0), (4, 7, 0), (4, 8, 4), (4, 11, 4), (2, 5, 4)],
)  # fmt: skip
def test_an_entry_needs_its_window_and_where_windows_overlap_the_one_before(
    ratio: int, offset: int, first: int
) -> None:
    """architecture.md, section 6: ratio 4 overlaps, others do not."""
    state = CompressorState(ratio)
    assert state.first_needed(offset) == first and state.span == (2 * ratio if ratio == 4 else ratio)


def advanced(cache: LayerCache, count: int) -> LayerCache:
    cache.advance(count)
    return cache


@pytest.mark.parametrize(
    ("window", "ratio", "length", "most"),
    [(8, 0, 5, 5), (8, 0, 24, 24), (8, 0, 25, SPARE + 1), (8, 0, 1000, SPARE + 1), (8, 4, 1000, SPARE + 1), (200, 0, 216, 216), (200, 0, 217, SPARE + 1)],
)  # fmt: skip
def test_what_is_held_can_be_taken_back_and_a_token_more_not(window: int, ratio: int, length: int, most: int) -> None:
    for back in (most, most + 1):
        cache = advanced(LayerCache(window, ratio), length)
        if back <= most:
            assert cache.trim(back) == back and cache.offset == length - back and cache.written == length
        else:
            with pytest.raises(
                ValueError, match=rf"cannot take back {back} of {length} tokens: at most {SPARE + 1} are held"
            ):
                cache.trim(back)
            assert cache.offset == length
    assert advanced(LayerCache(window, ratio), length).is_trimmable() == (most == length)


def test_what_was_taken_back_once_counts_as_written() -> None:
    cache = advanced(LayerCache(8, 0), 100)
    cache.trim(10)
    with pytest.raises(ValueError, match="cannot take back 8 of 90"):
        cache.trim(8)
    assert cache.trim(7) == 7 and (cache.size(), cache.empty()) == (83, False) and LayerCache(8, 0).empty()


def test_a_head_gives_up_what_waits_and_takes_back_no_more_than_it_has() -> None:
    cache = HeadCache(8, 0)
    cache.advance(3)
    cache.pending = mx.zeros((1, 1, 2, 4))
    assert cache.nbytes == 32 and covered([cache]) == 4 and cache.trim(0) == 0 and cache.pending is not None
    assert cache.trim(4) == 4 and cache.offset == 0 and cache.pending is None and covered([cache]) == 0
    assert covered([]) == -1


def test_take_back_asks_every_cache_and_none_for_nothing() -> None:
    caches = [advanced(LayerCache(8, 0), 5) for _ in range(2)]
    take_back(caches, 2)
    take_back(caches, 0)
    assert [c.offset for c in caches] == [3, 3]


def test_a_context_begins_where_it_was_told_and_goes_back_no_further() -> None:
    cache = ContextCache(8)
    cache.restart(50)
    assert (cache.offset, cache.first, cache.written) == (50, 50, 50)
    cache.advance(10)
    assert cache.trim(10) == 10
    with pytest.raises(ValueError, match="cannot take back 1 of 50"):
        cache.trim(1)
    cache.advance(100)
    with pytest.raises(ValueError, match=f"cannot take back {SPARE + 1} of 150"):
        cache.trim(SPARE + 1)  # a block sees all eight positions before it
    assert cache.trim(SPARE) == SPARE


CACHES: dict[str, Any] = {
    "window": lambda: LayerCache(8, 0), "overlapping": lambda: LayerCache(8, 4), "plain ratio": lambda: LayerCache(8, 128),
    "head": lambda: HeadCache(8, 0), "context": lambda: ContextCache(8), "source": lambda: SourceCache(8, 2, 3), "ratio one": lambda: SourceCache(8, 1),
}  # fmt: skip


@pytest.mark.parametrize("kind", CACHES)
def test_a_cache_is_rebuilt_from_its_state(kind: str) -> None:
    cache = CACHES[kind]()
    cache.window.write(0, mx.ones((1, 3, 2)))
    cache.advance(3)
    if kind == "head":
        cache.pending = mx.ones((1, 1, 2, 4))
    if kind == "context":
        cache.first = 1
    again = type(cache).from_state(cache.state)
    assert (again.offset, again.written, again.ratio, again.window_size, again.nbytes) == (
        3,
        3,
        cache.ratio,
        8,
        cache.nbytes,
    )
    assert len(again.state) == len(cache.state) and mx.array_equal(again.window.read(0, 3), mx.ones((1, 3, 2)))
    assert getattr(again, "first", None) == getattr(cache, "first", None) and getattr(again, "reach", None) == getattr(
        cache, "reach", None
    )
    assert (getattr(again, "pending", None) is None) == (getattr(cache, "pending", None) is None)


def test_a_layer_of_v41_holds_what_it_makes() -> None:
    """v41.md: entries and index keys where a layer makes them; inputs only where an entry takes more than one token."""
    none, one, two = SourceCache(8), SourceCache(8, 1), SourceCache(8, 2, 3)
    assert [len(c._stores()) for c in (none, one, two)] == [1, 3, 6]
    assert none.entries is none.keys is none.main is none.history is None and one.main is None and two.main is not None
    assert two.history is not None and two.history.capacity == 3 + 1 + SPARE
