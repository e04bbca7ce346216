"""Is a converted folder what its manifest, its config and its source say? Returns checks, prints nothing.

Level `structure`: finished, complete, unaltered (sha256 of every file), loadable (headers, index, quantization table),
and the head that the config promises is there. Level `source`: every tensor compared with the source's values.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

from ds4convert.checkpoint.folder import Checkpoint, read_checkpoint
from ds4convert.checkpoint.headers import parse_index
from ds4convert.checkpoint.types import TensorInfo
from ds4convert.converted import grouping, manifest, modules
from ds4convert.converted.folder import MlxFolder, read_mlx
from ds4convert.converted.records import FileRecord, Manifest
from ds4convert.errors import Ds4Error, InputError
from ds4convert.planning.config_files import INDEX_NAME
from ds4convert.planning.layouts import layouts
from ds4convert.planning.parts import Part, names_of
from ds4convert.storage.digests import feed, sha256_file
from ds4convert.storage.safe_open import read_small, resolve_inside
from ds4convert.storage.state_folder import STATE_FOLDER
from ds4convert.verification import strays
from ds4convert.verification.checks import Check, _some
from ds4convert.words.figures import Progress


def structure(
    path: Path,
    jobs: int = 2,
    progress: Progress = lambda n: None,
    as_it_is: bool = False,
    part: Part | None = None,
) -> list[Check]:
    """Return the checks that need nothing but the folder. Raises `InputError` when `path` is no folder.

    `as_it_is`: another program's folder is good as far as it is complete, as it is only to be run. With `part`, digests
    are taken of the files of that part alone.
    """
    if not path.is_dir():
        raise InputError(f"{path}: no such folder")
    try:
        record = manifest.read(path)
    except InputError as e:
        return [Check("finished", False, str(e))]
    checks = [_finished(path, record, as_it_is)]
    if record is None and (path / STATE_FOLDER).exists():
        return checks  # what is missing in an unfinished folder is not a fault of its own
    if record is not None:
        checks.append(Check("files", *_files(path, record)))
        checks.append(Check("digests", *_digests(path, record, jobs, progress, part)))
    try:
        checkpoint = read_checkpoint(path)
        if record is None and (why := modules.why_no_model(checkpoint)):
            return [Check("finished", False, why)]
        folder = _folder(path, checkpoint, record)
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


def _folder(path: Path, checkpoint: Checkpoint, record: Manifest | None) -> MlxFolder:
    """Return the folder with its tensors matched; without a manifest it may be spelled as another program does it."""
    if record is not None or (path / STATE_FOLDER).exists():
        return read_mlx(path, checkpoint)
    return modules.open_folder(path, checkpoint).folder


def _finished(path: Path, record: Manifest | None, as_it_is: bool) -> Check:
    if record is not None:
        return Check("finished", True, f"converted by ds4convert {record.tool.version}")
    if (path / STATE_FOLDER).exists():
        return Check("finished", False, "an unfinished conversion; repeat the command that wrote it to finish it")
    if as_it_is:
        return Check("finished", True, "another program's folder, taken as it is: nothing tells whether it was altered")
    return Check(
        "finished",
        False,
        f"no {manifest.MANIFEST_NAME}: another program wrote this folder, or its manifest was lost, so nothing tells "
        "whether it was altered. Written anew, with one, by: ds4convert relayout MLX_DIR OUT --layout inline",
    )


def _files(path: Path, record: Manifest) -> tuple[bool, str]:
    problems = []
    names = [f.name for f in record.files]
    for f in record.files:
        try:
            status = resolve_inside(path, f.name).stat()
        except (OSError, InputError):
            problems.append(f"{f.name}: missing")
            continue
        if f.size is not None and status.st_size != f.size:
            problems.append(f"{f.name}: {status.st_size} bytes, expected {f.size}")
    problems += [f"{n}: not in the manifest; hosts would load it" for n in strays.found(path, set(names))]
    return _some(problems, f"{len(names)} files, none missing, none to spare")


def _digests(path: Path, record: Manifest, jobs: int, progress: Progress, part: Part | None) -> tuple[bool, str]:
    mine = None if part is None else names_of({f.name: f.size or 0 for f in record.files}, part)
    files = [f for f in record.files if mine is None or f.name in mine]
    known = [f for f in files if f.sha256 is not None]

    def one(f: FileRecord) -> str | None:
        try:
            found = sha256_file(path, f.name, progress)
        except (OSError, Ds4Error):
            return None  # counted as missing by the check of files
        return None if found == f.sha256 else f"{f.name}: altered since it was written"

    with ThreadPoolExecutor(jobs) as pool:
        problems = [p for p in pool.map(one, known) if p]
    without = len(files) - len(known)
    note = f"; {without} written with --no-hash, not checked" if without else ""
    share = "" if part is None else f" (part {part}, of {len(record.files)})"
    return _some(problems, f"sha256 of {len(known)} files as written{share}{note}")


def _stored(folder: MlxFolder) -> Iterator[tuple[str, TensorInfo]]:
    for prefix, checkpoint in _folders(folder):
        for t in checkpoint.tensors():
            yield prefix + checkpoint.file_names[t.file], t


def _folders(folder: MlxFolder) -> list[tuple[str, Checkpoint]]:
    """Return the folder itself and the drafter's folder below it, if any, each with the prefix of its file names."""
    return [("", folder.checkpoint), *([("mtp/", folder.drafter)] if folder.drafter else [])]


