"""The report: its measurements against naive ones, its page against its metrics, in a browser."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROWS, make_model, train_arguments

import sft_lora
from tinyllm.adapter import load_adapter_on_base
from tinyllm.attention import use_packed_attention
from tinyllm.chat_format import IGNORE_INDEX, chat_format_of
from tinyllm.generate import generate_reply, stop_ids
from tinyllm.report.__main__ import main as report_main
from tinyllm.report.html import look_up
from tinyllm.report.page import report_page
from tinyllm.report.replies import Question, reply_to_all
from tinyllm.report.rows import last_answer, measure_rows, with_other_question
from tinyllm.report.statistics import paired_difference

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


@pytest.fixture
def run_copy(finished_run, tmp_path):
    return shutil.copytree(finished_run, tmp_path / "run")


@pytest.fixture
def metrics(finished_run) -> dict:
    return json.loads((finished_run / "metrics.json").read_text())


# --- measurements -----------------------------------------------------------------------------


def encoded_rows(tokenizer) -> list[dict]:
    chat_format = chat_format_of(tokenizer)
    rows = []
    for number, row in enumerate(ROWS):
        turns = [{"role": "user", "content": row["question"]},
                 {"role": "assistant", "content": row["answer"]}]  # fmt: skip
        if number == 0:  # a second turn
            turns += [
                {"role": "user", "content": "谢谢"},
                {"role": "assistant", "content": "再见！"},
            ]
        encoded = chat_format.encode(turns)
        rows.append({"input_ids": np.array(encoded.input_ids), "labels": np.array(encoded.labels)})
    return rows


def naive(model, row, stops) -> tuple[float, ...]:
    """The measures of one row from one unpacked forward pass over all positions."""
    ids, labels = (torch.tensor(row[name]) for name in ("input_ids", "labels"))
    scores = model(input_ids=ids[None]).logits[0, :-1].float().log_softmax(-1)
    targets = labels[1:]
    learned = targets != IGNORE_INDEX
    loss = F.nll_loss(scores[learned], targets[learned], reduction="none")
    start = max(i for i in range(1, len(ids)) if labels[i] != IGNORE_INDEX
                and labels[i - 1] == IGNORE_INDEX)  # fmt: skip
    last = torch.arange(1, len(ids))[learned] >= start
    ends = [i for i in range(len(ids)) if labels[i] != IGNORE_INDEX
            and (i + 1 == len(ids) or labels[i + 1] == IGNORE_INDEX)]  # fmt: skip
    stop = np.mean([scores[end - 1, stops].exp().sum().item() for end in ends])
    hits = (scores[learned].argmax(1) == targets[learned]).sum().item()
    return (
        loss.sum().item(),
        int(learned.sum()),
        hits,
        loss[last].sum().item(),
        int(last.sum()),
        stop,
    )


@pytest.mark.parametrize("packed", [True, False])
def test_packed_measures_equal_naive_ones(tokenizer, packed):
    model, rows = make_model(), encoded_rows(tokenizer)
    stops = stop_ids(model, chat_format_of(tokenizer))
    with torch.no_grad():
        expected = np.array([naive(model, row, stops) for row in rows])
    if packed:
        assert use_packed_attention(model)
    found = measure_rows(model, rows, stops)
    columns = (found.loss, found.count, found.hits, found.last_loss, found.last_count, found.stop)
    np.testing.assert_allclose(np.stack(columns, 1), expected, rtol=1e-4, atol=1e-5)


def test_the_end_is_found_in_rows_that_do_not_teach_it(tokenizer):
    model, rows = make_model(), encoded_rows(tokenizer)
    stops = stop_ids(model, chat_format_of(tokenizer))
    endless = [{**row, "labels": np.where(row["labels"] == 1, IGNORE_INDEX, row["labels"])}
               for row in rows]  # fmt: skip
    whole, cut = measure_rows(model, rows, stops), measure_rows(model, endless, stops)
    np.testing.assert_allclose(cut.stop, whole.stop, rtol=1e-5)
    assert (cut.count < whole.count).all()


def test_another_question_before_the_same_answer(tokenizer):
    rows = encoded_rows(tokenizer)
    for number, row in with_other_question(rows, 256):
        prompt, answer = last_answer(rows[number])
        other, same = last_answer(row)
        assert np.array_equal(answer, same) and not np.array_equal(prompt, other)
    assert with_other_question(rows[:1], 256) == []
    assert with_other_question([rows[1], rows[1]], 256) == []


def test_interval_holds_the_true_difference():
    """Of 95 % intervals about 95 % hold the truth; 100 draws of 60 rows each, seeded."""
    random, held = np.random.default_rng(0), 0
    for _ in range(100):
        hard, counts = random.gamma(2, 10, 60), np.full(60, 10)
        before, after = hard + 5 + random.normal(0, 3, 60), hard + random.normal(0, 3, 60)
        interval = paired_difference(before, after, counts)
        held += interval["low"] <= 0.5 <= interval["high"]
    assert 88 <= held <= 100
    same = paired_difference(hard, hard, counts)
    assert same == {"mean": 0, "low": 0, "high": 0}


def test_batched_replies_equal_single_ones(tokenizer):
    model, chat_format = make_model(), chat_format_of(tokenizer)
    questions = [Question([{"role": "user", "content": text}])
                 for text in ("你好", "一加一等于几？请慢慢说。", "谢谢")]  # fmt: skip
    found = reply_to_all(model, tokenizer, chat_format, questions, 12)
    for question, reply in zip(questions, found, strict=True):
        alone = generate_reply(model, tokenizer, chat_format, question.messages,
                               max_new_tokens=12, do_sample=False)  # fmt: skip
        assert (reply["text"], reply["stopped"]) == (alone.text, alone.stopped)


def test_off_is_the_base_and_on_is_the_adapter(finished_run, base_folder, metrics):
    from tinyllm.base import load_base
    from tinyllm.report.evidence import general_rows

    base, tokenizer = load_base(base_folder)
    tuned, _ = load_adapter_on_base(base_folder, finished_run, "cpu")
    rows, stops = general_rows(tokenizer, 256), stop_ids(base, chat_format_of(tokenizer))
    for model, side in ((base, "off"), (tuned, "on")):
        found = measure_rows(model, rows, stops).summary()
        assert found["loss"] == pytest.approx(
            metrics["evidence"]["general"][side]["loss"], abs=1e-5
        )


def test_held_out_loss_is_the_trainers(metrics):
    held_out, training = metrics["evidence"]["held_out"], metrics["training"]
    assert held_out["rows"] == 1 and held_out["on"]["loss"] != held_out["off"]["loss"]
    assert held_out["off"]["loss"] == pytest.approx(training["eval_loss_before"], abs=1e-5)
    assert held_out["on"]["loss"] == pytest.approx(training["eval_loss"], abs=1e-5)


def test_full_training_is_compared_with_the_base_loaded_again(base_folder, data_file, tmp_path):
    words = train_arguments(base_folder, data_file, tmp_path / "full", "--use_lora", "False",
                            "--report", "True")  # fmt: skip
    assert sft_lora.main(words) == 0
    metrics = json.loads((tmp_path / "full" / "metrics.json").read_text())
    held_out = metrics["evidence"]["held_out"]
    assert held_out["off"]["loss"] == pytest.approx(
        metrics["training"]["eval_loss_before"], abs=1e-5
    )
    assert held_out["on"]["loss"] < held_out["off"]["loss"]


def test_report_false_measures_nothing(base_folder, data_file, tmp_path):
    assert sft_lora.main(train_arguments(base_folder, data_file, tmp_path / "run")) == 0
    assert not (tmp_path / "run" / "metrics.json").exists()
    assert "Not measured" in (tmp_path / "run" / "README.md").read_text()


# --- the page ---------------------------------------------------------------------------------


class Numbers(html.parser.HTMLParser):
    """Collects ``(path, kind, text)`` of every number, and what would be fetched from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[list[str]] = []
        self.fetched: list[str] = []
        self.open = False

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag in ("script", "link", "img", "iframe") or "src" in given or "href" in given:
            self.fetched.append(tag)
        if "data-metric" in given:
            self.found.append([given["data-metric"], given["data-kind"], ""])
            self.open = True

    def handle_data(self, data):
        if self.open:
            self.found[-1][2] += data

    def handle_endtag(self, tag):
        self.open = False


