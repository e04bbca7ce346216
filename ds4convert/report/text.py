"""Every text for people: tables and sentences from the same facts that `--json` prints. Computes nothing new."""

from __future__ import annotations

from collections.abc import Sequence

from ds4convert.checkpoint.types import JSON, Finding, LeftOut
from ds4convert.converted import grouping, rounding_losses
from ds4convert.converted.inspection import Inspection
from ds4convert.converted.rounding_losses import LayerLoss
from ds4convert.planning.recipes import said
from ds4convert.words import macs
from ds4convert.words.figures import duration, size, table
from ds4convert.words.terminal import line

_KINDS = {
    "official": "official format",
    "mlx": "MLX folder",
    "config": "from the config alone",
    "plain": "tensors",
}


def inspection(found: Inspection, facts: JSON) -> str:
    """Return the text of `inspect`; `facts` are those of `found` under the keys of the contract."""
    head = facts["mtp"]
    lines = [
        f"{found.family or 'unknown family'}, {_KINDS[found.format]}: {len(found.rows):,} tensors, {size(found.size)}"
    ]
    if found.bits_per_weight:
        lines[0] += f", {found.bits_per_weight:.3f} bits per weight"
    lines.append(
        f"MTP head: {head['kind']}"
        + (f", {head['tensors']:,} tensors, {size(head['bytes'])}" if head["tensors"] else "")
    )
    if found.note:
        lines.append(line(found.note))
    rows = [(g["name"], f"{g['tensors']:,}", size(g["bytes"]), " ".join(g["dtypes"])) for g in facts["groups"]]
    lines += ["", table(("group", "tensors", "bytes", "dtypes"), rows)]
    lines += lost(found.losses())
    if found.problems:
        told = list(grouping.findings(found.problems))
        lines += ["", f"{len(found.problems)} problems:"] + [f"  {line(p)}" for p in told[:20]]
        if len(told) > 20:
            lines.append(f"  and {len(told) - 20} more kinds (all with --json)")
    elif found.format in {"official", "mlx"}:
        lines += ["", "Complete: nothing missing, extra or misshapen."]
    lines += [f"Left out: {line(text)}" for text in grouping.left_out(found.left_out)]
    return "\n".join(lines)


def lost(rows: Sequence[LayerLoss]) -> list[str]:
    """Return the lines of a table of what rounding cost each group; none where nothing was rounded."""
    if not rows:
        return []
    cells = [
        (
            line(g.group),
            line(" ".join(g.formats)),
            f"{g.bits_per_weight:.2f}",
            f"{g.relative_square:.4%}",
            f"{g.worst:.4%}" + ("" if g.worst_layer is None else f" in layer {g.worst_layer}"),
            f"{g.max_abs:.3g}",
        )
        for g in rounding_losses.by_group(rows)
    ]
    head = ("matrices", "formats", "bits", "squared error", "worst", "largest error")
    return ["", "What rounding cost, relative to the squared values of the source:", table(head, cells)]


def tensors(rows: Sequence[JSON]) -> str:
    """Return the text of `inspect --tensors`."""
    cells = [
        (r["name"], r["dtype"], "x".join(map(str, r["shape"])) or "scalar", size(r["bytes"]), r["file"]) for r in rows
    ]
    return table(("tensor", "dtype", "shape", "bytes", "file"), cells)


def plan(facts: JSON) -> str:
    """Return the text of `plan`."""
    rows = [(g["name"], " ".join(g["formats"]), f"{g['tensors']:,}", size(g["bytes"])) for g in facts["groups"]]
    fits = ", ".join(k for k, v in facts["fits_in_ram"].items() if v) or "none of the usual sizes"
    short = "" if facts["free_bytes"] >= facts["output_bytes"] else "   NOT ENOUGH"
    lines = [
        f"{facts['family']}, head {facts['head']}; recipe {facts['recipe']}, layout {facts['layout']}",
        "",
        table(("group", "format", "tensors", "bytes"), rows),
        "",
        f"output     {size(facts['output_bytes'])}, {facts['output_tensors']:,} tensors in "
        f"{facts['output_shards']} files, {facts['bits_per_weight']:.3f} bits per weight",
        f"disk       {size(facts['free_bytes'])} free{short}",
        *_over(facts),
        *_mapped(facts),
        f"memory     {size(facts['peak_memory_bytes'])} while converting{_of_workers(facts)}",
        f"time       about {duration(facts['seconds_estimate'])} (disk: 350 MB/s; rounding: as in a trial now)",
        f"weights alone fit in what Metal may use, by default, of a Mac with: {fits}",
        f"plan       {facts['plan']}",
    ]
    if "fit" in facts:
        lines += ["", fitted(facts["fit"])]
    told = list(grouping.left_out(LeftOut(x["tensor"], x["why"]) for x in facts["left_out"]))
    lines += [f"left out   {line(text)}" for text in told[:10]]
    if len(told) > 10:
        lines.append(f"left out   and for {len(told) - 10:,} more reasons (all with --json)")
    lines += _files_left_out(facts["files_left_out"])
    return "\n".join(lines + (parted(facts) if "parts" in facts else []))


