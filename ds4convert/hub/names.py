"""What names a repo of the Hub: `hf://owner/name[@revision]`, `owner/name`, or the address of a page of the Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ds4convert.errors import UsageError
from ds4convert.words.terminal import show

SCHEME = "hf://"
HOSTS = frozenset({"huggingface.co", "www.huggingface.co", "hf.co"})
_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_PLAIN = re.compile(rf"{_PART}/{_PART}(@\S+)?")
_EXPECTED = "expected hf://owner/name, owner/name, either with @revision, or the address of its page"


def is_repo(src: str) -> bool:
    """Return whether `src` means a repo of the Hub. A local folder or file of that name goes before `owner/name`."""
    if src.startswith(SCHEME) or _is_page(src):
        return True
    return _PLAIN.fullmatch(src) is not None and not Path(src).exists()


def _base_of(src: str, endpoint: str | None = None) -> str | None:
    """Return the path under which the Hub answers at the host of an address ("" mostly); None where it is no Hub's."""
    if not src.lower().startswith(("http://", "https://")):
        return None
    here = urlsplit(src)
    for known in (endpoint, os.environ.get("HF_ENDPOINT")):
        there = urlsplit(known or "")
        base = there.path.rstrip("/")
        if there.netloc and there.netloc.lower() == here.netloc.lower() and f"{here.path}/".startswith(f"{base}/"):
            return base
    return "" if here.netloc.lower() in HOSTS else None


def _is_page(src: str) -> bool:
    return _base_of(src) is not None


def split_name(src: str, revision: str | None = None, endpoint: str | None = None) -> tuple[str, str | None]:
    """Return (owner/name, revision or None) of what names a repo. Raises `UsageError`.

    A page's address may name a revision after `/tree/`, `/blob/` or `/resolve/`; what comes after it is left out.
    """
    if src.lower().startswith(("http://", "https://")):
        name, found = _of_page(src, endpoint)
    else:
        name, at, found = src.removeprefix(SCHEME).partition("@")
        if at and not found:
            raise UsageError(f"{show(src)}: names no revision after @; {_EXPECTED}")
    parts = name.split("/")
    if len(parts) != 2 or not all(parts) or not name.isprintable() or any(p in {".", ".."} for p in parts):
        raise UsageError(f"{show(src)}: is not a repo of the Hub; {_EXPECTED}")
    if found and revision and found != revision:
        raise UsageError(f"{show(src)}: names the revision {show(found)}, --revision another", hint="give one of them")
    return name, revision or found or None


def _of_page(src: str, endpoint: str | None) -> tuple[str, str]:
    base = _base_of(src, endpoint)
    if base is None:
        raise UsageError(f"{show(src)}: is not a page of the Hub (or of HF_ENDPOINT); {_EXPECTED}")
    words = [unquote(w) for w in urlsplit(src).path.removeprefix(base).split("/") if w]
    if words[:2] == ["api", "models"]:
        words = words[2:]
    if words[:1] in (["datasets"], ["spaces"]):
        raise UsageError(f"{show(src)}: is a page of {words[0]}; a checkpoint is a model repo: {_EXPECTED}")
    found = words[3] if len(words) > 3 and words[2] in {"tree", "blob", "resolve", "raw", "revision", "commit"} else ""
    return "/".join(words[:2]), found
