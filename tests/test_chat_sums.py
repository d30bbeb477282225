"""Weighted sums of the chat's adapters, and unloading: the base is loaded once, the words are right."""

from __future__ import annotations

import pytest
import test_chat_commands
import torch
from test_chat_commands import answer, chat_of, talk

from load_lora_model import load_lora_model_without_merge
from tinyllm.chat.options import read_sum

adapters, chat = test_chat_commands.adapters, test_chat_commands.chat  # the same fixtures

IDS = torch.arange(5, 45)[None]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def by_hand(base_folder, folders, weights) -> torch.Tensor:
    """Logits of the base with the adapters' weighted updates in its weights."""
    loaded = [load_lora_model_without_merge(str(base_folder), str(f), "cpu")[0] for f in folders]
    plain = loaded[0].get_base_model()
    for name, layer in plain.named_modules():
        if hasattr(layer, "get_delta_weight"):
            parts = [dict(m.get_base_model().named_modules())[name] for m in loaded]
            deltas = [p.get_delta_weight("default") for p in parts]
            for delta, weight in zip(deltas, weights, strict=True):
                layer.base_layer.weight.data += weight * delta.detach()
    with loaded[0].disable_adapter():
        return logits(loaded[0])


def test_a_sum_is_the_sum_of_the_updates(chat, base_folder, adapters):
    loaded_base = chat.voices.maker.plain
    name = chat.voices.combine({"one": 0.7, "a2": -0.3})
    assert name == chat.voices.combine({"one": 0.7, "a2": -0.3}) == "0.7*one-0.3*a2"  # made once
    assert chat.voices.combine({"one": 0.7, "a2": -0.3}, "svd") == "0.7*one-0.3*a2:svd"
    chat.voices.model.set_adapter(chat.voices.adapters[name])
    expected = by_hand(base_folder, adapters, (0.7, -0.3))
    torch.testing.assert_close(logits(chat.voices.model), expected, atol=1e-4, rtol=1e-4)
    assert chat.voices.maker.plain is loaded_base and chat.voices.names[:2] == ["one", "a2"]


def test_the_fast_engine_takes_a_sum_up(chat, base_folder, adapters, monkeypatch, capsys):
    out, err = talk(chat, monkeypatch, capsys, "你好", "/adapter one=0.7 a2=0.3", "/reset", "你好",
                    "/adapter one", "/reset", "你好", "/unload 0.7*one+0.3*a2", "/adapter")  # fmt: skip
    assert err == "" and "answering: 0.7*one+0.3*a2" in out and "there is one, a2, off" in out
    said = [line.split("助手: ", 1)[1] for line in out.splitlines() if "助手: " in line]
    plain = chat_of("--base_model", base_folder, "--engine", "generate",
                    *(w for n, f in zip(("one", "a2"), adapters, strict=True) for w in ("--lora_model", f"{n}={f}")))  # fmt: skip
    name = plain.voices.combine({"one": 0.7, "a2": 0.3})
    assert said == [answer(plain, "你好", "one"), answer(plain, "你好", name), answer(plain, "你好", "one")]  # fmt: skip
    assert said[0] != said[1] and chat.speaker.engine("one", chat.speaker.config(1)).name == "fast"


def test_unloading_leaves_the_others_and_the_base_as_they_were(
    chat,
    base_folder,
    adapters,
    monkeypatch,
    capsys,
):
    before = {name: answer(chat, "你好", name) for name in ("one", "a2", None)}
    out, err = talk(chat, monkeypatch, capsys, "/unload one", "/adapter a2", "/unload one", "/unload one",
                    "/unload", f"/adapter three={adapters[0]}", f"/adapter four={adapters[1]}",
                    "/unload three", f"/adapter five={adapters[0]}")  # fmt: skip
    assert "'one' answers now; /adapter NAME or /adapter off first" in err
    assert "no adapter 'one'; there is a2, off" in err and "needs an adapter's name" in err
    assert "unloaded: one; there is a2, off" in out and chat.voices.names == ["a2", "four", "five"]
    assert answer(chat, "你好", "a2") == answer(chat, "你好", "four") == before["a2"]
    assert (
        answer(chat, "你好", "five") == before["one"] and answer(chat, "你好", None) == before[None]
    )


