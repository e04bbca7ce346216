"""Greedy decoding with the head equals plain greedy decoding, on the golden checkpoints, with any head."""

from __future__ import annotations

import functools
import itertools

import mlx.core as mx
import pytest

from ds4convert.inference.decode import DecodeStats, mtp_generate_step, plain_generate_step
from ds4convert.inference.sampling import Sampling
from tests.inference.golden_data import LOGIT_TOLERANCE, NAMES, PROMPTS, build, golden, max_diff, model
from tests.support import combined

SHORT = 64
LENGTHS = [SHORT, pytest.param(500, marks=pytest.mark.nightly)]
"""500 tokens of one checkpoint at every depth are in tests/demo, on each change."""


ENDS = combined(NAMES, [1, 4], is_repetition=lambda name, depth: name != NAMES[0] and depth == 1)
"""The smallest and the largest depth."""


@functools.cache
def plain(name: str, length: int) -> list[int]:
    steps = plain_generate_step(golden(name)["p1.input_ids"], model(name), max_tokens=length)
    return [token for token, _, _ in steps]


class OtherHead:
    """The model with its head's logits replaced by `change(logits, t)`, t the position of the last pair."""

    def __init__(self, inner, change) -> None:
        self.inner, self.change = inner, change

    def __call__(self, *args, **kwargs):
        return self.inner(*args, **kwargs)

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def mtp_forward(self, hidden, next_tokens, mtp_cache, return_hidden=False):
        logits, own = self.inner.mtp_forward(hidden, next_tokens, mtp_cache, return_hidden=True)
        logits = self.change(logits, mtp_cache[0].offset - 1)
        return (logits, own) if return_hidden else logits


def run(m, name: str, depth: int, length: int = SHORT, **options) -> tuple[list[int], DecodeStats]:
    stats = DecodeStats()
    steps = mtp_generate_step(
        golden(name)["p1.input_ids"], m, draft_depth=depth, max_tokens=length, stats=stats, **options
    )
    return [token for token, _, _ in steps], stats


@pytest.mark.sampled(2)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(
    ("name", "depth"),
    combined(NAMES, [1, 2, 3, 4], is_repetition=lambda name, depth: name != NAMES[0] and depth in (2, 3)),
)
def test_greedy_tokens_equal_plain_decoding(name: str, depth: int, length: int) -> None:
    tokens, stats = run(model(name), name, depth, length)
    assert tokens == plain(name, length)
    assert stats.generated == length == 1 + stats.passes + stats.accepted
    assert 0.2 < stats.acceptance < 1
    assert len(stats.drafted_at) == depth
    assert min(stats.backbone_seconds, stats.head_seconds, stats.other_seconds) > 0


@pytest.mark.sampled(1)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("name", "depth"), ENDS)
def test_greedy_tokens_survive_a_head_that_is_always_wrong(name: str, depth: int, length: int) -> None:
    tokens, stats = run(OtherHead(model(name), lambda logits, t: -logits), name, depth, length)
    assert tokens == plain(name, length)
    assert stats.accepted <= 2


@pytest.mark.sampled(1)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("name", "depth"), ENDS)
def test_greedy_tokens_survive_a_head_that_is_always_right(name: str, depth: int, length: int) -> None:
    line = mx.concatenate([golden(name)["p1.input_ids"], mx.array(plain(name, length) + [0] * 10)])

    def oracle(logits: mx.array, t: int) -> mx.array:
        return mx.zeros_like(logits) + (mx.arange(logits.shape[-1]) == line[t + 2])

    tokens, stats = run(OtherHead(model(name), oracle), name, depth, length)
    assert tokens == plain(name, length)
    assert stats.accepted == stats.drafted
    assert stats.tokens_per_pass > 0.9 * (depth + 1)


@pytest.mark.parametrize("name", NAMES)
def test_head_with_exchanged_norms_changes_no_token(name: str) -> None:
    m = build(name)
    head = m.mtp[0]
    head.enorm, head.hnorm = head.hnorm, head.enorm
    head.ffn.switch_mlp.gate_proj.weight = head.ffn.switch_mlp.gate_proj.weight[::-1]
    tokens, _ = run(m, name, 2)
    assert tokens == plain(name, SHORT)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize(("name", "i"), combined(NAMES, PROMPTS, is_repetition=lambda name, i: i < 2))
