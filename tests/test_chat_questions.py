"""A file of questions: every answer once, the same as alone, and on from where it was stopped."""

from __future__ import annotations

import json
from contextlib import contextmanager

import pytest
from conftest import write_jsonl

from tinyllm.chat import questions, start
from tinyllm.chat.options import parse_args
from tinyllm.chat.questions import read_questions
from tinyllm.errors import UserError

ROWS = [
    {"question": "你好", "id": 7},
    {"prompt": "你是谁？"},
    {"messages": [{"role": "user", "content": "一"}, {"role": "assistant", "content": "二"},
                  {"role": "user", "content": "三"}]},
    {"question": "今天天气好吗？", "system": "你是诗人。"},
    {"question": "再见"},
]  # fmt: skip


@pytest.fixture(scope="module")
def speaker(base_folder):
    words = ["--base_model", str(base_folder), "--max_new_tokens", "8", "--max_length", "200"]
    return start.build(parse_args(words))


@contextmanager
def counted(what, total, shown):
    yield lambda n: None


def run(speaker, tmp_path, made_with="m", seed=None, rows=ROWS):
    write_jsonl(tmp_path / "in.jsonl", rows)
    questions.answer_file(
        speaker, tmp_path / "in.jsonl", tmp_path / "out.jsonl", "s", seed, made_with, counted
    )
    return (tmp_path / "out.jsonl").read_text(encoding="utf-8")


def test_answers_are_those_given_alone(speaker, tmp_path):
    rows = [json.loads(line) for line in run(speaker, tmp_path).splitlines()]
    assert [r["line"] for r in rows] == [1, 2, 3, 4, 5] and rows[0]["id"] == 7
    for row, question in zip(rows, read_questions(tmp_path / "in.jsonl", "s"), strict=True):
        alone = speaker.speak(question.messages, lambda text: None, None)
        assert (row["answer"], row["num_tokens"]) == (alone.text, alone.num_tokens)


@pytest.mark.parametrize("seed", [None, 5])
def test_a_stopped_run_goes_on_and_ends_the_same(speaker, tmp_path, seed, monkeypatch, capsys):
    if seed is not None:
        monkeypatch.setattr(speaker, "sampling", {"do_sample": True, "temperature": 2.0})
    whole = run(speaker, tmp_path, seed=seed)
    out = tmp_path / "out.jsonl"
    lines = whole.splitlines(keepends=True)
    out.write_text(lines[3] + lines[0] + lines[2][:20], encoding="utf-8")  # killed while writing
    asked = []
    write_many = type(speaker.voices.engine(None)).write_many
    monkeypatch.setattr(
        type(speaker.voices.engine(None)), "write_many",
        lambda self, prompts, *more: (asked.extend(prompts), write_many(self, prompts, *more)),
    )  # fmt: skip
    assert run(speaker, tmp_path, seed=seed) == whole and len(asked) == 3
    assert "cut short" in capsys.readouterr().err
    assert run(speaker, tmp_path, seed=seed) == whole and len(asked) == 3


def test_an_interrupt_keeps_the_answers_that_are_there(speaker, tmp_path, monkeypatch):
    @contextmanager
    def stop_after_two(what, total, shown):
        done = []

        def count(n):
            done.append(n)
            if len(done) == 2:
                raise KeyboardInterrupt

        yield count

    write_jsonl(tmp_path / "in.jsonl", ROWS)
    paths = (tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    with pytest.raises(KeyboardInterrupt):
        questions.answer_file(speaker, *paths, "s", None, "m", stop_after_two)
    assert len(paths[1].read_text(encoding="utf-8").splitlines()) == 2
    assert len(run(speaker, tmp_path).splitlines()) == 5


def test_too_long_a_question_is_an_answer_of_its_own_kind(speaker, tmp_path, capsys):
    rows = [{"question": "字" * 500}, {"question": "你好"}]
    first, second = map(json.loads, run(speaker, tmp_path, rows=rows).splitlines())
    assert first["answer"] is None and "at most" in first["error"] and second["answer"] is not None
    assert "1 question(s) were too long" in capsys.readouterr().err


def test_answers_of_others_are_never_mixed_in(speaker, tmp_path):
    whole = run(speaker, tmp_path)
    with pytest.raises(UserError, match="another model or other settings"):
        run(speaker, tmp_path, made_with="other")
    with pytest.raises(UserError, match="no answer to a question of this"):
        run(speaker, tmp_path, rows=[{"question": "别的"}])
    assert (tmp_path / "out.jsonl").read_text(encoding="utf-8") == whole


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question": "a"}\n{"question": ', "line 2: no JSON"),
        ('{"question": ""}\n', "line 1: expected an object"),
        ("[1]\n", "line 1: expected an object"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}\n', "line 1: expected"),
        ("\n", "no question in it"),
    ],
)
def test_files_that_hold_no_questions(tmp_path, content, message):
    (tmp_path / "q").write_text(content)
    with pytest.raises(UserError, match=message):
        read_questions(tmp_path / "q", "s")
    with pytest.raises(UserError, match="No such file"):
        read_questions(tmp_path / "nowhere", "s")
