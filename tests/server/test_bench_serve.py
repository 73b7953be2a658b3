"""`bench serve`: its figures follow from the times of the events, and no failure is hidden."""

import asyncio
import itertools
import json
import os
import random
import re
import signal

import httpx
import pytest
from fake_endpoint import CUT, DONE, PLAIN, STREAM, FakeEndpoint, chunk, data, respond, usage, words_in
from hypothesis import given
from hypothesis import strategies as st

from tokenspeed.engine.__main__ import main
from tokenspeed.engine.bench.endpoint import Answer, Endpoint, Events
from tokenspeed.engine.bench.load import Client, Figures, Level, Run
from tokenspeed.engine.bench.workload import PRESETS, WORDS, Calibration, UserTurns, make_conversations, text
from tokenspeed.engine.server.metrics import Metrics


class Clock:
    """Time that passes only where a script says so."""

    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Scripted(httpx.AsyncBaseTransport):
    """Answers each request with events, moving the clock where the script has a number."""

    def __init__(self, clock: Clock, script):
        self.clock, self.script, self.bodies = clock, script, []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.bodies.append(json.loads(request.content))
        return httpx.Response(200, content=self._pieces(len(self.bodies)))

    async def _pieces(self, number: int):
        for step in self.script(number):
            if isinstance(step, float):
                self.clock.now += step
            else:
                yield step


def talk(script, conversations, level=Level(1)):  # noqa: B008, a value
    """The run of conversations with a scripted endpoint, the transport, and the figures."""
    clock = Clock()
    transport = Scripted(clock, script)

    async def work() -> Run:
        async with Endpoint("http://here", transport=transport, clock=clock) as endpoint:
            run = Run(level, clock())
            await Client(endpoint, {"model": "m"}).closed(run, conversations, 6, lambda done: None)
            return run

    run = asyncio.run(work())
    return run, transport, Figures.of(run, clock())


def test_every_figure_follows_from_the_times_of_the_events():
    def script(number):
        # The first text comes with 2 tokens; 4 more in 2 events, the last at the finish, without text.
        slower = 0.5 * number
        yield chunk("", role="assistant", usage=usage(100, 2))
        yield from (slower, chunk("one", usage=usage(100, 2)))
        yield from (0.125, chunk(" two", usage=usage(100, 4)), 0.25, chunk(" three", usage=usage(100, 5)))
        yield from (0.125, chunk(finish_reason="length", usage=usage(100, 6)))
        yield from (0.5, data({"choices": [], "usage": usage(100, 6, 40 * (number - 1))}), DONE)

    run, _, found = talk(script, [UserTurns("", ("a", "b"))])
    assert [answer.error for answer in run.answers] == [None, None]
    assert found.ttft_ms == (500, 1000, 1000)
    assert found.itl_ms == (125, 250, 250)
    assert found.tpot_ms == (125, 125, 125)  # 500 ms for 4 tokens
    assert found.tok_s_user == 8
    assert found.seconds == 0.5 + 1.0 + 2 * 1.0
    assert found.output_tok_s == pytest.approx(12 / 3.5)
    assert found.total_tok_s == pytest.approx(212 / 3.5)
    assert found.requests_s == pytest.approx(2 / 3.5)
    assert found.hit_rate == 40 / 200
    assert (found.requests, found.failed, found.prompt_tokens, found.output_tokens) == (2, 0, 100, 6)


def test_without_usage_events_are_tokens_and_what_is_unknown_is_none():
    _, _, found = talk(lambda number: (0.5, chunk("a"), 0.25, chunk("b"), DONE), [UserTurns("", ("a",))])
    assert (found.prompt_tokens, found.output_tokens, found.hit_rate) == (None, 2, None)
    assert found.tpot_ms.p50 == 250 and found.total_tok_s == found.output_tok_s == 2 / 0.75


def test_the_hit_rate_is_of_the_answers_that_say_what_was_cached():
    told = Answer(1.0, texts=[2.0], prompt_tokens=100, cached_tokens=25)
    silent = Answer(1.0, texts=[2.0], prompt_tokens=300)
    found = Figures.of(Run(Level(1), 1.0, [told, silent]), 2.0)
    assert found.hit_rate == 0.25 and found.prompt_tokens == 200


