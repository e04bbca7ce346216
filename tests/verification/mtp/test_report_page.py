"""The page of `verify --report`: everything in one file, nothing from outside, what the JSON says."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from ds4convert.converted.grouping import Group
from ds4convert.evaluate.forced import Invariance, SourceDivergence
from ds4convert.evaluate.reference import Compared
from ds4convert.report import html
from ds4convert.report.drawings import Lane, Lanes, Pair, Pairs, Span
from ds4convert.report.setting import Setting
from ds4convert.verification.checks import Check
from ds4convert.verification.facts import (
    Bin,
    DecodeFacts,
    Facts,
    HeadFacts,
    Measurement,
    Milliseconds,
    Numerics,
    Position,
    PromptFacts,
    Reply,
    SourceKL,
    TeacherForced,
    WiringFacts,
    Word,
)
from ds4convert.verification.request import Outcome
from tests.html_pages import parse
from tests.report.hostile import EVIL, evil_record
from tests.support import run
from tests.verification.mtp.folders import DEMO
from tools.pages import checker
from tools.pages.browser import Browser, program


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
    for title in (
        "What the head drafts", "Speed, both ways", "Prompts and texts", "Against the source",
        "Format by layer and role", "Bytes by role", "How it was measured", "Where it comes from", "Checks", "Files",
    ):  # fmt: skip
        assert title in words, title
    for check in facts["checks"]:
        assert check["name"] in words and check["detail"] in words
    assert "head: experts" in words and "mxfp4" in words
    for prompt in facts["mtp"]["per_prompt"]:
        assert f"{prompt['mtp_tokens_per_second'] / prompt['plain_tokens_per_second']:.2f} ×" in words
    for name, value in facts["kl"]["backbone"]["perplexity"].items():
        assert facts["numerics"]["perplexity"][name] == pytest.approx(value, rel=1e-5)
        assert f"{value:.4g}" in words


def test_texts_stand_beside_their_prompts_with_every_draft_marked(written: tuple[Path, dict]) -> None:  # type: ignore[type-arg]
    path, facts = written
    texts = facts["decode"]["texts"]
    page = path.read_text()
    shown = " ".join(parse(page).texts)
    drafts = [w for t in texts for w in t["tokens"] if w["draft"]]
    assert page.count("<mark ") == len(drafts) == facts["mtp"]["accepted"] > 0
    assert {w["draft"] for w in drafts} == {1, 2} and 'title="draft 2"' in page
    for t in texts:
        assert t["text"] in shown and t["differs_at"] is None
        assert "".join(w["text"] for w in t["tokens"]) == "".join(t["plain"])
        assert len(t["plain"]) == 8 and t["tokens"][0]["draft"] == 0, "the first token is the backbone's"


def test_page_tells_the_command_the_machine_and_where_the_folder_comes_from(
    written: tuple[Path, dict],
    demo: Path,  # type: ignore[type-arg]
) -> None:
    words = " ".join(parse(written[0].read_text()).texts)
    assert (
        f"ds4convert verify {demo.name} --source demo --mtp --prompts two.txt --max-tokens 8 --draft-depth 2" in words
    )
    record = json.loads((demo / "ds4convert_manifest.json").read_text())
    for told in (record["plan"], record["digest"], record["recipe"], record["layout"], record["family"]):
        assert told in words
    assert all(f["name"] in words and f["sha256"] in words for f in record["files"])
    assert "mlx " in words and f"{os.cpu_count()} cores" in words and platform.python_version() in words


def test_page_names_the_folder_and_no_path(written: tuple[Path, dict], demo: Path) -> None:  # type: ignore[type-arg]
    text = written[0].read_text()
    assert demo.name in text and str(demo.parent) not in text


def test_native_conversion_has_no_divergence_from_its_source(written: tuple[Path, dict]) -> None:  # type: ignore[type-arg]
    kl = written[1]["kl"]
    assert set(kl) == {"backbone", "head"}
    assert all(part["maximum"] < 1e-6 and part["argmax_equal"] == 1 for part in kl.values())


def test_no_name_text_or_prompt_becomes_markup_anywhere_on_the_page() -> None:
    forced = TeacherForced(1, 0.5, 0.1, 0.2)
    prompt = PromptFacts(EVIL, 1, 2, 3, 1, 0.5, 1.5, None, 2.0, True)
    measured = Measurement(
        0.5, 4, 2, 1.5, 3.0, 4.0, None, True, None, None, 2, (Bin(3, 0.5, 0.4),), 3,
        (Position(1, 2, 1, 0.5), Position(2, 2, 1, 0.5), Position(3, 0, 0, None)), (prompt,), forced,
        WiringFacts(False, 0, ()), Milliseconds(1.0, 2.0, 3.0, 4.0), 0.0,
    )  # fmt: skip
    words = (Word(EVIL, 0), Word(EVIL, 1), Word(EVIL, 9))
    facts = Facts(
        groups=(Group(EVIL, 1, 2, {}, {EVIL: 2}),),
        reference=(Compared(EVIL, None, False, EVIL), Compared("k", 0.5, True)),
        kl=SourceKL({EVIL: SourceDivergence(1, 0.1, 0.1, 0.1, 1.0, {EVIL: 0.1})}),
        decode=DecodeFacts((), 1, 2, 3.0, (Reply(EVIL, EVIL, (EVIL,), words, 0), Reply("plain", EVIL, (EVIL,)))),
        numerics=Numerics(Invariance(1, 0.0, None, 0.0, 1.0), {EVIL: 2.0}),
        mtp=HeadFacts(True, EVIL, {EVIL: 3}, EVIL, measured),
    )
    text = html.page(
        EVIL, Outcome([Check(EVIL, False, f"x & {EVIL}")], facts), Setting(EVIL, ((EVIL, EVIL),)), evil_record()
    )
    page = parse(text)
    assert "script" not in page.tags and "<script" not in text and "&lt;script&gt;" in text
    assert page.tags.count("svg") == 2
    shown = " ".join(page.texts)
    for told in (
        "Against the recording",
        "estimated 50.0%, observed 40.0% of 3 drafts",
        "Without the head",
        "Rounding",
    ):
        assert told in shown or any(told in (v or "") for _, v in page.attributes), told
    assert "draft 3" not in shown and text.count('class="off"') == 2


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
    assert "Bytes by role" in (tmp_path / "x.html").read_text()


def test_neighbouring_layers_of_one_format_are_one_span_and_names_stand_where_they_fit() -> None:
    spans = [Span(0, 2, "b4", "mxfp4", "layers 0 to 2: mxfp4"), Span(4, 4, "b16", "bf16", "layer 4: bf16")]
    drawn = Lanes("Format", [Lane("experts", "", spans), Lane("x", "", [Span(0, 42, "b8", "mxfp8", "")])], [], "")
    assert drawn.count == 43 and drawn.columns(spans[0]) == "1/4"
    assert [n for _, n in drawn.ticks()] == ["0", "10", "20", "30", "40"]
    assert [(kind, label) for _, kind, label in drawn.placed(drawn.lanes[0])] == [("b4 w", "mxfp4"), ("b16 w", "")]
    assert [(kind, label) for _, kind, label in drawn.placed(drawn.lanes[1])] == [("b8", "mxfp8")]
    assert drawn.lanes[0].spoken == "experts. layers 0 to 2: mxfp4; layer 4: bf16"


@pytest.mark.parametrize(("most", "top"), [(0.0, 1.0), (9.5, 10.0), (23.5, 30.0), (112.6, 150.0), (0.31, 0.4)])
def test_both_speeds_stand_on_one_scale_that_ends_at_a_round_number(most: float, top: float) -> None:
    drawn = Pairs("", "tokens/s", [Pair("a", most / 2, most, "2 ×")])
    assert drawn.top == pytest.approx(top)
    [row] = drawn.rows()
    assert float(row.mtp[:-1]) == pytest.approx(100 * most / top, abs=0.01) and row.left == row.without == row.width


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    if program() is None:
        pytest.skip("no Chromium is installed")
    with Browser(tmp_path / "profile") as found:
        yield found


@pytest.mark.slow
def test_page_is_good_at_every_width_in_light_and_dark_and_needs_no_script(
    written: tuple[Path, dict],
    browser: Browser,  # type: ignore[type-arg]
) -> None:
    browser.show(1280)
    browser.open(written[0].as_uri())
    assert list(checker.faults(browser)) == []
    assert {u for u in browser.requests if not u.startswith("data:")} == {written[0].as_uri()}
    browser.scheme("light", "print")
    assert browser.value("document.querySelector('nav').checkVisibility()") is False
    assert list(browser.value(checker.FAINT)) == []


BAD = """<!doctype html><html lang="en"><meta name="viewport" content="width=device-width"><body>
<input id="a"><button></button><p id="a" style="color:#888;background:rgba(255,255,255,.5)">pale</p>
<p style="color:#888;font-size:30px">large</p><div style="width:700px">wide</div><script>console.error("loud"); absent()</script>"""


def test_the_checker_finds_what_is_wrong_with_a_page(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "bad.html").write_text(BAD)
    browser.show(390)
    browser.open((tmp_path / "bad.html").as_uri())
    told = [x.partition(": ")[2] for x in checker.faults(browser, (390,), ("light",))]
    assert sum(x.startswith("a control without a name") for x in told) == 2
    assert "an id that is there twice: a" in told and "too little contrast: p. 3.54: pale" in told
    assert any(x.startswith("wider than the window: 7") for x in told) and "loud" in told
    assert any("absent is not defined" in x for x in told) and not any("large" in x for x in told)
