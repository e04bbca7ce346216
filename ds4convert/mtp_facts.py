"""The figures of a run of `verify --mtp` under the keys of the command line contract, and more beside them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from ds4convert import manifest
from ds4convert.errors import InputError
from ds4convert.inspection import group_of
from ds4convert.types import JSON
from ds4convert.verdict import Measured

if TYPE_CHECKING:
    from ds4convert.inference.evaluate import Decoded, PromptRun, Runs
    from ds4convert.inference.wiring import Wiring

FIGURES = (
    "acceptance", "drafted", "accepted", "tokens_per_pass", "plain_tokens_per_second", "mtp_tokens_per_second",
    "speedup", "greedy_equal", "first_divergence",
)  # fmt: skip


def record_of(folder: Path) -> JSON:
    """Return the manifest, empty where there is none that can be trusted (a check of the files says so)."""
    try:
        return manifest.read(folder) or {}
    except InputError:
        return {}


def groups(folder: Path) -> list[JSON]:
    """Return per group of tensors, the head's behind the backbone's: name, bytes, tensors, formats."""
    out: dict[str, JSON] = {}
    for r in record_of(folder).get("tensors", []):
        name = group_of(str(r.get("part", "")), str(r.get("role", "unknown")))
        g = out.setdefault(name, {"name": name, "tensors": 0, "bytes": 0, "formats": []})
        g["tensors"] += 1
        g["bytes"] += r["bytes"]
        if r["format"] not in g["formats"]:
            g["formats"].append(r["format"])
    return sorted(out.values(), key=lambda g: g["name"].startswith("mtp."))


def head_formats(folder: Path) -> JSON:
    """Return the bytes of the head per stored format, most bytes first, from the manifest."""
    out: dict[str, int] = {}
    for r in record_of(folder).get("tensors", []):
        if r.get("part") == "mtp":
            out[r["format"]] = out.get(r["format"], 0) + r["bytes"]
    return dict(sorted(out.items(), key=lambda x: -x[1]))


def without_figures(kind: str, folder: Path, present: bool, verdict: str) -> JSON:
    """Return the `mtp` object of a head that was not run: every figure null."""
    formats = head_formats(folder)
    first = {"present": present, "kind": kind, "format": "+".join(formats) or None}
    return {**first, **dict.fromkeys(FIGURES), "verdict": verdict, "formats": formats}


def mtp_facts(folder: Path, depth: int, found: Measured, verdict: str) -> JSON:
    """Return the `mtp` object of a head that was measured."""
    runs, forced = found.runs, found.forced
    assert runs is not None
    facts = without_figures("classic", folder, True, verdict)
    plain, mtp = runs.plain_rate_tok_s, runs.mtp_rate_tok_s
    facts |= {
        "acceptance": round(runs.acceptance, 4),
        "drafted": runs.drafted,
        "accepted": runs.accepted,
        "tokens_per_pass": round(runs.tokens_per_pass, 4),
        "plain_tokens_per_second": round(plain, 2),
        "mtp_tokens_per_second": round(mtp, 2),
        "speedup": round(mtp / plain, 3) if plain else None,
        "greedy_equal": runs.first_divergence is None,
        "first_divergence": dataclasses.asdict(runs.first_divergence) if runs.first_divergence else None,
        "draft_depth": depth,
        "passes": runs.passes,
        "per_position": [
            {"position": n, "drafted": d, "accepted": a, "acceptance": round(a / d, 4) if d else None}
            for n, (d, a) in enumerate(runs.positions(), 1)
        ],
        "per_prompt": [_prompt_facts(r) for r in runs.runs],
        "teacher_forced": {
            "positions": forced.positions,
            "agreement": round(forced.agreement, 4),
            "chance": round(forced.chance, 4),
            "kl_nats": forced.divergence_nats,
        },
        "wiring": _wiring_facts(found.wiring),
        "milliseconds": _times(runs),
    }
    return facts


def _rate(decoded: Decoded) -> float | None:
    return round(decoded.timed_tokens / decoded.seconds, 2) if decoded.seconds else None


def _prompt_facts(run: PromptRun) -> JSON:
    assert run.mtp is not None
    stats = run.mtp.stats
    return {
        "prompt": run.prompt.name,
        "prompt_tokens": len(run.prompt.ids),
        "new_tokens": len(run.plain.tokens),
        "drafted": stats.drafted,
        "accepted": stats.accepted,
        "acceptance": round(stats.acceptance, 4),
        "tokens_per_pass": round(stats.tokens_per_pass, 4),
        "plain_tokens_per_second": _rate(run.plain),
        "mtp_tokens_per_second": _rate(run.mtp),
        "greedy_equal": run.divergence is None,
    }


def _wiring_facts(wiring: Wiring | None) -> JSON:
    if wiring is None:
        return {"judged": False, "tried": 0, "found": []}
    return {
        "judged": wiring.experts_comparable,
        "tried": wiring.tried,
        "found": [dataclasses.asdict(x) for x in wiring.found],
    }


def _times(runs: Runs) -> JSON:
    """Return milliseconds of a plain pass, of a pass that verifies drafts, of its drafting, and of the loop's rest."""
    drafting = [r.mtp.stats for r in runs.runs if r.mtp is not None]
    passes = max(1, sum(s.passes for s in drafting))
    plain = sum(r.plain.seconds for r in runs.runs) / max(1, sum(r.plain.timed_tokens for r in runs.runs))
    return {
        "plain_pass": round(1e3 * plain, 3),
        "verifying_pass": round(1e3 * sum(s.backbone_seconds for s in drafting) / passes, 3),
        "drafting": round(1e3 * sum(s.head_seconds for s in drafting) / passes, 3),
        "rest": round(1e3 * sum(s.other_seconds for s in drafting) / passes, 3),
    }
