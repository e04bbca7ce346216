"""Drafts and their judgement: figures of a run by hand, both drafters over models of a few lines, the two rules."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

from ds4convert.inference import decode
from ds4convert.inference.decode import DecodeStats, deepest, default_depth, level_cache
from ds4convert.inference.drafter import BlockDrafter, ChainDrafter, is_block_head, make_drafter
from ds4convert.inference.sampling import Draft, ExactMatch, Sampling, Speculative, accept, greedy, residual


def drafts(*tokens: int, estimates: tuple[float, ...] = ()) -> list[Draft]:
    return [Draft(mx.array([t]), estimate=e) for t, e in zip(tokens, estimates or (None,) * len(tokens), strict=True)]


def test_figures_of_a_run_by_hand() -> None:
    stats = DecodeStats()
    assert (stats.acceptance, stats.tokens_per_pass, stats.decode_seconds) == (0.0, 1.0, 0.0)
    for drafted, accepted in ((3, 3), (3, 1), (2, 0), (0, 0)):
        stats.count(drafted, accepted)
    assert (stats.passes, stats.drafted, stats.accepted) == (4, 8, 4)
    assert (stats.acceptance, stats.tokens_per_pass) == (0.5, 2.0) and stats.accepted_per_pass == [3, 1, 0, 0]
    assert stats.drafted_at == [3, 3, 2] and stats.accepted_at == [2, 1, 1]
    stats.backbone_seconds, stats.head_seconds, stats.other_seconds, stats.prompt_seconds = 1.0, 2.0, 4.0, 8.0
    assert stats.decode_seconds == 7.0


def test_estimates_are_noted_of_drafts_that_were_judged() -> None:
    stats = DecodeStats()
    stats.note_estimates(drafts(1, 2, 3, estimates=(0.9, 0.5, 0.1)), 1)
    stats.note_estimates(drafts(1, 2, estimates=(0.8, 0.7)), 2)
    stats.note_estimates(drafts(1), 0)
    assert stats.estimates == [(0.9, True), (0.5, False), (0.8, True), (0.7, True)]


def rows(*best: int, vocabulary: int = 6) -> mx.array:
    return mx.where(mx.arange(vocabulary) == mx.array(best)[:, None], 0.0, -20.0)


@pytest.mark.parametrize(
    ("proposed", "drawn", "judged"),
    [((), (4,), (0, 4)), ((1, 2), (1, 2, 3), (2, 3)), ((1, 2), (1, 5, 3), (1, 5)), ((1, 2), (0, 2, 3), (0, 0)), ((1,), (1, 4), (1, 4))],
)  # fmt: skip
def test_exact_match_keeps_drafts_up_to_the_first_other_token_and_adds_the_backbones(
    proposed: tuple[int, ...], drawn: tuple[int, ...], judged: tuple[int, int]
) -> None:
    assert ExactMatch().judge(rows(*drawn), drafts(*proposed)) == judged
    assert ExactMatch().first(rows(3)).tolist() == [3] and ExactMatch().draft(rows(2)).token.tolist() == [2]


def test_of_equal_values_the_first_is_the_greedy_one() -> None:
    assert greedy(mx.array([[1.0, 5.0, 5.0], [2.0, 2.0, 2.0]])).tolist() == [1, 0]


P = mx.array([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
Q = mx.array([[0.2, 0.6, 0.2], [0.8, 0.1, 0.1]])


@pytest.mark.parametrize(
    ("tokens", "uniform", "kept"),
    [
        ([1, 0], [0.49, 0.12], [True, True]),
        ([1, 0], [0.51, 0.13], [False, False]),
        ([0, 2], [0.99, 0.99], [True, True]),
    ],
)
def test_a_draft_is_kept_with_the_part_of_its_probability_that_the_backbone_has(
    tokens: list[int], uniform: list[float], kept: list[bool]
) -> None:
    """p/q is 0.3/0.6 and 0.1/0.8; above 1 a draft is always kept (Leviathan et al. 2023, algorithm 1)."""
    assert accept(P, Q, mx.array(tokens), mx.array(uniform)).tolist() == kept


def test_what_is_left_of_the_backbone_is_what_the_head_gave_too_little() -> None:
    assert mx.allclose(residual(P, Q), mx.array([[0.3, 0.0, 0.0], [0.0, 0.0, 0.7]]))
    assert mx.array_equal(residual(P, P), P), "nothing is left: then nothing is refused"


def test_probabilistic_acceptance_of_equal_distributions_keeps_everything() -> None:
    rule = Speculative(Sampling(temp=1.0))
    made = [rule.draft(mx.log(P[:1])) for _ in range(3)]
    accepted, after = rule.judge(mx.log(mx.concatenate([P[:1]] * 4)), made)
    assert accepted == 3 and after in {0, 1, 2}
    assert rule.judge(rows(2, vocabulary=3) * 10, []) == (0, 2) and rule.first(rows(1, vocabulary=3) * 10).tolist() == [
        1
    ]
    with pytest.raises(
        ValueError, match=r"^probabilistic acceptance needs temp > 0; greedy decoding uses exact match$"
    ):
        Speculative(Sampling())


class Cache:
    """Positions that were fed."""

    def __init__(self, offset: int = 0, pending: Any = None) -> None:
        self.offset, self.pending, self.restarted = offset, pending, -1

    def trim(self, count: int) -> int:
        if count > self.offset:
            raise ValueError("too far")
        self.offset -= count
        return count

    def restart(self, position: int) -> None:
        self.restarted = self.offset = position


class Chain:
    """A classic head that says one more than the token it is given, and notes the pairs that it sees."""

    def __init__(self) -> None:
        self.seen: list[list[tuple[float, int]]] = []

    def mtp_forward(self, hidden: mx.array, tokens: mx.array, caches: list[Cache], return_hidden: bool = False) -> Any:
        self.seen.append(list(zip(hidden[0, :, 0].tolist(), tokens[0].tolist(), strict=True)))
        caches[0].offset += tokens.shape[1]
        logits = rows(*[t + 1 for t in tokens[0].tolist()], vocabulary=20)[None]
        return (logits, hidden + 0.5) if return_hidden else logits


def hidden(*values: float) -> mx.array:
    return mx.array([[[v] for v in values]])


def plain(logits: mx.array, before: list[Draft]) -> mx.array:
    return logits


def test_a_chain_pairs_each_hidden_state_with_the_token_after_it() -> None:
    model = Chain()
    drafter = ChainDrafter(model, [Cache()])
    drafter.note_prompt(hidden(0, 1, 2), [5, 6, 7])
    drafter.take_in()
    drafter.note_prompt(hidden(3), [8])
    assert model.seen == [[(0.0, 6), (1.0, 7)]] and [x.tolist() for x in drafter.waiting()] == [[[[2.0], [3.0]]]]
    drafter.note_newest(9)
    assert [d.token.item() for d in drafter.draft(3, ExactMatch(), plain)] == [10, 11, 12]
    assert model.seen[1:] == [[(2.0, 8), (3.0, 9)], [(3.5, 10)], [(4.0, 11)]]
    assert drafter.caches[0].offset == 4, "its own two positions are taken back"
    drafter.note_round(hidden(4, 5), [10])
    drafter.settle()
    assert (
        drafter.due == [10]
        and drafter.caches[0].pending.tolist() == [[[4.0], [5.0]]]
        and drafter.draft(0, ExactMatch(), plain) == []
    )


def test_a_chain_forgets_tokens_that_never_left_and_goes_on_from_what_waits() -> None:
    drafter = ChainDrafter(Chain(), [Cache(pending=hidden(7))])
    drafter.note_prompt(hidden(8, 9), [3, 4])
    assert drafter.due == [3, 4], "the first token is due after the hidden state that waited"
    drafter.drop(1)
    assert drafter.due == [3] and drafter.hidden is not None and drafter.hidden.shape[1] == 2
    drafter.drop(0)
    assert drafter.due == [3] and ChainDrafter(Chain(), [Cache()]).draft(2, ExactMatch(), plain) == []


class Block:
    """A block of four drafts: its anchor plus one, two, ...; the head's estimates fall."""

    def __init__(self, anchor: int) -> None:
        self.anchor, self.base = anchor, mx.zeros((4, 1))

    def logits(self, slot: int, before: list[mx.array]) -> mx.array:
        assert len(before) == slot
        return rows(self.anchor + slot + 1, vocabulary=20)

    def confidence(self, tokens: list[mx.array]) -> mx.array:
        return mx.array([2.0, 1.0, -1.0, -2.0][: len(tokens)])  # 0.88, 0.73, 0.27, 0.12


