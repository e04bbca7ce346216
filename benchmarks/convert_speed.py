"""Speed and memory of `quantize --recipe native` beside `cp` on the same input, in turn, in one run.

    python benchmarks/convert_speed.py --layers 2 --pairs 5            # needs about 40 GB of disk
    python benchmarks/convert_speed.py --layers 2 --pairs 5 --mlx-vlm  # mlx-vlm's streaming converter as well

Writes a real-size checkpoint of random values into a temporary folder (or uses --input), then per round, in rotated
order: `cp -r` followed by a sync of the disk, `quantize --no-hash`, `quantize`, and on request mlx-vlm's converter
(--mlx-vlm) and `quantize` of another version, from its tree (--beside).
Disk timing on a shared machine can swing by more than two: read the ratios within a round, and all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SYNC = ["sync", "-f"]


def folder_bytes(path: Path) -> int:
    """Return the bytes of all files of a folder."""
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file())


def run(command: list[str], out: Path) -> tuple[float, float, int]:
    """Return (seconds including a final sync of the disk, CPU seconds, peak RSS in bytes) of a command."""
    shutil.rmtree(out, ignore_errors=True)
    subprocess.run(["sync"], check=True)
    start = time.monotonic()
    quiet = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    pid = os.posix_spawnp(command[0], command, os.environ, file_actions=quiet)
    _, status, usage = os.wait4(pid, 0)
    if status:
        raise SystemExit(f"{command} failed with status {status}")
    subprocess.run([*SYNC, str(out)], check=True)
    seconds = time.monotonic() - start
    unit = 1 if sys.platform == "darwin" else 1024
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit


def commands(source: Path, vlm_source: Path | None, out: Path, beside: Path | None = None) -> dict[str, list[str]]:
    """Return the commands to be timed, by title."""
    # -P: else the package in the current folder, as from a clone, would be imported whatever PYTHONPATH says.
    ours = [sys.executable, "-P", "-m", "ds4convert", "quantize", str(source), str(out)]
    ours += ["-q", "--json", "--recipe", "native"]
    found = {
        "cp -r; sync": ["cp", "-r", str(source), str(out)],
        "quantize --no-hash": [*ours, "--no-hash"],
        "quantize": ours,
    }
    if beside is not None:
        found["quantize of beside"] = ["env", f"PYTHONPATH={beside.resolve()}", *ours]
    if vlm_source is not None:
        module = "mlx_vlm.models.deepseek_v4.convert"
        found["mlx-vlm streaming"] = [
            sys.executable, "-m", module, "--hf-path", str(vlm_source), "--mlx-path", str(out),
        ]  # fmt: skip
    return found


def for_mlx_vlm(source: Path, folder: Path) -> Path:
    """Return a copy of the source by links, with the config key that mlx-vlm's streaming path asks for."""
    folder.mkdir()
    for f in source.iterdir():
        if f.name != "config.json":
            (folder / f.name).symlink_to(f.resolve())
    config = json.loads((source / "config.json").read_text()) | {"vision_n_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def main() -> None:
    """Make the source, and print a line per command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--input", type=Path, help="use this checkpoint instead of writing one")
    parser.add_argument("--folder", type=Path, help="where to work; removed at the end")
    parser.add_argument("--mlx-vlm", action="store_true")
    parser.add_argument("--beside", type=Path, metavar="TREE", help="time the version in this tree as well")
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        source = args.input or work / "source"
        if args.input is None:
            synth = [sys.executable, "-m", "ds4convert", "synth", str(source), "--config", "flash"]
            subprocess.run([*synth, "--layers", str(args.layers)], check=True)
        measure(source, work, args)
    finally:
        shutil.rmtree(work)


def measure(source: Path, work: Path, args: argparse.Namespace) -> None:
    """Time the commands in turn and print their table."""
    size = folder_bytes(source)
    vlm = for_mlx_vlm(source, work / "vlm-source") if args.mlx_vlm else None
    todo = commands(source, vlm, work / "out", args.beside)
    print(f"input: {size:,} bytes; {os.cpu_count()} cores, {platform.system()} {platform.release()}")
    print("round  command              seconds  cpu s    MB/s  x cp  peak MB")
    ratios: dict[str, list[float]] = {name: [] for name in todo}
    names = list(todo)
    for turn in range(args.pairs):
        order = names[turn % len(names) :] + names[: turn % len(names)]
        rates = {}
        for name in order:
            seconds, cpu, peak = run(todo[name], work / "out")
            written = folder_bytes(work / "out")
            rates[name] = (written / seconds, seconds, cpu, peak)
        for name in order:
            rate, seconds, cpu, peak = rates[name]
            ratios[name].append(rate / rates["cp -r; sync"][0])
            row = f"{turn + 1:5}  {name:20} {seconds:7.1f} {cpu:6.1f} {rate / 1e6:7.0f} {ratios[name][-1]:5.2f}"
            print(f"{row} {peak / 1e6:8.0f}", flush=True)
    print("\nmedian of the ratios of bytes per second to `cp -r; sync` in the same round")
    for name, values in ratios.items():
        print(f"  {name:20} {statistics.median(values):.2f}   (all: {', '.join(f'{v:.2f}' for v in sorted(values))})")


if __name__ == "__main__":
    main()
