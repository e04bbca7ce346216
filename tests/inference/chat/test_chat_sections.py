"""The format section by section, with the expected text written out."""

from __future__ import annotations

import json

import pytest

from ds4convert.inference.chat import PromptError, parse_reply, render, template_text
from tests.inference.chat.chat_hosts import ADDED, by_renderer, by_tokenizer
from tests.inference.chat.chat_reference import VECTORS, encode, fixed_tools_texts

B, E, U, A = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"b": 1, "a": "<é>'"}}}
MAX = (VECTORS / "reasoning_effort_max.txt").read_text(encoding="utf-8")


def message(role, content="", **fields):
    return {"role": role, "content": content, **fields}


def user(content="q", **fields):
    return message("user", content, **fields)


def assistant(content="a", **fields):
    return message("assistant", content, **fields)


def result(content, call_id=None):
    return message("tool", content, tool_call_id=call_id)


def call(call_id=None, name="f", arguments="{}"):
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def chat(*messages, **switches):
    return render(messages, mode="chat", **switches).removeprefix(B)


def think(*messages, **switches):
    return render(messages, **switches).removeprefix(B)


# 2: arguments


def test_the_defaults_are_thinking_and_the_official_suffix():
    assert render([user()]) == f"{B}{U}q{A}<think>"


def test_effort_max_stands_before_the_first_message_in_thinking_only():
    assert think(message("system", "s"), user(), effort="max") == f"{MAX}s{U}q{A}<think>"
    assert chat(user(), effort="max") == chat(user())
    assert think(user(), effort="high") == think(user())


def test_fields_that_the_format_does_not_know_change_nothing():
    assert think(user(mask=1, name="n", prefix=True)) == think(user())


# 3: normalisation


def test_users_and_results_merge_into_one_turn():
    text = chat(user("1"), user("2"), result("r"), user("3"))
    assert text == f"{U}1\n\n2\n\n<tool_result>r</tool_result>\n\n3{A}</think>"


def test_a_user_starts_anew_after_a_task_and_a_result_does_not():
    text = chat(user("1", task="title"), result("r"), user("2"), user("3"))
    assert text == f"{U}1\n\n<tool_result>r</tool_result>{U}2\n\n3{A}</think>"


def test_only_the_task_of_the_first_user_of_a_run_survives():
    assert chat(user("1"), user("2", task="title")) == f"{U}1\n\n2{A}</think>"
    assert chat({**result("r"), "task": "title"}) == f"{U}<tool_result>r</tool_result>{A}</think>"
    assert chat(user("1", task="title"), result("r")).endswith("<｜title｜>")


def test_tools_and_format_of_a_user_vanish():
    assert chat(user(tools=[TOOL], response_format={"a": 1})) == f"{U}q{A}</think>"


def shown_results(calls, *messages):
    text = chat(assistant(tool_calls=calls), *messages)
    return text[text.index(U) + len(U) :].removesuffix(f"{A}</think>")


def test_results_take_the_order_of_the_calls_and_texts_keep_their_places():
    blocks = (result("3", "c"), user("t"), result("1", "a"), result("2", "b"))
    shown = shown_results([call("a"), call("b"), call("c")], *blocks)
    parts = [
        "<tool_result>1</tool_result>",
        "t",
        "<tool_result>2</tool_result>",
        "<tool_result>3</tool_result>",
    ]
    assert shown == "\n\n".join(parts)


def test_an_unknown_id_counts_as_the_first_and_sorting_is_stable():
    shown = shown_results([call("a"), call("b")], result("2", "b"), result("x", "?"), result("1", "a"))
    assert [part[13] for part in shown.split("\n\n")] == ["x", "1", "2"]


def test_an_id_may_stand_in_the_function():
    calls = [{"function": {"id": name, "name": "f", "arguments": "{}"}} for name in "ab"]
    assert shown_results(calls, result("2", "b"), result("1", "a")).startswith("<tool_result>1")


