"""Settings, optimizer, schedule, training with resume, and the exported folder."""

import json
import logging
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from conftest import REPOSITORY
from pretraining import STORIES, losses_of, run_of, tiny_settings
from transformers import AutoModelForCausalLM, AutoTokenizer

from tinyllm.pretrain import __main__ as program
from tinyllm.pretrain import checkpoint, compiled, head_loss
from tinyllm.pretrain.compiled import compiler_fault
from tinyllm.pretrain.evaluate import bits_per_character, passages
from tinyllm.pretrain.model import build_model
from tinyllm.pretrain.muon import Muon, build_optimizers, orthogonalize
from tinyllm.pretrain.schedule import Progress, rate_factor
from tinyllm.pretrain.settings import Settings, parse
from tinyllm.pretrain.train import prepare, train


@pytest.fixture
def settings(tmp_path):
    return tiny_settings(tmp_path)


def test_yaml_then_command_line_and_types(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("muon_lr: 2e-3\nmax_steps: 7\n")
    settings = parse(
        ["--config", str(config), "--max_steps", "9", "--strict", "--weights", "own=1,openclaw=2"]
    )
    assert (settings.muon_lr, settings.max_steps, settings.strict) == (2e-3, 9, True)
    assert settings.weights == {"own": 1.0, "openclaw": 2.0}
    config.write_text("muon_rl: 1\n")
    with pytest.raises(ValueError, match="did you mean muon_lr"):
        parse(["--config", str(config)])
    config.write_text("own_text:\n")
    with pytest.raises(ValueError, match="own_text has no value"):
        parse(["--config", str(config)])


def test_shipped_yaml_parses_and_gives_about_16m_parameters():
    settings = parse(["--config", "configs/ptm_tiny_llm_16m.yaml"])
    model = build_model(settings, 0)
    assert 15e6 < sum(p.numel() for p in model.parameters()) < 17e6


@pytest.mark.parametrize(
    "bad",
    [
        {"stage": "x"},
        {"stage": "decay"},
        {"num_heads": 4, "num_key_value_heads": 3},
        {"precision": "int8"},
        {"compile": "maybe"},
        {"optimizer": "sgd"},
        {"max_steps": 0},
    ],
)
def test_contradictions_are_refused(bad):
    with pytest.raises(ValueError):
        Settings(**bad)


def test_orthogonalize_brings_singular_values_near_one():
    for shape in ((3, 16, 48), (2, 48, 16), (1, 32, 32)):
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)))
        assert values.min() > 0.3 and values.max() < 1.3


def test_orthogonalize_in_bfloat16_points_the_same_way():
    update = torch.randn(2, 16, 48)
    exact, rounded = orthogonalize(update), orthogonalize(update.bfloat16()).float()
    assert torch.cosine_similarity(exact.flatten(), rounded.flatten(), 0) > 0.999


