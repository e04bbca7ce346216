"""Is a converted folder what its manifest, its config and its source say? Returns checks, prints nothing.

Level `structure`: finished, complete, unaltered (sha256 of every file), loadable (headers, index, quantization table),
and the head that the config promises is there. Level `source`: every tensor compared with the source's values.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ds4convert import compare, convert, logical, manifest, stored
from ds4convert import inventory as inventories
from ds4convert.convert import Source
from ds4convert.errors import Ds4Error, InputError
from ds4convert.folder import Checkpoint, open_file, read_checkpoint, read_small, resolve_inside
from ds4convert.headers import parse_index
from ds4convert.journal import STATE_FOLDER
from ds4convert.layouts import layouts
from ds4convert.plan import INDEX_NAME
from ds4convert.types import JSON, SourceFile, TensorInfo

SHOWN = 5
HASH_CHUNK = 4 << 20
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Check:
    """One question and its answer in words."""

    name: str
    ok: bool
    detail: str

    def as_json(self) -> JSON:
        """Return the check under the keys of the command line contract."""
        return {"name": self.name, "ok": self.ok, "detail": self.detail}


def _some(problems: list[str], good: str) -> tuple[bool, str]:
    """Return (ok, text): `good`, or the first problems and how many more there are."""
    if not problems:
        return True, good
    more = f" (and {len(problems) - SHOWN} more)" if len(problems) > SHOWN else ""
    return False, "; ".join(problems[:SHOWN]) + more


def structure(path: Path, jobs: int = 2, progress: Progress = lambda n: None) -> list[Check]:
    """Return the checks that need nothing but the folder. Raises `InputError` when `path` is no folder."""
    if not path.is_dir():
        raise InputError(f"{path}: no such folder")
    try:
        record = manifest.read(path)
    except InputError as e:
        return [Check("finished", False, str(e))]
    checks = [_finished(path, record)]
    if record is not None:
        checks.append(Check("files", *_files(path, record)))
        checks.append(Check("digests", *_digests(path, record, jobs, progress)))
    try:
        checkpoint = read_checkpoint(path)
        if record is None and checkpoint.config is not None and not logical.is_mlx(checkpoint):
            return [Check("finished", False, "not a converted folder; convert it first: ds4convert quantize SRC OUT")]
        folder = logical.read_mlx(path, checkpoint)
    except Ds4Error as e:
        return [*checks, Check("headers", False, str(e))]
    count = sum(len(h.tensors) for h in checkpoint.headers)
    checks.append(Check("headers", True, f"{count} tensors in {len(checkpoint.files)} files"))
    if record is not None:
        checks.append(Check("manifest", *_against_manifest(folder, record)))
    checks.append(Check("inventory", *_inventory(folder)))
    checks.append(Check("quantization table", *_table(folder)))
    checks.append(Check("head", *_head(folder, record)))
    return checks


def _finished(path: Path, record: JSON | None) -> Check:
    if record is not None:
        return Check("finished", True, f"converted by ds4convert {record.get('tool', {}).get('version', '?')}")
    if (path / STATE_FOLDER).exists():
        return Check("finished", False, "an unfinished conversion; repeat the command that wrote it to finish it")
    return Check("finished", False, f"no {manifest.MANIFEST_NAME}; this folder was not written by ds4convert")


def _files(path: Path, record: JSON) -> tuple[bool, str]:
    problems = []
    names = [f["name"] for f in record["files"]]
    for f in record["files"]:
        try:
            status = resolve_inside(path, f["name"]).stat()
        except (OSError, InputError):
            problems.append(f"{f['name']}: missing")
            continue
        if "bytes" in f and status.st_size != f["bytes"]:
            problems.append(f"{f['name']}: {status.st_size} bytes, expected {f['bytes']}")
    problems += [f"{n}: not in the manifest; hosts would load it" for n in _strays(path, set(names))]
    return _some(problems, f"{len(names)} files, none missing, none to spare")


def _strays(path: Path, names: set[str]) -> list[str]:
    """Return the safetensors files that the manifest does not name, in the folder itself and in a drafter's."""
    found = []
    for prefix in ("", "mtp/"):
        folder = path / prefix
        if folder.is_dir():
            found += [prefix + e.name for e in os.scandir(folder) if e.name.endswith(".safetensors")]
    return sorted(set(found) - names)


