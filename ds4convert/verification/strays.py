"""Files of a converted folder that its manifest does not name and that a host would read all the same.

Hosts read more than tensors: mlx-lm fetches and reads `*.json`, `*.py`, `*.jinja`, `*.jsonl`, `*.tiktoken` and
`tokenizer.model` (mlx_lm/utils.py, `DEFAULT_ALLOW_PATTERNS`); Transformers' tokenizers read `chat_template.jinja`,
every file of `additional_chat_templates/`, `vocab.txt` and `merges.txt` (utils/hub.py, `CHAT_TEMPLATE_DIR`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ds4convert.converted.manifest import MANIFEST_NAME, VERIFY_NAME
from ds4convert.storage.belonging import belongs
from ds4convert.words.terminal import show

SUFFIXES = (
    ".safetensors", ".json", ".jsonl", ".py", ".jinja", ".model", ".tiktoken", ".npz", ".gguf", ".bin", ".pt", ".pth",
)  # fmt: skip
NAMES = {"vocab.txt", "merges.txt"}
OWN = {MANIFEST_NAME, VERIFY_NAME, "ds4convert_pull.json"}
"""What tells of the folder, and is read by nothing but ds4convert."""

MOST_ENTRIES = 20_000
"""Entries that are looked at: a converted folder has a few hundred."""


def found(folder: Path, named: set[str]) -> list[str]:
    """Return, sorted, the files (relative to `folder`) that hosts read and that are not among `named`.

    Hidden files are no part of a folder. A link to a folder is told as such: hosts follow it.
    """
    return sorted(show(n) for n in _below(folder, "") if n not in named and n not in OWN)


def _below(folder: Path, prefix: str) -> Iterator[str]:
    """Yield every file that a host would read, below `folder`, under its relative name."""
    left, waiting = MOST_ENTRIES, [(folder, prefix)]
    while waiting and left > 0:
        here, before = waiting.pop()
        try:
            entries = sorted(os.scandir(here), key=lambda e: e.name)
        except OSError:
            continue  # no permission: nothing that runs as this user reads it either
        for e in entries[:left]:
            if not belongs(e.name):
                continue
            if e.is_dir(follow_symlinks=False):
                waiting.append((here / e.name, f"{before}{e.name}/"))
            elif _leads_to_folder(e):
                yield f"{before}{e.name} (a link to a folder)"
            elif is_read(e.name):
                yield before + e.name
        left -= len(entries)


def _leads_to_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder by its link; one that leads nowhere, or in a circle, is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def is_read(name: str) -> bool:
    """Return whether a host reads a file of this name."""
    low = name.lower()
    return low.endswith(SUFFIXES) or low in NAMES
