"""Time of the commands that only read headers, on a folder with all 46 headers of Flash (69,187 tensors).

    python benchmarks/plan_speed.py [--runs 7]

The shards are sparse files: real headers and sizes (159.6 GB apparent), no data. Prints medians of whole processes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ds4convert.checkpoint import headers
from ds4convert.checkpoint.config import named_config, parse_config
from ds4convert.checkpoint.inventory import expected
from ds4convert.demo import synth


def write_headers(folder: Path) -> None:
    """Write the checkpoint of Flash's config with sparse shards: headers at full size, data as holes."""
    raw = named_config("flash")
    assert raw is not None
    shards = synth.shards(expected(parse_config(raw)))
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        sizes = [synth.tensor_bytes(t) for t in shard]
        entries = ((t.name, t.dtypes[0], t.shape, n) for t, n in zip(shard, sizes, strict=True))
        header = headers.build_header(entries, {"format": "pt"})
        with (folder / name).open("wb") as f:
            f.write(header)
            f.truncate(len(header) + sum(sizes))
        weight_map |= dict.fromkeys((t.name for t in shard), name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_bytes(raw)


def timed(command: list[str], runs: int) -> str:
    """Return the median seconds of a whole process, and those of all runs, as text."""
    seconds = []
    for _ in range(runs):
        start = time.monotonic()
        subprocess.run(command, check=True, capture_output=True)
        seconds.append(time.monotonic() - start)
    return f"{statistics.median(seconds):.2f} s (all: {', '.join(f'{s:.2f}' for s in sorted(seconds))})"


def main() -> None:
    """Print a line per command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    args = parser.parse_args()
    program = [str(Path(sys.executable).with_name("ds4convert"))]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_headers(folder)
        print(f"46 shards; {os.cpu_count()} cores; median of {args.runs} runs, whole process")
        for words in (["--help"], ["inspect", name], ["plan", name]):
            shown = " ".join(w if w != name else "FLASH" for w in words)
            print(f"  ds4convert {shown:16} {timed([*program, *words], args.runs)}", flush=True)


if __name__ == "__main__":
    main()
