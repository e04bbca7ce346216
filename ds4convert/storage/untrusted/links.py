"""Which links of a checkpoint folder may lead out of it: those into the Hub client's cache, under their own names.

A link is otherwise never followed: a hostile checkpoint could name any file of this machine, and have it copied into
what the user publishes.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

from ds4convert.words.terminal import show

MOST_SHOWN = 1000
"""Characters of a path: it is to be found by the user, so it is said whole."""

_BLOB = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")
"""A blob's name is its sha256 or git hash. Source: huggingface_hub, guides/manage-cache ("blobs")."""


def may_leave(home: Path, name: str, real: Path) -> bool:
    """Return whether the link `name` of the folder `home` may lead to `real`, which is outside.

    The cache's own links go from `snapshots/REV/` to `blobs/`. Another folder may link into a cache as well, to a blob
    that a snapshot of the same repo has under this very name: so a link cannot pass one file off as another.
    """
    if home.parent.name == "snapshots":
        return real.parent == home.parent.parent / "blobs"
    return is_blob(real) and _is_in_a_snapshot(name, real)


def dangling(path: Path, real: Path) -> str:
    """Return what is to be said of `path` where it is a link to `real`, and nothing is there; "" otherwise.

    A loop of links is none of these: its last link is there.
    """
    is_link = os.path.islink(path)  # noqa: PTH114  # a name that is too long is no link; pathlib raises for it
    if not is_link or os.path.lexists(real):
        return ""
    if "annex" in real.parts:
        how = "git-annex has not fetched it: `git annex get` in that clone"
    elif real.parent.name == "blobs":
        how = "a file of the Hub client's cache that was removed, or not downloaded to its end; download it again"
    else:
        how = "put the file there, or download it again"
    return f"is a link to {show(str(real), MOST_SHOWN)}, which is not there; {how}"


def is_blob(real: Path) -> bool:
    """Return whether a real path is that of a file in the Hub client's cache: models--OWNER--NAME/blobs/DIGEST."""
    repo = real.parent.parent
    return real.parent.name == "blobs" and repo.name.startswith("models--") and bool(_BLOB.fullmatch(real.name))


def _is_in_a_snapshot(name: str, blob: Path) -> bool:
    """Return whether a snapshot beside the blob's folder has the file `name`, and means this blob by it."""
    with suppress(OSError):
        snapshots = [e.path for e in os.scandir(blob.parent.parent / "snapshots") if e.is_dir(follow_symlinks=False)]
        return any(Path(os.path.realpath(Path(s) / name)) == blob for s in snapshots)
    return False
