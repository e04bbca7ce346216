"""The trained checkpoint decodes alike with and without its head, however deep it drafts."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from ds4convert.inference.decode import DecodeStats, mtp_generate_step, plain_generate_step
from ds4convert.inference.deepseek_v4.model import Model
from ds4convert.inference.load import load_model
from tests.support import nightly

pytest.importorskip("mlx.core")

DEMO = Path(__file__).parents[2] / "manifests" / "demo"
PROMPT = "Now after many days the word of the LORD came"
LENGTH = 500


@functools.cache
def model() -> Model:
    return load_model(DEMO, dtype="float32", dense=True, require_manifest=False)[0]


@functools.cache
def prompt() -> list[int]:
    tokenizers = pytest.importorskip("tokenizers")
    ids: list[int] = tokenizers.Tokenizer.from_file(str(DEMO / "tokenizer.json")).encode(PROMPT).ids
    return [0, *ids]


@functools.cache
def plain() -> list[int]:
    import mlx.core as mx

    return [int(t) for t, _, _ in plain_generate_step(mx.array(prompt()), model(), max_tokens=LENGTH)]


@pytest.mark.sampled(2)
@pytest.mark.slow
@pytest.mark.parametrize("depth", nightly([1, 2, 3, 4], lambda depth: depth != 4))
def test_500_greedy_tokens_equal_plain_decoding_and_the_head_is_of_use(depth: int) -> None:
    import mlx.core as mx

    stats = DecodeStats()
    steps = mtp_generate_step(mx.array(prompt()), model(), draft_depth=depth, max_tokens=LENGTH, stats=stats)
    assert [int(t) for t, _, _ in steps] == plain()
    assert len(plain()) == LENGTH
    assert stats.accepted / max(stats.drafted_at[0], 1) > 0.5 if depth == 1 else stats.tokens_per_pass > 1.6
