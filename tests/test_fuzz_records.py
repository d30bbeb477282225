"""Malformed input of every kind: a counted reason or a UserError, never another exception.

And whatever does become an example ends in its end token, with no special token that we did not write.
"""

from __future__ import annotations

import gzip
import json
import string

import numpy as np
import pytest
from conftest import ROWS, make_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinyllm import readers
from tinyllm.chat_format import IGNORE_INDEX, chat_format_of
from tinyllm.data import load_data
from tinyllm.errors import UserError
from tinyllm.ledger_table import table
from tinyllm.settings import DataSettings

TOKENIZER = make_tokenizer()
CHAT_FORMAT = chat_format_of(TOKENIZER)
SPECIAL_IDS = np.array(sorted(TOKENIZER.get_added_vocab().values()))
GOOD = json.dumps(ROWS[0], ensure_ascii=False)


def load(path, bad_rows, **more):
    words = {"eval_dataset": ["none"], "data_cache": "none", "overlong": "shorten", **more}
    return load_data(DataSettings([str(path)], bad_rows=bad_rows, **words), CHAT_FORMAT, 200, 0)


def survive(path) -> tuple[str, str]:
    """Load under both policies; returns the error of each, ``""`` where there was none."""
    errors = []
    for policy in ("error", "skip"):
        try:
            data = load(path, policy)
        except UserError as error:
            assert str(error) and str(error).encode("utf-8")
            errors.append(str(error))
        else:
            check(data)
            errors.append("")
    return errors[0], errors[1]


def check(data):
    """Every row is accounted for, every example is whole."""
    [file] = data.ledger.files
    assert file.num_read == file.num_kept + len(file.refused) + len(file.dropped)
    assert all(line > 0 and why.strip() for line, why in file.refused)
    json.dumps(data.ledger.report(), ensure_ascii=False).encode("utf-8")
    table(data.ledger).encode("utf-8")
    assert len(data.train) == file.num_kept
    for i in range(len(data.train)):
        ids, labels = data.train[i]["input_ids"], data.train[i]["labels"]
        assert 0 < len(ids) == len(labels) <= 200
        learned = labels != IGNORE_INDEX
        assert (labels[learned] == ids[learned]).all()
        ends = np.flatnonzero(learned & ~np.append(learned[1:], False))
        assert len(ends) and (ids[ends] == TOKENIZER.eos_token_id).all()
        inside = learned.copy()
        inside[ends] = False
        assert not np.isin(ids[inside], SPECIAL_IDS).any() and inside.any()


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


U, A = turn("user", "问"), turn("assistant", "答")
DEEP = "[" * 900 + "]" * 900

BAD_LINES = {
    # not JSON
    "brace": "{", "text": "hello", "comma": '{"question": "a", "answer": "b",}',
    "single quotes": "{'question': 'a', 'answer': 'b'}", "no quotes": "{question: 1}",
    "two objects": GOOD + GOOD, "two with comma": f"{GOOD},", "cut": GOOD[:-4], "xml": "<row/>",
    "python None": '{"question": None, "answer": "b"}', "comment": f"// {GOOD}", "bom inside": f" \ufeff{GOOD}",
    "control": '{"question": "a\x01", "answer": "b"}', "escape": '{"question": "\\x", "answer": "b"}',
    "half escape": '{"question": "\\u12", "answer": "b"}', "raw NUL": '{"question": "\0", "answer": "b"}',
    "only NULs": "\0" * 50, "huge int": '{"question": ' + "9" * 5000 + ', "answer": "b"}',
    "deep open": "[" * 100_000, "deep braces": '{"a":' * 100_000, "deep closed": "[" * 5000 + "]" * 5000,
    "name twice": '{"question": "a", "question": "b", "answer": "c"}', "csv": "question,answer",
    "list twice": '{"messages": [{"role": "user", "role": "user", "content": "a"}]}',
    # JSON, but no row
    "null": "null", "true": "true", "number": "3.14", "string": '"abc"', "list": "[1, 2]", "empty list": "[]",
    "nan": "NaN", "infinity": "-Infinity", "list of row": f"[{GOOD}]", "nested list": DEEP,
    # no shape
    "no names": "{}", "other names": '{"text": "x"}', "question alone": '{"question": "a"}',
    "answer alone": '{"answer": "a"}', "capital": '{"Question": "a", "Answer": "b"}',
    "space in name": '{"question ": "a", "answer": "b"}', "surrogate name": '{"\\ud800": 1}',
    "terminal name": '{"\\u001b[2J": 1}', "long name": json.dumps({"x" * 5000: 1}),
    "many names": json.dumps({f"n{i}": i for i in range(2000)}), "empty name": '{"": "a"}',
}  # fmt: skip

