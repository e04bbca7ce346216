"""What rounding cost, by layer and role, from the records of a manifest: for `inspect` and the report's picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ds4convert.formats.codecs import CODECS
from ds4convert.headers import DTYPE_BYTES
from ds4convert.inspection import group_of
from ds4convert.types import JSON


@dataclass
class _Sum:
    weights: float = 0.0
    bits: float = 0.0
    error: float = 0.0
    max_abs: float = 0.0


def by_layer(record: JSON | None) -> list[JSON]:
    """Return per group and layer of a converted folder: formats, bits per weight, relative squared error, worst error.

    Matrices alone, as only they are ever rounded; errors are means over weights; [] where nothing was rounded.
    """
    tensors = (record or {}).get("tensors", [])
    if not any("error" in t for t in tensors):
        return []
    sums: dict[tuple[str, int | None], _Sum] = {}
    formats: dict[tuple[str, int | None], set[str]] = {}
    for t in tensors:
        bits = _bits(t)
        if bits is None:
            continue
        key = (group_of(t["part"], t["role"]), t["layer"])
        weights, error = _weights(t), t.get("error", {})
        found = sums.setdefault(key, _Sum())
        found.weights += weights
        found.bits += bits * weights
        found.error += error.get("relative_square", 0.0) * weights
        found.max_abs = max(found.max_abs, error.get("max_abs", 0.0))
        formats.setdefault(key, set()).add(t["format"])
    return [
        {
            "group": group,
            "layer": layer,
            "formats": sorted(formats[group, layer]),
            "bits_per_weight": round(s.bits / s.weights, 3),
            "relative_square": float(f"{s.error / s.weights:.6g}"),
            "max_abs": s.max_abs,
        }
        for (group, layer), s in sums.items()
    ]


def _bits(t: Mapping[str, JSON]) -> float | None:
    """Return the bits per weight of a matrix's record, scales counted; None for what is no matrix."""
    name, shape = str(t["name"]), t["shape"]
    if not name.endswith(".weight") or len(shape) < 2 or str(t["role"]) in {"router", "norm"}:
        return None
    codec = CODECS.get(str(t["format"]))
    return codec.bits_per_weight if codec else 8.0 * DTYPE_BYTES[str(t["dtype"])]


def _weights(t: Mapping[str, JSON]) -> float:
    codec = CODECS.get(str(t["format"]))
    size = float(t["bytes"])  # type: ignore[arg-type]
    return size * 8 / (codec.bits if codec else 8 * DTYPE_BYTES[str(t["dtype"])])


def by_group(rows: list[JSON]) -> list[JSON]:
    """Return per group: formats, mean bits and error over its layers, and the layer of the largest error."""
    groups: dict[str, list[JSON]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    out = []
    for name, found in groups.items():
        worst = max(found, key=lambda r: r["relative_square"])
        out.append(
            {
                "group": name,
                "formats": sorted({f for r in found for f in r["formats"]}),
                "bits_per_weight": sum(r["bits_per_weight"] for r in found) / len(found),
                "relative_square": sum(r["relative_square"] for r in found) / len(found),
                "worst": worst["relative_square"],
                "worst_layer": worst["layer"],
                "max_abs": max(r["max_abs"] for r in found),
            }
        )
    return out