def sha256_file(path: Path, name: str, progress: Progress = lambda n: None) -> str:
    """Return the sha256 hex digest of a file of the folder, read in pieces."""
    digest = hashlib.sha256()
    fd = open_file(resolve_inside(path, name), name)
    with os.fdopen(fd, "rb", buffering=0) as f:
        buffer = memoryview(bytearray(HASH_CHUNK))
        while n := f.readinto(buffer):
            digest.update(buffer[:n])
            progress(n)
    return digest.hexdigest()


def _digests(path: Path, record: JSON, jobs: int, progress: Progress) -> tuple[bool, str]:
    known = [f for f in record["files"] if isinstance(f.get("sha256"), str)]

    def one(f: JSON) -> str | None:
        try:
            found = sha256_file(path, f["name"], progress)
        except (OSError, Ds4Error):
            return None  # counted as missing by the check of files
        return None if found == f["sha256"] else f"{f['name']}: altered since it was written"

    with ThreadPoolExecutor(jobs) as pool:
        problems = [p for p in pool.map(one, known) if p]
    without = len(record["files"]) - len(known)
    note = f"; {without} written with --no-hash, not checked" if without else ""
    return _some(problems, f"sha256 of {len(known)} files as written{note}")


def _stored(folder: logical.MlxFolder) -> Iterator[tuple[str, TensorInfo]]:
    for prefix, checkpoint in _folders(folder):
        for t in checkpoint.tensors():
            yield prefix + checkpoint.file_names[t.file], t


def _folders(folder: logical.MlxFolder) -> list[tuple[str, Checkpoint]]:
    """Return the folder itself and the drafter's folder below it, if any, each with the prefix of its file names."""
    return [("", folder.checkpoint), *([("mtp/", folder.drafter)] if folder.drafter else [])]


def _against_manifest(folder: logical.MlxFolder, record: JSON) -> tuple[bool, str]:
    stored = {(file, t.name): t for file, t in _stored(folder)}
    problems = []
    for r in record["tensors"]:
        t = stored.pop((r["file"], r["name"]), None)
        if t is None:
            problems.append(f"{r['name']}: not in {r['file']}")
        elif (t.dtype, list(t.shape), t.start, t.size) != (r["dtype"], r["shape"], r["offset"], r["bytes"]):
            problems.append(f"{r['name']}: {t.dtype} {list(t.shape)} is not what the manifest records")
    problems += [f"{name}: not in the manifest" for _, name in stored]
    heads = {prefix + f.name: f.header_sha256 for prefix, c in _folders(folder) for f in c.files}
    known = {f["name"]: f.get("header_sha256") for f in record["files"] if "header_sha256" in f}
    problems += [f"{name}: its header was altered" for name, digest in known.items() if heads.get(name) != digest]
    return _some(problems, f"{len(record['tensors'])} tensors where the manifest says")


def _inventory(folder: logical.MlxFolder) -> tuple[bool, str]:
    problems = [str(f) for f in folder.findings]
    names = set()
    for prefix, checkpoint in (("", folder.checkpoint), ("mtp/", folder.drafter)):
        if checkpoint is not None and checkpoint.has_index:
            where = prefix + INDEX_NAME
            names |= set(parse_index(read_small(checkpoint.path, INDEX_NAME), where))
        elif checkpoint is not None:
            problems.append(f"{prefix}{INDEX_NAME}: missing")
    return _some(problems, f"all {len(folder.view.tensors)} weights that config.json implies; index complete")