class BlockModel:
    """A DSpark head whose context keys are counted."""

    head = SimpleNamespace(kind="dspark")
    args = SimpleNamespace(dspark_block_size=4)

    def __init__(self) -> None:
        self.context: list[list[float]] = []

    def append_context(self, taps: mx.array, caches: list[Cache]) -> None:
        self.context.append(taps[0, :, 0].tolist())

    def draft_block(self, newest: int, caches: list[Cache]) -> Block:
        return Block(newest)


@pytest.mark.parametrize(
    ("depth", "confidence", "tokens"),
    [
        (4, 0.0, [6, 7, 8, 9]),
        (9, 0.0, [6, 7, 8, 9]),
        (2, 0.0, [6, 7]),
        (4, 0.5, [6, 7]),
        (4, 0.9, []),
        (1, 0.5, [6]),
        (0, 0.0, []),
    ],
)
def test_a_block_is_verified_as_deep_as_asked_and_as_far_as_it_is_sure(
    depth: int, confidence: float, tokens: list[int]
) -> None:
    drafter = BlockDrafter(BlockModel(), [Cache()], 0, confidence)
    drafter.note_newest(5)
    found = drafter.draft(depth, ExactMatch(), plain)
    assert [d.token.item() for d in found] == tokens
    assert [round(d.estimate or 0, 2) for d in found] == [0.88, 0.73, 0.27, 0.12][: len(tokens)]


