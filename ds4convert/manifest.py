"""The manifest: the final account of every source tensor and every output file. Written last, by rename.

Holds no times, no machine names and no paths outside the folder, so equal inputs and options give equal bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from ds4convert import strictjson
from ds4convert.errors import InputError
from ds4convert.folder import read_small
from ds4convert.headers import LENGTH_BYTES
from ds4convert.types import JSON, Done, Loss, Origin, OutputFile, Plan, Step

MANIFEST_NAME = "ds4convert_manifest.json"
VERIFY_NAME = "ds4convert_verify.json"
"""What `verify --mtp` measured, beside the manifest that it was measured for."""

VERSION = 1
DIGEST = "digest"
"""The key of the sha256 of the rest (canonical JSON), so that the account itself cannot change unnoticed."""

MAX_BYTES = 100_000_000


def tool_version() -> str:
    """Return the version of the installed package, or `0+source` where it runs from a tree that is not installed."""
    try:
        return metadata.version("ds4convert")
    except metadata.PackageNotFoundError:
        return "0+source"


def build(plan: Plan, steps: Mapping[int, Done], hashes: Mapping[int, str | None]) -> bytes:
    """Return the manifest's bytes for an executed plan: `steps` by number, `hashes` by file number."""
    small = {name: hashlib.sha256(text).hexdigest() for name, text in plan.texts.items()} | dict(plan.copies)
    sizes = {name: len(text) for name, text in plan.texts.items()}
    files: list[JSON] = [
        {"name": f.name, "bytes": f.size, "sha256": hashes[n], "header_sha256": _header_digest(f)}
        for n, f in enumerate(plan.files)
    ]
    files += [{"name": n, "sha256": h} | ({"bytes": sizes[n]} if n in sizes else {}) for n, h in small.items()]
    table: JSON = {
        "manifest_version": VERSION,
        "tool": {"name": "ds4convert", "version": tool_version()},
        "family": plan.family,
        "head": {"kind": plan.head_kind, "tensors": sum(s.part == "mtp" for s in plan.steps)},
        "recipe": plan.recipe,
        "formats": dict(plan.formats),
        "layout": plan.layout,
        "plan": plan.id,
        "source": _source(plan),
        "tensors": [r for n, s in enumerate(plan.steps) for r in _records(plan, s, steps[n])],
        "files": sorted(files, key=lambda f: str(f["name"])),
        "left_out": [{"tensor": x.tensor, "why": x.why} for x in plan.left_out],
        "files_left_out": [{"file": x.tensor, "why": x.why} for x in plan.files_left_out],
    }
    return strictjson.pretty(table | {DIGEST: strictjson.digest(table)})


def _source(plan: Plan) -> JSON:
    """Return where the tensors came from: repo and commit where known, files with what is known of them, the chain."""
    digests: Mapping[str, str] = plan.origin.digests if plan.origin else {}
    files = [
        {"name": s.name, "bytes": s.size, "header_sha256": s.header_sha256}
        | ({"sha256": digests[s.name]} if s.name in digests else {})
        for s in plan.sources
    ]
    place = {"repo": plan.origin.repo, "revision": plan.origin.revision} if plan.origin else {}
    return place | {"files": files} | ({"chain": list(plan.chain)} if plan.chain else {})


def origin(record: JSON | None) -> Origin | None:
    """Return where a folder's source came from, as its manifest tells."""
    source = (record or {}).get("source", {})
    repo, revision, files = source.get("repo"), source.get("revision"), source.get("files", [])
    if not isinstance(repo, str) or not isinstance(revision, str):
        return None
    return Origin(repo, revision, {f["name"]: f["sha256"] for f in files if isinstance(f.get("sha256"), str)})


def _header_digest(file: OutputFile) -> str:
    """Return the sha256 of a header's JSON, as `SourceFile` has it: what is checked with hashing off, too."""
    return hashlib.sha256(file.header[LENGTH_BYTES:]).hexdigest()