BAD_ROWS = {
    **{f"{column} is {value!r}"[:40]: {"question": "问", "answer": "答", column: value}
       for column in ("question", "answer")
       for value in (None, 3, 0, True, [], ["a"], {}, {"a": 1}, 1e300, "", "  \n\t　 ", "\ud800", "a\udfffb", "a\0b")},
    "system is 3": {"question": "a", "answer": "b", "system": 3},
    "system is a list": {"question": "a", "answer": "b", "system": ["x"]},
    "system is false": {"question": "a", "answer": "b", "system": False},
    "system is blank": {"question": "a", "answer": "b", "system": "   "},
    "system NUL": {"question": "a", "answer": "b", "system": "\0"},
    "two systems": {"question": "a", "answer": "b", "system": "x", "system_prompt": "y"},
    "instruction null": {"instruction": None, "output": "b"},
    "instruction list": {"instruction": ["a"], "output": "b"},
    "output missing": {"instruction": "a", "input": "b"},
    "output number": {"instruction": "a", "output": 1},
    "both empty": {"instruction": "", "input": " ", "output": "b"},
    "input number": {"instruction": "a", "input": 0, "output": "b"},
    "input false": {"instruction": "a", "input": False, "output": "b"},
    "history text": {"instruction": "a", "output": "b", "history": "x"},
    "history zero": {"instruction": "a", "output": "b", "history": 0},
    "history object": {"instruction": "a", "output": "b", "history": {"a": "b"}},
    "history singles": {"instruction": "a", "output": "b", "history": [["a"]]},
    "history triples": {"instruction": "a", "output": "b", "history": [["a", "b", "c"]]},
    "history texts": {"instruction": "a", "output": "b", "history": ["ab", "cd"]},
    "history nulls": {"instruction": "a", "output": "b", "history": [["a", None]]},
    "history empty text": {"instruction": "a", "output": "b", "history": [["a", ""]]},
    "prompt list of text": {"prompt": ["a"], "completion": "b"},
    "prompt list alone": {"prompt": [U], "completion": "b"},
    "completion list alone": {"prompt": "a", "completion": [A]},
    "completion by user": {"prompt": [U], "completion": [U]},
    "completion empty": {"prompt": [U], "completion": []},
    "completion null": {"prompt": "a", "completion": None},
    **{f"messages {i}": {"messages": value} for i, value in enumerate([
        None, "text", 3, {}, [], [None], ["a"], [[U, A]], [3], [{}], [{"role": "user"}], [{"content": "a"}],
        [U], [A], [A, U], [U, U, A], [U, A, A], [U, A, U], [U, A, turn("system", "s"), U, A],
        [turn("system", "s")], [turn("system", "s"), A], [turn("system", "s"), turn("system", "s"), U, A],
        [turn("system", ""), U, A], [turn("system", 1), U, A],
        [turn("tool", "x"), A], [turn("developer", "x"), U, A], [U, turn("function", "x")], [U, turn("Assistant", "b")],
        [turn(None, "a"), A], [turn(1, "a"), A], [turn(["user"], "a"), A], [turn({}, "a"), A], [turn("user ", "a"), A],
        [turn("\ud800", "a"), A], [turn("\x1b[2J", "a"), A], [turn("x" * 10_000, "a"), A],
        [turn("user", None), A], [U, turn("assistant", None, tool_calls=[{"id": "1"}])], [turn("user", 1), A],
        [turn("user", []), A], [turn("user", ["a"]), A], [turn("user", [{"type": "text"}]), A],
        [turn("user", [{"type": "text", "text": 1}]), A], [turn("user", [{"type": "text", "text": ""}]), A],
        [turn("user", [{"type": "image_url", "image_url": {"url": "x"}}]), A], [turn("user", {"text": "a"}), A],
        [U, turn("assistant", "\u2028\n")], [U, turn("assistant", "a\ud83d")],
        [U, turn("assistant", "b", train=False)], [U, turn("assistant", "b", weight=0)],
        [U, turn("assistant", "b", train="no")], [U, turn("assistant", "b", train=0)], [U, turn("assistant", "b", train=[])],
        [U, turn("assistant", "b", weight=0.5)], [U, turn("assistant", "b", weight=-1)], [U, turn("assistant", "b", weight=True)],
        [U, turn("assistant", "b", weight="1")], [U, turn("assistant", "b", weight=float("nan"))],
        [turn("user", "a", train=True), A], [turn("user", "a", weight=2), A],
    ])},
    **{f"conversations {i}": {"conversations": value} for i, value in enumerate([
        None, "text", [], [{}], [["human", "a"]], [{"from": "human"}, {"from": "gpt"}], [{"value": "a"}],
        [{"from": "bot", "value": "a"}], [{"from": None, "value": "a"}], [{"from": ["human"], "value": "a"}],
        [{"from": "gpt", "value": "a"}], [{"from": "human", "value": "a"}], [{"from": "human", "value": 1}, A],
        [{"from": "human", "value": "a"}, {"from": "observation", "value": "b"}],
        [{"from": "human", "value": "a"}, {"from": "gpt", "value": ""}],
        [{"from": "\ud800", "value": "a"}], [{"from": "x" * 9999, "value": "a"}],
    ])},
    "messages with another system": {"messages": [turn("system", "a"), U, A], "system": "b"},
    "an answer that alone is too long": {"question": "a", "answer": "长" * 300},
}  # fmt: skip
ALL_BAD_LINES = BAD_LINES | {name: json.dumps(row) for name, row in BAD_ROWS.items()}

