"""The ledger of a deliberately dirty file, as a table, in the run folder, and before training."""

from __future__ import annotations

import json

import pytest
from conftest import ROWS, train_arguments, write_jsonl

import sft_lora
from tinyllm.chat_format import chat_format_of
from tinyllm.data import describe, load_data
from tinyllm.ledger import Ledger
from tinyllm.preview import COLOUR, marks_for, preview
from tinyllm.settings import DataSettings

DIRTY = [
    *ROWS,
    ROWS[0] | {"source": "web"},
    {"question": ROWS[0]["question"], "answer": "另一个答案"},
    {"question": "", "answer": "答"},
    {"question": "问", "answer": None},
    {"question": "很" * 200, "answer": "答"},
    {"question": "问", "answer": "很" * 200},
    {"messages": [{"role": "assistant", "content": "a"}]},
]


@pytest.fixture(scope="module")
def dirty(tmp_path_factory):
    """A folder with a dirty file, a held-out file that overlaps, and a file that is no data."""
    folder = tmp_path_factory.mktemp("dirty")
    path = write_jsonl(folder / "train" / "dirty.jsonl", DIRTY)
    path.write_text(path.read_text(encoding="utf-8") + "no json\n", encoding="utf-8")
    (folder / "train" / "notes.txt").write_text("x")
    write_jsonl(folder / "eval" / "held.jsonl", [ROWS[1], {"question": "新", "answer": "的"}])
    return folder


@pytest.fixture(scope="module")
def data(dirty, tokenizer):
    settings = DataSettings(
        [str(dirty / "train")], bad_rows="skip", overlong="shorten", data_cache="none"
    )
    return load_data(settings, chat_format_of(tokenizer), 128, 0)


def test_every_row_is_accounted_for(data):
    train, held_out = data.ledger.files
    assert train.num_read == len(DIRTY) + 1
    assert train.num_read == train.num_kept + len(train.refused) + len(train.dropped)
    assert [line for line, _ in train.refused] == [9, 10, 13, 14]
    assert [line for line, _ in train.shortened] == [11]
    assert [line for line, _ in train.dropped] == [12]
    assert (train.num_kept, train.num_duplicates, train.unused_columns) == (9, 1, ["source"])
    assert (held_out.part, held_out.num_held_out, held_out.num_examples) == ("held-out", 2, 0)
    assert data.ledger.duplicates.first == [f"{train.file}:7 repeats {train.file}:1"]
    assert data.ledger.conflicts.number == 1
    assert data.ledger.overlap.first == [f"{held_out.file}:1"]


def test_sizes_are_those_of_the_examples(data):
    sizes, lengths = data.ledger.train, sorted(data.train.lengths.tolist())
    assert sizes.num_examples == len(lengths) == 9
    assert (sizes.length_median, sizes.length_p95, sizes.length_max) == (
        lengths[4],
        lengths[-1],
        lengths[-1],
    )
    assert sizes.num_tokens == sum(lengths) and sizes.num_supervised == data.train.num_supervised
    assert data.summary["num_held_out"] == len(data.held_out) == 2


def test_the_table_says_it_all_on_a_screen(data):
    table = describe(data)
    lines = table.splitlines()
    assert len(lines) < 20
    assert lines[0].split() == [
        "file",
        "read",
        "kept",
        "refused",
        "dropped",
        "shortened",
        "duplicates",
        "held",
        "out",
    ]
    assert lines[1].split()[1:] == ["14", "9", "4", "1", "1", "1", "0"]
    for words in (
        "refused 1 x: the user turn is empty (first", "every refused row: data_report.json",
        "train: 9 examples", "held-out: 2 examples", "1 row repeats an earlier one",
        "1 question has several different answers", "warning: 1 held-out row asks", "columns not used: source",
        "notes.txt",
    ):  # fmt: skip
        assert words in table


def test_many_files_stay_a_short_table(tokenizer, tmp_path):
    for number in range(30):
        write_jsonl(
            tmp_path / ("x" * 60) / f"{number}.jsonl",
            [{"question": f"问{number}", "answer": "答", "id": 1}],
        )
    settings = DataSettings([str(tmp_path / ("x" * 60))], eval_dataset=["none"], data_cache="none")
    lines = describe(load_data(settings, chat_format_of(tokenizer), 128, 0)).splitlines()
    assert len(lines) < 30 and max(map(len, lines)) < 140
    assert lines[20].split() == ["11", "more", "files", "11", "11", "0", "0", "0", "0", "0"]
    assert lines[21].split() == ["all", "30", "30", "0", "0", "0", "0", "0"]


def test_the_ledger_survives_json(data):
    assert Ledger.from_json(json.loads(json.dumps(data.ledger.to_json()))) == data.ledger


def test_the_report_is_in_the_run_folder(dirty, base_folder, tmp_path):
    words = train_arguments(
        base_folder, dirty / "train", tmp_path / "run", "--bad_rows", "skip", "--overlong", "shorten",
        "--max_length", "128", "--max_steps", "1",
    )  # fmt: skip
    assert sft_lora.main(words) == 0
    report = json.loads((tmp_path / "run" / "data_report.json").read_text(encoding="utf-8"))
    [train, _] = report["files"]
    assert train["refused"][0] == {"line": 9, "reason": "the user turn is empty"}
    assert train["num_refused"] == 4 and train["num_kept"] == 9
    assert train["dropped"][0]["line"] == 12 and train["dropped"][0]["num_tokens"] > 128
    run = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert run["data"]["num_rows_refused"] == 4 and run["data"]["num_held_out_also_trained"] == 1


def test_preview_shows_what_is_learned_and_trains_nothing(base_folder, data_file, tmp_path, capsys):
    words = train_arguments(
        base_folder, data_file, tmp_path / "run", "--preview", "2", "--eval_dataset", "none"
    )
    assert sft_lora.main(words) == 0
    shown = capsys.readouterr()
    assert shown.out.count("--- example") == 2 and "data:" in shown.err
    assert (
        "<|user|>\n你好\n<|assistant|>\n【你好！我是由李小贱开发的个人助手。<|endoftext|>】\n"
        in shown.out
    )
    assert not (tmp_path / "run").exists()


def test_preview_marks_every_learned_turn(tokenizer, tmp_path):
    turns = [
        {"role": r, "content": c}
        for r, c in zip(("user", "assistant") * 3, "甲乙丙丁戊己", strict=True)
    ]
    turns[3]["train"] = False
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": turns}])
    settings = DataSettings([str(path)], eval_dataset=["none"], system_prompt="", data_cache="none")
    examples = load_data(settings, chat_format_of(tokenizer), 256, 0).train
    text = preview(examples, tokenizer, 5, ("[", "]"))
    assert (
        "[乙<|endoftext|>]" in text
        and "[己<|endoftext|>]" in text
        and "\n丁<|endoftext|>\n" in text
    )
    assert text.replace("[", "").replace("]", "").count("<|endoftext|>") == 3


def test_preview_cannot_drive_the_terminal(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"question": "a\x1b[2Jb\x07", "answer": "c"}])
    settings = DataSettings([str(path)], eval_dataset=["none"], data_cache="none")
    examples = load_data(settings, chat_format_of(tokenizer), 256, 0).train
    text = preview(examples, tokenizer, 1, ("[", "]"))
    assert "a\\x1b[2Jb\\x07" in text and "\x1b" not in text


def test_colour_only_on_a_terminal_that_wants_it(monkeypatch):
    class Terminal:
        def isatty(self):
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert marks_for(Terminal()) == COLOUR
    monkeypatch.setenv("NO_COLOR", "1")
    assert marks_for(Terminal()) != COLOUR
