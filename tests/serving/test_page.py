"""The page at / in a real browser: a conversation, its figures both ways, and what has to hold of any page.

Keys are pressed as Chromium's own input events, so that what a keyboard does is what is tested.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from ds4convert.serving import validation
from ds4convert.serving.validation import CHAT, Limits
from ds4convert.words.templates import rendered
from tests.serving.running import Running
from tests.serving.scripted import Wire, serving
from tools.pages import checker
from tools.pages.browser import Browser, program

PROMPT = "Now after many days the word of the LORD came"
CTRL, CMD = 2, 4


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if program() is None:
        pytest.skip("no Chromium is installed")
    with Browser(tmp_path_factory.mktemp("browser") / "profile") as found:
        yield found


@pytest.fixture
def browser(chromium: Browser) -> Iterator[Browser]:
    chromium.requests.clear()
    chromium.errors.clear()
    chromium.show(1280)
    yield chromium
    assert chromium.errors == []


def visit(browser: Browser, url: str, kind: str = "text", most: int = 40) -> None:
    browser.open(url + "/")
    browser.wait("!!limits")
    browser.value(f"$('kind').value = '{kind}'; kind(); $('max_tokens').value = {most}")


def send(browser: Browser, text: str, modifier: int = CTRL) -> None:
    """Type a text and send it by the keyboard alone."""
    browser.value("$('prompt').focus()")
    browser.call("Input.insertText", text=text)
    browser.press("Enter", 13, modifier)


def done(browser: Browser) -> str:
    """Wait for the end of a reply; return its text as it is shown."""
    browser.wait("turns.length && !running && !!turns.at(-1).reply.querySelector('.acts')")
    return str(browser.value("turns.at(-1).show.content.textContent"))


@pytest.fixture
def wire(browser: Browser) -> Iterator[Wire]:
    with serving() as found:
        found.site.page = rendered("serve.html.jinja", {}, {}).encode()
        yield found


def test_the_page_asks_nothing_of_other_hosts() -> None:
    page = rendered("serve.html.jinja", {}, {})
    assert re.findall(r"https?://[^'\" ]+", page) == ["http://www.w3.org/2000/svg"]  # the name of a language
    assert not re.findall(r"@import|src=|(?<!:)//\w+\.\w+", page)


def test_a_reply_streams_marks_drafts_by_place_and_moves_the_figures(mtp: Running, browser: Browser) -> None:
    visit(browser, mtp.url)
    assert browser.value("$('name').textContent") == "demo-mlx" == browser.value("document.title")
    assert "drafts 2 tokens" in browser.value("$('mode').textContent")
    send(browser, PROMPT)
    text = done(browser)
    expected = mtp.text(PROMPT, max_tokens=40).json
    assert text == expected["choices"][0]["text"]
    marks = browser.value("[...turns[0].show.content.querySelectorAll('.drafted')].map(e => [e.className, e.title])")
    assert 0 < len(marks) <= expected["usage"]["ds4convert"]["accepted"]
    assert {title for _, title in marks} == {"draft 1 of its pass", "draft 2 of its pass"}
    assert all(f"d{title[6]}" in name.split() for name, title in marks)
    rate, passes, share = browser.value("[...document.querySelectorAll('#withhead td')].map(e => e.textContent)")
    assert float(rate) > 0 and float(passes) > 1 and re.fullmatch(r"\d+ %", share)
    assert browser.value("$('places').tBodies[0].rows.length") == 2
    assert {u.split("/")[2] for u in browser.requests if not u.startswith("data:")} == {mtp.url[7:]}


def test_the_same_reply_without_the_head_gives_the_speed_both_ways(mtp: Running, browser: Browser) -> None:
    visit(browser, mtp.url)
    send(browser, PROMPT, CMD)
    text = done(browser)
    passes = mtp.figure("passes_total")
    browser.value("[...document.querySelectorAll('.again')].at(-1).click()")
    browser.wait("!!running || turns[0].drafts === false")
    assert done(browser) == text
    assert browser.value("turns[0].show.content.querySelectorAll('.drafted').length") == 0
    assert browser.value("$('plain').children[2].textContent") == "1.00"
    assert re.match(r"With the head \d", browser.value("$('ratio').textContent"))
    assert "without the head" in browser.value("turns[0].reply.querySelector('.meta').textContent")
    assert not browser.value("$('mtp').checked")
    assert mtp.figure("passes_total") - passes == 39, "one pass a token after the first"


def test_stop_leaves_the_stream_frees_the_place_and_another_turn_follows(mtp: Running, browser: Browser) -> None:
    left = mtp.figure("disconnects_total")
    visit(browser, mtp.url, "chat", 2000)
    send(browser, "Who art thou?")
    browser.wait("!!running && turns[0].tokens > 3")
    browser.press("Escape", 27)
    done(browser)
    mtp.wait_for("disconnects_total", left + 1)
    mtp.wait_for("queue_running", 0)
    assert browser.value("$('status').textContent") == "Stopped."
    assert browser.value("document.activeElement.id") == "prompt"
    browser.value("$('max_tokens').value = 4")
    send(browser, "And thou?")
    done(browser)
    assert browser.value("document.querySelectorAll('.turn').length") == 4
    browser.value("$('new').click()")
    assert browser.value("document.querySelectorAll('.turn').length") == 0 and browser.value(
        "$('empty').checkVisibility()"
    )


def bodies(wire: Wire) -> list[Any]:
    return [job.asked for job in wire.script.seen]


def test_a_conversation_tells_the_model_what_was_said_and_folds_the_thinking(wire: Wire, browser: Browser) -> None:
    wire.script.texts, url = ("Let", " me see", "</think>", "It", " is", " 5."), f"http://127.0.0.1:{wire.port}"
    visit(browser, url, "chat", 50)
    browser.value("$('system').value = 'Be brief.'; $('temperature').value = '0.5'")
    send(browser, "2 and 3?")
    assert done(browser) == "It is 5."
    assert browser.value("turns[0].show.reasoning.textContent") == "Let me see"
    assert browser.value("turns[0].show.think.open") is False
    assert "Thought before the answer (3 words)" in browser.value("turns[0].show.summary.textContent")
    send(browser, "Sure?")
    done(browser)
    first, second = bodies(wire)
    assert first.numbers["temperature"] == 0.5 and first.max_tokens == 50 and first.mtp
    assert [(m["role"], m["content"]) for m in second.messages] == [
        ("system", "Be brief."), ("user", "2 and 3?"), ("assistant", "It is 5."), ("user", "Sure?"),
    ]  # fmt: skip
    browser.value("$('mtp').checked = false; $('thinking').value = 'off'; document.querySelector('.again').click()")
    browser.wait("!running")
    done(browser)
    third = bodies(wire)[2]
    assert [m["content"] for m in third.messages] == [m["content"] for m in second.messages], (
        "the last reply is made anew"
    )
    assert third.template["thinking"] is False and not third.mtp
    assert browser.value("document.querySelectorAll('.turn').length") == 4


def test_marks_are_of_the_tokens_whose_text_they_have(wire: Wire, browser: Browser) -> None:
    """Tokens of the format's marks are in the stream and not in the text; text that may be one is told later."""
    browser.open(f"http://127.0.0.1:{wire.port}/")
    browser.wait("!!limits")
    script = """(() => {
      const turn = add_turn('x'); clear(turn, true);
      const piece = (text, drafted) => ({ text, drafted });
      take(turn, { tokens: [piece('Yes', false), piece(' <', true)], drafted: 2, accepted: 1, passes: 1 });
      tell(turn, 'reasoning', 'Yes');
      take(turn, { tokens: [piece('b>', true), piece('</think>', false), piece('No', true), piece('\\n', true)], drafted: 4, accepted: 3, passes: 2 });
      tell(turn, 'reasoning', ' <b>'); tell(turn, 'content', 'No\\n');
      tell(turn, 'content', 'never a token');
      const told = e => [...e.childNodes].map(n => [n.textContent, n.className || '']);
      return JSON.stringify([told(turn.show.reasoning), told(turn.show.content)]);
    })()"""
    reasoning, content = json.loads(browser.value(script))
    assert reasoning == [["Yes ", ""], ["<", "d d1 drafted"], ["b>", "d d2 drafted"]]
    assert content == [["No", "d d1 drafted"], ["\n", "d d2 drafted nl"], ["never a token", ""]]


