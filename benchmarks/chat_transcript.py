"""A chat in a real terminal (tmux), printed as the terminal shows it, for docs/chat.md.

    python benchmarks/chat_transcript.py --base_model BASE --lora_model RUN

Asks, compares, stops a reply with Ctrl-C, asks again and leaves.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tinyllm.errors import UserError, run_program  # noqa: E402

SECONDS = 180


class Terminal:
    """A detached tmux session on a server of its own, with a program in it."""

    def __init__(self, words: list[str]) -> None:
        self.name = f"tinyllm-transcript-{time.time_ns()}"
        self._tmux("-f", "/dev/null", "new-session", "-d", "-x", "90", "-y", "60",
                   f"{shlex.join(words)}; sleep {SECONDS}")  # fmt: skip

    def _tmux(self, *words: str) -> str:
        done = subprocess.run(
            ["tmux", "-u", "-L", self.name, *words], capture_output=True, text=True
        )
        if done.returncode:
            raise UserError(f"tmux {words[0]}: {done.stderr.strip()}")
        return done.stdout

    def shows(self) -> str:
        return self._tmux("capture-pane", "-p").rstrip()

    def wait(self, there, pause: float = 0.2) -> str:
        """The screen as soon as ``there(screen)`` holds."""
        end = time.monotonic() + SECONDS
        while not there(screen := self.shows()):
            if time.monotonic() > end:
                raise UserError(f"waited for {SECONDS} s; the terminal shows:\n{screen}")
            time.sleep(pause)
        return screen

    def wait_for_prompt(self) -> None:
        self.wait(lambda screen: screen.endswith("用户:"))

    def type(self, line: str) -> None:
        self._tmux("send-keys", "-l", line)
        self._tmux("send-keys", "Enter")

    def interrupt(self) -> None:
        self._tmux("send-keys", "C-c")

    def close(self) -> None:
        self._tmux("kill-server")


def talk(terminal: Terminal, long_question: str) -> str:
    """Go through the conversation; returns all that the terminal shows at its end."""
    for line in ("你好", "/compare 你是谁？"):
        terminal.wait_for_prompt()
        terminal.type(line)
        terminal.wait(lambda screen, line=line: line in screen)
        time.sleep(0.5)
    terminal.wait_for_prompt()
    terminal.type(long_question)
    # Ctrl-C as soon as the reply has begun
    terminal.wait(lambda s: len(s.split(long_question)[-1].strip()) > len("助手: ") + 2, 0.01)
    terminal.interrupt()
    terminal.wait_for_prompt()
    terminal.type("/quit")
    time.sleep(2)
    return terminal.shows()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base_model", required=True)
    parser.add_argument("--lora_model", required=True)
    parser.add_argument("--long_question", default="请写一篇很长的文章介绍春天。")
    args = parser.parse_args()
    script = str(ROOT / "inference_lora.py")
    words = ["--base_model", args.base_model, "--lora_model", args.lora_model]
    terminal = Terminal([sys.executable, script, *words])
    try:
        print(talk(terminal, args.long_question))
    finally:
        terminal.close()
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