def test_a_sum_of_an_adapter_that_is_gone_is_not_taken_for_another(
    chat, adapters, monkeypatch, capsys
):
    once = chat.voices.combine({"one": 1.0, "a2": 0.5})
    talk(chat, monkeypatch, capsys, "/adapter a2", "/unload one", f"/adapter one={adapters[1]}")
    _, err = talk(chat, monkeypatch, capsys, "/adapter one=1 a2=0.5")
    assert f"made of an adapter that is gone; /unload {once} first" in err
    _, err = talk(chat, monkeypatch, capsys, f"/unload {once}", "/adapter one=1 a2=0.5")
    assert err == "" and chat.voices.current == once


@pytest.mark.parametrize("engine", ["auto", "generate"])
def test_the_last_adapter_may_go_and_another_come(
    base_folder,
    adapters,
    engine,
    monkeypatch,
    capsys,
):
    chat = chat_of("--base_model", base_folder, "--lora_model", adapters[0], "--engine", engine)
    before, base = answer(chat, "你好", "a1"), answer(chat, "你好", None)
    out, err = talk(chat, monkeypatch, capsys, "/adapter off", "/unload a1")
    assert err == "" and "there is off" in out and answer(chat, "你好", None) == base
    assert not hasattr(chat.voices.model, "peft_config")
    talk(chat, monkeypatch, capsys, f"/adapter b={adapters[1]}", f"/adapter c={adapters[0]}")
    assert answer(chat, "你好", "c") == before and answer(chat, "你好", None) == base
    assert len({before, base, answer(chat, "你好", "b")}) == 3


REFUSED = {
    "/adapter one=0.7 nobody=0.3": "no adapter 'nobody' to combine; there is one, a2",
    "/adapter one=0.7 a2=much": "a2=much: the weight must be a number",
    "/adapter one=much": "one=much: the weight must be a number",
    "/adapter one=nan a2=1": "one=nan: the weight must be a finite number",
    "/adapter one=0 a2=0": "every weight is 0",
    "/adapter one=1 one=2": "one comes twice",
    "/adapter one=1 a2=1 ties": "no combination 'ties'",
}


def test_what_makes_no_sum_is_refused_in_one_line(chat, monkeypatch, capsys):
    held = list(chat.voices.model.peft_config)
    _, err = talk(chat, monkeypatch, capsys, *REFUSED)
    said = err.strip().splitlines()
    assert len(said) == len(REFUSED), err
    for line, words in zip(said, REFUSED.values(), strict=True):
        assert words in line
    assert chat.voices.current == "one" and list(chat.voices.model.peft_config) == held


def test_a_merged_adapter_cannot_be_combined_nor_unloaded(
    base_folder,
    adapters,
    monkeypatch,
    capsys,
):
    chat = chat_of("--base_model", base_folder, "--lora_model", f"one={adapters[0]}",
                   "--merge_weights", "--engine", "generate")  # fmt: skip
    _, err = talk(chat, monkeypatch, capsys, "/adapter one=0.5", "/unload one")
    assert err.count("leave out --merge_weights") == 2


def test_words_that_are_a_path_stay_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in ("new=some/path", "new=path", "one=some/path", "one", "off", "", "two words"):
        assert read_sum(words, ["one"]) is None
    assert read_sum("new=" + "x" * 300, ["one"]) is None
    assert read_sum("one=5", ["one"]) == ({"one": 5.0}, "cat")
    (tmp_path / "5").mkdir()
    assert read_sum("one=5", ["one"]) is None
    (tmp_path / "a b=c").mkdir()
    assert read_sum("new=a b=c", ["one"]) is None
