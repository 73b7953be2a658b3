"""The page at `/`, as a browser shows it."""

import json
import re

import httpx
import pytest
from browser import Browser, find
from launch import Server

KEY = "page-key"


@pytest.fixture(scope="module")
def page():
    """The page of a server with a key, opened."""
    binary = find()
    if binary is None:
        pytest.skip("no Chromium is installed (apt-get install chromium)")
    server = Server("--api-key", KEY, "--served-model-name", "tiny")
    browser = Browser(binary)
    browser.open(server.url)
    yield browser
    browser.close()
    server.stop()


def send(page: Browser, text: str) -> None:
    page.evaluate(f"document.getElementById('text').value = {text!r}")
    page.evaluate("document.getElementById('form').requestSubmit()")


def value(page: Browser, id: str) -> str:
    return page.evaluate(f"document.getElementById({id!r}).value")


def visible(page: Browser, selector: str) -> bool:
    """Whether it stands in the window, as a whole."""
    return page.evaluate(
        f"(box => box.top >= 0 && box.bottom <= innerHeight + 1 && box.left >= 0 && box.right <= innerWidth + 1)"
        f"(document.querySelector({selector!r}).getBoundingClientRect())"
    )


def shown(page: Browser, selector: str) -> list[str]:
    return page.evaluate(f"[...document.querySelectorAll({selector!r})].map(e => e.textContent)")


def test_it_loads_and_runs_nothing_but_itself(server):
    response = httpx.get(f"{server.url}/")
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/html")
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "unsafe" not in policy
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:,)""", response.text), "no asset beside the page"
    assert not re.search(r"https?://|innerHTML|eval\(", response.text)


def test_without_the_key_it_says_so_and_with_it_it_answers(page):
    send(page, "Hello!")
    page.wait("document.querySelector('.error') && !document.getElementById('send').disabled")
    assert "API key" in shown(page, ".error")[0] and shown(page, ".wrong") == [""]
    assert value(page, "text") == "Hello!", "what was typed is kept"
    page.evaluate("document.getElementById('text').value = ''")
    page.problems.clear()  # the 401s, as the browser logs them
    page.evaluate(f"document.getElementById('key').value = {KEY!r}")
    page.evaluate("document.getElementById('key').dispatchEvent(new Event('change'))")
    page.evaluate("document.getElementById('clear').click()")
    page.wait("document.getElementById('model').textContent === 'tiny'")
    send(page, "Remember: The price of kelp is 551.")
    page.wait("document.getElementById('status').textContent.includes('tokens a second')")
    assert shown(page, ".turn .content")[-1].strip() == "OK."


def test_a_call_is_shown_and_its_result_goes_back(page, tmp_path):
    page.evaluate("document.getElementById('clear').click()")
    send(page, "What is 12 plus 30?")
    page.wait("document.getElementById('text').placeholder.startsWith('Result of calc')")
    assert shown(page, ".call")[-1].startswith('calc {"a": 12')
    send(page, "42")
    page.wait("!document.getElementById('send').disabled")
    assert "42" in shown(page, ".turn .content")[-1]
    page.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 10_000


def test_reasoning_comes_in_pieces_and_apart_from_the_answer(page):
    """The shipped model hardly reasons, so the stream is written here."""
    deltas = [
        {"reasoning_content": "Let me"},
        {"reasoning_content": " think."},
        {"content": "So"},
        {"content": " be it."},
    ]
    text = "".join(f"data: {json.dumps({'choices': [{'delta': delta}]})}\n\n" for delta in deltas) + "data: [DONE]\n\n"
    halves = json.dumps([text[:70], text[70:]])  # cut inside an event
    page.evaluate(
        "window.real = window.fetch;"
        "window.fetch = (url, options) => !url.endsWith('completions') ? real(url, options) :"
        f"new Response(new ReadableStream({{ start(c) {{ for (const part of {halves})"
        " c.enqueue(new TextEncoder().encode(part)); c.close(); } })); true"
    )
    page.evaluate("document.getElementById('clear').click()")
    send(page, "Hm?")
    page.wait("document.querySelectorAll('.turn').length === 2 && !document.getElementById('send').disabled")
    page.evaluate("window.fetch = window.real; true")
    assert shown(page, ".reasoning") == ["Let me think."] and shown(page, ".turn .content") == ["Hm?", "So be it."]


def test_an_error_is_in_view_names_the_box_and_keeps_what_was_typed(page, tmp_path):
    page.evaluate("document.getElementById('clear').click()")
    for i in range(3):
        send(page, f"Hello! {i}")
        page.wait("!document.getElementById('send').disabled")
    tools = value(page, "tools")
    page.evaluate("document.getElementById('tools').value = '[{'")
    send(page, "What is 12 plus 30?")
    page.wait("!!document.querySelector('.error')")
    assert "Tools" in shown(page, ".error")[0] and page.evaluate("document.querySelector('.wrong').id") == "tools"
    assert value(page, "text") == "What is 12 plus 30?" and visible(page, ".error")
    page.screenshot(tmp_path / "error.png")
    page.evaluate(f"document.getElementById('tools').value = {tools!r}")
    page.evaluate("document.getElementById('form').requestSubmit()")
    page.wait("document.getElementById('text').placeholder.startsWith('Result of calc')")
    assert not shown(page, ".wrong")


def test_on_a_telephone_the_form_stays_in_view(page, tmp_path):
    page.resize(390, 844)
    try:
        page.evaluate("document.getElementById('clear').click()")
        for i in range(4):
            send(page, f"Hello! {i} " + "word " * 40)
            page.wait("!document.getElementById('send').disabled")
            assert visible(page, "#form") and visible(page, "#send") and visible(page, "#text")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        page.screenshot(tmp_path / "telephone.png")
    finally:
        page.resize(1280, 900)


def test_a_server_that_is_gone_shows(tmp_path):
    binary = find()
    if binary is None:
        pytest.skip("no Chromium is installed (apt-get install chromium)")
    server = Server()
    browser = Browser(binary)
    try:
        browser.open(server.url)
        browser.wait("document.getElementById('running').textContent === '0'")
        assert browser.evaluate("document.getElementById('down').hidden")
        server.stop()
        browser.wait("!document.getElementById('down').hidden")
        assert "does not answer" in shown(browser, "#down")[0] and visible(browser, "#down")
        send(browser, "Hello!")
        browser.wait("!!document.querySelector('.error')")
        assert "does not answer" in shown(browser, ".error")[0] and value(browser, "text") == "Hello!"
        browser.screenshot(tmp_path / "down.png")
    finally:
        browser.close()
        server.stop()


def test_the_load_is_live(page):
    page.wait("document.getElementById('running').textContent === '0'")
    page.evaluate("document.getElementById('clear').click()")
    page.wait("parseFloat(document.getElementById('hits-bar').firstElementChild.style.width) > 0")
    pages = page.evaluate("document.getElementById('pages').textContent")
    assert re.fullmatch(r"0, \d+ of \d+", pages)
    assert shown(page, "#reasons .row"), "why no more was reused"


def test_text_stays_text_and_nothing_broke(page):
    page.evaluate("document.getElementById('clear').click()")
    send(page, "<img src=x onerror=alert(1)>")
    page.wait("!document.getElementById('send').disabled")
    assert page.evaluate("document.querySelectorAll('#log img').length") == 0
    assert shown(page, ".turn .content")[0] == "<img src=x onerror=alert(1)>"
    assert page.problems == []
