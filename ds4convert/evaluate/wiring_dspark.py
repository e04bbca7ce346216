"""Does a DSpark head's wiring make sense: what a wrong table of names or a wrong config would exchange, tried.

As `wiring` does it for a classic head: the head as it is against the head with two parts exchanged, by the mean paired
difference of KL(backbone || head) over the blocks of the prompts, in standard errors. The Markov tables are always
judged, as their exchange alone decides what follows a token (26 to 66 standard errors on the golden sets). The rest is
judged where the experts show a trace of training: with random values a wrong order may agree better by luck.
"""

# mlx.nn carries no types that mypy can see, so these checks would only repeat that.
# mypy: disable-error-code="attr-defined,no-any-return,union-attr"

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from ds4convert.evaluate.forced import Passed, kl_nats, pass_of
from ds4convert.evaluate.forced_dspark import forced_blocks
from ds4convert.evaluate.wiring import BEHAVIOUR_LIMIT, Exchange, Wiring, expert_fits, standard_errors, swapped

if TYPE_CHECKING:
    from ds4convert.inference.deepseek_v4.model import Model


MARKOV_LIMIT = 5.0
"""Standard errors for the Markov tables, which are judged in untrained heads too."""

NEWTON_STEPS, RIDGE = 12, 1.0

BLOCK_PARTS = ("attn", "ffn", "attn_norm", "ffn_norm", "attn_hc", "ffn_hc")
"""What every stage has."""

Change = Callable[[], Any]


def check_wiring(model: Model, passes: Sequence[Passed]) -> Wiring:
    """Look for exchanged parts of the head, wrong taps and a wrong window. The model is left as it was."""
    is_telling = any(expert_fits(stage)[1] for stage in model.mtp)
    base = _divergences(model, passes)
    changes: list[tuple[str, float, bool, Change]] = [
        ("the Markov tables w1 and w2", MARKOV_LIMIT, False, lambda: _tables_swapped(model.mtp[-1]))
    ]
    if is_telling:
        changes += [(what, BEHAVIOUR_LIMIT, taps, change) for what, taps, change in _changes(model)]
    found = []
    for what, limit, is_tapped_anew, change in changes:
        with change():
            other = [pass_of(model, passed.prompt) for passed in passes] if is_tapped_anew else passes
            score = standard_errors(_divergences(model, other) - base)
        if score <= -limit:
            found.append(Exchange(what, score, None))
    if is_telling:
        found += _normed_confidence(model, passes)
    return Wiring(tuple(found), len(changes) + is_telling, True)


def _divergences(model: Model, passes: Sequence[Passed]) -> mx.array:
    """KL(backbone || head) in nats of each block, mean over its slots."""
    values = []
    for passed in passes:
        blocks, rows = _blocks(model, passed)
        kl = kl_nats(rows, blocks.logits) * blocks.known
        values.append(kl.sum(axis=-1) / blocks.known.sum(axis=-1))
    joined = mx.concatenate(values)
    mx.eval(joined)
    return joined


def _blocks(model: Model, passed: Passed) -> tuple[Any, mx.array]:
    """Blocks of a prompt, and the backbone's logits [L-1, slots, V] that they are compared with."""
    assert passed.taps is not None
    blocks, length = forced_blocks(model, passed.prompt.ids, passed.taps), len(passed.prompt.ids)
    places = mx.arange(1, length)[:, None] + mx.arange(blocks.known.shape[1])
    return blocks, passed.logits[mx.minimum(places, length - 1)]


def _changes(model: Model) -> Iterator[tuple[str, bool, Change]]:
    """What may be exchanged, whether the backbone has to be tapped anew, and how it is done."""
    for a, b in itertools.combinations(range(len(model.mtp)), 2):
        yield f"stages {a} and {b}", False, partial(_stages_swapped, model, a, b)
    targets = list(model.args.dspark_target_layer_ids)
    if len(targets) > 1:
        yield "the tapped layers (their order reversed)", True, partial(_targets, model, targets[::-1])
    for by, name in ((-1, "one layer earlier"), (1, "one layer later")):
        moved = [layer + by for layer in targets]
        if min(moved) >= -1 and max(moved) < model.args.num_hidden_layers:
            yield f"the tapped layers ({name})", True, partial(_targets, model, moved)
    for by in (-1, 1):
        yield f"the window ({model.args.sliding_window + by} positions)", False, partial(_window, model, by)
    for number, stage in enumerate(model.mtp):
        for first, second in (("attn_norm", "ffn_norm"), ("attn_hc", "ffn_hc")):
            yield f"{first} and {second} of stage {number}", False, partial(swapped, stage, first, second)


