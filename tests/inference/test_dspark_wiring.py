"""What `verify --mtp` tries on a DSpark head: found where parts are exchanged, and the model is left as it was."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from tokenizers import Tokenizer

from ds4convert.demo import embedded
from ds4convert.evaluate import wiring_dspark
from ds4convert.evaluate.decode_runs import Prompt
from ds4convert.evaluate.forced import backbone_passes, head_logits
from ds4convert.evaluate.forced_dspark import forced_blocks
from ds4convert.inference.load import build_model
from ds4convert.verification import prompts
from tests.inference.golden_data import BLOCK, build, golden, max_diff, model

NAME = BLOCK[0]


def passes(m: Any, name: str = NAME) -> list[Any]:
    g = golden(name)
    texts = [[*g[f"p{i}.input_ids"].tolist(), *g[f"p{i}.greedy_ids"].tolist()] for i in range(3)]
    return backbone_passes(m, [Prompt(str(n), tuple(ids)) for n, ids in enumerate(texts)])


@pytest.fixture
def telling(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the experts showed a trace of training, which those of the golden sets do not."""
    monkeypatch.setattr(wiring_dspark, "expert_fits", lambda stage: ({}, True))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", BLOCK)
def test_blocks_at_all_positions_are_those_of_decoding(name: str) -> None:
    m, g = model(name), golden(name)
    length = g["p1.input_ids"].size
    passed = passes(m, name)[1]
    blocks = forced_blocks(m, passed.prompt.ids, passed.taps)
    row = length - 1  # the block whose anchor is the first greedy token
    assert max_diff(blocks.logits[row, 0], g["p1.draft_logits"][0, 0]) < 1e-4
    assert max_diff(blocks.confidence[row, 0], g["p1.confidence"][0, 0]) < 1e-4
    assert max_diff(head_logits(m, passed)[row], g["p1.draft_logits"][0, 0]) < 1e-4
    assert blocks.known[0].all().item() and not blocks.known[-1, 1:].any().item()


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", BLOCK)
def test_an_untrained_healthy_head_is_not_accused_and_little_is_judged(name: str) -> None:
    found = wiring_dspark.check_wiring(model(name), passes(model(name), name))
    assert found.found == () and found.tried == 1


def exchange_stages(m: Any) -> None:
    for part in wiring_dspark.BLOCK_PARTS:
        m.mtp[1][part], m.mtp[2][part] = m.mtp[2][part], m.mtp[1][part]


def exchange_tables(m: Any) -> None:
    head = m.mtp[-1].markov_head
    head.markov_w1.weight, head.markov_w2.weight = head.markov_w2.weight, head.markov_w1.weight


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("damage", "words"), [(exchange_stages, "stages 1 and 2"), (exchange_tables, "Markov tables w1 and w2")]
)
def test_exchanged_parts_are_found_and_the_model_is_left_as_it_was(
    damage: Callable[[Any], None], words: str, telling: None
) -> None:
    m = build(NAME)
    damage(m)
    taken = passes(m)
    before = head_logits(m, taken[1])
    found = wiring_dspark.check_wiring(m, taken)
    assert any(words in str(x) for x in found.found), found
    assert found.tried >= 12
    assert max_diff(head_logits(m, passes(m)[1]), before) == 0, "put back"


HELD_OUT = Path(__file__).parents[1] / "data" / "held_out.json"


def trained(texts: list[str] | None = None) -> tuple[Any, list[Any]]:
    """The trained head of the demo and passes over texts: if not said, those that its training left out."""
    weights: dict[str, mx.array] = {}
    files = dict(embedded.files(embedded.DSPARK))
    with tempfile.TemporaryDirectory() as folder:
        for name in (n for n in files if n.endswith(".safetensors")):
            path = Path(folder) / name
            path.write_bytes(files[name])
            part = mx.load(str(path))
            mx.eval(part)
            weights |= part
    m = build_model(json.loads(files["config.json"]), weights, "demo")
    m.set_compute_dtype(mx.float32)
    m.dequantize()
    encode = Tokenizer.from_str(files["tokenizer.json"].decode()).encode
    start = () if texts else (0,)  # as in training; `verify` gives a text as the tokenizer does, without
    texts = texts or json.loads(HELD_OUT.read_text())
    return m, backbone_passes(m, [Prompt(str(n), (*start, *encode(t).ids)) for n, t in enumerate(texts)])