def _of_workers(facts: JSON) -> str:
    """Return what of the memory the workers take that round."""
    if not facts["workers"]:
        return ""
    return f", {size(facts['worker_bytes'])} of it for each of {facts['workers']} workers (--cores)"


def _over(facts: JSON) -> list[str]:
    """Return the line on tensors that are larger than a shard was to be; none where there are none."""
    over = facts.get("over_shard_size", [])
    if not over:
        return []
    largest = max(over, key=lambda o: int(o["bytes"]))
    return [line(f"shards     {len(over)} larger than --max-shard-size: a tensor cannot be split, and "
                 f"{largest['tensor']} alone has {size(largest['bytes'])}")]  # fmt: skip


def _mapped(facts: JSON) -> list[str]:
    """Return the line on tables that stay on the disk, where there are any."""
    if not facts.get("mapped_bytes"):
        return []
    held = size(facts["mapped_bytes"])
    return [f"mapped     {held} of tables, of which hosts can read single rows from the disk: not counted as memory"]


def _files_left_out(rows: list[JSON]) -> list[str]:
    """Return a line per file left out; copies of tensors that another file supersedes are one line per reason."""
    by_reason: dict[str, list[str]] = {}
    for x in rows:
        by_reason.setdefault(x["why"], []).append(x["file"])
    lines: list[str] = []
    for why, names in by_reason.items():
        if why.startswith(("superseded", "not in the index")) and len(names) > 1:
            lines.append(line(f"left out   {names[0]} and {len(names) - 1:,} more: {why}"))
        else:
            lines += [line(f"left out   {name}: {why}") for name in names]
    return lines


def fitted(fit: JSON) -> str:
    """Return the table of what `--fit` chose, and what other sizes would give."""
    rows = [
        (
            said(r["role"]),
            r["layers"],
            r["format"],
            f"{r['bits_per_weight']:.2f}",
            size(r["bytes"]),
            f"{r['error']:.3%}",
        )
        for r in fit["table"]
    ]
    others = [(_mac(o), size(o["target_bytes"]), *_other(o)) for o in fit["other_sizes"]]
    return "\n".join(
        [
            table(("role", "layers", "format", "bits", "bytes", "error"), rows),
            "",
            f"fit        {size(fit['target_bytes'])}: {size(fit['weights_bytes'])} weights, {size(fit['cache_bytes'])} "
            f"state for {fit['context']:,} tokens, {size(fit['working_bytes'])} working set",
            f"error      {fit['total_error']:.3%} of the squares a token meets; no choice of this size has "
            f"less than {fit['total_error'] - fit['gap']:.3%}",
            "",
            table(("other size", "for Metal", "bits", "weights", "error"), others),
            *(["", macs.said(fit["mac_bytes"])] if "mac_bytes" in fit else []),
        ]
    )


def _other(row: JSON) -> tuple[str, str, str]:
    if not row["fits"]:
        return "-", "does not fit", "-"
    return f"{row['bits_per_weight']:.2f}", size(row["weights_bytes"]), f"{row['total_error']:.3%}"


def _mac(row: JSON) -> str:
    return f"--mac {row['mac_bytes'] / macs.GIB:g}GB"


