"""DeepSeek-V4.1 against the recorded numbers, and that each known way to get it wrong would be seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

from ds4convert.evaluate import reference, reference_drafts
from ds4convert.inference import tokens
from ds4convert.inference.deepseek_v4 import attention as v4_attention
from ds4convert.inference.deepseek_v4 import dspark as v4_dspark
from ds4convert.inference.deepseek_v4.layers import Rope, collapse
from ds4convert.inference.deepseek_v41 import attention, engram, layers, model, ngrams
from tests.inference import golden_v41
from tests.inference.golden_v41 import SOURCE, golden, recording

TOLERANCE = 1e-4
Patch = Callable[[Any, pytest.MonkeyPatch], None]


def differences(m: Any, recorded: dict[str, dict[str, mx.array]]) -> tuple[set[str], set[str]]:
    """Keys that are not within the tolerance, and all that were compared."""
    compared = reference.compare(m, recorded, TOLERANCE / reference.HIDDEN_FACTOR)
    keys = {c.key.split(".", 1)[1] for c in compared}
    return {c.key.split(".", 1)[1] for c in compared if not c.ok}, keys


@pytest.mark.parametrize(
    ("prompt", "steps"),
    [("p0", None), ("p1", 8), ("p2", 8), *(pytest.param(p, None, marks=pytest.mark.nightly) for p in ("p1", "p2"))],
)
def test_every_recorded_quantity_is_as_recorded(prompt: str, steps: int | None) -> None:
    recorded = recording(prompt, steps)
    wrong, keys = differences(golden_v41.model(), recorded)
    assert not wrong
    assert keys == set(recorded[prompt]) - {"input_ids"} and set(reference_drafts.KEYS) <= keys


def test_weights_as_stored_give_the_same_numbers() -> None:
    assert not differences(golden_v41.build(dense=False), recording("p1", 4))[0]


def test_tokens_reduce_to_the_recorded_ids() -> None:
    assert tokens.compressed_ids(SOURCE) == golden()["token_map"].tolist()


def test_without_its_head_the_backbone_is_compared_and_the_head_s_keys_are_named() -> None:
    m = golden_v41.build()
    m.head = type(m.head)("none", "left out")
    wrong, keys = differences(m, recording("p0", 2))
    assert wrong == {"main_hidden_last8", "draft_ids", "draft_logits", "draft_confidence"} and "logits" in keys


# ------------------------------------------------------------------ mistakes


def attribute(owner: Any, name: str, change: Callable[..., Any]) -> Patch:
    """A function exchanged for `change`, which is given the right one first."""

    def patch(m: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        right = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, **k: change(right, *a, **k))

    return patch


def own_mix(m: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in V4: every sublayer reads the streams by weights of its own."""

    def enter(self: Any, state: Any, cache: Any, step: Any) -> Any:
        return right(self, layers.Mixed(state.streams, self.attn_hc(state.streams)[0]), cache, step)

    right = layers.Block.enter
    monkeypatch.setattr(layers.Block, "enter", enter)


def head_norm(right: Any, self: Any, low: Any, step: Any) -> Any:
    queries = right(self, low, step)
    return mx.fast.rms_norm(queries, None, 1e-20)


