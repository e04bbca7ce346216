"""DeepSeek-V4.1 in the decoding loop: the plain text for every number of drafts, and state that is taken back exactly."""

from __future__ import annotations

import copy
from typing import Any

import mlx.core as mx
import pytest

from ds4convert.inference.decode import DecodeStats, deepest, fill_cache, mtp_generate_step, plain_generate_step
from ds4convert.inference.deepseek_v4.cache import SPARE
from ds4convert.inference.load import cache_size_bytes
from tests.inference.golden_data import max_diff
from tests.inference.golden_v41 import golden, ids, model, whole
from tests.support import nightly

EXACT = 5e-5
LONG = 26


def tokens(steps: Any) -> list[int]:
    return [token for token, _, _ in steps]


@pytest.fixture(scope="module")
def plain() -> list[int]:
    return tokens(plain_generate_step(mx.array(ids("p0")), model(), max_tokens=LONG))


def test_plain_text_is_as_recorded(plain: list[int]) -> None:
    assert plain[:25] == golden()["p0.greedy_ids"].tolist()


@pytest.mark.parametrize("depth", nightly([1, 2, 3, 4, 5], lambda n: n not in (2, 5)))
def test_greedy_text_is_the_plain_one_for_every_number_of_drafts(depth: int, plain: list[int]) -> None:
    stats = DecodeStats()
    steps = mtp_generate_step(mx.array(ids("p0")), model(), draft_depth=depth, max_tokens=LONG, stats=stats)
    assert tokens(steps) == plain and deepest(model()) == 5
    assert stats.accepted > 2 and stats.generated == stats.passes + stats.accepted + 1


def test_a_confidence_threshold_shortens_blocks_and_leaves_the_text(plain: list[int]) -> None:
    stats = DecodeStats()
    steps = mtp_generate_step(mx.array(ids("p0")), model(), confidence=0.5, max_tokens=LONG, stats=stats)
    assert tokens(steps) == plain and stats.drafted < 5 * stats.passes


@pytest.mark.parametrize("size", nightly([1, 3, 16, 41], lambda n: n < 16))
def test_a_prompt_in_pieces_gives_the_logits_of_the_whole(size: int) -> None:
    m, text = model(), ids("p1")
    expected, cache = m(mx.array([text])), m.make_cache()
    pieces = [m(mx.array([text[n : n + size]]), cache=cache) for n in range(0, len(text), size)]
    assert max_diff(mx.concatenate(pieces, axis=1), expected) < EXACT


def test_two_texts_in_a_batch_give_the_logits_of_each() -> None:
    m, a, b = model(), ids("p1")[:40], ids("p2")[:40]
    cache = m.make_cache()
    found = mx.concatenate([m(mx.array([a[:33], b[:33]]), cache=cache), m(mx.array([a[33:], b[33:]]), cache=cache)], 1)
    for row, text in zip(found, (a, b), strict=True):
        assert max_diff(row, m(mx.array([text]))[0]) < EXACT


@pytest.mark.parametrize(("length", "back"), [(7, 1), (26, 2), (26, 17), (59, 3), (59, 17)])
def test_tokens_taken_back_leave_no_trace(length: int, back: int) -> None:
    """Across the window of 16, entries of two tokens, n-grams of four, and the number of entries that are chosen."""
    m, text = model(), ids("p2")
    cache = m.make_cache()
    m(mx.array([text[:length]]), cache=cache)
    m(mx.array([text[100 : 100 + back]]), cache=cache)
    for part in cache:
        assert part.trim(back) == back
    follow = mx.array([text[length : length + 4]])
    assert max_diff(m(follow, cache=cache), m(mx.array([text[: length + 4]]))[:, -4:]) < EXACT


def test_more_than_is_held_is_not_taken_back() -> None:
    cache = model().make_cache()
    model()(mx.array([ids("p2")[:80]]), cache=cache)
    for part in cache:
        with pytest.raises(ValueError, match="cannot take back"):
            part.trim(SPARE + 2)


def test_state_can_be_stored_and_rebuilt() -> None:
    m, text = model(), ids("p1")
    cache = m.make_cache()
    m(mx.array([text[:31]]), cache=cache)
    again = [type(part).from_state(copy.copy(part.state)) for part in cache]
    rest = mx.array([text[31:]])
    assert max_diff(m(rest, cache=again), m(mx.array([text]))[:, 31:]) < EXACT
    assert sum(part.nbytes for part in again) == sum(part.nbytes for part in m.make_cache()) + sum(
        x.nbytes for part in again for x in part.state if isinstance(x, mx.array)
    )


def test_a_prompt_cache_goes_on_as_if_the_text_had_been_given_at_once(plain: list[int]) -> None:
    m, text = model(), ids("p1")
    cache = whole(m)
    fill_cache(text[:-3], m, cache, prefill_step_size=13)
    expected = tokens(mtp_generate_step(mx.array(text), m, max_tokens=6))
    assert tokens(mtp_generate_step(mx.array(text[-3:]), m, max_tokens=6, prompt_cache=cache)) == expected
    assert {part.offset for part in cache} == {len(text) + 6}


def test_state_takes_the_memory_that_is_counted_before_it() -> None:
    """Entries are allocated by 256, and counted one by one."""
    m, length = model(), 256
    cache = whole(m)
    m(mx.array([(ids("p2") * 2)[:length]]), cache=cache)
    spare = (256 - length // 2) * (m.args.head_dim + m.args.index_head_dim) * 4
    assert sum(part.nbytes for part in cache) == cache_size_bytes(m.args, length, 4) + spare
