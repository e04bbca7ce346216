"""The pages of the site as mkdocs.yml names them, and what stands in them, read without mkdocs."""

from __future__ import annotations

import importlib.util
import re
import shlex
import unicodedata
from collections.abc import Iterator
from functools import cache
from itertools import takewhile
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from tests.support import ROOT

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"(\S*/)?ds4convert ")
SHELL = {">", "|", "||", "&&", ";"}
"""Words behind which a line is no longer that of the command."""

MADE = {"cli.md"}
"""Pages that the program's own help is written into; tests/package/test_docs.py watches those."""


@cache
def config() -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / "mkdocs.yml").read_text()))


@cache
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_site", ROOT / "tools" / "docs_site.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def navigation() -> list[str]:
    """Return the pages of the nav, in its order."""

    def walk(entry: Any) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        else:
            for part in entry.values() if isinstance(entry, dict) else entry:
                yield from walk(part)

    return list(walk(config()["nav"]))


def written() -> list[str]:
    """Return the pages that people write, by their name in the site."""
    return sorted(set(navigation()) - MADE)


def source(page: str) -> Path:
    return ROOT / hooks().source_of(page)


def text(page: str) -> str:
    return source(page).read_text(encoding="utf-8")


def prose(page: str) -> str:
    """Return the text of a page without code."""
    return re.sub(r"`[^`\n]*`", "`code`", FENCE.sub("", text(page)))


def blocks(page: str, *languages: str) -> list[str]:
    return [body for language, body in FENCE.findall(text(page)) if language in languages]


def headings(page: str) -> list[str]:
    return re.findall(r"^#{1,6} (.*)$", FENCE.sub("", text(page)), re.MULTILINE)


def anchors(page: str) -> set[str]:
    """Return the ids of a page's headings as Python-Markdown's toc makes them."""
    found: set[str] = set()
    for heading in headings(page):
        plain = unicodedata.normalize("NFKD", heading.replace("`", "")).encode("ascii", "ignore").decode()
        slug = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())
        number = 0
        while (new := slug + (f"_{number}" if number else "")) in found:
            number += 1
        found.add(new)
    return found


def commands(page: str) -> list[list[str]]:
    """Return the words of every `ds4convert` line of a page's shell blocks, those that go on after a backslash whole."""
    lines = [line for b in blocks(page, "sh", "console", "bash") for line in b.replace("\\\n", " ").splitlines()]
    found = [shlex.split(line, comments=True)[1:] for line in lines if COMMAND.match(line)]
    return [list(takewhile(lambda w: w not in SHELL, words)) for words in found]


def mentioned(page: str) -> list[list[str]]:
    """Return the words of every command with arguments that stands in a sentence."""
    spans = re.findall(r"`ds4convert (\w[^`]*)`", " ".join(FENCE.sub("", text(page)).split("\n")))
    return [words for span in spans if len(words := shlex.split(span)) > 1 and "..." not in span]