def test_verified_rows_are_the_golden_rows(name: str, i: int, depth: int) -> None:
    """Log-probabilities that leave the loop, accepted or not, are those of one-token decoding; so is the
    state.
    """
    m, g = model(name), golden(name)
    cache = m.make_cache() + m.make_mtp_cache()
    stats = DecodeStats()
    steps = mtp_generate_step(
        g[f"p{i}.input_ids"], m, draft_depth=depth, max_tokens=-1, prompt_cache=cache, stats=stats
    )
    rows = []
    for k, (token, logprobs, _) in enumerate(itertools.islice(steps, 41)):
        assert token == g[f"p{i}.greedy_ids"][k].item()
        rows.append(logprobs)
    steps.close()
    wanted = mx.concatenate([g[f"p{i}.logits"][-1:], g[f"p{i}.decode_logits"]])
    wanted = wanted - mx.logsumexp(wanted, axis=-1, keepdims=True)
    assert max_diff(mx.stack(rows), wanted) <= LOGIT_TOLERANCE
    assert stats.accepted < stats.drafted
    length = g[f"p{i}.input_ids"].size
    assert cache[0].offset == length + 41
    assert cache[-1].offset == length + 40
    assert_head_agrees(m, g, i, cache)


def assert_head_agrees(m, g, i: int, cache) -> None:
    """The head's state after the loop drafts as if it had been fed every true pair, one by one."""
    line = mx.concatenate([g[f"p{i}.input_ids"], g[f"p{i}.greedy_ids"], mx.array([3])]).astype(mx.int32)
    _, hidden = m(line[None, :-1], return_hidden=True)
    fresh = m.make_mtp_cache()
    wanted = m.mtp_forward(hidden, line[None, 1:], fresh)[0, -1]
    found = m.mtp_forward(cache[-1].pending, mx.array([[3]]), [cache[-1]])[0, -1]
    assert max_diff(found, wanted) <= LOGIT_TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_first_drafts_agree_with_the_golden_drafts(name: str) -> None:
    """At depth 1 the drafts of the loop are the golden ones at the positions where it drafts."""
    m, g = model(name), golden(name)
    for i in PROMPTS:
        match = g[f"p{i}.draft_match"].tolist()
        position, accepted, drafted = 0, 0, 0
        while position + 2 < 41:
            accepted, drafted = accepted + match[position], drafted + 1
            position += 1 + match[position]
        stats = DecodeStats()
        mx.eval([token for token, _, _ in mtp_generate_step(g[f"p{i}.input_ids"], m, max_tokens=41, stats=stats)])
        assert (stats.drafted, stats.accepted) == (drafted, accepted)


@pytest.mark.parametrize("depth", [1, 3])
def test_conversation_continued_from_the_cache_equals_a_fresh_one(depth: int) -> None:
    m, g = model(NAMES[0]), golden(NAMES[0])
    first, second = g["p1.input_ids"], g["p0.input_ids"]
    cache = m.make_cache() + m.make_mtp_cache()
    steps = mtp_generate_step(first, m, draft_depth=depth, max_tokens=23, prompt_cache=cache)
    said = [token for token, _, _ in steps]
    steps = mtp_generate_step(second, m, draft_depth=depth, max_tokens=20, prompt_cache=cache)
    continued = [token for token, _, _ in steps]
    whole = mx.concatenate([first, mx.array(said), second])
    assert continued == [token for token, _, _ in plain_generate_step(whole, m, max_tokens=20)]


@pytest.mark.parametrize("name", NAMES)
def test_probabilistic_mode_runs_on_the_real_head(name: str) -> None:
    mx.random.seed(0)
    sampling = Sampling(temp=0.8, top_p=0.9, top_k=20, min_p=0.01)
    tokens, stats = run(model(name), name, 2, sampling=sampling)
    assert len(tokens) == SHORT and 0 < stats.acceptance < 1


def test_model_without_a_head_is_refused_with_a_reason() -> None:
    m = build(NAMES[0], num_nextn_predict_layers=0)
    assert "num_nextn_predict_layers" in m.head.reason
    with pytest.raises(ValueError, match="no head"):
        next(mtp_generate_step(mx.array([1, 2]), m))
    with pytest.raises(ValueError, match="no head"):
        m.mtp_forward(mx.zeros((1, 1, 4, 256)), mx.array([[1]]), [])