@pytest.mark.slow
def test_a_confidence_that_is_too_sure_on_texts_of_another_kind_is_no_exchange() -> None:
    """The prompts of `verify` have code and French, the demo has read one old book: it expects more hits there."""
    m, taken = trained([str(p.content) for p in prompts.fixed_prompts()])
    assert wiring_dspark._normed_confidence(m, taken) == []


def test_logits_are_brought_to_the_share_of_hits_and_keep_their_distances() -> None:
    logits = mx.array([[-1.0, 0.5], [2.0, 3.0], [0.0, -2.0]])
    hit, weight = mx.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), mx.array([[40.0, 40.0], [40.0, 40.0], [40.0, 0.0]])
    found = wiring_dspark._to_level(logits, hit, weight)
    assert max_diff(found - found[0, 0], logits - logits[0, 0]) < 1e-6
    share = (mx.sigmoid(found) * weight).sum() / weight.sum()
    assert share.item() == pytest.approx(3 / 5, abs=0.01), "of 200 that count 120 hit"
    none = wiring_dspark._to_level(logits, mx.zeros_like(hit), weight)
    assert bool(mx.isfinite(none).all()) and none.max().item() < -1.5
    broken = mx.array([[mx.nan, 1.0], [0.0, 0.0], [0.0, 0.0]])
    assert wiring_dspark._to_level(broken, hit, weight) is broken


def swap_connections(m: Any) -> None:
    m.mtp[0].attn_hc, m.mtp[0].ffn_hc = m.mtp[0].ffn_hc, m.mtp[0].attn_hc


def reverse_taps(m: Any) -> None:
    m.args.dspark_target_layer_ids = m.args.dspark_target_layer_ids[::-1]


@pytest.mark.nightly
@pytest.mark.slow
def test_more_than_the_tables_is_judged_in_a_trained_head() -> None:
    """Without any monkeypatch: its experts show a trace of training."""
    m, taken = trained()
    healthy = wiring_dspark.check_wiring(m, taken)
    assert healthy.found == () and healthy.tried >= 7, healthy
    for damage, words in ((swap_connections, "attn_hc and ffn_hc"), (reverse_taps, "order reversed")):
        damage(m)
        found = wiring_dspark.check_wiring(m, backbone_passes(m, [passed.prompt for passed in taken]))
        assert any(words in str(x) for x in found.found), (words, found)
        damage(m)


@pytest.mark.nightly
def test_a_confidence_row_that_reads_the_normed_state_is_found(telling: None) -> None:
    """A row that foretells acceptance from the normed state only: fitted to it here, by a few steps of descent."""
    m = build(NAME)
    taken = passes(m)
    last, xs, ys = m.mtp[-1], [], []
    for passed in taken:
        anchors = mx.arange(1, len(passed.prompt.ids))
        _, hidden = m.dspark.blocks(mx.array(passed.prompt.ids), passed.taps, anchors)
        blocks, rows = wiring_dspark._blocks(m, passed)
        hit = (blocks.logits.argmax(axis=-1) == rows.argmax(axis=-1)).astype(mx.float32)
        xs.append(last.norm(hidden).reshape(-1, hidden.shape[-1]))
        ys.append(hit.flatten())
    x, y = mx.concatenate(xs), mx.concatenate(ys)
    row = mx.zeros((x.shape[1],))
    for _ in range(400):
        row = row - 0.02 * ((mx.sigmoid(x @ row) - y) @ x) / x.shape[0]
        mx.eval(row)
    rank = m.args.dspark_markov_rank
    last.confidence_head.proj.weight = mx.concatenate([row, mx.zeros((rank,))])[None]
    found = wiring_dspark.check_wiring(m, taken)
    assert any("confidence row" in x.what for x in found.found), found
