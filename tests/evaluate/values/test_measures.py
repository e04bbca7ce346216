"""The arithmetic of measurements against plain loops over a few numbers: divergences, standard errors, moments, losses."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds4convert.errors import InputError
from ds4convert.evaluate import decode_runs, forced, layerwise, reference, wiring
from ds4convert.evaluate.calibration import Calibration, experts, few
from ds4convert.evaluate.decode_runs import Compute, Decoded, Divergence
from ds4convert.evaluate.input_moments import Collector
from ds4convert.evaluate.inputs import unit_losses
from ds4convert.evaluate.layerwise import Positions, check_prompts, relative_rms
from ds4convert.evaluate.stages.matrices import _by_expert
from ds4convert.inference.decode import DecodeStats

mx.set_default_device(mx.cpu)
ROW = st.lists(st.floats(-4, 4, width=32), min_size=3, max_size=3)


def softmax(row: list[float]) -> list[float]:
    total = sum(math.exp(x) for x in row)
    return [math.exp(x) / total for x in row]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(softmax(p), softmax(q), strict=True))


@given(ROW, ROW)
def test_a_divergence_is_that_of_the_definition_in_nats(p: list[float], q: list[float]) -> None:
    wanted = kl(p, q)
    assert float(forced.kl_nats(mx.array([p]), mx.array([q])).item()) == pytest.approx(wanted, abs=1e-5)
    logs = [unit_losses._log_softmax(mx.array([x])) for x in (p, q)]
    assert unit_losses._kl(*logs) == pytest.approx(wanted, abs=1e-6)
    found = layerwise.compare_logits(mx.array([q]), mx.array([p]), mx.array([2]))
    assert float(found[4].item()) == pytest.approx(wanted, abs=1e-5)
    assert float(found[1].item()) == pytest.approx(-math.log(softmax(q)[2]), abs=1e-5)
    assert float(found[3].item()) == pytest.approx(-math.log(softmax(p)[2]), abs=1e-5)
    if sorted(q)[2] - sorted(q)[1] > 1e-3:  # nearer ones are one value after the softmax in float32
        assert found[0].item() == q.index(max(q))


def test_the_mean_of_differences_is_told_in_its_standard_errors() -> None:
    # mean 2, sample variance 1, so the standard error is sqrt(1 / 3)
    assert wiring.standard_errors(mx.array([1.0, 2.0, 3.0])) == pytest.approx(2 / math.sqrt(1 / 3))
    assert wiring.standard_errors(mx.array([-1.0, -2.0, -3.0])) == pytest.approx(-2 / math.sqrt(1 / 3))
    for nothing in ([5.0], [2.0, 2.0], [1.0, math.nan], [1.0, math.inf]):
        assert wiring.standard_errors(mx.array(nothing)) == 0.0


def test_experts_that_fit_better_exchanged_are_proposed_best_first_with_the_weaker_cross_fit() -> None:
    fits = {"up_proj": mx.array([[1.0, 5.0, 0.0], [4.0, 1.0, 0.0], [0.0, 0.0, 9.0]]),
            "router": mx.array([[0.0, 0.0, 6.0], [0.0, 9.0, 0.0], [9.0, 0.0, 1.0]])}  # fmt: skip
    assert wiring._crosswise(fits) == [("router", 0, 2, 6.0), ("up_proj", 0, 1, 4.0)]
    assert wiring._crosswise({"up_proj": mx.eye(3)}) == []


def test_an_exchange_is_told_with_what_speaks_for_it() -> None:
    assert str(wiring.Exchange("a and b", -3.25, None)) == (
        "a and b look exchanged (put back, agreement with the backbone improves by 3.2 standard errors)"
    )
    assert str(wiring.Exchange("a and b", 0.5, 4.0)) == (
        "a and b look exchanged (put back, they fit each other's experts by 4.0 standard errors)"
    )


def test_modules_are_exchanged_and_put_back_whatever_happens() -> None:
    owner = {"a": 1, "b": 2}
    with pytest.raises(ValueError), wiring.swapped(owner, "a", "b"):
        assert owner == {"a": 2, "b": 1}
        raise ValueError
    assert owner == {"a": 1, "b": 2}


def test_prompts_of_ids_come_from_the_generator_of_numerical_recipes() -> None:
    """x' = 1664525 x + 1013904223 mod 2^32 (Numerical Recipes in C, 7.1, "quick and dirty"), from 1, by its upper bits."""
    state, wanted = 1, []
    for _ in range(7 + 40 + 90 + 150):
        state = (1664525 * state + 1013904223) % 2**32
        wanted.append(2 + (state >> 8) % 98)
    found = decode_runs.id_prompts(100)
    assert [i for p in found for i in p.ids] == wanted
    assert [(p.name, len(p.ids), p.is_text) for p in found] == [
        ("ids-7", 7, False), ("ids-40", 40, False), ("ids-90", 90, False), ("ids-150", 150, False),
    ]  # fmt: skip
    assert min(wanted) >= 2 and max(wanted) < 100


