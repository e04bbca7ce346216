"""The page at / in a real browser: text streams in, drafted tokens are marked, both figures move."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import support
from tests.serving.browser import Browser, program
from tests.serving.running import Running

PAGE = support.ROOT / "manifests" / "pages" / "serve.html"


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    if program() is None:
        pytest.skip("no Chromium is installed")
    found = Browser(tmp_path / "profile")
    yield found
    found.close()


def test_the_page_asks_nothing_of_other_hosts() -> None:
    assert not re.findall(r"https?://|//\w+\.\w+|@import|src=", PAGE.read_text())


def test_the_page_streams_marks_drafts_and_shows_both_figures(mtp: Running, browser: Browser) -> None:
    browser.call("Page.navigate", url=mtp.url + "/")
    browser.wait("document.querySelector('#mode') && document.querySelector('#mode').textContent.includes('drafts')")
    prompt = browser.value("document.querySelector('#prompt').value")
    browser.value("document.querySelector('#kind').value = 'text'; document.querySelector('#most').value = 40")
    browser.value("document.querySelector('#run').click()")
    browser.wait("!document.querySelector('#run').disabled && document.querySelector('#output').childElementCount > 9")
    text = browser.value("document.querySelector('#output').textContent")
    expected = mtp.text(prompt, max_tokens=40).json
    assert text == expected["choices"][0]["text"]
    marked = browser.value("document.querySelectorAll('#output .drafted').length")
    assert 0 < marked <= expected["usage"]["ds4convert"]["accepted"]
    assert re.fullmatch(r"\d+ %", browser.value("document.querySelector('#acceptance').textContent"))
    assert float(browser.value("document.querySelector('#rate').textContent")) > 0
    assert browser.value("document.querySelector('#status').textContent") == ""
    assert {u.partition("/")[2].partition("/")[2].partition("/")[0] for u in browser.requests} == {mtp.url[7:]}


def test_stop_leaves_the_stream_and_frees_the_place(mtp: Running, browser: Browser) -> None:
    left = mtp.figure("disconnects_total")
    browser.call("Page.navigate", url=mtp.url + "/")
    browser.wait("document.querySelector('#mode') && document.querySelector('#mode').textContent.includes('drafts')")
    browser.value("document.querySelector('#most').value = 2000; document.querySelector('#run').click()")
    browser.wait("document.querySelector('#output').childElementCount > 3")
    browser.value("document.querySelector('#stop').click()")
    browser.wait("!document.querySelector('#run').disabled")
    mtp.wait_for("disconnects_total", left + 1)
    mtp.wait_for("queue_running", 0)