def value_of(text: str, kind: str) -> float:
    """The number that a text says, read without the page's own code."""
    number = float(re.sub(r"[,%]|MiB", "", text))
    return number / 100 if kind == "share" else number * 2**20 if kind == "mib" else number


TOLERANCE = {"number": 5.1e-5, "share": 5.1e-4, "mib": 2**19 + 1}


def assert_numbers_agree(page: str, metrics) -> Numbers:
    numbers = Numbers()
    numbers.feed(page)
    assert len(numbers.found) > 20 and numbers.fetched == []
    for path, kind, text in numbers.found:
        value = look_up(metrics, path)
        if isinstance(value, str) or value is None:
            assert text == (value or "–"), path
        else:
            tolerance = TOLERANCE.get(kind, abs(value) * 1e-5)
            assert value_of(text, kind) == pytest.approx(value, abs=tolerance), path
    return numbers


@pytest.mark.parametrize("lang", ["zh", "en"])
def test_numbers_in_the_page_are_those_of_the_metrics(metrics, lang):
    numbers = assert_numbers_agree(report_page(metrics, lang), metrics)
    shown = {path for path, _, _ in numbers.found}
    for path in ("held_out.off.loss", "held_out.on.perplexity", "held_out.drop.low",
                 "general.on.loss", "held_out.on.stop_probability", "stop.on"):  # fmt: skip
        assert f"evidence.{path}" in shown


