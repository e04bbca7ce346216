"""A DSpark head against the official code's numbers, and that every known mistake would be seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

from ds4convert.evaluate import reference, reference_dspark
from ds4convert.inference.deepseek_v4 import dspark
from ds4convert.inference.deepseek_v4.cache import ContextCache
from ds4convert.inference.deepseek_v4.layers import Rope, Step
from tests.inference.golden_data import BLOCK, build, golden, model

TOLERANCE = 1e-4
CASES = [(name, prompt) for name in BLOCK for prompt in ("p0", "p1", "p2")]
Patch = Callable[[Any, pytest.MonkeyPatch], None]


def recording(name: str, prompt: str) -> dict[str, dict[str, mx.array]]:
    return {prompt: {k.split(".", 1)[1]: v for k, v in golden(name).items() if k.startswith(f"{prompt}.")}}


def differences(m: Any, name: str, prompt: str) -> tuple[list[str], set[str]]:
    """Keys that are not within the tolerance, and all that were compared."""
    compared = reference.compare(m, recording(name, prompt), TOLERANCE / reference.HIDDEN_FACTOR)
    keys = {c.key.split(".", 1)[1] for c in compared}
    return [c.key.split(".", 1)[1] for c in compared if not c.ok], keys


@pytest.mark.parametrize(("name", "prompt"), CASES)
def test_every_recorded_quantity_is_that_of_the_official_code(name: str, prompt: str) -> None:
    wrong, keys = differences(model(name), name, prompt)
    assert wrong == []
    recorded = set(recording(name, prompt)[prompt]) - {"input_ids"}
    assert keys == recorded and set(reference_dspark.KEYS) <= keys, "nothing is left out"


@pytest.mark.parametrize("name", BLOCK)
def test_weights_as_stored_give_the_same_numbers(name: str) -> None:
    assert differences(build(name, dense=False), name, "p1")[0] == []


# ------------------------------------------------------------------ the 23 mistakes of the sets' READMEs


def shifted_steps(by: int, method: str) -> Patch:
    """Positions of context keys or of a block, off by one."""

    def patch(m: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        right = getattr(dspark.DSpark, method)

        def wrong(self: Any, position: int, *rest: Any) -> Step:
            step = right(self, position, *rest)
            moved = Step(step.offset + by, step.length, step.trace)
            if method == "context_step":  # keys lie where they belong, but are turned wrongly
                step.table = moved.table  # type: ignore[method-assign]
                return step
            return moved

        monkeypatch.setattr(dspark.DSpark, method, wrong)

    return patch


def all_slots_at_the_anchor(m: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = dspark.DSpark.block_step

    def wrong(self: Any, position: int, trace: Any) -> Step:
        step = right(self, position, trace)
        cos_sin = lambda rope: tuple(mx.repeat(x, step.length, axis=0) for x in rope.table(position, 1))  # noqa: E731
        step.table = cos_sin  # type: ignore[method-assign,assignment]
        return step

    monkeypatch.setattr(dspark.DSpark, "block_step", wrong)


def context(change: Callable[[int, int], tuple[int, int]]) -> Patch:
    """Another set of visible context: first position and number from (position, window)."""

    def patch(m: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        def roomy(self: ContextCache, window: int) -> None:
            super(ContextCache, self).__init__(window, 0)
            self.window.capacity = 1024

        monkeypatch.setattr(ContextCache, "__init__", roomy)
        monkeypatch.setattr(dspark, "visible_context", change)

    return patch


def last(p: int, count: int) -> tuple[int, int]:
    start = max(0, p - count)
    return start, p - start


def mask(make: Callable[[int], mx.array]) -> Patch:
    return lambda m, monkeypatch: monkeypatch.setattr(dspark, "block_mask", make)


def module(name: str, change: Callable[[Any], Any]) -> Patch:
    """One attribute of the last stage (or of `mtp.0`) exchanged."""

    def patch(m: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        owner = m.mtp[0] if name == "main_norm" else m.mtp[-1]
        owner[name] = change(m)

    return patch


def argument(**changes: Any) -> Patch:
    def patch(m: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        for key, value in changes.items():
            setattr(m.args, key, value)

    return patch


def reversed_taps(m: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    m.args.dspark_target_layer_ids = m.args.dspark_target_layer_ids[::-1]


def compressed_rope(m: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    a = m.args
    for stage in m.mtp:
        stage.attn.rope = Rope(a.qk_rope_head_dim, a.compress_rope_theta, a.rope_scaling)


def first_stream(m: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from ds4convert.inference.deepseek_v4 import model

    monkeypatch.setattr(model, "tap", lambda streams: streams[:, :, 0])


def layer_inputs(m: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from ds4convert.inference.deepseek_v4 import model

    monkeypatch.setattr(model, "tapped_states", lambda targets: list(targets))


def bias(change: Callable[[Any, int, list[mx.array], mx.array], mx.array]) -> Patch:
    """Other logits of a slot: from (block, slot, drafts, right logits)."""

    def patch(m: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        right = dspark.DraftBlock.logits
        wrong = lambda self, slot, drafts: change(self, slot, drafts, right(self, slot, drafts))  # noqa: E731
        monkeypatch.setattr(dspark.DraftBlock, "logits", wrong)

    return patch


def anchor_throughout(block: Any, slot: int, drafts: list[mx.array], right: mx.array) -> mx.array:
    head = block.last.markov_head
    return block.base[slot : slot + 1] + head.bias(head.rows(mx.array([block.anchor])))


def confidence(change: Callable[[Any, list[mx.array]], mx.array]) -> Patch:
    return lambda m, monkeypatch: monkeypatch.setattr(dspark.DraftBlock, "confidence", change)


def of_the_normed(block: Any, drafts: list[mx.array]) -> mx.array:
    before = mx.concatenate([block.before(slot, drafts) for slot in range(len(drafts))])
    normed = block.last.norm(block.hidden)
    return block.last.confidence_head(normed[: len(drafts)], block.last.markov_head.rows(before))


def of_the_drafted(block: Any, drafts: list[mx.array]) -> mx.array:
    return block.last.confidence_head(block.hidden[: len(drafts)], block.last.markov_head.rows(mx.concatenate(drafts)))


MISTAKES: dict[str, Patch] = {
    "tap layer inputs": layer_inputs,
    "tap first stream": first_stream,
    "taps in reverse order": reversed_taps,
    "no main_norm": module("main_norm", lambda m: lambda x: x),
    "context positions one too high": shifted_steps(1, "context_step"),
    "newest context position missing": context(lambda p, w: (last(p, w)[0], max(0, last(p, w)[1] - 1))),
    "no context": context(lambda p, w: (p, 0)),
    "window of W+1": context(lambda p, w: last(p, w + 1)),
    "window of W-1": context(lambda p, w: last(p, w - 1)),
    "no window": context(lambda p, w: (0, p)),
    "noise token 0": argument(dspark_noise_token_id=0),
    "block positions one too low": shifted_steps(-1, "block_step"),
    "all block positions equal": all_slots_at_the_anchor,
    "compressed rope in the head": compressed_rope,
    "causal block": mask(lambda n: mx.tril(mx.ones((n, n))) > 0),
    "slots see only themselves in the block": mask(lambda n: mx.eye(n) > 0),
    "backbone hc_head": module("hc_head", lambda m: m.model.hc_head),
    "backbone norm": module("norm", lambda m: m.model.norm),
    "no Markov bias": bias(lambda block, slot, drafts, right: block.base[slot : slot + 1]),
    "no Markov bias at slot 0": bias(lambda block, slot, drafts, right: right if slot else block.base[:1]),
    "Markov bias of the anchor throughout": bias(anchor_throughout),
    "confidence after the norm": confidence(of_the_normed),
    "confidence with the drafted token": confidence(of_the_drafted),
}


def test_all_mistakes_of_the_readmes_are_tried() -> None:
    from tests.inference.golden_data import GOLDEN

    for name in BLOCK:
        table = (GOLDEN / name / "README.md").read_text().split("## Size of typical mistakes")[1]
        listed = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")]
        assert sorted(listed[2:]) == sorted(MISTAKES) and len(MISTAKES) == 23


@pytest.mark.sampled(3)
@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("name", BLOCK)
def test_every_known_mistake_is_seen(name: str, mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    m = build(name)
    MISTAKES[mistake](m, monkeypatch)
    wrong, _ = differences(m, name, "p1")
    kinds = {"confidence"} if mistake.startswith("confidence") else {"draft_logits"}
    assert kinds <= set(wrong), f"{mistake} was not seen: only {wrong} differ"
    backbone = {"logits", "hidden_last8", "layer_hidden_last", "greedy_ids", "verify_logits", "decode_logits"}
    assert not backbone - {"verify_logits"} & set(wrong), "the backbone stays as it is"
