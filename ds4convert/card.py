"""The model card of a converted folder: what it is, how it was made, what it needs, how to load it.

A pure function of the manifest and of what was measured. What a user writes below the card's last line is kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ds4convert import losses
from ds4convert.inspection import group_of
from ds4convert.layouts import Layout
from ds4convert.report import size
from ds4convert.types import JSON

CARD_NAME = "README.md"
MARK = "<!-- ds4convert publish writes all above this line anew; what you write below it is kept -->"
HOME = "ds4convert"


@dataclass(frozen=True)
class Facts:
    """What a card tells beside the manifest `record` ({} and no layout: of a folder without one).

    `measured` is the record of `verify --mtp` or None; `problems` what verification found, where that was overridden;
    `licence` the fields of the front matter that say it; `bytes` the size of all files.
    """

    repo: str
    record: JSON
    layout: Layout | None
    checks: tuple[str, ...]
    problems: tuple[str, ...]
    measured: JSON | None
    licence: Mapping[str, str]
    bytes: int


def write(facts: Facts, before: str = "") -> str:
    """Return the card; `before` is the one that it replaces, whose text below the mark is kept."""
    parts = [_front_matter(facts), _title(facts)]
    if facts.layout is not None:
        parts += [_formats(facts), _head(facts), _use(facts, facts.layout), _made(facts)]
    parts.append(_verification(facts))
    own = before.partition(MARK)[2].strip("\n") if MARK in before else ""
    return "\n\n".join(p for p in parts if p) + f"\n\n{MARK}\n" + (f"\n{own}\n" if own else "")


def is_ours(text: str) -> bool:
    """Return whether a README.md was written by this module."""
    return MARK in text


def _base(facts: Facts) -> tuple[str, str]:
    source = facts.record.get("source", {})
    chain = source.get("chain", [])
    if "repo" not in source and chain:  # a conversion of a conversion: what the first one came from
        source = chain[0].get("source", {})
    return str(source.get("repo", "")), str(source.get("revision", ""))


def _front_matter(facts: Facts) -> str:
    repo, _ = _base(facts)
    rows = ["library_name: mlx", "pipeline_tag: text-generation"]
    rows += [f"{key}: {value}" for key, value in facts.licence.items()]
    rows += [f"base_model: {repo}", "base_model_relation: quantized"] if repo else []
    family = [facts.record["family"]] if facts.record else []
    mtp = ["mtp", "speculative-decoding"] if _has_head(facts) else []
    tags = ["mlx", *family, *mtp, "ds4convert"]
    return "\n".join(["---", *rows, "tags:", *(f"- {t}" for t in tags), "---"])


def _has_head(facts: Facts) -> bool:
    return any(r.get("part") == "mtp" for r in facts.record.get("tensors", []))


def _native_head(record: JSON) -> bool:
    """Return whether the head is as the official checkpoint has it, or in BF16."""
    formats = {v for k, v in record.get("formats", {}).items() if k.startswith("mtp")}
    return formats <= {"native", "bf16"}


def _title(facts: Facts) -> str:
    repo, revision = _base(facts)
    at = f" at commit `{revision}`" if revision else ""
    of = f"[{repo}](https://huggingface.co/{repo}){at}" if repo else "a checkpoint whose place on the Hub is not known"
    head = "with its multi-token-prediction (MTP) head" if _has_head(facts) else "without an MTP head"
    version = facts.record.get("tool", {}).get("version", "?")
    if not facts.record:
        return f"# {facts.repo.rpartition('/')[2]}\n\nAn MLX folder of {size(facts.bytes)} without a manifest."
    warning = "\n\n**This folder did not pass its checks; see Verification below.**" if facts.problems else ""
    return (
        f"# {facts.repo.rpartition('/')[2]}\n\nAn MLX conversion of {of}, {head}, made by {HOME} {version}: "
        f"{size(facts.bytes)}, recipe `{facts.record['recipe']}`, layout `{facts.record['layout']}`.{warning}"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(c).replace("|", "\\|") for c in line) + " |" for line in lines)


def groups(record: JSON) -> list[tuple[str, str, int, int]]:
    """Return (group, formats, tensors, bytes), the head's behind the backbone's."""
    found: dict[str, tuple[dict[str, int], int, int]] = {}
    for r in record["tensors"]:
        name = group_of(str(r.get("part", "")), str(r.get("role", "unknown")))
        formats, count, total = found.setdefault(name, ({}, 0, 0))
        formats[r["format"]] = formats.get(r["format"], 0) + r["bytes"]
        found[name] = formats, count + 1, total + r["bytes"]
    rows = [(n, ", ".join(sorted(f, key=lambda k: -f[k])), c, t) for n, (f, c, t) in found.items()]
    return sorted(rows, key=lambda row: row[0].startswith("mtp."))


def _formats(facts: Facts) -> str:
    lost = {row["group"]: row for row in losses.by_group(losses.by_layer(facts.record))}
    rows = []
    for name, formats, count, total in groups(facts.record):
        row = lost.get(name)
        rows.append([name, formats, count, size(total), f"{row['relative_square']:.2e}" if row else "exact"])
    note = "Error: squared error relative to the source's values, by weight; `exact` is value for value."
    return f"## Formats\n\n{table(['group', 'format', 'tensors', 'size', 'error'], rows)}\n\n{note}"


def _head(facts: Facts) -> str:
    if not _has_head(facts):
        reasons = [x["why"] for x in facts.record["left_out"] if x["tensor"].startswith("mtp.")]
        why = reasons[0] if reasons else "the source has none"
        return f"## MTP\n\nNo head: {why}."
    head = facts.record.get("head", {})
    stored = [formats for name, formats, _, _ in groups(facts.record) if name == "mtp.experts"]
    formats = " and ".join(f"`{f}`" for f in stored) or "as listed"
    text = f"## MTP\n\nKind: {head.get('kind', '?')}, {head.get('tensors', '?')} tensors, experts in {formats}."
    if facts.measured is None:
        return text + " Acceptance was not measured before upload (`ds4convert verify DIR --mtp` does)."
    mtp = facts.measured["mtp"]
    if mtp.get("acceptance") is None:
        return f"{text} {mtp['verdict']}"
    rows = [
        ["drafts accepted", f"{mtp['acceptance']:.1%} of {mtp['drafted']} (draft depth {mtp['draft_depth']})"],
        ["tokens per backbone pass", _number(mtp["tokens_per_pass"])],
        ["tokens/s with the head, without", f"{_number(mtp['mtp_tokens_per_second'])}, "
                                            f"{_number(mtp['plain_tokens_per_second'])} ({facts.measured['device']})"],
        ["same greedy text", "yes" if mtp["greedy_equal"] else "no, at a near tie"],
    ]  # fmt: skip
    return f"{text} Measured by `ds4convert verify --mtp`:\n\n{table(['what', 'measured'], rows)}\n\n{mtp['verdict']}"


def _number(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, int | float) and math.isfinite(value) else "not measured"


def _use(facts: Facts, layout: Layout) -> str:
    repo, place = facts.repo, facts.repo.rpartition("/")[2]
    lines = [f"hf download {repo} --local-dir {place}"]
    mtp = " --mtp" if _has_head(facts) else ""
    lines += [f"ds4convert generate {place} --prompt Hello{mtp}", f"ds4convert serve {place}{mtp}"]
    lines += [h.command.replace("DIR", place) for h in layout.hosts if h.command]
    rows = [["ds4convert", facts.record.get("tool", {}).get("version", "?"), "yes" if mtp else "no head here"]]
    for host in layout.hosts:
        uses = host.mtp or "backbone only"
        if host.native_head and not _native_head(facts.record):
            uses = "no: it reads a head at the official precision alone"
        rows.append([host.name, host.versions, uses if mtp else "no head here"])
    shell = "\n".join(lines)
    head = ["program", "version", "uses the head"]
    return f"## Use\n\n```sh\n{shell}\n```\n\n{table(head, rows).replace('DIR', place)}"


def _made(facts: Facts) -> str:
    repo, revision = _base(facts)
    record = facts.record
    formats = record.get("formats", {})
    told = ", ".join(f"{k} `{v}`" for k, v in sorted(formats.items()))
    source = f"`{repo}` at `{revision}`" if repo else f"{len(record['source'].get('files', []))} source files"
    left = [f"- `{x['tensor']}`: {x['why']}" for x in record["left_out"][:20]]
    more = len(record["left_out"]) - len(left)
    chain = record["source"].get("chain", [])
    text = [f"## How it was made\n\nFrom {source}; recipe `{record['recipe']}`{f' ({told})' if told else ''}."]
    if chain:
        text.append(f"The source had been converted {len(chain)} time(s) before; the manifest has the whole chain.")
    if left:
        text.append(
            "Left out:\n\n" + "\n".join(left) + (f"\n- and {more} more, listed in the manifest" if more else "")
        )
    return "\n\n".join(text)


def _verification(facts: Facts) -> str:
    if facts.problems:
        bad = "\n".join(f"- {p}" for p in facts.problems)
        return f"## Verification\n\n**Published with `--force` although these checks failed:**\n\n{bad}"
    checks = ", ".join(facts.checks)
    return (
        f"## Verification\n\nBefore upload `ds4convert verify` passed: {checks}. After it, size and sha256 of every "
        "file here were compared with `ds4convert_manifest.json`, which tells where every tensor came from and how it "
        "is stored. To repeat that on a download: `ds4convert verify DIR`."
    )
