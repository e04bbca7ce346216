"""Runs a checkpoint one layer at a time, all prompts at once, for machines smaller than the model.

Teacher-forced: every token is the prompt's own. Owns the figures: perplexity, acceptance of the head's drafts, and
against a source the error after each stage and the final divergence; how a folder goes through its stages is in
`walk`. Decides nothing: what a figure means is for `verify` to say.

Shapes: L positions of one prompt, n positions of any, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ds4convert.errors import InputError
from ds4convert.evaluate.walk import Walk
from ds4convert.inference.deepseek_v4.config import ModelArgs
from ds4convert.inference.load import held_parameters

LOGIT_FLOATS = 1 << 25
"""Logits held at once for each folder; decides how many positions go through the output matrix together."""

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16}
SAME_SHAPE = ("vocab_size", "hidden_size", "num_hidden_layers", "hc_mult")
"""Dimensions that two folders must share to be compared stream by stream."""

Progress = Callable[[int], None]
"""Called with numbers of bytes of stored weights that are dealt with, `work_bytes` in all."""


@dataclass(frozen=True)
class Figures:
    """What one folder makes of the prompts; without a head that can draft, the figures of one are None.

    `perplexity` is exp of `nll`, the mean negative log-probability in nats of `tokens` predicted tokens (all but the
    first of each prompt). `drafts` counts the positions at which the head drafted a token that the backbone predicts
    one position later; a draft is accepted where it is the backbone's argmax. `head_nll` is the head's own mean, in
    nats, for the tokens two positions ahead.
    """

    tokens: int
    nll: float
    drafts: int
    accepted: int
    head_nll: float | None

    @property
    def perplexity(self) -> float:
        """Perplexity per token."""
        return math.exp(min(self.nll, 700.0))

    @property
    def acceptance(self) -> float | None:
        """Accepted drafts over drafts, under teacher forcing; None without a head."""
        return self.accepted / self.drafts if self.drafts else None

    def as_json(self) -> dict[str, Any]:
        """The figures and what follows from them."""
        return dataclasses.asdict(self) | {"perplexity": self.perplexity, "acceptance": self.acceptance}


@dataclass(frozen=True)
class StageError:
    """Relative RMS of the difference of the streams after one stage, over all positions, streams and columns:
    |converted - source| / |source|. Each folder runs on from its own streams, so errors add up.
    """

    stage: str
    relative_rms: float


@dataclass(frozen=True)
class Divergence:
    """KL(source || converted) in nats over `positions` positions, and how many of them have the same argmax."""

    positions: int
    kl_mean: float
    kl_median: float
    kl_max: float
    same_argmax: int


@dataclass(frozen=True)
class Memory:
    """Measured and known sizes in bytes; `peak_rss` is the process's high-water mark since it began.

    `mlx_peak` is the most that arrays took during the run; `largest_layer` and `weights` are as stored, of the
    converted folder.
    """

    peak_rss: int
    mlx_peak: int
    largest_layer: int
    weights: int


@dataclass(frozen=True)
class LayerwiseResult:
    """All that a layer-wise run tells. `head_reason` says why there are no figures of a head, else it is empty."""

    converted: Figures
    prompts: tuple[Figures, ...]
    head_reason: str
    source: Figures | None
    source_head_reason: str
    stages: tuple[StageError, ...]
    divergence: Divergence | None
    head_divergence: Divergence | None
    memory: Memory
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """The result with plain keys and values."""
        return dataclasses.asdict(self) | {
            "converted": self.converted.as_json(),
            "prompts": [prompt.as_json() for prompt in self.prompts],
            "source": self.source.as_json() if self.source else None,
        }


@dataclass
class Positions:
    """Per position of one prompt: argmax and negative log-probability of the target; against a source, KL."""

    argmax: list[int]
    nll: list[float]
    kl: list[float]


def compare_logits(ours: mx.array, theirs: mx.array | None, targets: mx.array) -> tuple[mx.array, ...]:
    """(argmax, nll of `targets`) per row of logits [n, V], both of theirs, and KL(theirs || ours), in nats."""
    ours = ours - mx.logsumexp(ours, axis=-1, keepdims=True)
    found = (ours.argmax(axis=-1), -mx.take_along_axis(ours, targets[:, None], axis=-1)[:, 0])
    if theirs is None:
        return found
    theirs = theirs - mx.logsumexp(theirs, axis=-1, keepdims=True)
    kl = (mx.exp(theirs) * (theirs - ours)).sum(axis=-1)
    return (*found, theirs.argmax(axis=-1), -mx.take_along_axis(theirs, targets[:, None], axis=-1)[:, 0], kl)


def _read_out(
    ours: tuple[Walk, list[mx.array]], theirs: tuple[Walk, list[mx.array]] | None, targets: list[list[int]]
) -> tuple[list[Positions], list[Positions]]:
    """Positions of each prompt, of ours (with KL) and of theirs (empty without a source), from what is collapsed.

    All prompts go through the output matrix in a row; `targets` may be shorter than a prompt (its nll is cut).
    """
    walk, collapsed = ours
    lengths = [x.shape[0] for x in collapsed]
    wanted = [t for mine, n in zip(targets, lengths, strict=True) for t in [*mine, *[0] * (n - len(mine))]]
    x, labels = mx.concatenate(collapsed), mx.array(wanted)
    y = mx.concatenate(theirs[1]) if theirs else None
    columns: list[list[Any]] = [[], [], [], [], []]
    step = max(1, LOGIT_FLOATS // walk.args.vocab_size)
    for start in range(0, x.shape[0], step):
        part = slice(start, start + step)
        second = theirs[0].logits(y[part]) if theirs and y is not None else None
        for column, values in zip(columns, compare_logits(walk.logits(x[part]), second, labels[part]), strict=False):
            column += values.tolist()  # type: ignore[arg-type]
        mx.clear_cache()
    argmax, nll, their_argmax, their_nll, kl = columns
    mine, others, start = [], [], 0
    for length, known in zip(lengths, targets, strict=True):
        whole, cut = slice(start, start + length), slice(start, start + len(known))
        mine.append(Positions(argmax[whole], nll[cut], kl[whole]))
        others.append(Positions(their_argmax[whole], their_nll[cut], []))
        start += length
    return mine, others if theirs else []


def _figures(backbone: list[Positions], head: list[Positions]) -> Figures:
    """Figures over some prompts; `head` is empty where there is none."""
    nll = [value for prompt in backbone for value in prompt.nll]
    head_nll = [value for prompt in head for value in prompt.nll]
    pairs = [
        (draft, wanted)
        for drafted, predicted in zip(head, backbone, strict=False)
        for draft, wanted in zip(drafted.argmax, predicted.argmax[1:], strict=True)
    ]
    accepted = sum(draft == wanted for draft, wanted in pairs)
    mean = statistics.fmean(head_nll) if head_nll else None
    return Figures(len(nll), statistics.fmean(nll), len(pairs), accepted, mean)


def _divergence(ours: list[Positions], theirs: list[Positions]) -> Divergence | None:
    if not theirs:
        return None
    kl = [value for prompt in ours for value in prompt.kl]
    same = sum(a == b for x, y in zip(ours, theirs, strict=True) for a, b in zip(x.argmax, y.argmax, strict=True))
    return Divergence(len(kl), statistics.fmean(kl), statistics.median(kl), max(kl), same)


def relative_rms(ours: list[mx.array], theirs: list[mx.array]) -> float:
    """RMS of the difference over RMS of `theirs`, over all elements of all prompts; 0 where both are 0."""
    pairs = [(a.astype(mx.float32), b.astype(mx.float32)) for a, b in zip(ours, theirs, strict=True)]
    difference = math.fsum(float(mx.square(a - b).sum()) for a, b in pairs)
    size = math.fsum(float(mx.square(b).sum()) for _, b in pairs)
    return math.sqrt(difference / size) if size else math.inf if difference else 0.0


def run_layerwise(
    folder: Path,
    prompts: list[list[int]],
    *,
    source: Path | None = None,
    dtype: str = "float32",
    require_manifest: bool = False,
    progress: Progress | None = None,
) -> LayerwiseResult:
    """Figures of a folder over token ids of prompts; with a source, the differences from it.

    `folder` and `source` are converted folders or checkpoints in the official format; `dtype`, of activations and
    dense matrices, is float32 or bfloat16. Raises InputError, ConfigError or InventoryError, naming the tensors,
    before anything is computed; InputError also on a stage whose output is not finite.
    """
    began = time.perf_counter()
    mx.reset_peak_memory()
    done = progress or (lambda n: None)
    ours = Walk(folder, DTYPES[dtype], require_manifest)
    theirs = Walk(source, DTYPES[dtype]) if source else None
    if theirs:
        _check_same_shape(ours, theirs)
    check_prompts(prompts, ours.args)
    stages = tuple(_run_stages(ours, theirs, [mx.array(prompt)[None] for prompt in prompts], done))
    second = (theirs, theirs.collapsed) if theirs else None
    backbone, their_backbone = _read_out((ours, ours.collapsed), second, [prompt[1:] for prompt in prompts])
    head, their_head, both = _read_heads(ours, theirs, [prompt[2:] for prompt in prompts])
    for walk in filter(None, (ours, theirs)):
        done(walk.sizes.get("output", 0) + (0 if walk.head.present else walk.sizes.get("head", 0)))
    per_prompt = [_figures([b], head[n : n + 1]) for n, b in enumerate(backbone)]
    return LayerwiseResult(
        converted=_figures(backbone, head),
        prompts=tuple(per_prompt),
        head_reason=ours.head.reason,
        source=_figures(their_backbone, their_head) if theirs else None,
        source_head_reason=theirs.head.reason if theirs else "",
        stages=stages,
        divergence=_divergence(backbone, their_backbone),
        head_divergence=_divergence(head, their_head) if both else None,
        memory=_memory(ours),
        seconds=time.perf_counter() - began,
    )


def work_bytes(folder: Path, source: Path | None = None) -> int:
    """Bytes that `progress` will be called with in all."""
    folders = [folder, source] if source else [folder]
    return sum(tensor.size_bytes for place in folders for tensor in held_parameters(place).values())


def _run_stages(ours: Walk, theirs: Walk | None, prompts: list[mx.array], done: Progress) -> Iterator[StageError]:
    """Take both folders through embedding, layers and head in step; yields the errors, without a source none."""
    walks = [ours, theirs] if theirs else [ours]
    for number in range(-1, ours.args.num_hidden_layers):
        stage = f"layer {number}" if number >= 0 else "embedding"
        for walk in walks:
            walk.embed(prompts) if number < 0 else walk.pass_layer(number)
            done(walk.sizes.get(stage, 0))
        if theirs:
            yield StageError(stage, relative_rms(ours.streams, theirs.streams))
    for walk in walks:
        if walk.head.present:
            walk.pass_head()
            done(walk.sizes["head"])
        walk.streams = []
    if theirs and ours.head_streams and theirs.head_streams:
        yield StageError("head", relative_rms(ours.head_streams, theirs.head_streams))
    for walk in walks:
        walk.head_streams = []


def _read_heads(
    ours: Walk, theirs: Walk | None, targets: list[list[int]]
) -> tuple[list[Positions], list[Positions], bool]:
    """Positions of our head and of the source's, each empty where there is none, and whether both are there."""
    mine = (ours, ours.head_collapsed) if ours.head.present else None
    second = (theirs, theirs.head_collapsed) if theirs and theirs.head.present else None
    if mine:
        return *_read_out(mine, second, targets), second is not None
    return [], _read_out(second, None, targets)[0] if second else [], False


