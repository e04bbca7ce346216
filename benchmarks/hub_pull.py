"""A head of real size pulled by byte range, and a conversion streamed, from a Hub on loopback that counts bytes.

    python benchmarks/hub_pull.py [--experts 256] [--window 2GB] [--skip-streaming] [--folder DIR]

The source is one layer of Flash's size and the head (3.6 GB of 256 experts), synthetic; the Hub is the tests' own, so
that the figures say what the client does, and nothing of any network. Prints, per command: seconds, bytes that the Hub
sent, the ratio to what was needed, requests of files, peak memory; and whether the results are those of the local way.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.local_hub import LocalHub

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

PROGRAM = str(Path(sys.executable).with_name("ds4convert"))
NAME = "owner/flash"


def run(environment: dict[str, str], *words: object) -> tuple[dict[str, Any], float, int]:
    """Return what the program reports, its seconds, and its peak memory in MB."""
    start = time.monotonic()
    child = subprocess.Popen(
        [PROGRAM, *map(str, words), "--json", "-q"], stdout=subprocess.PIPE, text=True, env=os.environ | environment
    )
    assert child.stdout is not None
    text = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(map(str, words))}: failed")
    unit = 1 if sys.platform == "darwin" else 1024
    return json.loads(text or "{}"), time.monotonic() - start, usage.ru_maxrss * unit // 1_000_000


def measured(hub: LocalHub, title: str, needed: int, *words: object) -> dict[str, Any]:
    """Run a command against the Hub and print its line."""
    hub.reset_counters()
    facts, seconds, peak = run(hub.environment(), *words)
    counts = hub.counters()
    sent = sum(n for path, n in counts["sent"].items() if path.startswith(NAME))
    asked = sum(r["kind"] == "file" for r in counts["log"])
    ratio = f"{sent / needed:.4f}" if needed else "-"
    print(f"| {title} | {seconds:.0f} s | {sent / 1e9:.3f} GB | {ratio} | {asked} | {peak} MB |", flush=True)
    return facts


def same(a: Path, b: Path) -> bool:
    """Return whether two folders have the same files with the same bytes."""
    names = {p.relative_to(a) for p in a.rglob("*") if p.is_file()}
    return names == {p.relative_to(b) for p in b.rglob("*") if p.is_file()} and all(
        filecmp.cmp(a / n, b / n, shallow=False) for n in names
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--window", default="2GB")
    parser.add_argument("--skip-streaming", action="store_true")
    parser.add_argument("--folder", type=Path, help="Where to work. [default: a temporary folder]")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        home = Path(name)
        source = home / "source"
        run({}, "synth", source, "--config", "flash", "--layers", 1, "--experts", args.experts)
        hub = LocalHub(home / "hub")
        try:
            hub.add_repo(NAME, source)
            head = run({}, "inspect", source)[0]["mtp"]["bytes"]
            whole = sum(p.stat().st_size for p in source.glob("*.safetensors"))
            print(f"head {head / 1e9:.3f} GB, shards {whole / 1e9:.3f} GB\n")
            print("| command | time | the Hub sent | of what was needed | requests of files | peak memory |")
            print("| --- | --- | --- | --- | --- | --- |")
            measured(hub, "inspect", 0, "inspect", f"hf://{NAME}")
            measured(hub, "pull --only mtp", head, "pull", NAME, home / "head", "--only", "mtp")
            if not args.skip_streaming:
                measured(hub, f"quantize, window {args.window}", whole, "quantize", f"hf://{NAME}", home / "far",
                         "--window", args.window)  # fmt: skip
            run(hub.environment(), "pull", NAME, home / "pulled")
            run({}, "quantize", home / "pulled", home / "near")
            run({}, "quantize", home / "pulled", home / "bare", "--drop-mtp")
            run({}, "graft", home / "bare", "--from", home / "head", "--out", home / "grafted")
            print(f"\ngrafted from the pulled head, the full conversion: {same(home / 'near', home / 'grafted')}")
            if not args.skip_streaming:
                print(f"streamed, the conversion of the pulled repo: {same(home / 'near', home / 'far')}")
        finally:
            hub.close()


if __name__ == "__main__":
    main()
