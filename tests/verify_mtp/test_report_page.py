"""The page of `verify --report`: everything in one file, nothing from outside, what the JSON says."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ds4convert import html_report
from tests.support import run
from tests.verify_mtp.folders import DEMO

VOID = {"meta", "rect"}


class Page(HTMLParser):
    """Checks nesting and collects text, tags and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def parse(text: str) -> Page:
    page = Page()
    page.feed(text)
    page.close()
    assert page.open == []
    return page


@pytest.fixture(scope="module")
def written(demo: Path, short: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:  # type: ignore[type-arg]
    path = tmp_path_factory.mktemp("page") / "out.html"
    result = run(
        "verify", demo, "--mtp", "--source", DEMO, "--prompts", short, "--max-tokens", 8, "--draft-depth", 2,
        "--report", path, "--json",
    )  # fmt: skip
    assert result.code == 0, result.out
    return path, result.json


def test_page_asks_nothing_from_outside(written: tuple[Path, dict]) -> None:  # type: ignore[type-arg]
    text = written[0].read_text()
    assert not re.search(r"https?:|//|url\(|@import|<script|<link|<img|<iframe", text)
    assert 'name="viewport" content="width=device-width' in text


def test_page_is_well_formed_and_says_what_the_json_says(written: tuple[Path, dict]) -> None:  # type: ignore[type-arg]
    path, facts = written
    page = parse(path.read_text())
    words = " ".join(page.texts)
    assert facts["mtp"]["verdict"] in words
    assert f"{facts['mtp']['acceptance']:.1%}" in words
    assert page.tags.count("svg") >= 4
    for title in (
        "Acceptance per draft position", "Acceptance per prompt", "Tokens per second", "KL against the source",
        "Bytes and format per group", "Checks",
    ):  # fmt: skip
        assert title in words, title
    for check in facts["checks"]:
        assert check["name"] in words and check["detail"] in words
    assert "mtp.experts" in words and "mxfp4" in words


def test_page_names_the_folder_and_no_path(written: tuple[Path, dict], demo: Path) -> None:  # type: ignore[type-arg]
    text = written[0].read_text()
    assert demo.name in text and str(demo.parent) not in text


def test_native_conversion_has_no_divergence_from_its_source(written: tuple[Path, dict]) -> None:  # type: ignore[type-arg]
    kl = written[1]["kl"]
    assert set(kl) == {"backbone", "head"}
    assert all(part["maximum"] < 1e-6 and part["argmax_equal"] == 1 for part in kl.values())


def test_names_are_escaped() -> None:
    facts = {"checks": [{"name": "a<b>", "ok": False, "detail": "x & <script>"}], "groups": []}
    text = html_report.page("<img>", facts)
    parse(text)
    assert "<script" not in text and "<img" not in text and "&lt;img&gt;" in text


def test_page_of_a_folder_without_a_head_says_so(tmp_path: Path, demo: Path) -> None:
    facts = {"checks": [{"name": "head works", "ok": False, "detail": "No MTP head"}],
             "mtp": {"verdict": "No MTP head to draft with: never had one."}, "kl": None}  # fmt: skip
    words = " ".join(parse(html_report.page("x", facts)).texts)
    assert "No MTP head to draft with" in words and "does not fit" in words


def test_page_that_cannot_be_written_is_an_environment_fault(demo: Path, tmp_path: Path) -> None:
    result = run("verify", demo, "--level", "structure", "--report", tmp_path / "nowhere" / "x.html")
    assert result.code == 4 and "could not be written" in result.err


def test_level_structure_writes_a_page_without_decoding(demo: Path, tmp_path: Path) -> None:
    result = run("verify", demo, "--level", "structure", "--report", tmp_path / "x.html", "--json")
    assert result.code == 0 and "decode" not in result.json
    assert "Bytes and format per group" in (tmp_path / "x.html").read_text()
