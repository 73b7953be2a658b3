"""`chat`: the history, the commands, and what an interrupt leaves."""

import io
import itertools
import json

import pytest

from tokenspeed.engine.__main__ import main
from tokenspeed.engine.commands.chat import _COMMANDS, Chat, read_message
from tokenspeed.engine.commands.dialogue import Dialogue
from tokenspeed.engine.errors import RequestError
from tokenspeed.engine.llm import LLM

FACT, QUESTION = "Remember: The price of kelp is 551.", "What is the price of kelp?"
ANSWER = "The price of kelp is 551."
PROPERTIES = {"a": {"type": "number"}, "op": {"type": "string"}, "b": {"type": "number"}}
CALC = {"name": "calc", "description": "Do arithmetic.", "parameters": {"type": "object", "properties": PROPERTIES}}
TOOLS = [{"type": "function", "function": CALC}]


@pytest.fixture(scope="module")
def llm():
    return LLM(progress=False, max_num_seqs=2, validate=True, draft_tokens=0)  # a token an update


@pytest.fixture
def conversation(llm):
    llm.engine.cache.clear("")
    return Dialogue(llm, {"max_tokens": 48, "temperature": 0})


def say(conversation, text):
    turn = conversation.ask(text)
    list(turn)
    return turn


def test_a_turn_sees_the_ones_before_it_and_resumes_from_them(conversation):
    say(conversation, FACT)
    turn = say(conversation, QUESTION)
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * 2
    assert conversation.messages[-1] == {"role": "assistant", "content": ANSWER, "reasoning_content": ""}
    before = conversation.prepare(conversation.messages[:1], None).request.prompt
    # All of the first prompt up to its last user turn's end: after it come `<|im_start|>assistant\n<think>\n`.
    assert turn.reuse.cached_tokens == len(before) - 5
    assert f"{turn.reuse.cached_tokens} resumed" in turn.summary() and "tok/s" in turn.summary()


def test_the_same_answers_come_without_the_prefix_cache(conversation):
    other = Dialogue(LLM(progress=False, max_num_seqs=1, enable_prefix_caching=False), conversation.sampling)
    for text in (FACT, QUESTION, "Hello!"):
        say(conversation, text)
        say(other, text)
    assert conversation.messages == other.messages


def test_undo_retry_and_reset(conversation):
    say(conversation, FACT)
    first = list(conversation.messages)
    say(conversation, QUESTION)
    second = list(conversation.messages)
    list(conversation.retry())
    assert conversation.messages == second, "greedy: the same again"
    assert conversation.undo() == QUESTION
    assert conversation.messages == first
    conversation.reset()
    for call in (conversation.undo, conversation.retry):
        with pytest.raises(RequestError, match="no message"):
            call()


def test_a_tool_call_waits_for_its_result_and_goes_on_with_it(conversation):
    conversation.use_tools(TOOLS)
    turn = say(conversation, "What is 12 plus 30?")
    assert [(call.name, call.arguments) for call in turn.tool_calls] == [("calc", {"a": 12, "op": "+", "b": 30})]
    turn = conversation.result("42")
    list(turn)
    assert "42" in conversation.messages[-1]["content"]
    assert turn.reuse.cached_tokens > turn.meter.prompt_tokens // 2, "the tool loop resumes at the end of the answer"
    with pytest.raises(RequestError, match="no tool call"):
        conversation.result("42")


def test_a_message_in_place_of_a_result_drops_the_call(conversation):
    conversation.use_tools(TOOLS)
    assert say(conversation, "What is 12 plus 30?").tool_calls
    say(conversation, "Hello!")
    assert not any("tool_calls" in message for message in conversation.messages)
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * 2


def test_a_turn_that_cannot_be_answered_leaves_everything_as_it_was(conversation):
    say(conversation, FACT)
    before = list(conversation.messages)
    with pytest.raises(RequestError, match="8192"):
        conversation.ask("x " * 9000)
    assert conversation.messages == before
    conversation.sampling["max_tokens"] = 8000  # more than there is room for: as many as fit
    assert say(conversation, QUESTION).meter.tokens


def test_closing_a_turn_keeps_what_was_said_and_frees_the_memory(conversation, llm):
    whole = say(conversation, FACT).meter.tokens
    conversation.undo()
    turn = conversation.ask(FACT)
    for _ in itertools.islice(turn, 2):
        pass
    turn.close()
    assert conversation.messages[-1]["role"] == "assistant" and 2 <= turn.meter.tokens < whole
    assert not llm.engine.has_work and llm.engine.cache.stats()["running"] == 0
    before = list(conversation.messages)
    conversation.ask(QUESTION).close()  # before its first token: the question is taken back
    assert conversation.messages == before


def test_settings_are_sampling_fields_and_checked(conversation):
    conversation.set("temperature", "0.5")
    conversation.set("stop", "END")
    conversation.set("logit_bias", '{"5": 1}')
    assert conversation.sampling == {"max_tokens": 48, "temperature": 0.5, "stop": "END", "logit_bias": {5: 1}}
    for name, value in (("temperature", "hot"), ("temperature", "-1"), ("n", "2"), ("colour", "1"), ("top_k", "NaN")):
        before = dict(conversation.sampling)
        with pytest.raises(RequestError, match=name):
            conversation.set(name, value)
        assert conversation.sampling == before
    conversation.set("temperature", "default")
    assert "temperature" not in conversation.sampling