def test_a_need_fits_up_to_what_is_free_and_where_nobody_knows() -> None:
    assert Compute("float32", True, 5, 5).fits and Compute("float32", True, 5, None).fits
    assert not Compute("float32", True, 6, 5).fits


def decoded(tokens: list[int], rows: list[list[float]]) -> Decoded:
    return Decoded(tokens, rows=[mx.array(r) for r in rows])


def test_the_first_token_that_differs_is_told_with_the_margin_of_the_plain_row() -> None:
    plain = decoded([1, 2, 0], [[0.0, 1.0, 0.0], [0.5, -1.0, 0.75], [0.0, 0.0, 0.0]])
    assert decode_runs._divergence("p", plain, decoded([1, 0, 0], [])) == Divergence("p", 1, 2, 0, 0.25)
    assert decode_runs._divergence("p", plain, decoded([1, 2], [])) is None, "one that ends earlier does not differ"


def test_a_run_is_finite_where_the_log_probability_of_every_token_is_a_number() -> None:
    assert decode_runs._is_finite(decoded([1, 0], [[-math.inf, 1.0], [0.0, math.nan]])) is True
    assert decode_runs._is_finite(decoded([0], [[-math.inf, 1.0]])) is False


def test_a_timed_run_ends_at_a_stop_token_and_its_time_begins_with_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(10.0, 2.5)
    monkeypatch.setattr(decode_runs.time, "perf_counter", lambda: next(clock))
    steps: Any = [(5, mx.array([0.0]), False), (6, mx.array([0.0]), False), (7, mx.array([0.0]), False)]
    found = decode_runs._timed(steps, frozenset({6}), DecodeStats())
    assert (found.tokens, found.seconds, found.timed_tokens) == ([5, 6], 2.5, 1)


# --- layer by layer ---


def test_an_error_is_that_of_all_prompts_together_over_the_size_of_the_source() -> None:
    ours, theirs = [mx.array([1.0, 2.0]), mx.array([[3.0]])], [mx.array([1.0, 0.0]), mx.array([[5.0]])]
    assert relative_rms(ours, theirs) == pytest.approx(math.sqrt((4 + 4) / 26))
    zero = [mx.zeros(2)]
    assert relative_rms(zero, zero) == 0.0 and relative_rms([mx.ones(2)], zero) == math.inf


def test_figures_are_means_over_tokens_and_a_draft_is_compared_with_the_backbone_one_position_on() -> None:
    backbone = [Positions([4, 5, 6], [1.0, 3.0], []), Positions([7, 8], [5.0], [])]
    head = [Positions([5, 9], [0.5], []), Positions([8], [], [])]
    found = layerwise._figures(backbone, head)
    assert (found.tokens, found.nll, found.drafts, found.accepted, found.head_nll) == (3, 3.0, 3, 2, 0.5)
    assert found.perplexity == pytest.approx(math.exp(3)) and found.acceptance == pytest.approx(2 / 3)
    bare = layerwise._figures(backbone, [])
    assert (bare.drafts, bare.acceptance, bare.head_nll) == (0, None, None)
    assert layerwise._figures([Positions([1, 1], [900.0], [])], []).perplexity == math.exp(700), "no overflow"


def test_a_divergence_from_the_source_has_mean_median_and_worst() -> None:
    ours, theirs = (
        [Positions([1, 2], [], [0.0, 3.0]), Positions([3], [], [6.0])],
        [Positions([1, 9], [], []), Positions([3], [], [])],
    )
    found = layerwise._divergence(ours, theirs)
    assert found == layerwise.Divergence(3, 3.0, 3.0, 6.0, 2)
    assert layerwise._divergence(ours, []) is None


@pytest.mark.parametrize(
    ("prompts", "why"),
    [
        ([], "no prompts: at least one is needed, of two tokens or more"),
        ([[1, 2], [1]], "prompt 2: expected 2 to 4 tokens, found 1"),
        ([[1] * 5], "prompt 1: expected 2 to 4 tokens, found 5"),
        ([[1, 10]], "prompt 1: token id 10 is not in the vocabulary of 10"),
        ([[-1, 1]], "prompt 1: token id -1 is not in the vocabulary of 10"),
    ],
)
def test_a_prompt_that_gives_no_figure_or_does_not_fit_is_named_by_number(prompts: list[list[int]], why: str) -> None:
    args: Any = SimpleNamespace(max_position_embeddings=4, vocab_size=10)
    with pytest.raises(InputError) as found:
        check_prompts(prompts, args)
    assert str(found.value) == why
    check_prompts([[0, 9], [1] * 4], args)


# --- inputs of matrices ---


