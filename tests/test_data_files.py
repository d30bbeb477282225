"""The rows that come with the repository: enough, varied, consistent, and never held out twice."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter

import pytest
from conftest import REPOSITORY

from tinyllm.formats import conversation_of
from tinyllm.pretrain.patterns import read_patterns

TRAIN = [
    REPOSITORY / "data/sft_train/sft_data.jsonl",
    REPOSITORY / "data/sft_train/sft_multi_turn.jsonl",
]
HELD_OUT = REPOSITORY / "data/sft_eval/sft_heldout.jsonl"
PROBES = REPOSITORY / "benchmarks/first_chat.jsonl"
MAKER = "李小贱"
OTHERS = ("我是ChatGPT", "我是文心一言", "我是通义千问", "我叫小爱", "我是Siri", "我是DeepSeek")


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def plain(text: str) -> str:
    """Text without punctuation, spaces and question particles: what makes two wordings the same."""
    kept = [c for c in unicodedata.normalize("NFKC", text).lower() if c.isalnum()]
    return "".join(kept).replace("请", "").rstrip("吗呢")


@pytest.fixture(scope="module")
def conversations():
    return [conversation_of(row) for path in TRAIN for row in rows(path)]


def first_questions(conversations):
    return [next(m["content"] for m in c if m["role"] == "user") for c in conversations]


def test_there_are_enough_and_some_have_several_turns(conversations):
    assert len(conversations) >= 1500
    assert sum(sum(m["role"] == "assistant" for m in c) > 1 for c in conversations) >= 300


def test_no_conversation_stands_there_twice(conversations):
    counts = Counter(json.dumps(c, ensure_ascii=False) for c in conversations)
    assert max(counts.values()) == 1


def test_no_template_is_above_fifteen_percent(conversations):
    answers = [c[-1]["content"] for c in conversations]
    for length in (5, 8):
        start, number = Counter(a[:length] for a in answers).most_common(1)[0]
        assert number / len(answers) < 0.15, start
    questions = Counter(plain(q)[:4] for q in first_questions(conversations))
    assert questions.most_common(1)[0][1] / len(conversations) < 0.15


def test_hello_is_answered_as_in_the_guide(conversations):
    answers = {c[1]["content"] for c in conversations if c[0]["content"] == "你好" and len(c) == 2}
    assert answers == {"你好！我是由李小贱开发的个人助手，很高兴为您服务。有什么我可以帮助您的吗？"}


def test_the_assistant_never_says_it_is_another(conversations):
    answers = [m["content"] for c in conversations for m in c if m["role"] == "assistant"]
    assert not [a for a in answers if any(other in a for other in OTHERS)]
    assert sum(MAKER in a for a in answers) > 300


def test_held_out_questions_are_not_in_training(conversations):
    known = {plain(m["content"]) for c in conversations for m in c if m["role"] == "user"}
    held_out = first_questions([conversation_of(row) for row in rows(HELD_OUT)])
    probes = [row["question"] for row in rows(PROBES)]
    assert len(held_out) >= 150 and len(probes) >= 100
    assert not [q for q in held_out + probes if plain(q) in known]


def test_probes_are_of_every_kind():
    kinds = Counter(row["kind"] for row in rows(PROBES))
    assert all(kinds[k] >= 20 for k in ("identity", "greeting", "small_talk", "general", "unknown"))


def test_pretraining_text_does_not_name_the_developer():
    """Who made the assistant is what the adapter teaches."""
    for path in (REPOSITORY / "data/pretrain").glob("*.txt"):
        assert MAKER not in path.read_text(encoding="utf-8"), path.name


def test_held_out_wordings_are_not_in_the_pretraining_text():
    text = "".join(
        p.read_text(encoding="utf-8") for p in (REPOSITORY / "data/pretrain").glob("*.txt")
    )
    lines = {plain(line.removeprefix("问：")) for line in text.splitlines()}
    questions = [row["question"] for row in rows(HELD_OUT) + rows(PROBES)]
    assert not [q for q in questions if plain(q) in lines and len(plain(q)) > 4]


def test_nor_can_they_come_from_its_patterns():
    held_out = {plain(row["question"]) for row in rows(HELD_OUT) + rows(PROBES)}
    for path in (REPOSITORY / "data/pretrain").glob("patterns_*.txt"):
        for pattern in read_patterns(path):
            pairs = pattern.pairs(most=10**6)  # all of them
            assert not [q for q, _ in pairs if plain(q) in held_out], path.name