BAD_FILES = {
    "empty.jsonl": b"", "blank.jsonl": b"\n \r\n\t\n", "bom.jsonl": b"\xef\xbb\xbf", "nul.jsonl": b"\0" * 1000,
    "latin.jsonl": b'{"question": "caf\xe9", "answer": "b"}', "gbk.jsonl": '{"question": "你", "answer": "好"}'.encode("gbk"),
    "cut.jsonl": GOOD.encode()[:-20], "utf7.jsonl": b"+AHsAfQ-", "overlong.jsonl": b'{"question": "\xc0\x80", "answer": "b"}',
    "surrogate.jsonl": b'{"question": "\xed\xa0\x80", "answer": "b"}', "binary.jsonl": bytes(range(256)) * 20,
    "utf16le.jsonl": GOOD.encode("utf-16"), "utf16be.jsonl": b"\xfe\xff" + GOOD.encode("utf-16-be"),
    "utf16nobom.jsonl": GOOD.encode("utf-16-le"), "utf32.jsonl": GOOD.encode("utf-32"),
    "mac.jsonl": f"{GOOD}\r{GOOD}".encode(), "pretty.jsonl": json.dumps(ROWS[0], indent=1).encode(),
    "list.jsonl": json.dumps(ROWS[:2]).encode(), "gzip.jsonl": gzip.compress(GOOD.encode()), "pdf.jsonl": b"%PDF-1.4\n%\xe2\xe3",
    "empty.json": b"", "blank.json": b" \n", "text.json": b"hello", "string.json": b'"a"', "null.json": b"null",
    "number.json": b"12", "emptylist.json": b"[]", "open.json": b"[", "closed.json": b"]", "comma.json": b"[,]",
    "twocommas.json": f"[{GOOD},,{GOOD}]".encode(), "nocomma.json": f"[{GOOD} {GOOD}]".encode(), "cut.json": f"[{GOOD}, {GOOD[:-3]}".encode(),
    "trailing.json": f"[{GOOD}] {GOOD}".encode(), "nulls.json": b"[null, null]", "nested.json": f"[[{GOOD}]]".encode(),
    "deep.json": b"[" * 200_000, "deepobject.json": b'[{"a":' * 50_000, "object.json": json.dumps({"data": ROWS}).encode(),
    "prettyobject.json": json.dumps({"data": ROWS}, indent=1).encode(), "gbk.json": '[{"question": "你", "answer": "好"}]'.encode("gbk"),
    "cututf8.json": '[{"question": "你'.encode()[:-1], "utf16.json": json.dumps(ROWS).encode("utf-16"), "nul.json": b"[\0]",
    "badint.json": b"[" + b"9" * 5000 + b"]", "lines.json": f"{GOOD}\nnot json\n".encode(),
    "empty.csv": b"", "header.csv": b"question,answer\n", "noheader.csv": b"a,b\nc,d\n", "twice.csv": b"question,question\na,b\n",
    "semicolon.csv": b"question;answer\na;b\n", "more.csv": b"question,answer\na,b,c\n", "fewer.csv": b"question,answer\na\n",
    "open.csv": b'question,answer\n"a,b\nc,d\n', "quote.csv": b'question,answer\n"a"b,c\n', "gbk.csv": "question,answer\n你,好\n".encode("gbk"),
    "gbkheader.csv": "问,答\na,b\n".encode("gbk"), "nul.csv": b"question,answer\n\0,b\n", "utf16.csv": "question,answer\na,b\n".encode("utf-16"),
    "mac.csv": b"question,answer\ra,b\r", "blankcells.csv": b"question,answer\n,\n , \n", "openheader.csv": b'"question,answer\na,b\n',
    "emptyheader.csv": b",\na,b\n", "surrogate.csv": b"question,answer\n\xed\xa0\x80,b\n", "binary.csv": bytes(range(256)) * 20,
    "tabs.csv": b"question\tanswer\na\tb\n", "commas.tsv": b"question,answer\na,b\n", "list.csv": b"messages\n[1]\n",
    "badlist.csv": b'messages\n"[{"\n', "text.csv": b"messages\nhello\n",
    "empty.parquet": b"", "text.parquet": b"hello", "magic.parquet": b"PAR1PAR1", "cut.parquet": b"PAR1" + b"\0" * 100 + b"PAR1",
    "json.parquet": GOOD.encode(), "empty.jsonl.gz": b"", "text.jsonl.gz": GOOD.encode(), "cut.jsonl.gz": gzip.compress(GOOD.encode() * 99)[:40],
    "flipped.jsonl.gz": gzip.compress(GOOD.encode() * 99)[:-6] + b"\0\0\0\0\0\0", "nothing.jsonl.gz": gzip.compress(b""),
    "text.jsonl.bz2": b"BZh9xx", "text.jsonl.xz": b"\xfd7zXZ\0junk", "empty.jsonl.xz": b"", "twice.jsonl.gz": gzip.compress(gzip.compress(GOOD.encode())),
}  # fmt: skip


