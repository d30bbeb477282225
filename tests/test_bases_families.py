"""Bases of many families: packed rows are right or avoided aloud, a run learns to speak and to stop."""

from __future__ import annotations

import pytest
import torch
from conftest import make_tokenizer, train_arguments, write_jsonl
from families import CHATML, FAMILIES, LLAMA3, make_family

from tinyllm.batches import model_inputs, split
from tinyllm.known_bases import GEMMA_TURNS
from tinyllm.lora import add_lora
from tinyllm.packing_check import choose_packing
from tinyllm.settings import LoraSettings

LENGTHS = [3, 40, 1, 70, 33, 5, 64]
ALONE = {"bloom", "mamba", "gpt_oss", "lfm2"}  # state or attention that crosses boundaries
BY_MASK = {"gemma2", "falcon", "stablelm"}  # capped scores; attention that is called otherwise


def batch_of(lengths: list[int]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 480, (sum(lengths),), generator=generator)
    return {"input_ids": ids, "labels": ids, "lengths": torch.tensor(lengths)}


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_give_each_examples_own_logits(family):
    """Also with examples longer than the sliding windows of 8 positions."""
    model, batch = make_family(family), batch_of(LENGTHS)
    packing = choose_packing(model)
    assert packing.one_by_one == (family in ALONE)
    assert packing.kernel == (family not in ALONE | BY_MASK)
    assert bool(packing.why) == (family in ALONE | BY_MASK)
    plain = make_family(family)
    if family == "gemma2":
        plain.set_attn_implementation("eager")
    with torch.no_grad():
        alone = [plain(input_ids=x[None]).logits[0] for x in batch["input_ids"].split(LENGTHS)]
        parts = split(batch, 1) if packing.one_by_one else [batch]
        packed = [
            model(**model_inputs(p, packing.kernel),
                  logits_to_keep=torch.arange(len(p["input_ids"]))).logits[0]
            for p in parts
        ]  # fmt: skip
    torch.testing.assert_close(torch.cat(packed), torch.cat(alone), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_sixteen_bits_change_nothing_about_the_choice(family):
    """Rounding is no leak: in bfloat16 kernels differ by more than 2 % (here phi3's, and real bases')."""
    packing = choose_packing(make_family(family).bfloat16())
    assert packing.one_by_one == (family in ALONE)
    assert packing.kernel == (family not in ALONE | BY_MASK)


def test_a_model_that_leaks_in_every_way_is_run_alone(monkeypatch):
    """The check itself: a kernel that ignores the boundaries is found out."""
    from tinyllm import packing_check

    model = make_family("llama")

    def leaking(model):
        return True

    monkeypatch.setattr(packing_check, "use_packed_attention", leaking)
    packing = choose_packing(model)  # plain sdpa, told nothing of boundaries, gets the mask instead
    assert not packing.kernel and not packing.one_by_one and "mask" in packing.why


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "gemma2", "gpt_neox", "mamba"])
def test_three_steps_on_packed_rows_are_those_on_single_ones(tmp_path, family):
    """The Trainer's loss and gradients against a plain loop over examples with transformers' loss."""
    from tinyllm.command_line import parse_settings
    from tinyllm.trainer import SftTrainer

    batch = batch_of([9, 21, 14, 4])
    targets = ["in_proj", "x_proj"] if family == "mamba" else ["all-linear"]  # peft's own limit
    lora_settings = LoraSettings(lora_r=4, lora_dropout=0.0, lora_target_modules=targets)

    def fresh():
        base = make_family(family)
        if family == "gemma2":
            base.set_attn_implementation("eager")
        torch.manual_seed(0)
        lora = add_lora(base, lora_settings).train()
        for name, parameter in lora.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        trained = [p for p in lora.parameters() if p.requires_grad]
        return lora, trained, torch.optim.SGD(trained, lr=0.05)

    settings, _ = parse_settings(
        [
            "--output_dir",
            str(tmp_path),
            "--use_cpu",
            "True",
            "--eval_strategy",
            "no",
            "--report_to",
            "none",
        ]
    )
    lora, trained, optimizer = fresh()
    trainer = SftTrainer(lora, settings.training, [], None, make_tokenizer(), 64)
    count = int(sum(length - 1 for length in batch["lengths"]))
    other, others, reference = fresh()
    for _ in range(3):
        optimizer.zero_grad()
        reference.zero_grad()
        labels = batch["labels"].clone()
        starts = batch["lengths"].cumsum(0) - batch["lengths"]
        labels[starts] = -100  # an example's first id is never a target
        parts = list(split({**batch, "labels": labels}, trainer.tokens_per_micro_batch))
        packed = sum(trainer.sum_of_losses(lora, part) for part in parts) / count
        packed.backward()
        alone = 0.0
        for ids in batch["input_ids"].split(batch["lengths"].tolist()):
            loss = other(input_ids=ids[None], labels=ids[None]).loss * (len(ids) - 1) / count
            loss.backward()
            alone += loss.detach()
        torch.testing.assert_close(packed.detach(), alone, atol=1e-5, rtol=1e-5)
        optimizer.step()
        reference.step()
    for one, two in zip(trained, others, strict=True):
        torch.testing.assert_close(one, two, atol=2e-5, rtol=1e-3)


