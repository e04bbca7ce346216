"""Time and peak memory of `graft`, `graft --remove` and `relayout` on layers of Flash's size.

    python benchmarks/rearrange.py [--layers 2] [--experts 256] [--folder DIR]

Two layers of 256 experts and the head take 12.9 GB; the source and all that is made of it about 45 GB. Files that
are shared by hard links are read once for their digests, never written. Prints one line per command: seconds, bytes
written, files kept, and the largest resident memory of its process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROGRAM = str(Path(sys.executable).with_name("ds4convert"))


def measured(*words: object) -> tuple[dict[str, object], float, int]:
    """Run the program; return what it reports, its seconds (synced before and after) and its peak memory in MB."""
    os.sync()
    start = time.monotonic()
    child = subprocess.Popen([PROGRAM, *map(str, words), "--json", "-q"], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    text = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    os.sync()
    seconds = time.monotonic() - start
    if status:
        raise SystemExit(f"{' '.join(map(str, words))}: failed")
    unit = 1 if sys.platform == "darwin" else 1024
    return json.loads(text), seconds, usage.ru_maxrss * unit // 1_000_000


def show(name: str, run: tuple[dict[str, object], float, int]) -> None:
    """Print one line of the table."""
    facts, seconds, peak = run
    written = facts.get("bytes_written", facts.get("output_bytes", 0))
    kept = facts.get("files_kept", [])
    count = len(kept) if isinstance(kept, list) else 0
    print(f"| {name} | {seconds:.1f} s | {int(str(written)) / 1e9:.2f} GB | {count} | {peak} MB |", flush=True)


def main() -> None:
    """Run all commands once, in the order in which one would use them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument(
        "--folder", type=Path, help="Where to work; its disk needs the room. [default: a temporary one]"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        home = Path(name)
        source, base = home / "source", home / "base"
        size = ["--layers", args.layers, "--experts", args.experts]
        measured("synth", source, "--config", "flash", *size)
        print("| command | time | written | files kept | peak memory |\n| --- | --- | --- | --- | --- |")
        show("quantize --drop-mtp", measured("quantize", source, base, "--drop-mtp"))
        show("graft --out", measured("graft", base, "--from", source, "--out", home / "grafted"))
        show("graft --in-place", measured("graft", base, "--from", source, "--in-place"))
        show("graft --remove", measured("graft", "--remove", base))
        show(
            "relayout --layout universal", measured("relayout", home / "grafted", home / "two", "--layout", "universal")
        )
        show("relayout back", measured("relayout", home / "two", home / "back", "--layout", "inline"))


if __name__ == "__main__":
    main()