def test_taps_go_into_the_context_before_a_block_and_those_dropped_never() -> None:
    model = BlockModel()
    drafter = BlockDrafter(model, [Cache(3), Cache(3)], 3)
    assert [c.restarted for c in drafter.caches] == [-1, -1]
    drafter.note_prompt(hidden(0, 1), [1, 2])
    drafter.note_round(hidden(2, 3), [3])
    drafter.drop(1)
    drafter.drop(0)
    assert [x.shape[1] for x in drafter.waiting()] == [3]
    drafter.draft(0, ExactMatch(), plain)
    drafter.settle()
    assert model.context == [[0.0, 1.0, 2.0]] and drafter.waiting() == []


def test_a_context_that_missed_positions_begins_anew() -> None:
    assert [c.restarted for c in BlockDrafter(BlockModel(), [Cache(2), Cache(2)], 7).caches] == [7, 7]


def test_drafters_are_of_the_models_kind_and_depths_too() -> None:
    block, chain = BlockModel(), Chain()
    assert (
        is_block_head(block) and not is_block_head(chain) and not is_block_head(SimpleNamespace(head=SimpleNamespace()))
    )
    assert isinstance(make_drafter(block, [Cache()], 0, 0.5), BlockDrafter) and isinstance(
        make_drafter(chain, [Cache()], 0), ChainDrafter
    )
    with pytest.raises(
        ValueError, match=r"^a confidence threshold needs a DSpark head; a classic head does not estimate acceptance$"
    ):
        make_drafter(chain, [Cache()], 0, 0.5)
    assert (deepest(block), default_depth(block), deepest(chain), default_depth(chain)) == (4, 4, 8, 1)
    block.args = SimpleNamespace(dspark_block_size=99)
    assert deepest(block) == decode.MAX_BLOCK_DEPTH == 16


@pytest.mark.parametrize(
    ("backbone", "head", "pending", "most", "left"),
    [
        (10, 9, 1, 10, (10, 9, True)),  # level already: the head covers nine, and one waits
        (10, 9, 1, 6, (6, 6, False)),  # taken back, the waiting state is lost, and the head to as many
        (10, 4, 0, 10, (4, 4, False)), (10, 12, 0, 10, (10, 10, False)), (10, 9, 1, 99, (10, 9, True)),
    ],
)  # fmt: skip
def test_a_cache_is_levelled_to_what_backbone_and_head_both_know(
    backbone: int, head: int, pending: int, most: int, left: tuple[int, int, bool]
) -> None:
    caches = [Cache(backbone), Cache(backbone), Cache(head, mx.zeros((1, pending, 1)) if pending else None)]
    model = SimpleNamespace(make_cache=lambda: [0, 0])
    assert level_cache(model, caches, most) == left[0]  # type: ignore[arg-type]
    assert [c.offset for c in caches] == [left[0], left[0], left[1]] and (caches[2].pending is not None) == left[2]


def test_a_cache_that_cannot_go_back_is_of_no_use() -> None:
    class Stuck(Cache):
        def trim(self, count: int) -> int:
            raise ValueError("not held")

    model = SimpleNamespace(make_cache=lambda: [0])
    assert level_cache(model, [Stuck(10)], 5) == 0 and level_cache(model, [Stuck(10)], 10) == 10  # type: ignore[arg-type]
