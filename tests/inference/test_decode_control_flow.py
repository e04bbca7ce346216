"""The draft/verify loop alone, driven by a model of a few lines whose sequence and drafts are known."""

from __future__ import annotations

import itertools

import mlx.core as mx
import pytest

from ds4convert.inference.decode import DecodeStats, mtp_generate_step
from ds4convert.inference.sampling import Sampling

VOCAB = 50
TRUTH = [(7 * n * n + 3 * n + 1) % VOCAB for n in range(5000)]


class FakeCache:
    """Remembers exactly what it was fed."""

    def __init__(self) -> None:
        self.items: list = []

    offset = property(lambda self: len(self.items))
    state = property(lambda self: [])
    pending = None

    def trim(self, count: int) -> int:
        del self.items[len(self.items) - count :]
        return count


class FakeModel:
    """Says TRUTH[t + 1] at position t; its head drafts right or wrong as `pattern(round, position)` says."""

    def __init__(self, pattern=lambda round_, position: True) -> None:
        self.pattern, self.rounds, self.passes = pattern, -1, []

    make_cache = staticmethod(lambda: [FakeCache()])
    make_mtp_cache = staticmethod(lambda: [FakeCache()])

    def __call__(self, inputs, cache=None, return_hidden=False):
        start = cache[0].offset
        cache[0].items += inputs[0].tolist()
        self.passes.append(inputs.shape[1])
        positions = range(start, start + inputs.shape[1])
        hidden = mx.array([[[float(t)] for t in positions]])
        return one_hot([TRUTH[t + 1] for t in positions]), hidden

    def mtp_forward(self, hidden, next_tokens, mtp_cache, return_hidden=False):
        values = hidden[0, :, 0].tolist()
        mtp_cache[0].items += list(zip(values, next_tokens[0].tolist(), strict=True))
        is_own = values[-1] % 1 != 0
        if return_hidden:
            self.draft = self.draft + 1 if is_own else 0
            self.rounds += not is_own
        t = int(values[-1])
        right = not return_hidden or self.pattern(self.rounds, self.draft)
        guesses = [0] * (len(values) - 1) + [TRUTH[t + 2] if right else (TRUTH[t + 2] + 1) % VOCAB]
        own = mx.array([[[int(value) + 1.5] for value in values]])
        return (one_hot(guesses), own) if return_hidden else one_hot(guesses)


def one_hot(tokens: list[int]) -> mx.array:
    return mx.where(mx.arange(VOCAB) == mx.array(tokens)[:, None], 30.0, 0.0)[None]


def prompt(length: int = 5) -> mx.array:
    return mx.array(TRUTH[:length])


def true_pairs(count: int) -> list[tuple[float, int]]:
    return [(float(t), TRUTH[t + 1]) for t in range(count)]


@pytest.mark.parametrize("depth", range(1, 7))
def test_every_pattern_of_acceptances_gives_the_plain_tokens_and_a_clean_state(depth: int) -> None:
    patterns = list(itertools.product([True, False], repeat=depth))
    model = FakeModel(lambda round_, position: patterns[round_ % len(patterns)][position])
    cache = model.make_cache() + model.make_mtp_cache()
    stats = DecodeStats()
    accepted = [len(list(itertools.takewhile(bool, pattern))) for pattern in patterns]
    total = 1 + sum(accepted) + len(patterns)
    steps = mtp_generate_step(prompt(), model, draft_depth=depth, max_tokens=-1, prompt_cache=cache, stats=stats)
    tokens, flags = [], []
    for token, logprobs, from_draft in itertools.islice(steps, total):
        assert logprobs.shape == (VOCAB,) and int(logprobs.argmax()) == token
        tokens.append(token)
        flags.append(from_draft)
    steps.close()
    assert tokens == TRUTH[5 : 5 + total]
    assert stats.accepted_per_pass == accepted
    assert sum(flags) == stats.accepted == sum(accepted)
    assert stats.drafted == depth * len(patterns) == sum(stats.drafted_at)
    for position in range(depth):
        assert stats.accepted_at[position] == sum(count > position for count in accepted)
    assert cache[0].items == TRUTH[: 5 + total]
    assert cache[1].items == true_pairs(5 + total - 1)
    assert cache[1].pending[0, :, 0].tolist() == [float(5 + total - 1)]


