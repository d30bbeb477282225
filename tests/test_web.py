"""The web page: what is behind it, its answers over HTTP, and in a browser where there is one."""

from __future__ import annotations

import itertools
import re
import shutil
import threading
import time
from dataclasses import dataclass, field, replace

import pytest

from tinyllm.chat import start
from tinyllm.chat.browser import Browser, Wishes
from tinyllm.chat.options import parse_args
from tinyllm.chat.speaker import Speaker, Spoken
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
    blocks = launch(browser)
    yield blocks
    blocks.close()


def launch(browser: Browser):
    from tinyllm.web import CSS, LOCAL, build_page

    blocks = build_page(browser, "你是助手。")
    blocks.launch(server_name=LOCAL, css=CSS, quiet=True, prevent_thread_lock=True, footer_links=[])
    return blocks


def test_the_page_is_served_on_this_machine_only(page):
    assert page.local_url.startswith("http://127.0.0.1:") and page.share_url is None


@pytest.fixture(scope="module")
def chromium():
    """A headless Chromium, driven by Playwright."""
    playwright = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("there is no Chromium here")
    with playwright.sync_playwright() as p:
        window = p.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield window
        window.close()


def visit(chromium, blocks, width: int = 1200, height: int = 800):
    """The page as a visitor sees it who has just come, and Playwright's ``expect``."""
    from playwright.sync_api import expect

    expect.set_options(timeout=60_000)
    view = chromium.new_page(viewport={"width": width, "height": height})
    view.set_default_timeout(60_000)
    view.goto(blocks.local_url)
    return view, expect


@pytest.mark.slow
def test_a_visit_at_phone_width(page, browser, chromium):
    """Ask, retry, compare, change the adapter and the settings, as a thumb would."""
    view, expect = visit(chromium, page, 375, 740)
    chat, question = view.locator("#chat"), view.locator("#question textarea")
    question.fill("你好<b>")
    question.press("Enter")
    tuned = alone(browser, "你好<b>", "tuned")
    expect(chat).to_contain_text(said(tuned))
    expect(chat).to_contain_text("你好<b>")  # text, not HTML
    assert view.evaluate("document.documentElement.scrollWidth") <= 375
    view.locator("#retry").click()
    expect(chat).to_contain_text(said(tuned))
    view.locator("#settings button").first.click()
    view.locator("#voice").get_by_text("base").click()
    view.locator("#new").click()
    expect(chat).not_to_contain_text("你好<b>")
    question.fill("再见")
    view.locator("#send").click()
    base = alone(browser, "再见", None)
    expect(chat).to_contain_text(said(base))
    view.locator("#voice").get_by_text("tuned").click()
    view.locator("#compare input").check()
    view.locator("#new").click()
    question.fill("再见")
    view.locator("#send").click()
    expect(view.locator("#base")).to_contain_text(said(base))
    expect(chat).to_contain_text(said(alone(browser, "再见", "tuned")))
    assert view.evaluate("document.documentElement.scrollWidth") <= 375
    view.close()


def ask(view, question: str) -> None:
    view.locator("#question textarea").fill(question)
    view.locator("#send").click()


@dataclass
class SlowSpeaker(Speaker):
    """Writes to the last token, slowly until told to hurry, and keeps what it was asked and said."""

    asked: list[list[dict]] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    spoken: list[Spoken] = field(default_factory=list)
    hurry: threading.Event = field(default_factory=threading.Event)

    def config(self, prompt_length: int):
        config = super().config(prompt_length)
        config.min_new_tokens = config.max_new_tokens
        return config

    def speak(self, messages, on_text, name, keep_going=lambda: True) -> Spoken:
        def slowly(piece: str) -> None:
            self.hurry.wait(0.1)
            self.pieces.append(piece)
            on_text(piece)

        self.asked.append(messages)
        self.spoken.append(super().speak(messages, slowly, name, keep_going))
        return self.spoken[-1]


