"""The demo: the whole chain on a checkpoint small enough for any machine, told step by step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ds4convert import compare, convert, inspection, report, summary, synth, verify
from ds4convert import plan as plans
from ds4convert.config import named_config
from ds4convert.errors import OutputError
from ds4convert.layouts import layout_of
from ds4convert.recipes import recipe_of
from ds4convert.types import JSON

SOURCE, RESULT = "source", "mlx"


def run(folder: Path, say: Callable[[str], None]) -> JSON:
    """Run the chain in `folder` (new, or left by an earlier demo) and return what each step found.

    Raises `OutputError` when the folder holds something else.
    """
    source, result = folder / SOURCE, folder / RESULT
    if folder.exists() and {p.name for p in folder.iterdir()} - {SOURCE, RESULT}:
        raise OutputError(f"{folder}: is not empty and no earlier demo; name another folder: ds4convert demo DIR")
    facts: JSON = {"folder": str(folder)}
    if not (source / "config.json").exists():
        _show(say, f"ds4convert synth {source} --config tiny", "a tiny checkpoint in the official format")
        raw: dict[str, Any] = json.loads(named_config("tiny") or b"{}")
        facts["synth"] = {"bytes": synth.write(raw, source)}
    _show(say, f"ds4convert inspect {source}", "what is in it, from the headers alone")
    found = inspection.inspect(source)
    say(report.inspection(found))
    facts["inspect"] = found.as_json()
    _show(say, f"ds4convert quantize {source} {result} --keep-mtp", "to MLX, value for value, head included")
    opened = convert.open_source(source)
    made = convert.make_plan(opened, plans.Options(recipe_of("native"), layout_of("inline")))
    outcome = convert.run(opened, made, result)
    facts["quantize"] = summary.summarise(made, result, 2) | {"manifest": str(outcome.manifest)}
    say(f"{report.size(facts['quantize']['output_bytes'])} written, head {made.head_kind}")
    _show(say, f"ds4convert verify {result} --source {source}", "the proof, tensor by tensor")
    checks = [*verify.structure(result), *verify.against_source(result, source)]
    say(report.checks(checks))
    facts["verify"] = verify.as_json(checks)
    _show(say, f"ds4convert diff {source} {result}", "the same question, asked from outside")
    views = inspection.view_of(source), inspection.view_of(result)
    facts["diff"] = compare.summarise(compare.compare_views(*views))
    say(report.differences(facts["diff"]))
    unlike = facts["diff"]["changed"] + facts["diff"]["only_a"] + facts["diff"]["only_b"]
    return facts | {"ok": facts["verify"]["ok"] and not unlike}


def _show(say: Callable[[str], None], command: str, why: str) -> None:
    say(f"\n$ {command}   # {why}\n")