def test_failed_requests_count_by_kind_and_their_time_but_not_in_the_latencies():
    good = Answer(10.0, texts=[11.0], last=11.0, completion_tokens=1)
    bad = [Answer(10.0, texts=[19.0], error=kind) for kind in ("timeout", "HTTP 500", "timeout")]
    found = Figures.of(Run(Level(4), 10.0, [bad[0], good, *bad[1:]], unsent=3), 20.0)
    assert (found.requests, found.failed, found.unsent) == (1, 3, 3)
    assert found.errors == {"timeout": 2, "HTTP 500": 1}
    assert found.ttft_ms == (1000, 1000, 1000) and found.tpot_ms is None and found.tok_s_user is None
    assert found.output_tok_s == 1 / 10


def test_a_turn_has_the_answers_before_it_in_its_history():
    def script(number):
        return (chunk(reasoning_content=f"so {number}"), chunk(f"answer {number}"), DONE)

    _, transport, _ = talk(script, [UserTurns("be brief", ("first", "second", "third"))])
    head = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "first"}]
    one = {"role": "assistant", "content": "answer 1", "reasoning_content": "so 1"}
    assert transport.bodies[0]["messages"] == head
    assert transport.bodies[1]["messages"] == [*head, one, {"role": "user", "content": "second"}]
    assert len(transport.bodies[2]["messages"]) == 6
    assert all(body["max_tokens"] == 6 and body["stream"] is True for body in transport.bodies)


def test_a_failed_turn_ends_its_conversation_and_the_rest_is_not_sent():
    conversations = [UserTurns("", ("a", "b", "c")), UserTurns("", ("d",))]
    run, transport, found = talk(lambda n: (chunk("x"), *([] if n == 1 else [DONE])), conversations)
    assert len(transport.bodies) == 2
    assert (found.requests, found.failed, found.unsent) == (1, 1, 2)
    assert run.answers[0].error == "disconnected"


async def ask_once(url: str, timeout: float = 20.0) -> Answer:
    async with Endpoint(url, timeout=timeout) as endpoint:
        return await endpoint.chat({"model": "m", "messages": [{"role": "user", "content": "hi"}]})


@pytest.mark.parametrize(
    ("kind", "expected", "script"),
    [
        ("HTTP 429", "slow down", [respond("429 Too Many Requests", "slow down")]),
        ("HTTP 307", "", [respond("307 Temporary Redirect", head="location: http://127.0.0.1:9/\r\n")]),
        ("malformed stream", "JSON", [STREAM, chunk("one"), b"data: {no json\n\n", DONE]),
        ("malformed stream", "choices", [STREAM, data({"choices": 3}), DONE]),
        ("malformed stream", "larger than", [STREAM, b"data: ", b"x" * (17 << 20)]),
        ("error in stream", "no room", [STREAM, chunk("one"), data({"error": {"message": "no room"}}), DONE]),
        ("empty answer", "no text", [STREAM, chunk("", role="assistant"), DONE]),
        ("disconnected", "[DONE]", [STREAM, chunk("one")]),
        ("disconnected", "", [STREAM, chunk("one"), 0.05, CUT]),
        ("disconnected", "", [CUT]),
        ("timeout", "within 0.2 s", [STREAM, chunk("one"), 5.0, DONE]),
    ],
)
def test_each_failure_has_a_kind_and_a_message(kind, expected, script):
    with FakeEndpoint(lambda body: script) as fake:
        answer = asyncio.run(ask_once(fake.url, 0.2 if kind == "timeout" else 20.0))
    assert answer.error == kind and expected in answer.detail
    assert answer.ended > answer.asked


def test_no_endpoint_is_no_connection():
    with FakeEndpoint() as fake:
        pass
    assert asyncio.run(ask_once(fake.url)).error == "no connection"


def test_a_stream_that_stays_open_after_its_end_is_complete():
    with FakeEndpoint(lambda body: [*PLAIN, 5.0]) as fake:
        answer = asyncio.run(ask_once(fake.url))
    assert (answer.error, answer.text, answer.generated) == (None, "one two", 2)
    assert answer.ended - answer.asked < 4


