"""One self-contained page about a converted folder: verdict, acceptance, speed, bytes, divergence, checks.

No script, no font, no request to anywhere; bars are inline SVG with a text of their own, so the page reads on a phone,
on paper and with a screen reader. Shows only what `verify --json` says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from ds4convert.errors import EnvironmentFault
from ds4convert.files import Disk
from ds4convert.manifest import tool_version
from ds4convert.report import size
from ds4convert.types import JSON

WIDTH, ROW, BAR = 360, 34, 10
"""Of a chart, in the units of its viewBox: about CSS pixels on a phone."""

STYLE = """
:root{color-scheme:light dark;--fg:#1c1e21;--dim:#5f6670;--bg:#fff;--card:#f5f6f8;--line:#dcdfe4;
--a:#2f6fdb;--b:#9aa7bb;--good:#1a7f4b;--bad:#c4302b}
@media(prefers-color-scheme:dark){:root{--fg:#e8eaed;--dim:#a0a7b2;--bg:#15171a;--card:#1f2226;--line:#353a41;
--a:#6ea0f5;--b:#66748a;--good:#4cc38a;--bad:#ff7b72}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--fg);font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1080px;margin:0 auto;padding:20px 16px 48px}
h1{font-size:1.45rem;line-height:1.25;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:1.05rem;margin:0 0 4px}
p{margin:0 0 8px}
.dim{color:var(--dim);font-size:.9rem}
.verdict{border-left:6px solid var(--good);background:var(--card);padding:14px 16px;margin:16px 0;font-size:1.1rem}
.verdict.bad{border-color:var(--bad)}
.verdict b{display:block;color:var(--good)}.verdict.bad b{color:var(--bad)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(140px,1fr));gap:10px;margin:0 0 16px}
.tile,section{background:var(--card);padding:12px 14px;border-radius:6px}
.tile strong{display:block;font-size:1.5rem;line-height:1.2}
.cards{columns:2 420px;column-gap:16px}
.cards section{break-inside:avoid;margin-bottom:16px}
.wide{margin-bottom:16px}
svg{display:block;width:100%;max-width:560px;height:auto;margin-top:6px}
svg text{font:12px system-ui,-apple-system,"Segoe UI",sans-serif;fill:var(--fg)}
svg .v{text-anchor:end;font-variant-numeric:tabular-nums}
svg .n{fill:var(--dim)}
svg .t{fill:var(--line)}svg .a{fill:var(--a)}svg .b{fill:var(--b)}
table{border-collapse:collapse;width:100%;font-size:.92rem}
th,td{text-align:left;vertical-align:top;padding:6px 10px 6px 0;border-top:1px solid var(--line);overflow-wrap:anywhere}
th{white-space:nowrap}
.ok{color:var(--good)}.fail{color:var(--bad);font-weight:700}
td.ok,td.fail{white-space:nowrap;overflow-wrap:normal}
@media(max-width:560px){table.checks tr{display:grid;grid-template-columns:3.2em 1fr}
table.checks td:last-child{grid-column:1/3;border:0;padding-top:0}}
"""


@dataclass(frozen=True)
class Bar:
    """One bar: what it is, its length, the value in words, a note beside the name, and its colour (a or b)."""

    label: str
    value: float
    text: str
    note: str = ""
    colour: str = "a"


def chart(title: str, bars: Sequence[Bar], full: float | None = None) -> str:
    """Return horizontal bars as inline SVG; `full` is the value of a whole bar (default: the largest)."""
    largest = full or max((b.value for b in bars), default=0.0) or 1.0
    rows = []
    for n, b in enumerate(bars):
        top, long = n * ROW, max(0.0, min(1.0, b.value / largest)) * WIDTH
        note = f' <tspan class="n">{escape(b.note)}</tspan>' if b.note else ""
        rows.append(
            f'<text x="0" y="{top + 13}">{escape(b.label)}{note}</text>'
            f'<text class="v" x="{WIDTH}" y="{top + 13}">{escape(b.text)}</text>'
            f'<rect class="t" x="0" y="{top + 18}" width="{WIDTH}" height="{BAR}" rx="2"/>'
            f'<rect class="{b.colour}" x="0" y="{top + 18}" width="{long:.1f}" height="{BAR}" rx="2"/>'
        )
    spoken = "; ".join(f"{b.label}: {b.text}" for b in bars)
    return (
        f'<svg viewBox="0 0 {WIDTH} {len(bars) * ROW}" role="img" aria-label="{escape(f"{title}. {spoken}")}">'
        f"{''.join(rows)}</svg>"
    )


def _drawn(facts: JSON) -> tuple[str, ...]:
    return _acceptance(facts), _prompts(facts), _speed(facts), _divergence(facts), _layers(facts)


def page(name: str, facts: JSON) -> str:
    """Return the page about the folder called `name`, from the facts of `verify --json` and `groups`."""
    parts = [part for part in _drawn(facts) if part]
    parts.append(_groups(facts))
    pictures = _losses(facts)
    body = [
        f"<h1>{escape(name)}</h1>",
        f'<p class="dim">Checked by ds4convert {escape(tool_version())} verify{escape(_how(facts))}</p>',
        _verdict(facts),
        _tiles(facts),
        f'<div class="cards">{"".join(parts)}</div>',
        pictures,
        _reference(facts),
        _checks(facts),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(name)}: ds4convert report</title><style>{STYLE}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def write(path: Path, folder: Path, facts: JSON) -> None:
    """Write the page. The folder's own name is shown, never the path to it.

    Whole or not at all; raises `EnvironmentFault` where the disk refuses.
    """
    disk = Disk()
    try:
        disk.write_file(path, page(folder.resolve().name, facts).encode())
    except OSError as e:
        raise EnvironmentFault(f"{path}: the report could not be written: {e.strerror}; name another file") from e


def _section(title: str, note: str, content: str) -> str:
    told = f'<p class="dim">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{told}{content}</section>"


def _how(facts: JSON) -> str:
    compute = facts.get("compute")
    if not compute:
        return ""
    return f"; computed in {compute['dtype']}, matrices {'dequantized' if compute['dense'] else 'as stored'}"


def _verdict(facts: JSON) -> str:
    failed = [c["name"] for c in facts["checks"] if not c["ok"]]
    sentence = (facts.get("mtp") or {}).get("verdict") or ("Every check passed." if not failed else "")
    heading = "Good" if not failed else f"Not good: {', '.join(failed)}"
    return f'<div class="verdict{"" if not failed else " bad"}"><b>{escape(heading)}</b>{escape(sentence)}</div>'


def _tiles(facts: JSON) -> str:
    head, total = facts.get("mtp") or {}, sum(g["bytes"] for g in facts.get("groups", []))
    tiles = []
    if head.get("acceptance") is not None:
        tiles += [
            (f"{head['acceptance']:.1%}", f"acceptance, {head['drafted']:,} drafts"),
            (f"{head['tokens_per_pass']:.2f}", "tokens per backbone pass"),
            (f"{head['speedup']:.2f} x" if head["speedup"] else "-", "speed of plain decoding"),
            ("equal" if head["greedy_equal"] else "differs", "greedy text, head and plain"),
        ]
    if run := facts.get("layerwise"):
        agreement = run["converted"]["acceptance"]
        tiles += [] if agreement is None else [(f"{agreement:.1%}", "of drafts agree, teacher-forced")]
        tiles.append((f"{run['converted']['perplexity']:.4g}", f"perplexity, {run['converted']['tokens']:,} tokens"))
        tiles.append((size(run["memory"]["peak_rss"]), "peak memory of the layer-wise run"))
        tiles.append((size(run["memory"]["largest_layer"]), "in the largest layer, as stored"))
    if head.get("format"):
        tiles.append((head["kind"], f"head, stored as {head['format'].replace('+', ', ')}"))
    if total:
        tiles.append((size(total), "of weights"))
    cells = "".join(f'<div class="tile"><strong>{escape(a)}</strong>{escape(b)}</div>' for a, b in tiles)
    return f'<div class="tiles">{cells}</div>' if cells else ""


def _acceptance(facts: JSON) -> str:
    rows = [p for p in (facts.get("mtp") or {}).get("per_position", []) if p["drafted"]]
    if not rows:
        return ""
    bars = [
        Bar(f"draft {p['position']}", p["acceptance"], f"{p['acceptance']:.1%}", f"{p['accepted']} of {p['drafted']}")
        for p in rows
    ]
    note = "A draft behind a refused one counts as refused."
    return _section("Acceptance per draft position", note, chart("Acceptance per draft position", bars, 1.0))


def _prompts(facts: JSON) -> str:
    rows = (facts.get("mtp") or {}).get("per_prompt", [])
    if not rows:
        return ""
    bars = [
        Bar(p["prompt"], p["acceptance"], f"{p['acceptance']:.1%}", f"{p['tokens_per_pass']:.2f} tokens per pass")
        for p in rows
    ]
    return _section("Acceptance per prompt", "Greedy decoding.", chart("Acceptance per prompt", bars, 1.0))


def _speed(facts: JSON) -> str:
    head, plain = facts.get("mtp") or {}, (facts.get("decode") or {}).get("plain_tokens_per_second")
    if plain is None:
        return ""
    bars = [Bar("plain", plain, f"{plain:.1f} tok/s", "all prompts", "b")]
    if head.get("mtp_tokens_per_second") is not None:
        rate = head["mtp_tokens_per_second"]
        bars.append(Bar("with the head", rate, f"{rate:.1f} tok/s", f"depth {head['draft_depth']}"))
    for p in head.get("per_prompt", []):
        for label, key, colour in (("plain", "plain", "b"), ("with the head", "mtp", "a")):
            value = p[f"{key}_tokens_per_second"] or 0.0
            bars.append(Bar(p["prompt"], value, f"{value:.1f} tok/s", label, colour))
    note = "After the prompt; both from the same run, warmed up, order alternating."
    return _section("Tokens per second", note, chart("Tokens per second", bars))


def _divergence(facts: JSON) -> str:
    if "kl" not in facts:
        return ""
    if facts["kl"] is None:
        return _section("KL against the source", "Left out: the source does not fit in the free memory.", "")
    out = []
    for part, d in facts["kl"].items():
        bars = [Bar(name, value, f"{value:.2g}") for name, value in d["per_prompt"].items() if d["maximum"]]
        equal = f"first choice equal at {d['argmax_equal']:.1%}"
        note = f"mean {d['mean']:.2g}, largest {d['maximum']:.2g} over {d['positions']} positions; {equal}"
        drawn = chart(f"Median KL, {part}", bars) if bars else ""
        out.append(f"<p>{escape(part)}: {escape(note)}</p>{drawn}")
    return _section("KL against the source", "Nats, median of each prompt; 0 is equal.", "".join(out))


def _layers(facts: JSON) -> str:
    """Hidden-state error after each layer of a layer-wise run against the source."""
    run = facts.get("layerwise")
    if not run or not run["stages"]:
        return ""
    bars = [Bar(s["stage"], s["relative_rms"], f"{s['relative_rms']:.2g}") for s in run["stages"]]
    d = run["divergence"]
    note = f"KL from the source: mean {d['kl_mean']:.2g}, median {d['kl_median']:.2g}, largest {d['kl_max']:.2g} nats"
    return _section("Error of hidden states, layer by layer", note, chart("Relative RMS after each stage", bars))


def _groups(facts: JSON) -> str:
    groups = facts.get("groups", [])
    if not groups:
        return ""
    bars = [
        Bar(g["name"].replace("_", " "), g["bytes"], size(g["bytes"]), ", ".join(g["formats"]),
            "a" if g["name"].startswith("mtp.") else "b")
        for g in groups
    ]  # fmt: skip
    return _section("Bytes and format per group", "The head's groups begin with mtp.", chart("Bytes per group", bars))


CELL, LABELS = 16, 150
"""Of a map: the side of a cell, and the room for names to its left."""

LEAST_ERROR = 1e-6
"""The relative squared error that is shown as none, in a map."""


def heat(title: str, rows: Sequence[JSON], value: Callable[[JSON], float], told: Callable[[JSON], str]) -> str:
    """Return a map as inline SVG: a line per group, a cell per layer; `value` 0 to 1 is how dark, `told` its title."""
    groups = list(dict.fromkeys(r["group"] for r in rows))
    layers = sorted({r["layer"] for r in rows if r["layer"] is not None})
    column = {n: i for i, n in enumerate(layers)}
    out = []
    for line, group in enumerate(groups):
        top = line * CELL
        out.append(f'<text x="0" y="{top + 12}">{escape(group.replace("_", " "))}</text>')
        for r in (r for r in rows if r["group"] == group):
            left = LABELS + column.get(r["layer"], 0) * CELL
            shade = max(0.0, min(1.0, value(r)))
            out.append(
                f'<rect class="a" x="{left}" y="{top}" width="{CELL - 2}" height="{CELL - 2}" '
                f'fill-opacity="{shade:.3f}" stroke="currentColor" stroke-opacity=".25">'
                f"<title>{escape(told(r))}</title></rect>"
            )
    wide, high = LABELS + max(1, len(layers)) * CELL, len(groups) * CELL
    spoken = "; ".join(told(r) for r in rows[:200])
    return (
        f'<svg class="map" viewBox="0 0 {wide} {high}" style="max-width:{wide}px" role="img" '
        f'aria-label="{escape(f"{title}. {spoken}")}">{"".join(out)}</svg>'
    )


def _place(r: JSON) -> str:
    where = "" if r["layer"] is None else f", layer {r['layer']}"
    return f"{r['group']}{where}, {' '.join(r['formats'])}"


def _losses(facts: JSON) -> str:
    """What rounding cost and the bits per weight, as maps of groups and layers; nothing where nothing was rounded."""
    rows = facts.get("losses", [])
    if not rows:
        return ""
    worst = max(r["relative_square"] for r in rows)
    span = math.log(max(worst, 10 * LEAST_ERROR) / LEAST_ERROR)
    widest = max(r["bits_per_weight"] for r in rows)
    error = heat(
        "Relative squared error by group and layer",
        rows,
        lambda r: math.log(max(r["relative_square"], LEAST_ERROR) / LEAST_ERROR) / span,
        lambda r: f"{_place(r)}: {r['relative_square']:.3g}",
    )
    bits = heat(
        "Bits per weight by group and layer",
        rows,
        lambda r: r["bits_per_weight"] / widest,
        lambda r: f"{_place(r)}: {r['bits_per_weight']:.2f} bits",
    )
    note = f"A line per group, a cell per layer. Darkest: {worst:.3g} of the squared values; white: nothing lost."
    wide = f"Darkest: {widest:.2f} bits per weight, scales counted."
    return (
        f'<div class="wide">{_section("What rounding cost", note, error)}</div>'
        f'<div class="wide">{_section("Bits per weight", wide, bits)}</div>'
    )


def _reference(facts: JSON) -> str:
    rows = facts.get("reference", [])
    if not rows:
        return ""
    cells = "".join(
        f"<tr>{_mark(r['ok'])}<td>{escape(r['key'])}</td><td>"
        f"{'' if r['max_abs_diff'] is None else format(r['max_abs_diff'], '.3g')} {escape(r['detail'])}</td></tr>"
        for r in rows
    )
    table = f'<table class="checks">{cells}</table>'
    return f'<div class="wide">{_section("Against the recording", "Largest absolute difference per key.", table)}</div>'


def _checks(facts: JSON) -> str:
    cells = "".join(
        f"<tr>{_mark(c['ok'])}<th>{escape(c['name'])}</th><td>{escape(c['detail'])}</td></tr>" for c in facts["checks"]
    )
    return f'<div class="wide">{_section("Checks", "", f"""<table class="checks">{cells}</table>""")}</div>'


def _mark(good: bool) -> str:
    return '<td class="ok">ok</td>' if good else '<td class="fail">FAIL</td>'
