"""The page of `verify --report`: everything in one file, nothing from outside, what the JSON says."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ds4convert.converted.grouping import Group
from ds4convert.converted.rounding_losses import LayerLoss
from ds4convert.evaluate.forced import SourceDivergence
from ds4convert.evaluate.reference import Compared
from ds4convert.report import html
from ds4convert.verification.checks import Check
from ds4convert.verification.facts import (
    Bin,
    DecodeFacts,
    Facts,
    HeadFacts,
    Measurement,
    Milliseconds,
    Position,
    PromptFacts,
    SourceKL,
    TeacherForced,
    WiringFacts,
)
from ds4convert.verification.request import Outcome
from tests.support import run
from tests.verification.mtp.folders import DEMO

VOID = {"meta"}


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


EVIL = "<script>alert(1)</script>"


def test_no_name_text_or_prompt_becomes_markup_anywhere_on_the_page() -> None:
    forced = TeacherForced(1, 0.5, 0.1, 0.2)
    prompt = PromptFacts(EVIL, 1, 2, 3, 1, 0.5, 1.5, None, 2.0, True)
    measured = Measurement(
        0.5, 4, 2, 1.5, 3.0, 4.0, None, True, None, None, 2, (Bin(3, 0.5, 0.4),), 3,
        (Position(1, 2, 1, 0.5), Position(2, 2, 1, 0.5), Position(3, 0, 0, None)), (prompt,), forced,
        WiringFacts(False, 0, ()), Milliseconds(1.0, 2.0, 3.0, 4.0), 0.0,
    )  # fmt: skip
    facts = Facts(
        groups=(Group(EVIL, 1, 2, {}, {EVIL: 2}),),
        losses=(LayerLoss(EVIL, 0, (EVIL,), 4.5, 0.1, 0.2), LayerLoss("norm", None, (EVIL,), 4.5, 0.0, 0.0)),
        reference=(Compared(EVIL, None, False, EVIL), Compared("k", 0.5, True)),
        kl=SourceKL({EVIL: SourceDivergence(1, 0.1, 0.1, 0.1, 1.0, {EVIL: 0.1})}),
        decode=DecodeFacts((), 1, 2, 3.0),
        mtp=HeadFacts(True, EVIL, {EVIL: 3}, EVIL, measured),
    )
    text = html.page(EVIL, Outcome([Check(EVIL, False, f"x & {EVIL}")], facts))
    page = parse(text)
    assert "script" not in page.tags and "<script" not in text and "&lt;script&gt;" in text
    assert page.tags.count("svg") == 9
    shown = " ".join(page.texts)
    for words in ("Against the recording", "Acceptance as a curve", "estimated 50.0%, observed 40.0% of 3 drafts"):
        assert words in shown or any(words in (v or "") for _, v in page.attributes), words
    assert "draft 3" not in shown


def test_page_of_a_folder_without_a_head_says_so(tmp_path: Path) -> None:
    facts = Facts(mtp=HeadFacts(False, "none", {}, "No MTP head to draft with: never had one."), kl=SourceKL(None))
    words = " ".join(parse(html.page("x", Outcome([Check("head works", False, "No MTP head")], facts))).texts)
    assert "No MTP head to draft with" in words and "does not fit" in words and "Not good: head works" in words


def test_facts_that_were_not_asked_for_are_no_keys_of_the_document() -> None:
    told = Outcome([Check("files", True, "all")], Facts(kl=SourceKL(None), groups=())).as_json()
    assert told == {
        "ok": True, "checks": [{"name": "files", "ok": True, "detail": "all"}], "groups": [], "kl": None,
    }  # fmt: skip


def test_page_that_cannot_be_written_is_an_environment_fault(demo: Path, tmp_path: Path) -> None:
    result = run("verify", demo, "--level", "structure", "--report", tmp_path / "nowhere" / "x.html")
    assert result.code == 4 and "could not be written" in result.err


def test_level_structure_writes_a_page_without_decoding(demo: Path, tmp_path: Path) -> None:
    result = run("verify", demo, "--level", "structure", "--report", tmp_path / "x.html", "--json")
    assert result.code == 0 and "decode" not in result.json
    assert "Bytes and format per group" in (tmp_path / "x.html").read_text()
