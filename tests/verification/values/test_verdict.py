"""The verdict on a head, from figures made by hand: every threshold that `verify --help` states, on both sides of it."""

from __future__ import annotations

import pytest

from ds4convert.evaluate.decode_runs import Compute, Divergence
from ds4convert.evaluate.wiring import Wiring
from ds4convert.verification import verdict as v
from ds4convert.verification.verdict import Measured
from tests.verification.values.runs import DIVERGENCE, forced, invariance, runs

WRONG = "a head of the wrong kind, over-quantized, or wired wrongly"


@pytest.mark.parametrize(
    ("accepted", "drafted", "tokens", "limit"),
    [
        (9, 100, None, "10%"),  # 10 % of first drafts
        (10, 100, None, ""),
        (29, 100, [1] * 2 + [2, 3, 4, 5, 6, 7, 8, 9], "30%"),  # 1.5 times the commonest token, here a fifth
        (31, 100, [1] * 2 + [2, 3, 4, 5, 6, 7, 8, 9], ""),
        (74, 100, [1] * 10, "75%"),  # a text that repeats itself: at most 1.5 times a half is asked
        (75, 100, [1] * 10, ""),
        (0, 0, None, ""),  # nothing was drafted: acceptance says nothing
    ],
)
def test_acceptance_at_chance_is_useless(accepted: int, drafted: int, tokens: list[int] | None, limit: str) -> None:
    found = v.useless_reason(runs(accepted, drafted, tokens), forced())
    assert found == (f"acceptance {accepted / drafted:.1%} is at chance (limit {limit}): {WRONG}" if limit else "")


@pytest.mark.parametrize(
    ("agreement", "chance", "limit"),
    [(0.049, 0.0, "5%"), (0.05, 0.0, ""), (0.29, 0.2, "30%"), (0.31, 0.2, ""), (0.74, 0.9, "75%"), (0.75, 0.9, "")],
)
def test_agreement_on_the_prompts_own_tokens_at_chance_is_useless(agreement: float, chance: float, limit: str) -> None:
    found = v.useless_reason(runs(), forced(agreement, chance))
    wanted = f"the head agrees with the backbone on {agreement:.1%} of the prompts' tokens, which is chance (limit {limit}): {WRONG}"
    assert found == (wanted if limit else "")
    assert v.useless_reason(runs(), forced(0.0, positions=0)) == "", "without positions nothing is asked"


@pytest.mark.parametrize(
    ("dtype", "found", "problem"),
    [
        ("float32", invariance(2e-3), ""),
        ("float32", invariance(2.1e-3), "decoding in pieces differs from prefill by 0.0021 (limit 0.002)"),
        ("float32", invariance(1e-3, 5e-3), "decoding in pieces differs from prefill by 0.005 (limit 0.002)"),
        ("float32", invariance(0.0, None, 1.0), ""),
        ("bfloat16", invariance(9.0, 9.0, 5e-3), ""),
        (
            "bfloat16",
            invariance(0.0, None, 6e-3),
            "decoding in pieces differs from prefill: median KL 0.006 (limit 0.005)",
        ),
    ],
)
def test_pieces_have_to_equal_the_whole_within_what_the_dtype_allows(dtype: str, found: object, problem: str) -> None:
    assert v.numerics_problems(Measured(forced(), found), dtype, 1000) == ([problem] if problem else [])  # type: ignore[arg-type]


def test_a_backbone_is_broken_where_its_best_text_is_above_a_quarter_of_the_vocabulary() -> None:
    def of(**perplexity: float) -> list[str]:
        return v.numerics_problems(Measured(forced(perplexity=perplexity), invariance()), "float32", 100)

    assert of(a=25.0, b=99.0) == [] and of() == []
    assert of(a=25.5, b=99.0) == ["the backbone is broken: perplexity 25.5 on its best text, of 100 tokens"]


def test_values_that_are_no_numbers_are_the_one_thing_told() -> None:
    found = Measured(forced(finite=False, perplexity={"a": 99.0}), invariance(1.0))
    assert v.numerics_problems(found, "float32", 100) == ["logits or hidden states that are NaN or infinite"]


