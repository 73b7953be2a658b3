"""Which template is used, and what a request may not ask of it."""

import json

import pytest

from tokenspeed.engine.errors import ConfigError, RequestError
from tokenspeed.engine.text.template import ChatTemplate
from tokenspeed.engine.text.tokenizer import Tokenizer

HELLO = [{"role": "user", "content": "hello"}]
FUNCTION = {"type": "function", "function": {"name": "f", "parameters": {}}}


def load(directory, jinja=None, config=None):
    """The template of `directory` after replacing its two template sources."""
    (directory / "chat_template.jinja").unlink()
    if jinja is not None:
        (directory / "chat_template.jinja").write_bytes(jinja)
    if config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": config}))
    return ChatTemplate.from_directory(directory, Tokenizer.from_directory(directory))


def test_the_jinja_file_goes_before_the_tokenizer_config(copied_checkpoint):
    assert load(copied_checkpoint, b"file", "config").render(HELLO).text == "file"


def test_a_template_may_stand_in_the_tokenizer_config(copied_checkpoint):
    assert load(copied_checkpoint, None, "{{ messages[0].content }}!").render(HELLO).text == "hello!"


def test_of_named_templates_the_one_for_tools_serves_requests_with_tools(copied_checkpoint):
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools | length }} tools"}]
    template = load(copied_checkpoint, None, named)
    assert template.render(HELLO).text == "plain"
    assert template.render(HELLO, [FUNCTION]).text == "1 tools"


def test_special_tokens_are_variables_of_the_template(made_checkpoint, oracle):
    source = "{{ eos_token }}{{ pad_token }}{{ bos_token }}{{ documents is none }}"
    template = ChatTemplate({"default": source}, Tokenizer.from_directory(made_checkpoint))
    assert template.render(HELLO).text == "<|im_end|><|endoftext|>True"


@pytest.mark.parametrize(
    "config", [None, 5, [], [{"name": "default"}], [{"name": "rag", "template": "x"}], ["x"], {"default": "x"}]
)
def test_no_usable_template_is_a_config_error(copied_checkpoint, config):
    with pytest.raises(ConfigError, match="template"):
        load(copied_checkpoint, None, config)


@pytest.mark.parametrize(
    "source",
    [
        b"{% if %}",
        b"{{ x | nosuchfilter }}",
        b"{% for x in y %}",
        b"\n\n{{ 'open",
        b"\xff",
        b"{% nosuchtag %}",
        b"{{ " + b"(" * 5000 + b"1" + b")" * 5000 + b" }}",
    ],
    ids=lambda source: repr(source[:20]),
)
def test_a_template_that_does_not_compile_is_a_config_error_that_names_the_file(copied_checkpoint, source):
    with pytest.raises(ConfigError, match=r"chat_template\.jinja"):
        load(copied_checkpoint, source)


def test_a_template_that_raises_gives_its_own_words(made_checkpoint):
    source = "{{ raise_exception('no wizards here') }}"
    template = ChatTemplate({"default": source}, Tokenizer.from_directory(made_checkpoint))
    for messages in (HELLO, [*HELLO, {"role": "system", "content": "late"}]):
        with pytest.raises(RequestError, match="refuses the conversation: no wizards here"):
            template.render(messages)


def test_systems_that_a_template_refuses_are_merged_at_its_front_and_others_are_left_where_they_are(template):
    several = [{"role": "system", "content": " one "}, {"role": "developer", "content": "two"}, *HELLO]
    late = [
        *several,
        {"role": "assistant", "content": "a"},
        {"role": "system", "content": [{"type": "text", "text": "3"}]},
    ]
    merged = [{"role": "system", "content": "one\n\ntwo"}, *HELLO]
    assert template.render(several).text == template.render(merged).text
    merged = [{"role": "system", "content": "one\n\ntwo\n\n3"}, *HELLO, {"role": "assistant", "content": "a"}]
    assert template.render(late).text == template.render(merged).text
    mark = template.encode(late, marks=[2]).boundaries
    assert mark == template.encode(merged, marks=[1]).boundaries
    with pytest.raises(RequestError, match="5 messages"):
        template.encode(late, marks=[5])
    source = "{% for m in messages %}[{{ m.role }}: {{ m.content }}]{% endfor %}"
    free = ChatTemplate({"default": source}, template._tokenizer)
    assert free.render([*late[:-1], {"role": "developer", "content": "3"}]).text.endswith("[assistant: a][system: 3]")


def test_null_content_is_empty(template):
    for role in ("user", "system", "tool", "assistant"):
        messages = [*HELLO, {"role": role, "content": None}]
        assert template.render(messages).text == template.render([*HELLO, {"role": role, "content": ""}]).text


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("", {}),
        ("null", {}),
        ("{", {}),
        ('{"a": ', {}),
        ('{"a": "hel', {"a": "hel"}),
        ('{"a": [1, {"b": tru', {"a": [1, {}]}),
        ('{"a": 1, "b', {"a": 1}),
        ('{"a": 1}', {"a": 1}),
    ],
)
def test_arguments_of_a_call_that_was_cut_do_not_spoil_the_history(template, given, meant):
    def text(arguments):
        return template.render([*HELLO, calls({"function": {"name": "f", "arguments": arguments}})]).text

    assert text(given) == text(meant)


@pytest.mark.parametrize(
    "source", ["{{ messages[0].nope.deeper }}", "{{ 1 / 0 }}", "{{ none + 1 }}", "{% include 'x' %}"]
)
def test_a_template_that_fails_is_a_request_error(made_checkpoint, source):
    template = ChatTemplate({"default": source}, Tokenizer.from_directory(made_checkpoint))
    with pytest.raises(RequestError, match="the chat template failed: "):
        template.render(HELLO)


