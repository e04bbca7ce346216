"""The demo: the whole chain on the trained checkpoint that comes with the package, told step by step."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path

from ds4convert.api import comparing, conversion, generating, opening, verifying
from ds4convert.api.verifying import VerifyOptions
from ds4convert.checkpoint.types import JSON
from ds4convert.demo import embedded
from ds4convert.errors import OutputError
from ds4convert.files import Disk, disk_errors
from ds4convert.report import text
from ds4convert.storage.safe_open import names_in
from ds4convert.words.figures import size
from ds4convert.words.terminal import clean

SOURCE, RESULT, PAGE = "source", "mlx", "report.html"
DSPARK_SOURCE, DSPARK_RESULT = "source-dspark", "mlx-dspark"
SOURCES = {SOURCE: embedded.CLASSIC, DSPARK_SOURCE: embedded.DSPARK}
PROMPT = "Now after many days the word of the LORD came"
"""In the manner of the text that the checkpoint was trained on, but not in it."""

NEW_TOKENS, MORE_TOKENS = 32, 80
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
    facts["copied"] = _copy(source, embedded.CLASSIC)
    _show(say, f"ds4convert inspect {source}", "what is in it, from the headers alone")
    found = opening.look(source)
    facts["inspect"] = found.as_json()
    say(text.inspection(found.facts, clean(facts["inspect"])))
    _show(say, f"ds4convert quantize {source} {result} --keep-mtp", "to MLX, value for value, head included")
    facts["quantize"] = conversion.convert(source, result).as_json()
    say(f"{size(facts['quantize']['output_bytes'])} written, head {facts['quantize']['head']}")
    facts["verify"] = _verify(source, result, folder / PAGE, say)
    _show(say, f"ds4convert diff {source} {result}", "the same question, asked from outside")
    facts["diff"] = comparing.diff(source, result).as_json()
    say(text.differences(facts["diff"]))
    facts["decode"] = _decode(result, say)
    facts["dspark"] = _dspark(folder, say)
    facts["heads"] = [_figures(f["verify"]["mtp"]) for f in (facts, facts["dspark"])]
    say(_side_by_side(facts["heads"]))
    unlike = facts["diff"]["changed"] + facts["diff"]["only_a"] + facts["diff"]["only_b"]
    good = facts["verify"]["ok"] and facts["dspark"]["verify"]["ok"]
    return facts | {"ok": good and not unlike and facts["decode"]["ok"]}


def _dspark(folder: Path, say: Say) -> JSON:
    """Convert the same backbone with its DSpark head, and decode the fixed prompts with and without it."""
    source, result = folder / DSPARK_SOURCE, folder / DSPARK_RESULT
    facts: JSON = {"copied": _copy(source, embedded.DSPARK)}
    _show(say, f"ds4convert quantize {source} {result}", "the same backbone with the newer kind of head, DSpark")
    facts["quantize"] = conversion.convert(source, result).as_json()
    say(f"{size(facts['quantize']['output_bytes'])} written, head {facts['quantize']['head']}")
    prompts = _prompts()
    command = f"ds4convert verify {result} --mtp --max-tokens {NEW_TOKENS} --prompts {shlex.quote(str(prompts))}"
    _show(say, command, "a block of drafts at once, verified by the backbone")
    options = VerifyOptions(mtp=True, max_tokens=NEW_TOKENS, dtype="float32", prompts=prompts)
    facts["verify"] = verifying.verify(result, options).as_json()
    say(text.verification(clean(facts["verify"])))
    return facts


def _prompts() -> Path:
    """Return the file of the demo's prompts: two of those that `verify` has, so that a demo stays short."""
    return Path(str(resources.files("ds4convert.manifests") / "prompts" / "demo.txt"))


FIGURES = (
    "kind", "draft_depth", "acceptance_by_position", "tokens_per_pass",
    "plain_tokens_per_second", "mtp_tokens_per_second", "speedup", "greedy_equal",
)  # fmt: skip
"""What is shown of each head."""


