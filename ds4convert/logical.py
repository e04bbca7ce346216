"""Checkpoints as logical tensors: the same weight under one key, however a folder spells, stacks and packs it.

Owns the reading back of source and converted folders for `verify`, `diff` and `inspect`. Keys are MLX paths, with
the head under `mtp.N.`. Values are decoded with the tables of `formats`, not with the transforms that wrote them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ds4convert import strictjson
from ds4convert.config import ModelConfig, parse_config
from ds4convert.errors import HeaderError, InputError
from ds4convert.folder import CONFIG_NAME, Checkpoint, need_config, open_file, read_checkpoint, resolve_inside
from ds4convert.formats import blocks, scalars
from ds4convert.formats import encode as encoding
from ds4convert.formats.codecs import CODECS, WORD_BITS, Codec
from ds4convert.headers import DTYPE_BYTES
from ds4convert.inventory import (
    BACKBONE,
    HEAD,
    Inventory,
    Module,
    Named,
    Storage,
    expand,
    fused_name,
)
from ds4convert.layouts import HeadPlace, backbone_name, key_of, layouts
from ds4convert.types import JSON, ByteRange, Finding, TensorInfo
from ds4convert.window import Blocks, Remote

ROWS_BYTES = 8 << 20
U8 = scalars.U8


@dataclass(frozen=True, slots=True)
class Logical:
    """One logical tensor: `matrices` slices (experts) of `[rows, cols]`, each found at one byte range.

    `store` is how values lie in those bytes: fp4 (also mxfp4), fp8 (tiles), mxfp8, another codec's name, or a plain
    dtype in lower case. `bias_at` is empty but for affine codecs.
    """

    key: str
    name: str
    file: str
    shape: tuple[int, ...]
    rows: int
    cols: int
    store: str
    weight_at: tuple[ByteRange, ...]
    scale_at: tuple[ByteRange, ...]
    tile: tuple[int, int]
    part: str
    role: str
    layer: int | None
    size: int
    bias_at: tuple[ByteRange, ...] = ()

    @property
    def codec(self) -> Codec | None:
        """Return the codec of a tensor in groups, None for plain tensors and the source's own tiles."""
        return CODECS.get("mxfp4" if self.store == "fp4" else self.store)

    @property
    def matrices(self) -> int:
        """Return the number of slices."""
        return len(self.weight_at)

    @property
    def label(self) -> str:
        """Return the format as people call it."""
        return {"fp4": "fp4", "fp8": "fp8"}.get(self.store, self.store)

    def row_bytes(self) -> int:
        """Return the bytes of one row of codes."""
        return self.weight_at[0].size // self.rows


class Reader:
    """Open files of one checkpoint (and its drafter folder), read by range; those of a remote one by request."""

    def __init__(self, paths: list[tuple[Path, str]], remote: Remote | None = None) -> None:
        self._names = [name for _, name in paths]
        self._blocks = Blocks(remote, self._names) if remote else None
        self.fds = [] if remote else [open_file(resolve_inside(folder, name), name) for folder, name in paths]

    def get(self, r: ByteRange, start: int, size: int) -> bytes:
        """Return `size` bytes from `start` within the range `r`."""
        if self._blocks is not None:
            return self._blocks.get(r, start, size)
        data = os.pread(self.fds[r.file], size, r.offset + start)
        if len(data) != size:
            raise HeaderError(f"{self._names[r.file]}: ends before byte {r.offset + start + size}")
        return data

    def close(self) -> None:
        """Close all files."""
        for fd in self.fds:
            os.close(fd)


@dataclass(frozen=True)
class View:
    """All logical tensors of a folder by key, with what opens their bytes."""

    kind: str
    tensors: Mapping[str, Logical]
    paths: tuple[tuple[Path, str], ...]
    unknown: tuple[TensorInfo, ...] = ()
    remote: Remote | None = None

    def reader(self) -> Reader:
        """Return an open reader; the caller closes it."""
        return Reader(list(self.paths), self.remote)


def codes(view: Logical, reader: Reader, matrix: int, first: int, rows: int) -> U8:
    """Return the stored codes of some rows of one slice, uint8 `[rows, row_bytes]`."""
    width = view.row_bytes()
    raw = reader.get(view.weight_at[matrix], first * width, rows * width)
    return np.frombuffer(raw, np.uint8).reshape(rows, width)


