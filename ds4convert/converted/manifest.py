"""The manifest: the final account of every source tensor and every output file. Written last, by rename.

Holds no times, no machine names and no paths outside the folder, so equal inputs and options give equal bytes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from ds4convert.checkpoint.inventory import HEAD
from ds4convert.converted.records import DIGEST, VERSION, FileRecord, HeadRecord, Manifest, TensorRecord
from ds4convert.errors import InputError
from ds4convert.planning.types import Done, Loss, OutputFile, Place, Plan, RoundingError, SourceRecord, Step, Tool
from ds4convert.storage import strict_json
from ds4convert.storage.records import LENGTH_BYTES
from ds4convert.storage.safe_open import read_small
from ds4convert.storage.untrusted.fields import Fields
from ds4convert.words.project import version
from ds4convert.words.terminal import show

MANIFEST_NAME = "ds4convert_manifest.json"
VERIFY_NAME = "ds4convert_verify.json"
"""What `verify --mtp` measured, beside the manifest that it was measured for."""

MAX_BYTES = 100_000_000
MAX_NAME = 4096
"""Characters of a file's name with its folders, at most."""


def build(plan: Plan, steps: Mapping[int, Done], hashes: Mapping[int, str | None]) -> bytes:
    """Return the manifest's bytes for an executed plan: `steps` by number, `hashes` by file number."""
    made = Manifest(
        tool=Tool("ds4convert", version()),
        family=plan.family,
        head=HeadRecord(plan.head_kind, sum(s.part == HEAD for s in plan.steps)),
        recipe=plan.recipe,
        formats=plan.formats,
        layout=plan.layout,
        plan=plan.id,
        source=_source(plan),
        tensors=tuple(r for n, s in enumerate(plan.steps) for r in _records(plan, s, steps[n])),
        files=tuple(sorted(_files(plan, hashes), key=lambda f: f.name)),
        left_out=plan.left_out,
        files_left_out=plan.files_left_out,
        config_sha256=plan.config_sha256,
        chain=plan.chain,
    )
    return made.as_bytes()


def _files(plan: Plan, hashes: Mapping[int, str | None]) -> Iterator[FileRecord]:
    for n, f in enumerate(plan.files):
        yield FileRecord(f.name, f.size, hashes[n], _header_digest(f))
    small = {name: hashlib.sha256(text).hexdigest() for name, text in plan.texts.items()} | dict(plan.copies)
    for name, sha256 in small.items():
        yield FileRecord(name, len(plan.texts[name]) if name in plan.texts else None, sha256)


def _source(plan: Plan) -> Place:
    """Return where the tensors came from: repo and commit where known, files with what is known of them."""
    digests: Mapping[str, str] = plan.origin.digests if plan.origin else {}
    files = tuple(SourceRecord(s.name, s.size, s.header_sha256, digests.get(s.name)) for s in plan.sources)
    return Place(files, plan.origin.repo, plan.origin.revision) if plan.origin else Place(files)


def _header_digest(file: OutputFile) -> str:
    """Return the sha256 of a header's JSON, as `SourceFile` has it: what is checked with hashing off, too."""
    return hashlib.sha256(file.header[LENGTH_BYTES:]).hexdigest()


def _records(plan: Plan, step: Step, done: Done) -> Iterator[TensorRecord]:
    for n, (o, digest) in enumerate(zip(step.outputs, done.digests, strict=True)):
        yield TensorRecord(
            name=o.name,
            file=plan.files[o.file].name,
            offset=o.offset,
            size=o.size,
            dtype=o.dtype,
            shape=o.shape,
            format=step.format,
            part=step.part,
            role=step.role,
            layer=step.layer,
            sources=tuple(name for names in step.sources for name in names),
            source_dtype=step.source_dtype,
            transform=step.transform,
            params=step.params,
            xxh3_128=digest,
            error=_error(step, done.loss) if done.loss is not None and n == 0 else None,
        )


def _error(step: Step, loss: Loss) -> RoundingError:
    """Return what rounding cost, to six digits: more would differ between processors that sum in other orders."""
    bits = round(8 * sum(o.size for o in step.outputs) / step.weights, 6)
    return RoundingError(float(f"{loss.relative_square:.6g}"), float(f"{loss.max_abs:.6g}"), bits)


def is_missing(folder: Path) -> bool:
    """Return whether a folder has no manifest at all."""
    return not os.path.lexists(folder / MANIFEST_NAME)


def read(folder: Path) -> Manifest | None:
    """Return the manifest of a converted folder, or None when it has none.

    Raises `InputError` when there is one that is not ours, of a newer kind, or altered; a field that is not as it has
    to be is named.
    """
    if not (folder / MANIFEST_NAME).exists():
        return None
    return parsed(read_small(folder, MANIFEST_NAME, MAX_BYTES))


def parsed(raw: bytes) -> Manifest:
    """Return a manifest from its bytes. Raises `InputError` as `read` does."""
    table = strict_json.loads(raw, MANIFEST_NAME)
    if not isinstance(table, dict) or table.get("manifest_version") != VERSION:
        raise InputError(f"{MANIFEST_NAME}: not a manifest that this version of ds4convert reads")
    made = Manifest.read(Fields.of(table, MANIFEST_NAME, "convert again"))
    for name in (*(f.name for f in made.files), *(t.file for t in made.tensors)):
        if "\0" in name or len(name) > MAX_NAME:
            raise InputError(f"{MANIFEST_NAME}: names a file {show(name)}, which no file can be called")
    rest = {k: v for k, v in table.items() if k != DIGEST}
    if made.digest != strict_json.digest(rest) or strict_json.pretty(table) != raw:
        raise InputError(f"{MANIFEST_NAME}: altered since it was written", hint="convert again")
    return made
