"""The small files of a checkpoint beside its tensors: which are carried over, and why the others are not.

Nothing that could be executed is carried over, and nothing is followed out of the folder.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from ds4convert.folder import read_small
from ds4convert.plan import SideFiles
from ds4convert.strictjson import show
from ds4convert.types import LeftOut

CARRIED = {
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
}
"""Files that hosts read from a converted folder, and the licence."""

REPLACED = {"config.json", "model.safetensors.index.json", "ds4convert_manifest.json"}


def survey(folder: Path) -> SideFiles:
    """Return what becomes of each file beside the tensors; hidden files are passed over.

    Raises `HeaderError` when a file that would be carried over is a link out of the folder.
    """
    copies: dict[str, str] = {}
    left: list[LeftOut] = []
    for entry in sorted(os.scandir(folder), key=lambda e: e.name):
        name = entry.name
        if name.startswith(".") or name in REPLACED or name.endswith(".safetensors"):
            continue
        if name in CARRIED:
            copies[name] = hashlib.sha256(read_small(folder, name)).hexdigest()
        else:
            left.append(LeftOut(show(name), _reason(entry)))
    return SideFiles(copies, tuple(left))


def _reason(entry: os.DirEntry[str]) -> str:
    if entry.is_dir(follow_symlinks=False):
        return "a folder; MLX hosts read none"
    if entry.name.endswith(".py"):
        return "code; a converted folder carries none of the source's"
    if entry.name.upper().startswith("README"):
        return "the source's model card; publish writes one for the result"
    return "not a file that MLX hosts read"
