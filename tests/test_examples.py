"""Encoding in batches: the same ids as one by one, always an end token, nothing lost silently."""

from __future__ import annotations

import random

import numpy as np
import pytest
from conftest import TEXTS, make_tokenizer
from test_chat_format import CHATML

from tinyllm.chat_format import CHAT_TEMPLATE, IGNORE_INDEX, chat_format_of, with_system_prompt
from tinyllm.encoding import BATCH_CHARACTERS, Encoder, LengthRules, in_batches
from tinyllm.errors import UserError
from tinyllm.examples import Examples, ExampleWriter, encode_records
from tinyllm.records import Record
from tinyllm.shortening import shorten

SPECIAL = ["<|user|>", "<|assistant|>\n", "<|endoftext|>", "<|pad|>"]


@pytest.fixture(scope="module")
def chatml():
    """A tokenizer that brings a template of its own."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


def conversation(rnd: random.Random, num_pairs: int, words: list[str]) -> list[dict]:
    def text():
        return "".join(rnd.choices(words, k=rnd.randint(1, 6))) + rnd.choice(["", "a", "。", "  b"])

    turns = [{"role": "system", "content": text()}] if rnd.random() < 0.3 else []
    for number in range(num_pairs):
        turns.append({"role": "user", "content": text()})
        learned = number == num_pairs - 1 or rnd.random() < 0.7
        turns.append(
            {"role": "assistant", "content": text()} | ({} if learned else {"train": False})
        )
    return turns


def records(number: int, words: list[str], seed: int = 0) -> list[Record]:
    rnd = random.Random(seed)
    return [
        Record(conversation(rnd, rnd.randint(1, 4), words), "f", i) for i in range(1, number + 1)
    ]


@pytest.mark.parametrize("template", [None, CHAT_TEMPLATE, CHATML])
def test_batches_give_exactly_the_ids_of_the_slow_path(tokenizer, chatml, template):
    ours = template != CHATML
    chat_format = chat_format_of(tokenizer if ours else chatml)
    encoder = Encoder(chat_format, "系统", LengthRules(10_000))
    rows = records(1200, TEXTS + SPECIAL * ours)
    outcomes = list(encoder.encode_all(rows))
    assert [record for record, _ in outcomes] == rows
    for record, outcome in outcomes:
        slow = chat_format.encode(with_system_prompt(record.messages, "系统"))
        assert outcome.ids.tolist() == slow.input_ids and outcome.labels.tolist() == slow.labels
        assert outcome.ids.dtype == outcome.labels.dtype == np.int32


def test_batches_with_a_tokenizer_that_begins_texts_with_a_space():
    from tokenizers import decoders, pre_tokenizers

    tokenizer = make_tokenizer()
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="first"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    chat_format = chat_format_of(tokenizer)
    encoder = Encoder(chat_format, "系统", LengthRules(10_000))
    for record, outcome in encoder.encode_all(records(300, TEXTS + SPECIAL)):
        slow = chat_format.encode(with_system_prompt(record.messages, "系统"))
        assert outcome.ids.tolist() == slow.input_ids and outcome.labels.tolist() == slow.labels


def test_the_embedded_tokenizers_settings_do_not_matter(tokenizer):
    chat_format = chat_format_of(tokenizer)
    rows = records(50, TEXTS)
    encoder = Encoder(chat_format, "", LengthRules(10_000))
    before = [outcome.ids.tolist() for _, outcome in encoder.encode_all(rows)]
    tokenizer(TEXTS, padding="max_length", max_length=7, truncation=True, split_special_tokens=True)
    assert [outcome.ids.tolist() for _, outcome in encoder.encode_all(rows)] == before


def test_an_untrained_turn_is_seen_and_not_learned(tokenizer):
    chat_format = chat_format_of(tokenizer)
    row = [{"role": r, "content": "好的"} for r in ("user", "assistant") * 2]
    marked = [row[0], row[1] | {"train": False}, *row[2:]]
    whole, part = chat_format.encode(row), chat_format.encode(marked)
    assert part.input_ids == whole.input_ids
    assert sum(part.supervised) == sum(whole.supervised) / 2 and part.supervised[-1]


def test_batches_are_bounded_in_rows_and_characters():
    short, long = (
        records(2100, ["a"]),
        [Record([{"role": "user", "content": "b" * BATCH_CHARACTERS}], "f", 1)],
    )
    sizes = [len(batch) for batch in in_batches([*short, *long * 3])]
    assert sizes == [1000, 1000, 101, 1, 1]


def overlong(tokenizer, messages, max_length, policy):
    return encode_records(
        [Record(messages, "rows.jsonl", 7)], chat_format_of(tokenizer), "", max_length, policy
    )


LONG = [{"role": r, "content": r[0] + TEXTS[i % 4] * 3}
        for i, r in enumerate(("user", "assistant") * 3)]  # fmt: skip


def test_the_three_policies(tokenizer):
    chat_format = chat_format_of(tokenizer)
    size = len(chat_format.encode(LONG).input_ids)
    with pytest.raises(UserError, match=rf"rows.jsonl:7: the example has {size} tokens"):
        overlong(tokenizer, LONG, size - 1, "error")
    with pytest.raises(UserError, match="no example is left"):
        overlong(tokenizer, LONG, size - 1, "drop")
    examples, count = overlong(tokenizer, LONG, size - 1, "shorten")
    assert count.shortened == ["rows.jsonl:7"] and not count.dropped
    assert examples[0]["input_ids"].tolist() == chat_format.encode(LONG[2:]).input_ids
    assert overlong(tokenizer, LONG, size, "error")[1].shortened == []


@pytest.mark.parametrize("max_length", range(20, 260, 7))
def test_shortening_keeps_the_end_and_fits(tokenizer, max_length):
    chat_format = chat_format_of(tokenizer)
    system = [{"role": "system", "content": "系统"}]
    example = shorten([*system, *LONG], chat_format, max_length)
    answer = chat_format.encode([LONG[-1]])
    shortest = chat_format.encode([*system, LONG[-2] | {"content": "u…"}, LONG[-1]])
    if example is None:
        assert len(shortest.input_ids) > max_length
        return
    learned = [i for i, s in zip(answer.input_ids, answer.supervised, strict=True) if s]
    assert len(example.input_ids) <= max_length and len(example.labels) == len(example.input_ids)
    assert example.labels[-len(learned) :] == learned
    assert (
        example.input_ids[: len(chat_format.encode(system).input_ids)]
        == chat_format.encode(system).input_ids
    )


def test_shortening_takes_as_little_as_possible(tokenizer):
    chat_format = chat_format_of(tokenizer)
    many = [{"role": r, "content": f"{i}"} for i in range(3000) for r in ("user", "assistant")]
    for kept in (1, 2, 5, 100):
        fitting = chat_format.encode(many[-2 * kept :])
        example = shorten(many, chat_format, len(fitting.input_ids))
        assert example.input_ids == fitting.input_ids


def test_shortening_never_leaves_nothing_to_learn(tokenizer):
    messages = [*LONG[:2], LONG[2], LONG[3] | {"train": False}]
    assert shorten(messages, chat_format_of(tokenizer), 150) is None


def test_a_huge_prompt_is_shortened_in_reasonable_time(tokenizer):
    messages = [{"role": "user", "content": "好" * 300_000}, {"role": "assistant", "content": "好"}]
    examples, count = overlong(tokenizer, messages, 64, "shorten")
    assert len(count.shortened) == 1 and 60 <= examples.lengths[0] <= 64


def test_a_template_without_end_token_is_refused(tokenizer):
    endless = make_tokenizer()
    endless.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    with pytest.raises(UserError, match="without an end token"):
        overlong(endless, LONG[:2], 500, "error")


def test_a_template_that_refuses_a_row_names_it(chatml):
    bad = [{"role": "user", "content": "<|im_end|>"}, LONG[1]]
    with pytest.raises(UserError, match=r"rows.jsonl:7: a user turn contains a special token"):
        overlong(chatml, bad, 500, "error")


PARTS = [([5, 6, 7], [IGNORE_INDEX, 6, 7]), ([8, 9], [IGNORE_INDEX, 9])]


def test_examples_in_files_are_those_in_memory(tmp_path):
    memory, writer = Examples.from_lists(PARTS), ExampleWriter(tmp_path, "train")
    for ids, labels in PARTS:
        writer.append(np.array(ids, np.int32), np.array(labels, np.int32))
    mapped = writer.finish()
    assert len(mapped) == 2 and mapped.digest == memory.digest and mapped.num_supervised == 3
    for i in range(2):
        assert mapped[i]["input_ids"].tolist() == memory[i]["input_ids"].tolist() == PARTS[i][0]
        assert mapped[i]["labels"].tolist() == memory[i]["labels"].tolist() == PARTS[i][1]
    assert not mapped.input_ids.flags.writeable and mapped.lengths.tolist() == [3, 2]


def test_copies_lie_behind_each_other():
    writer = ExampleWriter()
    writer.append(np.array([1, 2], np.int32), np.array([IGNORE_INDEX, 2], np.int32), 3)
    examples = writer.finish()
    assert examples.input_ids.tolist() == [1, 2] * 3 and writer.num_supervised == 3
    assert ExampleWriter().finish() is None
