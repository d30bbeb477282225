"""Files and rows: every refused row has a file, a line and a reason."""

from __future__ import annotations

import json

import pytest
from conftest import ROWS, write_jsonl

from tinyllm.errors import UserError
from tinyllm.formats import conversation_of
from tinyllm.records import read_records

USER, ASSISTANT = {"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}


@pytest.mark.parametrize(
    "row",
    [
        {"question": "问", "answer": "答"},
        {"messages": [USER, ASSISTANT]},
        {"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}]},
        {"instruction": "问", "input": "", "output": "答"},
        {"prompt": " 问 ", "completion": "答\n"},
    ],
)
def test_every_shape_becomes_the_same_conversation(row):
    assert conversation_of(row) == [USER, ASSISTANT]


def test_system_and_history():
    row = {
        "instruction": "问",
        "input": "细",
        "output": "答",
        "history": [["a", "b"]],
        "system": "s",
    }
    assert [m["content"] for m in conversation_of(row)] == ["s", "a", "b", "问\n细", "答"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("[1]", "expected an object"),
        ('{"text": "x"}', "no known shape: the row has text"),
        ('{"question": "q", "answer": ""}', "assistant turn is empty"),
        ('{"question": "q", "answer": 3}', "assistant turn is int"),
        ('{"question": null, "answer": "a"}', "user turn is NoneType"),
        ('{"messages": []}', "no turn"),
        ('{"messages": "x"}', "list of objects"),
        ('{"messages": [{"role": "user", "content": "q"}]}', "ends with a user turn"),
        ('{"messages": [{"role": "assistant", "content": "q"}]}', "expected user"),
        ('{"messages": [{"role": "tool", "content": "q"}]}', "unknown role 'tool'"),
        ('{"question": "a\\u0000", "answer": "b"}', "NUL"),
        ('{"question": "a\\ud800", "answer": "b"}', "surrogate"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_bad_row_names_line_and_reason(tmp_path, line, reason):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=reason) as caught:
        read_records([str(path)])
    assert f"{path}:2: " in str(caught.value)
    skipped = read_records([str(path)], "skip")
    assert len(skipped.records) == 1 and len(skipped.refused) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no rows"),
        (b"\n \n", "no rows"),
        ("你好".encode("gbk"), "rows.jsonl:1: not UTF-8"),
    ],
)
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_records([str(path)])


def test_missing_file_and_unknown_ending(tmp_path):
    with pytest.raises(UserError, match="no such data file"):
        read_records([str(tmp_path / "none.jsonl")])
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(UserError, match=r"cannot read \.txt"):
        read_records([str(tmp_path / "x.txt")])
    with pytest.raises(UserError, match="holds no"):
        read_records([str(tmp_path)])


def test_folder_bom_crlf_and_json_list(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ROWS[:2])
    text = "\r\n".join(json.dumps(r, ensure_ascii=False) for r in ROWS[2:4])
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (tmp_path / "c.json").write_text(json.dumps(ROWS[4:]), encoding="utf-8")
    read = read_records([str(tmp_path)])
    assert [r.messages[0]["content"] for r in read.records] == [r["question"] for r in ROWS]
    assert [f.num_read for f in read.files] == [2, 2, 2]


def test_many_bad_rows_show_the_first_ten(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("{\n" * 13)
    with pytest.raises(UserError, match="13 rows cannot be used") as caught:
        read_records([str(path)])
    assert "and 3 more" in str(caught.value)
    with pytest.raises(UserError, match="no row can be used"):
        read_records([str(path)], "skip")
