"""The questions of benchmarks/first_chat.py, and those of others."""

import pytest

from benchmarks.first_chat import read_questions
from tinyllm.errors import UserError


def test_those_that_come_with_it_by_kind():
    everything = read_questions(None)
    greetings = read_questions("greeting")
    assert greetings and greetings == [q for q in everything if q["kind"] == "greeting"]
    with pytest.raises(UserError, match="--kinds nonsense: expected some of"):
        read_questions("greeting,nonsense")


def test_those_of_others(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"question": "在吗"}\n\n{"kind": "a", "question": "你好"}\n', encoding="utf-8")
    assert [(q["kind"], q["question"]) for q in read_questions(None, path)] == [
        ("any", "在吗"),
        ("a", "你好"),
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [('{"question": ', "not JSON"), ('{"prompt": "x"}', "expected"), ("[1]", "expected")],
)
def test_a_line_that_is_no_question_is_named(tmp_path, line, reason):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"question": "在吗"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=f"--questions .*mine.jsonl, line 2: {reason}"):
        read_questions(None, path)
    with pytest.raises(UserError, match="nowhere"):
        read_questions(None, tmp_path / "nowhere.jsonl")