@pytest.mark.parametrize(
    ("compute", "told"),
    [
        (Compute("float32", True, 1, None), "(0.00012); perplexity of the best text 3.0; float32, matrices dequantized"),
        (Compute("bfloat16", False, 1, None),
         "(median KL 0.0021); perplexity of the best text 3.0; bfloat16, matrices as stored"),
    ],
)  # fmt: skip
def test_good_numerics_are_told_with_how_they_were_computed(compute: Compute, told: str) -> None:
    found = Measured(forced(), invariance(1.2e-4, None, 2.1e-3))
    assert v.numerics_good(found, compute) == f"all finite; decoding equals prefill over 140 tokens {told}"


def differing(margin: float) -> object:
    return runs(divergence=Divergence("one", 5, 7, 9, margin))


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-3), ("bfloat16", 0.5)])
def test_greedy_text_may_differ_at_a_near_tie_alone(dtype: str, limit: float) -> None:
    assert v.inequality(runs(), dtype) == [] and v.inequality(differing(limit), dtype) == []  # type: ignore[arg-type]
    assert v.inequality(differing(limit * 1.1), dtype) == [  # type: ignore[arg-type]
        "greedy tokens with the head differ from plain ones on 1 prompts; first one, new token 5: 7 plain, 9 with the "
        f"head, top-2 margin {limit * 1.1:.3g}"
    ]


def test_equal_text_is_counted_in_tokens_and_a_near_tie_is_told() -> None:
    assert v.equality_good(runs()) == "20 tokens equal with and without the head"
    assert v.equality_good(runs(divergence=DIVERGENCE)) == (
        "differs at a near tie only: one, new token 5, top-2 margin 0.01"
    )


def test_what_a_working_head_does_is_told_in_figures() -> None:
    assert v.works(runs(8, 10), forced(0.25)) == (
        "acceptance 80.0% (8 of 10 drafts), 1.80 tokens per backbone pass; 25.0% teacher-forced"
    )


def test_wiring_is_told_only_where_it_could_be_judged() -> None:
    unjudged = "not judged: the head's experts show no trace of training; only --source or --reference can tell"
    assert v.wiring_good(None) == v.wiring_good(Wiring((), 0, False)) == unjudged
    assert v.wiring_good(Wiring((), 9, True)) == "no two parts of the head agree better exchanged (9 exchanges tried)"


HEALTHY = "The head works: acceptance 80.0%, 1.80 tokens per pass, 2.00 times the speed of plain decoding here; greedy text unchanged."


def test_the_gravest_of_what_was_found_is_the_verdict() -> None:
    found = (["a", "b"], ["digests", "values"], ["c", "d"], "e", ["f", "g"])
    _, altered, scrambled, useless, unequal = found
    r = runs()
    assert v.verdict(r, *found) == "Numerics are off, so nothing can be said of the head: a; b."
    assert v.verdict(r, [], altered, scrambled, useless, unequal) == "The head is present but scrambled: c; d."
    assert v.verdict(r, [], altered, [], useless, unequal) == (
        "The weights are not what was converted (digests, values); the head as it is now is useless too: e."
    )
    assert v.verdict(r, [], altered, [], "", unequal) == (
        "The weights are not what was converted (digests, values); the head as it is now is accepted 80.0%."
    )
    assert v.verdict(r, [], [], [], useless, unequal) == "The head is present but useless: e."
    assert v.verdict(r, [], [], [], "", unequal) == "Numerics are off: f."
    assert v.verdict(r, [], [], [], "", []) == HEALTHY


@pytest.mark.parametrize(
    ("accepted", "fast", "words"),
    [
        (40, 2.0, ["The head works: acceptance 40.0%", "2.00 times the speed of plain decoding here; "]),
        (39, 2.0, ["The head works, but weakly (published heads: 59 to 82 %; see --source): acceptance 39.0%"]),
        (40, 1.0, ["1.00 times the speed of plain decoding here; "]),
        (40, 0.5, ["0.50 times the speed of plain decoding here, so it does not pay on this machine; "]),
        (40, 0.0, ["0.00 times the speed"]),
    ],
)
def test_a_working_head_is_weak_below_40_percent_and_pays_where_it_is_faster(
    accepted: int, fast: float, words: list[str]
) -> None:
    told = v.verdict(runs(accepted, 100, fast=fast), [], [], [], "", [])
    assert all(w in told for w in words), told


def test_a_near_tie_is_part_of_the_verdict() -> None:
    told = v.verdict(runs(divergence=DIVERGENCE), [], [], [], "", [])
    assert told.endswith("; greedy text changed at near ties only.")