@pytest.fixture
def slow(browser):
    """``(page, speaker)``: replies of about fifteen seconds."""
    pytest.importorskip("gradio")
    speaker = SlowSpeaker(**vars(browser.speaker) | {"max_new_tokens": 150})
    blocks = launch(Browser(speaker))
    yield blocks, speaker
    speaker.hurry.set()
    blocks.close()


def wait_until(view, there) -> None:
    """Let the page go on until something is so."""
    end = time.monotonic() + 60
    while not there():
        assert time.monotonic() < end, "waited for a minute"
        view.wait_for_timeout(20)


@pytest.mark.slow
def test_stop_ends_the_reply_and_the_page_goes_on(slow, chromium):
    page, speaker = slow
    view, expect = visit(chromium, page)
    chat = view.locator("#chat")
    ask(view, "你好")
    for enough in (4, 12):  # it grows while it is being written
        wait_until(view, lambda enough=enough: len(speaker.pieces) >= enough)
        expect(chat).to_contain_text(said("".join(speaker.pieces[: enough - 2])), timeout=5_000)
        assert not speaker.spoken
    view.locator("#stop").click()
    wait_until(view, lambda: speaker.spoken)
    written = "".join(speaker.pieces)
    assert speaker.spoken[0].interrupted and speaker.spoken[0].num_tokens < 150
    view.wait_for_timeout(500)  # what was under way arrives
    shown = chat.inner_text()
    view.wait_for_timeout(1_000)
    assert chat.inner_text() == shown and "".join(speaker.pieces) == written

    speaker.hurry.set()
    ask(view, "再见")
    wait_until(view, lambda: len(speaker.spoken) == 2)
    _, first, kept, second = speaker.asked[1]
    assert (first["content"], second["content"]) == ("你好", "再见")
    assert len(kept["content"]) > 4 and written.startswith(kept["content"])
    assert not speaker.spoken[1].interrupted
    expect(chat).to_contain_text(said(kept["content"]))
    expect(chat).to_contain_text(said("".join(speaker.pieces)[len(written) :]))
    view.locator("#retry").click()
    wait_until(view, lambda: len(speaker.spoken) == 3)
    assert speaker.asked[2] == speaker.asked[1]
    view.close()


@pytest.mark.slow
def test_new_ends_a_reply_that_is_being_written(slow, chromium):
    page, speaker = slow
    view, expect = visit(chromium, page)
    chat = view.locator("#chat")
    ask(view, "你好")
    wait_until(view, lambda: len(speaker.pieces) >= 4)
    view.locator("#new").click()
    expect(chat).not_to_contain_text("你好")
    wait_until(view, lambda: speaker.spoken)
    assert speaker.spoken[0].interrupted
    speaker.hurry.set()
    ask(view, "再见")
    wait_until(view, lambda: len(speaker.spoken) == 2)
    assert [m["content"] for m in speaker.asked[1]] == ["你是助手。", "再见"]
    expect(chat).to_contain_text(said(speaker.spoken[1].text))
    view.close()


@pytest.mark.slow
def test_base_and_tuned_stand_beside_each_other(slow, chromium):
    page, speaker = slow
    view, expect = visit(chromium, page)
    base, chat = view.locator("#base"), view.locator("#chat")
    expect(chat).to_be_visible()
    expect(base).to_be_hidden()
    view.locator("#settings button").first.click()
    view.locator("#compare input").check()
    expect(base).to_be_visible()
    left, right = base.bounding_box(), chat.bounding_box()
    assert left["y"] == right["y"] and left["x"] + left["width"] <= right["x"]
    speaker.hurry.set()
    ask(view, "你好")
    wait_until(view, lambda: len(speaker.spoken) == 2)
    replies = [speaker.speak(speaker.asked[0], str, name).text for name in (None, "tuned")]
    assert speaker.asked[1] == speaker.asked[0] and replies[0] != replies[1]
    for column, reply in zip((base, chat), replies, strict=True):
        expect(column).to_contain_text("你好")
        expect(column).to_contain_text(said(reply))
    expect(base).not_to_contain_text(said(replies[1]))
    expect(chat).not_to_contain_text(said(replies[0]))
    view.locator("#compare input").uncheck()
    expect(base).to_be_hidden()
    view.close()
