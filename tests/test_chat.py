"""Generation and the chat: whole characters, whole turns, clean ends."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from conftest import REPOSITORY, make_model, make_tokenizer

import inference_lora
from tinyllm.chat.options import parse_args, sampling_options
from tinyllm.chat.session import Chat
from tinyllm.chat.speaker import Speaker, Spoken
from tinyllm.chat.turns import Turns
from tinyllm.chat.voices import Voices
from tinyllm.chat_format import chat_format_of
from tinyllm.decode.pick import EngineMaker
from tinyllm.errors import run_program
from tinyllm.generate import Reply, TextStream, fit_history, generate_reply, stop_ids

QUESTION = [{"role": "user", "content": "你好"}]


@pytest.fixture
def parts():
    tokenizer = make_tokenizer()
    return make_model(), tokenizer, chat_format_of(tokenizer)


def test_stream_never_shows_half_a_character(tokenizer):
    text = "好😀龘a，再见！"
    ids = tokenizer(text).input_ids
    assert len(ids) > len(text)
    pieces: list[str] = []
    stream = TextStream(tokenizer, pieces.append)
    for one in ids:
        stream.put(one)
    stream.end()
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)


def test_stream_drops_a_character_cut_off_at_the_end(tokenizer):
    pieces: list[str] = []
    stream = TextStream(tokenizer, pieces.append)
    for one in tokenizer("好😀").input_ids[:-1]:
        stream.put(one)
    stream.end()
    assert "".join(pieces) == "好"


def test_stream_leaves_out_bytes_that_are_no_text(tokenizer):
    pieces: list[str] = []
    stream = TextStream(tokenizer, pieces.append)
    for one in [
        *tokenizer("好").input_ids,
        tokenizer("😀").input_ids[-1],
        *tokenizer("a龘").input_ids,
    ]:
        stream.put(one)
    stream.end()
    assert "".join(pieces) == "好a龘"


def test_greedy_reply_is_what_generate_gives(parts):
    model, tokenizer, chat_format = parts
    shown: list[str] = []
    reply = generate_reply(
        model, tokenizer, chat_format, QUESTION, shown.append, 12, do_sample=False
    )
    prompt = torch.tensor([chat_format.encode_prompt(QUESTION)])
    expected = model.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :]
    assert reply.num_tokens == len(expected)
    text = tokenizer.decode(expected, skip_special_tokens=True).replace("\ufffd", "").strip()
    assert reply.text == text == "".join(shown).strip()


def test_reply_stops_at_the_end_token(parts, monkeypatch):
    model, tokenizer, chat_format = parts
    with torch.no_grad():  # a model that says its end token at once
        model.model.embed_tokens.weight.zero_()
        model.model.embed_tokens.weight[1] = 1.0
        model.model.norm.weight.fill_(1.0)
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.zero_()
            layer.self_attn.o_proj.weight.zero_()
        model.model.embed_tokens.weight[chat_format.encode_prompt(QUESTION)[-1]] = 0.5
    reply = generate_reply(
        model, tokenizer, chat_format, QUESTION, max_new_tokens=9, do_sample=False
    )
    assert reply == Reply("", 1, True)


def test_stop_ids_are_the_trained_end_and_the_bases_own(parts):
    model, _, chat_format = parts
    model.generation_config.eos_token_id = [7, 1]
    assert stop_ids(model, chat_format) == [1, 7]


def test_history_drops_whole_oldest_turns(parts):
    chat_format = parts[2]
    turns = [{"role": "system", "content": "s"}]
    for i in range(6):
        turns += [{"role": "user", "content": f"问{i}"}, {"role": "assistant", "content": f"答{i}"}]
    turns.append({"role": "user", "content": "最后"})
    room = len(chat_format.encode_prompt([turns[0], *turns[-3:]]))
    kept, dropped = fit_history(turns, chat_format, room + 10, 10)
    assert kept == [turns[0], *turns[-3:]] and dropped == 5
    assert fit_history(turns, chat_format, 10_000, 10) == (turns, 0)


def chat_with(monkeypatch, parts, lines, answers, **settings):
    """Run a chat on given lines, with a stand-in for the model's replies."""
    asked, given = [], iter(answers)

    def speak(self, messages, on_text, name):
        asked.append([m["content"] for m in messages])
        answer = next(given)
        interrupted = isinstance(answer, BaseException)
        answer = "一半" if interrupted else answer
        on_text(answer)
        return Spoken(answer, 3, True, interrupted, 9, 0, 0.1, 0.1, "stand-in")

    monkeypatch.setattr(Speaker, "speak", speak)
    source = iter(lines)

    def read(prompt):
        print(prompt, end="")
        try:
            return next(source)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    model, tokenizer, chat_format = parts
    values = {"max_length": 200, "max_new_tokens": 20} | settings
    voices = Voices(model, tokenizer, EngineMaker(model), {}, "base")
    Chat(Speaker(voices, chat_format, **values), Turns("s")).run()
    return asked


