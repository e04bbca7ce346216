"""A checkpoint on disk: which files it has and what their headers say. Reads only; trusts nothing.

Owns the rules for what may be opened: plain files inside the folder (a link may stay inside it; the Hub cache's
own links from `snapshots/REV/` to `blobs/` are known and allowed), named by the index if there is one.
"""

from __future__ import annotations

import hashlib
import os
import shlex
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from ds4convert.checkpoint import advice, headers
from ds4convert.checkpoint.config import MAX_TENSORS
from ds4convert.checkpoint.family import mlx_marks
from ds4convert.checkpoint.published import placement
from ds4convert.checkpoint.types import Header, LeftOut, TensorInfo
from ds4convert.errors import ConfigError, HeaderError, InputError, naming
from ds4convert.storage.byte_source import ByteSource, are_here
from ds4convert.storage.local_files import LocalFiles
from ds4convert.storage.records import LENGTH_BYTES, SourceFile
from ds4convert.storage.safe_open import names_in, read_small, safetensors_in
from ds4convert.storage.state_folder import is_begun
from ds4convert.storage.untrusted.lookalikes import other_format
from ds4convert.words.terminal import show

INDEX_NAME = "model.safetensors.index.json"
CONFIG_NAME = "config.json"
TEMPLATE_NAME = "chat_template.jinja"
MAX_FILES = 10_000
UNFINISHED = "; it is unfinished: repeat the command that wrote it, then this one"
Raw = bytes


@dataclass(frozen=True)
class Checkpoint:
    """All headers of a checkpoint. `TensorInfo.file` indexes `files`; `config` is the raw config.json, if any.

    `bytes` is what reads its files, by the names that they have in `files`. `left_out` are copies of tensors in other
    files than the index says, and tensors that it does not name (`unindexed`); they are in no header here.
    """

    path: Path
    files: tuple[SourceFile, ...]
    headers: tuple[Header, ...]
    config: Raw | None
    has_index: bool
    bytes: ByteSource
    left_out: tuple[LeftOut, ...] = ()
    unindexed: tuple[TensorInfo, ...] = ()

    def tensors(self) -> Iterable[TensorInfo]:
        """Yield every tensor of every file."""
        for header in self.headers:
            yield from header.tensors

    @property
    def is_here(self) -> bool:
        """Return whether the files are on drives of this machine; else its folder has the small ones alone."""
        return are_here(self.bytes, self.file_names)

    @property
    def file_names(self) -> tuple[str, ...]:
        """Return the names of the safetensors files, in the order of `TensorInfo.file`."""
        return tuple(f.name for f in self.files)


@naming(file="name")
def read_header(source: ByteSource, name: str, file: int = 0) -> tuple[SourceFile, Header]:
    """Return the facts and the validated header of one safetensors file; `file` becomes `TensorInfo.file`."""
    size = source.size(name)
    prefix = source.read(name, 0, min(LENGTH_BYTES, size))
    raw = _read_json(source, name, headers.header_length(prefix, size, name), prefix)
    return SourceFile(name, size, hashlib.sha256(raw).hexdigest()), headers.parse_header(raw, size, name, file)


def header_at(path: Path) -> tuple[SourceFile, Header]:
    """Return the facts and the validated header of a file here."""
    with closing(LocalFiles.at(path)) as files:
        return read_header(files, path.name)


def _read_json(source: ByteSource, name: str, length: int, prefix: Raw) -> Raw:
    """Return the header, giving up at the first piece that cannot be JSON: a huge sparse file costs nothing."""
    pieces: list[bytes] = []
    for piece in source.pieces(name, LENGTH_BYTES, length):
        if (not pieces and not piece.startswith(b"{")) or b"\0" in piece:
            other = headers.lookalike(prefix) or "the header is not JSON text; this is not a safetensors file"
            raise HeaderError(f"{name}: {other}")
        pieces.append(piece)
    return b"".join(pieces)


def _check_kind(path: Path) -> None:
    """Raise `InputError` for one of the small files of a checkpoint: its folder is meant, or its config alone."""
    if path.suffix not in {".json", ".jinja", ".txt", ".md"} or path.name.startswith("."):
        return
    folder = shlex.quote(str(path.parent))
    alone = f", or give the config alone: --config {shlex.quote(str(path))}" if advice.offers("--config") else ""
    raise InputError(
        f"{show(str(path), 4096)}: is one of the small files beside a checkpoint, and holds no tensors",
        file=str(path),
        hint=f"name the folder: {folder}{alone if path.name == CONFIG_NAME else ''}",
    )