def test_a_saved_conversation_goes_on_where_it_was(conversation, tmp_path):
    conversation.system = "You are a helpful agent."
    conversation.use_tools(TOOLS)
    say(conversation, FACT)
    path = str(tmp_path / "saved.json")
    conversation.save(path)
    other = Dialogue(conversation.llm, conversation.sampling)
    other.load(path)
    assert (other.system, other.tools, other.messages) == (conversation.system, TOOLS, conversation.messages)
    for text in ("{", "5", '{"messages": 5}', '[{"role": "alien"}]', '{"messages": [], "tools": [5]}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(RequestError):
            other.load(str(tmp_path / "bad.json"))
        assert other.messages == conversation.messages and other.tools == TOOLS
    with pytest.raises(RequestError, match="nowhere"):
        other.save(str(tmp_path / "nowhere" / "x"))


@pytest.mark.parametrize(
    ("lines", "messages"),
    [
        (["a", "", "  ", "b"], ["a", "b"]),
        (["a\\", "b\\", "c", "d"], ["a\nb\nc", "d"]),
        (["a\\"], ["a"]),
        (['"""', "a", "", "b", '"""', "c"], ["a\n\nb", "c"]),
        (['"""a', 'b"""'], ["a\nb"]),
        (['"""a"""', "b"], ["a", "b"]),
        (['"""', "cut"], ["cut"]),
        (['"""', '"""', "b"], ["b"]),
        ([], []),
    ],
)
def test_lines_make_messages(lines, messages):
    rest = iter(lines)
    read = list(iter(lambda: read_message(lambda more: next(rest, None)), None))
    assert read == messages


def test_an_interrupt_ends_the_answer_and_the_conversation_goes_on(conversation, capsys, monkeypatch):
    chat, follow = Chat(conversation), conversation.llm.follow

    def interrupted(requests, grammars):
        for i, update in enumerate(follow(requests, grammars)):
            if i == 2:
                raise KeyboardInterrupt
            yield update

    monkeypatch.setattr(conversation.llm, "follow", interrupted)
    assert chat.take(FACT)
    assert "(interrupted)" in capsys.readouterr().err
    monkeypatch.undo()
    assert chat.take(QUESTION)
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * 2


def test_commands_do_what_help_says(conversation, capsys, tmp_path):
    chat = Chat(conversation)
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    saved = tmp_path / "saved.json"
    for line, expected in (
        ("/help", list(_COMMANDS)),
        ("/system Be brief.", ["Be brief."]),
        (f"/tools {tmp_path / 'tools.json'}", ["calc"]),
        ("What is 12 plus 30?", ['calc(a=12, op="+", b=30)']),
        ("/result 42", ["42"]),
        ("//not a command", []),
        ("/retry", []),
        ("/undo", ["/not a command"]),
        ("/tools off", ["(none)"]),
        ("/set temperature 0.25", ["temperature 0.25"]),
        ("/history", ["Be brief.", "tool      42", "calc"]),
        (f"/save {saved}", []),
        ("/reset", []),
        (f"/load {saved}", ["4 messages"]),
        ("/stats", ["tokens generated", "cached", "drafts ", "pages free"]),
    ):
        assert chat.take(line), line
        out = capsys.readouterr().out
        assert not [word for word in expected if word not in out], (line, out)
    for line, expected in (
        ("/nonsense", "/help"),
        ("/set x 1", "'x'"),
        ("/load nowhere", "nowhere"),
        ("/result", "call"),
    ):
        assert not chat.take(line)
        assert expected in capsys.readouterr().err
    assert not chat.ended
    chat.take("/quit")
    assert chat.ended
    missing = [name for name in _COMMANDS if not hasattr(chat, f"_do_{name.split()[0][1:]}")]
    assert not missing


def chat_with(monkeypatch, text, *arguments):
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    return main(["chat", "--max-num-seqs", "2", "--temperature", "0", *arguments])


def test_piped_input_is_a_conversation(monkeypatch, capsys):
    assert chat_with(monkeypatch, f"{FACT}\n{QUESTION}\n/quit\nnever read") == 0
    out, err = capsys.readouterr()
    assert ANSWER in out and err.count("tok/s") == 2 and "resumed" in err
    assert chat_with(monkeypatch, "/nonsense\n", "--quiet") == 1


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("typed", "status", "answers"),
    [
        ([EOFError], 0, 0),
        ([KeyboardInterrupt, KeyboardInterrupt], 130, 0),
        ([KeyboardInterrupt, "Hello!", KeyboardInterrupt, EOFError], 0, 1),
        (["/quit"], 0, 0),
    ],
)
def test_at_a_terminal_control_d_ends_and_two_control_c_do(monkeypatch, capsys, typed, status, answers):
    rest = iter(typed)

    def input_(prompt):
        line = next(rest)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", input_)
    monkeypatch.setattr("sys.stdin", Terminal())
    assert main(["chat", "--max-num-seqs", "2", "--max-tokens", "8"]) == status
    assert capsys.readouterr().err.count("prompt tokens") == answers
