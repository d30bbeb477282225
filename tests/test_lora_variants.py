"""Every variant on every kind of base: train, save, load on the untouched base, same logits."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import ROWS, make_model, make_tokenizer, train_arguments, write_jsonl
from families import make_family
from safetensors.torch import load_file

from tinyllm.adapter import attach_adapter, merge, read_adapter
from tinyllm.errors import UserError
from tinyllm.fast_lora import FastLoraLinear
from tinyllm.finish import write_adapter
from tinyllm.lora import add_lora, embedding_names
from tinyllm.settings import LoraSettings

IDS = torch.randint(5, 480, (2, 13), generator=torch.Generator().manual_seed(3))
KINDS = ("llama", "qwen2", "gemma3_text", "gpt2", "gpt_neox")  # untied, tied, scaled, Conv1D, fused
EMBEDDINGS = "the base's own input embeddings"
VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "random": {"init_lora_weights": "false"},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter": {"init_lora_weights": "pissa_niter_8"},
    "olora": {"init_lora_weights": "olora"},
    "pissa rslora": {"init_lora_weights": "pissa", "use_rslora": True},
    "tokens": {"trainable_token_indices": [7, 300]},
    "embeddings": {"modules_to_save": [EMBEDDINGS]},
    "pissa embeddings": {"init_lora_weights": "pissa", "modules_to_save": [EMBEDDINGS]},
}


def settings_for(model, **changes) -> LoraSettings:
    changes = copy.deepcopy(changes)
    if changes.get("modules_to_save") == [EMBEDDINGS]:
        changes["modules_to_save"] = embedding_names(model)[:1]
    usual = {"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0}
    targets = {"lora_target_modules": ["all-linear"]}
    return LoraSettings(**(usual | targets | changes))


def train(model, settings: LoraSettings, num_steps: int = 3):
    torch.manual_seed(0)
    lora = add_lora(model, settings).train()
    trained = [p for p in lora.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-2)
    for _ in range(num_steps):
        optimizer.zero_grad()
        lora(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    return lora.eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits.float()


def close(one: torch.Tensor, other: torch.Tensor, atol: float = 2e-4) -> None:
    torch.testing.assert_close(one, other, atol=atol, rtol=1e-4)


# What peft cannot do for GPT-2: its layers are transposed, and its embeddings come apart.
REFUSED = {("gpt2", "olora"): "Conv1D", ("gpt2", "embeddings"): "one matrix",
           ("gpt2", "pissa embeddings"): "one matrix"}  # fmt: skip


@pytest.mark.parametrize(("family", "variant"), REFUSED)
def test_what_peft_would_do_wrongly_is_refused(family, variant):
    base = make_family(family)
    with pytest.raises(UserError, match=REFUSED[family, variant]):
        add_lora(base, settings_for(base, **VARIANTS[variant]))


@pytest.mark.parametrize(
    ("family", "variant"), [(f, v) for f in KINDS for v in VARIANTS if (f, v) not in REFUSED]
)
def test_trained_saved_and_loaded_on_the_untouched_base(tmp_path, family, variant):
    base = make_family(family)
    untouched = logits(base)
    lora = train(base, settings_for(base, **VARIANTS[variant]))
    trained = logits(lora)
    assert (trained - untouched).abs().max() > 1e-2
    write_adapter(lora, tmp_path)
    loaded = attach_adapter(make_family(family), read_adapter(tmp_path))
    close(logits(loaded), trained)
    with loaded.disable_adapter():
        close(logits(loaded), untouched, atol=1e-5)
    merged = merge(loaded)
    close(logits(merged), trained)
    ends = [merged.get_input_embeddings().weight, merged.get_output_embeddings().weight]
    assert torch.equal(*ends) == (make_family(family).config.tie_word_embeddings is not False)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_fast_forward_trains_what_pefts_own_does(variant):
    bases = [make_family("llama") for _ in range(2)]
    changes = VARIANTS[variant]
    fast = train(bases[0], settings_for(bases[0], fast_lora=True, **changes))
    slow = train(bases[1], settings_for(bases[1], fast_lora=False, **changes))
    assert any(isinstance(m, FastLoraLinear) for m in fast.modules())
    assert not any(isinstance(m, FastLoraLinear) for m in slow.modules())
    close(logits(fast), logits(slow))


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_a_moving_start_changes_nothing_before_the_first_step(start):
    base = make_family("llama")
    untouched = logits(base)
    lora = add_lora(base, settings_for(base, init_lora_weights=start))
    close(logits(lora), untouched)
    weight = "model.layers.0.self_attn.q_proj.base_layer.weight"
    moved = dict(base.named_parameters())[weight]
    assert not torch.allclose(moved, make_family("llama").model.layers[0].self_attn.q_proj.weight)


def test_other_ranks_for_some_layers(tmp_path):
    base = make_family("llama")
    patterns = {"rank_pattern": '{"q_proj": 2, "layers.1.mlp.up_proj": 6}',
                "alpha_pattern": '{"q_proj": 32}'}  # fmt: skip
    for number, more in enumerate(({}, {"init_lora_weights": "pissa", "use_rslora": True})):
        base = make_family("llama")
        lora = train(base, settings_for(base, **patterns, **more))
        layers = base.model.layers
        assert layers[0].self_attn.q_proj.r["default"] == 2
        assert layers[1].mlp.up_proj.r["default"] == 6
        assert layers[0].mlp.up_proj.r["default"] == 4
        trained = logits(lora)
        folder = tmp_path / str(number)
        write_adapter(lora, folder)
        close(logits(attach_adapter(make_family("llama"), read_adapter(folder))), trained)


def test_only_the_chosen_tokens_move():
    base = make_family("qwen2")
    before = base.get_input_embeddings().weight.detach().clone()
    used = sorted({7, int(IDS[0, 0])})
    merged = train(base, settings_for(base, trainable_token_indices=used)).merge_and_unload()
    changed = (merged.get_input_embeddings().weight - before).abs().amax(-1) > 0
    assert changed.nonzero().flatten().tolist() == used


@pytest.mark.parametrize("name", ["embed_tokens", "norm"])
def test_whole_layers_in_float32_within_a_bfloat16_base(name):
    base = make_family("llama").to(torch.bfloat16)
    lora = train(base, settings_for(base, modules_to_save=[name]))
    trained = {n: p for n, p in lora.named_parameters() if p.requires_grad}
    assert all(p.dtype == torch.float32 for p in trained.values())
    assert any("modules_to_save" in n and p.grad.abs().max() > 0 for n, p in trained.items())
    assert base.model.layers[0].self_attn.q_proj.base_layer.weight.dtype == torch.bfloat16


def test_tied_embeddings_stay_tied_within_a_bfloat16_base():
    base = make_family("qwen2").to(torch.bfloat16)
    lora = train(base, settings_for(base, modules_to_save=["embed_tokens"]))
    trained = [
        end.modules_to_save["default"].weight
        for end in (base.get_input_embeddings(), base.get_output_embeddings())
    ]
    assert trained[0].dtype == torch.float32 and torch.equal(*trained)
    assert not torch.equal(trained[0], make_family("qwen2").get_input_embeddings().weight)
    assert logits(lora).isfinite().all()


BAD = {
    "dora with pissa": ({"use_dora": True, "init_lora_weights": "pissa"}, "use_dora"),
    "odd rank": ({"lora_r": 5, "init_lora_weights": "orthogonal"}, "even rank"),
    "unknown start": ({"init_lora_weights": "pisa"}, "expected true"),
    "needs data": ({"init_lora_weights": "eva"}, "pass over data"),
    "loftq": ({"init_lora_weights": "loftq"}, "quantised base"),
    "negative iterations": ({"init_lora_weights": "pissa_niter_0"}, "pissa_niter_N"),
    "no mapping": ({"rank_pattern": "[1]"}, "expected a mapping"),
    "zero rank": ({"rank_pattern": '{"q_proj": 0}'}, "1 or more"),
    "broken json": ({"rank_pattern": '{"q_proj": '}, "cannot be read"),
    "twice": ({"modules_to_save": ["q_proj"], "lora_target_modules": ["q_proj"]}, "not both"),
    "tokens twice": ({"modules_to_save": ["lm_head"], "trainable_token_indices": [1]}, "leave out"),
    "full training": ({"use_lora": False, "use_dora": True}, "needs --use_lora"),
    "low ratio": ({"loraplus_lr_ratio": 0.5}, "1 or more"),
    "negative id": ({"trainable_token_indices": [-1]}, "0 or more"),
    "adapter and dora": ({"adapter_path": "x", "use_dora": True}, "brings its own"),
}  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what peft does without a GPU")
def test_peft_has_no_loftq_without_a_gpu():
    """Why it is refused: when this fails, peft can do it, and the refusal is to be thought over."""
    from peft.utils.loftq_utils import loftq_init

    with pytest.raises((ValueError, RuntimeError, AssertionError), match=r"bitsandbytes|CUDA"):
        loftq_init(torch.randn(64, 64), num_bits=4, reduced_rank=4)


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_work_is_refused_before_anything_loads(case):
    changes, words = BAD[case]
    with pytest.raises(UserError, match=words):
        LoraSettings(**changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rank_pattern": '{"gate": 4}'}, "matches none"),
        ({"modules_to_save": ["head"]}, "no layer of this base is called head"),
        ({"trainable_token_indices": [480]}, "ids 0 to 479"),
        ({"lora_target_modules": ["c_attn"]}, "q_proj.*all-linear"),
    ],
)
def test_what_this_base_has_not_is_refused(changes, words):
    base = make_family("llama")
    with pytest.raises(UserError, match=words):
        add_lora(base, settings_for(base, **changes))


def test_a_checkpoint_that_fits_no_base_is_refused(tmp_path):
    base = make_family("llama")
    lora = add_lora(base, settings_for(base, init_lora_weights="pissa_niter_2"))
    lora.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="fits no base"):
        attach_adapter(make_family("llama"), read_adapter(tmp_path))


# -- whole runs --------------------------------------------------------------------------------


def run(base, data, output, *more: str) -> None:
    import sft_lora

    assert sft_lora.main(train_arguments(base, data, output, *more)) == 0


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_a_pissa_run_resumes_exactly(tmp_path, base_folder, data_file):
    """Interrupted after its first checkpoint it ends with the very adapter of one that was not."""
    import shutil

    words = ["--init_lora_weights", "pissa", "--save_strategy", "epoch"]
    run(base_folder, data_file, tmp_path / "whole", *words)
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    part = tmp_path / "part"
    last = max(part.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    shutil.rmtree(last)
    for name in ("adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"):
        (part / name).unlink()
    text = (part / "run.json").read_text().replace('"status": "finished"', '"status": "running"')
    (part / "run.json").write_text(text)
    run(base_folder, data_file, part, *words)
    assert same(weights(part), weights(tmp_path / "whole"))
    assert next(iter(weights(part).values())).shape[0] == 8  # twice --lora_r 4


def test_another_start_than_the_runs_is_refused(tmp_path):
    from tinyllm.lora_start import keep_start

    lora = add_lora(make_model(), settings_for(None, init_lora_weights="pissa"))
    keep_start(lora, tmp_path)
    signs = {k: -v for k, v in lora.lora_start.items()}  # the same product
    lora.lora_start = signs
    keep_start(lora, tmp_path)
    other = add_lora(make_model(seed=1), settings_for(None, init_lora_weights="pissa"))
    with pytest.raises(UserError, match="another start"):
        keep_start(other, tmp_path)


def test_loraplus_moves_b_faster(tmp_path, base_folder, data_file):
    from tinyllm.command_line import parse_settings
    from tinyllm.loraplus import loraplus_optimizer

    words = train_arguments(base_folder, data_file, tmp_path / "x", "--loraplus_lr_ratio", "16")
    settings, _ = parse_settings(words)
    lora = add_lora(make_model(), settings.lora)
    optimizer = loraplus_optimizer(lora, settings.training, settings.lora.loraplus_lr_ratio)
    names = {id(p): n for n, p in lora.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            faster = 16 if "lora_B" in names[id(parameter)] else 1
            assert group["lr"] == pytest.approx(faster * settings.training.learning_rate)
    trained = sum(len(group["params"]) for group in optimizer.param_groups)
    assert trained == sum(p.requires_grad for p in lora.parameters())
    run(base_folder, data_file, tmp_path / "plus", "--loraplus_lr_ratio", "16")
    run(base_folder, data_file, tmp_path / "plain")
    moved = [
        sum(t.norm() for n, t in weights(tmp_path / name).items() if "lora_B" in n)
        for name in ("plus", "plain")
    ]
    assert moved[0] > 2 * moved[1]


def test_gradient_checkpointing_trains_the_same(tmp_path, base_folder, data_file):
    run(base_folder, data_file, tmp_path / "plain")
    plain = weights(tmp_path / "plain")
    for name, kwargs in (("new", ()), ("old", ("--gradient_checkpointing_kwargs",
                                               '{"use_reentrant": true}'))):  # fmt: skip
        run(base_folder, data_file, tmp_path / name, "--gradient_checkpointing", "True", *kwargs)
        for key, tensor in weights(tmp_path / name).items():
            torch.testing.assert_close(tensor, plain[key], atol=1e-5, rtol=1e-4)


def test_an_adapter_is_trained_further(tmp_path, base_folder, data_file, finished_run, capsys):
    run(base_folder, data_file, tmp_path / "more", "--adapter_path", str(finished_run),
        "--lora_r", "16", "--learning_rate", "1e-9")  # fmt: skip
    assert "going on with the adapter" in capsys.readouterr().err
    before, after = weights(finished_run), weights(tmp_path / "more")
    assert not same(before, after)  # it did train ...
    for name in before:  # ... from where the adapter was, at its own rank
        torch.testing.assert_close(before[name], after[name], atol=1e-6, rtol=1e-4)


def test_new_tokens_are_single_ids_and_survive_loading(tmp_path, data_file):
    """A base with no row to spare gets them; rows may spell them; the adapter brings them back."""
    from load_lora_model import load_lora_model, load_lora_model_without_merge
    from tinyllm.chat_format import chat_format_of

    base, tokenizer = tmp_path / "base", make_tokenizer()
    make_model(vocab_size=len(tokenizer)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    rows = [{**row, "answer": f"<think>{row['answer']}</think>"} for row in ROWS]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    output = tmp_path / "run"
    run(base, data, output, "--new_special_tokens", "<think>,</think>", "--learning_rate", "5e-2")
    beside, loaded = load_lora_model_without_merge(str(base), str(output), device="cpu")
    ids = chat_format_of(loaded).encode([{"role": "user", "content": "<think>"},
                                         {"role": "assistant", "content": "a</think>"}])  # fmt: skip
    new = [len(tokenizer), len(tokenizer) + 1]
    assert loaded.convert_tokens_to_ids(["<think>", "</think>"]) == new
    assert set(new) <= set(ids.input_ids)
    merged, _ = load_lora_model(str(base), str(output), device="cpu")
    batch = torch.tensor([ids.input_ids])
    with torch.no_grad():
        torch.testing.assert_close(
            beside(input_ids=batch).logits, merged(input_ids=batch).logits, atol=1e-4, rtol=1e-4
        )
    beyond_lora = {n: t.shape for n, t in weights(output).items() if ".lora_" not in n}
    assert [tuple(shape) for shape in beyond_lora.values()] == [(2, 32)], beyond_lora


def test_noise_is_measured_by_the_example_not_by_the_row():
    from tinyllm.neftune import Neftune

    embeddings = torch.nn.Embedding(10, 16)
    noise = Neftune(embeddings, alpha=5.0)
    noise.lengths = torch.tensor([4, 100])
    ids = torch.zeros(1, 104, dtype=torch.long)
    plain = embeddings.eval()(ids)
    torch.manual_seed(0)
    added = (embeddings.train()(ids) - plain).abs()[0]
    short, long = 5 / (4 * 16) ** 0.5, 5 / (100 * 16) ** 0.5
    assert 0.9 * short < added[:4].max() <= short
    assert 0.95 * long < added[4:].max() <= long


def test_a_run_with_noise_trains_otherwise_and_evaluates_alike(tmp_path, base_folder, data_file):
    import json

    first = {}
    for alpha in ("5", "0"):
        output = tmp_path / alpha
        more = ["--neftune_noise_alpha", alpha] if alpha != "0" else []
        run(base_folder, data_file, output, *more, "--lora_dropout", "0")
        first[alpha] = json.loads((output / "run.json").read_text())["results"]["eval_loss_before"]
    assert first["5"] == first["0"]
    assert not same(weights(tmp_path / "5"), weights(tmp_path / "0"))
