"""Mutations of headers, index and config files, deterministic by seed. A case is a folder that was made worse once or
several times; the program has to refuse it, or to accept it if the damage did not matter.
"""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support import INDEX, frame

JUNK: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 7, 31, 2**31, 2**32, 2**48, 2**53, 2**63, 2**64, 10**30, -(2**63), 1.5,
    -0.0, 1e308, "", "a", "..", "../x.safetensors", "/etc/passwd", "\u00b2", "\u202e", "\x1b[2J", "x" * 3000,
    "\ud800", "I8", "BF16",
    "F8_E4M3", "deepseek_v4", "fp4", "fp8", "mtp.0.x", "mtp.999.x", "mtp.\u00b2.x", "__metadata__", [], {}, [[]], [{}],
    [0], [0, 0], [1, 0], [2**63, 2**63], ["a"], {"a": 1}, [[[[]]]], [0] * 200,
]  # fmt: skip
BYTES = [
    b"\0", b"\xff", b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\", b"\\u", b"\\ud83d", b"e999",
    b"-", b"9" * 50, b"NaN", b"\xf0\x9f\x98\x80",
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value inside a JSON value."""
    out = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        out += places(inner, (*path, key))
    return out


def junk(rng: random.Random) -> Any:
    """Return a value of its own that hardly fits anywhere."""
    return copy.deepcopy(rng.choice(JUNK))


def mutate_value(rng: random.Random, table: Any) -> Any:
    """Return the JSON value with one place replaced, removed, doubled, renamed or nudged."""
    found = places(table)
    if not found or rng.random() < 0.02:
        return junk(rng)
    path = rng.choice(found)
    if len(path) > 1 and rng.random() < 0.3:
        path = path[:1]
    holder = table
    for key in path[:-1]:
        holder = holder[key]
    key, kind = path[-1], rng.randrange(6)
    old = holder[key]
    if kind == 0:
        holder[key] = junk(rng)
    elif kind == 1:
        del holder[key]
    elif kind == 2 and isinstance(holder, dict):
        new = junk(rng)
        holder[new if isinstance(new, str) else f"{key}{new}"[:50]] = holder.pop(key)
    elif kind == 3 and isinstance(holder, list):
        holder.insert(rng.randrange(len(holder) + 1), copy.deepcopy(rng.choice([old, *JUNK])))
    elif type(old) is int:
        holder[key] = old + rng.choice([-1, 1, 2, -old, old, 128, 1 << 20])
    elif isinstance(old, str) and old:
        at = rng.randrange(len(old))
        holder[key] = old[:at] + rng.choice(["", "x", "0", ".", "/", "\n", "\u00e9"]) + old[at + 1 :]
    elif isinstance(old, list):
        rng.shuffle(old)
    else:
        other = rng.choice(found)
        value = table
        for step in other:
            value = value[step] if not isinstance(value, (int, float, str, type(None))) else value
        holder[key] = copy.deepcopy(value) if other[: len(path)] != path and path[: len(other)] != other else None
    return table


def mutate_bytes(rng: random.Random, raw: bytes) -> bytes:
    """Return the bytes with a few of them changed, removed, repeated or put in."""
    out = bytearray(raw)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        at, kind = rng.randrange(len(out) + 1), rng.randrange(5)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del out[at : at + rng.choice([1, 2, 50, 5000])]
        elif kind == 2:
            out[at:at] = rng.choice(BYTES)
        elif kind == 3:
            out[at:at] = out[max(0, at - rng.choice([3, 60, 3000])) : at]
        else:
            out[at : at + 1] = rng.randbytes(1)
    return bytes(out)


def replace(path: Path, data: bytes) -> None:
    """Write a file anew; the old one may be a link that other folders share."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def encode(rng: random.Random, value: Any) -> bytes:
    """Return JSON text, now and then with a key doubled."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.9)
    if rng.random() < 0.05 and '":' in text:
        at = text.index('":')
        start = text.rindex('"', 0, at)
        text = f'{text[:start]}{text[start:at]}": 0, {text[start:]}'
    return text.encode("utf-8", "surrogatepass")


def damage_header(rng: random.Random, folder: Path) -> None:
    """Mutate the header of one shard, as a value or as bytes, or its length, or cut the file."""
    path = folder / rng.choice(sorted(p.name for p in folder.glob("*.safetensors")))
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data = raw[8 : 8 + length], raw[8 + length :]
    kind = rng.random()
    if kind < 0.6:
        try:
            table = json.loads(header)
        except ValueError:
            table = {}
        for _ in range(rng.choice([1, 1, 2, 4])):
            table = mutate_value(rng, table)
        replace(path, frame(encode(rng, table), data))
    elif kind < 0.8:
        replace(path, frame(mutate_bytes(rng, header), data))
    elif kind < 0.9:
        replace(
            path,
            rng.choice([0, 1, length - 1, length + 1, 2**26, 2**27, 2**63, 2**64 - 1, len(raw)]).to_bytes(8, "little")
            + raw[8:],
        )
    else:
        replace(path, raw[: rng.randrange(len(raw) + 1)] if rng.random() < 0.7 else raw + rng.randbytes(5))


def damage_json(name: str) -> Callable[[random.Random, Path], None]:
    """Return a function that mutates a JSON file of the folder."""

    def change(rng: random.Random, folder: Path) -> None:
        raw = (folder / name).read_bytes() if (folder / name).is_file() else b"{}"
        if rng.random() < 0.7:
            try:
                table = json.loads(raw)
            except ValueError:
                table = {}
            for _ in range(rng.choice([1, 1, 2, 4])):
                table = mutate_value(rng, table)
            raw = encode(rng, table)
        else:
            raw = mutate_bytes(rng, raw)
        replace(folder / name, raw)

    return change


def damage_files(rng: random.Random, folder: Path) -> None:
    """Remove, swap, link or rename whole files."""
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        return
    one, other = rng.choice(shards), rng.choice(shards)
    kind = rng.randrange(5)
    if kind == 0:
        one.unlink()
    elif kind == 1 and one != other:
        data = other.read_bytes()
        replace(one, data)
    elif kind == 2:
        one.unlink()
        one.symlink_to(rng.choice([one.name, "/etc/passwd", "../", "config.json", other.name, "/dev/zero"]))
    elif kind == 3:
        one.rename(folder / rng.choice(["a.safetensors", "x.bin", "model-99999-of-00001.safetensors"]))
    else:
        (folder / rng.choice([INDEX, "config.json"])).unlink(missing_ok=True)


def make(seed: int, clean: Path, folder: Path) -> None:
    """Make case number `seed` in `folder` from the clean checkpoint; files that stay as they are, are hard links."""
    rng = random.Random(seed)
    folder.mkdir()
    for path in clean.iterdir():
        os.link(path, folder / path.name)
    if rng.random() < 0.3:
        (folder / INDEX).unlink()  # the other way to find the shards
    config, index = damage_json("config.json"), damage_json(INDEX)
    for _ in range(rng.choice([1, 1, 1, 2])):
        kind = rng.random()
        if kind < 0.5:
            damage_header(rng, folder)
        elif kind < 0.75:
            config(rng, folder)
        elif kind < 0.93:
            index(rng, folder)
        else:
            damage_files(rng, folder)
        if not all(p.is_file() for p in folder.iterdir()):
            break
