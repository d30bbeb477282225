"""The chat through a pseudo-terminal and through pipes that close: no traceback, no hang."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
from conftest import REPOSITORY, hear_ctrl_c, make_model, make_tokenizer

pty = pytest.importorskip("pty")
fcntl = pytest.importorskip("fcntl")
termios = pytest.importorskip("termios")

PATIENCE = 90  # seconds until a missing answer counts as a hang


def take_terminal() -> None:
    """For a child before it starts: its standard input is its terminal, whose Ctrl-C it hears."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    hear_ctrl_c()


class Terminal:
    """The chat at the other end of a pseudo-terminal."""

    def __init__(self, *words: str) -> None:
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "inference_lora.py", *words], stdin=slave, stdout=slave, stderr=slave,
            cwd=REPOSITORY, start_new_session=True, env=os.environ | {"TERM": "xterm", "LC_ALL": "C.UTF-8"},
            preexec_fn=take_terminal,
        )  # fmt: skip
        os.close(slave)
        os.set_blocking(self.master, False)
        self.text, self.seen = "", 0

    def send(self, text: str) -> None:
        data = text.encode()
        while data:
            try:
                data = data[os.write(self.master, data) :]
            except BlockingIOError:
                self._read()

    def wait_for(self, text: str) -> str:
        """Read until a text appears behind what was waited for before; returns what came until then."""
        deadline = time.monotonic() + PATIENCE
        while (at := self.text.find(text, self.seen)) < 0:
            assert time.monotonic() < deadline, f"no {text!r} in {self.text[self.seen :][-500:]!r}"
            self._read()
        before, self.seen = self.text[self.seen : at], at + len(text)
        return before

    def end(self) -> int:
        """Wait for the program to leave; returns its exit code."""
        deadline = time.monotonic() + PATIENCE
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.text[-500:]
            self._read()
        self._read()
        os.close(self.master)
        return self.process.returncode

    def _read(self) -> None:
        try:
            self.raw = getattr(self, "raw", b"") + os.read(self.master, 65536)
        except BlockingIOError:
            time.sleep(0.02)
        except OSError:  # the other end has closed
            time.sleep(0.02)
        self.text = getattr(self, "raw", b"").decode("utf-8", "ignore")


@pytest.fixture(scope="module")
def talkative(tmp_path_factory) -> str:
    """A base that goes on for thousands of tokens."""
    folder = tmp_path_factory.mktemp("bases") / "talkative"
    tokenizer = make_tokenizer()
    make_model(max_position_embeddings=8192).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_conversation_at_a_terminal(talkative):
    chat = Terminal("--base_model", talkative, "--max_new_tokens", "7000", "--max_length", "1000",
                    "--engine", "generate", "--greedy")  # fmt: skip
    chat.wait_for("用户: ")
    chat.send("\n")  # an empty line
    chat.wait_for("用户: ")
    chat.send("/system 你们\x7f好吗\n")  # a wide character is taken back whole
    chat.wait_for("a new conversation")
    chat.send("/system\n")
    chat.wait_for("system prompt: 你好吗")
    chat.send("\x1b[A\x1b[A\n")  # two up: the line before the last
    chat.wait_for("a new conversation")
    chat.wait_for("用户: ")
    chat.send("half a line")
    chat.wait_for("half a line")
    chat.send("\x03")  # Ctrl-C drops what stands on the line
    chat.wait_for("用户: ")
    chat.send("\x1b[200~" + "字" * 10_000 + "\x1b[201~\n")
    chat.wait_for("please ask in fewer words")
    chat.send("\x1b[200~/system a\x07b\x1b[201~\n")  # pasted with a bell in it
    chat.wait_for("left out 1 control character")
    chat.wait_for("用户: ")
    chat.send("<|endoftext|>你好\n")
    chat.wait_for("助手: ")
    time.sleep(0.5)
    chat.send("\x03")  # in the middle of a reply
    chat.wait_for("[stopped]")
    chat.wait_for("用户: ")
    chat.send("/params\n")
    chat.wait_for("greedy")
    chat.wait_for("用户: ")
    chat.send("\x04")
    assert chat.end() == 0
    assert "Traceback" not in chat.text and "\ufffd" not in chat.text


@pytest.mark.parametrize("seconds", [0.4, 2.0])
def test_ctrl_c_while_loading(talkative, seconds):
    chat = Terminal("--base_model", talkative)
    time.sleep(seconds)
    if "用户" not in chat.text:
        chat.send("\x03")
    code = chat.end()
    assert code in (0, 130) and "Traceback" not in chat.text, chat.text


def test_a_pipe_that_is_closed(talkative):
    process = subprocess.Popen(
        [sys.executable, "inference_lora.py", "--base_model", talkative, "--max_new_tokens", "3000"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=REPOSITORY,
    )  # fmt: skip
    assert process.stdout.read(len("用户: ".encode())).decode() == "用户: "
    process.stdout.close()
    process.stdin.write("你好\n你好\n".encode())
    process.stdin.flush()
    errors = process.stderr.read().decode()
    assert process.wait(PATIENCE) == 0 and "Traceback" not in errors, errors
    process.stdin.close()
    process.stderr.close()