def test_there_are_enough_of_them():
    assert len(ALL_BAD_LINES) + len(BAD_FILES) >= 200


@pytest.mark.parametrize("name", ALL_BAD_LINES)
def test_a_bad_line_is_refused_alone_and_by_its_number(tmp_path, name):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(f"{GOOD}\n{ALL_BAD_LINES[name]}\n{GOOD}\n".encode("utf-8", "surrogatepass"))
    stops, skips = survive(path)
    file = load(path, "skip").ledger.files[0]
    assert not skips and file.num_kept == 2
    if file.dropped:  # too long: a policy of its own
        assert [line for line, _ in file.dropped] == [2]
    else:
        assert [line for line, _ in file.refused] == [2] and len(file.refused[0][1]) < 300
        assert f"{path}:2: {file.refused[0][1]}" in stops


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_a_clear_error(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(BAD_FILES[name])
    stops, skips = survive(path)
    # nothing in it is a row, or its readable rows are kept and the others named
    assert str(path) in stops
    if not skips:
        assert load(path, "skip").ledger.files[0].refused
    else:
        assert str(path) in skips and len(skips) < 600


NASTY = [
    "<|user|>", "<|endoftext|>", "<|assistant|>\nhi<|endoftext|>", "<|pad|><|system|>", "</s>", "[INST]",
    "\u202e反", "\ufeff", "\u200b", "a\r\nb", "\x07\x1b[31m", "é" * 50, "👩‍👩‍👧‍👦", "𝔘𝔫𝔦", "ﷺ" * 20, "{{ 1/0 }}",
    "{% generation %}", "\\n\\u0000", "%s %d {0}", "a" * 3000, "字" * 3000, " x ", "\u0301\u0301", "<|USER|>", "<|user |>",
]  # fmt: skip


@pytest.mark.parametrize("text", NASTY)
def test_nasty_text_is_only_text(tmp_path, text):
    path = tmp_path / "rows.jsonl"
    rows = [
        {"question": text, "answer": "答"},
        {"question": "问", "answer": text[:50]},
        {"question": "问", "answer": "答", "system": text},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = load(path, "skip")
    check(data)
    for i in range(len(data.train)):
        special = [j for j in data.train[i]["input_ids"].tolist() if j in SPECIAL_IDS]
        assert TOKENIZER.convert_ids_to_tokens(special) == [
            "<|system|>",
            "<|user|>",
            "<|assistant|>",
            "<|endoftext|>",
        ]


def test_a_line_of_many_megabytes_is_refused_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_ROW_BYTES", 2**16)
    path = tmp_path / "rows.jsonl"
    long = json.dumps({"question": "q" * 2**18, "answer": "a"})
    path.write_text(f"{GOOD}\n{long}\n{GOOD}\n{long}", encoding="utf-8")
    file = load(path, "skip").ledger.files[0]
    assert [line for line, _ in file.refused] == [2, 4] and "longer than" in file.refused[0][1]
    stops, _ = survive(path)
    assert f"{path}:2: longer than" in stops
    element = tmp_path / "rows.json"
    element.write_text(f"[{GOOD}, {long[:-1]}", encoding="utf-8")
    assert "element 2 is not JSON" in survive(element)[0]


FUZZ = settings(
    max_examples=60, derandomize=True, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
TEXT = st.text(max_size=30) | st.sampled_from(["", "你好", *NASTY[:10]])
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=8,
)
NAMES = st.sampled_from([
    "question", "answer", "messages", "conversations", "instruction", "input", "output", "history",
    "prompt", "completion", "system", "system_prompt", "id",
])  # fmt: skip
MESSAGE = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "assistant", "system", "tool"]) | VALUE,
        "content": TEXT | VALUE,
    },
    optional={
        "train": VALUE,
        "weight": VALUE,
        "from": st.sampled_from(["human", "gpt"]),
        "value": TEXT,
    },
)
ROW = (
    st.dictionaries(NAMES, VALUE | st.lists(MESSAGE, max_size=5), max_size=6)
    | st.fixed_dictionaries({"question": TEXT, "answer": TEXT}, optional={"system": TEXT | VALUE})
    | st.fixed_dictionaries({"messages": st.lists(MESSAGE, max_size=6)})
)