def test_without_call_ids_the_order_is_left_alone():
    assert shown_results([call(), call()], result("2", "b"), result("1", "a")).startswith("<tool_result>2")


def test_the_latest_assistant_with_calls_decides():
    history = [assistant(tool_calls=[call("b"), call("a")]), user("t"), assistant(tool_calls=[])]
    text = chat(*history, result("1", "a"), result("2", "b"))
    assert text.endswith(f"<tool_result>2</tool_result>\n\n<tool_result>1</tool_result>{A}</think>")


# 4: old reasoning

TALK = (
    user("1"),
    assistant("2", reasoning_content="old"),
    user("3"),
    assistant("4", reasoning_content="new"),
)


def test_old_reasoning_is_left_out():
    assert think(*TALK) == f"{U}1{A}</think>2{E}{U}3{A}<think>new</think>4{E}"


def test_old_reasoning_stays_without_dropping():
    assert think(*TALK, drop=False) == f"{U}1{A}<think>old</think>2{E}{U}3{A}<think>new</think>4{E}"


def test_tools_on_any_message_keep_all_reasoning():
    for role in ("system", "assistant", "latest_reminder"):
        text = think(*TALK[:2], message(role, "x", tools=[TOOL]), *TALK[2:])
        assert f"{A}<think>old</think>2" in text
    assert "old" not in think(message("system", "x", tools=[]), *TALK)


def test_a_result_counts_as_a_user_turn():
    text = think(user("1"), assistant("2", reasoning_content="r", tool_calls=[call()]), result("3"))
    assert text.startswith(f"{U}1{A}</think>2\n\n")
    assert text.endswith(f"</tool_result>{A}<think>")


def test_old_developers_and_unknown_roles_go_as_a_whole():
    old = (message("developer", ""), message("critic", "c"), user("1"))
    assert think(*old) == f"{U}1{A}<think>"
    assert think(message("developer", "d"), assistant(), user()) == f"a{E}{U}q{A}<think>"
    with pytest.raises(PromptError, match="developer"):
        think(*old, drop=False)
    with pytest.raises(PromptError, match="critic"):
        chat(message("critic", "c"), user())


# 5: messages and suffixes


def test_null_and_missing_contents_are_empty():
    assert chat(message("system", None), user(), assistant(None, reasoning_content=None)) == f"{U}q{A}</think>{E}"
    assert (
        chat({"role": "user"}, {"role": "system"}, {"role": "tool"}) == f"{U}{U}<tool_result></tool_result>{A}</think>"
    )
    assert think(user(), {"role": "assistant"}) == f"{U}q{A}<think></think>{E}"


def test_system_with_tools_and_format():
    before, after = fixed_tools_texts()
    schema = '{"name": "f", "parameters": {"b": 1, "a": "<é>\'"}}'
    text = chat(message("system", "s", tools=[TOOL, TOOL], response_format={"z": [True, None]}))
    head = "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
    assert text == f's\n\n{before}{schema}\n{schema}{after}\n\n{head}{{"z": [true, null]}}'


def test_developer_with_tools_reads_like_a_user():
    before, after = fixed_tools_texts()
    text = think(message("developer", "d", tools=[{"function": {}}]))
    assert text == f"{U}d\n\n{before}{{}}{after}{A}<think>"


def test_results_of_parts():
    parts = [{"type": "text", "text": "1"}, {"type": "image", "x": 0}, {"type": "text", "text": ""}]
    assert chat(result(parts)) == f"{U}<tool_result>1\n\n[Unsupported image]\n\n</tool_result>{A}</think>"


def test_odd_results_print_as_python_does():
    assert "<tool_result>None</tool_result>" in chat(result(None))
    assert "<tool_result>{'a': True}</tool_result>" in chat(result({"a": True}))
    assert chat(message("latest_reminder", None)) == "<｜latest_reminder｜>None"


