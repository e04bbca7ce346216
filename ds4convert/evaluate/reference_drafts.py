"""What a model computes, under the keys of a recording that drafts after every step (golden/tiny-v41-a/README.md).

The prompt is prefilled at once; the recorded greedy tokens are then fed one by one, and after each a block is drafted
with the next one as its anchor.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING

import mlx.core as mx

if TYPE_CHECKING:
    from ds4convert.inference.deepseek_v4.model import Model


STATES = ("streams_last8", "pre_mix_last8", "layer_streams_last", "main_hidden_last8")
EXACT = ("engram_rows_last8",)
OF_HEAD = ("main_hidden_last8", "draft_logits", "draft_confidence")
KEYS = (*STATES, *EXACT, *OF_HEAD)
"""Keys that no other recording has, but for `draft_logits`."""

Tensors = Mapping[str, mx.array]


def is_such(wanted: Tensors) -> bool:
    """Whether a recording is of this kind."""
    return "streams_last8" in wanted or "draft_confidence" in wanted


def record(model: Model, wanted: Tensors, trace: object) -> dict[str, mx.array]:
    """Every key of one prompt but those that `trace` collects; it is told what the prompt's pass shows."""
    cache, context = model.make_cache(), model.make_mtp_cache()
    ids = wanted["input_ids"].astype(mx.int32)
    logits, taps, streams = _pass(model, ids, cache, context, trace)
    out = {"logits": logits[0], "streams_last8": streams[0, -8:]}
    if taps is not None:
        out["main_hidden_last8"] = taps[0, -8:]
    greedy: list[int] = wanted["greedy_ids"].tolist() if "greedy_ids" in wanted else []  # type: ignore[assignment]
    rows, blocks = [logits[0, -1:]], []
    for token, anchor in itertools.pairwise(greedy):
        rows.append(_pass(model, mx.array([token]), cache, context)[0][0])
        if taps is not None:
            blocks.append(_draft(model, anchor, context))
    out["greedy_ids"] = mx.concatenate(rows).argmax(axis=-1)
    if rows[1:]:
        out["decode_logits"] = mx.concatenate(rows[1:])
    return out | _joined(blocks, greedy, wanted)


def _pass(
    model: Model,
    ids: mx.array,
    cache: list,  # type: ignore[type-arg]
    context: list,  # type: ignore[type-arg]
    trace: object = None,
) -> tuple[mx.array, mx.array | None, mx.array]:
    """Logits, taps (None without a head that has some) and streams of the next tokens, which the head takes in."""
    if not model.is_dspark:
        logits, streams = model(ids[None], cache=cache, return_hidden=True, trace=trace)  # type: ignore[arg-type]
        mx.eval(logits, streams, [c.state for c in cache])
        return logits, None, streams
    logits, taps, streams = model.tapped_forward(ids[None], cache, trace)  # type: ignore[arg-type]
    model.append_context(taps, context)
    mx.eval(logits, taps, streams, [c.state for c in cache + context])
    return logits, taps, streams


def _draft(model: Model, anchor: int, context: list) -> dict[str, mx.array]:  # type: ignore[type-arg]
    """A whole block after `anchor`: its logits, drafts (the anchor first) and raw confidence."""
    block = model.draft_block(anchor, context)
    drafts: list[mx.array] = []
    rows: list[mx.array] = []
    for slot in range(model.args.dspark_block_size):
        rows.append(block.logits(slot, drafts))
        drafts.append(rows[-1].argmax(axis=-1))
    found = {
        "draft_logits": mx.concatenate(rows),
        "draft_ids": mx.concatenate([mx.array([anchor]), *drafts]),
        "draft_confidence": block.confidence(drafts),
    }
    mx.eval(found)
    return found


def _joined(blocks: list[dict[str, mx.array]], greedy: list[int], wanted: Tensors) -> dict[str, mx.array]:
    """Blocks under the keys of the recording; logits of as many as it has."""
    if not blocks:
        return {}
    out = {key: mx.stack([block[key] for block in blocks]) for key in blocks[0]}
    if "draft_logits" in wanted:
        out["draft_logits"] = out["draft_logits"][: wanted["draft_logits"].shape[0]]
    matches = []
    for at, row in enumerate(out["draft_ids"].tolist()):  # type: ignore[arg-type]
        following = greedy[at + 2 : at + 1 + len(row)]  # type: ignore[arg-type]
        matches.append([int(slot < len(following) and d == following[slot]) for slot, d in enumerate(row[1:])])  # type: ignore[index]
    return out | {"draft_match": mx.array(matches)}
