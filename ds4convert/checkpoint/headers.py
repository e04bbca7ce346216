"""safetensors headers and index files: bytes to values and back, every check, no I/O.

A header is accepted only if its tensors tile the data region: no gap, no overlap, nothing outside the file, and
each byte length equal to shape times dtype size. Source of the format: the safetensors README ("Format").
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

from ds4convert.checkpoint.types import Header, TensorInfo
from ds4convert.errors import HeaderError, naming
from ds4convert.storage import strict_json
from ds4convert.storage.records import LENGTH_BYTES
from ds4convert.storage.untrusted.lookalikes import FETCH, as_text, told
from ds4convert.words.terminal import show

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library."""

MAX_DIMENSION = 1 << 48
MAX_DIMENSIONS = 16
"""Axes of one tensor; without a bound, the product of a shape from a hostile header takes minutes."""

MAX_OFFSET = 1 << 63
MAX_INDEX_KEYS = 300_000
"""Twice what Pro has; a key and a name of its own for each take more memory than the entries of a header."""

HALF_BYTES = "F4"
"""Two codes to a byte (float4_e2m1fn_x2), counted one by one in its shape; read as the bytes that they lie in, I8
`[rows, cols/2]`, which is what the official checkpoints say. Source: safetensors 0.6, `Dtype::F4` (4 bits)."""

DTYPE_BYTES: Mapping[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


@naming(file="where")
def header_length(prefix: bytes, file_size: int, where: str) -> int:
    """Return the byte length of the JSON header that the first eight bytes announce.

    Raises `HeaderError` when the file is too short, or the length is 0, over 100 MB or reaches past the file.
    """
    if len(prefix) < LENGTH_BYTES or file_size < LENGTH_BYTES:
        raise HeaderError(f"{where}: {file_size} bytes is too short for a safetensors file", hint="download it again")
    length = int.from_bytes(prefix[:LENGTH_BYTES], "little")
    fits = 0 < length <= MAX_HEADER_BYTES and LENGTH_BYTES + length <= file_size
    if not fits and (other := lookalike(prefix)):  # a length may begin like another format: 640 like a Python pickle
        raise HeaderError(f"{where}: {other}")
    if length == 0:
        raise HeaderError(
            f"{where}: header length is 0 (bytes 0..8): the file begins with zero bytes, as "
            "an interrupted download leaves, and is no safetensors file",
            hint="download it again",
        )
    if length > MAX_HEADER_BYTES:
        raise HeaderError(f"{where}: header length {length} (bytes 0..8) is over the limit of {MAX_HEADER_BYTES}")
    if LENGTH_BYTES + length > file_size:
        raise HeaderError(
            f"{where}: header length {length} reaches past the end of the file ({file_size} bytes); "
            "the file is truncated, download it again"
        )
    return length


def lookalike(prefix: bytes) -> str | None:
    """Return what a file is that begins so and is no safetensors file, or None."""
    if prefix[:1] == b"{":
        return f"is JSON text (a server's answer?), not a safetensors file; {FETCH}"
    if other := told(prefix):
        return other
    text = as_text(prefix)  # a header length never looks so: it would be larger than any disk
    return f"{text}, not a safetensors file; {FETCH}" if text else None


@naming(file="where")
def parse_header(raw: bytes, file_size: int, where: str, file: int = 0) -> Header:
    """Return the validated header whose JSON text is `raw`, of a file of `file_size` bytes.

    `where` names the file in messages, `file` becomes `TensorInfo.file`. Raises `HeaderError` naming the tensor.
    """
    if not raw.startswith(b"{"):
        raise HeaderError(f"{where}: the header does not begin with '{{'; this is not a safetensors file")
    table = strict_json.loads(raw, f"{where} (header)", HeaderError)
    data_start = LENGTH_BYTES + len(raw)
    metadata = _metadata(table.pop("__metadata__", None), where)
    data_size = file_size - data_start
    tensors = [_tensor(name, entry, data_start, where, file) for name, entry in table.items()]
    tensors.sort(key=lambda t: (t.start, t.size))
    _check_tiling(tensors, data_start, data_size, where)
    return Header(tuple(tensors), metadata, data_start)


def _metadata(value: Any, where: str) -> dict[str, str]:
    if value is None:  # the safetensors library reads null as none at all
        return {}
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise HeaderError(f"{where}: __metadata__ must map text to text")
    return value


@naming(file="where", tensor="name")
def _tensor(name: str, entry: Any, data_start: int, where: str, file: int) -> TensorInfo:
    """Return one checked entry; every message names file and tensor."""
    if not name or not name.isprintable():
        raise HeaderError(f"{where}: tensor name {show(name)!r} is empty or holds unprintable characters")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise HeaderError(f"{where}: {show(name)}: an entry has exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    width = DTYPE_BYTES.get(dtype) if isinstance(dtype, str) else None
    if dtype == HALF_BYTES:
        dtype, width, shape = "I8", 1, _halved(shape, f"{where}: {show(name)}")
    if width is None:
        raise HeaderError(f"{where}: {show(name)}: unknown dtype {show(str(dtype))!r}")
    if isinstance(shape, list) and len(shape) > MAX_DIMENSIONS:
        raise HeaderError(f"{where}: {show(name)}: {len(shape)} dimensions, expected at most {MAX_DIMENSIONS}")
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n <= MAX_DIMENSION for n in shape):
        raise HeaderError(
            f"{where}: {show(name)}: shape {show(str(shape))} must be whole numbers from 0 to {MAX_DIMENSION}"
        )
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(_is_offset(n) for n in offsets)):
        raise HeaderError(
            f"{where}: {show(name)}: data_offsets {show(str(offsets))} must be two whole numbers from 0 to {MAX_OFFSET}"
        )
    begin, end = offsets
    size = math.prod(shape) * width
    if end - begin != size:
        raise HeaderError(
            f"{where}: {show(name)}: {dtype} {shape} takes {size} bytes, but data_offsets "
            f"{begin}..{end} span {end - begin}"
        )
    return TensorInfo(name, dtype, tuple(shape), file, data_start + begin, size)


