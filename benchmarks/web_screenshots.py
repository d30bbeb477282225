"""Pictures of the web page and of the report for docs/, by headless Chromium.

    pip install -r requirement-web.txt playwright        # and a Chromium: apt install chromium
    python benchmarks/web_screenshots.py --base_model BASE --lora_model RUN

Writes web.png (base and adapter side by side), web_phone.png, report.png and report_phone.png, the
report's from RUN/report.html.  Chinese needs a font (apt install fonts-noto-cjk).
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tinyllm.errors import UserError, run_program  # noqa: E402

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chromium-headless-shell")
DESKTOP, PHONE = {"width": 1100, "height": 800}, {"width": 390, "height": 780}
MOST_BYTES = 200_000


def launch_page(base: str, adapter: str):
    """The chat page on a free port of this machine, and what is behind it."""
    from tinyllm.chat import start
    from tinyllm.chat.browser import Browser
    from tinyllm.chat.options import parse_args
    from tinyllm.web import CSS, LOCAL, build_page

    args = parse_args(["--base_model", base, "--lora_model", f"tuned={adapter}"])
    browser, system = Browser(start.build(args)), start.turns(args).system
    page = build_page(browser, system)
    page.launch(server_name=LOCAL, css=CSS, quiet=True, prevent_thread_lock=True, footer_links=[])
    return page, browser, system


def open_view(chromium, address: str, size: dict):
    view = chromium.new_page(viewport=size, color_scheme="light", reduced_motion="reduce")
    view.set_default_timeout(120_000)
    view.goto(address)
    return view


def ask_and_wait(view, browser, system: str, question: str, compare: bool) -> None:
    """Ask on the page, and wait until both columns show the whole replies."""
    from dataclasses import replace

    wishes = replace(browser.defaults(system), compare=compare)
    *_, (base, tuned, _) = browser.reply([], question, wishes)
    if compare:
        view.locator("#settings button").first.click()
        view.locator("#compare input").check()
        view.locator("#settings button").first.click()
    view.locator("#question textarea").fill(question)
    view.locator("#send").click()
    for column, text in (("#base", base), ("#chat", tuned)) if compare else (("#chat", tuned),):
        line = max(text.splitlines() or [""], key=len).strip()
        view.locator(column).get_by_text(line).first.wait_for()
    view.wait_for_timeout(1_000)  # the progress marks fade


def keep(view, path: Path) -> None:
    """Write what the window shows, in at most 256 colours.

    Raises:
        UserError: the file is larger than a repository should hold.
    """
    import io

    from PIL import Image

    picture = Image.open(io.BytesIO(view.screenshot())).convert("RGB").quantize(256)
    picture.save(path, optimize=True)
    view.close()
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")
    if path.stat().st_size > MOST_BYTES:
        raise UserError(f"{path}: more than {MOST_BYTES // 1000} kB")


def chat_pictures(chromium, args: argparse.Namespace) -> None:
    page, browser, system = launch_page(args.base_model, args.lora_model)
    try:
        for name, size, compare in (("web", DESKTOP, True), ("web_phone", PHONE, False)):
            view = open_view(chromium, page.local_url, size)
            ask_and_wait(view, browser, system, args.question, compare)
            keep(view, args.output / f"{name}.png")
    finally:
        page.close()


def report_pictures(chromium, args: argparse.Namespace) -> None:
    report = Path(args.lora_model).resolve() / "report.html"
    if not report.is_file():
        raise UserError(f"{report}: no such file; python -m tinyllm.report {args.lora_model}")
    for name, size, height in (("report", DESKTOP, 1300), ("report_phone", PHONE, 1300)):
        view = open_view(chromium, report.as_uri(), size | {"height": height})
        keep(view, args.output / f"{name}.png")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base_model", required=True)
    parser.add_argument("--lora_model", required=True, help="run folder with report.html")
    parser.add_argument("--question", default="你好")
    parser.add_argument("--output", type=Path, default=ROOT / "docs")
    args = parser.parse_args()
    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if path is None:
        raise UserError(f"no browser: none of {', '.join(BROWSERS)} is installed")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise UserError(f"{error}: pip install playwright") from error
    with sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=path, args=["--no-sandbox"])
        report_pictures(chromium, args)
        chat_pictures(chromium, args)
        chromium.close()
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
