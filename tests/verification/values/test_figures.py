"""Figures of decoding runs, computed by hand: what is added up, what it is divided by, and what there is without a head."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds4convert.evaluate.decode_runs import Prompt, PromptRun, Runs
from ds4convert.verification import head
from ds4convert.verification.checks import Check, _some, as_json
from ds4convert.verification.facts import Bin, Facts, HeadFacts, Milliseconds, SourceKL
from ds4convert.verification.head import _calibration, _times
from ds4convert.verification.request import Outcome, Request, _speakable, needs_model
from ds4convert.verification.run import _is_known
from ds4convert.verification.verdict import Measured
from tests.verification.values.runs import DIVERGENCE, decoded, forced, invariance, runs

TWO = Runs(
    [
        PromptRun(Prompt("a", (1, 2)), decoded([5, 5, 6], 1.0), decoded([5, 5, 6], 0.5, [(2, 2), (2, 1)], 2)),
        PromptRun(Prompt("b", (1,)), decoded([5, 7], 3.0), decoded([5, 8], 1.5, [(3, 1), (1, 0)], 4), DIVERGENCE),
    ],
    2,
)


def test_figures_add_up_over_the_prompts() -> None:
    assert (TWO.drafted, TWO.accepted, TWO.passes) == (8, 4, 6)
    assert TWO.acceptance == 0.5 and TWO.tokens_per_pass == pytest.approx(1 + 4 / 6)
    assert TWO.positions() == [(5, 3), (3, 1)] and TWO.first_acceptance == pytest.approx(3 / 5)
    assert TWO.plain_rate_tok_s == pytest.approx((2 + 1) / 4.0), "the first token belongs to the prompt"
    assert TWO.mtp_rate_tok_s == pytest.approx((2 + 1) / 2.0)
    assert TWO.first_divergence is DIVERGENCE and TWO.finite
    assert TWO.common_token_share == pytest.approx(3 / 5)


def test_without_a_head_there_are_no_figures_of_one_and_nothing_is_divided_by() -> None:
    plain = Runs([PromptRun(Prompt("a", (1,)), decoded([], 0.0))], 3)
    assert (plain.drafted, plain.acceptance, plain.first_acceptance, plain.tokens_per_pass) == (0, 0.0, 0.0, 1.0)
    assert (plain.plain_rate_tok_s, plain.mtp_rate_tok_s, plain.common_token_share) == (0.0, 0.0, 0.0)
    assert plain.positions() == [(0, 0)] * 3 and plain.first_divergence is None and plain.estimates() == []


def test_the_document_has_the_figures_rounded_and_by_prompt() -> None:
    model = SimpleNamespace(is_dspark=False, args=None)
    found = head.figures(model, Measured(forced(0.123456, 0.2), invariance(), runs=TWO), 0.25)  # type: ignore[arg-type]
    assert (found.acceptance, found.drafted, found.accepted, found.passes) == (0.5, 8, 4, 6)
    assert (found.tokens_per_pass, found.speedup, found.plain_tokens_per_second) == (1.6667, 2.0, 0.75)
    assert (found.mtp_tokens_per_second, found.greedy_equal, found.block_size) == (1.5, False, None)
    assert found.acceptance_by_position == [0.6, 0.3333] and found.confidence == 0.25 and found.draft_depth == 2
    assert found.teacher_forced.agreement == 0.1235 and not found.wiring.judged
    one, two = found.per_prompt
    assert (one.prompt_tokens, one.new_tokens, one.acceptance, one.tokens_per_pass) == (2, 3, 0.75, 2.5)
    assert (one.plain_tokens_per_second, one.mtp_tokens_per_second, one.greedy_equal) == (2.0, 4.0, True)
    assert (two.acceptance, two.greedy_equal) == (0.25, False)
    assert [p.position for p in found.per_position] == [1, 2]


def test_of_a_dspark_head_the_block_is_told_and_kept_with_the_shares_by_position() -> None:
    model = SimpleNamespace(is_dspark=True, args=SimpleNamespace(dspark_block_size=5))
    found = head.figures(model, Measured(forced(), invariance(), runs=TWO), 0.0)  # type: ignore[arg-type]
    assert found.block_size == 5
    kept = HeadFacts(True, "dspark", {"mxfp4": 9, "bf16": 1}, "good", found).kept()
    assert (kept.format, kept.block_size, kept.acceptance_by_position) == ("mxfp4+bf16", 5, (0.6, 0.3333))
    classic = head.figures(SimpleNamespace(is_dspark=False), Measured(forced(), invariance(), runs=TWO), 0.0)  # type: ignore[arg-type]
    assert HeadFacts(True, "classic", {}, "good", classic).kept().acceptance_by_position is None


def test_times_are_means_by_token_and_by_pass() -> None:
    made = runs(8, 10)
    assert made.runs[0].mtp is not None
    stats = made.runs[0].mtp.stats
    stats.backbone_seconds, stats.head_seconds, stats.other_seconds = 0.5, 0.25, 0.0123
    assert _times(made) == Milliseconds(plain_pass=105.263, verifying_pass=50.0, drafting=25.0, rest=1.23)
    assert _times(Runs([], 1)) == Milliseconds(0.0, 0.0, 0.0, 0.0)


def test_a_speed_is_told_of_timed_runs_alone() -> None:
    assert head._rate(decoded([1, 2, 3], 4.0)) == 0.5 and head._rate(decoded([1], 0.0)) is None


ESTIMATES = st.lists(st.tuples(st.floats(0, 1), st.booleans()), max_size=30)


@given(ESTIMATES)
def test_estimates_are_binned_by_tenths_and_none_is_lost(pairs: list[tuple[float, bool]]) -> None:
    found = _calibration(pairs)
    assert sum(b.drafts for b in found) == len(pairs)
    assert sum(b.drafts * b.observed for b in found) == pytest.approx(sum(k for _, k in pairs), abs=0.01)
    assert [b.estimated for b in found] == sorted(b.estimated for b in found) and len(found) <= 10


def test_a_bin_has_the_mean_estimate_and_the_share_that_was_accepted() -> None:
    assert _calibration([(0.91, True), (1.0, True), (0.95, False), (0.1, False), (0.19, True), (0.2, True)]) == (
        Bin(2, 0.145, 0.5), Bin(1, 0.2, 1.0), Bin(3, 0.9533, 0.6667),
    )  # fmt: skip


# --- checks and documents ---


def test_the_first_five_problems_are_told_and_how_many_more_there_are() -> None:
    assert _some([], "good") == (True, "good")
    assert _some(list("abcde"), "good") == (False, "a; b; c; d; e")
    assert _some(list("abcdefg"), "good") == (False, "a; b; c; d; e (and 2 more)")


def test_a_result_is_good_where_every_check_is() -> None:
    good, bad = Check("a", True, "x"), Check("b", False, "y")
    assert as_json([good])["ok"] is True and as_json([]) == {"ok": True, "checks": []}
    assert as_json([good, bad]) == {
        "ok": False, "checks": [{"name": "a", "ok": True, "detail": "x"}, {"name": "b", "ok": False, "detail": "y"}],
    }  # fmt: skip
    out = Outcome()
    out.add("c", [], "fine")
    assert out.ok and out.checks == [Check("c", True, "fine")]
    out.add("d", ["p", "q"], "fine")
    assert not out.ok and out.checks[-1] == Check("d", False, "p; q")


def test_numbers_that_json_does_not_have_are_null_wherever_they_stand() -> None:
    value = {"a": math.nan, "b": [math.inf, 1.5, (-math.inf, "nan")], "c": {"d": math.nan, "e": True, "f": 3}}
    assert _speakable(value) == {"a": None, "b": [None, 1.5, [None, "nan"]], "c": {"d": None, "e": True, "f": 3}}


def test_facts_that_were_not_asked_for_are_left_out_and_those_that_were_empty_stay() -> None:
    assert Facts().as_json() == {}
    assert Facts(groups=(), losses=(), reference=(), drafter="x").as_json() == {
        "groups": [], "losses": [], "drafter": "x", "reference": [],
    }  # fmt: skip
    assert Facts(kl=SourceKL(None)).as_json() == {"kl": None}, "asked for, and left out for want of memory"


def test_a_head_that_was_not_run_has_null_for_its_figures() -> None:
    told = HeadFacts(False, "none", {}, "No head.").as_json()
    assert told["present"] is False and told["format"] is None and told["acceptance_by_position"] == []
    assert {k for k, v in told.items() if v is None} == {
        "format", "acceptance", "drafted", "accepted", "tokens_per_pass", "plain_tokens_per_second",
        "mtp_tokens_per_second", "speedup", "greedy_equal", "first_divergence", "block_size",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("request_", "needs"),
    [({"level": "structure"}, False), ({"level": "source"}, False), ({"level": "numerics"}, True), ({"level": "decode"}, True),
     ({"level": "structure", "layerwise": True}, True), ({"level": "structure", "reference": "x"}, True)],
)  # fmt: skip
def test_a_model_is_loaded_only_where_it_is_asked_about(request_: dict[str, object], needs: bool) -> None:
    assert needs_model(Request("x", **request_)) is needs  # type: ignore[arg-type]


@pytest.mark.parametrize(("ids", "known"), [([], False), ([1], False), ([1, 2], True), ([1, 1], False), ([1, 1, 2], False),
                                            ([1, 1, 2, 3], True), ([7] * 5 + [1, 2, 3, 4], False)])  # fmt: skip
def test_a_tokenizer_that_makes_one_token_of_most_words_does_not_know_a_text(ids: list[int], known: bool) -> None:
    assert _is_known(ids) is known
