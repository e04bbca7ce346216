"""How the Hub's client is set here, without anything secret: what an issue report may show."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from ds4convert.checkpoint.types import JSON


def settings() -> JSON:
    """Return endpoint, whether the client is offline, its cache, and where a token comes from; never the token."""
    from huggingface_hub import constants, get_token

    by_variable = any(os.environ.get(n) for n in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"))
    return {
        "endpoint": without_secrets(str(constants.ENDPOINT)),
        "offline": bool(constants.HF_HUB_OFFLINE),
        "cache": at_home(str(constants.HF_HUB_CACHE)),
        "token": "environment" if by_variable else "login" if get_token() else None,
    }


def without_secrets(address: str) -> str:
    """Return an address without user, password, query and fragment."""
    try:
        parts = urlsplit(address)
    except ValueError:
        return "(not an address)"
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def at_home(path: str) -> str:
    """Return a path with `~` for the home folder, whose name is often that of a person."""
    home = str(Path.home())
    return f"~{path.removeprefix(home)}" if home != "/" and (path == home or path.startswith(f"{home}/")) else path
