"""The web page: what is behind it, its answers over HTTP, and in a browser where there is one."""

from __future__ import annotations

import itertools
import re
import shutil
import threading
from dataclasses import replace

import pytest

from tinyllm.chat import start
from tinyllm.chat.browser import Browser, Wishes
from tinyllm.chat.options import parse_args
from tinyllm.errors import UserError


@pytest.fixture(scope="module")
def browser(base_folder, finished_run) -> Browser:
    words = ["--base_model", str(base_folder), "--lora_model", f"tuned={finished_run}",
             "--max_new_tokens", "12", "--max_length", "200"]  # fmt: skip
    return Browser(start.build(parse_args(words)))


@pytest.fixture
def wishes(browser) -> Wishes:
    return browser.defaults("你是助手。")


def alone(browser, question: str, name: str | None) -> str:
    messages = [{"role": "system", "content": "你是助手。"}, {"role": "user", "content": question}]
    return browser.speaker.speak(messages, lambda text: None, name).text


def said(text: str):
    """A pattern for a reply as a browser shows it; tiny models like characters that nobody sees."""
    words = re.findall(r"[\w，。！？<>]+", text)
    return re.compile(r"[\s\S]*?".join(map(re.escape, words)))


def test_the_page_begins_with_the_base_s_own_settings(browser, wishes):
    assert browser.voices == ["tuned", "base"] and wishes.voice == "tuned"
    assert wishes.temperature == 0.0 and wishes.max_new_tokens == 12 and wishes.top_k == 50


def test_replies_grow_to_what_the_chat_says(browser, wishes):
    parts = list(browser.reply([], "你好", wishes))
    assert parts[-1][1].strip() == alone(browser, "你好", "tuned")
    assert all(b[1].startswith(a[1]) for a, b in itertools.pairwise(parts))
    both = list(browser.reply([], "你好", replace(wishes, compare=True)))[-1]
    assert both[0].strip() == alone(browser, "你好", None) and both[1] == parts[-1][1]
    as_base = list(browser.reply([], "你好", replace(wishes, voice="base", compare=True)))[-1]
    assert as_base[0] == "" and as_base[1] == both[0]


def test_closing_a_reply_stops_the_model(browser, wishes, monkeypatch):
    threads = threading.active_count()
    reply = browser.reply([], "你好", replace(wishes, max_new_tokens=100))
    next(reply)
    reply.close()
    assert threading.active_count() == threads and browser.lock.acquire(blocking=False)
    browser.lock.release()


def test_mistakes_reach_the_visitor(browser, wishes):
    with pytest.raises(UserError, match="fewer words"):
        next(browser.reply([], "字" * 500, wishes))
    with pytest.raises(UserError, match="no adapter 'x'"):
        next(browser.reply([], "你好", replace(wishes, voice="x")))
    old = [{"role": r, "content": "很长的一句话" * 5} for r in ("user", "assistant")] * 6
    assert "forgotten" in next(browser.reply(old, "你好", wishes))[2]


def test_without_gradio_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -r requirement-web\.txt"):
        start.check_web()


@pytest.fixture(scope="module")
def page(browser):
    """The page, served on a free port of this machine."""
    pytest.importorskip("gradio")
    from tinyllm.web import CSS, LOCAL, build_page

    blocks = build_page(browser, "你是助手。")
    blocks.launch(server_name=LOCAL, css=CSS, quiet=True, prevent_thread_lock=True, footer_links=[])
    yield blocks
    blocks.close()


def test_the_page_is_served_on_this_machine_only(page):
    assert page.local_url.startswith("http://127.0.0.1:") and page.share_url is None


@pytest.mark.slow
def test_a_visit_at_phone_width(page, browser):
    """Ask, retry, compare, change the adapter and the settings, as a thumb would."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no Chromium here")
    with playwright.sync_playwright() as p:
        window = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        view = window.new_page(viewport={"width": 375, "height": 740})
        view.set_default_timeout(60_000)
        view.goto(page.local_url)
        chat, question = view.locator("#chat"), view.locator("#question textarea")
        question.fill("你好<b>")
        question.press("Enter")
        tuned = alone(browser, "你好<b>", "tuned")
        playwright.expect(chat).to_contain_text(said(tuned), timeout=60_000)
        playwright.expect(chat).to_contain_text("你好<b>")  # text, not HTML
        assert view.evaluate("document.documentElement.scrollWidth") <= 375
        view.locator("#retry").click()
        playwright.expect(chat).to_contain_text(said(tuned), timeout=60_000)
        view.locator("#settings button").first.click()
        view.locator("#voice").get_by_text("base").click()
        view.locator("#new").click()
        playwright.expect(chat).not_to_contain_text("你好<b>")
        question.fill("再见")
        view.locator("#send").click()
        base = alone(browser, "再见", None)
        playwright.expect(chat).to_contain_text(said(base), timeout=60_000)
        view.locator("#voice").get_by_text("tuned").click()
        view.locator("#compare input").check()
        view.locator("#new").click()
        question.fill("再见")
        view.locator("#send").click()
        playwright.expect(view.locator("#base")).to_contain_text(said(base), timeout=60_000)
        playwright.expect(chat).to_contain_text(said(alone(browser, "再见", "tuned")))
        window.close()
