"""`verify --layerwise` in words: joins the layer-wise run with the checks of `verify`.

For a machine smaller than the model: one layer's weights in memory at a time, all prompts at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ds4convert.verification import verdict
from ds4convert.verification.checks import Check
from ds4convert.words.figures import size

if TYPE_CHECKING:
    from ds4convert.evaluate.layerwise import LayerwiseResult


def run(
    folder: Path,
    prompts: list[list[int]],
    vocab: int,
    source: Path | None,
    dtype: str | None,
    progress: Callable[[int], None] = lambda n: None,
) -> tuple[list[Check], LayerwiseResult]:
    """Return the checks and the figures of a layer-wise run over token ids of `prompts`.

    Raises `InputError` naming the tensors where a folder cannot be loaded or a layer's output is not finite.
    """
    from ds4convert.evaluate.layerwise import run_layerwise

    found = run_layerwise(folder, prompts, source=source, dtype=dtype or "float32", progress=progress)
    checks = [_backbone(found, vocab), _head(found)]
    if found.divergence is not None:
        checks.append(_source(found))
    return checks, found


def _backbone(found: LayerwiseResult, vocab: int) -> Check:
    figures, memory = found.converted, found.memory
    best = min((p.perplexity for p in found.prompts if p.tokens), default=math.inf)
    room = f"peak memory {size(memory.peak_rss)} for {size(memory.weights)} of weights"
    text = f"perplexity {figures.perplexity:.2f} over {figures.tokens} tokens; {room}, {found.seconds:.0f} s"
    good = best < verdict.BROKEN * vocab
    return Check("layerwise numerics", good, text if good else f"{text}; a working backbone does far better")


def _head(found: LayerwiseResult) -> Check:
    acceptance = found.converted.acceptance
    if acceptance is None:
        promised = bool(found.source and found.source.acceptance is not None)
        return Check("layerwise head", not promised, f"no head to draft with: {found.head_reason}")
    text = f"drafts agree with the backbone's choice at {acceptance:.1%} of {found.converted.drafts} positions"
    return Check("layerwise head", acceptance >= verdict.FORCED_USELESS, f"{text}, on the prompts' own tokens")


def _source(found: LayerwiseResult) -> Check:
    """How far the folder is from its source. Lossy formats differ by design: only numbers that are none fail."""
    d = found.divergence
    assert d is not None
    worst = max(found.stages, key=lambda s: s.relative_rms)
    text = (
        f"KL from the source {d.kl_mean:.3g} nats mean, {d.kl_median:.3g} median, {d.kl_max:.3g} at most; "
        f"same choice at {d.same_argmax} of {d.positions} positions; largest error of hidden states "
        f"{worst.relative_rms:.3g}, after {worst.stage}"
    )
    return Check("layerwise source", math.isfinite(d.kl_mean), text)
