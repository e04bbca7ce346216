"""The text of `env`, `list` and `recommend`."""

from __future__ import annotations

from ds4convert.checkpoint.types import JSON
from ds4convert.words import macs
from ds4convert.words.figures import size, table


def environment(facts: JSON) -> str:
    """Return the text of `env`: a line for each fact, to be pasted into a report."""
    where, metal, hub = facts["platform"], facts["metal"], facts["hub"]
    rows = {
        "ds4convert": facts["version"] or "not installed as a package",
        "address": facts["address"],
        "Python": facts["python"],
        "platform": ", ".join(x for x in (where["system"], where["machine"], where["libc"]) if x),
        "cores": facts["cores"],
        "memory": None if facts["memory_bytes"] is None else f"{facts['memory_bytes'] / macs.GIB:.1f} GiB",
        "Metal": _metal(metal),
        "Hub": hub["error"] or f"{hub['endpoint']}{', offline' if hub['offline'] else ''}",
        "Hub cache": hub["cache"],
        "Hub token": {"environment": "set in the environment", "login": "of a login"}.get(hub["token"] or "", "none"),
    }
    rows |= {name: version or "-" for name, version in facts["packages"].items()} | facts["variables"]
    told = {k: str(v) for k, v in rows.items() if v is not None}
    wide = max(map(len, told))
    return "\n".join(f"{k.ljust(wide)}  {v}" for k, v in told.items())


def _metal(metal: JSON) -> str:
    if metal["error"]:
        return f"MLX does not load: {metal['error']}"
    if not metal["available"]:
        return "none"
    told = [metal["device"] or "available"]
    if metal["working_set_bytes"]:
        told.append(f"may use {metal['working_set_bytes'] / macs.GIB:.1f} GiB")
    if metal["wired_limit_mb"]:
        told.append(f"iogpu.wired_limit_mb {metal['wired_limit_mb']}")
    return ", ".join(told)


def listed(facts: JSON) -> str:
    """Return the text of `list`: a line for each name."""
    extra = {"formats": "bits_per_weight"}.get(facts["kind"])
    if extra is None:
        return table((facts["kind"], "description"), [(r["name"], r["description"]) for r in facts["rows"]])
    cells = [
        (r["name"], "as stored" if r[extra] is None else f"{r[extra]:.4g}", r["description"]) for r in facts["rows"]
    ]
    return table((facts["kind"], "bits", "description"), cells)


def recommendation(facts: JSON) -> str:
    """Return the text of `recommend`: what fits, what it costs in quality as far as that was measured, the command."""
    lines = [f"{facts['repo']}: {macs.said(facts['mac_bytes'])}."]
    if not facts["runs"]:
        lines.append("ds4convert converts this family and does not run it yet: weights alone are compared.")
    if facts["recipes"]:
        cells = [
            (r["recipe"], size(r["output_bytes"]), "-" if r["context"] is None else f"{r['context']:,}",
             _quality(r["quality"]), _quality(r["demo_quality"]), r["description"])
            for r in facts["recipes"]
        ]  # fmt: skip
        head = ("recipe", "size", "context", "quality", "on the demo", "what it is")
        lines += ["", table(head, cells), "", *(r["command"] for r in facts["recipes"])]
        if facts["by_layer"]:
            lines += ["", "Formats chosen by layer for this size, with the least error:", facts["by_layer"]]
        if any(r["demo_quality"] for r in facts["recipes"]):
            lines += ["", "KL: divergence from the source in nats per token, measured on the small demo model, whose "
                      "figures are no promise for this one (benchmarks/RESULTS.md)."]  # fmt: skip
    else:
        lines += ["", "No recipe fits."]
    for row in facts["too_large"]:
        needs = row["needs_mac_bytes"]
        mac = "more than any Mac holds" if needs is None else f"from a Mac with {needs / macs.GIB:g} GB on"
        lines.append(f"too large: {row['recipe']}, {size(row['output_bytes'])}: {mac}")
    return "\n".join(lines)


def _quality(found: JSON | None) -> str:
    return "not measured" if found is None else f"KL {found['kl']:g}, same choice {found['same']:.1%}"