def user(content):
    return {"role": "user", "content": content}


def calls(*tool_calls):
    return {"role": "assistant", "tool_calls": list(tool_calls)}


NESTED = []
for _ in range(100):
    NESTED = [NESTED]

BAD_MESSAGES = [
    ("hello", "list of messages, not str"),
    ([], "messages is empty"),
    (["hello"], r"messages\[0\] must be an object, not 'hello'"),
    ([{"content": "x"}], r"messages\[0\]: role is None; it must be one of system, user, assistant, tool"),
    ([user("x"), {"role": "wizard", "content": "x"}], r"messages\[1\]: role is 'wizard'"),
    ([{"role": ["user"], "content": "x"}], "role is"),
    ([{"role": "user"}], "a user message needs content"),
    ([user(5)], "content must be a string or a list of text parts, not 5"),
    ([user({"text": "x"})], "list of text parts"),
    ([user([{"type": "image_url", "image_url": {"url": "x"}}])], r"content\[0\]: image input is not supported"),
    ([user([{"type": "text", "text": "a"}, {"image": "x"}])], r"content\[1\]: image input is not supported"),
    ([user([{"type": "text", "text": "a", "image_url": "x"}])], "image input is not supported"),
    ([user([{"type": "input_audio", "input_audio": {}}])], "audio input is not supported"),
    ([user([{"type": "video", "video": "x"}])], "video input is not supported"),
    ([user([{"type": "file", "file": {}}])], "file input is not supported"),
    ([user([{"type": "text"}])], "must be a text part"),
    ([user(["x"])], "must be a text part, not 'x'"),
    ([user([{"type": "smell", "text": "x"}])], "must be a text part"),
    ([user(b"x")], "bytes; only JSON values"),
    ([{1: 2, **user("x")}], "key 1 must be a string"),
    ([{**user("x"), "extra": NESTED}], "nested more than 64 levels"),
    ([{"role": "assistant"}], "an assistant message needs content"),
    ([{"role": "assistant", "content": "x", "reasoning_content": 5}], "reasoning_content must be a string, not 5"),
    ([{"role": "assistant", "content": "x", "reasoning": [1]}], r"reasoning must be a string, not \[1\]"),
    ([{**user("x"), "tool_calls": []}], "tool_calls must be a list in an assistant message"),
    ([{"role": "assistant", "tool_calls": {}}], "tool_calls must be a list"),
    ([calls("f")], r"messages\[0\]\.tool_calls\[0\] must be a function with a name"),
    ([calls({"function": {"arguments": {}}})], "must be a function with a name"),
    ([calls({"function": {"name": "f", "arguments": "{a: 1"}})], "arguments are not JSON .*: '{a: 1'"),
    ([calls({"function": {"name": "f", "arguments": '{"a": NaN}'}})], "NaN is not a JSON number"),
    ([calls({"function": {"name": "f", "arguments": "[" * 100_000}})], "arguments are not JSON"),
    ([calls({"function": {"name": "f", "arguments": '{"a":' + "[" * 90 + "]" * 90 + "}"}})], "nested more than 64"),
    ([calls({"function": {"name": "f", "arguments": "[1]"}})], r"arguments must be an object, not \[1\]"),
    ([calls({"function": {"name": "f", "arguments": 5}})], "arguments must be an object, not 5"),
]


@pytest.mark.parametrize("messages, expected", BAD_MESSAGES, ids=[expected[:40] for _, expected in BAD_MESSAGES])
def test_a_bad_message_is_a_request_error_that_names_the_place_and_the_value(template, messages, expected):
    with pytest.raises(RequestError, match=expected):
        template.render(messages)


@pytest.mark.parametrize("tools", ["f", {"name": "f"}, ["f"], [{}], [{"function": {}}], [{"function": {"name": 5}}]])
def test_a_bad_tool_is_a_request_error(template, tools):
    with pytest.raises(RequestError, match="tools"):
        template.render(HELLO, tools)


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt", "eos_token", "range", "surprise"])
def test_a_template_argument_outside_the_allow_list_is_a_request_error_that_names_it(template, name):
    with pytest.raises(RequestError, match=f"'{name}' is not allowed; allowed: preserve_thinking"):
        template.render(HELLO, template_kwargs={name: True})


def test_template_arguments_must_be_booleans(template):
    with pytest.raises(RequestError, match="preserve_thinking must be true or false, not 'yes'"):
        template.render(HELLO, template_kwargs={"preserve_thinking": "yes"})
    with pytest.raises(RequestError, match="preserve_thinking must be true or false, not 1"):
        template.render(HELLO, template_kwargs={"preserve_thinking": 1})
    with pytest.raises(RequestError, match="enable_thinking must be true or false, not 'no'"):
        template.render(HELLO, enable_thinking="no")


def test_an_effort_reaches_a_template_that_asks_for_it_and_no_other(template, copied_checkpoint):
    asks = load(copied_checkpoint, b"{{ reasoning_effort | default('xhigh') }}: {{ messages[0].content }}")
    for effort, said in (("low", "low"), (None, "xhigh"), ("none", "xhigh")):
        assert asks.render(HELLO, template_kwargs=asks.effort_kwargs(effort)).text == f"{said}: hello"
    assert template.effort_kwargs("low") == {}
    with pytest.raises(RequestError, match=r"reasoning_effort must be one of minimal, low, .*, not 'much'"):
        asks.render(HELLO, template_kwargs=asks.effort_kwargs("much"))
