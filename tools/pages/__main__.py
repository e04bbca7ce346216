"""Make the pictures of docs/pictures, and check every page on the way.

    python -m tools.pages [--out docs/pictures] [--check]

Converts the demo checkpoint with its DSpark head, writes the report of `verify` and the page of `inspect` about the
result, that of `inspect` about Flash's config, serves the folder, talks to the page, and takes pictures of all.
Needs a Chromium, and the package installed. Exits with 1 where something does not hold that `checker` asks for;
`--check` asks it of every width in light and dark and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ds4convert.demo import embedded
from tools.pages import checker
from tools.pages.browser import Browser, program

ROOT = Path(__file__).resolve().parent.parent.parent
PROMPTS = ROOT / "manifests" / "prompts" / "demo.txt"
NAME = "demo-q4-mlx"
TEXT = "And it came to pass in those days, that"
QUESTION = "And he said unto the people of the land"

PICTURES = {
    "source": ((1280, 1140, "light", "body"),),
    "folder": ((390, 844, "dark", "body"),),
    "report": ((1280, 1140, "light", "body"), (768, 1140, "light", "#texts"), (390, 1140, "dark", "#formats")),
    "serve": ((1280, 860, "light", "body"), (768, 860, "light", "body"), (390, 844, "dark", "body")),
}
"""Of each page: widths and heights in CSS pixels, the colours, and what the picture begins with."""

MOST_BYTES = 1_000_000
"""All pictures together: every copy of the repository has them."""


def main() -> int:
    """Make the pictures or check the pages; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.pages", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "pictures")
    parser.add_argument("--check", action="store_true", help="check at all widths, and write nothing")
    asked = parser.parse_args()
    if program() is None:
        print("no Chromium is installed", file=sys.stderr)
        return 4
    with tempfile.TemporaryDirectory(prefix="pages-") as found:
        work = Path(found)
        folder, files = made(work)
        with serving(folder) as url, Browser(work / "profile") as browser:
            pages = {name: path.as_uri() for name, path in files.items()} | {"serve": url}
            told = [f"{name}: {x}" for name, at in pages.items() for x in visited(browser, name, at, asked)]
    print("\n".join(told) or "every check of every page holds")
    return 1 if told else 0


def visited(browser: Browser, name: str, url: str, asked: argparse.Namespace) -> Iterator[str]:
    """Take the pictures of one page, or check it; yields what is wrong with it."""
    if asked.check:
        browser.show(1280)
        browser.open(url)
        if name == "serve":
            talk(browser)
        yield from checker.faults(browser)
        return
    for width, height, scheme, first in PICTURES[name]:
        browser.show(width, height, scheme)
        browser.open(url)
        if name == "serve":
            talk(browser)
        asked.out.mkdir(parents=True, exist_ok=True)
        path = asked.out / f"{name}-{width}.png"
        top = browser.value(
            f"Math.max(0, document.querySelector({first!r}).getBoundingClientRect().top + scrollY - 12)"
        )
        path.write_bytes(browser.picture(height, top))
        print(f"{path} {path.stat().st_size:,} bytes")
        yield from checker.faults(browser, (width,), (scheme,))
    if (size := sum(p.stat().st_size for p in asked.out.glob("*.png"))) > MOST_BYTES:
        yield f"the pictures have {size:,} bytes, more than {MOST_BYTES:,}"


def talk(browser: Browser) -> None:
    """Have a conversation on the page of `serve`: two turns, the first one both ways."""
    browser.wait("!!limits")
    browser.value(
        "document.querySelector('#kind').value = 'text'; kind(); document.querySelector('#max_tokens').value = 56"
    )
    for step in (f"prompt.value = {json.dumps(TEXT)}; send()", "regenerate(false)", "regenerate(true)",
                 f"prompt.value = {json.dumps(QUESTION)}; send()"):  # fmt: skip
        browser.value(f"{{ const prompt = document.querySelector('#prompt'); {step} }}")
        browser.wait("!running")


def made(work: Path) -> tuple[Path, dict[str, Path]]:
    """Convert the demo with its DSpark head at 4 bits; return the folder, and the pages about it by name.

    "source" is what `inspect` tells of Flash from its config, "folder" what it tells of the folder once it is verified.
    """
    source, folder = work / "demo", work / NAME
    found = {name: work / f"{name}.html" for name in ("source", "folder", "report")}
    source.mkdir()
    for name, data in embedded.files(embedded.DSPARK):
        (source / name).write_bytes(data)
    run("quantize", source, folder, "--recipe", "q4", "-q")
    run("verify", folder, "--source", source, "--mtp", "--max-tokens", 64, "--prompts", PROMPTS, "--dtype", "float32",
        "--report", found["report"], "-q")  # fmt: skip
    run("inspect", "--config", "flash", "--report", found["source"], "-q")
    run("inspect", folder, "--report", found["folder"], "-q")
    return folder, found


def command(*words: object) -> list[str]:
    """Return the command line of the program in this copy of the repository."""
    return [sys.executable, "-m", "ds4convert", *map(str, words)]


def run(*words: object) -> None:
    """Run the program; raises where it fails."""
    subprocess.run(command(*words), check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Serve a folder on a free port; yields the address of its page."""
    words = command("serve", folder, "--port", 0, "--dtype", "float32", "--json", "-q")
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ) as process:
        assert process.stdout is not None
        told = ""
        while not told.rstrip().endswith("}"):
            line = process.stdout.readline()
            if not line:
                raise SystemExit(f"the server has ended: exit code {process.wait()}")
            told += line
        try:
            yield json.loads(told)["url"] + "/"
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


if __name__ == "__main__":
    sys.exit(main())
