"""The chat's commands, on tiny models, in one process."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tinyllm.chat import start
from tinyllm.chat.options import adapters_of, parse_args
from tinyllm.chat.session import Chat
from tinyllm.chat.speaker import Spoken
from tinyllm.chat.terminal import CONTROLS
from tinyllm.chat.voices import load_voices
from tinyllm.errors import UserError


@pytest.fixture(scope="module")
def adapters(base_folder, tmp_path_factory):
    """Two adapters of the tiny base that answer differently."""
    from tinyllm.base import load_base

    folders = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model, _ = load_base(base_folder)
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))  # fmt: skip
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    weight.normal_(std=0.5)
        folder = tmp_path_factory.mktemp("adapters") / f"a{seed}"
        model.save_pretrained(folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = str(base_folder)
        (folder / "adapter_config.json").write_text(json.dumps(config))
        folders.append(folder)
    return folders


def chat_of(*words) -> Chat:
    args = parse_args([*map(str, words), "--max_length", "200", "--max_new_tokens", "10"])
    return Chat(start.build(args), start.turns(args), args.compare, args.stats, args.json)


@pytest.fixture
def chat(base_folder, adapters):
    one, two = adapters
    return chat_of("--base_model", base_folder, "--lora_model", f"one={one}", "--lora_model", two)


def talk(chat, monkeypatch, capsys, *lines: str) -> tuple[str, str]:
    source = iter(lines)

    def read(prompt):
        print(prompt, end="")
        try:
            return next(source)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    capsys.readouterr()
    chat.run()
    out = capsys.readouterr()
    return out.out, out.err


def answer(chat, question: str, name: str | None) -> str:
    messages, _ = chat.speaker.fit(chat.turns.messages(question))
    return chat.speaker.speak(messages, lambda text: None, name).text.translate(CONTROLS)


def test_adapters_are_switched_without_loading(chat, base_folder, adapters, monkeypatch, capsys):
    expected = {}
    for name, folder in (("one", adapters[0]), ("a2", adapters[1]), ("off", None)):
        more = ["--lora_model", folder] if folder else []
        alone = chat_of("--base_model", base_folder, *more, "--engine", "generate")
        expected[name] = answer(alone, "你好", alone.voices.current)
    assert len(set(expected.values())) == 3
    for folder in adapters:
        assert folder.is_dir()
    out, err = talk(chat, monkeypatch, capsys, "你好", "/reset", "/adapter a2", "你好", "/reset",
                    "/adapter off", "你好", "/adapter nobody", "/adapter")  # fmt: skip
    said = [line.split("助手: ", 1)[1] for line in out.splitlines() if "助手: " in line]
    assert said == [expected["one"], expected["a2"], expected["off"]]
    assert "no adapter 'nobody'; there is one, a2, off" in err and "the base alone" in out


def test_an_adapter_folder_may_vanish_and_more_may_come(
    base_folder, adapters, tmp_path, monkeypatch, capsys
):
    copy = tmp_path / "copy"
    shutil.copytree(adapters[0], copy)
    chat = chat_of("--base_model", base_folder, "--lora_model", copy)
    before = answer(chat, "你好", "copy")
    shutil.rmtree(copy)
    out, err = talk(chat, monkeypatch, capsys, "你好", f"/adapter new={adapters[1]}", "/adapter copy",
                    f"/adapter gone={copy}", "/reset", "你好")  # fmt: skip
    assert out.count(f"助手: {before}\n") == 2 and "no such adapter folder" in err
    assert "answering: new" in out and "Traceback" not in err


def test_the_base_that_a_run_names_is_used(adapters, tmp_path):
    chat = chat_of("--lora_model", adapters[0])
    assert chat.voices.current == "a1"
    with pytest.raises(UserError, match="give --base_model"):
        chat_of("--lora_model", tmp_path)


def test_compare_shows_base_and_adapter(chat, monkeypatch, capsys):
    base, tuned = answer(chat, "你好", None), answer(chat, "你好", "one")
    out, _ = talk(chat, monkeypatch, capsys, "/compare 你好", "/compare", "/compare")
    assert f"base 助手: {base}" in out and f"one 助手: {tuned}" in out and base != tuned
    assert chat.turns.turns[-1]["content"] == tuned and out.count("comparing with the base") == 2


def test_an_adapter_may_come_to_a_base_alone(base_folder, adapters, tmp_path, monkeypatch, capsys):
    from safetensors.torch import load_file, save_file

    for engine in ("auto", "generate"):
        chat = chat_of("--base_model", base_folder, "--engine", engine)
        base = answer(chat, "你好", None)
        talk(chat, monkeypatch, capsys, f"/adapter one={adapters[0]}")
        assert chat.voices.current == "one" and answer(chat, "你好", "one") != base
        assert answer(chat, "你好", None) == base
    broken = tmp_path / "broken"
    shutil.copytree(adapters[1], broken)
    weights = load_file(broken / "adapter_model.safetensors")
    weights.popitem()
    save_file(weights, broken / "adapter_model.safetensors")
    _, err = talk(
        chat, monkeypatch, capsys, f"/adapter broken={broken}", f"/adapter two={adapters[1]}"
    )
    assert "tensors are missing" in err and chat.voices.names == ["one", "two"]
    assert answer(chat, "你好", None) == base


def test_compare_without_adapter_says_so(base_folder, monkeypatch, capsys):
    _, err = talk(chat_of("--base_model", base_folder), monkeypatch, capsys, "/compare")
    assert "no adapter to compare" in err


def test_merged_in_place_has_no_base(base_folder, adapters, monkeypatch, capsys):
    chat = chat_of("--base_model", base_folder, "--lora_model", adapters[0], "--merge_weights",
                   "--engine", "generate")  # fmt: skip
    unmerged = chat_of("--base_model", base_folder, "--lora_model", adapters[0])
    assert answer(chat, "你好", "a1") == answer(unmerged, "你好", "a1")
    _, err = talk(chat, monkeypatch, capsys, "/adapter off")
    assert "leave out --merge_weights" in err


def test_undo_retry_reset_and_system(chat, monkeypatch, capsys):
    first = answer(chat, "你好", "one")
    out, err = talk(chat, monkeypatch, capsys, "/undo", "/retry", "你好", "/retry", "/undo", "/system",
                    "/system 你是诗人。", "/system")  # fmt: skip
    assert err.count("nothing has been asked yet") == 2
    assert out.count(f"助手: {first}\n") == 2 and "taken back: 你好" in out
    assert chat.turns.turns == [] and chat.turns.system == "你是诗人。"


def test_params_change_what_is_generated(chat, monkeypatch, capsys):
    out, err = talk(chat, monkeypatch, capsys, "/params temperature=0.5 top_k=7 max_new_tokens=4 seed=3",
                    "/params temperature=0", "/params bogus=1", "/params top_k=many", "/params greedy")  # fmt: skip
    assert "temperature 0.5" in out and "top_k 7" in out and "engine          fast" in out
    assert "must be over 0" in err and "bogus" in err and "'many'" in err
    assert chat.speaker.max_new_tokens == 4 and chat.speaker.sampling == {"do_sample": False}


def test_a_seed_makes_sampling_reproducible(base_folder, monkeypatch, capsys):
    words = ["--base_model", base_folder, "--temperature", "2", "--seed", "11"]
    outs = [talk(chat_of(*words), monkeypatch, capsys, "你好", "再说")[0] for _ in range(2)]
    other = talk(chat_of(*words[:-1], "12"), monkeypatch, capsys, "你好", "再说")[0]
    assert outs[0] == outs[1] != other


def test_save_and_load(chat, monkeypatch, capsys, tmp_path):
    file = tmp_path / "chat.jsonl"
    out, err = talk(chat, monkeypatch, capsys, "/save", f"/save {file}", "你好", f"/save {file}",
                    f"/save {file}", "/reset", f"/load {file}")  # fmt: skip
    assert "needs a file name" in err and "nothing to save" in err and "choose another name" in err
    assert "going on with 1 question(s)" in out and len(chat.turns.turns) == 2
    row = json.loads(file.read_text(encoding="utf-8"))
    assert [m["role"] for m in row["messages"]] == ["system", "user", "assistant"]
    file.write_text('{"messages": [{"role": "assistant", "content": "x"}]}\n')
    before = list(chat.turns.turns)
    _, err = talk(chat, monkeypatch, capsys, f"/load {file}", f"/load {tmp_path}/none")
    assert "do not take turns" in err and "No such file" in err and chat.turns.turns == before


def test_unknown_commands_and_slashes(chat, monkeypatch, capsys):
    out, err = talk(
        chat, monkeypatch, capsys, "/halp", "//etc/passwd 是什么", "/help", "/quit", "no"
    )
    assert "did you mean /help?" in err and "/params [NAME=VALUE ...]" in out
    assert chat.turns.turns[0]["content"] == "/etc/passwd 是什么" and len(chat.turns.turns) == 2


def test_special_tokens_that_are_typed_stay_text(chat):
    ids = chat.speaker.chat_format.encode_prompt(chat.turns.messages("<|endoftext|><|user|>"))
    assert chat.voices.tokenizer.eos_token_id not in ids


def test_json_lines(base_folder, monkeypatch, capsys):
    chat = chat_of("--base_model", base_folder, "--json")
    out, _ = talk(chat, monkeypatch, capsys, "你好", "再见")
    rows = [json.loads(line) for line in out.splitlines() if line]
    assert [row["question"] for row in rows] == ["你好", "再见"]
    assert all(row["adapter"] is None and row["num_tokens"] > 0 for row in rows)


def test_stats_are_shown_on_request(chat, monkeypatch, capsys):
    _, err = talk(chat, monkeypatch, capsys, "你好", "/stats", "再说")
    assert err.count("engine") == 1 and "known from before" in err and "engine fast" in err
    spoken = Spoken("", 0, False, False, 3, 0, 0.0, 0.0, "fast")
    assert spoken.stats().startswith("0 tokens, first after")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give --base_model"),
        (["--base_model", "x", "--temperature", "0"], "temperature 0.0: must be over 0"),
        (["--base_model", "x", "--top_p", "1.5"], "top_p 1.5"),
        (["--base_model", "x", "--max_new_tokens", "0"], "max_new_tokens 0"),
        (["--base_model", "x", "--input", "q"], "needs --output"),
        (["--base_model", "x", "--output", "q"], "needs --input"),
        (["--base_model", "x", "--prompt", "a", "--web"], "exclude each other"),
    ],
)
def test_flags_that_make_no_sense(words, message):
    with pytest.raises(UserError, match=message):
        parse_args(words)


def test_adapter_names(tmp_path):
    odd = tmp_path / "a=b"
    odd.mkdir()
    assert adapters_of(["poem=x/y", str(odd)]) == {"poem": "x/y", "a=b": str(odd)}
    with pytest.raises(UserError, match="second adapter 'y'"):
        adapters_of(["x/y", "z/y"])
    with pytest.raises(UserError, match="NAME=PATH"):
        adapters_of(["off=x"])


def test_an_adapter_of_another_base_is_refused(adapters, tmp_path):
    from conftest import make_model, make_tokenizer

    make_model(hidden_size=64).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    with pytest.raises(UserError):
        load_voices(
            parse_args(["--base_model", str(tmp_path / "base"), "--lora_model", str(adapters[0])])
        )
