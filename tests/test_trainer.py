"""The Trainer against a naive reference, and against itself however a step is cut."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import ROWS, make_model, train_arguments

import sft_lora
from tinyllm import fast_lora, fused_layers, packed_weights, sft
from tinyllm.adapter import read_adapter
from tinyllm.batches import collate
from tinyllm.chat_format import DEFAULT_SYSTEM_PROMPT, chat_format_of
from tinyllm.command_line import parse_settings
from tinyllm.examples import encode_records
from tinyllm.fast_lora import FastLoraLinear
from tinyllm.formats import conversation_of
from tinyllm.lora import add_lora
from tinyllm.records import Record
from tinyllm.trainer import SftTrainer

NO_NOISE = (
    "--lora_dropout",
    "0",
    "--learning_rate",
    "1e-3",
    "--lr_scheduler_type",
    "constant",
    "--warmup_steps",
    "0",
)


def encoded(tokenizer):
    records = [Record(conversation_of(row), "rows", i) for i, row in enumerate(ROWS, 1)]
    return encode_records(records, chat_format_of(tokenizer), DEFAULT_SYSTEM_PROMPT, 256, "error")[
        0
    ]


def adapter_after(base, data, output, *words) -> dict[str, torch.Tensor]:
    arguments = train_arguments(base, data, output, "--eval_dataset", "none", "--eval_strategy", "no",
                                "--num_sample_replies", "0", "--save_strategy", "no", *words)  # fmt: skip
    assert sft_lora.main(arguments) == 0
    return read_adapter(output).weights


def assert_same(first, second, tolerance=1e-5):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(
            tensor, second[name], atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


def naive_step_losses(settings, examples, steps, tokenizer):
    """Pad to the longest, peft's own layers, cross-entropy over all positions, mean over a step."""
    torch.manual_seed(settings.training.seed)
    settings.lora.fast_lora = False
    model = add_lora(make_model(), settings.lora)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=settings.training.learning_rate,
        weight_decay=0.0,
    )  # fmt: skip
    losses = []
    for step in steps:
        rows = [examples[i] for i in step]
        longest = max(len(row["input_ids"]) for row in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for i, row in enumerate(rows):
            n = len(row["input_ids"])
            ids[i, :n], labels[i, :n] = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
            mask[i, :n] = 1
        logits = model(input_ids=ids, attention_mask=mask).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {
        n.replace(".default", ""): p for n, p in model.named_parameters() if p.requires_grad
    }


def test_every_step_equals_the_naive_reference(tokenizer, base_folder, data_file, tmp_path):
    words = train_arguments(base_folder, data_file, tmp_path, *NO_NOISE, "--logging_steps", "1",
                            "--eval_strategy", "no", "--save_strategy", "no")  # fmt: skip
    settings, _ = parse_settings(words)
    examples = encoded(tokenizer)
    torch.manual_seed(settings.training.seed)
    trainer = SftTrainer(
        add_lora(make_model(), settings.lora), settings.training, examples, None, tokenizer, 64
    )
    order = []
    step = trainer.training_step

    def spy(model, inputs, num_items_in_batch=None):
        rows = inputs["input_ids"].split(inputs["lengths"].tolist())
        order.append([tuple(row.tolist()) for row in rows])
        return step(model, inputs, num_items_in_batch)

    trainer.training_step = spy
    trainer.train()
    number = {tuple(e["input_ids"].tolist()): i for i, e in enumerate(examples)}
    steps = [[number[row] for row in one] for one in order]
    assert len(steps) == 6
    losses, adapter = naive_step_losses(settings, examples, steps, tokenizer)
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    torch.testing.assert_close(torch.tensor(logged), torch.tensor(losses), atol=1e-5, rtol=0)
    trained = {
        n.replace(".default", ""): p for n, p in trainer.model.named_parameters() if p.requires_grad
    }
    assert_same(trained, adapter)
    assert not any(p.grad is not None for p in trainer.model.parameters())


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_step_trains_even_if_a_wrappers_own_flag_says_so_already(
    tokenizer, base_folder, data_file, tmp_path, wrapped
):
    """DDP and DeepSpeed: evaluating the model inside sets it to evaluation, but not the wrapper."""
    settings, _ = parse_settings(
        train_arguments(base_folder, data_file, tmp_path, *NO_NOISE, "--eval_strategy", "no")
    )
    model = add_lora(make_model().eval(), settings.lora)
    trainer = SftTrainer(model, settings.training, encoded(tokenizer), None, tokenizer, 64)
    trainer.create_optimizer()
    outer = Wrapper(model) if wrapped else model
    for _ in range(2):
        model.eval()
        outer.training = True
        trainer.training_step(outer, next(iter(trainer.get_train_dataloader())))
        assert all(module.training for module in model.modules())


class Wrapper(torch.nn.Module):
    """What DDP is to the Trainer."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def test_accumulation_changes_nothing(base_folder, data_file, tmp_path):
    whole = adapter_after(base_folder, data_file, tmp_path / "a", *NO_NOISE,
                          "--per_device_train_batch_size", "6")  # fmt: skip
    parts = adapter_after(base_folder, data_file, tmp_path / "b", *NO_NOISE, "--max_length", "24",
                          "--per_device_train_batch_size", "1",
                          "--gradient_accumulation_steps", "6")  # fmt: skip
    assert_same(whole, parts)


@pytest.mark.parametrize(
    "words",
    [
        ("--fast_lora", "False"),
        ("--attn_implementation", "eager"),
        ("--chunked_loss", "False"),
        ("--fused_layers", "False"),
    ],
)
def test_fast_paths_equal_the_slow_ones(base_folder, data_file, tmp_path, words):
    fast = adapter_after(base_folder, data_file, tmp_path / "a", *NO_NOISE)
    slow = adapter_after(base_folder, data_file, tmp_path / "b", *NO_NOISE, *words)
    assert_same(fast, slow)


def choose(strips, monkeypatch):
    """Who multiplies by frozen weights in bfloat16: see packed_weights.py."""
    if strips and not packed_weights.in_strips([torch.empty(8, 8)]):
        pytest.skip("a processor without strips")
    if not strips:
        monkeypatch.setattr(fast_lora, "in_strips", lambda weights: False)


@pytest.mark.parametrize("strips", [False, True])
def test_filled_micro_batches_have_the_same_loss_and_gradient(
    tokenizer, base_folder, data_file, tmp_path, monkeypatch, strips
):
    choose(strips, monkeypatch)
    words = train_arguments(base_folder, data_file, tmp_path, *NO_NOISE, "--eval_strategy", "no")
    settings, _ = parse_settings(words)
    examples, found = encoded(tokenizer), []
    for dtype, fill in ((torch.float32, True), (torch.bfloat16, False), (torch.bfloat16, True)):
        settings.training.fill_rows = fill
        torch.manual_seed(0)
        model = add_lora(make_model().to(dtype), settings.lora)
        trainer = SftTrainer(model, settings.training, examples, None, tokenizer, 64)
        found.append(trainer.multiple)
        assert trainer.eval_multiple == (64 if fill and dtype == torch.bfloat16 else 1)
    assert found == [1, 1, 1 if strips else 64]
    torch.manual_seed(0)
    model = add_lora(make_model(), settings.lora)
    trainer = SftTrainer(model, settings.training, examples, None, tokenizer, 64)
    batch, results = collate(list(examples)), []
    trainer.model.train()
    for multiple in (1, 64):
        trainer.multiple = multiple
        loss = trainer.sum_of_losses(trainer.model, batch)
        weights = [p for p in model.parameters() if p.requires_grad]
        results.append((loss, *torch.autograd.grad(loss, weights)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_held_out_loss_counts_every_token_once(tokenizer, base_folder, data_file, tmp_path):
    words = train_arguments(base_folder, data_file, tmp_path, "--per_device_eval_batch_size", "4")
    settings, _ = parse_settings(words)
    examples, model = encoded(tokenizer), make_model()
    total, count = 0.0, 0
    for i in range(len(examples)):
        ids = torch.tensor(examples[i]["input_ids"])[None].long()
        labels = torch.tensor(examples[i]["labels"])[None].long()
        supervised = int((labels != -100).sum())
        total += model(input_ids=ids, labels=labels).loss.item() * supervised
        count += supervised
    trainer = SftTrainer(model, settings.training, examples, examples, tokenizer, 64)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(total / count, abs=1e-5)


@pytest.mark.parametrize("strips", [False, True])
def test_weights_are_laid_out_when_training_begins_and_change_nothing(
    base_folder, data_file, tmp_path, monkeypatch, strips
):
    choose(strips, monkeypatch)
    if not (strips or packed_weights.works()):
        pytest.skip("a processor that does not multiply bfloat16")
    adapters, losses = [], []
    for most in (0, packed_weights.MOST_BYTES):
        monkeypatch.setattr(fused_layers, "MOST_BYTES", most)
        words = [*NO_NOISE, "--torch_dtype", "bfloat16", "--overwrite_output_dir", "True"]
        words += ["--logging_steps", "1"]
        settings, _ = parse_settings(train_arguments(base_folder, data_file, tmp_path, *words))
        model, tokenizer, chat_format = sft.load_model(settings)
        data, _ = sft.load_examples(settings, model, chat_format)
        model = sft.prepare_model(settings, model)
        layers = [m for m in model.modules() if isinstance(m, FastLoraLinear)]
        assert layers and not any(layer.packed for layer in layers)
        trainer = sft.build_trainer(settings, model, tokenizer, data, 64)
        size = sum(2 * layer.base_layer.weight.nbytes for layer in layers)
        assert trainer.bytes_of_packing() == (size if most else 0)
        trainer.train()
        assert any(layer.packed for layer in layers) == bool(most)
        adapters.append({n: p for n, p in model.named_parameters() if p.requires_grad})
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    if strips:  # rounded elsewhere
        assert len(losses[0]) > 1 and losses[1] == pytest.approx(losses[0], rel=5e-3)
    else:
        assert all(torch.equal(p, adapters[1][n]) for n, p in adapters[0].items())


def test_one_batch_overfits(tokenizer, base_folder, data_file, tmp_path):
    words = train_arguments(base_folder, data_file, tmp_path, "--max_steps", "150", "--lora_r", "16",
                            "--learning_rate", "2e-2", "--per_device_train_batch_size", "6",
                            "--lora_dropout", "0", "--eval_strategy", "no", "--save_strategy", "no",
                            "--logging_steps", "10")  # fmt: skip
    settings, _ = parse_settings(words)
    trainer = SftTrainer(
        add_lora(make_model(hidden_size=64), settings.lora), settings.training, encoded(tokenizer),
        None, tokenizer, 64,
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.1 * losses[0]


def test_full_training_without_lora(base_folder, data_file, tmp_path):
    from transformers import AutoModelForCausalLM

    words = train_arguments(base_folder, data_file, tmp_path / "full", "--use_lora", "False")
    assert sft_lora.main(words) == 0
    before = AutoModelForCausalLM.from_pretrained(base_folder)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    assert not torch.equal(before.lm_head.weight, after.lm_head.weight)
    assert not (tmp_path / "full" / "adapter_config.json").exists()
