"""The project's version and address: read from the package's own metadata, and from nowhere else.

No address is decided yet, so there is none, and nothing prints one.
"""

from __future__ import annotations

NAMES = ("Repository", "Homepage")
"""Which of the addresses in `[project.urls]` is the project's, the first that is there."""


def version() -> str:
    """Return the version of the installed package, or `0+source` where it runs from a tree that is not installed."""
    from importlib import metadata

    try:
        return metadata.version("ds4convert")
    except metadata.PackageNotFoundError:
        return "0+source"


def address() -> str | None:
    """Return the address under which the project is found, None while none is decided."""
    from importlib.metadata import PackageNotFoundError, metadata

    try:
        rows = metadata("ds4convert").get_all("Project-URL") or []
    except PackageNotFoundError:
        return None
    known = dict(r.partition(", ")[::2] for r in rows)
    return next((known[n] for n in NAMES if known.get(n)), None)
