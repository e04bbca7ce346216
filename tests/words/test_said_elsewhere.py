"""The smaller things that are said: which file is worked on, the project's address, templates filled in safely."""

from __future__ import annotations

from email.message import Message
from importlib import metadata

import pytest
from jinja2 import DictLoader, UndefinedError

from ds4convert.words import activity, project, templates


def test_the_file_that_was_begun_last_is_the_one_that_is_told() -> None:
    activity.at("one")
    activity.at("two")
    assert activity.now() == "two"
    activity.at("")
    assert activity.now() == ""


@pytest.mark.parametrize(
    ("rows", "address"),
    [
        ([], None),
        (["Homepage, https://home.example"], "https://home.example"),
        (["Homepage, https://home.example", "Repository, https://code.example"], "https://code.example"),
        (["Repository, ", "Homepage, https://home.example"], "https://home.example"),
        (["Documentation, https://docs.example"], None),
        (["repository, https://code.example"], None),
        (["Repository, https://code.example/a, b"], "https://code.example/a, b"),
    ],
)
def test_the_address_is_the_repository_of_the_metadata_else_the_homepage(
    rows: list[str], address: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row is `label, address`. Source: PyPA, core metadata, Project-URL."""
    told = Message()
    for row in rows:
        told["Project-URL"] = row
    monkeypatch.setattr(metadata, "metadata", lambda name: told)
    assert project.address() == address


def test_a_tree_that_is_not_installed_has_no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Message:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "metadata", missing)
    assert project.address() is None


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Templates of these tests, under the settings of the real ones."""
    real = templates._environment()
    texts = {
        "value": "<b>{{ x }}</b>",
        "filtered": "{{ x | loud }}",
        "blocks": "a\n  {% if x %}\n  b\n  {% endif %}\nc",
    }
    monkeypatch.setattr(templates, "_environment", lambda: real.overlay(loader=DictLoader(texts)))


@pytest.mark.usefixtures("pages")
def test_values_are_escaped_as_they_go_in_whatever_the_name_of_the_template() -> None:
    assert templates.rendered("value", {}, {"x": "<script>&\"'"}) == "<b>&lt;script&gt;&amp;&#34;&#39;</b>"


@pytest.mark.usefixtures("pages")
def test_a_value_that_is_not_given_is_an_error_not_an_empty_place() -> None:
    with pytest.raises(UndefinedError, match="'x' is undefined"):
        templates.rendered("value", {}, {})


@pytest.mark.usefixtures("pages")
def test_lines_of_blocks_leave_nothing_behind() -> None:
    assert templates.rendered("blocks", {}, {"x": 1}) == "a\n  b\nc"


@pytest.mark.usefixtures("pages")
def test_filters_are_those_of_one_call() -> None:
    assert templates.rendered("filtered", {"loud": str.upper}, {"x": "a<"}) == "A&lt;"
    with pytest.raises(Exception, match="loud"):
        templates.rendered("filtered", {}, {"x": "a"})


def test_templates_of_the_package_are_found_by_name() -> None:
    loader = templates._environment().loader
    assert loader is not None
    assert "<html" in loader.get_source(templates._environment(), "report.html.jinja")[0]
