"""The questions of benchmarks/first_chat.py, and those of others."""

import pytest

from benchmarks.first_chat import ask, read_questions
from tinyllm.errors import UserError
from tinyllm.generate import Reply


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
    [
        ('{"question": ', "not JSON"),
        ('{"prompt": "x"}', "expected"),
        ("[1]", "expected"),
        ('{"question": "x", "kind": null}', "expected"),
        ('{"question": "x", "before": "y"}', "expected"),
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path, line, reason):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"question": "在吗"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=f"--questions .*mine.jsonl, line 2: {reason}"):
        read_questions(None, path)
    path.write_text("\n")
    with pytest.raises(UserError, match="there is none in it"):
        read_questions(None, path)
    with pytest.raises(UserError, match="nowhere"):
        read_questions(None, tmp_path / "nowhere.jsonl")


def test_a_question_in_the_middle_of_a_conversation(tokenizer, monkeypatch):
    """The replies to the turns before it stand in the conversation, and only the last one counts."""
    seen = []

    def reply(model, tokenizer, chat_format, messages, **settings):
        seen.append([m["content"] for m in messages[1:]])
        return Reply(f"答{messages[-1]['content']}", 2, True)

    monkeypatch.setattr("tinyllm.generate.generate_reply", reply)
    question = {"kind": "any", "question": "丙", "before": ["甲", "乙"], "any_of": ["答丙"]}
    (answer,) = ask(None, tokenizer, [question])
    assert seen == [["甲"], ["甲", "答甲", "乙"], ["甲", "答甲", "乙", "答乙", "丙"]]
    assert (answer["question"], answer["reply"]) == ("甲 / 乙 / 丙", "答丙") and answer["right"]