def test_moments_are_sums_of_squares_by_column_and_counts_of_rows_by_expert() -> None:
    collect = Collector({"e": 3})
    collect("m", None, mx.array([[[1.0, 2.0], [3.0, 4.0]]]))
    collect("m", None, mx.array([[5.0, 6.0]]))
    collect("e", 2, mx.array([[1.0, 2.0]]))
    collect("e", 0, mx.array([[3.0, 0.0], [4.0, 1.0]]))
    assert collect.found["m"].squares.tolist() == [35.0, 56.0] and int(collect.found["m"].rows) == 3
    assert collect.found["e"].squares.tolist() == [[25.0, 1.0], [0.0, 0.0], [1.0, 4.0]]
    assert collect.found["e"].rows.tolist() == [2, 0, 1]


def test_an_expert_that_few_rows_went_to_gets_the_mean_of_its_layer_the_more_so_the_fewer() -> None:
    known = Calibration(
        "", {"e": np.array([[2.0], [10.0], [0.0]], np.float32), "m": np.array([7.0], np.float32)},
        {"e": np.array([192, 64, 0]), "m": np.array([9])},
    )  # fmt: skip
    mean = (2 * 192 + 10 * 64) / 256  # 4
    assert known.importance("m", 0) is known.moments["m"] and known.importance("x", 0) is None and "e" in known
    for expert, (own, rows) in enumerate([(2, 192), (10, 64), (0, 0)]):
        found = known.importance("e", expert)
        assert found is not None and found.dtype == np.float32
        assert found[0] == pytest.approx((own * rows + mean * 64) / (rows + 64))


def test_experts_with_fewer_than_16_rows_are_named_twelve_at_most() -> None:
    rows = np.array([0, 15, 16, *[3] * 12])
    found = experts({"l.gate_proj": SimpleNamespace(rows=rows), "l.up_proj": SimpleNamespace(rows=rows),
                     "dense.gate_proj": SimpleNamespace(rows=np.array(5))})  # fmt: skip
    assert set(found) == {"l"} and found["l"]["least"] == 0 and found["l"]["mean"] == pytest.approx(67 / 15)
    assert few(found) == [
        "l: fewer than 16 rows went to 14 experts (0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, ...); give more text"
    ]
    assert few({"l": {"few": []}}) == []


@given(st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=2), max_size=6))
def test_picks_are_turned_round_without_losing_any(picks: list[list[int]]) -> None:
    found = _by_expert(mx.array(picks)) if picks else {}
    pairs = {(p, s, e) for e, (positions, slots) in found.items() for p, s in zip(positions, slots, strict=True)}
    assert pairs == {(p, s, e) for p, row in enumerate(picks) for s, e in enumerate(row)}


# --- recordings ---


def compared(key: str, wanted: list[float], found: list[float] | None, **head: Any) -> reference.Compared:
    model: Any = SimpleNamespace(head=SimpleNamespace(**({"present": False, "kind": "classic"} | head)))
    mine = None if found is None else mx.array(found)
    return reference._compared(f"p0.{key}", key, mx.array(wanted), mine, model, 1e-2, 0.1)


@pytest.mark.parametrize(
    ("key", "wanted", "found", "ok", "detail"),
    [
        ("logits", [0.0, 1.0], [0.0099, 1.109], True, ""),  # 0.01, and a tenth of what was recorded
        ("logits", [0.0, 1.0], [0.011, 1.12], False, "2 of 2 beyond tolerance"),
        ("hidden_last8", [0.0], [0.0149], True, ""),  # hidden states: 1.5 times (golden/README.md)
        ("hidden_last8", [0.0], [0.0151], False, "1 of 1 beyond tolerance"),
        ("greedy_ids", [1.0, 2.0], [1.0, 3.0], False, "1 of 2 differ"),
        ("index_topk_last.3", [1.0], [1.0], True, ""),
        ("index_topk_last.3", [1.0], [1.001], False, "1 of 1 differ"),
        ("logits", [0.0], [math.nan], False, "NaN or infinite values"),
        ("logits", [0.0], [0.0, 1.0], False, "expected shape [1], found [2]"),
        ("logits", [], [], True, ""),
        ("logits", [0.0], None, False, "nothing to compare with"),
        ("mtp_logits", [0.0], None, False, "the folder has no head"),
    ],
)
def test_a_key_is_compared_at_the_tolerance_of_its_kind(
    key: str, wanted: list[float], found: list[float] | None, ok: bool, detail: str
) -> None:
    result = compared(key, wanted, found)
    assert (result.key, result.ok, result.detail) == (f"p0.{key}", ok, detail)


def test_keys_of_another_head_are_told_by_the_kind_that_is_there() -> None:
    assert compared("mtp_logits", [0.0], None, present=True, kind="dspark").detail == "the folder's head is dspark"


def test_the_longest_prompt_counts_its_recorded_continuation() -> None:
    ids = mx.array([1, 2, 3])
    assert reference.longest_prompt({"p0": {"input_ids": ids}, "p1": {"input_ids": ids[:1], "greedy_ids": ids}}) == 4