def _table(folder: logical.MlxFolder) -> tuple[bool, str]:
    """Every module stored with scales is listed, and nothing else is (spellings of another host apart)."""
    table, problems = folder.table, []
    entries = {k for k, v in table.items() if isinstance(v, dict)}
    names = {t.name for t in folder.checkpoint.tensors()}
    stems = {n.removesuffix(".scales") for n in names if n.endswith(".scales")}
    problems += [f"{s}: stored with scales, not listed" for s in sorted(stems - entries)]
    dense = {n.removesuffix(".weight") for n in names if n.endswith(".weight")} - stems
    problems += [f"{s}: listed, but stored dense" for s in sorted(entries & dense)]
    if folder.config.raw.get("quantization_config", table) != table:
        problems.append("quantization and quantization_config differ; hosts read one or the other")
    return _some(problems, f"{len(stems)} quantized modules, all listed")


def _head(folder: logical.MlxFolder, record: JSON | None) -> tuple[bool, str]:
    promised = folder.config.stages
    kind = folder.head_kind
    if kind == "none" and promised:
        return False, f"config.json promises a head of {promised} stage(s), but no tensor of one is here"
    recorded = (record or {}).get("head", {}).get("kind", kind)
    if kind != recorded:
        return False, f"the manifest records a {recorded} head, found {kind}"
    layout = layouts().get((record or {}).get("layout", ""))
    if layout is not None and kind != "none" and layout.promises_head and not promised:
        return (
            False,
            f"a {kind} head is stored, but config.json says that there is none; hosts will ignore it",
        )
    return True, "no head, and none promised" if kind == "none" else f"{kind} head present"


def against_source(
    path: Path, source: Path | Source, jobs: int = 2, progress: Progress = lambda n: None
) -> list[Check]:
    """Return the checks of every tensor of the folder against a source checkpoint: its folder, or one opened.

    Where the format keeps the source's codes, codes and values both have to be equal; a dequantized tensor has to be
    the correctly rounded value; a quantized one has to be as far from the source as the manifest records.
    """
    opened = _opened(source)
    try:
        record = manifest.read(path)
        folder = logical.read_mlx(path)
        views = _views(folder)
    except InputError as e:
        return [Check("values", False, f"cannot be compared with the source: {e}")]
    checks = []
    if record is not None:
        checks.append(Check("source headers", *_same_source(record, opened)))
        checks.append(Check("left out", *_left_out(record, opened)))
    wanted = opened.view
    for name, view in views:
        ours = _without_head(wanted) if folder.head_kind == "none" else wanted
        if name:
            head = {k: t for k, t in ours.tensors.items() if t.part == inventories.HEAD}
            ours = dataclasses.replace(ours, tensors=head)
        checks.append(Check(f"values{name}", *_values(ours, view, _losses(record), jobs, progress)))
    return checks


@dataclass(frozen=True)
class Opened:
    """What a folder is compared with: files and tensors by their headers, and the view of its values."""

    files: Sequence[SourceFile]
    tensors: Sequence[str]
    view: logical.View


def _opened(path: Path | Source) -> Opened:
    """Return an official checkpoint, or (the source of `--from-mlx`) a converted folder, opened."""
    if isinstance(path, Source):
        return _opened_source(path)
    if path.is_dir() and logical.is_mlx(read_checkpoint(path)):
        base = stored.read(path)
        names = [name for m in base.modules for p in m.parts for name in p.names]
        return Opened(base.files, names, base.folder.view)
    return _opened_source(convert.open_source(path))


def _opened_source(source: Source) -> Opened:
    view = logical.source_view(source.checkpoint, source.inventory, source.named, source.remote)
    return Opened(source.checkpoint.files, [t.name for t in source.checkpoint.tensors()], view)


Losses = Mapping[tuple[str, str], JSON]
"""What the manifest records of rounding, by (file, tensor)."""


def _losses(record: JSON | None) -> Losses:
    found = [(r, r.get("error")) for r in (record or {}).get("tensors", [])]
    return {(r["file"], r["name"]): error for r, error in found if isinstance(error, dict)}


def _views(folder: logical.MlxFolder) -> list[tuple[str, logical.View]]:
    """Return the folder's tensors, and those of a second copy of the head, each under the name of its check."""
    out = [("", folder.view)]
    second = logical.second_head(folder)
    return out + ([(" of the head in mtp/", second)] if second else [])


