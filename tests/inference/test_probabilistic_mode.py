"""Probabilistic acceptance keeps the backbone's distribution: chi-square against the exact probabilities.

A Markov chain stands in for the backbone and another one for the head, so the distribution of every token is
known.
"""

from __future__ import annotations

import itertools
import math

import mlx.core as mx
import pytest

from ds4convert.inference import decode, sampling
from ds4convert.inference.decode import mtp_generate_step
from ds4convert.inference.sampling import Sampling

VOCAB = 8
SAMPLES = 10_000
SHORT = 5_000
BACKBONE = 1.5 * mx.random.normal((VOCAB, VOCAB), key=mx.random.key(1))
HEAD = BACKBONE + 1.2 * mx.random.normal((VOCAB, VOCAB), key=mx.random.key(2))


class ChainCache:
    offset, state, pending = 0, (), None

    def trim(self, count: int) -> int:
        return count


class Chain:
    """Next-token logits depend on the last token alone; the head knows another chain."""

    make_cache = staticmethod(lambda: [ChainCache()])
    make_mtp_cache = staticmethod(lambda: [ChainCache()])

    def __call__(self, inputs, cache=None, return_hidden=False):
        return BACKBONE[inputs], inputs[..., None].astype(mx.float32)

    def mtp_forward(self, hidden, next_tokens, mtp_cache, return_hidden=False):
        return HEAD[next_tokens], hidden[:, -1:]


def probabilities(settings: Sampling) -> list[list[float]]:
    """Exact row-wise next-token probabilities of the backbone under the settings, without any filter of
    ours.
    """
    rows = mx.softmax(BACKBONE, axis=-1).tolist()
    result = []
    for row in rows:
        order = sorted(range(VOCAB), key=lambda n: -row[n])
        kept, mass = set(), 0.0
        for token in order:
            if mass < settings.top_p or not 0 < settings.top_p < 1:
                kept.add(token)
            mass += row[token]
        kept = {n for n in kept if row[n] >= settings.min_p * row[order[0]]}
        if settings.top_k:
            kept &= set(order[: settings.top_k])
        weights = [row[n] ** (1 / settings.temp) if n in kept else 0.0 for n in range(VOCAB)]
        result.append([weight / sum(weights) for weight in weights])
    return result


def draw(settings: Sampling, depth: int, samples: int = SAMPLES) -> list[tuple[int, int, int]]:
    """The first, second and third token after token 0, over and over in one run: each restart is a new
    prompt.
    """
    model, result = Chain(), []
    for _ in range(samples):
        steps = mtp_generate_step(mx.array([0]), model, draft_depth=depth, max_tokens=3, sampling=settings)
        result.append(tuple(token for token, _, _ in steps))
    return result


def p_value(observed: dict[int, int], expected: list[float]) -> float:
    """Chi-square upper tail for counts against probabilities; a token of probability 0 must not occur."""
    total = sum(observed.values())
    cells = [(observed.get(n, 0), p * total) for n, p in enumerate(expected) if p > 0]
    if sum(count for count, _ in cells) != total:
        return 0.0
    statistic = sum((count - mean) ** 2 / mean for count, mean in cells)
    return chi_square_tail(statistic, len(cells) - 1)


def chi_square_tail(x: float, degrees: int) -> float:
    """P(X >= x) by the recursion over degrees of freedom."""
    if degrees <= 0:
        return 1.0
    tail = math.exp(-x / 2) if degrees % 2 == 0 else math.erfc(math.sqrt(x / 2))
    term = math.exp(-x / 2) if degrees % 2 == 0 else math.sqrt(2 * x / math.pi) * math.exp(-x / 2)
    for k in range(2 if degrees % 2 == 0 else 1, degrees, 2):
        if degrees % 2 == 0:
            term *= x / k
            tail += term
        else:
            tail += term
            term *= x / (k + 2)
    return tail


def count(tokens: list[int]) -> dict[int, int]:
    return {token: tokens.count(token) for token in set(tokens)}


def second_token_p_value(draws: list[tuple[int, int, int]], table: list[list[float]]) -> float:
    """Joint distribution of first and second token against the exact product."""
    joint = [table[0][a] * table[a][b] for a in range(VOCAB) for b in range(VOCAB)]
    return p_value(count([a * VOCAB + b for a, b, _ in draws]), joint)


SETTINGS = [
    Sampling(temp=1.0, top_p=0.9),
    pytest.param(Sampling(temp=0.7), marks=pytest.mark.nightly),
    pytest.param(Sampling(temp=0.7, top_p=0.8), marks=pytest.mark.nightly),
]


@pytest.mark.parametrize("temp", [0.7, 1.0])
@pytest.mark.parametrize("top_p", [0.0, 0.9])
def test_rule_alone_keeps_the_distribution_of_every_row(temp: float, top_p: float) -> None:
    """The rule on 20,000 rows at once: the accepted draft, or the token in its place, is distributed as p."""
    mx.random.seed(13)
    settings = Sampling(temp=temp, top_p=top_p)
    for row in range(VOCAB):
        both = [part[row : row + 1] - mx.logsumexp(part[row : row + 1]) for part in (BACKBONE, HEAD)]
        p, q = (mx.broadcast_to(mx.softmax(settings.logits(part), axis=-1), (SAMPLES, VOCAB)) for part in both)
        drafts = mx.random.categorical(mx.log(q))
        kept = sampling.accept(p, q, drafts, mx.random.uniform(shape=(SAMPLES,)))
        tokens = mx.where(kept, drafts, mx.random.categorical(mx.log(sampling.residual(p, q))))
        assert p_value(count(tokens.tolist()), probabilities(settings)[row]) > 0.01 / VOCAB


