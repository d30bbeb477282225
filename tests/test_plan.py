"""The plan before the first step, and what watches the training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import train_arguments
from safetensors.torch import load_file

import sft_lora
from tinyllm import sft
from tinyllm.command_line import parse_settings
from tinyllm.errors import UserError
from tinyllm.plan import FLOAT32, LOGIT_COPIES, make_plan
from tinyllm.progress import evaluations_without_gain


@pytest.fixture
def ready(base_folder, data_file, tmp_path):
    """A trainer that has not started, with its settings and data."""

    def make(*words: str):
        arguments = train_arguments(base_folder, data_file, tmp_path / "run", *words)
        settings, _ = parse_settings(arguments)
        model, tokenizer, chat_format = sft.load_model(settings)
        data, max_length = sft.load_examples(settings, model, chat_format)
        model = sft.prepare_model(settings, model)
        return settings, sft.build_trainer(settings, model, tokenizer, data, max_length), data

    return make


def test_the_plan_counts_what_the_run_does(finished_run, base_folder, data_file):
    run = json.loads((finished_run / "run.json").read_text())
    plan, state = (
        run["results"]["plan"],
        json.loads((finished_run / "trainer_state.json").read_text()),
    )
    assert plan["steps"] == state["global_step"] == state["max_steps"] == 6
    assert plan["epochs"] == state["epoch"] == 2
    assert plan["examples"] == run["data"]["num_examples"] and plan["batch"] == 2
    assert plan["tokens_per_epoch"] == run["data"]["num_tokens"]
    assert plan["supervised_per_epoch"] == run["data"]["num_supervised"]
    assert plan["evaluations"] == sum("eval_loss" in e for e in state["log_history"]) + 1
    trained = load_file(finished_run / "adapter_model.safetensors")
    assert plan["trainable"] == sum(t.numel() for t in trained.values())
    assert plan["seconds"] > 0 and plan["memory"]["total"] > 0


@pytest.mark.parametrize(
    ("words", "steps", "epochs"),
    [(["--max_steps", "4"], 4, 4 / 3), (["--num_train_epochs", "1"], 3, 1),
     (["--num_train_epochs", "1.5"], 5, 5 / 3),
     (["--per_device_train_batch_size", "4"], 4, 2)],
)  # fmt: skip
def test_steps_are_those_of_the_trainer(ready, words, steps, epochs):
    settings, trainer, data = ready(*words)
    plan = make_plan(settings, trainer, data)
    assert (plan.steps, plan.epochs) == (steps, pytest.approx(epochs))
    trainer.train()
    assert trainer.state.max_steps == steps


def test_planning_changes_nothing(ready):
    settings, trainer, data = ready()
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    torch.manual_seed(7)
    state = torch.get_rng_state()
    make_plan(settings, trainer, data)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], p) for name, p in trainer.model.named_parameters())
    assert all(p.grad is None for p in trainer.model.parameters())


def test_logits_are_chunked_or_whole(ready):
    _, chunked, data = ready()
    settings, whole, _ = ready("--chunked_loss", "False")
    small, large = (make_plan(settings, t, data).memory.logits for t in (chunked, whole))
    assert chunked.chunked_loss and not whole.chunked_loss
    learned, vocabulary = data.train.num_supervised, 480
    assert 0 < large <= LOGIT_COPIES * FLOAT32 * learned * vocabulary
    assert small != large


def test_saved_bytes_do_not_depend_on_the_loss_path(ready):
    """The logits have their own line, so the activations must not hold them as well."""
    modules = ("--fused_layers", "False")
    settings, chunked, data = ready(*modules)
    _, whole, _ = ready("--chunked_loss", "False", *modules)
    first, second = (make_plan(settings, t, data).memory.activations for t in (chunked, whole))
    assert first == pytest.approx(second, rel=0.1)
    # compiled, the last layer keeps nothing of what is not learned, where the loss asks for the rest alone
    settings, fewer, data = ready()
    assert make_plan(settings, fewer, data).memory.activations < 1.1 * second


def test_dry_run_leaves_nothing(base_folder, data_file, tmp_path, capsys):
    folder = tmp_path / "new" / "run"
    words = train_arguments(base_folder, data_file, folder, "--dry_run", "True")
    assert sft_lora.main(words) == 0
    said = capsys.readouterr().err
    for part in ("plan: 6 steps of 2 examples", "supervised", "logits", "time", str(folder)):
        assert part in said
    assert not (tmp_path / "new").exists()


def test_dry_run_beside_a_finished_run(base_folder, data_file, finished_run):
    before = {p: p.stat().st_mtime_ns for p in finished_run.rglob("*")}
    words = train_arguments(base_folder, data_file, finished_run, "--dry_run", "True")
    assert sft_lora.main(words) == 0
    assert before == {p: p.stat().st_mtime_ns for p in finished_run.rglob("*")}


@pytest.mark.parametrize(
    ("losses", "threshold", "waited"),
    [([], 0, 0), ([3], 0, 0), ([3, 2, 1], 0, 0), ([3, 2, 2.5, 2.5], 0, 2), ([3, 2.95, 2.9], 0.5, 2),
     ([1, 2, 0.5, 3], 0, 1)],
)  # fmt: skip
def test_evaluations_without_gain(losses, threshold, waited):
    assert evaluations_without_gain(losses, threshold) == waited


def test_early_stopping_stops(base_folder, data_file, tmp_path, capsys):
    words = train_arguments(
        base_folder, data_file, tmp_path / "run", "--learning_rate", "0", "--num_train_epochs", "9",
        "--early_stopping_patience", "2",
    )  # fmt: skip
    assert sft_lora.main(words) == 0
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert state["epoch"] == 3, "one evaluation sets the mark, two do not beat it"
    assert "stopped early at step 9" in capsys.readouterr().err


def test_early_stopping_without_evaluations(base_folder, data_file, tmp_path):
    words = train_arguments(base_folder, data_file, tmp_path / "run", "--eval_strategy", "no",
                            "--early_stopping_patience", "2")  # fmt: skip
    with pytest.raises(UserError, match="needs evaluations"):
        sft_lora.main(words)


def run_past_its_best(base_folder, data_file, tmp_path) -> tuple[Path, dict]:
    """A run whose later epochs are ruined by its rate, and its state; which rate does so depends on the processor's
    rounding.
    """
    for rate in ("0.3", "1", "0.1", "0.05"):
        folder = tmp_path / rate
        words = train_arguments(
            base_folder, data_file, folder, "--learning_rate", rate, "--lr_scheduler_type", "constant",
            "--num_train_epochs", "5", "--load_best_model_at_end", "True", "--save_total_limit", "2",
        )  # fmt: skip
        assert sft_lora.main(words) == 0
        state = json.loads((folder / "trainer_state.json").read_text())
        if state["best_global_step"] < state["global_step"]:
            return folder, state
    raise AssertionError("no rate ruined the last epoch, so the test shows nothing")


def test_the_best_adapter_is_kept_and_used(base_folder, data_file, tmp_path):
    """A learning rate that ruins the later epochs: the folder's adapter is the best checkpoint's."""
    folder, state = run_past_its_best(base_folder, data_file, tmp_path)
    losses = {e["step"]: e["eval_loss"] for e in state["log_history"] if "eval_loss" in e}
    best = state["best_global_step"]
    kept = load_file(folder / f"checkpoint-{best}" / "adapter_model.safetensors")
    final = load_file(folder / "adapter_model.safetensors")
    assert all(torch.equal(final[name], kept[name]) for name in final)
    results = json.loads((folder / "run.json").read_text())["results"]
    assert results["eval_loss"] == pytest.approx(losses[best], abs=1e-6)


def test_replies_at_every_evaluation(finished_run):
    lines = (finished_run / "eval_replies.jsonl").read_text().splitlines()
    replies = [json.loads(line) for line in lines]
    assert [reply["step"] for reply in replies] == [0, 3, 6]
    assert len({reply["question"] for reply in replies}) == 1


def test_replying_does_not_change_the_training(base_folder, data_file, finished_run, tmp_path):
    assert sft_lora.main(train_arguments(base_folder, data_file, tmp_path / "run")) == 0
    name = "adapter_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (finished_run / name).read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--report_to", "wandb"], "wandb: it is not installed"), (["--lang", "fr"], "expected zh or en"),
     (["--probe_prompts", "nowhere.txt"], "nowhere.txt: cannot be read")],
)  # fmt: skip
def test_mistakes_in_the_settings(words, message, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "wandb" else found(name)
    )
    with pytest.raises(UserError, match=message):
        parse_settings(["--use_cpu", "True", *words])


def test_tensorboard_logs(base_folder, data_file, tmp_path):
    pytest.importorskip("tensorboard", reason="pip install -r requirement-report.txt")
    words = train_arguments(base_folder, data_file, tmp_path / "run", "--report_to", "auto")
    assert sft_lora.main(words) == 0
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))