def test_only_the_given_url_is_contacted(monkeypatch):
    with FakeEndpoint() as other, FakeEndpoint() as fake:
        for name in ("HTTP_PROXY", "ALL_PROXY", "http_proxy", "all_proxy"):
            monkeypatch.setenv(name, other.url)
        assert asyncio.run(ask_once(fake.url)).error is None
        fake.answer = lambda body: [respond("302 Found", head=f"location: {other.url}/v1/chat/completions\r\n")]
        assert asyncio.run(ask_once(fake.url)).error == "HTTP 302"
        assert len(fake.bodies) == 2 and not other.bodies


@given(
    st.lists(st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), min_size=1), max_size=6),
    st.lists(st.integers(0, 300), max_size=8),
    st.sampled_from(["\n", "\r\n"]),
)
def test_events_do_not_depend_on_where_the_stream_is_split(texts, cuts, end):
    # U+2028 and other line separators of Unicode are no ends of lines here.
    lines = [": a comment", "event: message", *(f"data: {t}{end}data: \u2028{end}" for t in texts)]
    stream = "".join(line + end for line in lines).encode()
    borders = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    events = Events()
    found = [e for a, b in itertools.pairwise(borders) for e in events.feed(stream[a:b])]
    assert [e.decode() for e in found] == [f"{t}\n\u2028" for t in texts]


@pytest.mark.parametrize("users", [1, 3])
def test_a_closed_loop_has_as_many_requests_at_once_as_users(users, capsys):
    with FakeEndpoint(lambda body: [STREAM, 0.02, *PLAIN[1:]]) as fake:
        options = ["--concurrency", str(users), "--conversations", "6", "--preset", "chat", "--scale", "0.1"]
        assert main(["bench", "serve", "--url", fake.url, "--quiet", *options]) == 0
        assert fake.most == users
    assert f"{users} at once" in capsys.readouterr().out


def test_an_open_loop_asks_at_poisson_times_and_counts_from_when_a_request_was_due():
    conversations = [UserTurns("", ("a", "b")) for _ in range(6)]

    async def work(url: str) -> Run:
        async with Endpoint(url, connections=1) as endpoint:
            run = Run(Level(rate=2000.0), endpoint.clock())  # requests: 1000 conversations
            await Client(endpoint, {}).open(run, conversations, 4, lambda done: None, random.Random(5))
            return run

    with FakeEndpoint(lambda body: [0.03, *PLAIN]) as fake:
        run = asyncio.run(work(fake.url))
        assert fake.most == 1
    vary, due, expected = random.Random(5), run.started, []
    for _ in conversations:
        due += vary.expovariate(1000.0)
        expected.append(due)
    assert len(run.answers) == 12
    first = sorted(run.answers, key=lambda answer: answer.asked)[:6]
    assert [answer.asked for answer in first] == expected
    longest = max(answer.texts[0] - answer.asked for answer in first)
    assert longest >= 6 * 0.03 - (expected[-1] - expected[0]), "waiting for the one connection is waiting"


def counting(body: dict):
    """4 tokens a word, 13 of the template."""
    found = usage(4 * words_in(body) + 13, 2, 0)
    return [STREAM, chunk("one"), chunk(" two"), data({"choices": [], "usage": found}), DONE]


