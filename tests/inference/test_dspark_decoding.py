"""The decoding loop with a DSpark head: text, counters, caches, samples."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from ds4convert.inference.decode import (
    DecodeStats,
    default_depth,
    fill_cache,
    level_cache,
    mtp_generate_step,
    plain_generate_step,
)
from ds4convert.inference.deepseek_v4.cache import SPARE
from ds4convert.inference.sampling import Sampling
from tests.inference.golden_data import BLOCK, build, golden, max_diff, model

LONG, SHORT = 500, 200
"""Tokens of text: every night, and on every change; either goes over the window and a boundary of 128."""
PROMPTS = ("p0", "p1", "p2")


def ids(name: str, prompt: str) -> mx.array:
    return golden(name)[f"{prompt}.input_ids"]


def tokens(steps: Any) -> list[int]:
    return [token for token, _, _ in steps]


@pytest.fixture(scope="module")
def length(request: pytest.FixtureRequest) -> int:
    return LONG if request.config.getoption("--nightly") else SHORT


@pytest.fixture(scope="module")
def plain(length: int) -> dict[tuple[str, str], list[int]]:
    """Plain greedy text after every prompt."""
    return {
        (name, prompt): tokens(plain_generate_step(ids(name, prompt), model(name), max_tokens=length))
        for name in BLOCK
        for prompt in PROMPTS[:2]
    }


class Oracle:
    """A model whose blocks are replaced: `know` says which drafts it makes at which position of `text`."""

    def __init__(self, inner: Any, text: list[int], prompt: int, right: bool) -> None:
        self.inner, self.text, self.prompt, self.right = inner, text, prompt, right

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def draft_block(self, anchor: int, caches: list[Any]) -> Any:
        block = self.inner.draft_block(anchor, caches)
        start = caches[0].offset - self.prompt + 1
        return Told(block, self.text[start:], self.right)


class Told:
    def __init__(self, block: Any, after: list[int], right: bool) -> None:
        self.block, self.after, self.right, self.base = block, after, right, block.base
        self.confidence = block.confidence

    def logits(self, slot: int, drafts: list[mx.array]) -> mx.array:
        vocab = self.base.shape[-1]
        token = self.after[slot] if slot < len(self.after) else 0
        chosen = token if self.right else (token + 1) % vocab
        return mx.where(mx.arange(vocab) == chosen, 10.0, 0.0)[None]


@pytest.mark.nightly
@pytest.mark.parametrize("prompt", PROMPTS[:2])
@pytest.mark.parametrize("name", BLOCK)
def test_500_greedy_tokens_are_the_plain_ones_at_every_depth(name: str, prompt: str, plain: Any) -> None:
    m = model(name)
    assert default_depth(m) == m.args.dspark_block_size
    for depth in range(1, m.args.dspark_block_size + 1):
        stats = DecodeStats()
        steps = mtp_generate_step(ids(name, prompt), m, draft_depth=depth, max_tokens=LONG, stats=stats)
        assert tokens(steps) == plain[name, prompt], depth
        assert stats.accepted > 50 and stats.generated == stats.passes + stats.accepted + 1 == LONG
        assert len(stats.drafted_at) == depth


@pytest.mark.sampled(3)
@pytest.mark.parametrize("threshold", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("name", BLOCK)
def test_greedy_text_is_the_plain_one_with_a_confidence_threshold(
    name: str, threshold: float, plain: Any, length: int
) -> None:
    stats = DecodeStats()
    steps = mtp_generate_step(ids(name, "p0"), model(name), confidence=threshold, max_tokens=length, stats=stats)
    assert tokens(steps) == plain[name, "p0"]
    assert all(estimate >= threshold for estimate, _ in stats.estimates)
    whole = stats.passes * model(name).args.dspark_block_size
    assert stats.drafted < whole, "some blocks were cut"
    assert (stats.drafted == 0) == (threshold == 1.0), "nothing is certain"


@pytest.mark.sampled(2)
@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("name", BLOCK)
def test_drafters_that_are_always_right_or_always_wrong_leave_the_text(
    name: str, right: bool, plain: Any, length: int
) -> None:
    prompt, stats = ids(name, "p1"), DecodeStats()
    oracle = Oracle(model(name), plain[name, "p1"], prompt.size, right)
    assert tokens(mtp_generate_step(prompt, oracle, max_tokens=length, stats=stats)) == plain[name, "p1"]
    assert stats.acceptance == float(right)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("name", "prompt"), [(n, p) for n in BLOCK for p in PROMPTS])
def test_rounds_accept_what_the_official_code_would(name: str, prompt: str) -> None:
    g, stats = golden(name), DecodeStats()
    count = g[f"{prompt}.draft_ids"].shape[0]
    expected = [g[f"{prompt}.accepted"].tolist()[step] for step in g[f"{prompt}.round_step"].tolist()]
    tokens(mtp_generate_step(ids(name, prompt), model(name), max_tokens=count + 30, stats=stats))
    assert stats.accepted_per_pass[: len(expected)] == expected


# ------------------------------------------------------------------ caches


def whole(m: Any) -> list[Any]:
    return m.make_cache() + m.make_mtp_cache()


def assert_same_state(m: Any, found: list[Any], text: list[int]) -> None:
    """The caches continue as if `text` had been fed at once."""
    fresh = whole(m)
    m(mx.array([text]), cache=fresh)
    assert [c.offset for c in found] == [len(text)] * len(fresh)
    stages = len(m.mtp)
    for ours, theirs in zip(found[-stages:], fresh[-stages:], strict=True):
        count = min(len(text), m.args.sliding_window) - max(0, ours.first - max(0, len(text) - m.args.sliding_window))
        assert max_diff(*(c.window.read(len(text) - count, count) for c in (ours, theirs))) < 5e-5
    a, b = (m(mx.array([[3, 5]]), cache=copy.deepcopy(c)) for c in (found, fresh))
    assert max_diff(a, b) < 5e-5


@pytest.mark.sampled(4)
@pytest.mark.parametrize("length", [1, 2, 3, 7, 40, 97])
@pytest.mark.parametrize("name", BLOCK)
def test_a_closed_generator_leaves_exactly_the_tokens_that_left(name: str, length: int) -> None:
    m, prompt = model(name), ids(name, "p0")
    cache = whole(m)
    steps = mtp_generate_step(prompt, m, max_tokens=-1, prompt_cache=cache)
    said = [next(steps)[0] for _ in range(length)]
    steps.close()
    assert_same_state(m, cache, [*prompt.tolist(), *said])


@pytest.mark.parametrize("name", BLOCK)
def test_the_context_is_kept_up_by_prefill_in_pieces_by_plain_decoding_and_by_a_prompt_cache(name: str) -> None:
    m, prompt = model(name), ids(name, "p1").tolist()
    cache = whole(m)
    fill_cache(prompt[:50], m, cache, prefill_step_size=7)
    assert_same_state(m, cache, prompt[:50])
    said = tokens(plain_generate_step(mx.array(prompt[50:]), m, max_tokens=9, prompt_cache=cache))
    covered = cache[0].offset
    assert_same_state(m, cache, [*prompt, *said][:covered])
    rest = [*[*prompt, *said][covered:], 4]
    expected = tokens(mtp_generate_step(mx.array([*prompt, *said, 4]), m, max_tokens=40, stats=(a := DecodeStats())))
    found = tokens(mtp_generate_step(mx.array(rest), m, max_tokens=40, prompt_cache=cache, stats=(b := DecodeStats())))
    assert found == expected and a.accepted_per_pass == b.accepted_per_pass, "acceptance does not start low"


@pytest.mark.parametrize("back", [1, 2, SPARE])
@pytest.mark.parametrize("name", BLOCK)
def test_a_prompt_cache_that_is_taken_back_is_exact(name: str, back: int) -> None:
    m, text = model(name), [*ids(name, "p1").tolist(), *ids(name, "p0").tolist()]
    cache = whole(m)
    fill_cache(text, m, cache)
    assert level_cache(m, cache, len(text) - back) == len(text) - back
    assert_same_state(m, cache, text[: len(text) - back])


@pytest.mark.parametrize("name", BLOCK)
def test_a_backbone_cache_without_the_context_starts_it_at_its_own_position(name: str, plain: Any) -> None:
    m, prompt = model(name), ids(name, "p1")
    cache = m.make_cache()
    m(prompt[None, :-5], cache=cache)
    found = tokens(mtp_generate_step(prompt[-5:], m, max_tokens=60, prompt_cache=cache))
    assert found == plain[name, "p1"][:60]
    head = cache[len(m.layers) :]
    assert {c.first for c in head} == {prompt.size - 5}
    assert_same_state(m, cache, [*prompt.tolist(), *found])


def test_state_of_the_context_can_be_stored_and_rebuilt() -> None:
    m = model(BLOCK[0])
    cache = m.make_mtp_cache()[0]
    cache.restart(11)
    cache.window.write(11, mx.ones((1, 2, 8)))
    cache.advance(2)
    again = type(cache).from_state(cache.state)
    assert (again.first, again.offset, again.written) == (11, 13, 13)
    assert max_diff(again.window.read(11, 2), mx.ones((1, 2, 8))) == 0
    with pytest.raises(ValueError, match="cannot take back"):
        again.trim(3)


@pytest.mark.parametrize("name", BLOCK)
def test_memory_of_the_context_is_as_planned(name: str) -> None:
    from ds4convert.inference.load import context_size_bytes

    m = model(name)
    cache = whole(m)
    m(ids(name, "p1")[None], cache=cache)
    assert sum(c.nbytes for c in cache[len(m.layers) :]) == context_size_bytes(m.args, len(m.mtp), 4)


# ------------------------------------------------------------------ refusals


def test_depths_beyond_the_block_are_refused() -> None:
    m = model(BLOCK[0])
    with pytest.raises(ValueError, match=f"expected 1 to {m.args.dspark_block_size}"):
        next(mtp_generate_step(mx.array([1, 2]), m, draft_depth=m.args.dspark_block_size + 1))


def test_confidence_is_refused_with_a_classic_head() -> None:
    with pytest.raises(ValueError, match="needs a DSpark head"):
        next(mtp_generate_step(mx.array([1, 2]), model("tiny-a"), confidence=0.5))


# ------------------------------------------------------------------ samples


class Chain:
    """A Markov chain of four tokens with a block head that proposes other chances: all that the loop asks of a model."""

    class head:
        kind = "dspark"

    class args:
        dspark_block_size = 3

    P = np.array([[0.1, 0.5, 0.2, 0.2], [0.3, 0.1, 0.3, 0.3], [0.25, 0.25, 0.25, 0.25], [0.7, 0.1, 0.1, 0.1]])
    Q = np.array([[0.4, 0.2, 0.2, 0.2], [0.1, 0.3, 0.3, 0.3], [0.4, 0.1, 0.4, 0.1], [0.25, 0.25, 0.25, 0.25]])

    class Cache:
        offset = 0
        state: Any = ()

        def trim(self, count: int) -> int:
            self.offset -= count
            return count

    def make_cache(self) -> list[Any]:
        return [self.Cache()]

    make_mtp_cache = make_cache

    def tapped_forward(self, inputs: mx.array, cache: list[Any]) -> tuple[mx.array, mx.array, mx.array]:
        cache[0].offset += inputs.shape[1]
        return mx.array(np.log(self.P))[inputs], inputs[..., None].astype(mx.float32), inputs

    def append_context(self, taps: mx.array, caches: list[Any]) -> None:
        caches[0].offset += taps.shape[1]

    def draft_block(self, anchor: int, caches: list[Any]) -> Any:
        return ChainBlock(anchor)


class ChainBlock:
    base = mx.zeros((3, 4))

    def __init__(self, anchor: int) -> None:
        self.anchor = anchor

    def before(self, slot: int, drafts: list[mx.array]) -> mx.array:
        return drafts[slot - 1] if slot else mx.array([self.anchor])

    def logits(self, slot: int, drafts: list[mx.array]) -> mx.array:
        return mx.array(np.log(Chain.Q))[self.before(slot, drafts)]

    def confidence(self, drafts: list[mx.array]) -> mx.array:
        before = mx.concatenate([self.before(n, drafts) for n in range(len(drafts))])
        return mx.where(before == 2, -3.0, 3.0)


DRAWS = 20_000


def transitions(text: list[int]) -> np.ndarray:
    counts = np.zeros((4, 4))
    for a, b in itertools.pairwise(text):
        counts[a, b] += 1
    return counts


@pytest.mark.sampled(2)
@pytest.mark.parametrize("mode", ["speculative", "exact match"])
@pytest.mark.parametrize(("depth", "confidence"), [(1, 0.0), (3, 0.0), (3, 0.5)])
def test_sampled_text_is_distributed_as_without_the_head(depth: int, confidence: float, mode: str) -> None:
    """Chi-square of every row's transitions in 20,000 draws: 12 degrees of freedom, 32.9 is the 0.1 % limit."""
    mx.random.seed(7)
    settings = Sampling(temp=1.0)
    how: dict[str, Any] = {"sampling": settings} if mode == "speculative" else {"sampler": settings.sampler()}
    stats = DecodeStats()
    steps = mtp_generate_step(
        mx.array([0]), Chain(), draft_depth=depth, confidence=confidence, max_tokens=DRAWS, stats=stats, **how
    )
    counts = transitions(tokens(steps))
    expected = counts.sum(axis=1, keepdims=True) * Chain.P
    assert ((counts - expected) ** 2 / expected).sum() < 32.9
    assert 0.05 < stats.acceptance < 0.9
    wrong = counts.sum(axis=1, keepdims=True) * Chain.Q
    assert ((counts - wrong) ** 2 / wrong).sum() > 500, "the test tells the two apart"


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", BLOCK)
def test_sampled_text_of_a_model_is_distributed_as_its_own_probabilities(name: str) -> None:
    """Where each token falls in the cumulated probabilities it was drawn from: uniform, 9 degrees of freedom."""
    mx.random.seed(3)
    m, settings = model(name), Sampling(temp=1.0, top_p=0.9)
    found = np.zeros(10)
    rng = np.random.default_rng(0)
    steps = mtp_generate_step(ids(name, "p0"), m, max_tokens=900, sampling=settings)
    for token, row, _ in steps:
        p = np.asarray(mx.softmax(settings.logits(row[None])[0], axis=-1), dtype=np.float64)
        low = p[:token].sum()
        found[min(9, int((low + rng.random() * p[token]) * 10))] += 1
    assert ((found - 90) ** 2 / 90).sum() < 27.9