@contextmanager
def _stages_swapped(model: Model, a: int, b: int) -> Iterator[None]:
    """The blocks of two stages exchanged, and put back; what only the first and the last have stays."""
    first, second = model.mtp[a], model.mtp[b]

    def exchange() -> None:
        for part in BLOCK_PARTS:
            first[part], second[part] = second[part], first[part]

    exchange()
    try:
        yield
    finally:
        exchange()


@contextmanager
def _tables_swapped(stage: Any) -> Iterator[None]:
    head = stage.markov_head
    first, second = head.markov_w1.weight, head.markov_w2.weight
    head.markov_w1.weight, head.markov_w2.weight = second, first
    try:
        yield
    finally:
        head.markov_w1.weight, head.markov_w2.weight = first, second


@contextmanager
def _targets(model: Model, targets: list[int]) -> Iterator[None]:
    before = model.args.dspark_target_layer_ids
    model.args.dspark_target_layer_ids = targets
    try:
        yield
    finally:
        model.args.dspark_target_layer_ids = before


@contextmanager
def _window(model: Model, by: int) -> Iterator[None]:
    with ExitStack() as stack:
        for stage in model.mtp:
            stage.attn.window += by
            stack.callback(setattr, stage.attn, "window", stage.attn.window - by)
        yield


def _normed_confidence(model: Model, passes: Sequence[Passed]) -> list[Exchange]:
    """Whether the confidence row tells accepted drafts better from the normed state, which it must not read.

    Either reading is brought to the share of hits first: on texts of another kind than its own a healthy head is too
    sure of itself, and whichever reading gives smaller numbers would seem to know better. The size of the numbers is
    left as it is: by that the two readings differ.
    """
    last = model.mtp[-1]
    losses = []
    for is_normed in (False, True):
        told, hits, known = [], [], []
        for passed in passes:
            assert passed.taps is not None
            with _confidence_of(last, is_normed):
                blocks, rows = _blocks(model, passed)
            told.append(blocks.confidence.astype(mx.float32))
            hits.append((blocks.logits.argmax(axis=-1) == rows.argmax(axis=-1)).astype(mx.float32))
            known.append(blocks.known.astype(mx.float32))
        hit, weight = mx.concatenate(hits), mx.concatenate(known)
        level = _to_level(mx.concatenate(told), hit, weight)
        loss = (mx.logaddexp(0.0, level) - hit * level) * weight
        losses.append(loss.sum(axis=-1) / weight.sum(axis=-1))
    score = standard_errors(losses[1] - losses[0])
    what = "the state before and after the head's norm, for the confidence row,"
    return [Exchange(what, score, None)] if score <= -BEHAVIOUR_LIMIT else []


def _to_level(logits: mx.array, hit: mx.array, weight: mx.array) -> mx.array:
    """Return logits `[blocks, slots]` plus the constant with which they foretell the hits best.

    Logistic regression of the constant alone by Newton's method, in float64, with a ridge that keeps it finite where
    all drafts hit or none. Numbers that are none are left as they are.
    """
    x, y, w = (np.array(a, dtype=np.float64) for a in (logits, hit, weight))
    if not np.isfinite(x).all():
        return logits
    constant = 0.0
    for _ in range(NEWTON_STEPS):
        p = 1 / (1 + np.exp(-np.clip(x + constant, -30, 30)))
        constant -= ((w * (p - y)).sum() + RIDGE * constant) / ((w * p * (1 - p)).sum() + RIDGE)
    return logits + constant


@contextmanager
def _confidence_of(last: Any, is_normed: bool) -> Iterator[None]:
    """The confidence head reading the normed state."""
    own = last.confidence_head
    if is_normed:
        last["confidence_head"] = lambda hidden, rows: own(last.norm(hidden), rows)
    try:
        yield
    finally:
        last["confidence_head"] = own
