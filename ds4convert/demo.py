"""The demo: the whole chain on the trained checkpoint that comes with the package, told step by step."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path

from ds4convert import compare, convert, generation, html_report, inspection, mtp_check, report, summary
from ds4convert import plan as plans
from ds4convert.errors import OutputError
from ds4convert.files import Disk, disk_errors
from ds4convert.layouts import layout_of
from ds4convert.recipes import recipe_of
from ds4convert.types import JSON

SOURCE, RESULT, PAGE = "source", "mlx", "report.html"
PROMPT = "Now after many days the word of the LORD came"
"""In the manner of the text that the checkpoint was trained on, but not in it."""

NEW_TOKENS = 32
"""Per prompt: enough to see the head work, in a few seconds."""

Say = Callable[[str], None]


def run(folder: Path, say: Say) -> JSON:
    """Run the chain in `folder` (new, or left by an earlier demo) and return what each step found.

    Raises `OutputError` when the folder holds something else; nothing that is there is ever replaced, but for the page.
    """
    source, result = folder / SOURCE, folder / RESULT
    _check_place(folder)
    facts: JSON = {"folder": str(folder)}
    say("A small DeepSeek-V4, trained on the King James Bible: 4 layers and the MTP head, in the official format.")
    facts["copied"] = _copy(source)
    _show(say, f"ds4convert inspect {source}", "what is in it, from the headers alone")
    found = inspection.inspect(source)
    say(report.inspection(found))
    facts["inspect"] = found.as_json()
    _show(say, f"ds4convert quantize {source} {result} --keep-mtp", "to MLX, value for value, head included")
    facts["quantize"] = _quantize(source, result)
    say(f"{report.size(facts['quantize']['output_bytes'])} written, head {facts['quantize']['head']}")
    facts["verify"] = _verify(source, result, folder / PAGE, say)
    _show(say, f"ds4convert diff {source} {result}", "the same question, asked from outside")
    views = inspection.view_of(source), inspection.view_of(result)
    facts["diff"] = compare.summarise(compare.compare_views(*views))
    say(report.differences(facts["diff"]))
    facts["decode"] = _decode(result, say)
    unlike = facts["diff"]["changed"] + facts["diff"]["only_a"] + facts["diff"]["only_b"]
    return facts | {"ok": facts["verify"]["ok"] and not unlike and facts["decode"]["ok"]}


def _verify(source: Path, result: Path, page: Path, say: Say) -> JSON:
    """Prove the values, decode the fixed prompts with and without the head, and write the page."""
    command = f"ds4convert verify {result} --source {source} --mtp --max-tokens {NEW_TOKENS} --report {page}"
    _show(say, command, "the proof, tensor by tensor, and the head at work")
    request = mtp_check.Request(
        result, "decode", mtp=True, source=source, max_tokens=NEW_TOKENS, dtype="float32", wants_report=True
    )
    outcome = mtp_check.run(request, say)
    facts = outcome.as_json()
    html_report.write(page, result, facts)
    say(report.verification(outcome.checks, outcome.facts))
    return facts


def _decode(result: Path, say: Say) -> JSON:
    """Decode with and without the head; `ok` if the greedy texts are equal and the head is of use."""
    plain = _generate(result, say, "the text, without the head")
    mtp = _generate(result, say, "the same text, drafted by the head and verified by the backbone", mtp=True)
    warm = _generate(result, say, "drawn instead of greedy; the drafts keep the distribution", mtp=True, temp=0.7)
    equal = plain["tokens"] == mtp["tokens"]
    say(
        f"\nThe greedy texts are {'equal, token by token' if equal else 'DIFFERENT'}. Acceptance "
        f"{mtp['acceptance']:.1%}: {mtp['tokens_per_pass']:.2f} tokens per backbone pass instead of 1."
    )
    return {"ok": equal and mtp["accepted"] > 0, "greedy_equal": equal, "plain": plain, "mtp": mtp, "sampled": warm}


def _generate(result: Path, say: Say, why: str, mtp: bool = False, temp: float = 0.0) -> JSON:
    """Continue the demo's prompt and show the text and the figures."""
    seed = 1 if temp else None
    request = generation.Request(PROMPT, chat=False, mtp=mtp, temp=temp, seed=seed, dtype="float32", max_tokens=80)
    options = "".join([" --mtp" if mtp else "", f" --temp {temp} --seed {seed}" if temp else ""])
    options += f" --dtype float32 --max-tokens {request.max_tokens}"
    _show(say, f"ds4convert generate {result} --raw --prompt {shlex.quote(PROMPT)}{options}", why)
    running = generation.prepare(result, request, say)
    say("".join(running.pieces()))
    facts = running.facts()
    say(report.generation(facts))
    return facts


def _quantize(source: Path, result: Path) -> JSON:
    opened = convert.open_source(source)
    made = convert.make_plan(opened, plans.Options(recipe_of("native"), layout_of("inline")))
    outcome = convert.run(opened, made, result)
    return summary.summarise(made, result, 2) | {"manifest": str(outcome.manifest)}


def _check_place(folder: Path) -> None:
    """Raise `OutputError` unless the folder is new or holds only what a demo writes."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: is a file; name a folder: ds4convert demo DIR")
    others = {p.name for p in folder.iterdir()} - {SOURCE, RESULT, PAGE} if folder.exists() else set()
    if others:
        raise OutputError(f"{folder}: is not empty and no earlier demo; name another folder: ds4convert demo DIR")
    kept = dict(_embedded())
    source = folder / SOURCE
    for path in sorted(source.iterdir()) if source.is_dir() else []:
        if not path.name.endswith(".partial") and kept.get(path.name) != path.read_bytes():
            raise OutputError(f"{path}: is not the demo's; name another folder: ds4convert demo DIR")


def _embedded() -> Iterator[tuple[str, bytes]]:
    """Yield name and bytes of each file of the checkpoint that comes with the package; its notes on itself are left."""
    for entry in (resources.files("ds4convert.manifests") / "demo").iterdir():
        if entry.is_file() and not entry.name.endswith((".md", ".py")):
            yield entry.name, entry.read_bytes()


def _copy(source: Path) -> JSON:
    """Write the files of the embedded checkpoint that are not there yet; return their number and all bytes."""
    disk = Disk()
    count = total = 0
    with disk_errors("writing", source):
        disk.make_folder(source)
        for name, data in _embedded():
            total += len(data)
            if not (source / name).exists():
                disk.write_file(source / name, data)
                count += 1
    return {"path": str(source), "bytes": total, "files_written": count}


def _show(say: Say, command: str, why: str) -> None:
    say(f"\n$ {command}   # {why}\n")
