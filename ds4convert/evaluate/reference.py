"""A loaded model against logits, hidden states and tokens recorded elsewhere (keys of golden/README.md).

Prompts are `p0`, `p1`, ...; each needs `p{i}.input_ids`, all other keys are optional. The prompt is prefilled at
once and the recorded greedy tokens are then fed one by one, so that both paths are compared. Refuses a file
that cannot be read, or that holds nothing to compare.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx

from ds4convert.errors import InputError
from ds4convert.evaluate import reference_drafts, reference_dspark

if TYPE_CHECKING:
    from ds4convert.inference.deepseek_v4.model import Model


ATOL = 2e-4
"""Default tolerance of logits in float32 (golden/README.md; an exact implementation stays below 5e-5)."""

HIDDEN_FACTOR = 1.5
"""Hidden states get this many times the tolerance of logits: 3e-4 by default, as golden/README.md has it."""

INDEX_PREFIX = "index_topk_last."
HEAD_KEYS = ("mtp_logits", "mtp_decode_logits", "draft_ids", "draft_match")
HIDDEN_KEYS = (
    "hidden_last8",
    "layer_hidden_last",
    "decode_hidden_last",
    *reference_dspark.STATES,
    *reference_drafts.STATES,
)
EXACT_KEYS = (
    "greedy_ids",
    "expert_ids_last",
    "draft_ids",
    "draft_match",
    *reference_dspark.EXACT,
    *reference_drafts.EXACT,
)
INPUT_KEYS = ("input_ids", "mtp_input_ids")
KNOWN = {
    *HEAD_KEYS,
    *HIDDEN_KEYS,
    *EXACT_KEYS,
    *reference_dspark.KEYS,
    *reference_drafts.KEYS,
    "logits",
    "decode_logits",
}

Tensors = Mapping[str, mx.array]


@dataclass(frozen=True)
class Compared:
    """One key: largest absolute difference (None where there is nothing to subtract), and why it is not ok."""

    key: str
    max_abs_diff: float | None
    ok: bool
    detail: str = ""


def read_reference(path: Path) -> dict[str, dict[str, mx.array]]:
    """Tensors by prompt (`p0`, ...) and key; InputError where the file is no such recording."""
    try:
        stored: dict[str, mx.array] = mx.load(str(path))  # type: ignore[assignment]
    except Exception as error:
        raise InputError(f"{path}: not readable as safetensors: {error}") from None
    prompts: dict[str, dict[str, mx.array]] = {}
    for name, value in stored.items():
        prompt, _, key = name.partition(".")
        if prompt[:1] == "p" and prompt[1:].isdigit() and key:
            prompts.setdefault(prompt, {})[key] = value
    for prompt, tensors in prompts.items():
        if "input_ids" not in tensors:
            raise InputError(f"{path}: {prompt}.input_ids is missing; without it {prompt} cannot be compared")
        ids = tensors["input_ids"]
        if ids.ndim != 1 or ids.size == 0 or not mx.issubdtype(ids.dtype, mx.integer):
            raise InputError(f"{path}: {prompt}.input_ids: expected integers [L], found {list(ids.shape)}")
    if not any(_is_known(key) for tensors in prompts.values() for key in tensors):
        raise InputError(f"{path}: no key to compare; expected p0.input_ids with p0.logits and the like")
    return dict(sorted(prompts.items(), key=lambda item: int(item[0][1:])))


def _is_known(key: str) -> bool:
    return key in KNOWN or key.startswith(INDEX_PREFIX)


def longest_prompt(reference: Mapping[str, Tensors]) -> int:
    """Positions that the longest prompt takes, its recorded continuation included."""
    return max(t["input_ids"].size + (t["greedy_ids"].size if "greedy_ids" in t else 0) for t in reference.values())


def compare(model: Model, reference: Mapping[str, Tensors], atol: float = ATOL, rtol: float = 0.0) -> list[Compared]:
    """Compare every known key, in the order of the prompts; other keys are left out.

    Logits pass within atol + rtol * |recorded|, hidden states within 1.5 times the atol; ids have to be equal.
    """
    out = []
    for prompt, tensors in reference.items():
        vocab = model.args.vocab_size
        ids = [tensors[k] for k in (*INPUT_KEYS, "greedy_ids") if k in tensors]
        if any(x.size and (x.min().item() < 0 or x.max().item() >= vocab) for x in ids):  # type: ignore[operator]
            out.append(Compared(f"{prompt}.input_ids", None, False, f"ids beyond the vocabulary of {vocab}"))
            continue
        ours = record(model, tensors)
        out += [
            _compared(f"{prompt}.{key}", key, wanted, ours.get(key), model, atol, rtol)
            for key, wanted in tensors.items()
            if _is_known(key)
        ]
    return out


def _compared(
    name: str, key: str, wanted: mx.array, found: mx.array | None, model: Model, atol: float, rtol: float
) -> Compared:
    if found is None:
        missing = "nothing to compare with"
        if key in (*HEAD_KEYS, *reference_dspark.KEYS, *reference_drafts.OF_HEAD):
            missing = f"the folder's head is {model.head.kind}" if model.head.present else "the folder has no head"
        return Compared(name, None, False, missing)
    if wanted.shape != found.shape:
        return Compared(name, None, False, f"expected shape {list(wanted.shape)}, found {list(found.shape)}")
    difference = mx.abs(wanted.astype(mx.float32) - found.astype(mx.float32))
    if difference.size == 0:
        return Compared(name, 0.0, True)
    largest = float(difference.max().item())  # type: ignore[arg-type]
    if not bool(mx.isfinite(difference).all().item()):
        return Compared(name, None, False, "NaN or infinite values")
    if key in EXACT_KEYS or key.startswith(INDEX_PREFIX):
        count = int((difference != 0).sum().item())  # type: ignore[arg-type]
        return Compared(name, largest, count == 0, f"{count} of {difference.size} differ" if count else "")
    limit = atol * (HIDDEN_FACTOR if key in HIDDEN_KEYS else 1.0) + rtol * mx.abs(wanted.astype(mx.float32))
    count = int((difference > limit).sum().item())  # type: ignore[arg-type]
    return Compared(name, largest, count == 0, f"{count} of {difference.size} beyond tolerance" if count else "")


# ------------------------------------------------------------------ recording


def record(model: Model, wanted: Tensors) -> dict[str, mx.array]:
    """Everything the file may hold for one prompt, computed by `model` from the file's own token ids."""
    out: dict[str, mx.array] = {}
    traced = _Traced(model)
    if reference_drafts.is_such(wanted):
        return reference_drafts.record(model, wanted, traced) | traced.values()
    if model.is_dspark:
        return reference_dspark.record(model, wanted, traced) | traced.values()
    cache, head_cache = model.make_cache(), model.make_mtp_cache()
    ids = wanted["input_ids"].astype(mx.int32)
    logits, hidden = model(ids[None], cache=cache, return_hidden=True, trace=traced)
    mx.eval(logits, hidden)
    out |= {"logits": logits[0], "hidden_last8": hidden[0, -8:]} | traced.values()
    forced = wanted.get("greedy_ids")
    first = logits[0, -1:]
    steps = [] if forced is None else _steps(model, forced.astype(mx.int32), cache)
    if steps:
        out["decode_logits"] = mx.concatenate([row for row, _ in steps])
        out["decode_hidden_last"] = steps[-1][1][0, -1]
        first = mx.concatenate([first, out["decode_logits"]])
    out["greedy_ids"] = first.argmax(axis=-1)
    if model.head.present:
        states = [state for _, state in steps]
        out |= _record_head(model, wanted, hidden, states, out["greedy_ids"], head_cache)
    return out