def test_wo_eos_leaves_the_turn_open():
    assert chat(user(), assistant("a", wo_eos=True)) == f"{U}q{A}</think>a"
    assert chat(user(), assistant("a", wo_eos=False)) == f"{U}q{A}</think>a{E}"


@pytest.mark.parametrize("task", ["query", "authority", "domain", "title", "read_url"])
def test_a_task_writes_its_token_only(task):
    assert think(user(task=task), assistant("x", reasoning_content="r")) == f"{U}q<｜{task}｜>x{E}"


def test_the_task_action_follows_the_mode():
    assert f"1{A}<think><｜action｜>a" in think(user("1", task="action"), assistant(), user("2"))
    assert think(user(task="action"), assistant("Search")) == f"{U}q{A}<think><｜action｜>Search{E}"
    assert chat(user(task="action")) == f"{U}q{A}</think><｜action｜>"


def test_a_title_follows_the_answer():
    text = think(user(), assistant("a", task="title"), assistant("t", reasoning_content="r"))
    assert text == f"{U}q{A}<think></think>a{E}<｜title｜>t{E}"


def test_a_task_that_nothing_answers_is_not_checked():
    assert chat(user(task="nonsense"), user("2")) == f"{U}q{U}2{A}</think>"
    with pytest.raises(PromptError, match="nonsense"):
        chat(user(task="nonsense"))


# 8: calls


def shown_parameters(arguments, how=think):
    text = how(user(), assistant("", tool_calls=[call(arguments=arguments)]))
    return text.split('invoke name="f">\n')[1].split("\n</｜DSML｜invoke>")[0]


def by_template(*messages):
    return by_renderer(list(messages), enable_thinking=True)


@pytest.mark.parametrize("how", [think, by_template], ids=["render", "template"])
@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ("{}", ""),
        (" {\n} ", ""),
        ('{"k": "a\\n\\"b\\" \\u00e9\\ud83d\\ude00\\/"}', ("k", "true", 'a\n"b" é😀/')),
        ('{"k": 1E3}', ("k", "false", "1000.0")),
        ('{"k": -0}', ("k", "false", "0")),
        ('{"k": 123456789012345678901234567890}', ("k", "false", "123456789012345678901234567890")),
        ('{"k":[1,"<&>",{"z":null,"a":"\u2028"}]}', ("k", "false", '[1, "<&>", {"z": null, "a": "\u2028"}]')),
        ('{"k": 1, "k": "2"}', ("k", "true", "2")),
        ({"k": {"z": 1, "a": [True]}}, ("k", "false", '{"z": 1, "a": [true]}')),
        ("", ("arguments", "true", "")),
        ('{"k": 1,}', ("arguments", "true", '{"k": 1,}')),
        ('{"k": "a\nb"}', ("arguments", "true", '{"k": "a\nb"}')),
        ('{"k": 01}', ("arguments", "true", '{"k": 01}')),
        ([1, 2], ("arguments", "false", "[1, 2]")),
        (None, ("arguments", "false", "null")),
    ],
)
def test_arguments(how, arguments, shown):
    if shown:
        key, is_text, value = shown
        shown = f'<｜DSML｜parameter name="{key}" string="{is_text}">{value}</｜DSML｜parameter>'
    assert shown_parameters(arguments, how) == shown


@pytest.mark.parametrize("arguments", ["[1]", "1", '"x"', "null", "NaN"])
def test_arguments_that_are_json_but_no_object_are_refused(arguments):
    with pytest.raises(PromptError, match="not an object"):
        think(user(), assistant(tool_calls=[call(arguments=arguments)]))


def test_several_calls_follow_content_and_two_line_feeds():
    text = chat(user(), assistant("x", tool_calls=[call("1"), call("2", "g", '{"a": 1, "b": "c"}')]))
    assert text == (
        f"{U}q{A}</think>x\n\n<｜DSML｜tool_calls>\n"
        '<｜DSML｜invoke name="f">\n\n</｜DSML｜invoke>\n'
        '<｜DSML｜invoke name="g">\n'
        '<｜DSML｜parameter name="a" string="false">1</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="b" string="true">c</｜DSML｜parameter>\n'
        f"</｜DSML｜invoke>\n</｜DSML｜tool_calls>{E}"
    )


