"""Every key of golden.safetensors, in prefill, in chunks and in one-token decode, in float32 and bfloat16."""

from __future__ import annotations

import mlx.core as mx
import pytest

from tests.inference.golden_data import (
    HIDDEN_TOLERANCE,
    LOGIT_TOLERANCE,
    NAMES,
    PROMPTS,
    build,
    golden,
    kl,
    max_diff,
    model,
)
from tests.support import combined, nightly

CASES = [(name, i) for name in NAMES for i in PROMPTS]


def run_chunks(m, ids: mx.array, cache, size: int) -> tuple[mx.array, mx.array]:
    """Logits and hidden states of ids [L], fed `size` tokens at a time."""
    logits, hidden = [], []
    for start in range(0, ids.shape[0], size):
        a, b = m(ids[None, start : start + size], cache=cache, return_hidden=True)
        mx.eval(a, b)
        logits.append(a[0])
        hidden.append(b)
    return mx.concatenate(logits), mx.concatenate(hidden, axis=1)


def run_head(m, hidden: mx.array, ids: mx.array, cache, size: int) -> mx.array:
    logits = []
    for start in range(0, ids.shape[0], size):
        part = m.mtp_forward(hidden[:, start : start + size], ids[None, start : start + size], cache)
        mx.eval(part)
        logits.append(part[0])
    return mx.concatenate(logits)


def check_all_keys(m, data: dict[str, mx.array], i: int, chunk: int, step: int) -> dict[str, float]:
    """Compare prompt i, prefilled in chunks, then decoded `step` forced tokens at a time; returns
    differences.
    """
    g = {key.split(".", 1)[1]: value for key, value in data.items() if key.startswith(f"p{i}.")}
    cache, head_cache = m.make_cache(), m.make_mtp_cache()
    logits, hidden = run_chunks(m, g["input_ids"], cache, chunk)
    head_logits = run_head(m, hidden, g["mtp_input_ids"], head_cache, chunk)
    forced = g["greedy_ids"]
    decode, decode_hidden = run_chunks(m, forced[:40], cache, step)
    head_decode = run_head(m, decode_hidden, forced[1:], head_cache, step)
    differences = {
        "logits": max_diff(logits, g["logits"]),
        "mtp_logits": max_diff(head_logits, g["mtp_logits"]),
        "decode_logits": max_diff(decode, g["decode_logits"]),
        "mtp_decode_logits": max_diff(head_decode, g["mtp_decode_logits"]),
        "hidden_last8": max_diff(hidden[0, -8:], g["hidden_last8"]),
        "decode_hidden_last": max_diff(decode_hidden[0, -1], g["decode_hidden_last"]),
    }
    for key, value in differences.items():
        assert value <= (HIDDEN_TOLERANCE if "hidden" in key else LOGIT_TOLERANCE), (key, value)
    greedy = mx.concatenate([logits[-1:], decode]).argmax(axis=-1)
    drafts = mx.concatenate([head_logits[-1:], head_decode]).argmax(axis=-1)
    assert greedy.tolist() == forced.tolist()
    assert drafts.tolist() == g["draft_ids"].tolist()
    assert (drafts[:40] == greedy[1:]).astype(mx.int32).tolist() == g["draft_match"].tolist()
    return differences


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("name", "i"), CASES)
def test_one_shot_prefill_and_one_token_decode_match_every_key(name: str, i: int) -> None:
    differences = check_all_keys(model(name), golden(name), i, chunk=1 << 20, step=1)
    assert max(differences.values()) < 5e-5, differences


CHUNKS_ALWAYS = {(0, 5), (2, 2), (2, 5), (2, 64)}
"""Prompts and chunk sizes that run on every change: the shortest and the longest prompt, sizes around a ratio of 4."""


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("name", "i", "chunk"),
    combined(NAMES, PROMPTS, [2, 3, 5, 64, 129], is_repetition=lambda name, *case: case not in CHUNKS_ALWAYS),
)
def test_chunked_prefill_and_multi_token_decode_match_every_key(name: str, i: int, chunk: int) -> None:
    check_all_keys(model(name), golden(name), i, chunk, step=min(chunk, 7))


@pytest.mark.parametrize("name", nightly(NAMES, lambda name: name != NAMES[0]))
def test_prompt_fed_token_by_token_matches_every_key(name: str) -> None:
    check_all_keys(model(name), golden(name), 1, chunk=1, step=1)


@pytest.mark.parametrize("name", NAMES)
def test_repacked_weights_match_every_key_without_dequantizing(name: str) -> None:
    check_all_keys(build(name, dense=False), golden(name), 1, chunk=64, step=3)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("name", "i"), CASES)
def test_trace_shows_hidden_states_experts_and_entries_of_the_last_position(name: str, i: int) -> None:
    m, g = model(name), golden(name)
    hidden: dict[int, mx.array] = {}
    experts: dict[int, list[int]] = {}
    entries: dict[int, list[int]] = {}

    def trace(kind: str, layer: int, value: mx.array) -> None:
        if kind == "hidden":
            hidden[layer] = value[0, -1]
        elif kind == "experts":
            experts[layer] = sorted(value[0, -1].tolist())
        elif m.args.ratio(layer) == 4:
            entries[layer] = sorted(pick for pick in value[0].tolist() if pick >= 0)

    mx.eval(m(g[f"p{i}.input_ids"][None], trace=trace))
    rows = mx.stack([hidden[layer] for layer in range(m.args.num_hidden_layers + 1)])
    assert max_diff(rows, g[f"p{i}.layer_hidden_last"]) <= HIDDEN_TOLERANCE
    chosen = [experts[layer] for layer in range(m.args.num_hidden_layers)]
    assert chosen == g[f"p{i}.expert_ids_last"].tolist()
    prefix = f"p{i}.index_topk_last."
    expected = {int(key.removeprefix(prefix)): g[key].tolist() for key in g if key.startswith(prefix)}
    assert entries == expected


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_stays_within_the_median_divergence(name: str) -> None:
    m, g = build(name, mx.bfloat16), golden(name)
    for i in PROMPTS:
        logits, hidden = m(g[f"p{i}.input_ids"][None], return_hidden=True)
        head = m.mtp_forward(hidden, g[f"p{i}.mtp_input_ids"][None], m.make_mtp_cache())
        assert hidden.dtype == mx.bfloat16
        assert mx.median(kl(g[f"p{i}.logits"], logits[0])).item() <= 1e-3
        assert mx.median(kl(g[f"p{i}.mtp_logits"], head[0])).item() <= 1e-3


def test_deliberate_mistake_is_seen() -> None:
    """The comparison itself works: one mistake of the README's table moves the logits far beyond the
    tolerance.
    """
    name = NAMES[0]
    m, g = build(name), golden(name)
    for layer in m.layers:
        layer.attn.attn_sink = mx.zeros_like(layer.attn.attn_sink)
    assert max_diff(m(g["p2.input_ids"][None])[0], g["p2.logits"]) > 1.0
