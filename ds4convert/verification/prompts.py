"""Prompts of a check: the fixed set that ships with the tool, or a file of the user's. Knows no tokenizer."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from ds4convert.errors import UsageError
from ds4convert.storage import strict_json

FIXED = "verify"
MAX_BYTES = 16_000_000
_IDS = re.compile(r"\d{1,9}(\s*,\s*\d{1,9})+")


@dataclass(frozen=True)
class RawPrompt:
    """A prompt as it was given: a text, or token ids."""

    name: str
    content: str | tuple[int, ...]


def fixed_prompts() -> list[RawPrompt]:
    """Return the set that ships with the tool."""
    path = files("ds4convert.manifests") / "prompts" / f"{FIXED}.toml"
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    return [RawPrompt(p["name"], p["text"].strip("\n")) for p in table["prompt"]]


def read_prompts(path: Path) -> list[RawPrompt]:
    """Return the prompts of a file: a JSON list of texts and lists of ids, or one prompt a line.

    A line `[1, 2, 3]` or `1,2,3` is a list of ids; blank lines are passed over. Raises `UsageError` on an empty
    prompt, or a file without any.
    """
    if path.stat().st_size > MAX_BYTES:
        raise UsageError(f"--prompts {path}: {path.stat().st_size} bytes; at most {MAX_BYTES} are read")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise UsageError(f"--prompts {path}: not UTF-8 text: {e}") from e
    items = _items(path, text)
    if not items:
        raise UsageError(f"--prompts {path}: no prompt in it")
    return [_prompt(path, number, item) for number, item in enumerate(items, 1)]


def _items(path: Path, text: str) -> list[Any]:
    try:
        whole = strict_json.plain(text)
    except ValueError as e:
        if path.suffix == ".json":
            raise UsageError(f"--prompts {path}: not JSON: {e}") from e
        return [_line(line) for line in text.splitlines() if line.strip()]
    if isinstance(whole, list) and whole and all(type(x) is int for x in whole):
        return [whole]  # a file of one line of ids
    if isinstance(whole, list):
        return whole
    if path.suffix == ".json":
        raise UsageError(f"--prompts {path}: expected a JSON list of prompts, found {type(whole).__name__}")
    return [_line(line) for line in text.splitlines() if line.strip()]


def _line(line: str) -> Any:
    stripped = line.strip()
    if _IDS.fullmatch(stripped):
        return [int(x) for x in stripped.split(",")]
    if stripped.startswith("["):
        try:
            found = strict_json.plain(stripped)
        except ValueError:
            return line
        return found if isinstance(found, list) and all(type(x) is int for x in found) else line
    return line


def _prompt(path: Path, number: int, item: Any) -> RawPrompt:
    where = f"--prompts {path}: prompt {number}"
    if isinstance(item, str) and item.strip():
        return RawPrompt(f"prompt-{number}", item)
    if isinstance(item, list) and item and all(type(x) is int for x in item):
        return RawPrompt(f"prompt-{number}", tuple(item))
    if item in ("", []) or (isinstance(item, str) and not item.strip()):
        raise UsageError(f"{where} is empty")
    raise UsageError(f"{where}: expected a text or a list of token ids, found {type(item).__name__}")