EDGES = ("", "-5", "0.04", "0.5", "1e30", "7.7", "-1e30", "nonsense")


def test_no_control_can_be_set_to_what_the_server_refuses(wire: Wire, browser: Browser) -> None:
    limits = Limits(1000, 100, 1000, 500, ("demo",), {})
    browser.open(f"http://127.0.0.1:{wire.port}/")
    browser.wait("!!limits")
    for text in EDGES:
        script = f"""(() => {{
          for (const e of document.querySelectorAll('#sampling input')) {{
            e.value = {json.dumps(text)}; e.dispatchEvent(new Event('change'));
          }}
          return JSON.stringify(request({{ text: 'x', mtp: true }}, [])[1]);
        }})()"""
        body = json.loads(browser.value(script))
        asked = validation.parse(json.dumps(body).encode(), CHAT, limits)
        assert asked.max_tokens >= 1 and set(validation.allowed(limits)) >= {k for k in body if k in asked.numbers}
    remarks = [e for e in browser.errors if "cannot be parsed, or is out of range" in e]
    assert browser.errors == remarks, "all that the browser may say is that a field of numbers takes no text"
    browser.errors.clear()
    browser.value("$('reset').click()")
    assert browser.value("$('top_p').value") == "1" and browser.value("$('max_tokens').value") == "100"


