"""Which names are part of a folder: the one rule for checkpoints, results, repos and our own data files."""

from __future__ import annotations


def belongs(name: str) -> bool:
    """Return whether a file or folder of this name (or relative path, with `/`) is part of the folder that it is in.

    Names that begin with a dot never are: `._NAME`, `.DS_Store` and `.Spotlight-V100` are left by macOS on drives that
    are not its own, `.git` and `.cache` by other programs. Every place that lists a folder asks here.
    """
    return not any(part.startswith(".") for part in name.split("/"))
