"""Every text for people: tables and sentences from the same facts that `--json` prints. Computes nothing new."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ds4convert import losses
from ds4convert.inspection import Inspection
from ds4convert.types import JSON
from ds4convert.verify import Check

UNITS = ("B", "KB", "MB", "GB", "TB")


def size(n: float) -> str:
    """Return bytes for people, decimal units: 159.6 GB."""
    for unit in UNITS[:-1]:
        if abs(n) < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} {UNITS[-1]}"


def duration(seconds: float) -> str:
    """Return a time for people: 45 s, 6 min, 1 h 10 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return an aligned table; columns of numbers and sizes to the right."""
    text = [[str(c) for c in row] for row in rows]
    widths = [max(len(r[i]) for r in [list(head), *text]) for i in range(len(head))]
    right = [all(r[i][:1].isdigit() for r in text) if text else False for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True))
        return "  ".join(padded).rstrip()

    return "\n".join([line(head), line(["-" * w for w in widths]), *map(line, text)])


_KINDS = {
    "official": "official format",
    "mlx": "MLX folder",
    "config": "from the config alone",
    "plain": "tensors",
}


def inspection(found: Inspection) -> str:
    """Return the text of `inspect`."""
    facts = found.as_json()
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
        lines.append(found.note)
    rows = [(g["name"], f"{g['tensors']:,}", size(g["bytes"]), " ".join(g["dtypes"])) for g in facts["groups"]]
    lines += ["", table(("group", "tensors", "bytes", "dtypes"), rows)]
    lines += lost(losses.by_layer(found.manifest))
    if found.problems:
        lines += ["", f"{len(found.problems)} problems:"] + [f"  {p}" for p in found.problems[:20]]
        if len(found.problems) > 20:
            lines.append(f"  and {len(found.problems) - 20} more (all with --json)")
    elif found.format in {"official", "mlx"}:
        lines += ["", "Complete: nothing missing, extra or misshapen."]
    return "\n".join(lines)


def lost(rows: Sequence[JSON]) -> list[str]:
    """Return the lines of a table of what rounding cost each group; none where nothing was rounded."""
    if not rows:
        return []
    cells = [
        (
            g["group"],
            " ".join(g["formats"]),
            f"{g['bits_per_weight']:.2f}",
            f"{g['relative_square']:.4%}",
            f"{g['worst']:.4%}" + ("" if g["worst_layer"] is None else f" in layer {g['worst_layer']}"),
            f"{g['max_abs']:.3g}",
        )
        for g in losses.by_group(list(rows))
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
        f"memory     {size(facts['peak_memory_bytes'])} while converting",
        f"time       about {duration(facts['seconds_estimate'])} (disk: 350 MB/s; rounding: as in a trial now)",
        f"weights fit in the memory of a Mac with: {fits} (three quarters of it are usable)",
        f"plan       {facts['plan']}",
    ]
    if "fit" in facts:
        lines += ["", fitted(facts["fit"])]
    for x in facts["left_out"][:10]:
        lines.append(f"left out   {x['tensor']}: {x['why']}")
    if len(facts["left_out"]) > 10:
        lines.append(f"left out   and {len(facts['left_out']) - 10:,} more (all with --json)")
    lines += [f"left out   {x['file']}: {x['why']}" for x in facts["files_left_out"]]
    return "\n".join(lines)


def fitted(fit: JSON) -> str:
    """Return the table of what `--fit` chose, and what other sizes would give."""
    rows = [
        (r["role"], r["layers"], r["format"], f"{r['bits_per_weight']:.2f}", size(r["bytes"]), f"{r['error']:.3%}")
        for r in fit["table"]
    ]
    others = [
        (size(o["target_bytes"]), f"{o['bits_per_weight']:.2f}", size(o["weights_bytes"]), f"{o['total_error']:.3%}")
        if o["fits"]
        else (size(o["target_bytes"]), "-", "does not fit", "-")
        for o in fit["other_sizes"]
    ]
    return "\n".join(
        [
            table(("role", "layers", "format", "bits", "bytes", "error"), rows),
            "",
            f"fit        {size(fit['target_bytes'])}: {size(fit['weights_bytes'])} weights, {size(fit['cache_bytes'])} "
            f"state for {fit['context']:,} tokens, {size(fit['working_bytes'])} working set",
            f"error      {fit['total_error']:.3%} of the squares a token meets; no choice of this size has "
            f"less than {fit['total_error'] - fit['gap']:.3%}",
            "",
            table(("other size", "bits", "weights", "error"), others),
        ]
    )


def conversion(facts: JSON, out: str) -> str:
    """Return the closing text of `quantize`."""
    if facts["already_done"]:
        return f"{out} is already complete: same source, same options; nothing was done."
    lines = [
        f"{size(facts['output_bytes'])} in {duration(facts['seconds'])} ({size(facts['bytes_per_second'])}/s)"
        + (", resumed" if facts["resumed"] else ""),
        f"head: {facts['head']}; {facts['output_tensors']:,} tensors in {facts['output_shards']} files",
    ]
    if facts["left_out"]:
        lines.append(f"{len(facts['left_out']):,} tensors left out, for reasons in the manifest")
    return "\n".join([*lines, f"manifest: {facts['manifest']}"])


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
    line = (
        f"prompt: {facts['prompt_tokens']:,} tokens in {facts['prompt_seconds']:.2f} s; "
        f"generated: {count:,} tokens, {facts['tokens_per_second']:.1f} tokens/s"
    )
    if facts["mtp_active"]:
        share = f"{facts['acceptance']:.1%}" if facts["drafted"] else "-"
        line += (
            f"; acceptance {share} ({facts['accepted']:,} of {facts['drafted']:,} drafts, "
            f"depth {facts['draft_depth']}), {facts['tokens_per_pass']:.2f} tokens per pass"
        )
    return line


def checks(found: Sequence[Check]) -> str:
    """Return the text of `verify`."""
    width = max(len(c.name) for c in found)
    lines = [f"{'ok  ' if c.ok else 'FAIL'}  {c.name.ljust(width)}  {c.detail}" for c in found]
    failed = [c.name for c in found if not c.ok]
    verdict = f"Not good: {', '.join(failed)}." if failed else "All good."
    return "\n".join([*lines, "", verdict])


def verification(found: Sequence[Check], facts: JSON) -> str:
    """Return the text of `verify`: the checks, the prompts decoded, and the verdict on the head."""
    text, head = checks(found), facts.get("mtp")
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
    if not facts["values_compared"]:
        lines.append("By headers alone: names, shapes and formats; values were not compared.")
    return "\n".join(lines)


def _format(t: JSON, side: str) -> str:
    return t[side]["format"] if side in t else "-"


def _error(t: JSON) -> str:
    if "max_abs_error" in t:
        worst, square = (
            "not finite" if t[k] is None else f"{t[k]:.3g}" for k in ("max_abs_error", "relative_square_error")
        )
        return f"max {worst}, relative square {square}, first at {t['first']}"
    return str(t.get("detail", ""))


def publication(facts: JSON) -> str:
    """Return what `publish` did."""
    lines = [
        f"{facts['repo']}: {facts['files']} files, {size(facts['bytes'])}, {size(facts['bytes_sent'])} sent, "
        f"commit {facts['revision']}"
    ]
    lines += [f"Removed there: {n} (of an earlier conversion)" for n in facts["removed"]]
    lines += [f"FAIL  {d}" for d in facts["differences"]]
    if facts["differences"]:
        lines.append("What is on the Hub is not what is here; run the same command again.")
    elif facts["problems"]:
        lines.append("Published although its checks failed (--force); the card tells so.")
    else:
        lines.append("Verified: size and digest of every file on the Hub are those of the manifest.")
    return "\n".join(lines)


def dry_publication(card: str, facts: JSON) -> str:
    """Return what `publish` would do, the card first."""
    return f"{card}\n{facts['repo']}: would hold {facts['files']} files, {size(facts['bytes'])}. Nothing was sent."
