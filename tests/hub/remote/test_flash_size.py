"""A repo of Flash's size, as sparse files: what `inspect` and `plan` fetch of 69,187 tensors in 46 shards."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from ds4convert.checkpoint.config import named_config, parse_config
from ds4convert.checkpoint.headers import build_header
from ds4convert.checkpoint.inventory import expected
from ds4convert.checkpoint.source import imagined
from tests.local_hub import LocalHub
from tests.support import Result, run_process

NAME, SHARDS = "owner/flash", 46


def sparse_shard(hub: LocalHub, folder: Path, tensors: list[tuple[str, str, tuple[int, ...], int]]) -> str:
    """Put a shard whose tensors are holes into the Hub's store, under a digest of its header; return that."""
    header = build_header(tensors, {"format": "pt"})
    digest, path = hashlib.sha256(header).hexdigest(), folder / "shard"
    path.write_bytes(header)
    os.truncate(path, len(header) + sum(size for *_, size in tensors))
    (hub.store.root / "blobs" / digest[:2]).mkdir(exist_ok=True)
    hub.store.keep(path, digest)
    return digest


@pytest.fixture
def flash(hub: LocalHub, tmp_path: Path) -> str:
    """Make the repo: a layer per shard, as it is published; return its name."""
    raw = named_config("flash")
    assert raw is not None
    named, _ = imagined(expected(parse_config(raw, "flash")))
    parts: dict[str, list[tuple[str, str, tuple[int, ...], int]]] = {}
    for t in named.tensors.values():
        part = ".".join(t.name.split(".")[:2]) if t.name.startswith(("layers.", "mtp.")) else t.name.split(".")[0]
        parts.setdefault(part, []).append((t.name, t.dtype, t.shape, t.size))
    groups = list(parts.values())
    while len(groups) > SHARDS:  # embedding, norm, output: with their neighbours
        groups[-2:] = [groups[-2] + groups[-1]]
    hub.store.create(NAME, False, False)
    names = [f"model-{n:05}-of-{len(groups):05}.safetensors" for n in range(1, len(groups) + 1)]
    digests = {name: sparse_shard(hub, tmp_path, group) for name, group in zip(names, groups, strict=True)}
    digests["config.json"] = hub.store.add_bytes(raw if isinstance(raw, bytes) else json.dumps(raw).encode())
    with hub.store.lock():
        entries = {k: hub.store.entry(k, sha, large=k.endswith(".safetensors")) for k, sha in digests.items()}
        hub.store.commit(NAME, "main", entries, "put by the test")
    return NAME


def call(hub: LocalHub, *words: str) -> Result:
    return run_process(*words, variables=hub.environment())


def test_headers_of_46_shards_take_under_50_requests_and_12_mb(hub: LocalHub, flash: str) -> None:
    result = call(hub, "inspect", f"hf://{flash}", "--json")
    assert result.code == 0, result
    counts = hub.counters()
    asked = [r for r in counts["log"] if r["path"].startswith(flash) and r["kind"] == "file"]
    shards = sum(n.endswith(".safetensors") for n in hub.files(flash))
    print(f"{shards} shards: {len(asked)} requests of files, {counts['bytes_sent']:,} bytes")
    assert 40 <= shards <= SHARDS and result.json["tensors"] > 69_000 and result.json["problems"] == []
    assert len(asked) + 1 < 50 and counts["bytes_sent"] < 12_000_000
    hub.reset_counters()
    facts = call(hub, "plan", f"hf://{flash}", "--json").json
    assert 159e9 < facts["output_bytes"] < 161e9
    assert hub.counters()["bytes_sent"] < 100_000, "headers are cached by etag"
