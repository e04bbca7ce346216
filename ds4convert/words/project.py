"""The project's address: read from the package's own metadata, which `pyproject.toml` gives it, and from nowhere else.

None is decided yet, so there is none, and nothing prints one.
"""

from __future__ import annotations

NAMES = ("Repository", "Homepage")
"""Which of the addresses in `[project.urls]` is the project's, the first that is there."""


def address() -> str | None:
    """Return the address under which the project is found, None while none is decided."""
    from importlib.metadata import PackageNotFoundError, metadata

    try:
        rows = metadata("ds4convert").get_all("Project-URL") or []
    except PackageNotFoundError:
        return None
    known = dict(r.partition(", ")[::2] for r in rows)
    return next((known[n] for n in NAMES if known.get(n)), None)
