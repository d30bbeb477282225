"""From settings to examples: bad rows, the held-out split, weights, columns, and the cache."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from conftest import ROWS, make_tokenizer, write_jsonl

from tinyllm import data as data_stage
from tinyllm import encoding_cache
from tinyllm.chat_format import chat_format_of
from tinyllm.data import load_data
from tinyllm.errors import UserError
from tinyllm.settings import DataSettings

MANY = [{"question": f"问{i}", "answer": f"答{i}"} for i in range(200)]


@pytest.fixture(scope="session")
def chat_format(tokenizer):
    return chat_format_of(tokenizer)


def load(chat_format, *paths, seed=0, max_length=256, **settings):
    settings = {"eval_dataset": ["none"], "data_cache": "none", **settings}
    return load_data(
        DataSettings([str(p) for p in paths], **settings), chat_format, max_length, seed
    )


def texts(chat_format, examples):
    """The examples as text, their ids decoded."""
    tokenizer = chat_format.text.tokenizer
    return [tokenizer.decode(examples[i]["input_ids"].tolist()) for i in range(len(examples))]


def questions(chat_format, examples):
    return [text.split("<|user|>\n")[1].split("\n")[0] for text in texts(chat_format, examples)]


def test_bad_rows_stop_the_run_and_the_first_ten_are_shown(chat_format, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("{\n" * 13 + json.dumps(ROWS[0]))
    with pytest.raises(
        UserError, match=r"13 rows cannot be used \(mend them, or --bad_rows skip\)"
    ) as caught:
        load(chat_format, path)
    assert str(caught.value).count("rows.jsonl:") == 10 and "and 3 more" in str(caught.value)
    data = load(chat_format, path, bad_rows="skip")
    assert len(data.train) == 1 and data.summary["num_rows_refused"] == 13
    path.write_text("{\n" * 13)
    with pytest.raises(UserError, match=r"no row can be used; first: .*rows.jsonl:1: not JSON"):
        load(chat_format, path, bad_rows="skip")


def test_rows_that_the_chat_format_refuses_are_bad_rows_too(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    own_template = chat_format_of(tokenizer)
    path = write_jsonl(tmp_path / "rows.jsonl", [*ROWS, {"question": "<|user|>", "answer": "a"}])
    with pytest.raises(
        UserError, match=r"1 row cannot be used(.|\n)*rows.jsonl:7: a user turn contains"
    ):
        load(own_template, path)
    data = load(own_template, path, bad_rows="skip")
    assert len(data.train) == 6 and data.ledger.files[0].refused[0][0] == 7


def test_long_rows_are_told_together(chat_format, tmp_path):
    rows = [*ROWS, {"question": "长" * 90, "answer": "a"}, {"question": "长" * 99, "answer": "a"}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    message = r"2 rows give examples longer than --max_length 90, first .*:7, longest .*:8 with \d+ tokens"
    with pytest.raises(UserError, match=message):
        load(chat_format, path, max_length=90)
    dropped = load(chat_format, path, max_length=90, overlong="drop").ledger.files[0]
    assert [line for line, _ in dropped.dropped] == [7, 8] and dropped.num_kept == 6
    shortened = load(chat_format, path, max_length=90, overlong="shorten").ledger.files[0]
    assert [line for line, _ in shortened.shortened] == [7, 8] and shortened.num_kept == 8
    with pytest.raises(UserError, match="no training example is left"):
        load(chat_format, path, max_length=3, overlong="drop")


def test_a_share_is_held_out_at_random_and_always_the_same(chat_format, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", MANY)
    first, again, other = (
        load(chat_format, path, eval_dataset=["auto"], eval_share=0.1, seed=s) for s in (1, 1, 2)
    )
    assert len(first.held_out) == 20 and len(first.train) == 180
    assert first.train.digest == again.train.digest != other.train.digest
    asked = questions(chat_format, first.train) + questions(chat_format, first.held_out)
    assert sorted(asked) == sorted(row["question"] for row in MANY)
    assert questions(chat_format, first.train) == sorted(
        questions(chat_format, first.train), key=asked.index
    )
    held_out = questions(chat_format, first.held_out)
    assert [r.messages[0]["content"] for r in first.sample_records] == held_out
    assert held_out != [f"问{i}" for i in range(20)] != held_out


def test_the_split_never_parts_rows_with_the_same_question(chat_format, tmp_path):
    rows = [row | {"answer": answer} for row in MANY[:40] for answer in "甲乙甲"]
    data = load(
        chat_format,
        write_jsonl(tmp_path / "rows.jsonl", rows),
        eval_dataset=["auto"],
        eval_share=0.25,
    )
    train, held_out = (set(questions(chat_format, part)) for part in (data.train, data.held_out))
    assert not train & held_out and len(held_out) == 10 and len(data.held_out) == 30
    ledger = data.ledger
    assert (
        ledger.overlap.number == 0
        and ledger.duplicates.number == 40
        and ledger.conflicts.number == 40
    )


@pytest.mark.parametrize("number", [1, 2])
def test_one_question_is_trained_on(chat_format, tmp_path, number):
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS[:number])
    data = load(chat_format, path, eval_dataset=["auto"])
    assert len(data.train) == 1 and (data.held_out is None) == (number == 1)


def test_weights(chat_format, tmp_path):
    one = write_jsonl(tmp_path / "one.jsonl", ROWS)
    many = write_jsonl(tmp_path / "many.jsonl", MANY)
    data = load(chat_format, f"{one}:2", f"{many}:0.5", seed=3)
    asked = questions(chat_format, data.train)
    assert asked[:12] == [row["question"] for row in ROWS for _ in range(2)]
    left = asked[12:]
    assert 80 < len(left) < 120 and len(set(left)) == len(left)
    first, second = data.ledger.files
    assert (first.weight, first.num_examples, first.num_left_out) == (2, 12, 0)
    assert second.num_examples == second.num_kept == len(left) == 200 - second.num_left_out
    assert load(chat_format, f"{one}:2", f"{many}:0.5", seed=3).train.digest == data.train.digest
    assert load(chat_format, f"{one}:2", f"{many}:0.5", seed=4).train.digest != data.train.digest
    with pytest.raises(UserError, match="a weight makes no sense here"):
        load(chat_format, one, eval_dataset=[f"{many}:2"])


def test_held_out_rows_are_never_trained_on_whatever_the_weight(chat_format, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", MANY)
    data = load(chat_format, f"{path}:2.5", eval_dataset=["auto"], eval_share=0.2)
    assert len(data.held_out) == 40
    assert not set(questions(chat_format, data.train)) & set(questions(chat_format, data.held_out))


def test_columns(chat_format, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("nr,prompt_text,reply\n1,问,答\n", encoding="utf-8")
    data = load(chat_format, path, columns=["question=prompt_text,answer=reply"], system_prompt="")
    assert texts(chat_format, data.train) == ["<|user|>\n问\n<|assistant|>\n答<|endoftext|>"]
    assert data.ledger.files[0].unused_columns == ["nr"]
    with pytest.raises(UserError, match="no row has a column 'replyy'"):
        load(chat_format, path, columns=["answer=replyy"])


def test_train_on_last(chat_format, tmp_path):
    turns = [
        {"role": r, "content": c}
        for r, c in zip(("user", "assistant") * 2, "甲乙丙丁", strict=True)
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": turns}])
    whole, last = (load(chat_format, path, train_on=which).train for which in ("all", "last"))
    decode = chat_format.text.tokenizer.decode
    learned = [decode([i for i in part[0]["labels"].tolist() if i >= 0]) for part in (whole, last)]
    assert learned == ["乙<|endoftext|>丁<|endoftext|>", "丁<|endoftext|>"]
    assert whole.input_ids.tolist() == last.input_ids.tolist()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"columns": ["question"]}, "expected ours=theirs"),
        ({"columns": ["qestion=q"]}, "'qestion' is no column of ours"),
        ({"train_on": "first"}, "expected all or last"),
        ({"system_prompt": "a\udcff"}, "not UTF-8"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(UserError, match=message):
        DataSettings(**settings)


@pytest.fixture
def cached(chat_format, tmp_path, monkeypatch):
    """Load with a cache, whatever the size; ``cached.reads`` counts preparations."""
    monkeypatch.setattr(data_stage, "CACHE_FROM_BYTES", 0)
    reads = []
    prepare = data_stage.prepare
    monkeypatch.setattr(data_stage, "prepare", lambda *a: reads.append(1) or prepare(*a))

    def run(*paths, chat_format=chat_format, **settings):
        return load(chat_format, *paths, **{"data_cache": str(tmp_path / "cache"), **settings})

    run.reads = reads
    return run


def same(a, b):
    return (a.train.digest, a.ledger, a.sample_records) == (
        b.train.digest,
        b.ledger,
        b.sample_records,
    )


def test_the_second_start_takes_the_cache(cached, chat_format, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [*MANY, {"question": "", "answer": ""}])
    settings = {
        "bad_rows": "skip",
        "eval_dataset": ["auto"],
        "overlong": "shorten",
        "max_length": 25,
    }
    first, second = cached(path, **settings), cached(path, **settings)
    assert len(cached.reads) == 1 and same(first, second) and "from the cache" in second.origin
    plain = load(chat_format, path, **settings)
    assert same(plain, second) and plain.held_out.digest == second.held_out.digest
    assert np.array_equal(plain.train.lengths, second.train.lengths)
    assert isinstance(second.train.input_ids.base, np.memmap)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_stale_entry_is_never_served(cached, tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "rows.jsonl", MANY)
    cached(path)
    changes = [
        {"max_length": 100}, {"seed": 1}, {"system_prompt": "x"}, {"train_on": "last"},
        {"overlong": "drop"}, {"bad_rows": "skip"}, {"eval_dataset": ["auto"]},
    ]  # fmt: skip
    for number, change in enumerate(changes, 2):
        cached(path, **change)
        assert len(cached.reads) == number, change
    cached(f"{path}:2")
    other = make_tokenizer(vocab_size=400)
    cached(path, chat_format=chat_format_of(other))
    stat = path.stat()
    path.write_text(path.read_text().replace("答7", "答8"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert len(cached(path).train) == 200 and len(cached.reads) == len(changes) + 4
    monkeypatch.setattr(encoding_cache, "_code_hash", lambda: "newer")
    cached(path)
    assert len(cached.reads) == len(changes) + 5


@pytest.mark.parametrize(
    "name", ["train.input_ids", "train.labels", "train.offsets", "content.json"]
)
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_entry_is_written_anew(cached, tmp_path, name, damage):
    path = write_jsonl(tmp_path / "rows.jsonl", MANY)
    first = cached(path)
    [file] = (tmp_path / "cache").glob(f"*/{name}")
    content = file.read_bytes()
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(content[:-8] if damage == "cut" else bytes([content[0] ^ 1]) + content[1:])
    assert same(cached(path), first) and len(cached.reads) == 2
    assert same(cached(path), first) and len(cached.reads) == 2


def test_a_failed_preparation_leaves_nothing(cached, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [*MANY, {"question": "长" * 400, "answer": "a"}])
    with pytest.raises(UserError, match="longer than --max_length"):
        cached(path)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_file_that_changes_while_it_is_read_is_not_kept(cached, tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "rows.jsonl", MANY)
    stamps = iter([[1], [2]])
    monkeypatch.setattr(data_stage, "stamps", lambda sources: next(stamps))
    with pytest.raises(UserError, match="has changed while it was being read"):
        cached(path)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_a_clear_error(cached, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", MANY)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"--data_cache .*file: cannot be written"):
        cached(path, data_cache=str(tmp_path / "file"))


def test_small_data_leaves_no_cache(chat_format, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", MANY)
    load(chat_format, path, data_cache=str(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()
