"""Count the rooms, floors and arrows of the package: folders and loose files of `ds4convert/` count as one room each.

    python tools/structure.py

An arrow is an import from one room to another, wherever it stands in the file. The floor of a room is one above the
highest room that it imports. Prints imports that go against `ORDER`, circles, and the number of files per folder. Exits
with 1 where something is against the rules.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "ds4convert"
ORDER = (
    "manifests", "errors", "interrupts", "isolation", "words", "formats", "storage", "files", "checkpoint", "planning",
    "converted", "inference", "execution", "evaluate", "generation", "derive", "fit", "verification", "hub", "report",
    "publishing", "serving", "api", "demo", "cli", "__init__", "__main__",
)  # fmt: skip
"""The import order: a room imports rooms that stand before it, never one that stands after it."""


def modules() -> dict[str, Path]:
    """Return every module of the package by dotted name without the package's own; links are followed."""
    found = {}
    for top in (PACKAGE, ROOT / "inference", ROOT / "manifests"):
        for path in sorted(top.rglob("*.py")):
            if any(p.is_symlink() for p in path.parents):
                continue
            name = path.relative_to(PACKAGE if top == PACKAGE else ROOT).with_suffix("")
            found[".".join(name.parts)] = path
    return found


def imported(name: str, path: Path, known: set[str]) -> set[str]:
    """Return the modules of ours that a file imports."""
    package = name.split(".")[:-1]
    out = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            words = [*base, *(node.module or "").split(".")] if node.level else (node.module or "").split(".")
            if not node.level and words[0] != "ds4convert":
                continue
            words = [w for w in words if w and w != "ds4convert"]
            for alias in node.names:
                inner = ".".join([*words, alias.name])
                outer = {".".join(words), ".".join([*words, "__init__"])}
                out |= {inner} if inner in known else outer & known
    return out - {name}


def rooms(edges: dict[str, set[str]]) -> dict[str, set[str]]:
    """Return the arrows between rooms."""
    out: dict[str, set[str]] = defaultdict(set)
    for name, targets in edges.items():
        here = name.split(".")[0]
        out[here] |= {t.split(".")[0] for t in targets} - {here}
    return dict(out)


def floors(arrows: dict[str, set[str]]) -> dict[str, int]:
    """Return the floor of each room, 1 for those that import no other; rooms on a circle get none."""
    found: dict[str, int] = {}
    for _ in arrows:
        for room, below in arrows.items():
            if room not in found and all(b in found for b in below):
                found[room] = 1 + max((found[b] for b in below), default=0)
    return found


def main() -> int:
    """Print the figures; return 1 where a rule is broken."""
    found = modules()
    edges = {name: imported(name, path, set(found)) for name, path in found.items()}
    arrows = rooms(edges)
    height = floors(arrows)
    rank = {room: n for n, room in enumerate(ORDER)}
    unknown = sorted(set(arrows) - set(rank))
    back = sorted(
        (a, b) for a, targets in edges.items() for b in targets
        if rank.get(a.split(".")[0], 99) < rank.get(b.split(".")[0], -1)
    )  # fmt: skip
    print(f"rooms {len(arrows)}, floors {max(height.values(), default=0)}, arrows {sum(map(len, arrows.values()))}")
    print(f"on a circle: {sorted(set(arrows) - set(height)) or 'none'}; not in the order: {unknown or 'none'}")
    for a, b in back:
        print(f"  against the order: {a} imports {b}")
    inner = floors({n: {t for t in ts if t.split(".")[0] == n.split(".")[0]} for n, ts in edges.items()})
    print(f"files on a circle: {sorted(set(edges) - set(inner)) or 'none'}")
    files: dict[str, int] = defaultdict(int)
    for name in found:
        files[name.rpartition(".")[0]] += not name.endswith("__init__")
    print("files:", ", ".join(f"{k or 'ds4convert'} {v}" for k, v in sorted(files.items(), key=lambda kv: -kv[1])))
    return 1 if back or unknown or set(arrows) - set(height) or set(edges) - set(inner) else 0


if __name__ == "__main__":
    sys.exit(main())