def test_prompts_have_the_tokens_of_the_preset_times_scale(tmp_path, capsys):
    out = tmp_path / "out.json"
    with FakeEndpoint(counting) as fake:
        options = ["--scale", "0.02", "--concurrency", "2", "--prefix-len", "20000", "--json", str(out), "--seed", "3"]
        assert main(["bench", "serve", "--url", fake.url, "--quiet", *options]) == 0
        asked = fake.bodies[2:]  # two calibrate
    first = [body for body in asked if len(body["messages"]) == 2]
    assert len(first) == 4
    assert len({body["messages"][0]["content"] for body in first}) == 1
    assert len({body["messages"][1]["content"] for body in first}) == 4
    for body in first:
        assert abs(4 * words_in(body) + 13 - 1000) <= 4
        assert len(body["messages"][0]["content"].split()) == 100
    later = [body["messages"][-1]["content"].split() for body in asked if len(body["messages"]) > 2]
    assert {len(words) for words in later} == {4}
    longest = {body["messages"][1]["content"]: len(body["messages"]) // 2 for body in asked}
    assert all(10 <= turns <= 15 for turns in longest.values())
    assert all(body["ignore_eos"] and body["max_tokens"] == 10 and body["model"] == "fake" for body in asked)
    found = json.loads(out.read_text())
    assert (found["tokens_per_word"], found["calibrated"], found["seed"]) == (4, True, 3)
    assert found["levels"][0]["requests"] == len(asked) and found["levels"][0]["hit_rate"] == 0


def test_no_conversation_of_a_level_shares_words_with_another_but_the_seed_repeats_them():
    def make(seed):
        preset = PRESETS["long"].scaled(0.0001)
        return make_conversations(preset, 8, 0, Calibration(1.0, 0.0, True), random.Random(seed))

    firsts = [conversation.turns[0] for conversation in make(1)]
    assert [len(first.split()) for first in firsts] == [13, 26, 52, 100] * 2
    assert len({first[:30] for first in firsts}) == 8
    assert make(1) == make(1) != make(2)
    assert set(text(len(WORDS), random.Random(0)).split()) == set(WORDS)


def counters(steps: int, tokens: int, drafted: list[int], accepted: list[int]) -> str:
    """As `serve` shows them, to someone who reads its metrics."""
    fared = {"draft_steps": steps, "draft_step_tokens": tokens}
    for name, counts in (("drafted", drafted), ("accepted", accepted)):
        fared |= {f"{name}_{place}": count for place, count in enumerate(counts, 1)}
    return Metrics().render(fared).decode()


def test_drafts_of_a_level_are_told_from_the_endpoints_counters(tmp_path, capsys):
    out = tmp_path / "out.json"
    options = ["--preset", "chat", "--conversations", "1", "--concurrency", "1", "2", "3", "--quiet", "--seed", "1"]
    with FakeEndpoint() as fake:
        fake.metrics = [
            *(counters(0, 0, [], []), counters(10, 25, [10, 10], [9, 6])),
            *(counters(10, 25, [10, 10], [9, 6]), counters(30, 60, [30, 10], [24, 6])),
            *(counters(30, 60, [30, 10], [24, 6]), "no metrics {"),
        ]
        assert main(["bench", "serve", "--url", fake.url, "--json", str(out), *options]) == 0
        assert not fake.metrics
    table = dict(re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in capsys.readouterr().out.splitlines()[1:])
    assert table["tokens a step"].split() == ["2.50", "1.75", "-"]
    assert table["draft 1 right [%]"].split() == ["90.0", "75.0", "-"]
    assert table["draft 2 right [%]"].split() == ["60.0", "-", "-"]
    levels = json.loads(out.read_text())["levels"]
    assert [level["drafts"] and level["drafts"]["steps"] for level in levels] == [10, 20, None]
    with FakeEndpoint() as fake:  # one without counters
        assert main(["bench", "serve", "--url", fake.url, *options]) == 0
    assert "a step" not in capsys.readouterr().out


def test_fields_and_keys_are_sent_as_given(monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret-1")
    with FakeEndpoint() as fake:
        extra = json.dumps({"ignore_eos": None, "stream_options": {"include_usage": True}, "top_p": 0.5})
        options = ["--preset", "chat", "--conversations", "1", "--concurrency", "1", "--extra-body", extra, "--quiet"]
        url = ["--url", f"{fake.url}/v1/", "--model", "other", "--api-key-env", "MY_KEY"]
        assert main(["bench", "serve", *url, *options]) == 0
        assert all("authorization: bearer secret-1" in head.lower() for head in fake.heads)
        body = fake.bodies[-1]
    assert "ignore_eos" not in body
    assert (body["top_p"], body["model"], body["stream_options"]) == (0.5, "other", {"include_usage": True})


@pytest.fixture
def heard_signals():
    """SIGINT as in a terminal: whoever is started in the background by a shell inherits that it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard_signals")
def test_ctrl_c_prints_what_was_measured(capsys):
    pressed = []

    def answer(body):
        if len(fake.bodies) >= 7 and not pressed:  # the other user's eighth may have come meanwhile
            pressed.append(True)
            os.kill(os.getpid(), signal.SIGINT)
        return [STREAM, 3.0, *PLAIN[1:]] if len(fake.bodies) >= 7 else PLAIN

    with FakeEndpoint(answer) as fake:
        options = ["--concurrency", "1", "2", "--preset", "chat", "--quiet"]
        assert main(["bench", "serve", "--url", fake.url, *options]) == 130
        assert len(fake.bodies) in (7, 8), "the other user may have its answer and ask again before the signal is seen"
    out = capsys.readouterr().out
    assert "1 at once *" in out and "stopped before its end" in out
    answered = next(line for line in out.splitlines() if line.startswith("requests answered")).split()[-1]
    assert answered in ("3", "4"), "those before the seventh, of which the other user's may be on its way"


def test_failures_are_in_the_table_with_their_words(capsys):
    def answer(body):
        return [respond("503 Service Unavailable", "warming up")] if len(fake.bodies) == 3 else PLAIN

    with FakeEndpoint(answer) as fake:
        options = ["--concurrency", "1", "--preset", "chat", "--conversations", "2", "--quiet"]
        assert main(["bench", "serve", "--url", fake.url, *options]) == 0
    printed = capsys.readouterr()
    assert "HTTP 503" in printed.out and "turns not sent" in printed.out
    assert "1 at once: HTTP 503: warming up" in printed.err


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--url", "ftp://x"], "http://HOST:PORT"),
        (["--url", "localhost:8000"], "http://HOST:PORT"),
        (["--concurrency", "0"], "--concurrency is 0"),
        (["--rate", "-1"], "--rate is -1"),
        (["--rate", "nan"], "--rate is nan"),
        (["--scale", "0"], "--scale is 0"),
        (["--conversations", "0"], "--conversations is 0"),
        (["--request-timeout", "0"], "--request-timeout is 0"),
        (["--prefix-len", "50000", "--preset", "agentic"], "--prefix-len"),
        (["--api-key-env", "NOT_THERE"], "NOT_THERE"),
        (["--api-key", "two\nlines"], "printable"),
        (["--json", "/not/there.json"], "/not/there.json"),
    ],
)
def test_bad_options_are_explained(options, expected, capsys):
    with FakeEndpoint() as fake:
        given = ["--url", fake.url, "--preset", "chat", "--conversations", "1", "--quiet"]
        assert main(["bench", "serve", *given, *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and expected in error


def test_an_endpoint_that_refuses_or_is_not_there_is_an_error(capsys):
    with FakeEndpoint(lambda body: [respond("401 Unauthorized", "no key")]) as fake:
        assert main(["bench", "serve", "--url", fake.url, "--quiet"]) == 1
    assert "HTTP 401: no key" in capsys.readouterr().err
    assert main(["bench", "serve", "--url", fake.url, "--quiet"]) == 1
    assert "cannot be reached" in capsys.readouterr().err


def test_the_shipped_model_under_load(server, tmp_path, capsys):
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    lengths = ["--preset", "chat", "--scale", "0.1", "--prefix-len", "300", "--conversations", "2"]
    files = ["--json", str(out), "--plot", str(picture), "--seed", "1"]
    assert main(["bench", "serve", "--url", server.url, *lengths, "--concurrency", "1", "2", *files]) == 0
    found = json.loads(out.read_text())
    assert found["model"] == "tiny" and found["calibrated"]
    for level in found["levels"]:
        assert level["failed"] == 0 and level["requests"] >= 6
        assert level["output_tokens"] == 20
        assert level["hit_rate"] > 0.2, "the system prompt or the history, whoever comes first, is cached"
        assert 0 < level["ttft_ms"]["p50"] <= level["ttft_ms"]["p90"] <= level["ttft_ms"]["p99"]
        assert level["output_tok_s"] == pytest.approx(20 * level["requests"] / level["seconds"])
        assert level["tok_s_user"] > 1
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "TTFT p99 [ms]" in capsys.readouterr().out