@pytest.mark.parametrize("taken", range(1, 20))
def test_closing_anywhere_leaves_exactly_the_tokens_that_left(taken: int) -> None:
    model = FakeModel(lambda round_, position: (round_ + position) % 3 != 2)
    cache = model.make_cache() + model.make_mtp_cache()
    steps = mtp_generate_step(prompt(), model, draft_depth=4, max_tokens=-1, prompt_cache=cache)
    assert [next(steps)[0] for _ in range(taken)] == TRUTH[5 : 5 + taken]
    steps.close()
    assert cache[0].items == TRUTH[: 5 + taken]
    assert cache[1].items == true_pairs(4 + taken)
    more = mtp_generate_step(
        mx.array(TRUTH[5 + taken : 8 + taken]), model, draft_depth=2, max_tokens=6, prompt_cache=cache
    )
    assert [token for token, _, _ in more] == TRUTH[8 + taken : 14 + taken]
    assert cache[0].items == TRUTH[: 14 + taken]
    assert cache[1].items == true_pairs(13 + taken)


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 7, 10])
def test_no_token_beyond_the_limit_and_no_draft_that_could_not_leave(max_tokens: int) -> None:
    model, stats = FakeModel(), DecodeStats()
    steps = mtp_generate_step(prompt(), model, draft_depth=3, max_tokens=max_tokens, stats=stats)
    assert [token for token, _, _ in steps] == TRUTH[5 : 5 + max_tokens]
    assert stats.generated == max_tokens == 1 + stats.passes + stats.accepted


@pytest.mark.parametrize("step_size", [1, 2, 3, 100])
def test_prompt_in_pieces_shows_every_pair_to_the_head(step_size: int) -> None:
    model = FakeModel()
    cache, calls = model.make_cache() + model.make_mtp_cache(), []
    steps = mtp_generate_step(
        prompt(11),
        model,
        max_tokens=1,
        prompt_cache=cache,
        prefill_step_size=step_size,
        prompt_progress_callback=lambda done, total: calls.append((done, total)),
    )
    assert [token for token, _, _ in steps] == TRUTH[11:12]
    assert cache[1].items == true_pairs(11)
    assert calls[0] == (0, 11) and calls[-1] == (11, 11)
    assert max(model.passes) <= step_size


@pytest.mark.parametrize("depth", [1, 3])
def test_processors_see_the_tokens_before_each_row(depth: int) -> None:
    model, seen = FakeModel(lambda round_, position: (round_ * 5 + position) % 4 != 3), []

    def processor(tokens: mx.array, logits: mx.array) -> mx.array:
        assert logits.shape == (1, VOCAB)
        seen.append(tokens.tolist())
        return logits

    steps = mtp_generate_step(prompt(), model, draft_depth=depth, max_tokens=30, logits_processors=[processor])
    assert [token for token, _, _ in steps] == TRUTH[5:35]
    for tokens in seen:
        wrong = [n for n, token in enumerate(tokens) if token != TRUTH[n]]
        assert wrong == [] or wrong[0] >= 5
    for length in range(5, 34):
        assert TRUTH[:length] in seen


def test_processor_changes_what_is_generated() -> None:
    banned = TRUTH[7]

    def ban(tokens: mx.array, logits: mx.array) -> mx.array:
        return mx.where(mx.arange(VOCAB) == banned, -100.0, logits)

    steps = mtp_generate_step(prompt(), FakeModel(), draft_depth=4, max_tokens=12, logits_processors=[ban])
    assert banned not in [token for token, _, _ in steps]


def test_cache_that_the_head_has_not_followed_still_decodes_right() -> None:
    model = FakeModel()
    cache = model.make_cache()
    model(mx.array([TRUTH[:9]]), cache=cache)
    steps = mtp_generate_step(mx.array(TRUTH[9:12]), model, draft_depth=2, max_tokens=9, prompt_cache=cache)
    assert [token for token, _, _ in steps] == TRUTH[12:21]
    assert len(cache) == 2


@pytest.mark.parametrize("depth", [0, 9, -1])
def test_depth_out_of_range_is_refused(depth: int) -> None:
    with pytest.raises(ValueError, match="draft depth"):
        next(mtp_generate_step(prompt(), FakeModel(), draft_depth=depth))


def test_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        next(mtp_generate_step(mx.array([], dtype=mx.int32), FakeModel()))


def test_two_ways_to_sample_at_once_are_refused() -> None:
    with pytest.raises(ValueError, match="not both"):
        next(mtp_generate_step(prompt(), FakeModel(), sampler=lambda x: x, sampling=Sampling(temp=1.0)))


@pytest.mark.parametrize(
    "setting", [{"temp": -1}, {"top_p": 1.5}, {"min_p": -0.1}, {"top_k": -1}, {"min_tokens_to_keep": 0}]
)
def test_sampling_values_out_of_range_are_refused_by_name(setting: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        Sampling(**setting)
