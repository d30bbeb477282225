"""Patterns of short conversations give what fits together, the same each time, and say where one is wrong."""

import pytest
from conftest import REPOSITORY

from tinyllm.errors import UserError
from tinyllm.pretrain import corpus, own_text
from tinyllm.pretrain.patterns import MARKER, MOST, Pattern, read_patterns
from tinyllm.pretrain.vocabulary import SPECIAL_TOKENS

TEXT = """
{动物 叫声} 小羊 咩咩 | 小鸭 嘎嘎
{时} 早上|晚上
问：{时}{动物}怎么叫？
问：学学{动物}
答：{动物}{叫声}叫。

问：你好
答：你好！
"""


def patterns_of(tmp_path, text):
    path = tmp_path / "patterns_a.txt"
    path.write_text(text, encoding="utf-8")
    return read_patterns(path)


def test_what_belongs_together_stays_together(tmp_path):
    first, second = patterns_of(tmp_path, TEXT)
    assert set(first.pairs()) == {
        (question, answer)
        for animal, answer in (("小羊", "小羊咩咩叫。"), ("小鸭", "小鸭嘎嘎叫。"))
        for question in (f"早上{animal}怎么叫？", f"晚上{animal}怎么叫？", f"学学{animal}")
    }
    assert second.pairs() == [("你好", "你好！")]


def test_so_many_at_most_and_the_same_each_time():
    many = Pattern([[{"数": str(i)} for i in range(500)]], ["{数}？"], ["{数}。", "是{数}。"])
    found = many.pairs()
    assert len(found) == len(set(found)) == MOST and found == many.pairs()
    assert all(answer.strip("是。") == question.strip("？") for question, answer in found)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("问：一\n你好\n", 2, "expected a line of slots"),
        ("{甲 乙} 一 二 | 三\n问：一\n答：一\n", 1, "2 words expected"),
        ("{甲} 一 |\n问：一\n答：一\n", 1, "1 words expected"),
        ("问：{甲}\n答：一\n", 3, "slots that it does not have"),
        ("{甲} 一\n{甲} 二\n问：{甲}\n答：一\n", 5, "a slot twice"),
        ("问：一\n\n问：二\n答：二\n", 2, "no 问： or no 答："),
        ("问：一\n答：一<|assistant|>\n", 2, r"<\|assistant\|> is a marker"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, text, line, words):
    with pytest.raises(UserError, match=f"patterns_a.txt, line {line}: .*{words}"):
        patterns_of(tmp_path, text)


def test_they_are_conversations_of_the_corpus_and_no_text_of_it(tmp_path):
    (tmp_path / "story.txt").write_text("从前有一座山。\n", encoding="utf-8")
    patterns_of(tmp_path, TEXT)
    assert [d["text"] for d in own_text.own_documents(tmp_path)] == ["从前有一座山。"]
    counts = corpus.build(tmp_path, {}, tmp_path / "corpus")["sources"]["patterns"]
    # 学学 has no slot for the time of day, and stands there once for both
    assert (counts["read"], counts["duplicates"], counts["train"]) == (7, 0, 7)
    found = corpus.by_source(corpus.read_jsonl(tmp_path / "corpus" / "train.jsonl"))["patterns"]
    assert "小鸭嘎嘎叫。" in "".join(found)
    assert all("你是一个友好的助手。" in text for text in found[1::2])


def test_ours_can_be_read():
    files = sorted((REPOSITORY / "data/pretrain").glob(own_text.PATTERNS))
    assert files and all(len(read_patterns(path)) > 100 for path in files)


def test_every_marker_of_the_tokenizer_is_known_as_one():
    assert all(MARKER.fullmatch(token) for token in SPECIAL_TOKENS)
    assert not MARKER.search("<|你|> <user> |user|")
