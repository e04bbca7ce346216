"""The small files of a checkpoint beside its tensors: which are carried over, and why the others are not.

Nothing that could be executed is carried over, and nothing is followed out of the folder. A source without a chat
template gets that of its family (`manifests/templates/FAMILY.jinja`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from ds4convert.checkpoint.folder import TEMPLATE_NAME
from ds4convert.checkpoint.types import LeftOut
from ds4convert.errors import InputError
from ds4convert.storage import strict_json
from ds4convert.storage.belonging import belongs
from ds4convert.storage.safe_open import read_small
from ds4convert.storage.untrusted.lookalikes import told, told_text
from ds4convert.words.terminal import show

TOKENIZER_CONFIG = "tokenizer_config.json"

CARRIED = {
    "tokenizer.json",
    TOKENIZER_CONFIG,
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
    TEMPLATE_NAME,
    "chat_template.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
}
"""Files that hosts read from a converted folder, and the licence."""

REPLACED = {
    "config.json", "model.safetensors.index.json", "ds4convert_manifest.json", "ds4convert_verify.json",
    "ds4convert_pull.json",
}  # fmt: skip
"""What a conversion makes anew, and what tells of the folder that it stands in alone."""


def survey(folder: Path, family: str) -> SideFiles:
    """Return what becomes of each file beside the tensors of a `family`; hidden files are passed over.

    Raises `HeaderError` when a file that would be carried over is a link out of the folder.
    """
    copies: dict[str, str] = {}
    left: list[LeftOut] = []
    for entry in sorted(os.scandir(folder), key=lambda e: e.name):
        name = entry.name
        if not belongs(name) or name in REPLACED or name.endswith(".safetensors"):
            continue
        if name in CARRIED:
            data = read_small(folder, name)
            check_carried(name, data)
            copies[name] = hashlib.sha256(data).hexdigest()
        else:
            left.append(LeftOut(show(name), _reason(entry)))
    return SideFiles(copies, tuple(left), {} if _has_template(folder, copies.keys()) else template(family))


LARGE_BYTES = strict_json.ASCII_ABOVE_BYTES
"""JSON above this with wide characters is only looked at, not parsed: that would take hundreds of megabytes."""


def check_carried(name: str, data: bytes) -> None:
    """Raise `InputError` where a file that would be carried over is not what its name says: a pointer, a page, cut off.

    It would go unread through conversion and verification, into what is published, and fail in every host.
    """
    if name.startswith("LICENSE"):
        if data and (other := told(data[:200])) and "web page" not in other:  # some licences are pages
            raise InputError(f"{name}: {other}")
        return
    if other := told_text(data):
        raise InputError(f"{name}: {other}")
    if not name.endswith(".json"):
        return
    if len(data) > LARGE_BYTES and not data.isascii():
        if not (data.lstrip().startswith(b"{") and data.rstrip().endswith(b"}")):
            raise InputError(f"{name}: is cut off or no JSON object", hint="download it again")
    elif not isinstance(strict_json.loads(data, name), dict):
        raise InputError(f"{name}: expected a JSON object", hint="download it again")


def template(family: str) -> dict[str, bytes]:
    """Return the chat template of a family under its file name; {} where the package knows none."""
    path = resources.files("ds4convert.manifests") / "templates" / f"{family}.jinja"
    return {TEMPLATE_NAME: path.read_bytes()} if path.is_file() else {}


def _has_template(folder: Path, names: Set[str]) -> bool:
    """Return whether the source has a chat template of its own, in any of the places where hosts look for it."""
    if names & {TEMPLATE_NAME, "chat_template.json"}:
        return True
    if TOKENIZER_CONFIG not in names:
        return False
    try:
        table = strict_json.plain(read_small(folder, TOKENIZER_CONFIG))
    except ValueError:
        return False  # carried over as it is; whoever reads it says what is wrong with it
    return isinstance(table, dict) and bool(table.get("chat_template"))


def _reason(entry: os.DirEntry[str]) -> str:
    if entry.is_dir(follow_symlinks=False):
        return "a folder; MLX hosts read none"
    if entry.name.endswith(".py"):
        return "code; a converted folder carries none of the source's"
    if entry.name.upper().startswith("README"):
        return "the source's model card; publish writes one for the result"
    return "not a file that MLX hosts read"


@dataclass(frozen=True)
class SideFiles:
    """Small files of the source: `copies` (name to sha256) are taken over, `left_out` are not, with the reason.

    `added` (name to bytes) are written because hosts read them and the source has none.
    """

    copies: Mapping[str, str]
    left_out: tuple[LeftOut, ...]
    added: Mapping[str, bytes] = field(default_factory=dict)
