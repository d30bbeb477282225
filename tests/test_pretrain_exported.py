"""Beginning from an exported folder, and averaging with one."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from pretraining import losses_of, run_of, tiny_settings
from transformers import AutoModelForCausalLM

from tinyllm.pretrain import __main__ as program
from tinyllm.pretrain import checkpoint
from tinyllm.pretrain.model_card import model_card
from tinyllm.pretrain.run import add_text
from tinyllm.pretrain.schedule import Progress, rate_factor
from tinyllm.pretrain.settings import Settings
from tinyllm.pretrain.train import prepare, train


@pytest.fixture
def settings(tmp_path):
    return tiny_settings(tmp_path)


@pytest.fixture
def later(settings, tmp_path):
    """A run of three steps with its export, and settings of a decay that starts from that."""
    first = run_of(settings)
    losses_of(first, 3)
    program.export_run(first, {"sources": {}})
    changes = {
        "stage": "decay",
        "decay_steps": 2,
        "start_from": settings.export_to,
        "save_minutes": 0,
    }
    work = {"work": str(tmp_path / "other"), "export_to": str(tmp_path / "later")}
    return first, dataclasses.replace(settings, **changes, **work)


def test_a_decay_starts_from_an_exported_folder_and_counts_on(later):
    first, settings = later
    second = run_of(settings)
    assert second.progress.step == 3 and second.progress.tokens == first.progress.tokens
    assert second.seen == first.seen
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a.bfloat16().float(), b)
    assert second.tokenizer.get_vocab() == first.tokenizer.get_vocab()
    train(second)
    assert second.progress.step == 5 and second.progress.decay_start == 3


def test_an_interrupted_decay_from_an_exported_folder_goes_on(later):
    _, settings = later
    whole = run_of(settings)
    train(whole)
    first = run_of(dataclasses.replace(settings, work=settings.work + "2"))
    prepare(first)
    losses_of(first, 1)
    first.save()
    shutil.rmtree(settings.start_from)  # is needed no more
    second = run_of(first.settings)
    train(second)
    for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert second.start.keys() == whole.start.keys()


def test_checkpoints_of_another_run_are_not_gone_on_with(later):
    first, settings = later
    first.save()
    with pytest.raises(ValueError, match=r"began from random weights, not from .*another folder"):
        run_of(dataclasses.replace(settings, work=first.settings.work))


def test_fresh_optimizers_are_warmed_up():
    settings = Settings(stage="decay", decay_steps=100, warmup_steps=10)
    progress = Progress(step=500, decay_start=500, start=500)
    assert rate_factor(settings, progress) == pytest.approx(0.1)
    progress.step += 20
    assert rate_factor(settings, progress) == pytest.approx(0.8)


def spoil(folder: Path, how: str) -> None:
    """Damage an exported folder."""
    if how == "weights":
        (folder / "model.safetensors").write_bytes(b"x" * 100)
    elif how == "record":
        (folder / "pretraining.json").write_text("[]")
    elif how == "numbers":
        (folder / "pretraining.json").write_text('{"steps": "many"}')
    elif how == "tokenizer":
        (folder / "tokenizer.json").unlink()
    elif how == "heads":
        config = json.loads((folder / "config.json").read_text())
        config.update(num_attention_heads=4, head_dim=8, num_key_value_heads=2)
        (folder / "config.json").write_text(json.dumps(config))
    else:
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("weights", "--start_from: .*cannot be loaded"), ("record", "expected a JSON object"),
        ("numbers", "expected the numbers steps"), ("tokenizer", "tokenizer cannot be loaded"),
        ("heads", "num_attention_heads is 4, the settings ask for 2"), ("all", "--start_from .*: no such folder"),
    ],
)  # fmt: skip
def test_a_folder_that_cannot_be_begun_from_is_refused_and_leaves_nothing(later, how, message):
    _, settings = later
    spoil(Path(settings.start_from), how)
    with pytest.raises(ValueError, match=message):
        run_of(settings)
    assert not Path(settings.work).exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": "full"}, "is for --stage decay"),
        ({"stage": "stable", "start_from": "", "start_share": 0.5}, "begins with --start_from"),
        ({"start_share": 1.0}, "expected 0 to less than 1"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes, message):
    settings = {"stage": "decay", "decay_steps": 2, "start_from": "start"}
    with pytest.raises(ValueError, match=message):
        Settings(**{**settings, **changes})


def test_another_tokenizer_is_refused(later):
    _, settings = later
    path = Path(settings.own_text) / "stories.txt"
    path.write_text(path.read_text(encoding="utf-8").replace("苹果", "香蕉"), encoding="utf-8")
    other = dataclasses.replace(settings, stage="full", start_from="")
    run_of(other)
    with pytest.raises(ValueError, match=r"its tokenizer is not that of .*give --work another"):
        run_of(settings)
    with pytest.raises(ValueError, match="more than the vocab_size of 300"):
        run_of(dataclasses.replace(other, vocab_size=300))


@pytest.mark.parametrize("share", [0.5, 0.25])
def test_the_exported_weights_can_have_a_share_of_the_first_ones(later, share):
    _, settings = later
    settings.start_share = share
    run = run_of(settings)
    train(run)
    program.export_run(run, {"sources": {}})
    before, mixed = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in (settings.start_from, settings.export_to)
    )
    for (name, a), b, c in zip(
        run.model.named_parameters(), before.parameters(), mixed.parameters(), strict=True
    ):
        assert torch.equal(((1 - share) * a + share * b).bfloat16().float(), c), name
    assert (
        f"and {share:.0%} of those it began from"
        in (Path(settings.export_to) / "README.md").read_text()
    )
    again = run_of(dataclasses.replace(settings, stage="export", start_from=""))
    again.restore(checkpoint.last(run.folder))
    program.export_run(again, {"sources": {}})
    after = AutoModelForCausalLM.from_pretrained(settings.export_to, dtype=torch.float32)
    for a, b in zip(mixed.parameters(), after.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_cannot_be_exported_is_refused_before_the_training(later):
    first, settings = later
    first.save()
    again = run_of(dataclasses.replace(first.settings, stage="decay", decay_steps=2))
    again.settings.start_share = 0.5
    with pytest.raises(ValueError, match="did not begin with --start_from"):
        train(again)
    with pytest.raises(ValueError, match="would be overwritten"):
        train(run_of(dataclasses.replace(settings, export_to=settings.start_from + "/")))


def test_a_folder_is_the_same_by_any_of_its_names(later):
    _, settings = later
    run = run_of(settings)
    run.save()
    again = run_of(dataclasses.replace(settings, start_from=settings.start_from + "/"))
    prepare(again)
    assert again.started_from == settings.start_from


def test_an_older_record_says_nothing_of_texts(later):
    _, settings = later
    path = Path(settings.start_from) / "pretraining.json"
    record = json.loads(path.read_text())
    del record["own_texts"]
    path.write_text(json.dumps(record))
    assert run_of(settings).own_texts[0].startswith("what ")


def test_a_folder_of_our_name_elsewhere_is_not_ours(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert add_text([], "data/pretrain") == [str(tmp_path / "data/pretrain")]


def test_the_card_follows_the_texts_and_the_start_over_runs(later):
    _, settings = later
    card = (Path(settings.start_from) / "README.md").read_text(encoding="utf-8")
    assert "those of their authors" in card and "under Apache-2.0" not in card
    run = run_of(settings)
    assert run.own_texts == [settings.own_text]
    assert add_text(run.own_texts, "data/pretrain/")[1:] == ["data/pretrain"]
    facts = program.facts_of(run, {"sources": {}}, run.model)
    assert f"further from the weights that were in `{settings.start_from}`" in model_card(facts)
    ours = model_card({**facts, "own_texts": ["data/pretrain"], "started_from": ""})
    assert (
        "`data/pretrain/`) | Apache-2.0" in ours
        and "The weights are ours, under Apache-2.0." in ours
    )
    assert "trained from random weights" in ours


def test_weights_without_a_record_are_not_called_ours(later):
    _, settings = later
    (Path(settings.start_from) / "pretraining.json").unlink()
    run = run_of(settings)
    assert run.progress.step == 0 and run.own_texts[0].startswith("what ")


def test_text_that_cannot_be_read_is_named(settings):
    path = Path(settings.own_text) / "more.txt"
    path.write_bytes("你好".encode("gbk"))
    with pytest.raises(ValueError, match=r"more\.txt: not UTF-8"):
        run_of(settings)
    path.rename(path.with_name("patterns_x.txt"))
    with pytest.raises(ValueError, match=r"patterns_x\.txt: not UTF-8"):
        run_of(settings)
    settings.own_text = str(path.parent / "nothing")
    with pytest.raises(ValueError, match=r"nothing: no such folder, or no \*\.txt in it"):
        run_of(settings)