def _against_manifest(folder: MlxFolder, record: Manifest) -> tuple[bool, str]:
    stored = {(file, t.name): t for file, t in _stored(folder)}
    problems = []
    for r in record.tensors:
        t = stored.pop((r.file, r.name), None)
        if t is None:
            problems.append(f"{r.name}: not in {r.file}")
        elif (t.dtype, t.shape, t.start, t.size) != (r.dtype, r.shape, r.offset, r.size):
            problems.append(f"{r.name}: {t.dtype} {list(t.shape)} is not what the manifest records")
    problems += [f"{name}: not in the manifest" for _, name in stored]
    heads = {prefix + f.name: f.header_sha256 for prefix, c in _folders(folder) for f in c.files}
    known = {f.name: f.header_sha256 for f in record.files if f.holds_tensors}
    problems += [f"{name}: its header was altered" for name, digest in known.items() if heads.get(name) != digest]
    return _some(problems, f"{len(record.tensors)} tensors where the manifest says")


def _inventory(folder: MlxFolder) -> tuple[bool, str]:
    problems = list(grouping.findings(folder.findings))
    names = set()
    for prefix, checkpoint in (("", folder.checkpoint), ("mtp/", folder.drafter)):
        if checkpoint is not None and checkpoint.has_index:
            where = prefix + INDEX_NAME
            names |= set(parse_index(read_small(checkpoint.path, INDEX_NAME), where))
        elif checkpoint is not None:
            problems.append(f"{prefix}{INDEX_NAME}: missing")
    return _some(problems, f"all {len(folder.view.tensors)} weights that config.json implies; index complete")


def _table(folder: MlxFolder) -> tuple[bool, str]:
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


def _head(folder: MlxFolder, record: Manifest | None) -> tuple[bool, str]:
    promised = folder.config.stages
    kind = folder.head_kind
    if kind == "none" and promised:
        return False, f"config.json promises a head of {promised} stage(s), but no tensor of one is here"
    recorded = record.head.kind if record else kind
    if kind != recorded:
        return False, f"the manifest records a {recorded} head, found {kind}"
    layout = layouts().get(record.layout) if record else None
    if layout is not None and kind != "none" and layout.promises_head and not promised:
        return (
            False,
            f"a {kind} head is stored, but config.json says that there is none; hosts will ignore it",
        )
    return True, "no head, and none promised" if kind == "none" else f"{kind} head present"


def altered_tensors(folder: Path, record: Manifest) -> list[str]:
    """Return the names of tensors whose bytes differ from their digest in the manifest (xxh3-128, where hashed).

    A tensor that only moved within its file is not altered.
    """
    import xxhash

    try:
        checkpoint = read_checkpoint(folder)
    except Ds4Error:
        return []
    found = {(checkpoint.file_names[t.file], t.name): t for t in checkpoint.tensors()}
    out = []
    with closing(checkpoint.bytes) as source:
        for r in record.tensors:
            t = found.get((r.file, r.name))
            if t is None or r.xxh3_128 is None:
                continue
            digest = xxhash.xxh3_128()
            feed(source, r.file, digest, start=t.start, size=t.size)
            if digest.hexdigest() != r.xxh3_128:
                out.append(t.name)
    return out
