"""Tiny models, tokenizers and rows, made on the spot: the tests need no network and no fixtures."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "2")

REPOSITORY = Path(__file__).resolve().parent.parent
TEXTS = [
    "你好！我是由李小贱开发的个人助手。", "今天天气很好，我们去公园散步吧。", "一加一等于二。",
    "为什么天是蓝的？因为阳光里的蓝光散开得最多。", "你是谁？谁开发了你？请介绍一下自己。",
    "用户和助手在说话。问题，回答。", "hello world, how are you? 0123456789", "好的，谢谢。再见！",
]  # fmt: skip


def make_tokenizer(texts: list[str] = TEXTS, vocab_size: int = 480):
    """A byte-level BPE tokenizer with the family's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|pad|>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        texts * 3,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=special, show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<|pad|>", eos_token="<|endoftext|>",
        additional_special_tokens=special[2:], clean_up_tokenization_spaces=False,
    )  # fmt: skip


PROJECTIONS = [
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
]  # of a llama


def make_model(vocab_size: int = 480, seed: int = 0, **changes):
    """A two-layer llama in float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "tie_word_embeddings": True, "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **(shape | changes))).eval()


def make_fused_lora(base, joins: bool = True, **lora):
    """A model in training whose layers and adapters, never 0, compute the faster way; C must compile."""
    import torch
    from peft import LoraConfig, get_peft_model

    from tinyllm.attention import use_packed_attention
    from tinyllm.fast_lora import use_fast_lora
    from tinyllm.fused_layers import join_projections, use_fused_layers

    assert use_packed_attention(base) and use_fused_layers(base)
    config = LoraConfig(init_lora_weights=False, **lora)
    use_fast_lora(config)
    torch.manual_seed(1)
    model = get_peft_model(base, config).train()
    if joins:
        join_projections(model)
    return model


def hear_ctrl_c() -> None:
    """For a child before it starts: Ctrl-C ends it, also where the tests run in the background,
    for a shell has what it puts there ignore SIGINT, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def write_jsonl(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8"
    )
    return path


ROWS = [
    {"question": "你好", "answer": "你好！我是由李小贱开发的个人助手。"},
    {"question": "你是谁？", "answer": "我是由李小贱开发的个人助手。"},
    {"question": "一加一等于几？", "answer": "一加一等于二。"},
    {"question": "谢谢", "answer": "好的，谢谢。再见！"},
    {"question": "为什么天是蓝的？", "answer": "因为阳光里的蓝光散开得最多。"},
    {"question": "今天天气好吗？", "answer": "今天天气很好，我们去公园散步吧。"},
]


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def model():
    return make_model()


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory) -> Path:
    """A tiny base as ``save_pretrained`` writes it, with our chat template."""
    from tinyllm.chat_format import chat_format_of

    folder = tmp_path_factory.mktemp("base") / "tiny"
    tokenizer = make_tokenizer()
    chat_format_of(tokenizer)
    make_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data_file(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", ROWS)


def skip_without_compiler() -> None:
    """Skip where the compiled steps of training are not there."""
    from tinyllm.native import attention, pointwise

    if pointwise.library() is None or attention.library() is None:
        pytest.skip("no C compiler")


def skip_without(part, request) -> None:
    """Skip where a part of the compiled code is not there, for the kind of processor that a test is for."""
    if "processor" in request.fixturenames:
        request.getfixturevalue("processor")
    if part.library() is None:
        pytest.skip("no C compiler, or a processor that does not multiply pairs of bfloat16")


@pytest.fixture(params=["", "-mno-avx512f", "-mno-avx2 -mno-avx512f", "-mno-avx512bf16"])
def processor(request, tmp_path_factory, monkeypatch):
    """The compiled steps of training for several kinds of processor."""
    from tinyllm.native import attention, head, lora, pointwise

    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.getbasetemp() / "compiled"  # each kind once
    monkeypatch.setenv("CC", f"{compiler} {request.param}".strip())
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    libraries = [part.library for part in (attention, head, lora, pointwise)]
    for library in libraries:
        library.cache_clear()
    if pointwise.library() is None:
        pytest.skip(f"the compiler does not take {request.param}")
    yield request.param
    for library in libraries:
        library.cache_clear()


def train_arguments(base: Path, data: Path, output: Path, *more: str) -> list[str]:
    """The words of a short training on the CPU."""
    return [
        "--base_model_path", str(base), "--dataset", str(data), "--output_dir", str(output),
        "--use_cpu", "True", "--per_device_train_batch_size", "2",
        "--gradient_accumulation_steps", "1", "--num_train_epochs", "2", "--eval_share", "0.2",
        "--lora_r", "4", "--learning_rate", "5e-3", "--num_sample_replies", "1",
        "--disable_tqdm", "True", "--report", "False", "--report_to", "none",
        "--eval_replies", "0", *more,
    ]  # fmt: skip


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, base_folder, data_file) -> Path:
    """The folder of a finished LoRA run on the tiny base."""
    import sft_lora

    output = tmp_path_factory.mktemp("runs") / "run"
    words = train_arguments(base_folder, data_file, output, "--report", "True", "--eval_replies", "1",
                            "--logging_steps", "1")  # fmt: skip
    assert sft_lora.main(words) == 0
    return output
