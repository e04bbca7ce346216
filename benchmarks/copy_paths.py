"""Kernel time per GB of the ways to move bytes between files, by where source and target lie within a page.

    python benchmarks/copy_paths.py [--size 1000000000] [--rounds 3] [--folder DIR]

Linux only (copy_file_range). The source is warm; each way runs once per round; prints every figure.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

WAYS = (
    ("copy_file_range, like places", "kernel", 4 << 20, 1000, 1000),
    ("copy_file_range, unlike places", "kernel", 4 << 20, 1000, 2008),
    ("1 MB buffer, writes of 256 KB, unlike places", "buffer", 256 << 10, 1000, 2008),
    ("1 MB buffer, writes of 256 KB, aligned", "buffer", 256 << 10, 0, 0),
    ("1 MB buffer, writes of 1 MB, unlike places", "buffer", 1 << 20, 1000, 2008),
    ("1 MB buffer, writes of 1 MB, aligned", "buffer", 1 << 20, 0, 0),
)
BUFFER = 1 << 20


def moved(kind: str, source: int, target: int, piece: int, start: int, offset: int, size: int) -> None:
    """Move `size` bytes in pieces, from `start` of the source to `offset` of the target."""
    buffer = memoryview(bytearray(BUFFER))
    step = piece if kind == "kernel" else BUFFER
    for at in range(0, size - size % step, step):
        if kind == "kernel":
            done = 0
            while done < step:
                done += os.copy_file_range(source, target, step - done, start + at + done, offset + at + done)
            continue
        os.preadv(source, [buffer], start + at)
        for low in range(0, step, piece):
            os.pwrite(target, buffer[low : low + piece], offset + at + low)


def kernel_seconds_per_gb(folder: Path, source: int, size: int, way: tuple[str, str, int, int, int]) -> float:
    """Return this process's kernel time for one way, in seconds per GB."""
    _, kind, piece, start, offset = way
    path = folder / "target"
    target = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    os.ftruncate(target, size + 8192)
    before = os.times().system
    moved(kind, source, target, piece, start, offset, size - 8192)
    spent = os.times().system - before
    os.fsync(target)
    os.close(target)
    path.unlink()
    return spent / (size / 1e9)


def main() -> None:
    """Measure all ways in turn and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1_000_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        with (folder / "source").open("wb") as f:
            for _ in range(0, args.size + BUFFER, BUFFER):
                f.write(os.urandom(BUFFER))
        source = os.open(folder / "source", os.O_RDONLY)
        found: dict[str, list[float]] = {way[0]: [] for way in WAYS}
        for _ in range(args.rounds):
            for way in WAYS:
                found[way[0]].append(kernel_seconds_per_gb(folder, source, args.size, way))
        os.close(source)
    for way, seconds in found.items():
        print(f"{way:46} {', '.join(f'{s:.2f}' for s in seconds)}")


if __name__ == "__main__":
    main()
