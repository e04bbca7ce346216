"""What a measurement keeps on the disk to go on from, and how it tells that it is of this very measurement."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ds4convert.storage import strict_json
from ds4convert.storage.safe_open import read_own


def identity(folder: Path, facts: object) -> str:
    """Return a digest of `facts` (plain JSON) and of the model's files by size and time.

    Two models of one shape have equal headers, so the files themselves have to tell that another one took their place.
    """
    files = [p for pattern in ("*.safetensors", "*.json") for p in folder.glob(pattern)]
    looks = sorted((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files if p.is_file())
    return hashlib.sha256(json.dumps([looks, facts], sort_keys=True).encode()).hexdigest()


def read(path: Path) -> dict[str, Any]:
    """Return the JSON object that was kept in a file, {} where there is none that can be read."""
    try:
        found = strict_json.plain(read_own(path.parent, path.name))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