@FUZZ
@given(rows=st.lists(ROW | VALUE, min_size=1, max_size=8), ascii_only=st.booleans())
def test_any_json_rows(tmp_path, rows, ascii_only):
    for name, text in (
        ("rows.jsonl", "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)),
        ("rows.json", json.dumps(rows, ensure_ascii=ascii_only)),
    ):
        path = tmp_path / name
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        survive(path)


@FUZZ
@given(
    content=st.binary(max_size=200),
    ending=st.sampled_from([*readers.SUFFIXES, ".jsonl.gz", ".csv.bz2", ".json.xz"]),
)
def test_any_bytes_in_any_file(tmp_path, content, ending):
    path = tmp_path / f"rows{ending}"
    path.write_bytes(content)
    survive(path)


@FUZZ
@given(
    place=st.integers(0, 10_000), new=st.binary(max_size=4), length=st.integers(0, 4),
    form=st.sampled_from(["jsonl", "json", "csv", "parquet", "jsonl.gz"]),
)  # fmt: skip
def test_any_damage_to_a_good_file(tmp_path, place, new, length, form):
    content = good_files()[form]
    place %= len(content)
    path = tmp_path / f"rows.{form}"
    path.write_bytes(content[:place] + new + content[place + length :])
    survive(path)


@FUZZ
@given(
    cells=st.lists(st.lists(TEXT, max_size=4), max_size=5), quote=st.sampled_from(['"', "", "'"])
)
def test_any_csv(tmp_path, cells, quote):
    lines = ["question,answer", *(",".join(quote + cell + quote for cell in row) for row in cells)]
    path = tmp_path / "rows.csv"
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    survive(path)


_GOOD: dict[str, bytes] = {}


def good_files() -> dict[str, bytes]:
    if not _GOOD:
        import pyarrow
        from pyarrow import parquet

        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
        table = "question,answer\n" + "".join(f"{r['question']},{r['answer']}\n" for r in ROWS)
        sink = pyarrow.BufferOutputStream()
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), sink)
        _GOOD.update({
            "jsonl": lines, "json": json.dumps(ROWS).encode(), "csv": table.encode(),
            "parquet": sink.getvalue().to_pybytes(), "jsonl.gz": gzip.compress(lines, mtime=0),
        })  # fmt: skip
    return _GOOD


@FUZZ
@given(name=st.text(alphabet=string.printable + "你\udcff", min_size=1, max_size=12))
def test_any_path(tmp_path, name):
    with pytest.raises(UserError):
        load(tmp_path / "nowhere" / name, "error")