def tapped_after(m: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in V4: the layer's output."""
    m.args.dspark_target_layer_ids = [n + 1 for n in m.args.dspark_target_layer_ids[:-1]] + [0]


def one_rope(m: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    a = m.args
    for layer in m.layers:
        layer.attn.rope = Rope(a.qk_rope_head_dim, a.rope_theta)


def no_candidates(m: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention.Indexer, "within", lambda self, scores, blocks: scores)


def unpinned(right: Any, self: Any, scores: mx.array, visible: mx.array) -> Any:
    return right(self, scores, mx.zeros_like(visible))


def of_the_first_source(m: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers after the last index source choose as the first one did."""
    right = attention.Attention._choose

    def choose(self: Any, x: Any, low: Any, step: Any) -> None:
        if self.layer != max(m.args.index_source_layer_ids):
            right(self, x, low, step)

    monkeypatch.setattr(attention.Attention, "_choose", choose)


def late_engram(m: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engram's part is added behind the layer."""

    def call(self: Any, state: Any, tokens: Any, cache: Any, step: Any) -> Any:
        return enrich(self, right(self, state, tokens, cache, step), tokens, cache, step)

    right, enrich = layers.Block.__call__, layers.Block.enrich
    monkeypatch.setattr(layers.Block, "__call__", call)
    monkeypatch.setattr(layers.Block, "enrich", lambda self, state, *rest: state)


def hashes(change: Callable[[Any], None]) -> Patch:
    """What all engrams hash with is changed."""
    return lambda m, monkeypatch: change(m.layers[m.args.engram_layer_ids[0]].engram.hasher)


def raw_ids(hasher: Any) -> None:
    hasher.map = mx.arange(len(hasher.map)).tolist()
    hasher.map = ngrams.np.array(hasher.map)


def swapped_layers(hasher: Any) -> None:
    first, second = hasher._layers
    a, b = hasher._layers[first], hasher._layers[second]
    hasher._layers = {first: (b[0], *a[1:]), second: (a[0], *b[1:])}


def narrower(right: Any, window: Any, start: int, end: int, low: int, high: int) -> Any:
    own = window.step.positions()[start:end, None]
    return right(window, start, end, low, high) & (window.positions[low:high] > own - window.size + 1)


def last_streams(right: Any, state: Any) -> Any:
    return collapse(state.streams, mx.ones_like(state.mix) / state.mix.shape[-1])


MISTAKES: dict[str, tuple[str, Patch]] = {
    "a sublayer reads by its own mix": ("streams_last8", own_mix),
    "the last collapse is a mean": (
        "logits",
        attribute(layers.Collapse, "__call__", lambda r, self, s: last_streams(r, s)),
    ),
    "queries normed by head": ("logits", attribute(attention.PlainQueries, "_queries", head_norm)),
    "plain rope throughout": ("logits", one_rope),
    "window of W-1": ("logits", attribute(v4_attention._Window, "_mask", narrower)),
    "all entries are candidates": ("logits", no_candidates),
    "the newest block is not kept": ("logits", attribute(attention.Indexer, "best_blocks", unpinned)),
    "the last source does not choose anew": ("logits", of_the_first_source),
    "entries seen before they are whole": (
        "logits",
        attribute(attention.Pass, "visible", lambda r, self, ratio: r(self, ratio) + (ratio > 1)),
    ),
    "no engram": ("logits", attribute(layers.Block, "enrich", lambda r, self, state, *rest: state)),
    "the engram behind its layer": ("logits", late_engram),
    "no root in the engram's gate": (
        "logits",
        attribute(
            engram.Engram, "_gate", lambda r, self, s, k: mx.sigmoid(mx.log(r(self, s, k) / (1 - r(self, s, k))) ** 3)
        ),
    ),
    "hashes of raw ids": ("engram_rows_last8", hashes(raw_ids)),
    "multipliers of the other layer": ("engram_rows_last8", hashes(swapped_layers)),
    "padding is id 0": ("logits", hashes(lambda h: setattr(h, "pad", 0))),
    "taps of other layers": ("main_hidden_last8", tapped_after),
    "taps of the first stream": (
        "draft_logits",
        attribute(model, "tap", lambda r, streams: streams[:, :, 0]),
    ),
    "no Markov bias": (
        "draft_logits",
        attribute(v4_dspark.DraftBlock, "logits", lambda r, self, slot, drafts: self.base[slot : slot + 1]),
    ),
    "the backbone's norm in the head": ("draft_logits", lambda m, mp: m.mtp[-1].__setitem__("norm", m.model.norm)),
    "a causal block": (
        "draft_logits",
        attribute(v4_dspark, "block_mask", lambda r, n: mx.tril(mx.ones((n, n))) > 0),
    ),
    "noise token 0": ("draft_logits", lambda m, mp: setattr(m.args, "dspark_noise_token_id", 0)),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_each_mistake_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    key, patch = MISTAKES[name]
    m = golden_v41.build()
    patch(m, monkeypatch)
    assert key in differences(m, recording("p0" if name == "padding is id 0" else "p1", 1))[0]
