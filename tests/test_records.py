"""Files and rows: every format is read alike, and every refused row has a file, a line and a reason."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma

import pytest
from conftest import ROWS, write_jsonl

from tinyllm.errors import UserError
from tinyllm.formats import RowError, RowRules, conversation_of
from tinyllm.ledger import FileLedger
from tinyllm.readers import CHUNK_BYTES, read_rows
from tinyllm.records import find_sources, read_records, split_weight

USER, ASSISTANT = {"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}
UNTRAINED = ASSISTANT | {"train": False}


PLAIN = RowRules()


def read(path, rules=PLAIN):
    """``(records, ledger)`` of a file."""
    ledger = FileLedger(str(path))
    return list(read_records(path, rules, ledger)), ledger


@pytest.mark.parametrize(
    "row",
    [
        {"question": "问", "answer": "答"},
        {"messages": [USER, ASSISTANT]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "问"}]}, ASSISTANT]},
        {"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}]},
        {"conversations": [USER, ASSISTANT]},
        {"instruction": "问", "input": "", "output": "答"},
        {"instruction": "问", "output": "答", "history": None, "input": None, "system": ""},
        {"prompt": " 问 ", "completion": "答\n"},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"question": None, "answer": None, "prompt": "问", "completion": "答"},
    ],
)
def test_every_shape_becomes_the_same_conversation(row):
    assert conversation_of(row) == [USER, ASSISTANT]


def test_system_and_history():
    row = {
        "instruction": "问", "input": "细", "output": "答", "history": [["a", "b"]], "system": "s",
    }  # fmt: skip
    assert [m["content"] for m in conversation_of(row)] == ["s", "a", "b", "问\n细", "答"]


@pytest.mark.parametrize("row", [
    {"question": "问", "answer": "答", "system_prompt": "s"},
    {"messages": [USER, ASSISTANT], "system": "s"},
    {"messages": [{"role": "system", "content": "s"}, USER, ASSISTANT], "system": "s"},
    {"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}], "system": "s"},
    {"prompt": [USER], "completion": [ASSISTANT], "system": "s"},
])  # fmt: skip
def test_a_system_prompt_per_row(row):
    assert conversation_of(row) == [{"role": "system", "content": "s"}, USER, ASSISTANT]


@pytest.mark.parametrize(
    ("mark", "kept"),
    [({"train": False}, UNTRAINED), ({"weight": 0}, UNTRAINED), ({"train": True}, ASSISTANT),
     ({"weight": 1}, ASSISTANT), ({"train": None, "weight": None}, ASSISTANT)],
)  # fmt: skip
def test_a_turn_can_be_left_out_of_the_loss(mark, kept):
    assert conversation_of({"messages": [USER, ASSISTANT | mark, USER, ASSISTANT]})[1] == kept
    sharegpt = [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"} | mark]
    assert conversation_of({"conversations": sharegpt * 2 + [USER, ASSISTANT]})[1] == kept


def test_only_the_last_turn_is_learned():
    row = {"messages": [USER, ASSISTANT, USER, ASSISTANT]}
    last = RowRules(train_on="last")
    assert conversation_of(row, last) == [USER, UNTRAINED, USER, ASSISTANT]
    assert conversation_of({"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]}) == (
        conversation_of(row, last)
    )
    with pytest.raises(RowError, match="no assistant turn is to be learned"):
        conversation_of({"messages": [USER, ASSISTANT, USER, UNTRAINED]}, last)


def test_columns_of_other_names():
    rules = RowRules({"question": "prompt_text", "answer": "reply", "system": "sys"})
    assert conversation_of({"prompt_text": "问", "reply": "答", "id": 1}, rules) == [
        USER,
        ASSISTANT,
    ]
    both = {"prompt_text": "问", "reply": "答", "messages": [ASSISTANT], "question": "x"}
    assert conversation_of(both, rules) == [USER, ASSISTANT]
    assert conversation_of({"question": "问", "answer": "答"}, rules) == [USER, ASSISTANT]
    with pytest.raises(RowError, match="no column 'reply'"):
        conversation_of({"prompt_text": "问", "answer": "答"}, rules)


def csv_text(rows, delimiter=","):
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def lines_text(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_parquet(path, rows, **options):
    import pyarrow
    from pyarrow import parquet

    names = dict.fromkeys(name for row in rows for name in row)
    rows = [{name: row.get(name) for name in names} for row in rows]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return path


TRICKY = [*ROWS, {"question": '他说："好"，\n第二行', "answer": "a,b\tc;\u2028d"}]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", lines_text(TRICKY)),
        ("a.NDJSON", lines_text(TRICKY).replace("\n", "\r\n")),
        ("a.jsonl", "\ufeff" + lines_text(TRICKY) + "\n\n"),
        ("a.jsonl", lines_text(TRICKY).rstrip("\n")),
        ("a.json", json.dumps(TRICKY)),
        ("a.json", "\ufeff \n" + json.dumps(TRICKY, ensure_ascii=False, indent=2) + "\n"),
        ("a.json", lines_text(TRICKY)),
        ("a.csv", csv_text(TRICKY)),
        ("a.csv", "\ufeff" + csv_text(TRICKY).replace("\r\n", "\n") + "\n"),
        ("a.tsv", csv_text(TRICKY, "\t")),
    ],
)
@pytest.mark.parametrize(
    ("ending", "pack"),
    [("", bytes), (".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)],
)
def test_every_format_gives_the_same_records(tmp_path, name, text, ending, pack):
    path = tmp_path / f"{name}{ending}"
    path.write_bytes(pack(text.encode("utf-8")))
    records, ledger = read(path)
    assert [r.messages for r in records] == [conversation_of(row) for row in TRICKY]
    assert ledger.num_read == len(TRICKY) and not ledger.refused and not ledger.unused_columns


def test_parquet_gives_the_same_records(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", TRICKY * 500, row_group_size=700)
    records, _ = read(path)
    assert [r.messages for r in records] == [conversation_of(row) for row in TRICKY] * 500
    assert [r.line for r in records] == list(range(1, len(records) + 1))


def test_parquet_fills_its_lists_with_nulls(tmp_path):
    rows = [
        {"messages": [USER, UNTRAINED, USER, ASSISTANT | {"name": "x"}]},
        {"question": "问", "answer": "答"},
    ]
    records, _ = read(write_parquet(tmp_path / "a.parquet", rows))
    assert [r.messages for r in records] == [[USER, UNTRAINED, USER, ASSISTANT], [USER, ASSISTANT]]


def test_lists_in_a_csv_are_json(tmp_path):
    rows = [{"messages": json.dumps([USER, ASSISTANT])}, {"messages": "[{"}, {"messages": "hello"}]
    path = tmp_path / "a.csv"
    path.write_text(csv_text(rows), encoding="utf-8")
    records, ledger = read(path)
    assert records[0].messages == [USER, ASSISTANT]
    assert [why[:20] for _, why in ledger.refused] == [
        "column messages: not",
        "messages must be a l",
    ]


def test_lines_of_a_csv_are_where_the_record_starts(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('question,answer\n"a\nb",c\n\nd,e\nf\n"g",h\n', encoding="utf-8")
    records, ledger = read(path)
    assert [r.line for r in records] == [2, 5, 7]
    assert ledger.refused == [(6, "1 cells, but the header has 2 names")]


def test_a_long_json_list_is_read_in_pieces(tmp_path):
    rows = [{"question": f"问{i}", "answer": "答" * (i % 700)} for i in range(1, 6000)]
    rows[10]["answer"] = "长" * CHUNK_BYTES
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    assert path.stat().st_size > 6 * CHUNK_BYTES
    assert [row for _, row in read_rows(path)] == rows


def test_a_number_is_not_cut_at_the_end_of_a_piece(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([123456789] * 200_000))
    assert path.stat().st_size > 2 * CHUNK_BYTES
    assert {row for _, row in read_rows(path)} == {123456789}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"question": "a", "answer": "b"}', "expected ','|expected '\\]'|end of the file"),
        ('[{"question": "a"', "element 1 is not JSON"),
        ('[{"a": 1} {"a": 2}]', "expected ','"),
        ('[{"a": 1},]', "element 2 is not JSON"),
        ('[{"a": 1}] x', "more text after the list"),
        ("[" * 100_000, "element 1 is nested too deeply|not JSON"),
        ('{\n "question": "a"\n}', "one complete object a line"),
        ('"text"', "expected a list of rows"),
        ("", "no rows"),
        ("[]", "no rows"),
    ],
)
def test_a_broken_json_list_is_a_clear_error(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read(path)


def test_a_list_element_with_a_name_given_twice_is_passed_over(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(
        '[{"question": "a", "question": "b", "answer": "c"}, {"question": "问", "answer": "答"}]'
    )
    records, ledger = read(path)
    assert [r.line for r in records] == [2]
    assert ledger.refused == [(1, "the name 'question' is given twice")]


def test_damaged_files_are_a_clear_error(tmp_path):
    packed = gzip.compress(lines_text(ROWS).encode() * 1000, mtime=0)
    cases = {
        "cut.jsonl.gz": packed[: len(packed) // 2],
        "not.jsonl.gz": b"no gzip",
        "not.jsonl.xz": b"no xz",
        "not.jsonl.bz2": b"no bz2",
        "not.parquet": b"no parquet",
        "empty.parquet": b"",
        "wide.jsonl": lines_text(ROWS).encode("utf-16"),
        "wide.csv": csv_text(ROWS).encode("utf-32"),
        "head.csv": "问题,answer\na,b\n".encode("gbk"),
        "twice.csv": b"question,question\na,b\n",
        "semicolon.csv": b"question;answer\na;b\n",
    }
    for name, content in cases.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(UserError) as caught:
            read(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_find_sources(tmp_path):
    for name in ("b.jsonl", "a.csv.gz", "notes.txt", ".hidden.jsonl"):
        (tmp_path / name).write_text("x")
    (tmp_path / "inner").mkdir()
    sources, others = find_sources([f"{tmp_path}:0.5", str(tmp_path / "b.jsonl")])
    assert [(s.path.name, s.weight) for s in sources] == [
        ("a.csv.gz", 0.5),
        ("b.jsonl", 0.5),
        ("b.jsonl", 1),
    ]
    assert [name.rsplit("/", 1)[1] for name in others] == ["inner", "notes.txt"]


def test_missing_file_and_unknown_ending(tmp_path):
    (tmp_path / "x.txt").write_text("x")
    (tmp_path / "x.parquet.gz").write_text("x")
    for name, message in (
        ("none.jsonl", "no such data file"), ("x.txt", r"cannot read \.txt"), ("", "holds no"),
        ("x.parquet.gz", r"cannot read \.parquet\.gz"), ("a" * 5000, "name too long"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            find_sources([str(tmp_path / name)])


@pytest.mark.parametrize(
    ("text", "split"),
    [("a.jsonl", ("a.jsonl", 1)), ("a.jsonl:2", ("a.jsonl", 2)), ("a:0.25", ("a", 0.25)),
     (r"C:\a.jsonl", (r"C:\a.jsonl", 1)), (":2", (":2", 1)), ("a:b:1e1", ("a:b", 10))],
)  # fmt: skip
def test_weights(text, split):
    assert split_weight(text) == split


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "1000"])
def test_senseless_weights(weight):
    with pytest.raises(UserError, match="weight must be above 0"):
        split_weight(f"a.jsonl:{weight}")


def test_a_file_whose_name_looks_like_a_weight(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl:2", ROWS)
    assert split_weight(str(path)) == (str(path), 1.0)