def test_every_bound_that_pages_are_told_is_the_servers_own() -> None:
    limits = Limits(1000, 100, 1000, 500, ("demo",), {"temperature": 0.6})
    for name, told in validation.allowed(limits).items():
        good = {told["min"], told["max"], told["default"], told.get("least", told["min"])}
        for value in good:
            validation.parse(json.dumps({"prompt": "x", name: value}).encode(), "text", limits)
        if name != "max_tokens":  # more than there are means all there are
            for value in (told["max"] + 1, told["min"] - 1, told["min"] + told.get("least", -1) / 2):
                with pytest.raises(validation.Refused):
                    validation.parse(json.dumps({"prompt": "x", name: value}).encode(), "text", limits)


def test_a_refusal_is_shown_and_the_turn_can_be_made_again(wire: Wire, browser: Browser) -> None:
    visit(browser, f"http://127.0.0.1:{wire.port}", "chat")
    wire.script.error = validation.Refused(500, "the generation failed <b>here</b>")
    send(browser, "x")
    done(browser)
    assert browser.value("document.querySelector('[role=alert]').textContent") == "the generation failed <b>here</b>"
    wire.script.error, wire.script.state = None, "content"
    browser.value("document.querySelector('.again').click()")
    browser.wait("!running && !document.querySelector('[role=alert]')")
    assert done(browser) == "ab"
    browser.errors.clear()  # the browser tells of a status of 500 itself


def test_a_server_with_a_key_is_asked_for_it_once(browser: Browser) -> None:
    with serving(api_key="sesame") as wire:
        wire.site.page, wire.script.state = rendered("serve.html.jinja", {}, {}).encode(), "content"
        browser.open(f"http://127.0.0.1:{wire.port}/")
        browser.wait("!$('keyrow').hidden")
        assert browser.value("document.activeElement.id") == "key" and "key" in browser.value("$('status').textContent")
        browser.call("Input.insertText", text="sesame")
        browser.press("Tab", 9)
        browser.wait("!!limits")
        send(browser, "x")
        assert done(browser) == "ab"
        browser.errors.clear()  # of the first 401


def test_the_page_is_good_at_every_width_in_light_and_dark(mtp: Running, browser: Browser) -> None:
    visit(browser, mtp.url)
    assert list(checker.faults(browser)) == []
    send(browser, PROMPT)
    done(browser)
    browser.value(
        "$('turns').append(make('p', { className: 'fault', textContent: 'x'.repeat(900) })); say('told', true)"
    )
    assert list(checker.faults(browser)) == []


def test_everything_is_reached_by_the_keyboard_in_the_order_of_the_page(wire: Wire, browser: Browser) -> None:
    visit(browser, f"http://127.0.0.1:{wire.port}", "chat")
    browser.value("document.activeElement.blur(); $('panel').open = true")
    seen = []
    for _ in range(60):
        browser.press("Tab", 9)
        found = browser.value(
            "document.activeElement.id || document.activeElement.tagName + document.activeElement.textContent.slice(0, 9)"
        )
        if found in seen or found.startswith("BODY"):
            break
        seen.append(found)
    wanted = [
        "scroll",
        "prompt",
        "run",
        "kind",
        "system",
        "thinking",
        "mtp",
        "max_tokens",
        "temperature",
        "seed",
        "reset",
    ]
    assert [x for x in seen if x in wanted] == wanted and sum(x.startswith("BUTTON") for x in seen) == 4