def conversion(facts: JSON, out: str) -> str:
    """Return the closing text of `quantize`."""
    if facts["already_done"]:
        return f"{out} is already complete: same source, same options; nothing was done."
    if facts["manifest"] is None:
        return part_done(facts, out)
    lines = [
        f"{size(facts['output_bytes'])} in {duration(facts['seconds'])} ({size(facts['bytes_per_second'])}/s)"
        + (", resumed" if facts["resumed"] else ""),
        f"head: {facts['head']}; {facts['output_tensors']:,} tensors in {facts['output_shards']} files",
    ]
    lines += _over(facts)
    if facts["left_out"]:
        lines.append(f"{len(facts['left_out']):,} tensors left out, for reasons in the manifest")
    return "\n".join([*lines, f"manifest: {facts['manifest']}"])


def part_done(facts: JSON, out: str) -> str:
    """Return the closing text of one part of a conversion."""
    mine = facts["parts"][0]
    return (
        f"part {mine['part']} of {out}: {mine['files']} files, {size(mine['bytes_written'])}"
        f"{', resumed' if facts['resumed'] else ''}, in {duration(facts['seconds'])}\n"
        "when all parts are done, the same command without --part writes the manifest; it makes what is missing"
    )


def parted(facts: JSON) -> list[str]:
    """Return what each part of a plan reads, writes and costs, and the command lines."""
    rows = [
        (p["part"], f"{p['files']:,}", size(p["bytes_read"]), size(p["bytes_written"]), duration(p["cost"]))
        for p in facts["parts"]
    ]
    heads = ("part", "files", "reads", "writes", "one core")
    *each, end = facts["commands"]
    return ["", table(heads, rows), "", *each, "", "and when all parts are done, anywhere:", end]


def rearranged(facts: JSON, out: str) -> str:
    """Return the closing text of `relayout` and `graft`."""
    if facts["already_done"]:
        return f"{out} is already complete; nothing was done."
    kept, written = len(facts["files_kept"]), len(facts["files_written"])
    lines = [
        f"{size(facts['bytes_written'])} written in {written} files" + (", resumed" if facts["resumed"] else ""),
        f"layout {facts['layout']}; {kept} files taken over unchanged",
    ]
    return "\n".join([*lines, f"manifest: {facts['manifest']}"])


def generation(facts: JSON) -> str:
    """Return the closing line of `generate`: speed, and how the head fared."""
    count = len(facts["tokens"])
    told = (
        f"prompt: {facts['prompt_tokens']:,} tokens in {facts['prompt_seconds']:.2f} s; "
        f"generated: {count:,} tokens, {facts['tokens_per_second']:.1f} tokens/s"
    )
    if facts["mtp_active"]:
        share = f"{facts['acceptance']:.1%}" if facts["drafted"] else "-"
        told += (
            f"; acceptance {share} ({facts['accepted']:,} of {facts['drafted']:,} drafts, "
            f"depth {facts['draft_depth']}), {facts['tokens_per_pass']:.2f} tokens per pass"
            f"{' (DSpark head)' if facts['head_kind'] == 'dspark' else ''}"
        )
    return told


def checks(found: Sequence[JSON]) -> str:
    """Return the text of the checks of `verify`."""
    width = max(len(c["name"]) for c in found)
    lines = [f"{'ok  ' if c['ok'] else 'FAIL'}  {c['name'].ljust(width)}  {c['detail']}" for c in found]
    failed = [c["name"] for c in found if not c["ok"]]
    verdict = f"Not good: {', '.join(failed)}." if failed else "All good."
    return "\n".join([*lines, "", verdict])


def verification(facts: JSON) -> str:
    """Return the text of `verify`: the checks, the prompts decoded, and the verdict on the head."""
    text, head = checks(facts["checks"]), facts.get("mtp")
    if not head:
        return text
    lines = []
    if head.get("per_prompt"):
        rows = [
            (p["prompt"], p["new_tokens"], f"{p['acceptance']:.1%}", f"{p['tokens_per_pass']:.2f}",
             p["plain_tokens_per_second"], p["mtp_tokens_per_second"])
            for p in head["per_prompt"]
        ]  # fmt: skip
        lines += ["", table(("prompt", "tokens", "acceptance", "per pass", "plain tok/s", "MTP tok/s"), rows)]
        lines += ["", f"draft depth {head['draft_depth']}, head stored as {head['format']}"]
        places = [f"{p['position']}: {p['acceptance']:.1%}" for p in head["per_position"] if p["drafted"]]
        lines += [f"acceptance per draft position  {', '.join(places)}"]
    return "\n".join([text, *lines, "", head["verdict"]])