def _steps(model: Model, forced: mx.array, cache: list) -> list[tuple[mx.array, mx.array]]:  # type: ignore[type-arg]
    """Logits [1, V] and streams [1, 1, M, D] of each recorded token but the last, fed alone."""
    out = []
    for at in range(forced.size - 1):
        logits, hidden = model(forced[None, at : at + 1], cache=cache, return_hidden=True)
        mx.eval(logits, hidden)
        out.append((logits[0], hidden))
    return out


def _record_head(
    model: Model,
    wanted: Tensors,
    hidden: mx.array,
    states: list[mx.array],
    greedy: mx.array,
    cache: list,  # type: ignore[type-arg]
) -> dict[str, mx.array]:
    """The head over the prompt, then over each decode step; its inputs are the file's, or follow from it."""
    ids = wanted["input_ids"].astype(mx.int32)
    forced = wanted.get("greedy_ids", greedy).astype(mx.int32)
    following = wanted.get("mtp_input_ids", mx.concatenate([ids[1:], forced[:1]])).astype(mx.int32)
    if following.shape != ids.shape:
        return {}
    logits = model.mtp_forward(hidden, following[None], cache)[0]
    mx.eval(logits)
    out, rows = {"mtp_logits": logits}, logits[-1:]
    parts = []
    for at, state in enumerate(states):
        part = model.mtp_forward(state, forced[None, at + 1 : at + 2], cache)[0]
        mx.eval(part)
        parts.append(part)
    if parts:
        out["mtp_decode_logits"] = mx.concatenate(parts)
        rows = mx.concatenate([rows, *parts])
    drafts = rows.argmax(axis=-1)
    out |= {"draft_ids": drafts, "draft_match": (drafts[: greedy.size - 1] == greedy[1:]).astype(mx.int32)}
    return out


class _Traced:
    """Collects what a pass shows of its last position."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.hidden: dict[int, mx.array] = {}
        self.experts: dict[int, mx.array] = {}
        self.entries: dict[int, list[int]] = {}
        self.rows: dict[int, mx.array] = {}
        self.mix: mx.array | None = None

    def __call__(self, kind: str, layer: int, value: mx.array) -> None:
        """Receive one value of the pass; see `layers.Trace`."""
        if kind == "hidden":
            self.hidden[layer] = value[0, -1]
        elif kind == "experts":
            self.experts[layer] = mx.sort(value[0, -1])
        elif kind == "mix":
            self.mix = value[0, -8:]
        elif kind == "engram":
            self.rows[layer] = value[0, -8:]
        else:
            picks: list[int] = value[0].tolist()  # type: ignore[assignment]
            self.entries[layer] = sorted(pick for pick in picks if pick >= 0)

    def values(self) -> dict[str, mx.array]:
        """What was collected, under the keys of the file."""
        layers = range(self.model.args.num_hidden_layers)
        out = {"layer_hidden_last": mx.stack([self.hidden[n] for n in [*layers, len(layers)]])}
        out["layer_streams_last"] = out["layer_hidden_last"]
        out["expert_ids_last"] = mx.stack([self.experts[n] for n in layers])
        if self.mix is not None:
            out["pre_mix_last8"] = self.mix
        if self.rows:
            out["engram_rows_last8"] = mx.stack([self.rows[n] for n in sorted(self.rows)])
        return out | {f"{INDEX_PREFIX}{n}": mx.array(ids) for n, ids in self.entries.items() if ids}
