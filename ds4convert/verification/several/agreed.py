"""`verify` by several processes that mlx.launch started: what they have to agree in, and what each adds."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds4convert.errors import UsageError
from ds4convert.verification.checks import Check
from ds4convert.verification.request import Outcome, Request

if TYPE_CHECKING:
    from ds4convert.evaluate.decode_runs import Compute, Prompt
    from ds4convert.inference.several.ranks import Agreement, Team


@dataclass(frozen=True)
class Plan:
    """What will be run, settled from small files before anything large is read."""

    prompts: list[Prompt]
    compute: Compute
    reference: Any
    vocab: int


def check(request: Request) -> None:
    """Raise `UsageError` for what one machine does by itself."""
    if request.layerwise or request.source is not None:
        raise UsageError(
            "--source and --layerwise are for one machine; processes that mlx.launch started hold one model together",
            hint="leave them out, or run the command without mlx.launch",
        )


def put_in(request: Request, plan: Plan | None, out: Outcome, agreed: Agreement) -> None:
    """Put in what all ranks have to have alike, and what the others have to know of this one."""
    from ds4convert.inference.several.ranks import alike

    options = dataclasses.replace(
        request, folder=Path(), drafter=None, prompts=None, reference=None, calibration=None, jobs=1
    )
    agreed.mine = alike(request.folder, request.drafter) | {"options": repr(options)}
    if plan is not None:
        reference = b"" if request.reference is None else request.reference.read_bytes()
        agreed.mine["prompts"] = _digest(repr([p.ids for p in plan.prompts]).encode())
        agreed.mine["reference"] = _digest(reference)
        agreed.each["compute"] = [plan.compute.dtype, plan.compute.dense]
    agreed.each["wrong"] = [[c.name, c.detail] for c in out.checks if not c.ok]


def settled(plan: Plan | None, out: Outcome, agreed: Agreement, ranks: Team) -> Plan | None:
    """Add what is wrong with the folders of other ranks; return the plan with the way to compute that all can go."""
    for n, wrong in enumerate(agreed.told("wrong")):
        if n != ranks.rank:
            out.checks += [Check(f"{name} (rank {n})", False, detail) for name, detail in wrong]
    if plan is None:
        return None
    ways = agreed.told("compute")
    dtype = "bfloat16" if any(way[0] == "bfloat16" for way in ways) else plan.compute.dtype
    return dataclasses.replace(
        plan, compute=dataclasses.replace(plan.compute, dtype=dtype, dense=all(way[1] for way in ways))
    )


def figures(out: Outcome) -> dict[str, str]:
    """Return what all ranks have to have measured alike."""
    run = out.facts.mtp.measured if out.facts.mtp is not None else None
    tokens = out.facts.decode.new_tokens if out.facts.decode is not None else 0
    accepted = (run.drafted, run.accepted, run.passes) if run is not None else ()
    differences = [c.max_abs_diff for c in out.facts.reference or ()]
    return {"the result": repr((tokens, accepted, differences))}


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
