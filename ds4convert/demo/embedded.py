"""The two checkpoints that come with the package: one backbone, with a classic head or with a DSpark head.

The backbone is stored once. A DSpark checkpoint is put together of it, of the DSpark head's own shard and config, and
of an index of both; its bytes are the same every time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import resources
from typing import Any

from ds4convert.checkpoint.headers import header_length, parse_header
from ds4convert.storage import strict_json
from ds4convert.storage.belonging import belongs
from ds4convert.storage.records import LENGTH_BYTES

CLASSIC, DSPARK = "classic", "dspark"
KINDS = (CLASSIC, DSPARK)
INDEX = "model.safetensors.index.json"
NOTES = (".md", ".py")
"""Notes of a checkpoint on itself, which are left where they are."""


def files(kind: str) -> Iterator[tuple[str, bytes]]:
    """Yield name and bytes of each file of the checkpoint with this kind of head."""
    home = resources.files("ds4convert.manifests") / "demo"
    own = dict(_entries(home / DSPARK)) if kind == DSPARK else {}
    if own:
        index = next(data for name, data in _entries(home) if name == INDEX)
        own[INDEX] = _joined(index, {name: data for name, data in own.items() if name.endswith(".safetensors")})
    for name, data in _entries(home):
        if name not in own:
            yield name, data
    yield from own.items()


def _entries(folder: Any) -> Iterator[tuple[str, bytes]]:
    """Yield the files of a folder of the package that belong to a checkpoint."""
    for entry in folder.iterdir():
        if entry.is_file() and belongs(entry.name) and not entry.name.endswith(NOTES):
            yield entry.name, entry.read_bytes()


def _joined(index: bytes, shards: dict[str, bytes]) -> bytes:
    """Return the classic checkpoint's index with the tensors of these shards in place of those that were there."""
    stated = json.loads(index)["weight_map"]
    tensors = {name: file for name, file in stated.items() if file not in shards}
    for file, data in shards.items():
        end = LENGTH_BYTES + header_length(data[:LENGTH_BYTES], len(data), file)
        header = parse_header(data[LENGTH_BYTES:end], len(data), file)
        tensors |= dict.fromkeys((t.name for t in header.tensors), file)
    return strict_json.pretty({"metadata": {}, "weight_map": dict(sorted(tensors.items()))})
