"""Every kind of byte source over the same files, with what may happen to them, for one suite of tests."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from ds4convert.execution.prefetch import PrefetchWindow, Reads
from ds4convert.files import Disk
from ds4convert.hub import repo
from ds4convert.hub.remote_checkpoint import RemoteFiles
from ds4convert.storage.byte_source import ByteSource, Cached, Joined
from ds4convert.storage.local_files import LocalFiles, joined
from tests.local_hub import LocalHub

LARGE, SMALL, EMPTY = "large.safetensors", "small.safetensors", "empty.safetensors"
MEGABYTE = 1 << 20


def contents(seed: int = 1) -> dict[str, bytes]:
    """Return the files that all sources have: over a piece, a few bytes, none."""
    made = random.Random(seed)
    return {LARGE: made.randbytes(MEGABYTE + 212_345), SMALL: made.randbytes(10), EMPTY: b""}


@dataclass
class Case:
    """A source over `files`. `change` alters the large one, `vanish` takes it away, `interrupt` cuts reads short."""

    source: ByteSource
    files: dict[str, bytes]
    change: Callable[[], None]
    vanish: Callable[[], None]
    interrupt: Callable[[], None]


Make = Callable[[dict[str, bytes]], Case]
"""Returns a new case over these files; one made later in the same test has the files in the place of the first."""


def _local(files: dict[str, bytes], place: Path, patched: pytest.MonkeyPatch) -> Case:
    place.mkdir(exist_ok=True)
    for name, data in files.items():
        if not (place / name).exists() or (place / name).read_bytes() != data:
            (place / name).write_bytes(data)

    def change() -> None:
        before = (place / LARGE).stat().st_mtime_ns
        (place / LARGE).write_bytes(files[LARGE][::-1])
        os.utime(place / LARGE, ns=(before + 10**9 + 7, before + 10**9 + 7))

    def interrupt() -> None:
        pread, preadv = os.pread, os.preadv
        patched.setattr(os, "pread", lambda fd, n, at: pread(fd, min(n, 1000), at))
        patched.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][:7000]], at))

    return Case(LocalFiles.of(place, files), files, change, (place / LARGE).unlink, interrupt)


def _hub(files: dict[str, bytes], hub: LocalHub, name: str, place: Path, patched: pytest.MonkeyPatch) -> Case:
    from huggingface_hub import constants

    for key, value in {"HF_HUB_CACHE": str(place / "hub"), "HF_HOME": str(place)}.items():
        patched.setattr(constants, key, value)
    if not hub.has_repo(name):
        hub.store.create(name)
    hub.put(name, dict(files))
    opened = repo.open_repo(name, endpoint=hub.url, token=hub.token)

    def vanish() -> None:
        hub.faults.add("status", f"{name}/{LARGE}", times=-1, code=404)

    return Case(
        RemoteFiles(opened, place),
        files,
        lambda: hub.faults.add("etag", f"{name}/{LARGE}", times=-1),
        vanish,
        lambda: hub.faults.add("cut", LARGE, times=1, after=100_000),
    )


def _wrapped(case: Case, source: ByteSource) -> Case:
    return Case(source, case.files, case.change, case.vanish, case.interrupt)


def _blocks(case: Case) -> Case:
    """A cache that knows most of what is read: two neighbours and one apart; small blocks, and room for few."""
    ends = {LARGE: [(100, 5000), (5000, 90_000), (100_000, MEGABYTE)]}
    return _wrapped(case, Cached(case.source, ends, block=77_777, most=200_000))


def _window(case: Case, state: Path, limit: int = MEGABYTE) -> Case:
    """A window, smaller than what it was told of: most of the large file, in two steps, and a part of the small one."""
    state.mkdir(exist_ok=True)
    window = PrefetchWindow(case.source, state, limit, 2, Disk())
    most = len(case.files[LARGE]) - 50_000
    reads = {LARGE: Reads(50, [(50, 1000, 0), (1000, most, 1)]), SMALL: Reads(0, [(0, 5, 1)])}
    window.begin(reads)
    return _wrapped(case, window)


def _together(case: Case, place: Path) -> Case:
    """The small file from another folder, under the name that it has here."""
    place.mkdir(exist_ok=True)
    if not (place / "other").exists():
        (place / "other").write_bytes(case.files[SMALL])
    if not isinstance(case.source, LocalFiles):
        beside = LocalFiles({SMALL: (place, "other")})
        return _wrapped(case, Joined({LARGE: case.source, EMPTY: case.source, SMALL: beside}))
    beside = LocalFiles({"x": (place, "other")})
    own = {n: n for n in case.files if n != SMALL}
    return _wrapped(case, joined((case.source, own), (beside, {SMALL: "x"})))


KINDS = ("local", "hub", "cached", "cached hub", "joined", "hub and local", "window", "window on the hub")


def maker(kind: str, hub: LocalHub | None, place: Path, patched: pytest.MonkeyPatch, number: int) -> Make:
    """Return what makes cases of a kind; those with `hub` in their name need one."""

    def base(files: dict[str, bytes]) -> Case:
        if hub is not None:
            return _hub(files, hub, f"owner/r{number}", place / "home", patched)
        return _local(files, place / "files", patched)

    wrap: dict[str, Callable[[Case], Case]] = {
        "cached": _blocks,
        "cached hub": _blocks,
        "joined": lambda c: _together(c, place / "more"),
        "hub and local": lambda c: _together(c, place / "more"),
        "window": lambda c: _window(c, place / "state"),
        "window on the hub": lambda c: _window(c, place / "state"),
    }
    return lambda files: wrap.get(kind, lambda c: c)(base(files))


def forget(place: Path) -> None:
    """Remove what a kind keeps beside its files."""
    shutil.rmtree(place / "state", ignore_errors=True)
