"""Links between files of the repository made links between pages of the site: relative ones, to pages of other names."""

from __future__ import annotations

import pytest

from tests.tools.loaded import load

site = load("tools/docs_site.py")
LINKS = [
    # page, link in the file, link on the site
    ("index.md", "[a](serve.md)", "[a](serve.md)"),
    ("index.md", "[a](../CHANGELOG.md)", "[a](changelog.md)"),
    ("index.md", "[a](../benchmarks/RESULTS.md#speed)", "[a](measured.md#speed)"),
    ("how-to/x.md", "[a](../../CONTRIBUTING.md)", "[a](../contributing.md)"),
    ("how-to/x.md", "[a](../serve.md#b)", "[a](../serve.md#b)"),
    ("contributing.md", "[a](docs/FAMILIES.md)", "[a](FAMILIES.md)"),
    ("contributing.md", "[a](CHANGELOG.md)", "[a](changelog.md)"),
    ("contributing.md", "[a](benchmarks/RESULTS.md)", "[a](measured.md)"),
    ("measured.md", "[a](../docs/how-to/x.md#y)", "[a](how-to/x.md#y)"),
    ("measured.md", "[a](convert_speed.py)", "[a](convert_speed.py)"),
    ("index.md", "[a](https://example.org/CHANGELOG.md)", "[a](https://example.org/CHANGELOG.md)"),
    ("index.md", "[a](#here)", "[a](#here)"),
    ("index.md", "[a](../CHANGELOG.md) and [b](../SECURITY.md)", "[a](changelog.md) and [b](security.md)"),
    ("index.md", "CHANGELOG.md in words", "CHANGELOG.md in words"),
]


@pytest.mark.parametrize(("page", "written", "shown"), LINKS)
def test_a_link_leads_to_the_page_that_the_file_has_become(page: str, written: str, shown: str) -> None:
    assert site.rewritten(written, page) == shown


def test_a_page_is_made_of_a_file_of_docs_or_of_one_outside() -> None:
    assert site.source_of("serve.md") == "docs/serve.md" and site.source_of("how-to/x.md") == "docs/how-to/x.md"
    assert site.source_of("measured.md") == "benchmarks/RESULTS.md"
    assert all((site.ROOT / path).is_file() for path in site.OUTSIDE), "what is promised is there"