# 11: edges


def test_systems_have_no_suffix():
    assert render([]) == B
    assert chat(message("system", "s")) == "s"
    assert chat(user(), message("system", "s")) == f"{U}qs"
    assert chat(user("1"), message("system", "s"), user("2")) == f"{U}1s{U}2{A}</think>"


def test_a_reminder_after_a_user_comes_after_the_suffix():
    assert chat(user(), message("latest_reminder", "r")) == f"{U}q{A}</think><｜latest_reminder｜>r"


def test_two_assistants_have_no_marker_between_them():
    assert chat(user(), assistant("1"), assistant("2")) == f"{U}q{A}</think>1{E}2{E}"


@pytest.mark.parametrize(
    ("messages", "switches"),
    [
        ([user()], {"mode": "deep"}),
        ([user()], {"effort": "low"}),
        ([user(None)], {}),
        ([user(task="")], {}),
        ([user(7)], {}),
        ([user([{"type": "image_url"}])], {}),
        ([message("developer", None)], {}),
        ([message("critic")], {}),
        ([{"content": "no role"}], {}),
        (["text"], {}),
        ([message("system", tools=[{"function": {"bad": {1}}}])], {}),
        ([message("system", tools=[TOOL])], {"tools": [{"function": {}}]}),
    ],
)
def test_what_cannot_be_encoded_is_refused(messages, switches):
    with pytest.raises(PromptError):
        render(messages, **switches)


@pytest.mark.parametrize("depth", [501, 100_000])
def test_arguments_nested_too_deeply_are_refused_at_once(depth):
    from jinja2 import TemplateError

    deep = '{"a": ' + "[" * depth + "]" * depth + "}"
    with pytest.raises(TemplateError, match="too deeply"):
        by_template(user(), assistant(tool_calls=[call(arguments=deep)]))
    if depth > 10_000:
        with pytest.raises(PromptError, match="too deeply"):
            think(user(), assistant(tool_calls=[call(arguments=deep)]))


# 12: what hosts do


def test_without_a_generation_prompt_only_the_last_suffix_is_missing():
    assert chat(user(), add_generation_prompt=False) == f"{U}q"
    assert chat(*TALK[:3], add_generation_prompt=False) == f"{U}1{A}</think>2{E}{U}3"
    assert chat(user(task="title"), add_generation_prompt=False) == f"{U}q"


def test_tools_without_a_system_message_make_an_empty_one():
    assert think(user(), tools=[TOOL]) == think(message("system", ""), user(), tools=[TOOL])
    assert think(user(), tools=[TOOL]).startswith("\n\n## Tools")
    with_tools = message("system", "s", tools=[TOOL])
    assert think(with_tools, user(), tools=[TOOL]) == think(with_tools, user())
    assert think(message("system", "s"), user(), tools=[TOOL]) == think(with_tools, user())
    assert think(user(), tools=[]) == think(user())


def test_tools_may_come_without_their_wrapper():
    assert think(user(), tools=[TOOL["function"]]) == think(user(), tools=[TOOL])


def test_the_response_format_may_be_a_variable():
    on_message = render([message("system", "s", response_format={"a": 1}), user()])
    messages = [message("system", "s"), user()]
    assert by_renderer(messages, response_format={"a": 1}, add_generation_prompt=True) == on_message


def test_contents_may_be_lists_of_text_parts_in_every_role():
    parts = [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]
    roles = ("system", "latest_reminder", "developer", "assistant", "user")
    assert think(*(message(r, parts) for r in roles)) == think(*(message(r, "xy") for r in roles))


