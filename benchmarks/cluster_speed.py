"""One conversion by one core and by two: by parts side by side, and by the machines of a Ray cluster.

    python benchmarks/cluster_speed.py [--config flash] [--experts 64] [--layers 2] [--shard 60MB]
        [--rounds 1] [--folder DIR]

Needs the extra `ray`. A checkpoint of Flash's matrices, or of another config's (few layers and experts, a small
vocabulary), is converted with `--recipe q2 --cores 1`; in two parts at once, each with one core; and on clusters of one
and of two machines with a core each, on this computer. Ways take turns in every round. Prints the median of each:
seconds until all files are written, and with the ending run; speed-up of the first; and for the cluster the processor
time of handing out a part. All folders are compared.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from ds4convert.checkpoint.config import named_config
from ds4convert.demo import synth

PROGRAM = [sys.executable, "-m", "ds4convert"]
RECIPE = ["--recipe", "q2", "--jobs", "1", "--max-shard-size", "60MB"]
HANDED = re.compile(r"handing out (\d+) parts took ([\d.]+) s")


def started(source: Path, out: Path, *words: str) -> subprocess.Popen[str]:
    """Begin a conversion in a process of its own; its standard error is kept."""
    command = [*PROGRAM, "quantize", str(source), str(out), *RECIPE, *words]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def ended(child: subprocess.Popen[str]) -> str:
    """Wait for a conversion, which has to end well, and return its standard error."""
    told = child.communicate()[1]
    assert child.returncode == 0, told
    return told


def digests(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file of a result by name: all ways have to give the same."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir()) if p.is_file()}


def alone(source: Path, out: Path) -> tuple[float, float, str]:
    """Convert on one core; return seconds until the files are written, until the end, and what was told."""
    start = time.monotonic()
    ended(started(source, out, "--cores", "1"))
    took = time.monotonic() - start
    return took, took, ""


def in_parts(source: Path, out: Path) -> tuple[float, float, str]:
    """Convert in two parts of a core each, then end it; return what `alone` does."""
    start = time.monotonic()
    for child in [started(source, out, "--cores", "1", "--part", f"{n}/2") for n in (1, 2)]:
        ended(child)
    written = time.monotonic() - start
    ended(started(source, out, "--cores", "1"))
    return written, time.monotonic() - start, ""


def on_cluster(address: str) -> Callable[[Path, Path], tuple[float, float, str]]:
    """Return the way over a cluster's machines; what it tells is the cost of handing out."""

    def way(source: Path, out: Path) -> tuple[float, float, str]:
        start = time.monotonic()
        child, written, handed = started(source, out, "--cores", "1", "--cluster", address, "-v"), 0.0, ""
        assert child.stderr is not None
        for line in child.stderr:
            if found := HANDED.search(line):
                written, handed = (
                    time.monotonic() - start,
                    f"{found[1]} parts, {float(found[2]) / int(found[1]):.3f} s each",
                )
        assert child.wait() == 0
        return written, time.monotonic() - start, handed

    return way


def cluster(machines: int) -> tuple[object, str]:
    """Begin a cluster on this computer: a head that does no work, and machines of a core each; also its address."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    usual = {"object_store_memory": 80 << 20}
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **usual})
    for _ in range(machines):
        found.add_node(num_cpus=1, **usual)
    return found, found.address


def main() -> None:
    """Convert in every way and print the table; every result has to be the same, file for file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="flash")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--shard", default=RECIPE[-1])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    RECIPE[-1] = options.shard
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        raw = named_config(options.config)
        assert raw is not None
        config = synth.shrink(json.loads(raw) | {"vocab_size": 8192}, options.layers, options.experts, None)
        synth.write(config, folder / "source")
        one, two = cluster(1), cluster(2)
        ways = {
            "one core": alone,
            "two parts, a core each": in_parts,
            "Ray, 1 machine with a core": on_cluster(one[1]),
            "Ray, 2 machines with a core": on_cluster(two[1]),
        }
        times: dict[str, list[tuple[float, float, str]]] = {name: [] for name in ways}
        known: dict[str, str] = {}
        for _ in range(options.rounds):
            for name, way in ways.items():
                out = folder / "out"
                times[name].append(way(folder / "source", out))
                known = known or digests(out)
                assert digests(out) == known, name
                subprocess.run(["rm", "-r", str(out)], check=True)
        base = statistics.median(written for written, _, _ in times["one core"])
        print("| way | files written, s | with the ending run, s | speed-up | handing out |")
        print("| --- | --- | --- | --- | --- |")
        for name, found in times.items():
            written, whole = (statistics.median(f[n] for f in found) for n in (0, 1))
            print(f"| {name} | {written:.1f} | {whole:.1f} | {base / written:.2f} | {found[-1][2] or '-'} |")
        for made, _ in (one, two):
            made.shutdown()  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
