"""parse_reply: the official replies, each way to be wrong, and the way back from render."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds4convert.errors import InputError
from ds4convert.inference.chat import PromptError, ReplyError, parse_reply, render
from tests.inference.chat.chat_reference import vector

EOS = "<｜end▁of▁sentence｜>"
OPENING = "<｜Assistant｜><think>"
FORBIDDEN = ("<｜begin▁of▁sentence｜>", "<think>", "</think>", "｜DSML｜")


def parameter(key="k", value="v", string="true"):
    return f'<｜DSML｜parameter name="{key}" string="{string}">{value}</｜DSML｜parameter>\n'


def invoke(*parameters, name="f"):
    return f'<｜DSML｜invoke name="{name}">\n' + "".join(parameters) + "</｜DSML｜invoke>\n"


def block(*invokes, end="</｜DSML｜tool_calls>" + EOS):
    return "\n\n<｜DSML｜tool_calls>\n" + "".join(invokes) + end


def calls(*functions):
    return [{"type": "function", "function": {"name": name, "arguments": arguments}} for name, arguments in functions]


# the official replies


def test_first_reply_of_vector_1_is_a_call():
    text = vector(1)[2].split(OPENING)[1].split("<｜User｜>")[0]
    assert parse_reply(text) == {
        "role": "assistant",
        "content": "",
        "reasoning_content": vector(1)[0][2]["reasoning_content"],
        "tool_calls": calls(("get_weather", '{"location": "Beijing", "unit": "celsius"}')),
    }


@pytest.mark.parametrize("number", (1, 2))
def test_last_reply_is_the_last_message(number):
    messages, _, text = vector(number)
    reply = parse_reply(text.split(OPENING)[-1])
    assert reply == {**messages[-1], "tool_calls": []}


def test_a_reply_in_chat_mode_has_no_reasoning():
    reply = parse_reply("Search" + EOS, mode="chat")
    assert reply == {"role": "assistant", "content": "Search", "reasoning_content": "", "tool_calls": []}


# what is accepted


def test_white_space_is_kept():
    reply = parse_reply(" \n a \n</think>\n b \n" + EOS)
    assert (reply["reasoning_content"], reply["content"]) == (" \n a \n", "\n b \n")


def test_other_tokens_may_stand_in_the_content():
    assert parse_reply("<｜User｜><tool_result>" + EOS, "chat")["content"] == "<｜User｜><tool_result>"


@pytest.mark.parametrize("end", ["</｜DSML｜tool_calls>", "</｜DSML｜tool_calls>" + EOS])
def test_eos_is_optional_after_a_block(end):
    reply = parse_reply("x" + block(invoke(parameter()), end=end), "chat")
    assert reply["content"] == "x"
    assert reply["tool_calls"] == calls(("f", '{"k": "v"}'))


def test_values_that_are_not_strings_stay_as_written():
    text = block(invoke(parameter("a", "[1,2]", "false"), parameter("b", "tru", "false"), parameter("c", '"')))
    assert parse_reply(text, "chat")["tool_calls"] == calls(("f", r'{"a": [1,2], "b": tru, "c": "\""}'))


def test_several_calls_and_calls_without_parameters():
    text = block(invoke("\n"), invoke(name='a"b'), '<｜DSML｜invoke \n\tname="c">\n</｜DSML｜invoke>\n')
    assert parse_reply(text, "chat")["tool_calls"] == calls(("f", "{}"), ('a"b', "{}"), ("c", "{}"))


def test_keys_and_values_end_at_the_first_fitting_mark():
    text = block(invoke(parameter('a" x="', 'b" string="false">\n<c')))
    assert parse_reply(text, "chat")["tool_calls"] == calls(
        ("f", json.dumps({'a" x="': 'b" string="false">\n<c'})),
    )


# what is refused

WRONG = {
    "empty": "",
    "no eos": "x",
    "after eos": "x" + EOS + "y",
    "eos twice": "x" + EOS + EOS,
    "half an eos after a block": block(invoke(), end="</｜DSML｜tool_calls><｜end"),
    "text after a block": block(invoke(), end="</｜DSML｜tool_calls>x" + EOS),
    "one line feed before the block": "x" + block(invoke())[1:],
    "no line feed before the block": "x" + block(invoke())[2:],
    "indented invoke": block("  " + invoke()),
    "indented parameter": block(invoke("  " + parameter())),
    "text between calls": block(invoke(), "and", invoke()),
    "two line feeds between calls": block(invoke() + "\n", invoke()),
    "parameter outside of an invoke": block(parameter()),
    "name without quotes": block("<｜DSML｜invoke name=f>\n</｜DSML｜invoke>\n"),
    "no name": block("<｜DSML｜invoke>\n</｜DSML｜invoke>\n"),
    "three line feeds after the name": block(invoke("\n\n\n")),
    "no line feed after the name": block('<｜DSML｜invoke name="f"></｜DSML｜invoke>\n'),
    "no string attribute": block(invoke(parameter().replace(' string="true"', ""))),
    "string attribute neither true nor false": block(invoke(parameter(string="maybe"))),
    "two spaces before the key": block(invoke(parameter().replace(" name", "  name"))),
    "parameter that closes with a plain name": block(invoke(parameter().replace("</｜DSML｜", "</"))),
    "value that holds the closing name": block(invoke(parameter(value="a/｜DSML｜parameter"))),
    "repeated key": block(invoke(parameter("k", "1"), parameter("k", "2"))),
    "cut off after the block's name": "\n\n<｜DSML｜tool_calls",
    "cut off after the opening": block(end=""),
    "cut off after the invoke line": "\n\n<｜DSML｜tool_calls>\n" + '<｜DSML｜invoke name="f">\n',
    "cut off after a parameter": block(invoke(parameter()).removesuffix("</｜DSML｜invoke>\n"), end=""),
    "cut off after a call": block(invoke(parameter()), end=""),
    "eos in place of the closing": block(invoke(parameter()), end=EOS),
    "other block name": block(invoke()).replace("tool_calls", "function_calls"),
}


@pytest.mark.parametrize("text", WRONG.values(), ids=WRONG.keys())
@pytest.mark.parametrize("mode", ("chat", "thinking"))
def test_wrong_replies_are_refused(text, mode):
    with pytest.raises(ReplyError):
        parse_reply(text if mode == "chat" else "why</think>" + text, mode)


@pytest.mark.parametrize("token", FORBIDDEN)
def test_tokens_are_refused_in_content_and_reasoning(token):
    with pytest.raises(ReplyError, match="content"):
        parse_reply(f"a{token}b{EOS}", "chat")
    if token != "</think>":
        with pytest.raises(ReplyError, match="reasoning"):
            parse_reply(f"a{token}b</think>c{EOS}")


@pytest.mark.parametrize("text", ["why", "why" + EOS, block(invoke()) + "</think>" + EOS])
def test_thinking_must_end_before_anything_else(text):
    with pytest.raises(ReplyError, match="expected '</think>'"):
        parse_reply(text)


def test_every_cut_of_an_official_reply_is_refused():
    text = vector(1)[2].split(OPENING)[1].split("<｜User｜>")[0]
    whole = len(text) - len(EOS)
    for cut in range(len(text)):
        if cut != whole:
            with pytest.raises(ReplyError):
                parse_reply(text[:cut])


def test_errors_say_where_and_what_and_belong_to_the_tree():
    with pytest.raises(InputError, match=r"character 27: expected '>\\n', found 'x'"):
        parse_reply("12345678\n\n<｜DSML｜tool_callsx", "chat")
    with pytest.raises(ReplyError, match="cut off"):
        parse_reply("x", "chat")
    with pytest.raises(PromptError, match="mode"):
        parse_reply("x", "deep")


# the way back

SPECIAL = st.sampled_from(["", "\n", "\n\n", "<", "/", '"', "\\", '">\n', "true", "1", "é中😀\u2028", "</x>", ">"])
TEXT = st.lists(st.one_of(SPECIAL, st.text(max_size=4)), max_size=4).map("".join)
VALUE = st.recursive(
    st.one_of(TEXT, st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=5,
)
# A name behind which the format's own marks would be read otherwise has no way back.
NAME = TEXT.filter(lambda name: '">\n' not in name)
CALL = st.tuples(NAME, st.dictionaries(TEXT, VALUE, max_size=3).map(lambda v: json.dumps(v, ensure_ascii=False)))


@settings(max_examples=300)
@given(st.sampled_from(["chat", "thinking"]), TEXT, TEXT, st.lists(CALL, max_size=3), st.booleans())
def test_what_render_wrote_comes_back(mode, content, reasoning, functions, declares):
    tools = [{"type": "function", "function": {"name": "f"}}] if declares else None
    message = {
        "role": "assistant",
        "content": content,
        "reasoning_content": reasoning if mode == "thinking" else "",
        "tool_calls": calls(*functions),
    }
    question = [{"role": "user", "content": "?"}]
    start = render(question, mode=mode, tools=tools)
    whole = render([*question, message], mode=mode, tools=tools)
    assert whole.startswith(start)
    assert parse_reply(whole.removeprefix(start), mode) == message