@pytest.mark.parametrize(
    ("variables", "thinks"),
    [
        ({}, True),
        ({"enable_thinking": True}, True),
        ({"enable_thinking": False}, False),
        ({"thinking": False}, False),
        ({"thinking": {"type": "disabled"}}, False),
        ({"thinking": {"type": "enabled"}}, True),
        ({"thinking_mode": "chat"}, False),
        ({"thinking_mode": "thinking"}, True),
        ({"thinking_mode": "enabled", "enable_thinking": True}, True),
        ({"thinking_mode": "disabled"}, False),
        ({"enable_thinking": True, "thinking": False}, False),
        ({"enable_thinking": False, "thinking": True}, True),
        ({"thinking": True, "thinking_mode": "chat"}, False),
        ({"enable_thinking": None, "thinking": None, "thinking_mode": None}, True),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": None}, True),
        ({"reasoning_effort": "low"}, True),
        ({"reasoning_effort": "none", "thinking_mode": "thinking"}, True),
    ],
)
def test_thinking_switches(variables, thinks):
    text = by_renderer([user()], add_generation_prompt=True, **variables)
    assert text == f"{B}{U}q{A}" + ("<think>" if thinks else "</think>")


@pytest.mark.parametrize("variables", [{"thinking_mode": "deep"}, {"thinking": "yes"}, {"reasoning_effort": "lots"}])
def test_unknown_switches_are_refused_in_hosts_too(variables):
    from jinja2 import TemplateError

    with pytest.raises(TemplateError):
        by_renderer([user()], **variables)


def test_effort_and_drop_switches_of_hosts():
    text = by_renderer(list(TALK), reasoning_effort="max", drop_thinking=False)
    assert text == encode(list(TALK), "thinking", drop=False, effort="max")
    assert by_renderer(list(TALK), drop_thinking=None) == encode(list(TALK), "thinking")


def test_reasoning_under_the_name_of_mlx_lm_is_read():
    assert think(user(), assistant(reasoning="r")) == think(user(), assistant(reasoning_content="r"))


def test_a_host_may_let_the_model_continue_the_last_message():
    messages = [user(), assistant("an ans", reasoning_content="why")]
    text = by_tokenizer(messages, continue_final_message=True)
    assert text == f"{B}{U}q{A}<think>why</think>an ans"
    assert by_tokenizer(messages, continue_final_message="reasoning_content") == f"{B}{U}q{A}<think>why"


def test_every_token_is_visible_to_a_host_that_guards_user_content():
    from transformers.utils.chat_template_utils import _get_template_literal_text

    literals = _get_template_literal_text(template_text())
    assert [token for token in ADDED if token not in literals] == []


def test_the_template_does_not_depend_on_the_settings_of_the_sandbox():
    import jinja2

    bare = jinja2.Environment()
    bare.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    template = bare.from_string(template_text())
    messages = [
        message("system", "s", tools=[TOOL]),
        *TALK,
        assistant(tool_calls=[call(arguments='{"a": [1]}')]),
    ]
    assert template.render(messages=messages) == render(messages)


def test_mlx_vlm_gives_the_same_text():
    prompts = pytest.importorskip("mlx_vlm.prompt_utils")
    from tests.inference.chat.chat_hosts import tokenizer

    calling = assistant("", reasoning_content="r", tool_calls=[call("1", arguments='{"b": "x", "a": 1}')])
    messages = [message("system", "s"), user(), calling, result("r", "1")]
    for enable, mode in ((True, "thinking"), (False, "chat")):
        config = {"model_type": "deepseek_v4"}
        text = prompts.apply_chat_template(tokenizer(), config, messages, enable_thinking=enable)
        assert text == render(messages, mode=mode)
    assert prompts.apply_chat_template(tokenizer(), config, "q") == render([user()], mode="chat")


def test_parse_reply_reads_what_follows_a_generation_prompt():
    whole = think(user(), assistant("x", reasoning_content="r"))
    assert parse_reply(whole.removeprefix(think(user())))["reasoning_content"] == "r"
