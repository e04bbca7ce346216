"""The files of a model, read as every command reads a checkpoint: bounded, checked, nothing outside the folder.

Which files there are, where each tensor lies, and the config. Headers go through `ds4convert.headers` and files through
`ds4convert.folder` before mlx is given any of them: mlx trusts what a header says.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds4convert.checkpoint import headers
from ds4convert.checkpoint.config import MAX_CONFIG_BYTES, MAX_TENSORS
from ds4convert.checkpoint.folder import CONFIG_NAME, INDEX_NAME, MAX_FILES, read_header
from ds4convert.checkpoint.types import TensorInfo
from ds4convert.errors import ConfigError, EnvironmentFault, HeaderError, InputError
from ds4convert.storage import strict_json
from ds4convert.storage.local_files import LocalFiles
from ds4convert.storage.safe_open import read_small, resolve_inside
from ds4convert.words.terminal import show

if TYPE_CHECKING:
    import mlx.core as mx


HEAD_PREFIXES = ("mtp.", "model.mtp.")

DTYPES = {
    "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "uint8", "F8_E8M0": "uint8",
    "U8": "uint8", "I8": "int8", "U32": "uint32", "I32": "int32", "I64": "int64",
}  # fmt: skip
"""Names of safetensors to those of mlx, which reads FP8 as bytes."""


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed config.json of a folder; ConfigError where it is missing, malformed or not a JSON object."""
    path = folder / CONFIG_NAME
    if not os.path.lexists(path):
        raise ConfigError(f"{path}: not found; a checkpoint folder has a config.json")
    config = strict_json.loads(read_small(folder, CONFIG_NAME, MAX_CONFIG_BYTES), str(path), ConfigError)
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model: those of its index and `model*.safetensors`; without both, all of them.

    A file that the index names may be absent if it held the head alone: such a head was cut off, which is no error.
    """
    here = _names(folder)
    names = {name for name in here if name.startswith("model")}
    if os.path.lexists(folder / INDEX_NAME):
        places = headers.parse_index(read_small(folder, INDEX_NAME), str(folder / INDEX_NAME))
        backbone = {file for name, file in places.items() if not name.startswith(HEAD_PREFIXES)}
        for name in sorted(backbone - here):
            raise InputError(f"{folder / name}: named by the index, but not found")
        names |= here & set(places.values())
    names = names or here
    if not names:
        raise InputError(f"{folder}: no safetensors files")
    if len(names) > MAX_FILES:
        raise InputError(f"{folder}: {len(names)} safetensors files, expected at most {MAX_FILES}")
    return [folder / name for name in sorted(names)]


def _names(folder: Path) -> set[str]:
    """The names of the safetensors files of a folder; hidden ones (`._NAME` of a Mac's drive) are no part of it."""
    if not folder.is_dir():
        raise InputError(f"{show(str(folder))}: no such folder")
    return {e.name for e in os.scandir(folder) if e.name.endswith(".safetensors") and not e.name.startswith(".")}


def headers_of(folder: Path) -> Iterator[tuple[Path, tuple[TensorInfo, ...]]]:
    """The files of a model, each with its checked tensors. InputError on a broken file, or a name in two of them."""
    seen: set[str] = set()
    paths = weight_files(folder)
    files = LocalFiles.of(folder, [path.name for path in paths])
    for number, path in enumerate(paths):
        try:
            with closing(files):
                _, header = read_header(files, path.name, number)
        except HeaderError as error:
            raise HeaderError(f"{folder}: {error}") from None
        for tensor in header.tensors:
            if tensor.name in seen:
                raise InputError(f"{path}: {tensor.name} is also in another file of {folder}")
            seen.add(tensor.name)
        if len(seen) > MAX_TENSORS:
            raise HeaderError(f"{path}: with it there are {len(seen)} tensors, expected at most {MAX_TENSORS}")
        yield path, header.tensors


def read_weights(folder: Path) -> dict[str, mx.array]:
    """All tensors of a folder by name, not yet read from disk; InputError on a missing or broken file."""
    import mlx.core as mx

    weights: dict[str, mx.array] = {}
    for path, tensors in list(headers_of(folder)):
        if unknown := next((t for t in tensors if t.dtype not in DTYPES), None):
            raise InputError(f"{path}: {unknown.name}: dtype {unknown.dtype} is not one that the model reads")
        try:
            loaded: Any = mx.load(str(resolve_inside(folder, path.name)), format="safetensors")
        except Exception as error:
            raise InputError(f"{path}: not readable as safetensors: {show(str(error), 200)}") from None
        weights |= loaded
    return weights


@dataclass(frozen=True, slots=True)
class Stored:
    """Where one tensor lies: its name on disk, file, dtype (name of safetensors), shape, absolute byte range."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size_bytes: int

    def read(self, row: int | None = None) -> mx.array:
        """The tensor, or row `row` of its leading axis alone, read from disk now. InputError where it cannot be."""
        import mlx.core as mx

        shape, start, size = self.shape, self.start, self.size_bytes
        if row is not None:
            shape, size = shape[1:], size // shape[0]
            start += row * size
        if self.dtype not in DTYPES:
            raise InputError(f"{self.name}: dtype {self.dtype} is not one that the model reads ({self.path})")
        try:
            with closing(LocalFiles.at(self.path)) as files:
                data = files.read(self.path.name, start, size)
        except HeaderError as error:
            raise InputError(f"{self.name}: {self.path.parent}: {error}") from None
        except EnvironmentFault as error:
            raise EnvironmentFault(f"{self.name}: {self.path.parent}: {error}") from None
        codes = mx.array(memoryview(data))  # type: ignore[arg-type]
        return codes.view(getattr(mx, DTYPES[self.dtype])).reshape(shape)


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Where each tensor of a folder lies, by its name on disk; InputError names one that its file is too short for."""
    return {
        t.name: Stored(t.name, path, t.dtype, t.shape, t.start, t.size)
        for path, tensors in headers_of(folder)
        for t in tensors
    }
