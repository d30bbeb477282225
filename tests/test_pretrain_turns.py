"""Short conversations that are read in the chat format only."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY
from pretraining import run_of, tiny_settings

from tinyllm.errors import UserError
from tinyllm.pretrain import corpus, own_text
from tinyllm.pretrain.model_card import LICENCES, described
from tinyllm.pretrain.settings import WEIGHTS

RAIN, HELLO = "问：下雨了\n答：记得带伞。", "问：你好\n答：你好！\n问：吃了吗\n答：我不吃东西。"
PAIRS = [[("下雨了", "记得带伞。")], [("你好", "你好！"), ("吃了吗", "我不吃东西。")]]


def turns_of(tmp_path, *blocks, between="\n\n", encoding="utf-8"):
    (tmp_path / "story.txt").write_text("从前有一座山。\n", encoding="utf-8")
    (tmp_path / "turns_a.txt").write_bytes((between.join(blocks) + "\n").encode(encoding))
    return [d["text"] for d in own_text.turn_documents(tmp_path)]


def rendered(pairs):
    return {own_text.render_chat(pairs, with_system=system) for system in (False, True)}


def test_they_are_conversations_of_the_corpus_and_no_text_of_it(tmp_path):
    found = turns_of(tmp_path, RAIN, HELLO)
    assert [text in rendered(pairs) for text, pairs in zip(found, PAIRS, strict=True)] == [True] * 2
    assert [d["text"] for d in own_text.own_documents(tmp_path)] == ["从前有一座山。"]


def test_some_open_with_a_system_turn_and_some_do_not(tmp_path):
    found = turns_of(tmp_path, *(f"问：{n}加一\n答：{n + 1}" for n in range(40)))
    assert 8 < sum(own_text.SYSTEM_PROMPT in text for text in found) < 32


def test_the_same_one_is_read_once_wherever_it_stands_and_none_is_held_out(tmp_path):
    numbers = [f"问：{n}加一\n答：{n + 1}" for n in range(200)]
    turns_of(tmp_path, RAIN, RAIN, HELLO, RAIN, *numbers)
    counts = corpus.build(tmp_path, {}, tmp_path / "corpus")["sources"]
    assert [counts["turns"][n] for n in ("read", "duplicates", "train")] == [204, 2, 202]
    documents = corpus.read_jsonl(tmp_path / "corpus" / "train.jsonl")
    ids = [d["id"] for d in documents if d["source"] == "turns"]
    assert len(set(ids)) == 202
    held = corpus.read_jsonl(tmp_path / "corpus" / "heldout.jsonl")
    assert not [d for d in held if d["source"] == "turns"]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_files_of_any_editor(tmp_path, newline, encoding):
    blocks = [RAIN.replace("\n", newline), f"问：在\u200b吗{newline}  答：在。"]
    between = f"{newline} {newline}{newline}"
    expected = [PAIRS[0], [("在吗", "在。")]]
    found = turns_of(tmp_path, *blocks, between=between, encoding=encoding)
    assert all(text in rendered(pairs) for text, pairs in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "block", ["问：下雨了", "答：记得带伞。", "问：甲\n问：乙", "从前有一座山。", "问：\n答：在。"]
)
@pytest.mark.parametrize("before", [1, 3])
def test_what_is_no_conversation_is_named(tmp_path, block, before):
    line = 3 * before + 1
    with pytest.raises(UserError, match=rf"turns_a\.txt, line {line}: expected lines of 问： and"):
        turns_of(tmp_path, *[RAIN] * before, block, RAIN)


def test_nor_is_what_is_not_in_utf_8(tmp_path):
    with pytest.raises(UserError, match=r"turns_a\.txt: not UTF-8"):
        turns_of(tmp_path, RAIN, encoding="gbk")


def test_ours_can_be_read():
    found = own_text.turn_documents(REPOSITORY / "data/pretrain")
    assert len({d["id"] for d in found}) > 20_000


def test_the_recipe_reads_every_kind_of_text():
    recipe = yaml.safe_load((REPOSITORY / "configs/ptm_tiny_llm_16m.yaml").read_text("utf-8"))
    assert recipe["weights"].keys() == WEIGHTS.keys()


def test_text_without_a_weight_is_said(tmp_path, caplog):
    settings = tiny_settings(tmp_path)
    Path(settings.own_text, "turns_a.txt").write_text(HELLO, encoding="utf-8")
    with caplog.at_level("INFO"):
        run_of(replace(settings, weights={"own": 1}))
    assert "text turns: not read, for it has no weight" in caplog.text
    with pytest.raises(UserError, match="text of own, turns, but a positive weight only of chat"):
        run_of(replace(settings, weights={"chat": 1, "own": 0}))


def test_cards_name_other_folders():
    for source, (version, _, content) in LICENCES.items():
        if version == "this repository":
            assert described(source, ["my texts"])[2] == content.replace(
                "data/pretrain/", "my texts"
            )
            assert "`data/pretrain/`" in content