def _records(plan: Plan, step: Step, done: Done) -> list[JSON]:
    out: list[JSON] = [
        {
            "name": o.name,
            "file": plan.files[o.file].name,
            "offset": o.offset,
            "bytes": o.size,
            "dtype": o.dtype,
            "shape": list(o.shape),
            "format": step.format,
            "part": step.part,
            "role": step.role,
            "layer": step.layer,
            "sources": [name for names in step.sources for name in names],
            "source_dtype": step.source_dtype,
            "transform": step.transform,
            "params": dict(step.params),
            "xxh3_128": digest,
        }
        for o, digest in zip(step.outputs, done.digests, strict=True)
    ]
    if done.loss is not None:
        out[0]["error"] = _error(step, done.loss)
    return out


def _error(step: Step, loss: Loss) -> JSON:
    """Return what rounding cost, to six digits: more would differ between processors that sum in other orders."""
    return {
        "relative_square": float(f"{loss.relative_square:.6g}"),
        "max_abs": float(f"{loss.max_abs:.6g}"),
        "bits_per_weight": round(8 * sum(o.size for o in step.outputs) / step.weights, 6),
    }


def read(folder: Path) -> JSON | None:
    """Return the manifest of a converted folder, or None when it has none.

    Raises `InputError` when there is one that is not ours or of a newer kind.
    """
    if not (folder / MANIFEST_NAME).exists():
        return None
    raw = read_small(folder, MANIFEST_NAME, MAX_BYTES)
    table = strictjson.loads(raw, MANIFEST_NAME)
    if not isinstance(table, dict) or table.get("manifest_version") != VERSION or not _well_formed(table):
        raise InputError(f"{MANIFEST_NAME}: not a manifest that this version of ds4convert reads")
    rest = {k: v for k, v in table.items() if k != DIGEST}
    if table.get(DIGEST) != strictjson.digest(rest) or strictjson.pretty(table) != raw:
        raise InputError(f"{MANIFEST_NAME}: altered since it was written; convert again")
    return table


_RECORD: Mapping[str, Any] = {
    "name": str, "file": str, "offset": int, "bytes": int, "dtype": str, "shape": list, "format": str, "sources": list,
}  # fmt: skip


def _well_formed(table: JSON) -> bool:
    """Return whether the parts that verify relies on have the right types."""
    lists = all(isinstance(table.get(k), list) for k in ("tensors", "files", "left_out"))
    if not lists or not all(isinstance(table.get(k), str) for k in ("family", "layout", "plan", "recipe")):
        return False
    records = all(
        isinstance(r, dict) and all(isinstance(r.get(k), t) for k, t in _RECORD.items()) for r in table["tensors"]
    )
    told = all(isinstance(x, dict) and isinstance(x.get("tensor"), str) for x in table["left_out"])
    sources = records and all(isinstance(n, str) for r in table["tensors"] for n in r["sources"])
    parts = all(isinstance(table.get(k, {}), dict) for k in ("head", "source", "tool"))
    headers = parts and table.get("source", {}).get("files", [])
    known = isinstance(headers, list) and all(isinstance(f, dict) and isinstance(f.get("name"), str) for f in headers)
    files = all(isinstance(f, dict) and isinstance(f.get("name"), str) for f in table["files"])
    return told and sources and parts and known and files


def check_facts(table: JSON) -> None:
    """Raise `InputError` unless the parts that another folder's account is made from have the right types, too."""
    tensors, files = table["tensors"], table["files"]
    told: list[Any] = [table.get(k, []) for k in ("left_out", "files_left_out")]
    values: list[tuple[Any, Any]] = [(x, list) for x in told]
    values += [(x, dict) for t in told if isinstance(t, list) for x in t]
    values += [(v, str) for x, kind in values if kind is dict and isinstance(x, dict) for v in x.values()]
    values += [(r.get(k, t()), t) for r in tensors for k, t in _FACTS.items()]
    values += [(p, int | str) for r in tensors if isinstance(v := r.get("params"), dict) for p in v.values()]
    values += [(r.get("xxh3_128"), str | None) for r in tensors]
    values += [(f.get("sha256"), str | None) for f in files]
    heads = table.get("source", {}).get("files", [])
    values += [(f.get(k, t()), t) for f in [*files, *heads] for k, t in (("bytes", int), ("header_sha256", str))]
    if not all(isinstance(v, kind) for v, kind in values):
        raise InputError(f"{MANIFEST_NAME}: not a manifest that this version of ds4convert reads")


_FACTS: Mapping[str, type] = {"transform": str, "params": dict, "source_dtype": str}
