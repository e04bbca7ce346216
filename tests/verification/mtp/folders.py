"""Converted folders of the demo and golden checkpoints, and ways to damage them, before and after conversion."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from ds4convert.converted.manifest import DIGEST
from ds4convert.storage import strict_json
from tests import support
from tests.support import INDEX, ROOT, Tensor, edit_json, read_file, write_file

DEMO = ROOT / "manifests" / "demo"
GOLDEN = ROOT / "tests" / "golden"
MANIFEST = "ds4convert_manifest.json"
HEAD = "model-mtp.safetensors"
EXPERTS = "mtp.0.ffn.switch_mlp"

Change = Callable[[dict[str, Tensor]], object]


def convert(source: Path, out: Path, *options: str) -> Path:
    """Convert with the program; returns the folder."""
    result = support.run("quantize", source, out, "-q", *options)
    assert result.code == 0, result.err
    return out


def change_head(folder: Path, change: Change, name: str = HEAD) -> Path:
    """Change tensors of one file of a converted folder; the manifest stays as it was.

    Where names and shapes stay, so do header and offsets, as with a patch of the bytes.
    """
    path = folder / name
    raw, tensors = path.read_bytes(), read_file(path)
    before = {n: (t.dtype, t.shape) for n, t in tensors.items()}
    change(tensors)
    if {n: (t.dtype, t.shape) for n, t in tensors.items()} != before:
        write_file(path, tensors)
        return folder
    length = 8 + int.from_bytes(raw[:8], "little")
    data = bytearray(raw)
    for n, entry in json.loads(raw[8:length]).items():
        if n != "__metadata__":
            data[length + entry["data_offsets"][0] : length + entry["data_offsets"][1]] = tensors[n].data
    path.write_bytes(data)
    return folder


def change_source(folder: Path, change: Change) -> Path:
    """Change the head of an official checkpoint before it is converted: nothing later can know."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        part = read_file(path)
        change(part)
        write_file(path, part)
        tensors |= dict.fromkeys(part, path.name)
    edit_json(folder / INDEX, lambda t: t.update(weight_map=tensors))
    return folder


def swap(a: str, b: str) -> Change:
    """Exchange the contents of two tensors, where both are there."""

    def change(tensors: dict[str, Tensor]) -> None:
        if a in tensors and b in tensors:
            tensors[a], tensors[b] = tensors[b], tensors[a]

    return change


def together(*changes: Change) -> Change:
    """Apply several changes."""
    return lambda tensors: [change(tensors) for change in changes]


def swap_slices(name: str, a: int, b: int) -> Change:
    """Exchange two experts' slices of a stacked tensor."""

    def change(tensors: dict[str, Tensor]) -> None:
        t = tensors[name]
        width = len(t.data) // t.shape[0]
        parts = [t.data[n * width : (n + 1) * width] for n in range(t.shape[0])]
        parts[a], parts[b] = parts[b], parts[a]
        tensors[name] = Tensor(t.dtype, t.shape, b"".join(parts))

    return change


def random_head(tensors: dict[str, Tensor]) -> None:
    """Replace the codes of the head's matrices by pseudo-random ones and keep the scales."""
    for name, t in tensors.items():
        if name.startswith("mtp.") and t.dtype == "U32":
            noise = b"".join(hashlib.sha256(f"{name}{n}".encode()).digest() for n in range(-(-len(t.data) // 32)))
            plain = noise[: len(t.data)]
            # FP8 codes 0x7F and 0xFF are NaN: keep the exponent's top bit clear
            tensors[name] = Tensor(t.dtype, t.shape, bytes(x & 0xBF for x in plain))


def accept_digests(folder: Path) -> Path:
    """Recompute the manifest after a change, as somebody who hides it would."""
    import xxhash

    table = json.loads((folder / MANIFEST).read_text())
    for entry in table["files"]:
        data = (folder / entry["name"]).read_bytes()
        entry["sha256"] = hashlib.sha256(data).hexdigest()
        if "bytes" in entry:
            entry["bytes"] = len(data)
    for record in table["tensors"]:
        raw = (folder / record["file"]).read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])[record["name"]]
        record["offset"] = 8 + length + header["data_offsets"][0]
        data = raw[record["offset"] : record["offset"] + record["bytes"]]
        record["xxh3_128"] = xxhash.xxh3_128(data).hexdigest()
    table[DIGEST] = strict_json.digest({k: v for k, v in table.items() if k != DIGEST})
    (folder / MANIFEST).write_bytes(strict_json.pretty(table))
    return folder