def test_the_page_in_the_run_folder_is_the_rebuilt_one(run_copy, capsys):
    before = (run_copy / "report.html").read_text()
    (run_copy / "report.html").unlink()
    assert report_main([str(run_copy)]) == 0
    assert (run_copy / "report.html").read_text() == before
    assert "report.html" in capsys.readouterr().out


def test_texts_of_the_model_cannot_break_the_page(metrics):
    evil = '</pre><script>alert(1)</script>&<b a="'
    metrics["evidence"]["replies"][0].update(question=evil, gold=evil)
    metrics["evidence"]["replies"][0]["on"]["text"] = evil
    metrics["settings"]["system_prompt"], metrics["name"] = evil, evil
    assert_numbers_agree(report_page(metrics, "zh"), metrics)


def test_a_measured_again_run_has_the_same_evidence(run_copy, base_folder, metrics, tmp_path):
    prompts = tmp_path / "mine.txt"
    prompts.write_text("你好\n\n你会什么？\n", encoding="utf-8")
    assert report_main([str(run_copy), "--probe_prompts", str(prompts)]) == 0
    again = json.loads((run_copy / "metrics.json").read_text())["evidence"]
    for part in ("held_out", "general", "train"):
        for side in ("off", "on"):
            first = metrics["evidence"][part][side]
            assert again[part][side] == pytest.approx(first, rel=1e-4), (part, side)
    mine = [reply["question"] for reply in again["replies"] if reply["source"] == "user"]
    assert mine == ["你好", "你会什么？"]
    assert "你会什么？" in (run_copy / "report.html").read_text()