def _figures(mtp: JSON) -> JSON:
    return {name: mtp[name] for name in FIGURES}


def _side_by_side(heads: Sequence[JSON]) -> str:
    """Return the figures of the heads as a table, one head a line."""
    rows = []
    for head in heads:
        by_position = " ".join(f"{share:.0%}" if share is not None else "-" for share in head["acceptance_by_position"])
        rows.append(
            f"{head['kind']:8}  {head['draft_depth']:6}  {head['tokens_per_pass']:15.2f}  "
            f"{head['plain_tokens_per_second']:10.1f}  {head['mtp_tokens_per_second']:8.1f}  "
            f"{head['speedup']:7.2f}  {by_position}"
        )
    title = "head      drafts  tokens per pass  plain tok/s  tok/s   against  accepted by position"
    return "\n".join(["\nBoth heads, over one backbone, on the same prompts:\n", title, *rows])


def _verify(source: Path, result: Path, page: Path, say: Say) -> JSON:
    """Prove the values, decode the fixed prompts with and without the head, and write the page."""
    prompts = _prompts()
    command = f"ds4convert verify {result} --source {source} --mtp --max-tokens {NEW_TOKENS} --report {page}"
    command += f" --prompts {shlex.quote(str(prompts))}"
    _show(say, command, "the proof, tensor by tensor, and the head at work")
    options = VerifyOptions(
        source=source, mtp=True, max_tokens=NEW_TOKENS, dtype="float32", report=page, prompts=prompts
    )
    facts = verifying.verify(result, options).as_json()
    say(text.verification(clean(facts)))
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
    chosen = {"chat": False, "mtp": mtp, "temp": temp, "seed": seed, "dtype": "float32", "max_tokens": MORE_TOKENS}
    options = "".join(["" if mtp else " --no-mtp", f" --temp {temp} --seed {seed}" if temp else ""])
    options += f" --dtype float32 --max-tokens {MORE_TOKENS}"
    _show(say, f"ds4convert generate {result} --raw --prompt {shlex.quote(PROMPT)}{options}", why)
    running = generating.begin(result, PROMPT, None, lambda message: None, **chosen)
    say("".join(running.pieces()))
    facts = running.facts()
    say(text.generation(facts))
    return facts


def _check_place(folder: Path) -> None:
    """Raise `OutputError` unless the folder is new or holds only what a demo writes."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: is a file", hint="name a folder: ds4convert demo DIR")
    names = set(names_in(folder))
    if names - {*SOURCES, RESULT, DSPARK_RESULT, PAGE} or (names and SOURCE not in names):
        raise OutputError(
            f"{folder}: is not empty and no earlier demo", hint="name another folder: ds4convert demo DIR"
        )
    if any((folder / name).is_symlink() for name in (*SOURCES, RESULT, DSPARK_RESULT)):
        raise OutputError(
            f"{folder}: holds links in the place of a demo's folders", hint="name another: ds4convert demo DIR"
        )
    for source, kind in SOURCES.items():
        kept = dict(embedded.files(kind))
        for path in [folder / source / n for n in names_in(folder / source)]:
            partial = path.name.endswith(".partial")
            if not partial and (not path.is_file() or kept.get(path.name) != path.read_bytes()):
                raise OutputError(f"{path}: is not the demo's", hint="name another folder: ds4convert demo DIR")


def _copy(source: Path, kind: str) -> JSON:
    """Write the files of the embedded checkpoint that are not there yet; return their number and all bytes."""
    disk = Disk()
    count = total = 0
    with disk_errors("writing", source):
        disk.make_folder(source)
        for name, data in embedded.files(kind):
            total += len(data)
            if not (source / name).exists():
                disk.write_file(source / name, data)
                count += 1
    return {"path": str(source), "bytes": total, "files_written": count}


def _show(say: Say, command: str, why: str) -> None:
    say(f"\n$ {command}   # {why}\n")