def test_a_processor_bans_a_token_from_drafts_and_text() -> None:
    m, prompt = model(BLOCK[0]), ids(BLOCK[0], "p0")
    often = max(text := tokens(plain_generate_step(prompt, m, max_tokens=40)), key=text.count)

    def ban(history: mx.array, row: mx.array) -> mx.array:
        return mx.where(mx.arange(row.shape[-1]) == often, -mx.inf, row)

    expected = tokens(plain_generate_step(prompt, m, max_tokens=60, logits_processors=[ban]))
    found = tokens(mtp_generate_step(prompt, m, max_tokens=60, logits_processors=[ban]))
    assert found == expected and often not in found


def test_bfloat16_decodes_with_finite_numbers() -> None:
    m, stats = build(BLOCK[0], mx.bfloat16), DecodeStats()
    found = list(mtp_generate_step(ids(BLOCK[0], "p0"), m, max_tokens=60, stats=stats))
    assert all(bool(mx.isfinite(row[token]).item()) for token, row, _ in found) and stats.accepted > 0
    assert m.mtp[-1].confidence_head.proj.weight.dtype == mx.float32


def test_a_larger_block_is_verified_whole_as_far_as_caches_can_take_back() -> None:
    """No tensor has the block's size, so a golden head can be run with another one: its text stays the plain one."""
    prompt, most = ids(BLOCK[0], "p1"), SPARE
    for size in (12, most + 4):
        m = build(BLOCK[0], dspark_block_size=size)
        assert default_depth(m) == min(size, most)
        wanted = tokens(plain_generate_step(prompt, m, max_tokens=80))
        for depth in (9, default_depth(m)):
            stats = DecodeStats()
            assert tokens(mtp_generate_step(prompt, m, draft_depth=depth, max_tokens=80, stats=stats)) == wanted
            assert len(stats.drafted_at) == depth
        with pytest.raises(ValueError, match=f"expected 1 to {min(size, most)}"):
            next(mtp_generate_step(prompt, m, draft_depth=most + 1))
    right, stats = Oracle(m, wanted, prompt.size, True), DecodeStats()
    assert tokens(mtp_generate_step(prompt, right, max_tokens=80, stats=stats)) == wanted
    assert max(stats.accepted_per_pass) == most, "every draft of the deepest block can be kept"
