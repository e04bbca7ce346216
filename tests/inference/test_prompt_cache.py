"""A cache that is filled, copied, taken back or left mid-stream drafts and decodes as if it were new."""

from __future__ import annotations

import copy
import functools

import mlx.core as mx
import pytest

from ds4convert.inference.decode import DecodeStats, fill_cache, level_cache, mtp_generate_step, plain_generate_step
from tests.inference.golden_data import golden, model

NAME = "tiny-a"
LENGTH = 12


def text() -> list[int]:
    tokens: list[int] = golden(NAME)["p1.input_ids"].tolist()
    return tokens[:60]


def new_cache() -> list:
    return model(NAME).make_cache() + model(NAME).make_mtp_cache()


def decode(rest: list[int], cache: list, depth: int = 2, length: int = LENGTH) -> tuple[list[int], DecodeStats]:
    stats = DecodeStats()
    steps = mtp_generate_step(
        mx.array(rest), model(NAME), draft_depth=depth, max_tokens=length, prompt_cache=cache, stats=stats
    )
    return [token for token, _, _ in steps], stats


@functools.cache
def as_new(prompt: tuple[int, ...]) -> tuple[list[int], DecodeStats]:
    return decode(list(prompt), new_cache())


def assert_as_new(prompt: list[int], cache: list, covered: int) -> None:
    """The cache decodes the same tokens as a new one, with the same drafts: so the head saw every position."""
    tokens, stats = decode(prompt[covered:], cache)
    fresh_tokens, fresh = as_new(tuple(prompt))
    assert tokens == fresh_tokens
    assert (stats.drafted_at, stats.accepted_at) == (fresh.drafted_at, fresh.accepted_at)


@pytest.mark.parametrize("step", [3, 512])
@pytest.mark.parametrize("count", [1, 2, 17])
def test_a_filled_cache_goes_on_as_if_it_had_been_given_the_tokens_itself(count: int, step: int) -> None:
    cache, seen = new_cache(), []
    fill_cache(
        text()[:count], model(NAME), cache, prefill_step_size=step, prompt_progress_callback=lambda *n: seen.append(n)
    )
    assert seen[-1] == (count, count)
    assert_as_new(text(), copy.deepcopy(cache), count)
    assert level_cache(model(NAME), cache, count) == count


def test_a_filled_cache_without_a_head_decodes_plainly() -> None:
    cache = model(NAME).make_cache()
    fill_cache(text()[:9], model(NAME), cache, prefill_step_size=4)
    tokens = [t for t, _, _ in plain_generate_step(mx.array(text()[9:]), model(NAME), max_tokens=9, prompt_cache=cache)]
    assert tokens == [t for t, _, _ in plain_generate_step(mx.array(text()), model(NAME), max_tokens=9)]
    assert level_cache(model(NAME), cache, len(text())) == len(text())


def test_the_same_prompt_again_takes_one_token_back() -> None:
    cache = new_cache()
    fill_cache(text(), model(NAME), cache)
    covered = level_cache(model(NAME), cache, len(text()) - 1)
    assert covered == len(text()) - 1, "the head has seen as much as the backbone has to keep"
    assert_as_new(text(), cache, covered)


@pytest.mark.parametrize("back", [1, 2, 9])
def test_a_cache_trimmed_layer_by_layer_is_levelled(back: int) -> None:
    """What mlx-lm's prompt cache does when only the beginning of a kept text fits."""
    cache = new_cache()
    fill_cache(text(), model(NAME), cache)
    for layer in cache:
        layer.trim(back)
    covered = level_cache(model(NAME), cache, len(text()) - back)
    assert covered == len(text()) - back - 1
    assert_as_new(text(), cache, covered)


@pytest.mark.parametrize("taken", [1, 2, 3, 6])
def test_a_stream_left_in_the_middle_leaves_a_cache_of_the_tokens_that_left(taken: int) -> None:
    cache = new_cache()
    steps = mtp_generate_step(mx.array(text()), model(NAME), draft_depth=3, prompt_cache=cache)
    left = [next(steps)[0] for _ in range(taken)]
    steps.close()
    said = text() + left
    assert level_cache(model(NAME), cache, len(said)) == len(said), "nothing has to be taken back"
    assert_as_new([*said, 5, 6, 7], cache, len(said))


def test_a_cache_that_no_longer_holds_the_place_says_so() -> None:
    cache = new_cache()
    fill_cache((text() * 20)[:400], model(NAME), cache)
    assert level_cache(model(NAME), cache, 100) == 0