def differences(facts: JSON, shown: int = 40) -> str:
    """Return the text of `diff`."""
    unlike = [t for t in facts["tensors"] if t["status"] not in {"same", "moved", "same values, other format"}]
    lines = [
        f"{facts['same']:,} same ({facts['moved']:,} of them elsewhere, {facts['other_format']:,} in another format), "
        f"{facts['changed']:,} changed, {facts['only_a']:,} only in the first, {facts['only_b']:,} only in the second"
    ]
    if unlike:
        rows = [(t["tensor"], t["status"], _format(t, "a"), _format(t, "b"), _error(t)) for t in unlike[:shown]]
        lines += ["", table(("tensor", "status", "first", "second", "difference"), rows)]
    if len(unlike) > shown:
        lines.append(f"and {len(unlike) - shown:,} more (all with --json)")
    lines += _beside(facts)
    if not facts["values_compared"]:
        lines.append("By headers alone: names, shapes and formats; values were not compared.")
    return "\n".join(lines)


def _beside(facts: JSON) -> list[str]:
    """Return the lines of `diff` on config, carried files, and tensors that do not fit the config of their side."""
    config = [(x["key"], x["a"] or "-", x["b"] or "-") for x in facts["config"]]
    files = [(x["file"], (x["a"] or "-")[:16], (x["b"] or "-")[:16]) for x in facts["files"]]
    lines = ["", "config.json differs:", table(("key", "first", "second"), config)] if config else []
    if files:
        lines += ["", "Files beside the tensors differ (sha256):", table(("file", "first", "second"), files)]
    for side, word in (("a", "first"), ("b", "second")):
        found = [
            Finding(x["kind"], x["tensor"], x["expected"], x["found"]) for x in facts["problems"] if x["side"] == side
        ]
        told = list(grouping.findings(found))
        lines += ["", f"Not as the {word}'s config.json implies ({len(found)}):"] if told else []
        lines += [f"  {line}" for line in told[:20]] + ([f"  and {len(told) - 20} more kinds"] if told[20:] else [])
    return lines


def _format(t: JSON, side: str) -> str:
    return t[side]["format"] if side in t else "-"


def _error(t: JSON) -> str:
    if "max_abs_error" in t:
        worst, square = (
            "not finite" if t[k] is None else f"{t[k]:.3g}" for k in ("max_abs_error", "relative_square_error")
        )
        return f"max {worst}, relative square {square}, first at {t['first']}"
    return str(t.get("detail", ""))


def dry_pull(facts: JSON) -> str:
    """Return what `pull` would download."""
    rows = table(("file", "bytes"), [(f["name"], size(f["bytes"])) for f in facts["sizes"]])
    last = f"{facts['repo']} at {facts['revision']}: {len(facts['sizes'])} files, {size(facts['bytes'])}"
    return "\n".join([rows, "", f"{last}, into {facts['folder']}. Nothing was written."])


def publication(facts: JSON) -> str:
    """Return what `publish` did."""
    lines = [
        f"{facts['repo']}: {facts['files']} files, {size(facts['bytes'])}, {size(facts['bytes_sent'])} sent, "
        f"commit {facts['revision']}"
    ]
    lines += [f"Removed there: {n}" for n in facts["removed"]]
    lines += [f"Stays there: {n} (not of this folder; --delete-others removes it)" for n in facts["others"]]
    lines += [f"FAIL  {d}" for d in facts["differences"]]
    if facts["differences"]:
        lines.append("What is on the Hub is not what is here; run the same command again.")
    elif facts["problems"]:
        lines.append("Published although its checks failed (--force); the card tells so.")
    else:
        lines.append("Verified: size and digest of every file on the Hub are those of the manifest.")
    return "\n".join(lines)


def dry_publication(card: str, facts: JSON) -> str:
    """Return what `publish` would do, the card first, then what would become of every file."""
    others = set(facts["others"])
    rows = [f"would be {kind:<10} {n}" for kind in ("added", "replaced", "removed") for n in facts[kind]]
    rows += [f"would be {'kept':<10} {n}" for n in facts["kept"] if n not in others]
    rows += [f"would be {'kept':<10} {n} (not of this folder; --delete-others removes it)" for n in facts["others"]]
    last = f"{facts['repo']}: {facts['files']} files of this folder, {size(facts['bytes'])}. Nothing was sent."
    return "\n".join([card, *rows, last])
