"""Make docs/comparison.md from `cases.toml`: run our commands again, and with `--others` those of other programs.

    PYTHONPATH=. python -m tools.comparison [--others] [--check]

What others printed is kept in `others.json`, with their versions and the day, since they are not installed everywhere:
`--others` records it anew (hf, uv, ruff and mlx_lm have to be on the PATH). `--check` writes nothing and exits with 1
where the page is not what our program prints now. A transcript is shortened where a line of brackets says so, and
nowhere else; a temporary folder is written as ".".
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.local_hub import LocalHub

ROOT = Path(__file__).resolve().parent.parent.parent
HERE = Path(__file__).resolve().parent
PAGE = ROOT / "docs" / "comparison.md"
OTHERS = HERE / "others.json"
DEMO = ROOT / "manifests" / "demo"
WIDTH = 100
"""Columns that programs are told to have; longer lines are theirs."""

UNSTEADY = re.compile(r"\d+(\.\d+)? ?(MB/s|KB/s|s)\b")
"""Times and speeds, which no two runs have alike."""

VERSIONS = {
    "hf": ["hf", "version", "--format", "quiet"], "uv": ["uv", "--version"], "ruff": ["ruff", "--version"],
    "mlx_lm": [sys.executable, "-c", "from importlib.metadata import version; print('mlx_lm', version('mlx-lm'))"],
}  # fmt: skip


@dataclass(frozen=True)
class Shown:
    """One command line: `keep` are the lines that are shown (first and last, from 1 on; below 0 from the end on)."""

    line: str
    keep: tuple[tuple[int, int], ...] = ()

    @property
    def is_ours(self) -> bool:
        """Return whether this is a command of ours, behind variables that are set for it."""
        return "ds4convert" in self.line.split("|")[0].split()

    def shortened(self, printed: Printed) -> list[str]:
        """Return the lines that are shown, between them how many were left out, and an exit code that is not 0."""
        end = [f"(exit code {printed.code})"] if printed.code else []
        return [*self._kept([row.rstrip() for row in printed.text.split("\n")]), *end]

    def _kept(self, lines: list[str]) -> list[str]:
        if not self.keep:
            return lines
        out: list[str] = []
        last = 0
        for first, end in self.keep:
            first = first if first > 0 else max(len(lines) + first + 1, last + 1)
            end = end if end > 0 else len(lines) + end + 1
            out += [_left_out(first - last - 1)] if first > last + 1 else []
            out += lines[first - 1 : end]
            last = max(last, end)
        return out + ([_left_out(len(lines) - last)] if last < len(lines) else [])


@dataclass(frozen=True)
class Printed:
    """What a command line printed, and its exit code."""

    text: str
    code: int


def _left_out(count: int) -> str:
    return f"[... {count} line{'s' * (count > 1)} ...]"


@dataclass(frozen=True)
class Case:
    """One thing that people do: what is compared, the command lines, and how it comes out."""

    title: str
    about: str
    shown: tuple[Shown, ...]
    verdict: str


@cache
def cases() -> tuple[Case, ...]:
    """Return the cases in the order of the page."""
    table = tomllib.loads((HERE / "cases.toml").read_text(encoding="utf-8"))
    return tuple(
        Case(
            row["title"],
            row["about"],
            tuple(Shown(x["line"], tuple((a, b) for a, b in x.get("keep", []))) for x in row["shown"]),
            row["verdict"],
        )
        for row in table["case"]
    )


# --- running ---------------------------------------------------------------------------------------------------------


class Place:
    """A folder with what the command lines name, a Hub on this machine, and a program `ds4convert` of this copy."""

    def __init__(self, root: Path) -> None:
        self.here, self.programs = root / "here", root / "bin"
        self.here.mkdir()
        self.programs.mkdir()
        self.hub = LocalHub(root / "hub")
        shutil.copytree(DEMO, self.here / "tiny", ignore=shutil.ignore_patterns("dspark"))
        self.hub.add_repo("owner/model", self.here / "tiny")
        (self.here / "a.py").write_text('import os\nx = {  "a":1}\n')
        program = self.programs / "ds4convert"
        program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m ds4convert "$@"\n')
        program.chmod(0o755)

    def variables(self) -> dict[str, str]:
        """Return the environment of every command line: no colour, one width, the Hub of this machine."""
        path = os.pathsep.join([str(self.programs), str(Path(sys.executable).parent), os.environ["PATH"]])
        own = {
            "PATH": path,
            "PYTHONPATH": str(ROOT),
            "COLUMNS": str(WIDTH),
            "NO_COLOR": "1",
            "PYTHONWARNINGS": "ignore",
        }
        own |= {"HOME": str(self.here.parent), "XDG_CONFIG_HOME": str(self.here.parent), "LC_ALL": "C.UTF-8"}
        own |= {"VIRTUAL_ENV": str(Path(sys.prefix)), "LINES": "40"}
        kept = {
            k: v for k, v in os.environ.items() if k in {"TMPDIR", "SSL_CERT_FILE"} or k.startswith(("UV_", "PIP_"))
        }
        return kept | own | self.hub.environment()

    def run(self, line: str) -> Printed:
        """Return what a command line prints, both streams as they come, and how it ends."""
        done = subprocess.run(
            ["/bin/sh", "-c", line], cwd=self.here, env=self.variables(), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", timeout=600,
        )  # fmt: skip
        text = re.sub(r"[^\n]*\r(?!\n)", "", done.stdout).replace(str(self.here), ".").replace(str(ROOT), "...")
        text = re.sub(r"/[^\s\"']*/site-packages/", ".../", re.sub(r"/[^\s\"']*/bin/(?=\w)", "...bin/", text))
        text = text.replace(sys.prefix, "venv").replace("...bin/python", "python")
        return Printed(text.strip("\n"), done.returncode)

    def close(self) -> None:
        """End the Hub."""
        self.hub.close()


def recorded(ours: bool) -> dict[str, list[str]]:
    """Return what each command line prints, shortened: those of ours, or those of the other programs."""
    out: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory(prefix="comparison-") as root, closing(Place(Path(root))) as place:
        if not ours:
            _foreign_model(place.here / "llama")
        for case in cases():
            for shown in case.shown:
                if shown.is_ours == ours:
                    out[shown.line] = shown.shortened(place.run(shown.line))
    return out


def _foreign_model(folder: Path) -> None:
    """Write a model that mlx_lm converts: two random layers, with the tokenizer of the demo."""
    import numpy as np
    from safetensors.numpy import save_file

    folder.mkdir()
    config = {
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "vocab_size": 1024,
        "num_attention_heads": 4, "num_key_value_heads": 4, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens": (1024, 64), "model.norm": (64,)}
    for n in range(2):
        at = f"model.layers.{n}"
        shapes |= {f"{at}.self_attn.{x}_proj": (64, 64) for x in "qkvo"}
        shapes |= {f"{at}.mlp.{x}_proj": (128, 64) for x in ("gate", "up")} | {f"{at}.mlp.down_proj": (64, 128)}
        shapes |= {f"{at}.{x}_layernorm": (64,) for x in ("input", "post_attention")}
    draw = np.random.default_rng(0)
    save_file({f"{k}.weight": draw.standard_normal(s).astype(np.float16) for k, s in shapes.items()},
              str(folder / "model.safetensors"))  # fmt: skip
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder / name)


def record_others() -> None:
    """Run the other programs, and keep what they print."""
    versions = {}
    for name, command in VERSIONS.items():
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = re.search(r"\d+\.\d+[\w.]*", told)
        versions[name] = found[0] if found else told.strip()
    table = {"day": f"{datetime.date.today():%Y-%m-%d}", "versions": versions, "printed": recorded(ours=False)}
    OTHERS.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


# --- the page --------------------------------------------------------------------------------------------------------


def rendered(ours: Mapping[str, Sequence[str]]) -> str:
    """Return the page, with what our program printed."""
    table = json.loads(OTHERS.read_text(encoding="utf-8"))
    printed = {**table["printed"], **ours}
    names = ", ".join(f"`{k}` {v}" for k, v in table["versions"].items())
    head = tomllib.loads((HERE / "cases.toml").read_text(encoding="utf-8"))
    lines = [head["intro"].strip().replace("VERSIONS", names).replace("DAY", table["day"])]
    for n, case in enumerate(cases(), 1):
        lines += ["", f"## {n}. {case.title}", "", case.about.strip()]
        for shown in case.shown:
            lines += ["", "```text", f"$ {shown.line}", *printed[shown.line], "```"]
        lines += ["", case.verdict.strip()]
    return "\n".join([*lines, "", head["end"].strip()]) + "\n"


def drift(page: str, new: str) -> Iterator[str]:
    """Yield the lines in which a page is not what is printed now, times and speeds aside."""
    import difflib

    before, now = (UNSTEADY.sub("N", text).splitlines() for text in (page, new))
    yield from difflib.unified_diff(before, now, "docs/comparison.md", "printed now", lineterm="", n=1)


def main() -> int:
    """Make or check the page; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.comparison", description=__doc__.partition("\n")[0])
    parser.add_argument("--others", action="store_true", help="record the other programs anew")
    parser.add_argument("--check", action="store_true", help="write nothing, and say what is not so any more")
    asked = parser.parse_args()
    if asked.others:
        record_others()
    new = rendered(recorded(ours=True))
    if asked.check:
        told = list(drift(PAGE.read_text(encoding="utf-8"), new))
        print("\n".join(told) or "the page is what the program prints")
        return 1 if told else 0
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