def read_checkpoint(
    path: Path, source: ByteSource | None = None, listed: list[str] | None = None, head_alone: bool = False
) -> Checkpoint:
    """Return the headers of the checkpoint at `path`: a folder, or a single .safetensors file.

    `source` and `listed` are given where the shards lie elsewhere: what reads them, and which there are. `head_alone`:
    the files with the head are enough where the index names others that are not there.

    With an index, its files are read, and it says which tensors there are and which file each is in: others are told
    as left out (in a source; a converted folder has none). A head in a file outside the index is read as well. Without
    an index, every `*.safetensors` of the folder is read. Raises `InputError` (or a kind of it) before anything else
    is done with the checkpoint.
    """
    if not path.exists():
        raise InputError(f"{show(str(path))}: no such file or folder", file=str(path))
    if path.is_file():
        _check_kind(path)
        file, header = header_at(path)
        return Checkpoint(path.parent, (file,), (header,), None, False, LocalFiles.at(path))
    index = _read_index(path)
    there = safetensors_in(path) if listed is None else listed
    if index is not None:
        index = placement.reachable(index, there, head_alone)
    names = sorted(set(index.values())) if index is not None else there
    if not names:
        nothing = UNFINISHED if is_begun(path) else "; is this a checkpoint folder?"
        other = other_format(names_in(path)) or nothing
        raise InputError(f"{show(str(path))}: holds no .safetensors file{other}", file=str(path))
    if len(names) > MAX_FILES:
        raise InputError(f"{show(str(path))}: names {len(names)} files, expected at most {MAX_FILES}")
    with closing(source or LocalFiles.of(path, {*names, *there})) as files:
        return _read_files(path, files, names, index, there, head_alone)


def _read_files(
    path: Path, source: ByteSource, names: list[str], index: dict[str, str] | None, there: list[str], head_alone: bool
) -> Checkpoint:
    pairs: list[tuple[SourceFile, Header]] = []
    count = 0
    for at, name in enumerate(names):
        pairs.append(read_header(source, name, at))
        count += len(pairs[-1][1].tensors)
        if count > MAX_TENSORS:
            raise HeaderError(f"{name}: with it there are {count} tensors, expected at most {MAX_TENSORS}")
    is_source = not os.path.lexists(path / MANIFEST_FILE)
    if index is not None and is_source and count < MAX_TENSORS:
        head = _head_outside(index, [n for n in there if n not in set(names)], source, len(pairs))
        if head is not None:
            pairs.append(head)
            index |= {t.name: head[0].name for t in head[1].tensors}
    sources, found = tuple(s for s, _ in pairs), tuple(h for _, h in pairs)
    config, names = _config(path), [s.name for s in sources]
    settled = placement.settle(found, tuple(names), index, is_source, head_alone)
    told = placement.left_out(settled, tuple(names))
    return Checkpoint(path, sources, settled.headers, config, index is not None, source, told, settled.unindexed)


MANIFEST_FILE = "ds4convert_manifest.json"


def _head_outside(
    index: dict[str, str], others: list[str], source: ByteSource, at: int
) -> tuple[SourceFile, Header] | None:
    """Return the file beside the index that holds a head, and nothing else, where the index knows of none.

    Programs that add a head to a repo leave it in `mtp.safetensors`, outside the index. Other files are not looked
    into where looking is a request, and one that cannot be read is none of the checkpoint's.
    """
    if not placement.may_lack_a_head(index):
        return None
    for name in others:
        if source.fileno(name) is None and "mtp" not in name.lower():
            continue
        try:
            file, header = read_header(source, name, at)
        except InputError:
            continue
        if placement.is_head_alone(header):
            return file, header
    return None


def _read_index(path: Path) -> dict[str, str] | None:
    if not os.path.lexists(path / INDEX_NAME):
        return None
    return headers.parse_index(read_small(path, INDEX_NAME), INDEX_NAME)


def _config(path: Path) -> bytes | None:
    return read_small(path, CONFIG_NAME) if os.path.lexists(path / CONFIG_NAME) else None


def need_config(found: Checkpoint) -> bytes:
    """Return the raw config.json. Raises `ConfigError` when the folder has none."""
    if found.config is None:
        raise ConfigError(
            f"{CONFIG_NAME}: missing in {show(str(found.path))}; download it again",
            file=CONFIG_NAME,
            hint="download it again",
        )
    return found.config


def is_mlx(checkpoint: Checkpoint) -> bool:
    """Return whether a folder is in MLX's spelling: stacked experts, names that only it has, packed matrices.

    The Transformers namespace shares `model.layers.N.attn_hc.` and `lm_head` with it, so these tell nothing.
    """
    parts, names = mlx_marks()
    packed = {t.name.removesuffix("weight") + "scales" for t in checkpoint.tensors() if t.dtype == "U32"}
    whole = names | packed
    return any(t.name in whole or any(part in t.name for part in parts) for t in checkpoint.tensors())