def _check_same_shape(ours: Walk, theirs: Walk) -> None:
    for key in SAME_SHAPE:
        wanted, found = getattr(theirs.args, key), getattr(ours.args, key)
        if wanted != found:
            raise InputError(
                f"{ours.folder}: {key} is {found}, but {wanted} in the source {theirs.folder}",
                hint="name the checkpoint that this folder was converted from",
            )


def check_prompts(prompts: list[list[int]], args: ModelArgs) -> None:
    """Raise InputError on a prompt that gives no figure or that the model cannot take."""
    if not prompts:
        raise InputError("no prompts: at least one is needed, of two tokens or more")
    for number, prompt in enumerate(prompts, 1):
        if not 2 <= len(prompt) <= args.max_position_embeddings:
            limit = args.max_position_embeddings
            raise InputError(f"prompt {number}: expected 2 to {limit} tokens, found {len(prompt)}")
        strange = next((token for token in prompt if not 0 <= token < args.vocab_size), None)
        if strange is not None:
            raise InputError(f"prompt {number}: token id {strange} is not in the vocabulary of {args.vocab_size}")


def _memory(walk: Walk) -> Memory:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    layers = [size for stage, size in walk.sizes.items() if stage == "head" or stage.startswith("layer ")]
    return Memory(
        peak_rss=peak if sys.platform == "darwin" else peak * 1024,
        mlx_peak=mx.get_peak_memory(),
        largest_layer=max(layers, default=0),
        weights=sum(walk.sizes.values()),
    )
