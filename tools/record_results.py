"""Record what every command writes and prints, so that two versions of the program can be compared.

    python tools/record_results.py OUT.json CHECKPOINT...

Converts each checkpoint with every layout and recipe, and runs the reporting commands on it all. OUT.json gets, per
command line: the exit code, the sha256 of every file written (plan ids and manifests are among them), and the JSON
document without figures of time, memory and place. Two such files of healthy versions differ in nothing: see
`python tools/record_results.py --compare A.json B.json`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from ds4convert import __main__

LAYOUTS = ("inline", "universal", "mtplx", "vlm", "mlx-lm")
RECIPES = ("native", "q8", "q6", "q4", "q3", "q2", "bf16")
UNSTEADY = {
    "seconds", "bytes_per_second", "free_bytes", "manifest", "source", "path", "plain_tokens_per_second",
    "mtp_tokens_per_second", "tokens_per_second", "speedup", "time", "estimate", "machine", "version",
}  # fmt: skip
"""Keys of JSON documents whose values depend on the machine, the moment, or where the folders lie."""


def command(*words: str) -> dict[str, Any]:
    """Run one command line in this process; return its exit code and JSON document (or text)."""
    out, err = io.StringIO(), io.StringIO()
    old, sys.argv = sys.argv, ["ds4convert", *words]
    code: Any = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = __main__.main()
    except SystemExit as ended:
        code = ended.code
    finally:
        sys.argv = old
    text = out.getvalue()
    try:
        return {"exit": code or 0, "json": steady(json.loads(text))}
    except ValueError:
        return {"exit": code or 0, "text": text if not code else ""}


def steady(value: Any) -> Any:
    """Return a JSON value without the keys that are not the same from run to run."""
    if isinstance(value, dict):
        return {k: steady(v) for k, v in value.items() if k not in UNSTEADY}
    return [steady(v) for v in value] if isinstance(value, list) else value


def digests(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file below a folder by relative name."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def record(checkpoint: Path, work: Path) -> dict[str, Any]:
    """Return what came of every command on one checkpoint."""
    found: dict[str, Any] = {"inspect": command("inspect", str(checkpoint), "--json")}
    for layout in LAYOUTS:
        for recipe in RECIPES:
            out = work / f"{layout}-{recipe}"
            key = f"quantize --layout {layout} --recipe {recipe}"
            options = ["--layout", layout, "--recipe", recipe]
            found[f"plan {key}"] = command("plan", str(checkpoint), *options, "--json")
            found[key] = command("quantize", str(checkpoint), str(out), *options, "--json")
            if out.exists():
                found[key]["files"] = digests(out)
    for layout in LAYOUTS:
        folder = work / f"{layout}-native"
        if not (folder / "config.json").exists():
            continue
        found[f"inspect {layout}"] = command("inspect", str(folder), "--json")
        found[f"verify {layout}"] = command("verify", str(folder), "--source", str(checkpoint), "--json")
        found[f"diff {layout}"] = command("diff", str(checkpoint), str(folder), "--json")
        for other in LAYOUTS:
            out = work / f"{layout}-to-{other}"
            again = command("relayout", str(folder), str(out), "--layout", other, "--json")
            found[f"relayout {layout} {other}"] = again | {"files": digests(out) if out.exists() else {}}
            shutil.rmtree(out, ignore_errors=True)
    found |= head_moved(checkpoint, work)
    return found


def head_moved(checkpoint: Path, work: Path) -> dict[str, Any]:
    """Return what comes of dropping the head, grafting it again, and decoding with it."""
    bare, whole = work / "bare", work / "whole"
    found = {"drop": command("quantize", str(checkpoint), str(bare), "--drop-mtp", "--json")}
    found["drop"]["files"] = digests(bare) if bare.exists() else {}
    found["graft"] = command("graft", str(bare), "--from", str(checkpoint), "--out", str(whole), "--json")
    found["graft"]["files"] = digests(whole) if whole.exists() else {}
    ids = ["--prompt-ids", "1,2,3,4,5", "--max-tokens", "24", "--dtype", "float32", "--json"]
    found["generate"] = command("generate", str(whole), *ids)
    found["generate mtp"] = command("generate", str(whole), "--mtp", *ids)
    return found


def compare(a: Path, b: Path) -> int:
    """Print every command line whose record differs; return how many do."""
    left, right = (json.loads(p.read_text()) for p in (a, b))
    differing = 0
    for checkpoint in sorted(left.keys() | right.keys()):
        ours, theirs = left.get(checkpoint, {}), right.get(checkpoint, {})
        for key in sorted(ours.keys() | theirs.keys()):
            if ours.get(key) != theirs.get(key):
                differing += 1
                print(f"{checkpoint}: {key}: {_first_difference(ours.get(key), theirs.get(key))}")
    print(f"{differing} of {sum(len(v) for v in left.values())} records differ")
    return differing


def _first_difference(a: Any, b: Any, where: str = "") -> str:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(k for k in b if k not in a)]:
            if a.get(key) != b.get(key):
                return _first_difference(a.get(key), b.get(key), f"{where}.{key}")
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            if x != y:
                return _first_difference(x, y, f"{where}[{i}]")
    return f"{where}: {str(a)[:150]} | {str(b)[:150]}"


def main() -> int:
    """Record, or compare two records."""
    words = sys.argv[1:]
    if words[:1] == ["--compare"]:
        return min(1, compare(Path(words[1]), Path(words[2])))
    out, *checkpoints = map(Path, words)
    found = {}
    for checkpoint in checkpoints:
        with tempfile.TemporaryDirectory() as work:
            found[checkpoint.parent.name if checkpoint.name == "checkpoint" else checkpoint.name] = record(
                checkpoint, Path(work)
            )
    out.write_text(json.dumps(found, indent=1, sort_keys=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
