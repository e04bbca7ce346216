"""Small files as they should not be: pointers, pages and stumps that stand where a file was to be downloaded."""

from __future__ import annotations

from pathlib import Path

from ds4convert.errors import Ds4Error
from ds4convert.storage import strict_json
from ds4convert.storage.safe_open import read_small

POINTER = b"version https://git-lfs.github.com/spec/"
"""How a pointer of git's large file storage begins: https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md"""

PAGES = (b"<!doctype html", b"<html", b"<?xml")
MAY_BE_EMPTY = (".txt", ".md", "LICENSE", "NOTICE", ".gitattributes")


def fault(name: str, raw: bytes) -> str | None:
    """Return what is wrong with a small file's bytes, in words, or None. JSON has to be whole."""
    start = raw[:200].removeprefix(b"\xef\xbb\xbf").lstrip()
    if raw.startswith(POINTER):
        return "is a Git LFS pointer, not the file itself; fetch it with `git lfs pull` or `ds4convert pull`"
    if start.lower().startswith(PAGES):
        return "is a web page (HTML), not the file itself; download it again"
    if not start and not name.endswith(MAY_BE_EMPTY):
        return "is empty; download it again"
    return _json_fault(raw) if name.endswith(".json") else None


def _json_fault(raw: bytes) -> str | None:
    try:
        table = strict_json.plain(raw.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return "is not UTF-8 text, expected JSON"
    except ValueError as e:
        at = getattr(e, "pos", len(raw))
        cut = " (it ends too early)" if at >= len(raw.rstrip()) - 1 else ""
        return f"is not whole JSON{cut}; download it again"
    return None if isinstance(table, dict | list) else "is JSON, but neither a table nor a list"


def faults(folder: Path, names: list[str]) -> list[str]:
    """Return what is wrong with the small files `names` of a folder, each with its name."""
    found = []
    for name in names:
        if name.endswith(".safetensors"):
            continue
        try:
            words = fault(name, read_small(folder, name))
        except Ds4Error as e:
            words = str(e)
        if words:
            found.append(f"{name}: {words}" if not words.startswith(f"{name}:") else words)
    return found
