"""Text after a cache hit, a partial hit and a stream that was left is what a server says that never saw it before."""

from __future__ import annotations

import itertools

import pytest

from tests.serving.running import Running

COUNTER = itertools.count()


def fresh(text: str) -> str:
    """A prompt that no test used before."""
    return f"{next(COUNTER)} days after, the word of the LORD came {text}"


def outcome(server: Running, prompt: str) -> tuple[int, str, int]:
    answer = server.text(prompt, max_tokens=24).json
    usage = answer["usage"]
    return (
        usage["prompt_tokens_details"]["cached_tokens"],
        answer["choices"][0]["text"],
        usage["ds4convert"]["accepted"],
    )


@pytest.fixture(params=["mtp", "plain"])
def server(request: pytest.FixtureRequest) -> Running:
    found: Running = request.getfixturevalue(request.param)
    return found


def test_the_same_prompt_again(server: Running) -> None:
    prompt = fresh("unto me")
    cached, text, accepted = outcome(server, prompt)
    again, *rest = outcome(server, prompt)
    assert cached < 5 < again
    assert rest == [text, accepted], "the head drafts as well as before"


def test_a_text_that_goes_on(server: Running, plain: Running) -> None:
    prompt = fresh("unto the king")
    _, text, _ = outcome(server, prompt)
    longer = prompt + text + " And it came to pass"
    cached, continued, _ = outcome(server, longer)
    assert cached > 10
    assert continued == plain.text(longer + "", max_tokens=24).json["choices"][0]["text"]


def test_a_text_that_only_begins_alike(server: Running, plain: Running) -> None:
    prompt = fresh("unto")
    outcome(server, prompt + " the house of Israel, saying")
    other = prompt + " the daughters of Moab, and"
    cached, text, _ = outcome(server, other)
    assert cached > 5
    assert text == plain.text(other, max_tokens=24).json["choices"][0]["text"]


def test_a_stream_that_was_left(server: Running, plain: Running) -> None:
    prompt = fresh("to Jeremiah")
    left = server.figure("disconnects_total")
    connection = server.raw(server.post_bytes({"prompt": prompt, "max_tokens": 400, "stream": True}))
    while b'"drafted"' not in connection.recv(4096):
        pass
    connection.close()
    server.wait_for("disconnects_total", left + 1)
    server.wait_for("queue_running", 0)
    cached, text, _ = outcome(server, prompt)
    assert cached > 5
    assert text == plain.text(prompt, max_tokens=24).json["choices"][0]["text"]


def test_a_conversation_finds_its_beginning(server: Running) -> None:
    first = fresh("to David")
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    answer = server.chat(first, **off).json
    more = server.chat(first, answer["choices"][0]["message"]["content"], "And then?", **off).json
    assert more["usage"]["prompt_tokens_details"]["cached_tokens"] >= answer["usage"]["prompt_tokens"] - 2