@pytest.mark.parametrize("chunk", [1, 100, 1 << 22])
def test_chunked_head_loss_equals_pytorchs(monkeypatch, chunk):
    monkeypatch.setitem(head_loss.CHUNK_ELEMENTS, "cpu", chunk)
    hidden = torch.randn(23, 16, requires_grad=True)
    weight = torch.randn(50, 16, requires_grad=True)
    ids = torch.randint(0, 50, (23,))
    expected = F.cross_entropy(hidden @ weight.t(), ids, reduction="sum")
    loss = head_loss.HeadLoss.apply(hidden, weight, ids)
    torch.testing.assert_close(loss, expected)
    for a, b in zip(
        torch.autograd.grad(3 * loss, (hidden, weight)),
        torch.autograd.grad(3 * expected, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_bfloat16_products_train_alike(settings):
    exact = losses_of(run_of(settings), 4)
    settings.precision, settings.compile = "bf16", "off"
    AcceleratorState._reset_state(True)  # accelerate keeps the precision of a process
    try:
        run = run_of(settings)
        assert losses_of(run, 4) == pytest.approx(exact, rel=2e-2)
        assert all(p.dtype == torch.float32 for p in run.model.parameters())
    finally:
        AcceleratorState._reset_state(True)


def test_compiled_layers_train_alike_and_are_saved_under_the_same_names(settings):
    if torch.cuda.is_available() or compiler_fault():
        pytest.skip("no C++ compiler that works for the CPU, or a GPU")
    exact = run_of(settings)
    losses = losses_of(exact, 4)
    settings.compile = "on"
    run = run_of(settings)
    assert run.compiled and not exact.compiled
    assert losses_of(run, 4) == pytest.approx(losses, rel=1e-5)
    assert run.model.state_dict().keys() == exact.model.state_dict().keys()
    assert run.evaluate() == pytest.approx(exact.evaluate(), rel=1e-4)
    assert run.sample("小明") == exact.sample("小明")


def test_no_compiler_is_said_and_only_an_error_when_asked_for(settings, monkeypatch, caplog):
    monkeypatch.setattr(compiled, "compiler_fault", lambda: "no g++")
    monkeypatch.setattr(compiled, "cpu_multiplies_bf16", lambda: True)
    model = run_of(settings).model
    with caplog.at_level("INFO"):
        assert not compiled.compile_layers(model, "auto", "bf16")
    assert torch.cuda.is_available() or "not compiled: no g++" in caplog.text
    with pytest.raises(ValueError, match=r"cannot compile \(no g\+\+\); install"):
        compiled.compile_layers(model, "on", "bf16")


def test_another_optimizer_does_not_go_on_with_a_checkpoint(settings):
    run = run_of(settings)
    losses_of(run, 1)
    run.save()
    settings.optimizer = "adamw"
    other = run_of(settings)
    with pytest.raises(ValueError, match="was trained with --optimizer muon, not adamw"):
        other.restore(checkpoint.last(other.folder))
    losses = losses_of(other, 12)
    assert losses[-1] < losses[0]


def test_muon_takes_the_layers_and_adamw_the_rest(settings):
    model = run_of(settings).model
    muon, adamw = build_optimizers(model, settings, bf16=False)
    assert isinstance(muon, Muon)
    assert len(muon.param_groups[0]["params"]) == 2 * 7
    assert len(adamw.param_groups[0]["params"]) == 1 + 2 * 2 + 1
    settings.optimizer = "adamw"
    (adamw,) = build_optimizers(model, settings, bf16=False)
    assert [len(group["params"]) for group in adamw.param_groups] == [1 + 2 * 2 + 1, 2 * 7]


def test_schedule_of_a_full_run():
    settings = Settings(max_steps=100, warmup_steps=10, decay_share=0.25, stage="full")
    factors = [rate_factor(settings, Progress(step=s)) for s in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[10:75] == [1.0] * 65
    assert factors[88] == pytest.approx(0.48)
    assert factors[99] < 0.05


def test_time_budget_moves_the_decay_forward():
    settings = Settings(max_steps=1000, max_minutes=10, stage="full")
    assert rate_factor(settings, Progress(step=100, seconds=60)) == 1.0
    assert rate_factor(settings, Progress(step=100, seconds=540)) == pytest.approx(0.4)


def test_without_a_decay_the_rate_stays():
    settings = Settings(max_steps=100, warmup_steps=10, stage="full", decay_share=0.0)
    assert {rate_factor(settings, Progress(step=s)) for s in range(10, 100)} == {1.0}


def test_resume_equals_the_uninterrupted_run(settings):
    whole = run_of(settings)
    expected = losses_of(whole, 6)
    first = run_of(settings)
    losses_of(first, 3)
    first.save()
    second = run_of(settings)
    prepare(second)
    assert losses_of(second, 3) == expected[3:]
    assert second.seen == whole.seen and second.progress.tokens == whole.progress.tokens
    for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_micro_batches_do_not_change_the_step(settings):
    settings.rows_per_step = 4
    expected = losses_of(run_of(settings), 2)
    settings.rows_per_forward = 4
    assert losses_of(run_of(settings), 2) == pytest.approx(expected, abs=1e-4)


def test_changed_text_begins_a_new_stream_and_says_so(settings, caplog):
    caplog.set_level(logging.INFO)
    first = run_of(settings)
    losses_of(first, 2)
    first.save()
    prepare(run_of(settings))
    assert "is unchanged: the stream goes on exactly" in caplog.text
    caplog.clear()
    path = Path(settings.own_text) / "stories.txt"
    path.write_text(path.read_text(encoding="utf-8") + "\n\n新的故事在这里。", encoding="utf-8")
    second = run_of(settings)
    prepare(second)
    assert "a new stream begins at this step" in caplog.text
    assert second.progress.step == 2


def test_a_kill_while_saving_leaves_the_last_checkpoint(settings):
    run = run_of(settings)
    run.save()
    (run.folder / "step-0000009.tmp").write_bytes(b"half")
    assert checkpoint.last(run.folder).name == "step-0000000.pt"
    for _ in range(3):
        run.progress.step += 1
        run.save()
    assert [p.name for p in checkpoint.list_checkpoints(run.folder)] == [
        "step-0000002.pt",
        "step-0000003.pt",
    ]


def test_stable_stage_then_decay_from_its_checkpoint(settings):
    settings.stage, settings.max_steps = "stable", 3
    train(run_of(settings))
    settings.stage, settings.decay_steps = "decay", 2
    run = run_of(settings)
    train(run)
    assert (run.progress.decay_start, run.progress.step) == (3, 5)
    assert (run.folder / "stable.pt").exists()
    settings.stage = "stable"
    with pytest.raises(ValueError, match="in its decay"):
        prepare(run_of(settings))


def test_training_learns_and_exports_a_folder_that_plain_transformers_opens(settings):
    settings.max_steps, settings.muon_lr = 40, 0.02
    run, counts = program.build_run(settings)
    before = run.evaluate()["own"]
    train(run)
    program.export_run(run, counts)
    folder = Path(settings.export_to)
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md", "chat_template.jinja", "config.json", "generation_config.json",
        "model.safetensors", "pretraining.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.bfloat16 and model.config.model_type == "llama"
    assert tokenizer("<|user|>你好")["input_ids"] == run.tokenizer("<|user|>你好")["input_ids"]
    text = passages(STORIES, 4)
    after = bits_per_character(model.float(), tokenizer, text)
    assert after < before - 1
    assert after == pytest.approx(bits_per_character(run.model, run.tokenizer, text), abs=0.05)


def test_bits_per_character_counts_scored_characters_only(settings):
    run = run_of(settings)
    text = STORIES[0]
    ids = run.tokenizer(text, return_tensors="pt")["input_ids"]
    nats = run.model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
    scored = len(text) - len(run.tokenizer.decode(ids[0, :1]))
    expected = nats / 0.6931471805599453 / scored
    together = bits_per_character(run.model, run.tokenizer, [text, "短的句子。"])
    assert bits_per_character(run.model, run.tokenizer, [text]) == pytest.approx(expected, rel=1e-4)
    assert together != pytest.approx(expected, rel=1e-6)


TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def start_processes(settings, *how) -> subprocess.Popen:
    """The pretraining as a command, on the CPU."""
    words = [
        word for f in fields(settings) if f.type is not dict
        for word in (f"--{f.name}", str(getattr(settings, f.name)))
    ]  # fmt: skip
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *how, "-m", "tinyllm.pretrain", *words], cwd=REPOSITORY, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def losses_written(settings) -> list[float]:
    lines = (settings.path("checkpoints") / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines if '"loss"' in line]


@pytest.mark.slow
def test_two_processes_train_as_one_and_stop_together(settings):
    settings.rows_per_step, settings.max_steps = 4, 3
    expected = losses_of(run_of(settings), 3)
    both = start_processes(settings, *TWO)
    text = both.communicate(timeout=300)[0]
    assert both.returncode == 0, text
    assert "products in fp32, 2 process(es)" in text
    assert losses_written(settings) == pytest.approx(expected, abs=1e-4)

    settings.max_steps, settings.stage = 100_000, "stable"
    both = start_processes(settings, *TWO)
    for line in both.stdout:
        if "step 8 " in line:
            both.terminate()  # torchrun hands SIGTERM on
            break
    text = both.communicate(timeout=120)[0]
    assert both.returncode != 0 and "saved" in text, text
    assert checkpoint.load(checkpoint.last(settings.path("checkpoints")))["progress"]["step"] >= 8


def test_processes_that_know_nothing_of_each_other_are_refused(settings, monkeypatch):
    run_of(settings)  # accelerate keeps what it finds first: one process
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="do not train together"):
        run_of(settings)
