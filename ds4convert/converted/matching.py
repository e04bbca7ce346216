"""Which tensors of a converted folder are those of a module, in which format, and whether they fit.

The format is what the quantization table lists for the module; where another program's table lists nothing, what the
headers show. Reads headers only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from ds4convert.checkpoint.inventory import BACKBONE, Module
from ds4convert.checkpoint.types import JSON, Finding, TensorInfo
from ds4convert.formats.codecs import CODECS, WORD_BITS, Codec
from ds4convert.planning.layouts import HeadPlace, Spelling
from ds4convert.words.terminal import show

SUFFIXES = ("weight", "scales", "biases", "scale")
"""How the names of a module's tensors end; the last one is the official checkpoint's, which some hosts read."""


@dataclass(frozen=True)
class Match:
    """The tensors of a module: `codec` is None where it is stored dense. With findings, they may not fit."""

    weight: TensorInfo | None
    scale: TensorInfo | None = None
    bias: TensorInfo | None = None
    codec: Codec | None = None
    findings: tuple[Finding, ...] = ()
    fits: bool = True


@dataclass(frozen=True)
class Place:
    """Where a module is looked for: its path, the tensors of that folder by name, and its entry in the table.

    `theirs`: another program wrote the folder, so that the table need not list every module. `file` names a tensor's
    file.
    """

    path: str
    pool: Mapping[str, TensorInfo]
    listed: JSON | None
    theirs: bool
    file: Callable[[TensorInfo], str]


@dataclass(frozen=True)
class Pools:
    """The tensors of a folder (key "") and of its drafter folder ("mtp"), and the files of both under one count.

    `spelling` is how the folder spells its backbone.
    """

    pools: Mapping[str, Mapping[str, TensorInfo]]
    tables: Mapping[str, JSON]
    shift: int
    names: Sequence[str]
    theirs: bool
    spelling: Spelling = field(default_factory=Spelling)

    def base(self, folder: str) -> int:
        """Return what is added to the number of a file of one of the folders."""
        return self.shift if folder else 0

    def place(self, module: Module, place: HeadPlace | None) -> tuple[str, Place]:
        """Return where a module is looked for: which folder, and what there."""
        if module.part == BACKBONE or place is None:
            folder, path, paths = "", self.spelling.name(module), self.spelling.table_names(module)
        else:
            folder, path, paths = place.folder, place.name(module), place.table_names(module)
        table, shift = self.tables[folder], self.base(folder)
        listed = next((table[p] for p in paths if isinstance(table.get(p), dict)), None)
        names = self.names
        return folder, Place(path, self.pools[folder], listed, self.theirs, lambda t: names[t.file + shift])

    def rest(self, taken: Set[tuple[str, str]]) -> Iterator[Finding]:
        """Yield every tensor that is not among `taken`."""
        for folder, pool in self.pools.items():
            for name, info in pool.items():
                if (folder, name) not in taken:
                    what = f"{info.dtype} {list(info.shape)}"
                    file = self.names[info.file + self.base(folder)]
                    yield Finding("extra", name, "nothing of this name", what, file)


def match(module: Module, shape: tuple[int, ...], at: Place) -> Match:
    """Return the tensors of a module of logical shape `shape`; a format that is not read here is a finding."""
    name = f"{at.path}.weight" if module.is_module else at.path
    weight = at.pool.get(name)
    if weight is None:
        return Match(None, findings=(Finding("missing", name, f"{list(shape)}", "nothing"),), fits=False)
    if weight.dtype == "F8_E4M3" and module.is_module:
        return _official(module, shape, weight, at)
    scale = at.pool.get(f"{at.path}.scales") if module.is_module else None
    bias = at.pool.get(f"{at.path}.biases") if module.is_module else None
    codec, findings = _codec(shape[-1], weight, scale, bias, at)
    if codec is None and scale is not None:
        return Match(weight, findings=findings, fits=False)
    if codec is None:
        unfit = _misfit(weight, shape, _dense_dtypes(module), at)
        return Match(weight, findings=(*findings, *unfit), fits=not unfit)
    unfit = _parts_misfit(shape, codec, (weight, scale, bias), at)
    return Match(weight, scale, bias if codec.has_biases else None, codec, (*findings, *unfit), not unfit)


def _official(module: Module, shape: tuple[int, ...], weight: TensorInfo, at: Place) -> Match:
    """Return a table that lies in the official checkpoint's dtypes: the bytes of mxfp8 under other names."""
    codec, name = CODECS["mxfp8"], f"{at.path}.scale"
    groups = (*shape[:-1], shape[-1] // codec.group_size)
    scale = at.pool.get(name)
    if scale is None:
        return Match(weight, findings=(Finding("missing", name, f"F8_E8M0 {list(groups)}", "nothing"),), fits=False)
    unfit = _misfit(weight, shape, ("F8_E4M3",), at) or _misfit(scale, groups, ("F8_E8M0",), at)
    return Match(weight, scale, None, codec, unfit, not unfit)


def _codec(
    cols: int, weight: TensorInfo, scale: TensorInfo | None, bias: TensorInfo | None, at: Place
) -> tuple[Codec | None, tuple[Finding, ...]]:
    """Return the codec of a stored module, None where it is dense, and what table and headers contradict in."""
    if scale is None:
        wanted = "scales, as the quantization table says"
        missing = (Finding("missing", f"{at.path}.scales", wanted, "nothing"),) if at.listed is not None else ()
        return None, missing
    shown = codec_of_headers(weight, scale, bias, cols)
    if at.listed is None:
        if shown is None:
            return None, (_strange(weight, f"{weight.dtype} {list(weight.shape)} with {_grid(scale)}", at),)
        entry = Finding("missing", f"{at.path} in the quantization table", "an entry", "nothing")
        return shown, () if at.theirs else (entry,)
    listed = codec_of(at.listed)
    return listed, () if listed else (_strange(weight, words_of(at.listed), at),)


READ = "affine of 2, 3, 4, 5, 6 or 8 bits in groups of 32, 64 or 128, mxfp4, mxfp8 or nvfp4"


def _strange(weight: TensorInfo, found: str, at: Place) -> Finding:
    return Finding("dtype", weight.name, READ, found, at.file(weight))


def _grid(scale: TensorInfo) -> str:
    return f"scales {scale.dtype} {list(scale.shape)}"


def codec_of(entry: JSON) -> Codec | None:
    """Return the codec that an entry of a quantization table means, or None for one that is not ours to read."""
    mode, bits, group = entry.get("mode", "affine"), entry.get("bits"), entry.get("group_size")
    return next((c for c in CODECS.values() if (c.mode, c.bits, c.group_size) == (mode, bits, group)), None)


def codec_of_headers(weight: TensorInfo, scale: TensorInfo, bias: TensorInfo | None, cols: int) -> Codec | None:
    """Return the codec that a packed weight of `cols` columns and its scales are in, None where none is like it."""
    if weight.dtype != "U32" or not weight.shape or not scale.shape:
        return None
    words, groups = weight.shape[-1], scale.shape[-1]
    for c in CODECS.values():
        sizes = (words * WORD_BITS, groups * c.group_size) == (cols * c.bits, cols)
        if sizes and c.scale_dtype == scale.dtype and c.has_biases == (bias is not None):
            return c
    return None


def words_of(entry: Any) -> str:
    """Return an entry of a quantization table in words: `affine, 4 bits, groups of 48`."""
    if not isinstance(entry, dict) or not {"bits", "group_size"} <= entry.keys():
        return show(json.dumps(entry))
    mode, bits, group = (json.dumps(entry.get(k, d)).strip('"') for k, d in _ENTRY)
    return show(f"{mode}, {bits} bits, groups of {group}")


_ENTRY = (("mode", "affine"), ("bits", None), ("group_size", None))


def _dense_dtypes(module: Module) -> tuple[str, ...]:
    return (module.write,) if module.write else tuple(module.store.split(" or "))


def _parts_misfit(
    shape: tuple[int, ...], codec: Codec, found: tuple[TensorInfo, TensorInfo | None, TensorInfo | None], at: Place
) -> tuple[Finding, ...]:
    """Return the first of a packed module's tensors that is not as its codec has it."""
    *outer, cols = shape
    groups = (*outer, cols // codec.group_size)
    sizes = ((*outer, cols * codec.bits // WORD_BITS), groups, groups)
    dtypes = ("U32", codec.scale_dtype, codec.scale_dtype)
    if codec.has_biases and found[2] is None:
        wanted = f"{codec.scale_dtype} {list(groups)}"
        return (Finding("missing", f"{at.path}.biases", wanted, "nothing"),)
    used = found if codec.has_biases else found[:2]
    for info, size, dtype in zip(used, sizes, dtypes, strict=False):
        if info is not None and (unfit := _misfit(info, size, (dtype,), at)):
            return unfit
    return ()


def _misfit(info: TensorInfo, shape: tuple[int, ...], dtypes: tuple[str, ...], at: Place) -> tuple[Finding, ...]:
    """Return why a tensor is not of this shape and one of these dtypes."""
    if info.dtype not in dtypes:
        return (Finding("dtype", info.name, " or ".join(dtypes), info.dtype, at.file(info)),)
    if info.shape != shape:
        return (Finding("shape", info.name, str(list(shape)), str(list(info.shape)), at.file(info)),)
    return ()