def test_comparison_of_runs(run_copy, finished_run, tmp_path, capsys):
    target = tmp_path / "comparison.html"
    assert report_main([str(run_copy), str(finished_run), "--output", str(target)]) == 0
    runs = [json.loads((run / "metrics.json").read_text()) for run in (run_copy, finished_run)]
    page = target.read_text()
    numbers = Numbers()
    numbers.feed(page)
    assert {path.split(".")[0] for path, _, _ in numbers.found} == {"0", "1"}
    for path, kind, text in numbers.found:
        value = look_up(runs, path)
        assert value_of(text, kind) == pytest.approx(
            value, abs=TOLERANCE.get(kind, abs(value) * 1e-5)
        )
    assert page.count("<polyline") == 6 and str(run_copy) in page
    assert str(finished_run) in capsys.readouterr().out


def test_card_tells_what_the_metrics_tell(finished_run, metrics):
    card = (finished_run / "README.md").read_text()
    held_out = metrics["evidence"]["held_out"]
    for side in ("off", "on"):
        assert f"{held_out[side]['loss']:.4f}" in card
    for part in ("load_lora_model(", "load_lora_model_without_merge(", "PeftModel.from_pretrained",
                 metrics["identity"]["data"][:12], "## Limits"):  # fmt: skip
        assert part in card


def test_the_cards_python_loads_the_run(finished_run):
    card = (finished_run / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        names: dict = {}
        exec(block, names)
        ids = names["tokenizer"]("你好", return_tensors="pt").input_ids
        assert torch.isfinite(names["model"](ids).logits).all()


@pytest.mark.parametrize(
    ("break_it", "message"),
    [(lambda run: shutil.rmtree(run), "no such run folder"),
     (lambda run: (run / "metrics.json").write_text("{"), "cannot be read as JSON"),
     (lambda run: (run / "metrics.json").write_text("{}"), "measure again with --measure"),
     (lambda run: (run / "run.json").unlink(), "no such file")],
)  # fmt: skip
def test_broken_run_folders(run_copy, break_it, message):
    from tinyllm.errors import UserError

    break_it(run_copy)
    with pytest.raises(UserError, match=message):
        report_main([str(run_copy)])


def test_a_merge_certificate_is_shown(run_copy):
    (run_copy / "merge_certificate.json").write_text('{"max_logit_difference": 1.5e-5}')
    assert report_main([str(run_copy), "--lang", "en"]) == 0
    page = (run_copy / "report.html").read_text()
    assert "Merge certificate" in page and "1.5e-05" in page


def test_picture_of_the_losses(finished_run):
    pytest.importorskip("matplotlib", reason="pip install -r requirement-report.txt")
    assert (finished_run / "training_loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("width", [390, 1200])
def test_rendered_by_a_browser(finished_run, tmp_path, width):
    """A real browser lays the page out: no script error hides it, nothing sticks out on a phone."""
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no headless browser: none of {', '.join(BROWSERS)} is installed")
    page = (finished_run / "report.html").read_text().replace(
        "</body>",
        "<script>document.title=[document.documentElement.scrollWidth<=innerWidth,"
        "document.querySelectorAll('svg polyline').length,"
        "[...document.querySelectorAll('svg')].every(s=>s.getBoundingClientRect().width>100),"
        "getComputedStyle(document.body).backgroundColor].join('|')</script></body>",
    )  # fmt: skip
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    said = []
    for scheme in ("0", "1"):  # dark, light
        output = subprocess.run(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900",
             f"--blink-settings=preferredColorScheme={scheme}", "--dump-dom",
             (tmp_path / "page.html").as_uri()],
            capture_output=True, text=True, timeout=120, check=True,
        ).stdout  # fmt: skip
        title = re.search(r"<title>(.*?)</title>", output)
        assert title, output[:500]
        said.append(title[1].split("|"))
    for fits, lines, drawn, _ in said:
        assert (fits, int(lines) >= 3, drawn) == ("true", True, "true")
    assert said[0][3] != said[1][3], "dark and light look alike"
