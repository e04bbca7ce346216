"""Taking tokens back restores all state: random feeds and take-backs against a fresh prefill."""

from __future__ import annotations

import copy
import random

import mlx.core as mx
import pytest

from ds4convert.inference.deepseek_v4.cache import SPARE, HeadCache, LayerCache, Ring
from tests.inference.golden_data import NAMES, golden, max_diff, model
from tests.support import nightly


@pytest.mark.parametrize("seed", nightly(range(6), lambda seed: seed in (1, 2, 4)))
@pytest.mark.parametrize("name", NAMES)
def test_random_take_backs_equal_a_fresh_prefill(name: str, seed: int) -> None:
    m, rng = model(name), random.Random(seed)
    ids = golden(name)["p2.input_ids"].tolist()
    cache, position = m.make_cache(), rng.randrange(1, 140)
    mx.eval(m(mx.array([ids[:position]]), cache=cache))
    for _ in range(25):
        count = rng.randrange(1, 10)
        wrong = [rng.randrange(m.args.vocab_size) for _ in range(count)]
        kept = rng.randrange(0, count + 1)
        tokens = ids[position : position + kept] + wrong[kept:]
        mx.eval(m(mx.array([tokens]), cache=cache))
        for layer in cache:
            layer.trim(count - kept)
        position += kept
    fresh = m.make_cache()
    mx.eval(m(mx.array([ids[:position]]), cache=fresh))
    tail = mx.array([ids[position : position + 12]])
    logits, hidden = m(tail, cache=cache, return_hidden=True)
    wanted, wanted_hidden = m(tail, cache=fresh, return_hidden=True)
    assert max_diff(logits, wanted) < 5e-5
    assert max_diff(hidden, wanted_hidden) < 5e-5
    for ours, theirs in zip(cache, fresh, strict=True):
        assert ours.offset == theirs.offset == position + 12
        assert_same_state(ours, theirs)


def assert_same_state(a: LayerCache, b: LayerCache) -> None:
    """Everything that later tokens can read is the same."""
    start = max(0, a.offset - a.window_size + 1)
    count = a.offset - start
    assert max_diff(a.window.read(start, count), b.window.read(start, count)) < 5e-5
    for ours, theirs in ((a.main, b.main), (a.index, b.index)):
        if ours is None:
            continue
        entries = a.offset // ours.ratio
        if entries:
            assert max_diff(ours.entries.first(entries), theirs.entries.first(entries)) < 5e-5
        first = ours.first_needed(a.offset)
        if count := a.offset - first:
            assert max_diff(ours.values.read(first, count), theirs.values.read(first, count)) < 5e-5
            assert max_diff(ours.gates.read(first, count), theirs.gates.read(first, count)) < 5e-5


def test_nothing_grows_per_token() -> None:
    m = model(NAMES[0])
    cache = m.make_cache()
    mx.eval(m(mx.array([[1, 2, 3]]), cache=cache))
    for _ in range(3):
        mx.eval(m(mx.array([[4] * 5]), cache=cache))
    before = [layer.nbytes for layer in cache]
    for _ in range(30):
        mx.eval(m(mx.array([[5]]), cache=cache))
    assert [layer.nbytes for layer in cache] == before


def test_take_back_beyond_the_spare_positions_is_refused_and_changes_nothing() -> None:
    m = model(NAMES[0])
    cache = m.make_cache()
    mx.eval(m(golden(NAMES[0])["p1.input_ids"][None], cache=cache))
    assert not any(layer.is_trimmable() for layer in cache)
    for layer in cache:
        with pytest.raises(ValueError, match="cannot take back"):
            layer.trim(SPARE + 10)
        assert layer.offset == 150
        assert layer.trim(SPARE + 1) == SPARE + 1


def test_short_sequences_can_be_taken_back_whole() -> None:
    m, ids = model(NAMES[0]), golden(NAMES[0])["p1.input_ids"][None]
    cache = m.make_cache()
    mx.eval(m(ids[:, :20], cache=cache))
    assert all(layer.is_trimmable() for layer in cache)
    for layer in cache:
        layer.trim(20)
        assert layer.empty()
    assert max_diff(m(ids[:, :30], cache=cache), m(ids[:, :30])) < 5e-5


def test_cache_copies_and_rebuilds_from_its_state() -> None:
    m, ids = model(NAMES[0]), golden(NAMES[0])["p1.input_ids"][None]
    cache = m.make_cache()
    mx.eval(m(ids[:, :50], cache=cache))
    copied = copy.deepcopy(cache)
    rebuilt = [type(layer).from_state(layer.state) for layer in cache]
    wanted = m(ids[:, 50:60], cache=cache)
    assert max_diff(m(ids[:, 50:60], cache=copied), wanted) == 0
    assert max_diff(m(ids[:, 50:60], cache=rebuilt), wanted) == 0
    assert [layer.offset for layer in copied] == [60] * len(cache)
    head = HeadCache(8, 0)
    head.pending = mx.ones((1, 1, 4, 8))
    again = HeadCache.from_state(head.state)
    assert again.pending is not None and again.nbytes == head.nbytes == 128
    head.trim(0)
    assert head.pending is not None


@pytest.mark.parametrize("count", [1, 3, 7, 10, 25])
def test_ring_keeps_the_last_positions_in_order(count: int) -> None:
    ring, end = Ring(10), 0
    while end < 100:
        positions = mx.arange(end, end + count).astype(mx.float32).reshape(1, count, 1)
        ring.write(end, positions)
        end += count
        held = min(end, 10)
        assert ring.read(end - held, held)[0, :, 0].tolist() == list(range(end - held, end))
        slots = [p for p in ring.positions(end).tolist() if p >= 0]
        assert sorted(slots) == list(range(end - held, end))


def test_batch_of_equal_lengths_equals_single_sequences() -> None:
    m, ids = model(NAMES[0]), golden(NAMES[0])["p1.input_ids"]
    batch = mx.stack([ids[:70], ids[70:140]])
    cache = m.make_cache()
    mx.eval(m(batch[:, :60], cache=cache))
    logits = m(batch[:, 60:], cache=cache)
    for row in range(2):
        assert max_diff(logits[row], m(batch[row : row + 1])[0, 60:]) < 5e-5