@pytest.mark.sampled(2)
@pytest.mark.parametrize("settings", SETTINGS, ids=repr)
def test_first_and_second_tokens_are_distributed_as_without_drafts(settings: Sampling) -> None:
    mx.random.seed(7)
    table = probabilities(settings)
    draws = draw(settings, depth=1)
    p_first = p_value(count([a for a, _, _ in draws]), table[0])
    p_second = second_token_p_value(draws, table)
    print(f"{settings}: p(first) {p_first:.3f}, p(first, second) {p_second:.3f}")
    assert min(p_first, p_second) > 0.01


@pytest.mark.parametrize("depth", [pytest.param(1, marks=pytest.mark.nightly), 3])
@pytest.mark.parametrize(
    "settings",
    [Sampling(temp=1.0, min_p=0.1), Sampling(temp=1.3, top_k=4), Sampling(temp=1.0, top_p=0.9)],
    ids=repr,
)
def test_every_transition_of_long_runs_is_distributed_as_without_drafts(settings: Sampling, depth: int) -> None:
    mx.random.seed(11)
    table = probabilities(settings)
    steps = mtp_generate_step(mx.array([0]), Chain(), draft_depth=depth, max_tokens=SHORT, sampling=settings)
    line = [0] + [token for token, _, _ in steps]
    worst = 1.0
    for start in range(VOCAB):
        after = [b for a, b in itertools.pairwise(line) if a == start]
        if after:
            worst = min(worst, p_value(count(after), table[start]))
    print(f"{settings} depth {depth}: smallest p of {VOCAB} rows {worst:.3f}")
    assert worst > 0.01 / VOCAB


@pytest.mark.parametrize(
    "rule", [pytest.param("accept all", marks=pytest.mark.nightly), "resample from p", "greedy drafts judged by p/q"]
)
def test_wrong_acceptance_rule_is_found_out(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mx.random.seed(7)
    settings = Sampling(temp=1.0)
    if rule == "accept all":
        monkeypatch.setattr(sampling, "accept", lambda p, q, tokens, uniform: uniform >= 0)
    elif rule == "resample from p":
        monkeypatch.setattr(sampling, "residual", lambda p, q: p)
    else:
        original = sampling.Speculative.draft
        monkeypatch.setattr(
            sampling.Speculative,
            "draft",
            lambda self, logprobs: sampling.Draft(sampling.greedy(logprobs), original(self, logprobs).logits),
        )
    assert second_token_p_value(draw(settings, 1, 4000), probabilities(settings)) < 1e-4


def test_exact_match_with_a_random_sampler_keeps_the_distribution_too() -> None:
    mx.random.seed(3)
    settings = Sampling(temp=0.7, top_p=0.9)
    steps = mtp_generate_step(mx.array([0]), Chain(), draft_depth=2, max_tokens=SHORT, sampler=settings.sampler())
    line = [0] + [token for token, _, _ in steps]
    for start in range(VOCAB):
        after = [b for a, b in itertools.pairwise(line) if a == start]
        if after:
            assert p_value(count(after), probabilities(settings)[start]) > 0.01 / VOCAB


def test_settings_mean_what_they_mean_to_mlx_lm() -> None:
    """Our filtered logits give the frequencies of mlx-lm's own sampler."""
    mx.random.seed(5)
    settings = Sampling(temp=0.7, top_p=0.85, min_p=0.02, top_k=5)
    logprobs = mx.broadcast_to(BACKBONE[:1] - mx.logsumexp(BACKBONE[:1]), (SAMPLES, VOCAB))
    drawn = settings.sampler()(logprobs).tolist()
    expected = mx.softmax(settings.logits(logprobs[:1]), axis=-1)[0].tolist()
    assert p_value(count(drawn), expected) > 0.01
    assert max(abs(a - b) for a, b in zip(expected, probabilities(settings)[0], strict=True)) < 1e-5


def test_temperature_zero_is_greedy() -> None:
    steps = mtp_generate_step(mx.array([0]), Chain(), max_tokens=20, sampling=Sampling(temp=0.0))
    token = 0
    for found, _, _ in steps:
        token = int(BACKBONE[token].argmax())
        assert found == token
    with pytest.raises(ValueError, match="temp"):
        sampling.Speculative(Sampling())


def test_chi_square_tail_agrees_with_known_values() -> None:
    for x, degrees, tail in [(3.841, 1, 0.05), (11.070, 5, 0.05), (18.307, 10, 0.05), (6.635, 1, 0.01)]:
        assert chi_square_tail(x, degrees) == pytest.approx(tail, abs=2e-4)
    assert (decode.MAX_DRAFT_DEPTH, decode.MAX_BLOCK_DEPTH) == (8, 16)