def _without_head(view: logical.View) -> logical.View:
    kept = {k: t for k, t in view.tensors.items() if t.part != inventories.HEAD}
    return dataclasses.replace(view, tensors=kept)


def _same_source(record: JSON, source: Opened) -> tuple[bool, str]:
    recorded = {f.get("name"): f.get("header_sha256") for f in record.get("source", {}).get("files", [])}
    found = {f.name: f.header_sha256 for f in source.files}
    return _some(
        [
            f"{n}: not the file that was converted"
            for n in sorted({**recorded, **found})
            if recorded.get(n) != found.get(n)
        ],
        f"{len(found)} files, headers as recorded",
    )


def _left_out(record: JSON, source: Opened) -> tuple[bool, str]:
    """Every source tensor is either in a record of the manifest or left out with a reason."""
    told = {n for r in record["tensors"] for n in r["sources"]} | {x.get("tensor") for x in record["left_out"]}
    problems = [f"{name}: neither written nor left out" for name in source.tensors if name not in told]
    return _some(problems, f"every source tensor accounted for, {len(record['left_out'])} left out with a reason")


def _values(
    wanted: logical.View, found: logical.View, losses: Losses, jobs: int, progress: Progress
) -> tuple[bool, str]:
    problems, equal, rounded, worst = [], 0, 0, 0.0
    for key, a, b, d in compare.compare_views(wanted, found, jobs, progress):
        loss = losses.get((b.file, b.name)) if b is not None else None
        if loss is not None and d.status in {"same", "value"}:
            rounded, worst = rounded + 1, max(worst, d.relative_square)
            if not _as_recorded(d, loss):
                problems.append(
                    f"{key} ({b.file if b else ''}): error {d.relative_square:.3g} (squared, relative), at most "
                    f"{d.max_abs:.3g}; recorded {loss.get('relative_square')} and {loss.get('max_abs')}"
                )
            continue
        if d.status == "same" or _correctly_rounded(a, b, d):
            equal += 1
            continue
        if d.status == "missing":
            problems.append(f"{key}: {'not in the folder' if b is None else 'not in the source'}")
        elif d.status == "shape":
            problems.append(f"{key}: shapes {d.detail}")
        else:
            place = list(d.first or ())
            problems.append(f"{key} ({b.file if b else ''}): differs first at {place}, by up to {d.max_abs:.3g}")
    text = f"{equal} weights equal to the source, value for value"
    if rounded:
        text += f"; {rounded} rounded with the error that is recorded, {worst:.3g} (squared, relative) at most"
    return _some(problems, text)


RECORDED_WITHIN = 1e-3
"""Relative difference between a recorded error and one found, for processors that sum in other orders."""


def _as_recorded(d: compare.Difference, loss: JSON) -> bool:
    """Return whether a tensor is as far from its source as the manifest says."""
    pairs = ((d.relative_square, loss.get("relative_square")), (d.max_abs, loss.get("max_abs")))
    return all(isinstance(b, int | float) and math.isclose(a, b, rel_tol=RECORDED_WITHIN) for a, b in pairs)


def _correctly_rounded(a: logical.Logical | None, b: logical.Logical | None, d: compare.Difference) -> bool:
    """Return whether all of a difference is BF16's rounding of values that BF16 does not have (deep subnormals)."""
    if a is None or b is None or a.store not in {"fp8", "fp4"} or b.store != "bf16" or d.status != "value":
        return False
    return d.max_abs <= 2.0**-134  # half a step of BF16's subnormals: the only inexact case


def work(path: Path, with_source: bool) -> int:
    """Return about how many bytes the checks will read, for a progress bar."""
    total = sum(f.stat().st_size for f in path.glob("**/*.safetensors") if f.is_file()) if path.is_dir() else 0
    return total * (2 if with_source else 1)


def as_json(checks: list[Check]) -> Mapping[str, object]:
    """Return the result under the keys of the command line contract."""
    return {"ok": all(c.ok for c in checks), "checks": [c.as_json() for c in checks]}
