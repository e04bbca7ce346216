"""Judge the MTP head: absent, unfit, or measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ds4convert.converted.folder import read_mlx
from ds4convert.errors import Ds4Error
from ds4convert.verification import verdict
from ds4convert.verification.facts import (
    Bin,
    HeadFacts,
    Measurement,
    Milliseconds,
    Position,
    PromptFacts,
    TeacherForced,
    WiringFacts,
    record_of,
)
from ds4convert.verification.request import Outcome, Request

if TYPE_CHECKING:
    from ds4convert.evaluate.decode_runs import Compute, Decoded, PromptRun, Runs
    from ds4convert.evaluate.wiring import Wiring
    from ds4convert.inference.deepseek_v4.model import Model


# --- the head --------------------------------------------------------------------------------------------------------


def _head_problems(folder: Path) -> list[str]:
    """Return what is wrong with the head's tensors, or nothing where the backbone's are wrong too."""
    try:
        found = read_mlx(folder).findings
    except Ds4Error:
        return []
    own = [str(f) for f in found if f.tensor.startswith(("mtp.", "model.mtp."))]
    return own if len(own) == len(found) else []


def _unfit_head(request: Request, problems: list[str], out: Outcome) -> None:
    more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
    sentence = (
        "The tensors under mtp.* are not those of a classic MTP head, so it was not run "
        f"(another kind of head renamed, or a damaged one): {'; '.join(problems[:3])}{more}."
    )
    out.facts.mtp = HeadFacts(True, "unknown", _formats(request.folder), sentence)
    out.add("head works", [sentence], "")


def _absence(model: Model, folder: Path) -> str:
    """Return why there is no head, from the manifest where it says so, else from config and tensors."""
    record = record_of(folder)
    left = [x for x in record.left_out if x.tensor.startswith("mtp.")] if record else []
    if left and record and not record.head.tensors:
        return f"it was left out at conversion ({left[0].why})"
    return model.head.reason


def _judge(
    request: Request, model: Model, found: verdict.Measured, compute: Compute, numerics: list[str], out: Outcome
) -> None:
    """Add the checks of the head, the `mtp` object and its verdict."""
    if not model.head.present:
        sentence = f"No MTP head to draft with: {_absence(model, request.folder)}."
        out.facts.mtp = HeadFacts(False, "none", _formats(request.folder), sentence)
        out.add("head works", [sentence], "")
        return
    runs, forced = found.runs, found.forced
    assert runs is not None
    useless = verdict.useless_reason(runs, forced)
    scrambled = [str(x) for x in found.wiring.found] if found.wiring else []
    unequal = verdict.inequality(runs, compute.dtype)
    off = [*numerics, *([] if runs.finite else ["log-probabilities that are not numbers"])]
    out.add("head works", [useless] if useless else [], verdict.works(runs, forced))
    out.add("head wiring", scrambled, verdict.wiring_good(found.wiring))
    out.add("greedy equality", unequal, verdict.equality_good(runs))
    altered = [c.name for c in out.checks if not c.ok and c.name in verdict.ALTERED]
    sentence = verdict.verdict(runs, off, altered, scrambled, useless, unequal)
    measured = figures(model, found, request.confidence)
    out.facts.mtp = HeadFacts(True, model.head.kind, _formats(request.folder), sentence, measured)


def _formats(folder: Path) -> dict[str, int]:
    record = record_of(folder)
    return record.head_formats() if record else {}


# --- its figures -----------------------------------------------------------------------------------------------------


def figures(model: Model, found: verdict.Measured, confidence: float) -> Measurement:
    """Return the figures of a head that was run; `confidence` is the least with which it went on drafting."""
    runs, forced = found.runs, found.forced
    assert runs is not None
    plain, mtp = runs.plain_rate_tok_s, runs.mtp_rate_tok_s
    return Measurement(
        acceptance=round(runs.acceptance, 4),
        drafted=runs.drafted,
        accepted=runs.accepted,
        tokens_per_pass=round(runs.tokens_per_pass, 4),
        plain_tokens_per_second=round(plain, 2),
        mtp_tokens_per_second=round(mtp, 2),
        speedup=round(mtp / plain, 3) if plain else None,
        greedy_equal=runs.first_divergence is None,
        first_divergence=runs.first_divergence,
        block_size=model.args.dspark_block_size if model.is_dspark else None,
        draft_depth=runs.depth,
        calibration=_calibration(runs.estimates()),
        passes=runs.passes,
        per_position=tuple(
            Position(n, d, a, round(a / d, 4) if d else None) for n, (d, a) in enumerate(runs.positions(), 1)
        ),
        per_prompt=tuple(map(_prompt, runs.runs)),
        teacher_forced=TeacherForced(
            forced.positions, round(forced.agreement, 4), round(forced.chance, 4), forced.divergence_nats
        ),
        wiring=_wiring(found.wiring),
        milliseconds=_times(runs),
        confidence=confidence,
    )


BINS = 10
"""Of the estimates of a DSpark head, equally wide from 0 to 1."""


def _calibration(estimates: list[tuple[float, bool]]) -> tuple[Bin, ...]:
    """Return mean estimate and observed acceptance of the drafts in each bin that has any."""
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(BINS)]
    for estimate, kept in estimates:
        bins[min(BINS - 1, int(estimate * BINS))].append((estimate, kept))
    return tuple(
        Bin(
            len(pairs),
            round(sum(e for e, _ in pairs) / len(pairs), 4),
            round(sum(k for _, k in pairs) / len(pairs), 4),
        )
        for pairs in bins
        if pairs
    )


def _rate(decoded: Decoded) -> float | None:
    return round(decoded.timed_tokens / decoded.seconds, 2) if decoded.seconds else None


def _prompt(run: PromptRun) -> PromptFacts:
    assert run.mtp is not None
    stats = run.mtp.stats
    return PromptFacts(
        prompt=run.prompt.name,
        prompt_tokens=len(run.prompt.ids),
        new_tokens=len(run.plain.tokens),
        drafted=stats.drafted,
        accepted=stats.accepted,
        acceptance=round(stats.acceptance, 4),
        tokens_per_pass=round(stats.tokens_per_pass, 4),
        plain_tokens_per_second=_rate(run.plain),
        mtp_tokens_per_second=_rate(run.mtp),
        greedy_equal=run.divergence is None,
    )


def _wiring(wiring: Wiring | None) -> WiringFacts:
    if wiring is None:
        return WiringFacts(False, 0, ())
    return WiringFacts(wiring.experts_comparable, wiring.tried, wiring.found)


def _times(runs: Runs) -> Milliseconds:
    drafting = [r.mtp.stats for r in runs.runs if r.mtp is not None]
    passes = max(1, sum(s.passes for s in drafting))
    plain = sum(r.plain.seconds for r in runs.runs) / max(1, sum(r.plain.timed_tokens for r in runs.runs))
    return Milliseconds(
        plain_pass=round(1e3 * plain, 3),
        verifying_pass=round(1e3 * sum(s.backbone_seconds for s in drafting) / passes, 3),
        drafting=round(1e3 * sum(s.head_seconds for s in drafting) / passes, 3),
        rest=round(1e3 * sum(s.other_seconds for s in drafting) / passes, 3),
    )