@dataclass(frozen=True)
class Grid:
    """Scales of one slice, and biases where its codec has them: uint8, or uint16 (BF16 bits), one row per row."""

    scales: np.ndarray
    biases: scalars.U16 | None = None

    def equals(self, other: Grid, rows: slice) -> bool:
        """Return whether some rows of both are the same bytes."""
        pairs = ((self.scales, other.scales), (self.biases, other.biases))
        return all(a is b or (a is not None and b is not None and np.array_equal(a[rows], b[rows])) for a, b in pairs)


def grid_of(view: Logical, reader: Reader, matrix: int) -> Grid | None:
    """Return all scales (and biases) of one slice, `[scale rows, scale columns]`; None for a plain tensor."""
    if not view.scale_at:
        return None
    codec = view.codec
    width = -(-view.cols // view.tile[1]) if codec is None else view.cols // codec.group_size
    dtype = "<u2" if codec is not None and codec.scale_dtype == "BF16" else np.uint8
    read = [np.frombuffer(reader.get(at[matrix], 0, at[matrix].size), dtype).reshape(-1, width)
            for at in (view.scale_at, view.bias_at) if at]  # fmt: skip
    return Grid(*read)


def decode(view: Logical, packed: U8, grid: Grid | None, first: int) -> np.ndarray:
    """Return the values of some rows (beginning at `first`) from codes and all scales of their slice (`grid_of`).

    float32, but integers as they are, and F64 as float64.
    """
    if grid is not None:
        rows, codec = slice(first, first + packed.shape[0]), view.codec
        if codec is None:
            return blocks.decode_fp8(packed, grid.scales, first, view.tile)
        if codec.name == "mxfp4":
            return blocks.decode_fp4(packed, grid.scales[rows])
        if codec.name == "mxfp8":
            return blocks.decode_mxfp8(packed, grid.scales[rows])
        biases = None if grid.biases is None else grid.biases[rows]
        values: np.ndarray = encoding.decode(codec, packed.view("<u4"), grid.scales[rows], biases)
        return values
    if view.store == "bf16":
        return scalars.bf16_values(packed.view("<u2"))
    dtype = {"f32": "<f4", "f16": "<f2", "i64": "<i8", "i32": "<i4", "u32": "<u4", "f64": "<f8"}.get(view.store)
    return packed.view(dtype) if dtype else packed


def row_chunks(view: Logical) -> Iterator[tuple[int, int, int]]:
    """Yield (slice, first row, rows) in pieces whose float32 values take about 8 MB."""
    step = max(1, ROWS_BYTES // max(view.cols * 4, 1))
    for matrix in range(view.matrices):
        for first in range(0, view.rows, step):
            yield matrix, first, min(step, view.rows - first)


def _geometry(module: Module) -> tuple[tuple[int, ...], int, int]:
    shape = (module.experts, *module.shape) if module.experts else module.shape
    cols = module.shape[-1]
    return shape, math.prod(module.shape) // cols, cols


def source_view(checkpoint: Checkpoint, inventory: Inventory, named: Named, remote: Remote | None = None) -> View:
    """Return the logical tensors of a source, whose bytes `remote` fetches, if any; no module that lacks a tensor."""
    out: dict[str, Logical] = {}
    for module in inventory.modules:
        found = _source_ranges(module, named)
        if found is None:
            continue
        weight, scale, info = found
        shape, rows, cols = _geometry(module)
        store = module.store if module.has_scale else info.dtype.lower()
        size = sum(r.size for r in (*weight, *scale))
        out[key_of(module)] = Logical(
            key_of(module), info.name, checkpoint.file_names[info.file], shape, rows, cols, store,
            weight, scale, module.tile, module.part, module.role, module.block, size,
        )  # fmt: skip
    paths = tuple((checkpoint.path, n) for n in checkpoint.file_names)
    return View("source", out, paths, remote=remote)


def _source_ranges(
    module: Module, named: Named
) -> tuple[tuple[ByteRange, ...], tuple[ByteRange, ...], TensorInfo] | None:
    if module.fused is not None:
        return _fused_ranges(module, named)
    experts = range(module.experts or 1)
    weights = [named.tensors.get(module.weight_name(e)) for e in experts]
    found_scales = [named.tensors.get(module.scale_name(e)) for e in experts] if module.has_scale else []
    whole = [t for t in [*weights, *found_scales] if t is not None]
    if len(whole) < len(weights) + len(found_scales):
        return None
    ranges = [ByteRange(t.file, t.start, t.size) for t in whole]
    return tuple(ranges[: len(weights)]), tuple(ranges[len(weights) :]), whole[0]


def _fused_ranges(
    module: Module, named: Named
) -> tuple[tuple[ByteRange, ...], tuple[ByteRange, ...], TensorInfo] | None:
    assert module.fused is not None
    parts = len(module.fused.parts)
    at = module.fused.parts.index(module.name.rpartition(".")[2])
    out = []
    for suffix in ("", module.fused_scale) if module.has_scale else ("",):
        info = named.tensors.get(fused_name(module) + suffix)
        if info is None:
            return None
        each = info.size // (module.experts * parts)
        starts = [info.start + (e * parts + at) * each for e in range(module.experts)]
        out.append((tuple(ByteRange(info.file, s, each) for s in starts), info))
    return out[0][0], out[1][0] if len(out) > 1 else (), out[0][1]


# --- converted folders ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MlxFolder:
    """A converted folder: its config, its tensors (those of a drafter folder too), and the head found in it."""

    path: Path
    config: ModelConfig
    table: JSON
    checkpoint: Checkpoint
    drafter: Checkpoint | None
    head_kind: str
    place: HeadPlace | None
    view: View
    findings: tuple[Finding, ...]


def is_mlx(checkpoint: Checkpoint) -> bool:
    """Return whether a folder is in MLX's spelling: it alone stacks experts under `switch_mlp`, or names hc_head so.

    The Transformers namespace shares `model.layers.N.attn_hc.` and `lm_head` with it, so these tell nothing.
    """
    return any(_MLX_ONLY in t.name or t.name in _MLX_ROOT for t in checkpoint.tensors())


_MLX_ONLY, _MLX_ROOT = ".ffn.switch_mlp.", {"model.hc_head.fn", "model.hc_head.base", "model.hc_head.scale"}


def read_mlx(
    path: Path, checkpoint: Checkpoint | None = None, drafter: Checkpoint | None = None, lenient: bool = False
) -> MlxFolder:
    """Return the converted folder at `path`, every tensor matched with what its config implies.

    `checkpoint` and `drafter` are its headers where they have been read already. `lenient`: BF16 may stand where F32
    is expected.

    Differences are in `findings`. Raises `InputError` where headers, index or config cannot be read.
    """
    checkpoint = checkpoint or read_checkpoint(path)
    config = parse_config(need_config(checkpoint), CONFIG_NAME, is_mlx=True)
    if drafter is None and (path / "mtp" / CONFIG_NAME).is_file():
        drafter = read_checkpoint(path / "mtp")
    table = config.raw.get("quantization") or {}
    if not isinstance(table, dict):
        raise InputError(f"{CONFIG_NAME}: quantization is not a table")
    return _match(path, config, table, checkpoint, drafter, lenient)


def _match(
    path: Path, config: ModelConfig, table: JSON, checkpoint: Checkpoint, drafter: Checkpoint | None,
    lenient: bool = False,
) -> MlxFolder:  # fmt: skip
    own = {t.name: t for t in checkpoint.tensors()}
    below = {t.name: t for t in drafter.tensors()} if drafter else {}
    shift = len(checkpoint.files)
    kind, stages, place = _find_head(config, own, below)
    inventory = expand(config, kind, stages, _DENSE)
    if lenient:
        inventory = replace(inventory, modules=tuple(_lenient(m) for m in inventory.modules))
    tables = {"": table, "mtp": _drafter_table(drafter)}
    names = [*checkpoint.file_names, *(f"mtp/{n}" for n in (drafter.file_names if drafter else ()))]
    out: dict[str, Logical] = {}
    findings: list[Finding] = []
    taken: set[tuple[str, str]] = set()
    for module in inventory.modules:
        folder = place.folder if module.part == HEAD and place else ""
        prefix = backbone_name(module) if module.part == BACKBONE or place is None else place.name(module)
        paths = [prefix] if module.part == BACKBONE or place is None else place.table_names(module)
        pool = below if folder else own
        listed = next((tables[folder][p] for p in paths if isinstance(tables[folder].get(p), dict)), None)
        found = _mlx_logical(module, prefix, pool, listed, shift if folder else 0, names, findings)
        taken |= {(folder, n) for n in (prefix, f"{prefix}.weight", f"{prefix}.scales", f"{prefix}.biases")}
        if found:
            out[found.key] = found
    again = _other_places(inventory, place)
    for folder, pool in (("", own), ("mtp", below)):
        for name, info in pool.items():
            if (folder, name) not in taken and (folder, name) not in again:
                file = names[info.file + (shift if folder else 0)]
                what = f"{info.dtype} {list(info.shape)}"
                findings.append(Finding("extra", name, "nothing of this name", what, file))
    paths_all = tuple((path, n) for n in names)
    if drafter is not None and drafter.path != path / "mtp":  # beside the folder, not in it
        paths_all = (*paths_all[:shift], *((drafter.path, n) for n in drafter.file_names))
    view = View("mlx", out, paths_all)
    return MlxFolder(path, config, table, checkpoint, drafter, kind, place, view, tuple(findings))


def _lenient(module: Module) -> Module:
    return replace(module, store="F32 or BF16") if module.store == "F32" else module


_DENSE = {BACKBONE: Storage("bf16", "bf16"), HEAD: Storage("bf16", "bf16")}


def drafter_config(drafter: Checkpoint | None) -> JSON:
    """Return the config of a drafter folder, {} where it has none."""
    if drafter is None or drafter.config is None:
        return {}
    table = strictjson.loads(drafter.config, f"mtp/{CONFIG_NAME}")
    return table if isinstance(table, dict) else {}


def _drafter_table(drafter: Checkpoint | None) -> JSON:
    found = drafter_config(drafter).get("quantization")
    return found if isinstance(found, dict) else {}


def _places() -> list[HeadPlace]:
    seen: dict[tuple[str, str, str, tuple[str, ...]], HeadPlace] = {}
    for layout in layouts().values():
        for p in layout.heads:
            seen.setdefault((p.folder, p.prefix, "".join(p.rename), p.kinds), p)
    return list(seen.values())


def _find_head(
    config: ModelConfig, own: Mapping[str, TensorInfo], below: Mapping[str, TensorInfo]
) -> tuple[str, int, HeadPlace | None]:
    """Return (kind, stages, place) of the head whose own tensors and spelling are present; the folder comes first."""
    best: tuple[int, str, int, HeadPlace] | None = None
    for place in _places():
        pool = below if place.folder else own
        for kind in place.kinds:
            head = config.family.heads.get(kind)
            if head is None or not all(place.own_prefix.replace("{stage}", "0") + s in pool for s in head.signature):
                continue
            stages = 1
            while "{stage}" in place.prefix and any(
                n.startswith(place.prefix.replace("{stage}", str(stages))) for n in pool
            ):
                stages += 1
            norm = place.prefix.replace("{stage}", "0") + place.rename.get("attn_hc.fn", "attn_hc.fn")
            score = 2 * (norm in pool) + (not place.folder)
            if best is None or score > best[0]:
                best = (score, kind, stages, place)
    return ("none", 0, None) if best is None else best[1:]


def _other_places(inventory: Inventory, chosen: HeadPlace | None) -> set[tuple[str, str]]:
    """Return the names of the head in its other places (layout `universal` stores it twice)."""
    out: set[tuple[str, str]] = set()
    for place in _places():
        if chosen is None or place.folder == chosen.folder or inventory.head_kind not in place.kinds:
            continue
        for module in inventory.modules:
            if module.part == HEAD:
                prefix = place.name(module)
                out |= {(place.folder, n) for n in (prefix, f"{prefix}.weight", f"{prefix}.scales", f"{prefix}.biases")}
    return out


def second_head(folder: MlxFolder) -> View | None:
    """Return the head's second copy in the drafter folder as a view, where the head also lies in the folder itself."""
    if folder.drafter is None or folder.place is None or folder.place.folder:
        return None
    place = next((p for p in _places() if p.folder == "mtp" and folder.head_kind in p.kinds), None)
    if place is None:
        return None
    only = replace(folder.checkpoint, files=(), headers=())
    again = _match(folder.path, folder.config, {}, only, folder.drafter)
    kept = {k: t for k, t in again.view.tensors.items() if t.part == HEAD}
    return View("mlx", kept, again.view.paths) if again.place == place else None


def _mlx_logical(
    module: Module,
    prefix: str,
    pool: Mapping[str, TensorInfo],
    listed: JSON | None,
    shift: int,
    names: list[str],
    findings: list[Finding],
) -> Logical | None:
    """Return the logical tensor of a module in a converted folder, or None with the reason in `findings`."""
    shape, rows, cols = _geometry(module)
    name = f"{prefix}.weight" if module.is_module else prefix
    info = pool.get(name)
    codec = codec_of(listed) if listed else None
    if info is None:
        findings.append(Finding("missing", name, f"{list(shape)}", "nothing"))
        return None
    scale = pool.get(f"{prefix}.scales") if module.is_module else None
    if scale is not None and listed is None:
        findings.append(Finding("missing", f"{prefix} in the quantization table", "an entry", "nothing"))
        codec = CODECS["mxfp4" if info.shape and info.shape[-1] * 8 == cols else "mxfp8"]
    if scale is not None and codec is None:
        raise InputError(f"{prefix}: {strictjson.show(str(listed), 200)} is not a format that this version reads")
    if scale is None and listed is not None:
        findings.append(Finding("missing", f"{prefix}.scales", "scales, as the quantization table says", "nothing"))
    codec = codec if scale is not None else None
    bias = pool.get(f"{prefix}.biases") if codec is not None and codec.has_biases else None
    wanted = [(info, *_wanted_weight(module, shape, codec))]
    if scale is not None and codec is not None:
        groups = (*shape[:-1], cols // codec.group_size)
        wanted.append((scale, groups, (codec.scale_dtype,)))
        if bias is not None:
            wanted.append((bias, groups, (codec.scale_dtype,)))
        elif codec.has_biases:
            findings.append(Finding("missing", f"{prefix}.biases", f"{codec.scale_dtype} {list(groups)}", "nothing"))
            return None
    for t, want, dtypes in wanted:
        file = names[t.file + shift]
        if t.dtype not in dtypes:
            findings.append(Finding("dtype", t.name, " or ".join(dtypes), t.dtype, file))
            return None
        if t.shape != want:
            findings.append(Finding("shape", t.name, str(list(want)), str(list(t.shape)), file))
            return None
    count = module.experts or 1
    cut = _slicer(count, shift)
    store = info.dtype.lower() if codec is None else {"mxfp4": "fp4"}.get(codec.name, codec.name)
    return Logical(
        key_of(module), info.name, names[info.file + shift], shape, rows, cols, store, cut(info),
        cut(scale) if scale else (), module.tile, module.part, module.role, module.block,
        sum(t.size for t in (info, scale, bias) if t), cut(bias) if bias else (),
    )  # fmt: skip


def codec_of(entry: JSON) -> Codec | None:
    """Return the codec that an entry of a quantization table means, or None for one that is not ours to read."""
    mode, bits, group = entry.get("mode", "affine"), entry.get("bits"), entry.get("group_size")
    return next((c for c in CODECS.values() if (c.mode, c.bits, c.group_size) == (mode, bits, group)), None)


def _slicer(count: int, shift: int) -> Callable[[TensorInfo], tuple[ByteRange, ...]]:
    def cut(info: TensorInfo) -> tuple[ByteRange, ...]:
        each = info.size // count
        return tuple(ByteRange(info.file + shift, info.start + e * each, each) for e in range(count))

    return cut


def _wanted_weight(
    module: Module, shape: tuple[int, ...], codec: Codec | None
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    if codec is not None:
        return (*shape[:-1], shape[-1] * codec.bits // WORD_BITS), ("U32",)
    if module.write:
        return shape, (module.write,)
    return shape, tuple(module.store.split(" or "))


def plain_view(checkpoint: Checkpoint) -> View:
    """Return every tensor of files that no family explains, each under its own name."""
    out = {}
    for t in checkpoint.tensors():
        cols = t.shape[-1] if t.shape else 1
        rows = max(math.prod(t.shape) // cols, 1) if cols else 1
        if t.size:
            out[t.name] = Logical(
                t.name, t.name, checkpoint.file_names[t.file], t.shape, rows, t.size // rows // DTYPE_BYTES[t.dtype],
                t.dtype.lower(), (ByteRange(t.file, t.start, t.size),), (), (1, 1), "", "", None, t.size,
            )  # fmt: skip
    return View("plain", out, tuple((checkpoint.path, n) for n in checkpoint.file_names))