def test_chat_remembers_and_leaves(monkeypatch, parts, capsys):
    asked = chat_with(monkeypatch, parts, ["你好", "", "  ", "再说", "quit", "nie"], ["好", "行"])
    assert asked == [["s", "你好"], ["s", "你好", "好", "再说"]]
    assert capsys.readouterr().out.startswith("用户: 助手: 好\n用户: 用户: 用户: 助手: 行\n用户: ")


def test_chat_ends_with_the_input(monkeypatch, parts, capsys):
    chat_with(monkeypatch, parts, ["你好"], ["好"])
    assert capsys.readouterr().out == "用户: 助手: 好\n用户: \n"


def test_interrupting_a_reply_keeps_the_chat(monkeypatch, parts, capsys):
    asked = chat_with(monkeypatch, parts, ["一", "二", "exit"], [KeyboardInterrupt(), "好"])
    assert asked[1] == ["s", "一", "一半", "二"]
    assert "一半 [stopped]" in capsys.readouterr().out


def test_too_long_a_question_is_said_and_forgotten(monkeypatch, parts, capsys):
    asked = chat_with(monkeypatch, parts, ["字" * 500, "你好"], ["好"], max_length=60)
    assert asked == [["s", "你好"]]
    assert "please ask in fewer words" in capsys.readouterr().err


def test_long_chats_forget_the_oldest_turns_aloud(monkeypatch, parts, capsys):
    lines = [f"第{i}个问题有点长，请回答" for i in range(8)]
    asked = chat_with(monkeypatch, parts, lines, ["好" * 5] * 8, max_length=90)
    assert asked[-1][0] == "s" and asked[-1][-1] == lines[-1] and len(asked[-1]) < 16
    assert "forgotten" in capsys.readouterr().err


def run_piped(*words, text):
    return subprocess.run(
        [sys.executable, "inference_lora.py", *map(str, words)], input=text.encode(),
        capture_output=True, cwd=REPOSITORY,
    )  # fmt: skip


@pytest.mark.parametrize("merge", [["--merge_weights"], []])
def test_the_program_works_piped(base_folder, finished_run, merge):
    done = run_piped("--base_model", base_folder, "--lora_model", finished_run, *merge,
                       "--system_prompt", "你是助手。", "--max_length", "200",
                       "--max_new_tokens", "8", text="你好\n再见\nquit\n")  # fmt: skip
    out = done.stdout.decode()
    assert done.returncode == 0, done.stderr
    assert out.count("用户: ") == 3 and out.count("助手: ") == 2
    assert b"deepspeed" not in done.stderr.lower() and b"Traceback" not in done.stderr


def test_the_program_takes_bytes_that_are_no_text(base_folder, finished_run):
    done = subprocess.run(
        [sys.executable, "inference_lora.py", "--base_model", str(base_folder), "--max_new_tokens", "3"],
        input=b"\xff\xfe\xff\n" + "你好\n".encode(), capture_output=True, cwd=REPOSITORY,
    )  # fmt: skip
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--base_model", "nowhere"], "no such base folder"),
        (["--base_model", "{base}", "--lora_model", "nowhere"], "no such adapter folder"),
        (["--base_model", "{base}", "--max_length", "0"], "must be 1 or more"),
    ],
)
def test_mistakes_are_one_line(base_folder, words, message, capsys):
    words = [word.format(base=base_folder) for word in words]
    assert run_program(lambda: inference_lora.main(words)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]


def test_one_prompt_one_answer(base_folder, capsys):
    words = ["--base_model", str(base_folder), "--max_new_tokens", "8"]
    assert inference_lora.main([*words, "--prompt", "你好"]) == 0
    plain = capsys.readouterr().out
    assert inference_lora.main([*words, "--prompt", "你好", "--json", "--engine", "generate"]) == 0
    assert json.loads(capsys.readouterr().out)["answer"] == plain.strip()
    assert run_program(lambda: inference_lora.main([*words, "--prompt", " "])) == 2
    assert run_program(lambda: inference_lora.main([*words, "--prompt", "字" * 999])) == 2
    assert "fewer words" in capsys.readouterr().err


def test_sampling_flags():
    assert sampling_options(parse_args(["--base_model", "x", "--temperature", "0.5"])) == {
        "temperature": 0.5, "do_sample": True,
    }  # fmt: skip
    assert sampling_options(parse_args(["--base_model", "x", "--greedy", "--top_k", "3"])) == {
        "do_sample": False
    }
    with pytest.raises(SystemExit):
        parse_args(["--base_model", "x", "--temprature", "1"])
