"""What mkdocs calls while it builds the site: pages for files that stand outside docs/, and links to them.

In docs/ a link names a file of the repository, so that it works where the repository is read as well. Here the files
that are pages of the site are added to it under another name, and links to them are written as links to those pages.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.structure.files import Files

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = {
    "benchmarks/RESULTS.md": "measured.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
"""Files of the repository that are pages of the site, by their name there."""

LINK = re.compile(r"(\]\()([^)#\s]+)(#[^)\s]*)?(\))")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that stand outside docs/."""
    from mkdocs.structure.files import File

    for path, page in OUTSIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Write links between files of the repository as links between pages of the site."""
    return rewritten(markdown, page.file.src_uri)


def rewritten(markdown: str, page: str) -> str:
    """Return the text of a page with its links to files that are pages under another name leading to those pages."""
    place = source_of(page)

    def replace(found: re.Match[str]) -> str:
        before, target, anchor, after = found.groups(default="")
        wanted = posixpath.normpath(posixpath.join(posixpath.dirname(place), target))
        new = OUTSIDE.get(wanted)
        if new is None and wanted.startswith("docs/") and not place.startswith("docs/"):
            new = wanted.removeprefix("docs/")
        if new is None:
            return found[0]
        return f"{before}{posixpath.relpath(new, posixpath.dirname(page) or '.')}{anchor}{after}"

    return LINK.sub(replace, markdown)


def source_of(page: str) -> str:
    """Return the file of the repository that a page of the site is made of."""
    outside = {page: path for path, page in OUTSIDE.items()}
    return outside.get(page, f"docs/{page}")
