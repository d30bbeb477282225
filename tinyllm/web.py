"""The chat as a web page, by Gradio; on this machine only unless the user asks for more."""

from __future__ import annotations

import html
import os

from tinyllm.chat.browser import Browser, Wishes
from tinyllm.errors import UserError

LOCAL = "127.0.0.1"
CSS = """
.gradio-container { max-width: 1100px !important; }
@media (max-width: 640px) {
  .gradio-container, .gradio-container main { padding: 6px !important; }
  #send, #stop, #retry, #new { min-width: 0 !important; padding: 8px 2px !important; font-size: 15px; }
}
"""


def serve(speaker, system: str, port: int = 7860, share: bool = False) -> None:
    """Open the page and serve it until Ctrl-C.

    Raises:
        UserError: Gradio is not installed, or the port is taken.
    """
    page = build_page(Browser(speaker), system)
    try:
        page.launch(
            server_name=LOCAL, server_port=port, share=share, css=CSS, show_error=True, quiet=True,
            footer_links=[], prevent_thread_lock=True,
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"--port {port}: cannot be used: {error}; choose another") from error
    print(f"the chat is at http://{LOCAL}:{port} (Ctrl-C ends it)", flush=True)
    if share and page.share_url:
        print(f"and for everybody at {page.share_url}", flush=True)
    page.block_thread()


def import_gradio():
    """Gradio, without its telemetry.

    Raises:
        UserError: it is not installed.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ImportError as error:
        raise UserError(
            f"--web needs Gradio ({error}): pip install -r requirement-web.txt"
        ) from error
    return gradio


def build_page(browser: Browser, system: str):
    """Lay out the page.

    Returns:
        A ``gradio.Blocks``, not yet served.
    """
    gr = import_gradio()
    with gr.Blocks(title="tiny-llm", analytics_enabled=False) as page:
        turns = gr.State([])
        gr.Markdown("### tiny-llm 对话")
        with gr.Row():
            base_box = _chatbot(gr, "基础模型 base", visible=False, elem_id="base")
            chat_box = _chatbot(gr, "对话 chat", elem_id="chat")
        question = gr.Textbox(
            placeholder="输入问题，回车发送", show_label=False, elem_id="question"
        )
        with gr.Row():
            send = gr.Button("发送 Send", variant="primary", min_width=60, elem_id="send")
            stop = gr.Button("停止 Stop", min_width=60, elem_id="stop")
            retry = gr.Button("重试 Retry", min_width=60, elem_id="retry")
            new = gr.Button("新对话 New", min_width=60, elem_id="new")
        with gr.Accordion("设置 Settings", open=False, elem_id="settings"):
            wishes = _wishes(gr, browser, system)
        shown = [turns, base_box, chat_box, question]
        talk = _Talk(gr, browser)
        # one queue for all: a question behind "new" is asked in the new conversation
        queue = {"concurrency_id": "talk", "concurrency_limit": 1}
        events = [
            gr.on(
                [send.click, question.submit], talk.ask, [turns, question, *wishes], shown, **queue
            ),
            retry.click(talk.ask_again, [turns, question, *wishes], shown, **queue),
        ]
        stop.click(None, cancels=events)
        for begin in (new.click, base_box.clear, chat_box.clear):
            begin(None, cancels=events)  # beside a function, cancels would wait for the reply
            begin(lambda: ([], [], []), outputs=shown[:3], **queue)
        wishes[1].change(lambda on: gr.update(visible=on), wishes[1], base_box)
    return page.queue()


def _chatbot(gr, label: str, **more):
    """A column of turns, text as it is: what a model writes is not to be rendered."""
    return gr.Chatbot(
        label=label, height="60vh", min_width=280, render_markdown=False, buttons=["copy"],
        feedback_options=None, **more,
    )  # fmt: skip


def _wishes(gr, browser: Browser, system: str) -> list:
    """The settings, in the order of the fields of ``Wishes``."""
    d = browser.defaults(system)
    return [
        gr.Radio(browser.voices, value=d.voice, label="回答者 Answering", elem_id="voice"),
        gr.Checkbox(d.compare, label="与基础模型并排 Compare with the base", elem_id="compare",
                    interactive=len(browser.voices) > 1),
        gr.Textbox(d.system, label="系统提示词 System prompt", lines=2, elem_id="system"),
        gr.Slider(0, 2, d.temperature, step=0.05, label="temperature (0: 总取最可能的词 greedy)"),
        gr.Slider(0.05, 1, d.top_p, step=0.05, label="top_p"),
        gr.Slider(0, 200, d.top_k, step=1, label="top_k (0: 全部 all)"),
        gr.Slider(1, 2, d.repetition_penalty, step=0.05, label="repetition_penalty"),
        gr.Slider(1, max(512, d.max_new_tokens), d.max_new_tokens, step=1, label="max_new_tokens"),
    ]  # fmt: skip


def as_text(turns: list[dict]) -> list[dict]:
    """Turns as the chat columns take them: they read HTML, and what is said is none."""
    return [turn | {"content": html.escape(turn["content"])} for turn in turns]


class _Talk:
    """The page's buttons: each gives ``(turns, base's column, chat column, question box)``."""

    def __init__(self, gr, browser: Browser) -> None:
        self.gr, self.browser = gr, browser

    def ask(self, turns: list[dict], question: str, *settings):
        """Answer what stands in the question box."""
        if not question.strip():
            yield turns, self.gr.skip(), self.gr.skip(), ""
            return
        yield from self._answer(turns, question.strip(), settings)

    def ask_again(self, turns: list[dict], typed: str, *settings):
        """Answer the last question again; what stands in the question box stays."""
        if not turns:
            self.gr.Info("还没有问题 Nothing has been asked yet")
            yield turns, self.gr.skip(), self.gr.skip(), typed
            return
        for turns_, base, chat, _ in self._answer(turns[:-2], turns[-2]["content"], settings):
            yield turns_, base, chat, typed

    def _answer(self, turns: list[dict], question: str, settings: tuple):
        asked = [*turns, {"role": "user", "content": question}]
        said, remark = "", ""
        try:
            for base, text, about in self.browser.reply(turns, question, Wishes(*settings)):
                said, remark = text, about
                chat = [*asked, {"role": "assistant", "content": text}]
                beside = [*asked, {"role": "assistant", "content": base}]
                # the turns go out each time: after a stop, what was said so far is remembered
                yield chat if text.strip() else turns, as_text(beside), as_text(chat), ""
        except UserError as error:
            self.gr.Warning(str(error))
            yield turns, as_text(turns), as_text(turns), question
            return
        if remark:
            self.gr.Info(remark)
        if not said.strip():
            self.gr.Info("没有回答 The model said nothing")