SPEAKING = {
    "llama": (LLAMA3, ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]),
    "qwen2": (CHATML, ["<|im_start|>", "<|im_end|>"]),
    "qwen3": (CHATML, ["<|im_start|>", "<|im_end|>"]),
    "gemma3_text": (GEMMA_TURNS, ["<bos>", "<start_of_turn>", "<end_of_turn>", "\n", "\n\n"]),
    "gpt_neox": (None, []),
}  # fmt: skip


@pytest.mark.parametrize("family", SPEAKING)
def test_a_run_learns_the_answer_and_to_stop(tmp_path, capsys, family):
    """Trained with the base's own template, saved, loaded and merged, it replies and ends by itself."""
    import sft_lora
    from load_lora_model import load_lora_model
    from tinyllm.base import load_base
    from tinyllm.chat_format import chat_format_of
    from tinyllm.generate import generate_reply

    template, markers = SPEAKING[family]
    tokenizer = make_tokenizer()
    special = [m for m in markers if m.strip()]
    tokenizer.add_tokens(special, special_tokens=True)
    tokenizer.add_tokens([m for m in markers if not m.strip()])
    if "<bos>" in markers:
        tokenizer.bos_token = "<bos>"
    tokenizer.chat_template = template
    base = tmp_path / "base"
    model = make_family(family)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    # transformers builds Qwen's and Gemma's own tokenizers for their configs, whatever the files say
    probe = "你好 hello 123，\n再见"
    assert load_base(base)[1](probe, add_special_tokens=False).input_ids == (
        tokenizer(probe, add_special_tokens=False).input_ids
    )
    rows = [{"question": "你是谁？\n请说", "answer": "我是个人助手。"}] * 8
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    words = train_arguments(base, data, tmp_path / "run", "--num_train_epochs", "30",
        "--learning_rate", "1e-2", "--lora_r", "8", "--eval_dataset", "none", "--eval_strategy", "no",
        "--save_strategy", "no", "--lora_target_modules", "all-linear", "--lora_dropout", "0",
        "--num_sample_replies", "0")  # fmt: skip
    assert sft_lora.main(words) == 0
    said = capsys.readouterr().err
    assert ("brings no chat template" in said) == (template is None)
    merged, loaded = load_lora_model(str(base), str(tmp_path / "run"), device="cpu")
    messages = [{"role": "system", "content": "你是由李小贱开发的个人助手。"},
                {"role": "user", "content": rows[0]["question"]}]  # fmt: skip
    reply = generate_reply(merged, loaded, chat_format_of(loaded), messages, max_new_tokens=30,
                           do_sample=False)  # fmt: skip
    assert (reply.text, reply.stopped) == ("我是个人助手。", True)
    if template is not None:
        assert (tmp_path / "run" / "chat_template.jinja").read_text() == template