def _halved(shape: Any, where: str) -> Any:
    """Return the shape of F4 in bytes. Raises `HeaderError` for an odd number of columns."""
    if not isinstance(shape, list) or not shape or type(shape[-1]) is not int:
        return shape  # refused with all other shapes of this kind
    if shape[-1] % 2:
        raise HeaderError(f"{where}: F4 {show(str(shape))}: an odd number of columns is no whole number of bytes")
    return [*shape[:-1], shape[-1] // 2]


def _is_offset(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_OFFSET


def _check_tiling(tensors: list[TensorInfo], data_start: int, data_size: int, where: str) -> None:
    """Raise unless the tensors, sorted by start, cover the data region exactly once."""
    at = data_start
    for t in tensors:
        if t.start != at:
            what = "overlaps the tensor before it" if t.start < at else "leaves a gap before it"
            raise HeaderError(
                f"{where}: {show(t.name)}: starts at data byte {t.start - data_start}, expected "
                f"{at - data_start}; it {what}",
                tensor=t.name,
            )
        at += t.size
        if at - data_start > data_size:
            raise HeaderError(
                f"{where}: {show(t.name)}: ends at data byte {at - data_start}, but the file holds only "
                f"{data_size}; the file is truncated, download it again",
                tensor=t.name,
                hint="download the file again",
            )
    if at - data_start != data_size:
        raise HeaderError(f"{where}: {data_start + data_size - at} bytes at the end belong to no tensor")


def build_header(entries: Iterable[tuple[str, str, tuple[int, ...], int]], metadata: Mapping[str, str]) -> bytes:
    """Return the first bytes of a safetensors file: length and JSON header, padded with spaces to a multiple of 8.

    `entries` are (name, dtype, shape, size in bytes) in the order of their data, which follows without gaps.
    """
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, dtype, shape, size in entries:
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(LENGTH_BYTES, "little") + raw


@naming(file="where")
def parse_index(raw: bytes, where: str) -> dict[str, str]:
    """Return the weight map (tensor name to file name) of an index file.

    Raises `HeaderError` on malformed JSON and on a file name that could leave the folder.
    """
    table = strict_json.loads(raw, where, HeaderError, MAX_INDEX_KEYS, may_have_bom=True)
    weight_map = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise HeaderError(f"{where}: has no weight_map that maps tensors to files")
    if wrong := next((k for k, v in weight_map.items() if not isinstance(v, str)), None):
        raise HeaderError(
            f"{where}: {show(wrong)}: weight_map gives {show(str(weight_map[wrong]))}, expected a file name"
        )
    for name in dict.fromkeys(weight_map.values()):
        check_file_name(name, where)
    return weight_map


def check_file_name(name: Any, where: str) -> None:
    """Raise `HeaderError` unless `name` is a plain safetensors file name inside its folder."""
    path = PurePosixPath(name) if isinstance(name, str) else None
    if path is None or not name or not name.isprintable() or "\\" in name:
        raise HeaderError(f"{where}: {show(str(name))!r} is not a file name")
    if path.parts != (name,) or name in {".", ".."} or not name.endswith(".safetensors"):
        bare = path.name if path.parts == (path.name,) and path.name.endswith(".safetensors") else ""
        how = f"; write {show(bare)!r} instead, everywhere" if bare else ""
        raise HeaderError(
            f"{where}: names the file {show(name)!r}; expected a .safetensors file in the same folder, by its name "
            f"alone{how}"
        )
